"""When tokens of running decodes are due: the compiled way gives what the definition does."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.planner.dues import dues, running_by_tier

PERIODS_S = [0.05, 0.1, 0.03]
DECODES = st.lists(st.tuples(st.integers(0, 2), st.floats(-0.2, 0.5), st.integers(0, 5000)), max_size=12)


@given(DECODES, st.lists(st.integers(1, 4), min_size=3, max_size=3), st.floats(0.0, 3.0))
@settings(max_examples=200, deadline=None)
def test_tokens_are_due_in_order_with_the_slots_of_all_before(
    decodes: list[tuple[int, float, int]], slots: list[int], until_s: float
) -> None:
    tiers = np.array([tier for tier, _, _ in decodes], dtype=np.int64)
    due_s = np.array([due for _, due, _ in decodes], dtype=float)
    times_s, sums = dues(tiers, due_s, np.array(PERIODS_S), np.array(slots, dtype=float), until_s)

    expected: list[tuple[float, int]] = []
    for tier, due, _ in decodes:
        count = max(math.ceil((until_s - due) / PERIODS_S[tier]), 0) + 1
        expected += [(due + nth * PERIODS_S[tier], slots[tier]) for nth in range(count)]
    expected.sort(key=lambda pair: pair[0])
    assert times_s.tolist() == [time_s for time_s, _ in expected]
    assert sums.tolist() == [0, *np.cumsum([slot for _, slot in expected]).tolist()]


@given(DECODES)
def test_decodes_are_counted_by_tier(decodes: list[tuple[int, float, int]]) -> None:
    tiers, due_s, context = (np.array([one[at] for one in decodes], dtype=float) for at in range(3))
    running, tokens, active_s = running_by_tier(tiers.astype(np.int64), due_s, context, np.array(PERIODS_S))

    for tier, period_s in enumerate(PERIODS_S):
        here = [(due, held) for of, due, held in decodes if of == tier]
        assert running[tier] == len(here)
        assert tokens[tier] == sum(held for _, held in here)
        assert active_s[tier] == min((max(due - period_s, 0.0) for due, _ in here), default=math.inf)
