"""Memory of processes over time: how much each has to itself, and whether that grows."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import psutil

WARM_S = 120.0  # of a process's first samples: caches fill
LEAST_S = 300.0  # of samples after that, to tell a slope from noise
FLAT_SHARE = 0.03  # of its memory: a process that grew by less over all that was seen of it is flat,
FLAT_MIB = 8.0  # and so is one that grew by less than this


@dataclass(frozen=True, slots=True)
class Trend:
    """What was seen of a process: for how long, memory at the end, and how it changes (least squares)."""

    process: str
    pid: int
    minutes: float
    mib: float
    mib_per_min: float

    @property
    def flat(self) -> bool:
        """Whether it does not grow."""
        return self.mib_per_min * self.minutes <= max(FLAT_SHARE * self.mib, FLAT_MIB)


class MemoryWatch:
    """Samples of processes by label; one that was started again under its label is another process."""

    def __init__(self) -> None:
        self._samples: dict[tuple[str, int], list[tuple[float, float]]] = {}

    def sample(self, pids: Mapping[str, int]) -> None:
        """Look at each now. Blocks for some ms each. Those that are gone are passed over."""
        for label, pid in pids.items():
            try:
                mib = psutil.Process(pid).memory_full_info().uss / 2**20
            except psutil.Error:
                continue
            if mib > 0:  # one that has just ended has none, and would make a slope downwards
                self.note(label, pid, time.monotonic(), mib)

    def note(self, label: str, pid: int, at_s: float, mib: float) -> None:
        """One sample."""
        self._samples.setdefault((label, pid), []).append((at_s, mib))

    def trends(self) -> list[Trend]:
        """Of every process that was seen for long enough."""
        found = []
        for (label, pid), samples in self._samples.items():
            warm = [(at_s, mib) for at_s, mib in samples if at_s - samples[0][0] >= WARM_S]
            if not warm or warm[-1][0] - warm[0][0] < LEAST_S:
                continue
            at_s, mib = np.array(warm).T
            slope = float(np.polyfit((at_s - at_s[0]) / 60, mib, 1)[0])
            found.append(Trend(label, pid, float(at_s[-1] - at_s[0]) / 60, float(mib[-1]), slope))
        return found
