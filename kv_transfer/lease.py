"""Leases on offered KV: who holds how many blocks, until when. Pure: time is passed in."""

from __future__ import annotations

from dataclasses import dataclass

from kv_transfer.base import Lease


@dataclass(slots=True)
class _Held:
    num_blocks: int
    ends_at_s: float


class LeaseTable:
    """Leases that one source grants. Every lease ends exactly once: by `release`, or by `expire`.

    All times are readings of one clock of the source, in seconds.
    """

    def __init__(self) -> None:
        self._held: dict[str, _Held] = {}

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._held

    def __len__(self) -> int:
        return len(self._held)

    @property
    def num_blocks(self) -> int:
        """Blocks under any lease."""
        return sum(held.num_blocks for held in self._held.values())

    def grant(self, request_id: str, num_blocks: int, now_s: float, lease_s: float) -> None:
        """Hold `num_blocks` for `lease_s`. Raises ValueError if it has a lease, or for lease_s <= 0."""
        if lease_s <= 0:
            raise ValueError(f"a lease of {lease_s} s on {request_id} would end before it began")
        if request_id in self._held:
            raise ValueError(f"{request_id} already has a lease: release it before a new one is granted")
        self._held[request_id] = _Held(num_blocks, now_s + lease_s)

    def extend(self, request_id: str, now_s: float, lease_s: float) -> bool:
        """Let the lease last for at least `lease_s` from now. Never shortens it. False if it has ended."""
        held = self._held.get(request_id)
        if held is None or held.ends_at_s <= now_s:
            return False
        held.ends_at_s = max(held.ends_at_s, now_s + lease_s)
        return True

    def release(self, request_id: str) -> int:
        """End a lease now; the number of blocks that it held, 0 if there was none."""
        held = self._held.pop(request_id, None)
        return held.num_blocks if held else 0

    def expire(self, now_s: float) -> list[str]:
        """End the leases that have run out, and name them."""
        over = [request_id for request_id, held in self._held.items() if held.ends_at_s <= now_s]
        for request_id in over:
            del self._held[request_id]
        return over

    def left(self, now_s: float) -> list[Lease]:
        """Leases with time left, the shortest first."""
        leases = [
            Lease(request_id, held.num_blocks, held.ends_at_s - now_s)
            for request_id, held in self._held.items()
            if held.ends_at_s > now_s
        ]
        return sorted(leases, key=lambda lease: lease.left_s)
