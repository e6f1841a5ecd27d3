"""Who serves what: a pair where it can, one node where the prompt's logits or several sequences need it."""

from __future__ import annotations

from typing import Any

import pytest
from vllm import SamplingParams

from coordinator.endpoint.features import ServedBy, served_by
from engine.errors import RequestError


@pytest.mark.parametrize(
    ("params", "way"),
    [
        ({}, ServedBy.PAIR),
        ({"logprobs": 3, "seed": 1, "presence_penalty": 0.5}, ServedBy.PAIR),
        ({"n": 2, "temperature": 1.0}, ServedBy.ONE_NODE),
        ({"prompt_logprobs": 0}, ServedBy.ONE_NODE),
    ],
)
def test_what_acts_on_sampling_works_on_a_pair(params: dict[str, Any], way: ServedBy) -> None:
    assert served_by(SamplingParams(**params)) is way
    assert served_by(SamplingParams(**params), pairs=False) is ServedBy.ONE_NODE


def test_where_kv_goes_is_not_for_a_client_to_say() -> None:
    with pytest.raises(RequestError, match="kv_transfer_params"):
        served_by(SamplingParams(extra_args={"kv_transfer_params": {"remote_host": "elsewhere"}}))


def test_an_engine_without_a_model_has_no_logprobs() -> None:
    with pytest.raises(RequestError, match="virtual"):
        served_by(SamplingParams(logprobs=1), virtual=True)
