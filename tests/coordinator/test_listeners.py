"""What listens where: an endpoint that others reach is not changed by whoever may ask it."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.cluster_process import _checked
from coordinator.config import load_config
from coordinator.listeners import check_ports_free, free_ports, is_loopback


@pytest.mark.parametrize(
    ("host", "alone"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("10.0.0.1", False)],
)
def test_loopback_is_told_from_what_others_reach(host: str, alone: bool) -> None:
    assert is_loopback(host) is alone


def test_an_endpoint_that_others_reach_gets_an_admin_key_unless_it_has_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    asked = {"model": str(tmp_path), "endpoint.port": 0}

    def admin_key(**more: str) -> str | None:
        settings = {f"endpoint.{key}": value for key, value in more.items()}
        return _checked(load_config(None, asked | settings), lambda event: None).endpoint.admin_key

    assert admin_key() is None
    made = admin_key(host="0.0.0.0")
    assert made
    assert admin_key(host="0.0.0.0") != made
    assert admin_key(host="0.0.0.0", admin_key="mine") == "mine"


def test_ports_that_are_chosen_are_free_and_are_given_to_no_outgoing_connection() -> None:
    outgoing_from = 32_768  # on Linux, unless a machine is set up otherwise
    for count in (1, 4):
        first = free_ports(count)
        check_ports_free("127.0.0.1", range(first, first + count))
        assert first + count <= outgoing_from
