"""What batches hold: the budget that the label search counts with, compiled.

Tuples of flat arrays, with T tiers, P pieces of the cost line and E times at which tokens are due. `counts` are
decodes per tier that joined by a plan, beyond those that run.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from engine.compiled import compiled, compiled_bare, inlined

EPS_S = 1e-9
EPS_TOKENS = 1e-6


class Cost(NamedTuple):
    """`line`: [P, 2] base and seconds per token of each piece; `load`: most tokens of a batch, tokens for late
    ones; `full_s`: seconds of a batch of most tokens."""

    line: np.ndarray[Any, Any]
    load: np.ndarray[Any, Any]
    full_s: float


class Tiers(NamedTuple):
    """[T] each: seconds between steps of a decode and tokens of one; decodes that run and when they begin to
    bind; seconds that a step costs beyond its tokens for those that run, and for each that joins."""

    period_s: np.ndarray[Any, Any]
    slots: np.ndarray[Any, Any]
    running: np.ndarray[Any, Any]
    active_s: np.ndarray[Any, Any]
    tier_s: np.ndarray[Any, Any]
    joined_s: np.ndarray[Any, Any]


class Dues(NamedTuple):
    """`due_s`: [E] when tokens of running decodes are due; `slots`: [E + 1] how many until then, summed up;
    `horizon_s`: until when what is due must be covered."""

    due_s: np.ndarray[Any, Any]
    slots: np.ndarray[Any, Any]
    horizon_s: float


@compiled
def capacity(seconds, share_s, line, load, period_s, counts, tier_s, joined_s):  # type: ignore[no-untyped-def]
    """Time2BS: most tokens of a batch that takes `seconds` beside the decodes that are there (a float, whole).

    Decodes take part in a share `share_s / period` of such batches, at most in each. Arrays as `Cost` and
    `Tiers` have them.
    """
    left_s = seconds
    for tier in range(len(period_s)):
        share = min(1.0, share_s / period_s[tier])
        left_s -= (tier_s[tier] + counts[tier] * joined_s[tier]) * share
    tokens = load[0]
    for piece in range(line.shape[0]):
        tokens = min(tokens, (left_s - line[piece, 0]) / line[piece, 1])
    return max(math.floor(tokens + EPS_TOKENS) - load[1], 0.0)


@inlined
def held_tokens(seconds, share_s, cost, tiers, counts, step_s):  # type: ignore[no-untyped-def]
    """`capacity` beside what costs `step_s` a step and tier, and who joined."""
    return capacity(seconds, share_s, cost.line, cost.load, tiers.period_s, counts, step_s, tiers.joined_s)


@inlined
def net_budget(seconds, share_s, cost, tiers, counts, step_s):  # type: ignore[no-untyped-def]
    """B(x, n): what a batch of `seconds` holds beside the joined decodes, at their fluid rate. Can be < 0."""
    tokens = held_tokens(seconds, share_s, cost, tiers, counts, step_s)
    joined = 0.0
    for tier in range(len(tiers.period_s)):
        joined += counts[tier] * tiers.slots[tier] * seconds / tiers.period_s[tier]
    return math.floor(tokens - joined + EPS_TOKENS)


@inlined
def batch_length_s(cost, tiers, counts, active):  # type: ignore[no-untyped-def]
    """L: the longest that a batch may take with these decodes."""
    length_s = cost.full_s
    for tier in range(len(tiers.period_s)):
        if counts[tier] > 0 or active[tier]:
            length_s = min(length_s, tiers.period_s[tier])
    return length_s


@inlined
def needed_tokens(before_s, dues):  # type: ignore[no-untyped-def]
    """need(x): tokens of running decodes that are due before `before_s`."""
    return dues.slots[np.searchsorted(dues.due_s, before_s - EPS_S)]


@compiled_bare
def sustainable(cost, tiers, counts):  # type: ignore[no-untyped-def]
    """Whether every decode, running and joined, could be kept for ever in batches of the tightest pace."""
    period_s, slots, running = tiers.period_s, tiers.slots, tiers.running
    length_s = cost.full_s
    for tier in range(len(period_s)):
        if counts[tier] + running[tier] > 0:
            length_s = min(length_s, period_s[tier])
    tokens = 0.0
    for tier in range(len(period_s)):
        tokens += (counts[tier] + running[tier]) * slots[tier] * length_s / period_s[tier]
    return (
        tokens == 0.0
        or held_tokens(length_s, length_s, cost, tiers, counts, tiers.tier_s) + EPS_TOKENS >= tokens
    )
