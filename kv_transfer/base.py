"""The handoff contract: what both ends of a KV transfer may rely on, and what happens when one fails.

Life of a handoff. The source finishes a prefill and *offers* its KV: the blocks stay where they are under
a lease. The target *pulls* them. When it has them and has checked that the lease still stood, it notifies
the source, and the lease ends. A lease also ends when it runs out or when it is released.

Failure contract.
- KV is used only if the lease still stood AFTER the last byte was read. Otherwise the pull fails: a pull
  that raced the end of a lease is never served as if nothing had happened.
- KV is used only if every block that was read has the checksum that it had when it was offered, and as many
  bytes came as were asked for. (Checksums are the default; both ends of a transfer must have the same setting.)
- A pull has a deadline. One that is late fails; the blocks that it was to fill are kept apart while bytes may
  still arrive (`held_blocks`), and the prompt is recomputed into others.
- A failed pull is an outcome, not an exception: the target recomputes the prompt from its tokens.
- Every pull ends exactly once, whatever happens to its request.
- A lease can be released at once, twice without harm, and by anyone who holds the handoff. A pull that failed
  does not end the lease by itself: tell the source, which releases it.
- After every outcome the blocks in use on both ends return to what they were.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


@dataclass(frozen=True, slots=True)
class Handoff:
    """KV that a source offers. Travels in messages; `params` is opaque to all but the transport.

    `request_id` is the one by which the source's port releases it. `lease_s` is the time LEFT on the lease
    when the message is sent: clock readings never leave a host.
    """

    request_id: str
    source: str
    num_tokens: int
    kv_bytes: int
    lease_s: float
    params: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Lease:
    """Blocks held for a pull that has not come yet. `left_s` seconds remain."""

    request_id: str
    num_blocks: int
    left_s: float


class PullOutcome(StrEnum):
    """How a pull ended. Anything but PULLED and CACHED means that the engine recomputes the prompt."""

    PULLED = "pulled"
    CACHED = "cached"  # the target needed nothing from the source; nothing moved
    FAILED = "failed"  # transport error, the source is gone, or the request was cancelled
    LATE = "late"  # the deadline passed first
    LEASE_LOST = "lease_lost"  # the lease had ended when the bytes were in
    CORRUPT = "corrupt"  # what came is not what was offered, or not all of it


@dataclass(frozen=True, slots=True)
class Pull:
    """A pull that has ended. `seconds` from its start to its outcome; `kv_bytes` moved."""

    request_id: str
    source: str
    outcome: PullOutcome
    kv_bytes: int
    seconds: float
    detail: str = ""


@dataclass(frozen=True, slots=True)
class PeerAddress:
    """Where an engine's KV can be reached."""

    engine_id: str
    host: str
    port: int
    tp_size: int = 1


@dataclass(frozen=True, slots=True)
class Link:
    """A measured link from `source` to `target`: a fixed part and a rate."""

    source: str
    target: str
    latency_s: float
    bytes_per_s: float

    def transfer_s(self, kv_bytes: int) -> float:
        """Predicted seconds for `kv_bytes`."""
        return self.latency_s + kv_bytes / self.bytes_per_s


class KvPort(ABC):
    """One node's end of the KV-transfer layer, used from the thread that steps the engine.

    The engine itself starts offers (a request submitted with `offer_kv`) and pulls (a request submitted with
    a handoff); the port is where the node sees, bounds and ends them.
    """

    @abstractmethod
    def address(self) -> PeerAddress:
        """Where peers find this node's KV."""

    @abstractmethod
    def leases(self) -> list[Lease]:
        """Leases that this node grants now."""

    @abstractmethod
    def release(self, request_id: str) -> bool:
        """End a lease at once; its blocks are free after the next step. False if there was none."""

    @abstractmethod
    def take_pulls(self) -> list[Pull]:
        """Pulls into this node that ended since the last call."""

    @abstractmethod
    def held_blocks(self) -> int:
        """Blocks here that no request may use yet, since bytes of a pull that failed may still arrive."""

    def reaches(self, peer: PeerAddress) -> bool:
        """Begin to reach for a peer, and say whether a probe of it need not wait for that any more.

        Never blocks. Raises TransferError if the peer could not be reached; asked again, it tries again.
        """
        del peer
        return True

    @abstractmethod
    def probe(self, peer: PeerAddress) -> Link:
        """Measure the link from `peer` to here by reading from it.

        Takes a few seconds at most. Raises TransferError if the peer does not answer or does not match.
        """


class TransferError(Exception):
    """A peer cannot be reached or does not match (version, model, layout). Says which and why."""
