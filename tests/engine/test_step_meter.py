"""Chosen batches on an engine: each runs exactly as asked, and what is measured gives the engine's own cost."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.batch_shapes import MIN_CHUNK_TOKENS, Limits, Shape, draw_shapes
from engine.cost import Piece, StepCost
from engine.errors import EngineError
from engine.profile import StepProfile
from engine.step_meter import Measured, StepMeter, median_rows
from engine.step_table import StepRow, StepTable
from tests.engine.timed_engine import TimedEngine

COST = StepCost(
    (Piece(3e-3, 2e-5),), per_context_token_s=3e-7, per_prefill_work_s=1e-8, per_prefill_kv_token_s=1e-6
)


def meter_on(engine: TimedEngine, steps: int = 200, waited_s: Callable[[], float] = lambda: 0.0) -> StepMeter:
    return StepMeter(
        engine, engine.start(), lambda max_tokens: b"%d" % max_tokens, steps=steps, seed=0, waited_s=waited_s
    )


def prepared(engine: TimedEngine, steps: int = 200) -> StepMeter:
    meter = meter_on(engine, steps)
    assert all(0 <= share < 1 for share in meter.prepare())
    return meter


@given(
    limits=st.builds(Limits, st.integers(1, 64), st.integers(64, 4096), st.integers(0, 8192), st.just(32)),
    seed=st.integers(0, 1000),
)
def test_shapes_stay_within_their_limits(limits: Limits, seed: int) -> None:
    shapes = draw_shapes(20, limits, seed)
    assert shapes == draw_shapes(20, limits, seed)
    for shape in shapes:
        assert 1 <= shape.tokens <= limits.max_batch_tokens
        assert shape.decodes <= limits.max_decodes
        for chunk, kv in shape.chunks:
            assert chunk >= MIN_CHUNK_TOKENS
            assert kv <= limits.max_kv_tokens
            assert kv % limits.block_size == 0


def test_shapes_are_of_every_kind() -> None:
    shapes = draw_shapes(100, Limits(64, 1024, 2048, 32), seed=0)
    kinds = {(shape.decodes > 0, bool(shape.chunks)) for shape in shapes}
    assert kinds == {(True, False), (False, True), (True, True)}
    assert max(shape.decodes for shape in shapes) > 50
    assert {len(shape.chunks) for shape in shapes} == {0, 1, 2, 3}


def test_every_batch_runs_as_it_was_asked_for() -> None:
    meter = prepared(TimedEngine(COST))
    for shape in draw_shapes(150, meter.limits, seed=1):
        row = meter.measure(shape).row
        assert row is not None
        assert (row.tokens, row.decode_seqs, row.prefill_chunks) == (shape.tokens, shape.decodes, shape.chunks)


def test_short_contexts_are_shorter_than_long_ones() -> None:
    meter = prepared(TimedEngine(COST))
    short, long = meter.measure(Shape(4, "short")).row, meter.measure(Shape(4, "long")).row
    assert short is not None
    assert long is not None
    assert 10 * short.decode_context_tokens < long.decode_context_tokens


def test_prepared_again_contexts_are_what_they_were() -> None:
    meter = prepared(TimedEngine(COST))
    first = meter.measure(Shape(8, "long")).row
    for _ in range(5):
        meter.measure(Shape(8, "long"))
    deque(meter.prepare(), maxlen=0)
    assert meter.measure(Shape(8, "long")).row == first


def test_what_is_measured_gives_the_cost_of_the_engine() -> None:
    meter = prepared(TimedEngine(COST), steps=300)
    rounds = [[meter.measure(shape) for shape in draw_shapes(300, meter.limits, seed=0)]]
    profile = StepProfile.fit(StepTable(tuple(median_rows(rounds))))
    assert profile.held_out.median_error < 0.005
    assert profile.cost.per_context_token_s == pytest.approx(COST.per_context_token_s, rel=0.05)
    assert profile.cost.per_prefill_kv_token_s == pytest.approx(COST.per_prefill_kv_token_s, rel=0.05)


def test_nothing_is_left_behind() -> None:
    engine = TimedEngine(COST)
    meter = prepared(engine)
    meter.measure(Shape(3, "any", ((32, 64),)))
    meter.close()
    assert not engine.has_work()
    assert not engine.remembers


def test_a_cache_that_is_too_small_is_an_error() -> None:
    with pytest.raises(EngineError, match="decodes fit in the KV cache"):
        prepared(TimedEngine(COST, kv_tokens=200))


def test_contexts_are_as_long_as_the_memory_allows() -> None:
    longest = []
    for kv_tokens in (1 << 30, 4_000):
        row = prepared(TimedEngine(COST, kv_tokens=kv_tokens), steps=20).measure(Shape(1, "long")).row
        assert row is not None
        longest.append(row.decode_context_tokens)
    assert longest[1] < longest[0] / 2


def test_more_steps_than_the_context_holds_are_an_error() -> None:
    with pytest.raises(EngineError, match="do not fit in a context of 1024"):
        meter_on(TimedEngine(COST), steps=2000)


def test_a_batch_that_was_another_gives_no_row() -> None:
    meter = prepared(TimedEngine(COST, max_batch_tokens=256))
    assert meter.measure(Shape(0, "any", ((300, 0),))).row is None


def test_a_step_is_counted_without_the_time_that_others_had_the_core() -> None:
    clock = count()  # a millisecond more at every look: at the start of a step and at its end
    quiet, busy = meter_on(TimedEngine(COST)), meter_on(TimedEngine(COST), waited_s=lambda: next(clock) * 1e-3)
    for meter in (quiet, busy):
        deque(meter.prepare(), maxlen=0)
    alone, among_others = quiet.measure(Shape(8, "long")), busy.measure(Shape(8, "long"))
    assert alone.row is not None
    assert among_others.row is not None
    assert among_others.waited_s == pytest.approx(1e-3)
    assert among_others.row.step_ms == pytest.approx(alone.row.step_ms - 1.0)


def test_the_median_step_is_kept_and_a_pause_is_not() -> None:
    def measured(step_ms: float | None) -> Measured:
        return Measured(Shape(1), None if step_ms is None else StepRow(1, 1, 1, 10, (), 0.0, step_ms))

    rounds = [
        [measured(2.0), measured(None)],
        [measured(90.0), measured(None)],
        [measured(3.0), measured(None)],
    ]
    assert [row.step_ms for row in median_rows(rounds)] == [3.0]
