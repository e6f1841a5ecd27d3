"""Soft admission: requests that could not be promised wait their turn as best effort, and may be promised yet.

They are asked about again, first come first served, while their first deadline still allows: whoever leaves
makes room. Their number is bounded; none is dropped in silence.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.messages import Place, Placed

GIVE_UP_S = 0.005  # before its deadline: no step could end in time


@dataclass(frozen=True, slots=True)
class Deferred:
    """A request that runs as best effort where `placed` says. `until_s`: its first token's deadline."""

    request: Place
    placed: Placed
    endpoint: bytes
    until_s: float


class DeferredQueue:
    """Deferred requests in the order in which they came, at most `bound` of them."""

    def __init__(self, bound: int) -> None:
        self.bound = bound
        self._waiting: dict[str, Deferred] = {}
        self._turn = 0

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def full(self) -> bool:
        """Whether another one must be turned away."""
        return len(self._waiting) >= self.bound

    def add(self, deferred: Deferred) -> None:
        """Wait for a promise. A new attempt takes the place of the one before."""
        self._waiting[deferred.request.request_id] = deferred

    def forget(self, request_id: str) -> None:
        """It is over, promised, or has begun to speak."""
        self._waiting.pop(request_id, None)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._waiting

    def purge(self, now_s: float) -> None:
        """Let go of those that a promise comes too late for: they stay best effort."""
        for request_id, deferred in list(self._waiting.items()):
            if now_s > deferred.until_s - GIVE_UP_S:
                del self._waiting[request_id]

    def next(self, now_s: float, most: int) -> list[Deferred]:
        """Whom to ask about now, oldest first. Where there are more, a turn goes on where the last ended."""
        self.purge(now_s)
        waiting = list(self._waiting.values())
        start = self._turn if self._turn < len(waiting) else 0
        self._turn = start + most
        return waiting[start : start + most]
