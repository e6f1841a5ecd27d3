"""An engine that is held to a profile keeps its pace, and is otherwise the engine that it is."""

from __future__ import annotations

import time

import pytest

from engine.base import UNPLANNED, StepResult, Work
from engine.cost import StepCost
from engine.held import HeldEngine
from kv_transfer.fake import FakeFabric
from tests.engine.scripted_engine import COST, ScriptedEngine

LARGE = StepCost.line(base_s=0.05, per_token_s=1e-3)
PROMPT = list(range(20))


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine(FakeFabric(time.monotonic))


def step_of(engine: ScriptedEngine, cost: StepCost, sleeps: list[float]) -> StepResult:
    held = HeldEngine(engine, cost, sleeps.append)
    held.submit(Work("one", PROMPT, b"", max_tokens=2))
    return held.step(lambda seqs: UNPLANNED)


def test_a_step_lasts_as_long_as_the_profile_says(engine: ScriptedEngine) -> None:
    sleeps: list[float] = []
    result = step_of(engine, LARGE, sleeps)
    assert result.report is not None
    assert result.report.seconds == pytest.approx(LARGE.predict(len(PROMPT)))
    assert sleeps == [pytest.approx(LARGE.predict(len(PROMPT)) - engine.step_s)]
    assert [output.work_id for output in result.outputs] == ["one"]


def test_a_step_that_took_longer_is_told_as_it_was(engine: ScriptedEngine) -> None:
    sleeps: list[float] = []
    result = step_of(engine, COST, sleeps)
    assert result.report is not None
    assert result.report.seconds == engine.step_s
    assert sleeps == []


def test_nothing_to_do_takes_no_time(engine: ScriptedEngine) -> None:
    sleeps: list[float] = []
    held = HeldEngine(engine, LARGE, sleeps.append)
    assert held.step(lambda seqs: UNPLANNED).report is None
    assert sleeps == []


def test_what_it_measures_of_itself_is_what_it_keeps_to(engine: ScriptedEngine) -> None:
    reports = HeldEngine(engine, LARGE).profile_step_times()
    assert [report.seconds for report in reports] == [pytest.approx(LARGE.of(report)) for report in reports]
