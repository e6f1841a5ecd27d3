"""The time that tokens take to the client is followed, and no client that hangs makes promises impossible."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.endpoint.delivery import MOST_S, Delivery


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
