"""The margin that model error asks for."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.residuals import Residuals


def test_without_a_step_there_is_no_margin() -> None:
    assert Residuals().margin(0.99) == 0.0


def test_a_margin_covers_the_share_it_was_asked_for() -> None:
    noise = random.Random(0)
    residuals = Residuals(window=500)
    for _ in range(500):
        residuals.note(noise.lognormvariate(0.0, 0.1))
    for share in (0.5, 0.9, 0.99):
        margin = residuals.margin(share)
        new = [noise.lognormvariate(0.0, 0.1) for _ in range(4000)]
        kept = sum(ratio <= 1 + margin for ratio in new) / len(new)
        assert kept == pytest.approx(share, abs=0.05)


@given(st.lists(st.floats(0.1, 10.0), min_size=1, max_size=50), st.floats(0.0, 1.0))
def test_a_margin_covers_that_share_of_the_steps_it_has_seen(ratios: list[float], share: float) -> None:
    residuals = Residuals()
    for ratio in ratios:
        residuals.note(ratio)
    bound = (1 + residuals.margin(share)) * (1 + 1e-9)
    assert sum(ratio <= bound for ratio in ratios) >= share * len(ratios) - 1e-9


def test_old_steps_are_forgotten() -> None:
    residuals = Residuals(window=10)
    residuals.note(9.0)
    for _ in range(10):
        residuals.note(1.1)
    assert residuals.margin(1.0) == pytest.approx(0.1)


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_share_beyond_all_is_an_error(share: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        Residuals().margin(share)
