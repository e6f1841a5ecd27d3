"""Handoffs survive the way through vLLM's kv_transfer_params, and what is no offer says so."""

from __future__ import annotations

from typing import Any

import pytest

from kv_transfer.base import TransferError
from kv_transfer.params import (
    handoff_from_params,
    kv_transfer_config,
    params_for_decode,
    params_for_prefill,
)

OFFERED: dict[str, Any] = {
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "remote_block_ids": [[1, 2]],
    "remote_engine_id": "p0",
    "remote_request_id": "r1",
    "remote_host": "10.0.0.1",
    "remote_port": 5600,
    "remote_num_tokens": 40,
    "tp_size": 1,
    "kv_bytes": 8192,
    "lease_s": 30.0,
    "lease_slot": 7,
    "lease_nonce": 12345,
    "checksums": [[17, -4]],
}


def test_a_handoff_carries_what_the_target_needs() -> None:
    handoff = handoff_from_params("r1", OFFERED)
    assert (handoff.source, handoff.num_tokens, handoff.kv_bytes) == ("p0", 40, 8192)
    params = params_for_decode(handoff, pull_deadline_s=2.5)
    assert params["do_remote_prefill"] is True
    assert params["do_remote_decode"] is False
    assert params["pull_deadline_s"] == 2.5
    assert {key: params[key] for key in OFFERED} == OFFERED


def test_the_time_left_is_what_the_caller_says() -> None:
    handoff = handoff_from_params("r1", OFFERED, lease_s=3.5)
    assert handoff.lease_s == 3.5
    assert params_for_decode(handoff)["lease_left_s"] == 3.5


def test_decode_params_do_not_change_the_handoff() -> None:
    handoff = handoff_from_params("r1", OFFERED)
    params_for_decode(handoff)["do_remote_prefill"] = False
    assert handoff.params == OFFERED


@pytest.mark.parametrize("params", [None, {}])
def test_a_prefill_without_an_offer_says_so(params: dict[str, Any] | None) -> None:
    with pytest.raises(TransferError, match="r1 ended without an offer"):
        handoff_from_params("r1", params)


def test_an_offer_of_another_connector_names_what_it_lacks() -> None:
    stock = {key: value for key, value in OFFERED.items() if not key.startswith("lease")}
    with pytest.raises(TransferError, match="lease_s, lease_slot, lease_nonce"):
        handoff_from_params("r1", stock)


def test_the_config_recomputes_what_cannot_be_loaded() -> None:
    config = kv_transfer_config(lease_s=0.5, pull_deadline_s=2.0, engine_id="n1")
    assert config["kv_load_failure_policy"] == "recompute"
    assert config["kv_connector_extra_config"] == {
        "kv_lease_duration": 0.5,
        "pull_deadline_s": 2.0,
        "checksum": True,
    }
    assert config["engine_id"] == "n1"
    assert params_for_prefill() == {"do_remote_decode": True, "do_remote_prefill": False}


@pytest.mark.parametrize(("lease_s", "pull_deadline_s"), [(0.0, 1.0), (1.0, -1.0)])
def test_times_must_be_positive(lease_s: float, pull_deadline_s: float) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        kv_transfer_config(lease_s, pull_deadline_s, "n1")
