"""The compiled step-time model is the one that everything else uses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.cost import Piece, StepCost
from engine.cost_kernel import chunk_in, predict_s, prefill_alone_s, tokens_in
from engine.rows import CostArrays

SECONDS = st.floats(0, 0.05)
PIECES = st.builds(Piece, SECONDS, st.floats(1e-7, 1e-3), st.floats(0, 1e-2))
COSTS = st.builds(
    StepCost,
    st.lists(PIECES, min_size=1, max_size=3).map(tuple),
    st.floats(0, 1e-6),
    st.floats(0, 1e-8),
    st.floats(0, 1e-4),
    st.floats(0, 1e-6),
    st.floats(0.5, 2.0),
)
COUNTS = st.integers(0, 4096)


@given(
    cost=COSTS, tokens=COUNTS, seqs=COUNTS, context=COUNTS, work=st.floats(0, 1e7), drafts=st.integers(0, 9),
    kv=COUNTS,
)  # fmt: skip
def test_compiled_and_plain_costs_are_equal(
    cost: StepCost, tokens: int, seqs: int, context: int, work: float, drafts: int, kv: int
) -> None:
    arrays = CostArrays.of(cost)
    rest = {"prefill_work": work, "draft_steps": drafts, "prefill_kv_tokens": kv}
    expected_s = cost.predict(tokens, seqs=seqs, context_tokens=context, **rest)
    assert predict_s(arrays, tokens, seqs, context, work, drafts, kv) == pytest.approx(expected_s, rel=1e-12)
    for seconds in (0.0, 0.01, 0.1, 1.0):
        most = cost.tokens_in(seconds, seqs=seqs, context_tokens=context, **rest)
        assert tokens_in(arrays, seconds, seqs, context, work, drafts, kv) == pytest.approx(most, abs=1)
        chunk = cost.chunk_in(seconds, kv, tokens=tokens, seqs=seqs, context_tokens=context, draft_steps=drafts)
        assert chunk_in(arrays, seconds, kv, tokens, seqs, context, 0.0, drafts, 0) == pytest.approx(
            chunk, abs=1
        )


@given(cost=COSTS, prompt=COUNTS, most=st.integers(16, 2048), cached=COUNTS)
def test_compiled_and_plain_idle_prefills_are_equal(
    cost: StepCost, prompt: int, most: int, cached: int
) -> None:
    expected_s = cost.prefill_alone_s(prompt, most, cached)
    assert prefill_alone_s(CostArrays.of(cost), prompt, most, cached) == pytest.approx(expected_s, rel=1e-12)
