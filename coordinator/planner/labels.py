"""Labels: the ways to have decided on the items so far, and which of them no other one dominates; compiled.

A label is `t`, the end of its last batch; `budget`, tokens that its batches could hold beyond what was taken
out of them; `mem`, KV per memory interval; `since`, what batches that began in or after an interval could hold;
counts of joined decodes per tier, and the value accepted. Labels with the same counts at the same time have the
same future, so of those only undominated ones are kept: more value, more budget, less memory, fewer sequences.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from coordinator.planner.budget import EPS_S
from coordinator.planner.given import NEWCOMER
from engine.compiled import compiled, compiled_bare, inlined

SKIPPED, WHOLE, SHORT = 0, 1, 2  # how the stretch before an item ended: after whole batches, or a short one

TICK_S = 1e-11  # times are rounded to it, so that equal times compare equal
HASH_SIZE = 4096  # a power of two


class Labels(NamedTuple):
    """[N] labels, in the order in which they were made, and where a search writes beside them."""

    t: np.ndarray[Any, Any]  # s
    budget: np.ndarray[Any, Any]  # tokens
    value: np.ndarray[Any, Any]
    seqs: np.ndarray[Any, Any]
    counts: np.ndarray[Any, Any]  # [N, T]
    code: np.ndarray[Any, Any]  # a number for the counts
    mem: np.ndarray[Any, Any]  # [N, K] tokens
    since: np.ndarray[Any, Any]  # [N, K] tokens
    began: np.ndarray[Any, Any]  # s, the start of its last batch; -1: there was none
    stretch: np.ndarray[Any, Any]  # [N, 2] seconds and number of the whole batches before its last item
    parent: np.ndarray[Any, Any]
    item: np.ndarray[Any, Any]  # the last that it took; -1: none
    ending: np.ndarray[Any, Any]
    start: np.ndarray[Any, Any]  # the memory interval from which that one holds its KV
    dead: np.ndarray[Any, Any]  # another one dominates it
    chain: np.ndarray[Any, Any]  # the next one in its slot of the hash
    heads: np.ndarray[Any, Any]  # [HASH_SIZE] the first one in each slot; -1: none
    current: np.ndarray[Any, Any]  # those that may take the next item
    following: np.ndarray[Any, Any]  # those that may take the one after it


@compiled
def no_labels(given, limit):  # type: ignore[no-untyped-def]
    """Room for so many."""
    tiers, intervals = max(len(given.tiers.period_s), 1), len(given.memory.from_s)
    return Labels(
        np.empty(limit),
        np.empty(limit),
        np.empty(limit),
        np.empty(limit, np.int64),
        np.empty((limit, tiers), np.int64),
        np.empty(limit, np.int64),
        np.empty((limit, intervals)),
        np.empty((limit, intervals)),
        np.empty(limit),
        np.empty((limit, 2)),
        np.empty(limit, np.int64),
        np.empty(limit, np.int64),
        np.empty(limit, np.int8),
        np.empty(limit, np.int16),
        np.empty(limit, np.bool_),
        np.empty(limit, np.int64),
        np.empty(HASH_SIZE, np.int64),
        np.empty(limit, np.int64),
        np.empty(limit, np.int64),
    )


@inlined
def inherit(labels, child, label, given, item, counts, gained):  # type: ignore[no-untyped-def]
    """What a child has of its parent, and the item added to it.

    `counts`: [T] of the child; `gained`: [K] tokens of its batches that began in or after an interval.
    """
    items, memory = given.items, given.memory
    newcomer = items.kinds[item] == NEWCOMER
    labels.value[child] = labels.value[label] + (items.values[item] if newcomer else 0.0)
    labels.seqs[child] = labels.seqs[label] + (1 if newcomer else 0)
    code = 0
    for tier in range(len(counts)):
        labels.counts[child, tier] = counts[tier]
        code = code * 1009 + counts[tier]
    labels.code[child] = code
    for k in range(len(memory.from_s)):
        labels.mem[child, k] = labels.mem[label, k]
        if newcomer and k >= labels.start[child]:
            labels.mem[child, k] += items.kv[item, k]
        labels.since[child, k] = labels.since[label, k] + gained[k] if memory.tight else 0.0
    labels.parent[child], labels.item[child] = label, item


@compiled_bare
def undominated(labels, child, memory):  # type: ignore[no-untyped-def]
    """Enter the child among labels of the same counts at the same time, and end those that it dominates.

    False, and nothing entered, if one of them dominates it.
    """
    slot = _slot(labels, child)
    other = labels.heads[slot]
    while other >= 0:
        same = not labels.dead[other] and labels.code[other] == labels.code[child]
        if same and abs(labels.t[other] - labels.t[child]) < TICK_S / 2:
            if _dominates(labels, other, child, memory):
                return False
            if _dominates(labels, child, other, memory):
                labels.dead[other] = True
        other = labels.chain[other]
    enter(labels, child)
    return True


@inlined
def enter(labels, label):  # type: ignore[no-untyped-def]
    """Into its slot of the hash, alive."""
    slot = _slot(labels, label)
    labels.chain[label] = labels.heads[slot]
    labels.heads[slot] = label
    labels.dead[label] = False


@inlined
def _slot(labels, label):  # type: ignore[no-untyped-def]
    return (labels.code[label] * 1000003 + int(labels.t[label] / TICK_S + 0.5)) & (HASH_SIZE - 1)


@inlined
def _dominates(labels, one, two, memory):  # type: ignore[no-untyped-def]
    """Whether label `one` is at least as good as `two` for every future (same counts, same time)."""
    if labels.value[one] < labels.value[two] or labels.budget[one] < labels.budget[two]:
        return False
    if labels.seqs[one] > labels.seqs[two]:
        return False
    for tier in range(labels.counts.shape[1]):
        if labels.counts[one, tier] != labels.counts[two, tier]:
            return False
    if memory.tight:
        for k in range(labels.mem.shape[1]):
            if labels.mem[one, k] > labels.mem[two, k] or labels.since[one, k] < labels.since[two, k]:
                return False
            if labels.began[one] >= memory.from_s[k] - EPS_S > labels.began[two]:
                return False  # it has had its credit for what ran before interval k
    return True


@compiled
def rows_of(labels, best):  # type: ignore[no-untyped-def]
    """The decisions that made a label, in order, as `search` returns them."""
    steps = 0
    label = best
    while label >= 0 and labels.item[label] >= 0:
        steps += 1
        label = labels.parent[label]
    rows = np.empty((steps, 7))
    label = best
    for step in range(steps - 1, -1, -1):
        parent = labels.parent[label]
        rows[step, 0], rows[step, 1], rows[step, 2] = (
            labels.item[label],
            labels.ending[label],
            labels.start[label],
        )
        rows[step, 3], rows[step, 4] = labels.t[parent], labels.t[label]
        rows[step, 5], rows[step, 6] = labels.stretch[label, 0], labels.stretch[label, 1]
        label = parent
    return rows


@inlined
def rounded(seconds):  # type: ignore[no-untyped-def]
    """To whole ticks."""
    return math.floor(seconds / TICK_S + 0.5) * TICK_S
