"""The cost of a step: fitted, inverted, and kept fresh."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.base import StepReport
from engine.cost import REST_TIME_S, Piece, StepCost
from engine.speed import Speed

OPT_7B_A100 = StepCost.line(24.8e-3, 6.9e-5)

lines = st.builds(Piece, st.floats(0.0, 0.5), st.floats(1e-6, 1e-2), st.floats(0.0, 0.1))
costs = st.builds(
    StepCost,
    pieces=st.lists(lines, min_size=1, max_size=3).map(tuple),
    per_context_token_s=st.floats(0.0, 1e-5),
    per_prefill_work_s=st.floats(0.0, 1e-6),
    per_seq_s=st.floats(0.0, 1e-3),
    per_prefill_kv_token_s=st.floats(0.0, 1e-6),
    drift=st.floats(0.2, 5.0),
)
besides = st.fixed_dictionaries(
    {
        "seqs": st.integers(0, 256),
        "context_tokens": st.integers(0, 1_000_000),
        "prefill_work": st.floats(0.0, 1e7),
        "draft_steps": st.integers(0, 9),
        "prefill_kv_tokens": st.integers(0, 100_000),
    }
)


def _learned(cost: StepCost, step: StepReport) -> StepCost:
    speed = Speed(cost, 0.0)
    speed.learn(step, 0.0)
    return speed.cost


def rounding_s(cost: StepCost) -> float:
    """Seconds of the millionth of a token by which a budget may be off and still count as whole."""
    return 2e-6 * max(piece.per_token_s for piece in cost.pieces) * cost.drift + 1e-9


def report(tokens: int, seconds: float) -> StepReport:
    return StepReport(seconds, tokens, seqs=1, decode_seqs=0, decode_context_tokens=0, prefill_work=0.0)


def test_published_constants_give_the_published_batches() -> None:
    assert OPT_7B_A100.tokens_in(49e-3) == 350
    assert OPT_7B_A100.tokens_in(99e-3) == 1075
    assert OPT_7B_A100.tokens_in(20e-3) == 0


@given(cost=costs, seconds=st.floats(0.0, 10.0), beside=besides)
def test_tokens_in_is_the_most_that_fits(cost: StepCost, seconds: float, beside: dict[str, Any]) -> None:
    tokens = cost.tokens_in(seconds, **beside)
    if tokens > 0:
        assert cost.predict(tokens, **beside) <= seconds + rounding_s(cost)
    assert cost.predict(tokens + 1, **beside) > seconds - 1e-9


@given(
    cost=costs,
    seconds=st.floats(0.0, 10.0),
    beside=besides,
    tokens=st.integers(0, 500),
    kv_tokens=st.integers(0, 100_000),
)
def test_chunk_in_is_the_most_that_fits_with_its_attention(
    cost: StepCost, seconds: float, beside: dict[str, Any], tokens: int, kv_tokens: int
) -> None:
    def with_chunk(chunk: int) -> float:
        more = {
            "seqs": beside["seqs"] + 1,
            "prefill_work": beside["prefill_work"] + chunk * (kv_tokens + chunk / 2),
            "prefill_kv_tokens": beside["prefill_kv_tokens"] + kv_tokens,
        }
        return cost.predict(tokens + chunk, **(beside | more))

    chunk = cost.chunk_in(seconds, kv_tokens, tokens=tokens, **beside)
    if chunk > 0:
        work_s = 1e-6 * cost.per_prefill_work_s * (kv_tokens + chunk) * cost.drift
        assert with_chunk(chunk) <= seconds * (1 + 1e-9) + rounding_s(cost) + 2 * work_s
    assert with_chunk(chunk + 1) > seconds * (1 - 1e-9) - 1e-9


@given(cost=costs, tokens=st.integers(1, 5000), more=st.integers(1, 5000), beside=besides)
def test_more_tokens_take_longer(cost: StepCost, tokens: int, more: int, beside: dict[str, Any]) -> None:
    assert cost.predict(tokens + more, **beside) > cost.predict(tokens, **beside) > 0


@given(cost=costs, tokens=st.integers(1, 5000), beside=besides, more=besides)
def test_nothing_in_a_batch_makes_it_quicker(
    cost: StepCost, tokens: int, beside: dict[str, Any], more: dict[str, Any]
) -> None:
    both = {name: beside[name] + more[name] for name in beside}
    assert cost.predict(tokens, **both) >= cost.predict(tokens, **beside)


def test_the_dearest_piece_counts() -> None:
    cost = StepCost((Piece(10e-3, 0.0), Piece(5e-3, 1e-4)))
    assert cost.predict(1) == cost.predict(50) == 10e-3
    assert cost.predict(100) == pytest.approx(15e-3)
    assert cost.tokens_in(9.9e-3) == 0
    assert cost.tokens_in(10e-3) == 50


@given(cost=costs)
def test_a_cost_survives_json(cost: StepCost) -> None:
    assert msgspec.convert(msgspec.to_builtins(cost), StepCost) == cost
    assert msgspec.json.decode(msgspec.json.encode(cost), type=StepCost) == cost


def test_a_prefill_alone_pays_the_base_once_a_batch() -> None:
    assert OPT_7B_A100.prefill_alone_s(100, 512) == OPT_7B_A100.predict(100)
    assert OPT_7B_A100.prefill_alone_s(1024, 512) == pytest.approx(2 * OPT_7B_A100.predict(512))
    assert OPT_7B_A100.prefill_alone_s(1025, 512) == pytest.approx(
        2 * OPT_7B_A100.predict(512) + OPT_7B_A100.predict(1)
    )
    assert OPT_7B_A100.prefill_alone_s(0, 512) == 0.0


def test_a_prefill_alone_attends_to_what_it_has_computed() -> None:
    cost = StepCost((Piece(0.0, 1e-4),), per_prefill_work_s=1e-8, per_seq_s=1e-3, per_prefill_kv_token_s=1e-6)
    whole = 100e-3 + 1e-8 * 1000**2 / 2
    assert cost.prefill_alone_s(1000, 2048) == pytest.approx(whole + 1e-3)
    assert cost.prefill_alone_s(1000, 500) == pytest.approx(whole + 2e-3 + 500e-6)
    cached = 50e-3 + 1e-8 * 500 * 750 + 1e-3 + 500e-6
    assert cost.prefill_alone_s(1000, 2048, cached_tokens=500) == pytest.approx(cached)


@given(base_s=st.floats(0.0, 0.1), per_token_s=st.floats(1e-6, 1e-3))
def test_fit_finds_the_line_that_the_steps_lie_on(base_s: float, per_token_s: float) -> None:
    cost = StepCost.fit([report(n, base_s + per_token_s * n) for n in (1, 16, 64, 256, 1024)])
    (piece,) = cost.pieces
    assert piece.base_s == pytest.approx(base_s, abs=1e-9)
    assert piece.per_token_s == pytest.approx(per_token_s, rel=1e-6)


@given(st.lists(st.tuples(st.integers(1, 4096), st.floats(1e-4, 1.0)), min_size=1, max_size=20))
def test_fit_is_never_negative(steps: list[tuple[int, float]]) -> None:
    cost = StepCost.fit([report(tokens, seconds) for tokens, seconds in steps])
    (piece,) = cost.pieces
    assert piece.base_s >= 0
    assert piece.per_token_s > 0
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
        cost = _learned(cost, report(200, 2 * OPT_7B_A100.predict(200)))
    assert cost.predict(200) == pytest.approx(2 * OPT_7B_A100.predict(200), rel=0.02)
    assert cost.tokens_in(99e-3) < OPT_7B_A100.tokens_in(99e-3)


def test_drift_follows_a_node_three_times_as_slow_and_keeps_the_fit() -> None:
    fitted = StepCost((Piece(5e-3, 5e-5),), per_context_token_s=1e-7, per_seq_s=1e-5)
    steps = [StepReport(0.0, 64 + n, 64, 64, 1000 * n, prefill_work=0.0) for n in range(1, 101)]
    cost = fitted
    for step in steps:
        cost = _learned(cost, replace(step, seconds=3 * fitted.of(step)))
    assert cost.drift == pytest.approx(3.0, rel=0.02)
    assert replace(cost, drift=1.0) == fitted
    assert cost.rested(10 * REST_TIME_S).drift == pytest.approx(1.0, abs=1e-3)


def test_one_pause_is_no_drift() -> None:
    cost = _learned(OPT_7B_A100, report(200, 60.0))
    assert cost.predict(200) < 1.25 * OPT_7B_A100.predict(200)
    assert _learned(OPT_7B_A100, report(0, 1.0)) == OPT_7B_A100


def test_a_machine_that_has_rested_is_as_quick_as_it_was_measured() -> None:
    slow = replace(OPT_7B_A100, drift=3.0)
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
    assert replace(rested, drift=1.0) == replace(cost, drift=1.0)


@pytest.mark.parametrize(
    "wrong",
    [(math.nan, 1e-5, 1.0), (1e-3, math.inf, 1.0), (-1e-3, 1e-5, 1.0), (1e-3, 0.0, 1.0), (1e-3, 1e-5, 0.0)],
)
def test_a_cost_that_makes_no_sense_cannot_be_built(wrong: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="a step cannot cost"):
        StepCost((Piece(wrong[0], wrong[1]),), drift=wrong[2])
