"""Running decodes by tier, and when their tokens are due. Compiled, as it is done for every candidate."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from engine.compiled import compiled

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@compiled
def running_by_tier(tiers, due_s, context_tokens, period_s):  # type: ignore[no-untyped-def]
    """[T] each: how many run, KV tokens that they read, and from when on the tier binds (infinite: never)."""
    count = len(period_s)
    running, context, active_s = np.zeros(count), np.zeros(count), np.full(count, math.inf)
    for one in range(len(tiers)):
        tier = tiers[one]
        running[tier] += 1
        context[tier] += context_tokens[one]
        active_s[tier] = min(active_s[tier], max(due_s[one] - period_s[tier], 0.0))
    return running, context, active_s


def dues(tiers: Ints, due_s: Floats, period_s: Floats, slots: Floats, until_s: float) -> tuple[Floats, Floats]:
    """Due times of the tokens of running decodes until then, sorted; the sum of their slots so far."""
    times_s, which = _times_s(tiers, due_s, period_s, until_s)
    if not len(times_s) or (slots == slots[0]).all():
        # Slots are whole numbers: so many of them add up to their product.
        return np.sort(times_s), np.arange(len(times_s) + 1) * (slots[0] if len(slots) else 1.0)
    order = np.argsort(times_s, kind="stable")
    return times_s[order], np.concatenate(([0.0], np.cumsum(slots[which[order]])))


@compiled
def _times_s(tiers, due_s, period_s, until_s):  # type: ignore[no-untyped-def]
    """When each token is due until then, decode by decode, and of which tier it is."""
    count = np.empty(len(tiers), np.int64)
    for one in range(len(tiers)):
        count[one] = max(math.ceil((until_s - due_s[one]) / period_s[tiers[one]]), 0) + 1
    times_s, which = np.empty(count.sum()), np.empty(count.sum(), np.int64)
    at = 0
    for one in range(len(tiers)):
        for nth in range(count[one]):
            times_s[at], which[at] = due_s[one] + nth * period_s[tiers[one]], tiers[one]
            at += 1
    return times_s, which
