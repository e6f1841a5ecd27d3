"""The pulls into one node, from submission to outcome. Pure: time is passed in.

Every pull that begins ends exactly once; a second end is ignored, so that the places where a pull may fail
need not know of each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kv_transfer.base import Pull, PullOutcome


@dataclass(slots=True)
class OpenPull:
    """A pull that has not ended. Times are readings of this host's clock, in seconds.

    `checksums`: of the blocks on offer, by cache group; None: they are not compared.
    """

    request_id: str
    source: str
    begun_s: float
    deadline_s: float
    lease_slot: int = 0
    lease_nonce: int = 0
    kv_bytes: int = 0
    checksums: Sequence[Sequence[int]] | None = None


def difference(offered: Sequence[Sequence[int]], arrived: Sequence[Sequence[int]]) -> str:
    """What is wrong with blocks that arrived, by the checksums of each cache group; empty if nothing is.

    Only the last blocks of an offer are pulled, where the first ones were in the target's own cache.
    """
    wanted = sum(map(len, arrived))
    if len(offered) != len(arrived) or any(
        len(group) < len(here) for group, here in zip(offered, arrived, strict=True)
    ):
        return f"{wanted} blocks are needed, and {sum(map(len, offered))} were on offer"
    wrong = sum(
        there != here
        for group, blocks in zip(offered, arrived, strict=True)
        for there, here in zip(group[len(group) - len(blocks) :], blocks, strict=True)
    )
    return f"{wrong} of {wanted} blocks are not what was offered" if wrong else ""


class PullLedger:
    """Open pulls by the id of the request that pulls, and those that ended and were not taken yet."""

    def __init__(self) -> None:
        self._open: dict[str, OpenPull] = {}
        self._ended: list[Pull] = []

    def begin(self, pull: OpenPull) -> None:
        """Open a pull. Raises ValueError if its request has one."""
        if pull.request_id in self._open:
            raise ValueError(f"a pull of {pull.request_id} is under way: one request pulls once")
        self._open[pull.request_id] = pull

    def get(self, request_id: str) -> OpenPull | None:
        """The open pull of a request, None if it has ended or never began."""
        return self._open.get(request_id)

    def started(self, request_id: str, now_s: float) -> None:
        """The transfer starts now: what the request waited before is no part of its time."""
        if pull := self._open.get(request_id):
            pull.begun_s = now_s

    def moved(self, request_id: str, kv_bytes: int) -> None:
        """Count bytes that have arrived."""
        if pull := self._open.get(request_id):
            pull.kv_bytes += kv_bytes

    def late(self, now_s: float) -> list[str]:
        """Requests whose deadline has passed, with their pulls still open."""
        return [request_id for request_id, pull in self._open.items() if pull.deadline_s <= now_s]

    def end(self, request_id: str, outcome: PullOutcome, now_s: float, detail: str = "") -> bool:
        """Close a pull. False if it had ended already."""
        pull = self._open.pop(request_id, None)
        if pull is None:
            return False
        seconds = max(now_s - pull.begun_s, 0.0)
        self._ended.append(Pull(request_id, pull.source, outcome, pull.kv_bytes, seconds, detail))
        return True

    def take(self) -> list[Pull]:
        """Pulls that ended since the last call, in order."""
        ended, self._ended = self._ended, []
        return ended
