"""The time that tokens take to the client is followed, and no client that hangs makes promises impossible."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.output_processor import RequestOutputCollector

from coordinator.endpoint.delivery import MOST_S, Delivery
from coordinator.endpoint.engine import ClusterEngine


def test_a_steady_delivery_is_learned_and_forgotten_when_it_changes() -> None:
    delivery = Delivery()
    assert delivery.seconds == 0.0
    for seconds in (0.008, 0.002):
        for _ in range(1000):
            delivery.note(seconds)
        assert delivery.seconds == pytest.approx(seconds, rel=0.01)


def test_what_scatters_has_more_time_kept_free_for_it() -> None:
    steady, scattered = Delivery(), Delivery()
    for turn in range(1000):
        steady.note(0.005)
        scattered.note(0.01 if turn % 2 else 0.0)
    assert scattered.seconds > 1.5 * steady.seconds


@given(st.lists(st.floats(-1.0, 1e6), max_size=200))
def test_whatever_is_seen_little_is_kept_free(seen: list[float]) -> None:
    delivery = Delivery()
    for seconds in seen:
        delivery.note(seconds)
        assert 0.0 <= delivery.seconds <= 2 * MOST_S


@pytest.mark.parametrize("streamed", [True, False])
async def test_an_answer_that_is_sent_whole_says_nothing_of_how_long_tokens_take(streamed: bool) -> None:
    engine: Any = SimpleNamespace(_delivery=Delivery(), _abandon=lambda _: None)
    collector = RequestOutputCollector(RequestOutputKind.DELTA, "r")
    context = SimpleNamespace(in_background=False)
    journey: Any = SimpleNamespace(collector=collector, context=context, came_s=None)
    outputs = ClusterEngine._follow(engine, journey)
    for finished in [False, True] if streamed else [True]:
        journey.came_s = time.monotonic() - 1.0  # the first token came then
        collector.put(RequestOutput("r", None, None, None, [], finished))
        assert (await anext(outputs)).finished is finished
    assert await anext(outputs, None) is None
    assert (engine._delivery.seconds > 0) is streamed
