"""How far steps were from what was predicted for them, lately: the margin that model error asks for, and how
much of it promises need to be kept."""

from __future__ import annotations

import math
from collections import deque

from engine.base import StepReport
from engine.cost import StepCost

WINDOW_STEPS = 1024
LATE_SHARE = 0.01  # of promises, that may be late
FEWEST_COVERED, MOST_COVERED = 0.9, 0.998  # shares of steps
CAUTION_RATE = 0.05  # by so much a miss raises the share; a hundred kept promises undo it


class Residuals:
    """Measured over predicted of the last `window` steps: 8 bytes a step, and no more of them than that."""

    def __init__(self, window: int = WINDOW_STEPS) -> None:
        self._ratios: deque[float] = deque(maxlen=window)

    def note(self, cost: StepCost, report: StepReport) -> None:
        """Count a step that `cost`, as it stood before that step, would have predicted."""
        predicted_s = cost.of(report)
        if predicted_s > 0 and report.seconds > 0:
            self._ratios.append(report.seconds / predicted_s)

    def margin(self, quantile: float) -> float:
        """Least m >= 0 with which the next step takes at most `predicted * (1 + m)` with this chance.

        The ceil(quantile * (n + 1))-th smallest of n ratios covers a new one of the same kind with at least
        that chance (conformal prediction, Vovk et al. 2005); with too few steps to say, the largest is taken.
        0 before the first step. Raises ValueError for a quantile outside of 0..1.
        """
        if not 0 <= quantile <= 1:
            raise ValueError(f"a quantile is between 0 and 1, not {quantile}")
        if not self._ratios:
            return 0.0
        ratios = sorted(self._ratios)
        rank = min(max(math.ceil(quantile * (len(ratios) + 1)), 1), len(ratios))
        return max(ratios[rank - 1] - 1, 0.0)


class Caution:
    """Which share of steps the margin is to cover, so that LATE_SHARE of promises are late and no more.

    Where promises have slack few of them need a margin, where a replica is full of them nearly all do: how many
    are late decides. Adaptive conformal inference (Gibbs and Candes 2021), between two bounds.
    """

    def __init__(self) -> None:
        self._uncovered = 1 - FEWEST_COVERED

    @property
    def quantile(self) -> float:
        """Of the steps; see `Residuals.margin`."""
        return min(1 - self._uncovered, MOST_COVERED)

    def note(self, *, late: bool) -> None:
        """A promise was late or kept."""
        moved = self._uncovered + CAUTION_RATE * (LATE_SHARE - late)
        # Below 0 it only remembers: cut at the bound, a miss would be forgotten before the next one is due.
        self._uncovered = min(max(moved, -CAUTION_RATE), 1 - FEWEST_COVERED)
