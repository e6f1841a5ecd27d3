"""How far steps were from what was predicted for them, lately: the margin that model error asks for."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque

WINDOW_STEPS = 4096  # minutes, so that what a machine does now and then is in it


class Residuals:
    """Measured over predicted of the last `window` steps, and no more of them than that."""

    def __init__(self, window: int = WINDOW_STEPS) -> None:
        self._window = window
        self._ratios: deque[float] = deque()
        self._sorted: list[float] = []  # the same: sorting them for each margin would take a tenth of a ms

    def note(self, ratio: float) -> None:
        """Count a step that took `ratio` times what was predicted before it."""
        self._ratios.append(ratio)
        insort(self._sorted, ratio)
        if len(self._ratios) > self._window:
            del self._sorted[bisect_left(self._sorted, self._ratios.popleft())]

    def margin(self, quantile: float) -> float:
        """Least m >= 0 with which the next step takes at most `predicted * (1 + m)` with this chance.

        The ceil(quantile * (n + 1))-th smallest of n ratios covers a new one of the same kind with at least
        that chance (conformal prediction, Vovk et al. 2005); with too few steps to say, the largest is taken.
        0 before the first step. Raises ValueError for a quantile outside of 0..1.
        """
        if not 0 <= quantile <= 1:
            raise ValueError(f"a quantile is between 0 and 1, not {quantile}")
        if not self._sorted:
            return 0.0
        count = len(self._sorted)
        rank = min(max(math.ceil(quantile * (count + 1)), 1), count)
        return max(self._sorted[rank - 1] - 1, 0.0)
