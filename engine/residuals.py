"""How far steps were from what was predicted for them, lately: the margin that model error asks for."""

from __future__ import annotations

import math
from collections import deque

from engine.base import StepReport
from engine.cost import StepCost

WINDOW_STEPS = 1024


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
