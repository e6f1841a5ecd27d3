"""The cost of a step: fitted, inverted, and kept fresh."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.base import StepReport
from engine.cost import REST_TIME_S, StepCost

OPT_7B_A100 = StepCost(base_s=24.8e-3, per_token_s=6.9e-5)

costs = st.builds(
    StepCost,
    base_s=st.floats(0.0, 0.5),
    per_token_s=st.floats(1e-6, 1e-2),
    drift=st.floats(0.2, 5.0),
)


def report(tokens: int, seconds: float) -> StepReport:
    return StepReport(seconds, tokens, seqs=1, decode_seqs=0, decode_context_tokens=0, prefill_work=0.0)


def test_published_constants_give_the_published_batches() -> None:
    assert OPT_7B_A100.tokens_in(49e-3) == 350
    assert OPT_7B_A100.tokens_in(99e-3) == 1075
    assert OPT_7B_A100.tokens_in(20e-3) == 0


@given(cost=costs, seconds=st.floats(0.0, 10.0))
def test_tokens_in_is_the_most_that_fits(cost: StepCost, seconds: float) -> None:
    tokens = cost.tokens_in(seconds)
    if tokens > 0:
        assert cost.predict(tokens) <= seconds + 2e-6 * cost.per_token_s * cost.drift + 1e-12
    assert cost.predict(tokens + 1) > seconds - 1e-9


@given(cost=costs, tokens=st.integers(1, 5000), more=st.integers(1, 5000))
def test_more_tokens_take_longer(cost: StepCost, tokens: int, more: int) -> None:
    assert cost.predict(tokens + more) > cost.predict(tokens) > 0


def test_a_prefill_alone_pays_the_base_once_a_batch() -> None:
    assert OPT_7B_A100.prefill_alone_s(100, 512) == OPT_7B_A100.predict(100)
    assert OPT_7B_A100.prefill_alone_s(1024, 512) == pytest.approx(2 * OPT_7B_A100.predict(512))
    assert OPT_7B_A100.prefill_alone_s(1025, 512) == pytest.approx(
        2 * OPT_7B_A100.predict(512) + OPT_7B_A100.predict(1)
    )
    assert OPT_7B_A100.prefill_alone_s(0, 512) == 0.0


@given(base_s=st.floats(0.0, 0.1), per_token_s=st.floats(1e-6, 1e-3))
def test_fit_finds_the_line_that_the_steps_lie_on(base_s: float, per_token_s: float) -> None:
    cost = StepCost.fit([report(n, base_s + per_token_s * n) for n in (1, 16, 64, 256, 1024)])
    assert cost.base_s == pytest.approx(base_s, abs=1e-9)
    assert cost.per_token_s == pytest.approx(per_token_s, rel=1e-6)


@given(st.lists(st.tuples(st.integers(1, 4096), st.floats(1e-4, 1.0)), min_size=1, max_size=20))
def test_fit_is_never_negative(steps: list[tuple[int, float]]) -> None:
    cost = StepCost.fit([report(tokens, seconds) for tokens, seconds in steps])
    assert cost.base_s >= 0
    assert cost.per_token_s > 0
    assert math.isfinite(cost.predict(4096))


def test_fit_of_falling_times_is_their_mean() -> None:
    cost = StepCost.fit([report(10, 0.3), report(1000, 0.1)])
    assert cost.predict(500) == pytest.approx(0.2, rel=1e-4)


def test_fit_of_one_step_predicts_that_step() -> None:
    assert StepCost.fit([report(64, 0.1), report(0, 9.9)]).predict(64) == pytest.approx(0.1, rel=1e-4)


def test_fit_without_a_step_that_ran_says_so() -> None:
    with pytest.raises(ValueError, match="no measured step"):
        StepCost.fit([report(0, 0.1)])


def test_updates_follow_a_machine_that_has_become_slower() -> None:
    cost = OPT_7B_A100
    for _ in range(100):
        cost = cost.updated(report(200, 2 * OPT_7B_A100.predict(200)))
    assert cost.predict(200) == pytest.approx(2 * OPT_7B_A100.predict(200), rel=0.02)
    assert cost.tokens_in(99e-3) < OPT_7B_A100.tokens_in(99e-3)


def test_one_pause_is_no_drift() -> None:
    cost = OPT_7B_A100.updated(report(200, 60.0))
    assert cost.predict(200) < 1.25 * OPT_7B_A100.predict(200)
    assert OPT_7B_A100.updated(report(0, 1.0)) == OPT_7B_A100


def test_a_machine_that_has_rested_is_as_quick_as_it_was_measured() -> None:
    slow = StepCost(OPT_7B_A100.base_s, OPT_7B_A100.per_token_s, drift=3.0)
    assert slow.rested(0.0) == slow
    assert slow.rested(REST_TIME_S).drift == pytest.approx(1 + 2 / math.e)
    assert slow.rested(20 * REST_TIME_S).predict(200) == pytest.approx(OPT_7B_A100.predict(200))


@given(cost=costs, parts=st.lists(st.floats(0.0, 30.0), min_size=1, max_size=5))
def test_rest_counts_the_same_in_one_go_or_in_parts(cost: StepCost, parts: list[float]) -> None:
    rested = cost
    for seconds in parts:
        rested = rested.rested(seconds)
        assert min(1.0, cost.drift) <= rested.drift + 1e-9
        assert rested.drift <= max(1.0, cost.drift) + 1e-9
    assert rested.drift == pytest.approx(cost.rested(sum(parts)).drift)
    assert (rested.base_s, rested.per_token_s) == (cost.base_s, cost.per_token_s)


@pytest.mark.parametrize("wrong", [(-1e-3, 1e-5, 1.0), (1e-3, 0.0, 1.0), (1e-3, 1e-5, 0.0)])
def test_a_cost_that_makes_no_sense_cannot_be_built(wrong: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="a step cannot cost"):
        StepCost(*wrong)
