"""KV memory over time, while output lengths are unknown: what is free for newcomers, and what each would take.

A request that is alive holds its prompt and the tokens made so far; it ends at a random length. What is
promised fits if `mean + z * sd` of the KV held is at most the capacity at every time that matters. That is made
linear, so that the planner can add: free KV is what the running leave, and a newcomer's charge is its mean and
what it adds to `z * sd` beside the running alone, never over all it could hold. The root is concave, so charges
add up to no less than the joint need. (A burst on an empty replica is charged too much: it takes some calls.)

`z` starts where, on the first halves of the traces of benchmarks.lengths, at most 1 % of promises were broken
for want of memory on each; then `next_z` follows what happens. It is well below the 2.3 of 1 % at one moment:
when memory runs over only the last one let in has to go, and need is bounded from above in each cell of time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from coordinator.planner.instance import FreeKv
from coordinator.planner.lengths import Floats, Ints, LengthDistribution, LengthTable, stack

MOST_INTERVALS = 6
CELLS = 24  # need is bounded cell by cell, by those alive at its start and what they hold at its end
BLOCK_TOKENS = 16
OVERFLOW_Z = 1.25  # tuned: the module's docstring says how
OVERFLOW_AIM = 0.007  # of promises; somewhat below the 1 % that is promised
LEAST_Z, MOST_Z = 0.5, 4.0  # never without a reserve: while nothing binds, nothing overflows
Z_PER_OVERFLOW = 0.2
ROUNDING = 1e-6  # of a token: a time that is a whole number of tokens may come out a hair off
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
    cohort, count = _Cohort.of([*running, *newcomers]), len(running)
    cell_ends_s, first_cell = _cells(cohort.likely_ends_s(), cohort.sure_ends_s(count))
    mean, variance, most = cohort.need(cell_ends_s, block_tokens)  # [requests, cells] each
    run_mean, run_variance, run_most = (part[:count].sum(axis=0) for part in (mean, variance, most))
    # Where few hold much, mean + z * sd may pass what all of them, alive to the end, can hold: that is certain.
    sure = run_mean + z * np.sqrt(run_variance) >= run_most
    run_mean, run_variance = np.where(sure, run_most, run_mean), np.where(sure, 0.0, run_variance)
    usable_tokens = capacity_tokens - capacity_tokens % block_tokens
    run_sd = np.sqrt(run_variance)
    free = np.minimum.reduceat(usable_tokens - run_mean - z * run_sd, first_cell)
    added = z * (np.sqrt(run_variance + variance[count:]) - run_sd)
    charge = np.maximum.reduceat(np.minimum(mean[count:] + added, most[count:]), first_cell, axis=1)
    return Outlook(_intervals(free, cell_ends_s, first_cell), _whole(charge))


def free_kv(
    running: Sequence[Resident],
    capacity_tokens: int,
    block_tokens: int = BLOCK_TOKENS,
    z: float = OVERFLOW_Z,
) -> tuple[FreeKv, ...]:
    """KV tokens free for newcomers in each interval: the least over it, from 0 to the capacity."""
    return outlook(running, (), capacity_tokens, block_tokens, z).free


def next_z(z: float, admitted: int, overflowed: int, aim: float = OVERFLOW_AIM) -> float:
    """z after `admitted` more promises, of which `overflowed` were preempted for want of memory.

    An integral controller, as in adaptive conformal inference (Gibbs and Candes 2021): over n promises the
    share that overflows is at most `aim + (MOST_Z - LEAST_Z) / (Z_PER_OVERFLOW * n)`, whatever the lengths,
    as long as z does not rest at MOST_Z.
    """
    return min(max(z + Z_PER_OVERFLOW * (overflowed - aim * admitted), LEAST_Z), MOST_Z)


def _intervals(free: Floats, cell_ends_s: Floats, first_cell: Ints) -> tuple[FreeKv, ...]:
    starts_s = np.concatenate([[0.0], cell_ends_s])[first_cell]
    tokens = np.maximum(np.floor(free + ROUNDING), 0).astype(np.int64)
    return tuple(FreeKv(*pair) for pair in zip(starts_s.tolist(), tokens.tolist(), strict=True))


def _whole(charges: Floats) -> tuple[tuple[int, ...], ...]:
    rows = np.ceil(charges - ROUNDING).astype(np.int64).tolist()
    return tuple(tuple(row) for row in rows)


def _cells(ends_s: Floats, sure_ends_s: Floats) -> tuple[Floats, Ints]:
    """Ends of the cells, and the first cell of each interval: these begin now and at coming completions.

    Cells split the intervals, and end at each completion that is sure: need peaks just before it.
    """
    ends_s = np.sort(ends_s[ends_s > 0])
    if not len(ends_s):
        return np.ones(1), np.zeros(1, dtype=np.int64)
    picks = np.arange(1, MOST_INTERVALS) * len(ends_s) // MOST_INTERVALS
    starts_s = np.unique(np.concatenate([[0.0], ends_s[picks]]))
    starts_s = starts_s[starts_s < ends_s[-1]]
    bounds_s = np.append(starts_s, ends_s[-1])
    parts = np.linspace(0, 1, CELLS // len(starts_s) + 1)[1:]
    within_s = bounds_s[:-1, None] * (1 - parts) + bounds_s[1:, None] * parts  # the last is the bound itself
    cell_ends_s = np.unique(np.concatenate([within_s.ravel(), sure_ends_s]))
    return cell_ends_s, np.searchsorted(cell_ends_s, starts_s, side="right")


@dataclass(frozen=True, slots=True, eq=False)
class _Cohort:
    """Requests as columns, [n] each. `base`: KV tokens beside those that were made here."""

    base: Ints
    made: Ints
    pace_s: Floats
    starts_s: Floats
    certain: NDArray[np.bool_]
    table: LengthTable

    @classmethod
    def of(cls, residents: Sequence[Resident]) -> Self:
        return cls(
            base=np.array([r.base_tokens for r in residents], dtype=np.int64),
            made=np.array([r.made_tokens for r in residents], dtype=np.int64),
            pace_s=np.array([r.pace_s for r in residents], dtype=np.float64),
            starts_s=np.array([r.starts_s for r in residents], dtype=np.float64),
            certain=np.array([r.lengths.certain for r in residents], dtype=np.bool_),
            table=stack([r.lengths for r in residents]),
        )

    def likely_ends_s(self) -> Floats:
        """[n] seconds until each ends: as spread out as completions are, the latest at the longest mean.

        Means alone lie close together. So each length is its mean times an evenly spread exponential draw.
        """
        mean_s = self.table.mean_remaining(self.made) * self.pace_s
        spread = -np.log1p(-((np.arange(len(mean_s)) + 0.5) * GOLDEN % 1.0))
        ends_s = self.starts_s + mean_s * np.where(self.certain, 1.0, spread)
        longest_s = np.max(self.starts_s + mean_s, initial=0.0)
        return np.append(np.minimum(ends_s, longest_s), longest_s)

    def sure_ends_s(self, count: int) -> Floats:
        """Seconds until those of the first `count` end whose lengths are certain."""
        sure = np.flatnonzero(self.certain[:count])
        ends_s = self.starts_s[sure] + (self.table.max_tokens - self.made)[sure] * self.pace_s[sure]
        return ends_s[ends_s > 0]

    def need(self, cell_ends_s: Floats, block_tokens: int) -> tuple[Floats, Floats, Floats]:
        """(mean, variance, most) of the KV tokens that each holds in each cell, [n, cells].

        An upper bound over the cell: alive with the chance of its start, holding what it has at its end. The
        last token is never held: a request ends with it.
        """
        tokens = self._tokens_until(np.concatenate([[0.0], cell_ends_s]))
        made, last = self.made[:, None], self.table.max_tokens[:, None] - 1
        by_start = made + (tokens[:, :-1] + ROUNDING).astype(np.int64)
        by_end = made + np.maximum(np.ceil(tokens[:, 1:] - ROUNDING).astype(np.int64) - 1, 0)
        alive = self.table.longer_than(by_start) / self.table.longer_than(np.minimum(made, last))
        held = -(-(self.base[:, None] + np.minimum(by_end, last)) // block_tokens) * block_tokens
        mean = held * alive
        return mean, held * (mean - mean * alive), np.where(alive > 0, held, 0)

    def _tokens_until(self, at_s: Floats) -> Floats:
        """[n, times] tokens that each makes until then, if it goes on for so long."""
        tokens: Floats = np.maximum(at_s - self.starts_s[:, None], 0) / self.pace_s[:, None]
        return tokens
