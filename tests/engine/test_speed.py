"""What a node learns from each step of how fast it is."""

from __future__ import annotations

import pytest

from engine.base import StepReport
from engine.cost import StepCost
from engine.speed import Speed

COST = StepCost.line(10e-3, 1e-4)


def step(ratio: float, tokens: int = 100) -> StepReport:
    return StepReport(ratio * COST.predict(tokens), tokens, 1, 0, 0, 0.0)


def test_the_first_step_is_the_usual_one_and_later_ones_move_it() -> None:
    speed = Speed(COST, 0.0)
    speed.learn(step(1.0), 1.0)
    assert speed.usual_s == COST.predict(100)
    speed.learn(step(2.0), 2.0)
    assert speed.usual_s == pytest.approx(1.1 * COST.predict(100))
    assert speed.steps == 2


def test_by_the_profile_a_step_takes_what_it_would_on_the_idle_machine() -> None:
    speed = Speed(COST, 0.0)
    for _ in range(20):
        assert speed.learn(step(1.5), 1.0) == pytest.approx(COST.predict(100))
    assert speed.cost.drift == pytest.approx(1.5, rel=0.1)


def test_slow_steps_widen_the_margins_from_the_next_refresh_on() -> None:
    speed = Speed(COST, 0.0)
    speed.learn(step(1.25), 1.0)
    assert speed.plan_margin == speed.batch_margin == 0.0
    speed.refresh()
    assert speed.plan_margin == speed.batch_margin == pytest.approx(0.25)


def test_what_a_slow_spell_taught_fades_while_nothing_runs() -> None:
    speed = Speed(COST, 0.0)
    for _ in range(20):
        speed.learn(step(2.0), 1.0)
    before = speed.cost.drift
    speed.rest(2.0)
    middle = speed.cost.drift
    speed.rest(1e6)
    assert speed.cost.drift == pytest.approx(1.0)
    assert 1.0 < middle < before


def test_an_empty_batch_says_nothing_of_the_next() -> None:
    speed = Speed(COST, 0.0)
    speed.learn(StepReport(5.0, 0, 0, 0, 0, 0.0), 1.0)
    speed.refresh()
    assert (speed.cost.drift, speed.batch_margin) == (1.0, 0.0)
