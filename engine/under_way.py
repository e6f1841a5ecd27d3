"""Batches that were composed and are not over: one, or two of an engine that composes while one runs."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from engine.base import BatchPlan, StepResult

MOST = 2  # one runs, and the next is composed


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    ends_s: float
    depths: Mapping[str, int]
    empty: bool


class UnderWay:
    """What is likely to be going on in an engine, by the batches it was given and the steps that ended.

    `depths`: how deep the batch that ended last drafted. `stalled`: the last one that was composed had
    something in it, and did not begin: there was no slot or no memory.
    """

    def __init__(self) -> None:
        self.depths: Mapping[str, int] = {}
        self.stalled = False
        self._batches: deque[_Batch] = deque(maxlen=MOST)
        self._composed: _Batch | None = None  # since the last step that ended

    @property
    def ends_s(self) -> float:
        """When all of them are likely to be over; -inf if there is none."""
        return max((batch.ends_s for batch in self._batches), default=-math.inf)

    def compose(self, plan: BatchPlan, begins_s: float) -> None:
        """A batch was composed that begins then, in place of one that this step composed before."""
        if self._composed is not None:
            self._batches.remove(self._composed)
        self._composed = _Batch(begins_s + plan.expected_s, plan.depth, empty=not plan.chunk_tokens)
        self._batches.append(self._composed)

    def step(self, result: StepResult) -> None:
        """A step ended. Its report is of the oldest batch, which is over; what it composed may have begun."""
        composed, self._composed, self.stalled = self._composed, None, False
        if result.report is not None and self._batches:
            self.depths = self._batches.popleft().depths
        if composed is not None and not result.begun and composed in self._batches:
            self._batches.remove(composed)
            self.stalled = not composed.empty
