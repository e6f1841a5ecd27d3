"""What a label search is given, and what it may do with it: flat arrays, that a compiled function reads.

I items by deadline, K memory intervals, T tiers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from coordinator.planner.budget import Cost, Dues, Tiers
from engine.compiled import inlined

# Kinds of items: a running tier begins to bind, promised, asking, memory comes free (a batch may end there).
ACTIVATE, PREFILL, NEWCOMER, MEMORY = 0, 1, 2, 3
DROPPED, MANDATORY, OPTIONAL = 0, 1, 2  # what a search may do with an item


class Items(NamedTuple):
    """What is decided on, by deadline: [I] each, `kv` [I, K] in tokens. `tiers`: -1 for none."""

    kinds: np.ndarray[Any, Any]
    deadlines_s: np.ndarray[Any, Any]
    tokens: np.ndarray[Any, Any]
    tiers: np.ndarray[Any, Any]
    values: np.ndarray[Any, Any]
    kv: np.ndarray[Any, Any]


class Memory(NamedTuple):
    """[K] memory intervals: when each begins and the tokens free in it. `tight`: not all who ask fit."""

    from_s: np.ndarray[Any, Any]
    free: np.ndarray[Any, Any]
    tight: bool
    free_seqs: int


class Bounds(NamedTuple):
    """Optional items, densest first, by budget and by memory in `interval`, one in which each of them holds its
    KV, whenever it starts."""

    by_budget: np.ndarray[Any, Any]
    by_memory: np.ndarray[Any, Any]
    interval: int


class Given(NamedTuple):
    """What a search is given."""

    cost: Cost
    tiers: Tiers
    dues: Dues
    items: Items
    memory: Memory
    bounds: Bounds

    def flat(self) -> tuple[Any, ...]:
        """All fields, one after another: a compiled function reads them faster than tuples in tuples."""
        return tuple(field for part in self for field in part)


@inlined
def given_of(flat):  # type: ignore[no-untyped-def]
    """What `Given.flat` took apart."""
    cost = Cost(flat[0], flat[1], flat[2])
    tiers = Tiers(flat[3], flat[4], flat[5], flat[6], flat[7], flat[8])
    dues = Dues(flat[9], flat[10], flat[11])
    items = Items(flat[12], flat[13], flat[14], flat[15], flat[16], flat[17])
    memory = Memory(flat[18], flat[19], flat[20], flat[21])
    return Given(cost, tiers, dues, items, memory, Bounds(flat[22], flat[23], flat[24]))
