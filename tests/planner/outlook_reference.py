"""`outlook` in arrays of [requests, cells], slowly: what the compiled one is held against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from coordinator.planner.instance import FreeKv
from coordinator.planner.lengths import BIN_OF, LONGEST_TOKENS, WIDTHS, Floats, Ints, LengthTable, stack
from coordinator.planner.memory import GOLDEN, Outlook, Resident
from coordinator.planner.outlook_kernel import CELLS, MOST_INTERVALS, ROUNDING
from coordinator.planner.survival_kernel import EDGES


def outlook(
    running: Sequence[Resident],
    newcomers: Sequence[Resident],
    capacity_tokens: int,
    block_tokens: int,
    z: float,
) -> Outlook:
    """What `running` leave of `capacity_tokens`, and what each of `newcomers` would take of it."""
    cohort, count = Cohort.of([*running, *newcomers]), len(running)
    cell_ends_s, first_cell = cells(cohort.likely_ends_s(), cohort.sure_ends_s(count))
    mean, variance, most = cohort.need(cell_ends_s, block_tokens)  # [requests, cells] each
    run_mean, run_variance, run_most = (part[:count].sum(axis=0) for part in (mean, variance, most))
    sure = run_mean + z * np.sqrt(run_variance) >= run_most
    run_mean, run_variance = np.where(sure, run_most, run_mean), np.where(sure, 0.0, run_variance)
    usable_tokens = capacity_tokens - capacity_tokens % block_tokens
    run_sd = np.sqrt(run_variance)
    free = np.minimum.reduceat(usable_tokens - run_mean - z * run_sd, first_cell)
    added = z * (np.sqrt(run_variance + variance[count:]) - run_sd)
    charge = np.maximum.reduceat(np.minimum(mean[count:] + added, most[count:]), first_cell, axis=1)
    starts_s = np.concatenate([[0.0], cell_ends_s])[first_cell]
    tokens = np.maximum(np.floor(free + ROUNDING), 0).astype(np.int64)
    charges = np.ceil(charge - ROUNDING).astype(np.int64)
    return Outlook(
        tuple(FreeKv(*pair) for pair in zip(starts_s.tolist(), tokens.tolist(), strict=True)),
        tuple(tuple(row) for row in charges.tolist()),
    )


def cells(ends_s: Floats, sure_ends_s: Floats) -> tuple[Floats, Ints]:
    """Ends of the cells, and the first cell of each interval."""
    ends_s = np.sort(ends_s[ends_s > 0])
    if not len(ends_s):
        return np.ones(1), np.zeros(1, dtype=np.int64)
    picks = np.arange(1, MOST_INTERVALS) * len(ends_s) // MOST_INTERVALS
    starts_s = np.unique(np.concatenate([[0.0], ends_s[picks]]))
    starts_s = starts_s[starts_s < ends_s[-1]]
    bounds_s = np.append(starts_s, ends_s[-1])
    parts = np.linspace(0, 1, CELLS // len(starts_s) + 1)[1:]
    within_s = bounds_s[:-1, None] * (1 - parts) + bounds_s[1:, None] * parts
    cell_ends_s = np.unique(np.concatenate([within_s.ravel(), sure_ends_s]))
    return cell_ends_s, np.searchsorted(cell_ends_s, starts_s, side="right")


def mean_remaining(table: LengthTable, made: Ints) -> Floats:
    """E[o - made | o > made], [n] tokens."""
    areas = np.zeros_like(table.survival)
    np.cumsum((table.survival[:, 1:] + table.survival[:, :-1]) / 2 * WIDTHS, axis=1, out=areas[:, 1:])
    span = np.stack([np.minimum(made, table.max_tokens), table.max_tokens], axis=1)  # [n, 2]
    below = BIN_OF[np.minimum(span, LONGEST_TOKENS - 1)]
    row = table.row[:, None]
    low = table.survival[row, below]
    at = low + (span - EDGES[below]) / WIDTHS[below] * (table.survival[row, below + 1] - low)
    area = areas[row, below] + (span - EDGES[below]) * (low + at) / 2
    total = area[:, 1] - area[:, 0] + (at[:, 0] - at[:, 1]) / 2
    mean: Floats = np.maximum(total / at[:, 0], 0.0)
    return mean


@dataclass(frozen=True, slots=True, eq=False)
class Cohort:
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
        mean_s = mean_remaining(self.table, self.made) * self.pace_s
        spread = -np.log1p(-((np.arange(len(mean_s)) + 0.5) * GOLDEN % 1.0))
        ends_s = self.starts_s + mean_s * np.where(self.certain, 1.0, spread)
        longest_s = np.max(self.starts_s + mean_s, initial=0.0)
        return np.append(np.minimum(ends_s, longest_s), longest_s)

    def sure_ends_s(self, count: int) -> Floats:
        sure = np.flatnonzero(self.certain[:count])
        ends_s = self.starts_s[sure] + (self.table.max_tokens - self.made)[sure] * self.pace_s[sure]
        return ends_s[ends_s > 0]

    def need(self, cell_ends_s: Floats, block_tokens: int) -> tuple[Floats, Floats, Floats]:
        """(mean, variance, most) of the KV tokens that each holds in each cell, [n, cells]."""
        at_s = np.concatenate([[0.0], cell_ends_s])
        tokens = np.maximum(at_s - self.starts_s[:, None], 0) / self.pace_s[:, None]
        made, last = self.made[:, None], self.table.max_tokens[:, None] - 1
        by_start = made + (tokens[:, :-1] + ROUNDING).astype(np.int64)
        by_end = made + np.maximum(np.ceil(tokens[:, 1:] - ROUNDING).astype(np.int64) - 1, 0)
        alive = self.table.longer_than(by_start) / self.table.longer_than(np.minimum(made, last))
        held = -(-(self.base[:, None] + np.minimum(by_end, last)) // block_tokens) * block_tokens
        mean = held * alive
        return mean, held * (mean - mean * alive), np.where(alive > 0, held, 0)
