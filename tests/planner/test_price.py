"""The price of room: nobody is deferred for being dear while everybody fits, and the dearest go first."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.planner.price import LEAST_KNOWN, MOST_SHARE, REMEMBERED, RoomPrice, work_s


def fed(costs: list[float], *, fitted: bool) -> RoomPrice:
    price = RoomPrice()
    for cost in costs:
        price.note(cost, 0.0, fitted=fitted, dear=False)
    return price


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=600))
def test_nobody_is_too_dear_while_everybody_fits(costs: list[float]) -> None:
    assert not fed(costs, fitted=True).too_dear(1e9, 0.0)


def test_the_dearest_are_turned_away_first_when_room_is_short() -> None:
    costs = [float(cost) for cost in range(1, REMEMBERED + 1)]
    random.Random(1).shuffle(costs)
    price = fed(costs, fitted=True)
    price.note(1.0, 0.0, fitted=False, dear=False)
    assert price.too_dear(REMEMBERED + 1.0, 0.0)
    assert not price.too_dear(REMEMBERED * 0.9, 0.0)


def test_never_more_than_half_are_too_dear() -> None:
    price = fed([float(cost) for cost in range(1, 200)], fitted=False)
    assert not price.too_dear(200 * (1 - MOST_SHARE) - 2, 0.0)


def test_time_and_those_turned_away_lower_the_price() -> None:
    price = fed([float(cost) for cost in range(1, 200)], fitted=False)
    assert price.too_dear(150.0, 1.0)
    assert not price.too_dear(150.0, 60.0)
    price = fed([float(cost) for cost in range(1, 200)], fitted=False)
    for _ in range(12):
        price.note(150.0, 0.0, fitted=True, dear=True)
    assert not price.too_dear(150.0, 0.0)


def test_nothing_is_known_of_prices_at_first() -> None:
    price = fed([1.0] * (LEAST_KNOWN - 1), fitted=False)
    assert not price.too_dear(2.0, 0.0)


def test_work_is_tokens_and_a_share_of_the_memory_of_every_step() -> None:
    assert work_s(0.02, 1e-4, 10_000, 500, 0) == pytest.approx(0.05)
    assert work_s(0.0, 1e-4, 10_000, 500, 100) == pytest.approx(0.06)
    assert work_s(0.02, 0.0, 10_000, 500, 100) == pytest.approx(0.02 * 100 * 550 / 10_000)
