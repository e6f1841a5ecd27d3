"""KV memory over time, while output lengths are unknown: what is free for newcomers, and what each would take.

A request that is alive holds its prompt and the tokens made so far; it ends at a random length. What is
promised fits if `mean + z * sd` of the KV held is at most the capacity at every time that matters. That is made
linear, so that the planner can add: free KV is what the running leave, and a newcomer's charge is its mean and
what it adds to `z * sd` beside the running alone, never over all it could hold. The root is concave, so charges
add up to no less than the joint need. (A burst on an empty replica is charged too much: it takes some calls.)

`z` starts at the mean, and `next_z` follows what happens: up where promises are late for want of memory, down
where they are made while memory is short and kept. The 2.3 of 1 % at one moment would be far too much. When
memory runs over only the last one let in has to go; it keeps its tokens, and mostly it is ahead of its pace by
then, so that it waits, computes them again and is in time all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from coordinator.planner.instance import FreeKv
from coordinator.planner.lengths import ALWAYS, Floats, Ints, KnownLengths, LengthDistribution
from coordinator.planner.outlook_kernel import (
    BASE,
    CURVE,
    MADE,
    MAX_TOKENS,
    PACE_S,
    REQUEST_FIELDS,
    STARTS_S,
    outlook_of,
)
from coordinator.planner.outlook_kernel import MOST_INTERVALS as MOST_INTERVALS
from coordinator.planner.survival_kernel import BIN_OF, EDGES

BLOCK_TOKENS = 16
OVERFLOW_Z = 0.0
OVERFLOW_AIM = 0.007  # of promises made while memory is short; somewhat below the 1 % that is promised
LEAST_Z, MOST_Z = -1.0, 4.0
Z_PER_OVERFLOW = 0.5
GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True, slots=True)
class Resident:
    """A request that holds KV, or would if let in. Best effort can be preempted, so it is not one.

    It holds its prompt from now on and makes a token every `pace_s` from `starts_s` on (its prefill ends).
    `kv_tokens`: what it holds now, where that is known better than by `prompt_tokens + made_tokens`.
    """

    prompt_tokens: int
    made_tokens: int
    pace_s: float
    lengths: LengthDistribution
    starts_s: float = 0.0
    kv_tokens: int | None = None

    def __post_init__(self) -> None:
        if not self.pace_s > 0:
            raise ValueError(f"pace_s is {self.pace_s}; give seconds per token, above 0")
        if self.prompt_tokens < 0 or self.made_tokens < 0:
            raise ValueError(
                f"tokens of a request are {self.prompt_tokens} + {self.made_tokens}; give 0 or more"
            )

    @property
    def base_tokens(self) -> int:
        """KV tokens held beside those it has made."""
        return self.prompt_tokens if self.kv_tokens is None else self.kv_tokens - self.made_tokens


@dataclass(frozen=True, slots=True)
class Outlook:
    """KV free for newcomers in each interval, and what each newcomer is charged there, as the planner asks."""

    free: tuple[FreeKv, ...]
    charges: tuple[tuple[int, ...], ...]


def request_rows(base_tokens: Ints, made_tokens: Ints, pace_s: Floats, max_tokens: Ints) -> Floats:
    """[n, REQUEST_FIELDS]: residents as compiled code takes them, from now on and of the first curve.

    See `Resident` and `LengthDistribution` for what the numbers are. Raises ValueError for a pace of 0 or less.
    """
    if not (pace_s > 0).all():
        raise ValueError(f"pace_s is {pace_s.min()}; give seconds per token, above 0")
    rows = np.zeros((len(pace_s), REQUEST_FIELDS))
    rows[:, BASE], rows[:, MADE], rows[:, PACE_S], rows[:, MAX_TOKENS] = (
        base_tokens, made_tokens, pace_s, max_tokens,
    )  # fmt: skip
    return rows


def outlook_of_rows(
    requests: Floats, curves: Sequence[Floats], count: int, capacity_tokens: int, block_tokens: int, z: float
) -> Outlook:
    """`outlook` of rows [n, REQUEST_FIELDS], of which the first `count` run, and of the curves they name."""
    starts_s, free, charges = outlook_of(
        requests,
        _spread(len(requests)),
        np.array(curves).reshape(-1, len(EDGES)),
        np.array([curve is ALWAYS for curve in curves], dtype=np.bool_),
        BIN_OF,
        count,
        capacity_tokens - capacity_tokens % block_tokens,
        block_tokens,
        float(z),
    )
    intervals = tuple(map(FreeKv, starts_s.tolist(), free.tolist()))
    return Outlook(intervals, tuple(map(tuple, charges.tolist())))


def outlook(
    running: Sequence[Resident],
    newcomers: Sequence[Resident],
    capacity_tokens: int,
    block_tokens: int = BLOCK_TOKENS,
    z: float = OVERFLOW_Z,
) -> Outlook:
    """What `running` leave of `capacity_tokens`, and what each of `newcomers` would take of it.

    Looks up to the longest expected residence. KV is held in whole blocks of `block_tokens`.
    """
    residents = (*running, *newcomers)
    curves = {id(one.lengths.survival): one.lengths.survival for one in residents}
    rows = request_rows(
        np.array([one.base_tokens for one in residents], dtype=np.int64),
        np.array([one.made_tokens for one in residents], dtype=np.int64),
        np.array([one.pace_s for one in residents], dtype=np.float64),
        np.array([one.lengths.max_tokens for one in residents], dtype=np.int64),
    )
    rows[:, STARTS_S] = [one.starts_s for one in residents]
    rows[:, CURVE] = [list(curves).index(id(one.lengths.survival)) for one in residents]
    return outlook_of_rows(rows, list(curves.values()), len(running), capacity_tokens, block_tokens, z)


def free_kv(
    running: Sequence[Resident],
    capacity_tokens: int,
    block_tokens: int = BLOCK_TOKENS,
    z: float = OVERFLOW_Z,
) -> tuple[FreeKv, ...]:
    """KV tokens free for newcomers in each interval: the least over it, from 0 to the capacity."""
    return outlook(running, (), capacity_tokens, block_tokens, z).free


def warm_up() -> None:
    """Compile the outlook, or load it from the cache, before the first request asks."""
    free_kv([Resident(1, 0, 1.0, KnownLengths().lengths("", 1, 1))], BLOCK_TOKENS)


def next_z(z: float, admitted: int, overflowed: int, aim: float = OVERFLOW_AIM) -> float:
    """z after `admitted` more promises, of which `overflowed` were late for want of memory.

    An integral controller, as in adaptive conformal inference (Gibbs and Candes 2021): over n promises the
    share that overflows is at most `aim + (MOST_Z - LEAST_Z) / (Z_PER_OVERFLOW * n)`, whatever the lengths,
    as long as z does not rest at MOST_Z.
    """
    return min(max(z + Z_PER_OVERFLOW * (overflowed - aim * admitted), LEAST_Z), MOST_Z)


@lru_cache(maxsize=512)
def _spread(count: int) -> Floats:
    """[count] draws of an exponential distribution, evenly spread and in no order."""
    draws: Floats = -np.log1p(-((np.arange(count) + 0.5) * GOLDEN % 1.0))
    return draws
