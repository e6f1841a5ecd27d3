"""Many paces as a few: what is worked out for each pace is worked out for so many at the most."""

from __future__ import annotations

import math
from collections.abc import Iterable

MOST_PACES = 8


def grouped(paces_s: Iterable[float]) -> dict[float, float]:
    """The pace that stands for each, in order. Where there are too many, those within a step of equal ratio
    are one, the tightest of them: a promise gets no looser."""
    distinct = sorted(set(paces_s))
    if len(distinct) <= MOST_PACES:
        return {pace_s: pace_s for pace_s in distinct}
    step = math.log(distinct[-1] / distinct[0]) / MOST_PACES
    tightest: dict[int, float] = {}
    groups = {}
    for pace_s in distinct:
        number = int(math.log(pace_s / distinct[0]) / step + 1e-9) if step > 0 else 0
        groups[pace_s] = tightest.setdefault(min(number, MOST_PACES - 1), pace_s)
    return groups
