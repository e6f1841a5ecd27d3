"""A KV transfer in memory, with the failure contract of the real one and faults to order.

Blocks are bytes that really are reused after they are free, and a pull really copies them one after the other
while time passes: a pull that races the end of a lease, or of which bytes get lost, would return wrong ones
here as well, were it not for the checks. Used by tests and by virtual engines. Time comes from a clock that is
passed in.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from kv_transfer.base import Handoff, KvPort, Lease, Link, PeerAddress, Pull, PullOutcome, TransferError
from kv_transfer.lease import LeaseTable
from kv_transfer.pulls import OpenPull, PullLedger, difference

Clock = Callable[[], float]


class ManualClock:
    """A clock that stands still until it is told to go on. Seconds."""

    def __init__(self) -> None:
        self._now_s = 0.0

    def __call__(self) -> float:
        return self._now_s

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self._now_s += seconds


@dataclass(frozen=True, slots=True)
class Faults:
    """What is wrong with a source. The default is nothing.

    `fail_at`: its pulls fail when they have moved this share of their blocks. `delay_s`: more latency.
    `lease_ends`: its leases end while they are being read. `corrupt`: a bit of every block that it sends flips.
    `short`: the last block of every transfer does not come. `source_dead`: it is gone, as after a SIGKILL.
    `stalled`: it neither answers nor sends, as after a SIGSTOP.
    """

    fail_at: float | None = None
    delay_s: float = 0.0
    lease_ends: bool = False
    corrupt: bool = False
    short: bool = False
    source_dead: bool = False
    stalled: bool = False


@dataclass(slots=True)
class _Offer:
    blocks: list[int]
    nonce: int


@dataclass(slots=True)
class _Transfer:
    """A read under way. `progress_s` grows only while the source plays its part."""

    request_id: str
    source: FakePort
    offer_id: str
    nonce: int
    pairs: list[tuple[int, int]]  # (block at the source, block here)
    link: Link
    seen_s: float
    progress_s: float = 0.0
    copied: int = 0


class FakeFabric:
    """What connects the ports: their addresses, the links between them, and one clock."""

    def __init__(self, clock: Clock, latency_s: float = 1e-3, bytes_per_s: float = 1e9) -> None:
        self.clock = clock
        self._latency_s = latency_s
        self._bytes_per_s = bytes_per_s
        self._ports: dict[str, FakePort] = {}
        self._nonces = itertools.count(1)

    def port(
        self,
        engine_id: str,
        num_blocks: int,
        block_tokens: int = 16,
        bytes_per_token: int = 4096,
        lease_s: float = 30.0,
    ) -> FakePort:
        """A new port. An id that was used before replaces the old one, as after a restart."""
        port = FakePort(self, engine_id, num_blocks, block_tokens, bytes_per_token, lease_s)
        self._ports[engine_id] = port
        return port

    def find(self, engine_id: str) -> FakePort | None:
        """The port of an engine, None if it is unknown or dead."""
        port = self._ports.get(engine_id)
        return None if port is None or port.faults.source_dead else port

    def link(self, source: str, target: str) -> Link:
        """The true link between two engines."""
        return Link(source, target, self._latency_s, self._bytes_per_s)

    def nonce(self) -> int:
        """A number never used before."""
        return next(self._nonces)


class FakePort(KvPort):
    """One engine's end, with the blocks of the engine in it. `step` is what the engine's step would do."""

    def __init__(
        self,
        fabric: FakeFabric,
        engine_id: str,
        num_blocks: int,
        block_tokens: int,
        bytes_per_token: int,
        lease_s: float,
    ) -> None:
        self.engine_id = engine_id
        self.faults = Faults()
        self.blocks = [b""] * num_blocks
        self._fabric = fabric
        self._block_tokens = block_tokens
        self._bytes_per_token = bytes_per_token
        self._lease_s = lease_s
        self._free = list(range(num_blocks))
        self._held_by: dict[str, list[int]] = {}
        self._offers: dict[str, _Offer] = {}
        self._leases = LeaseTable()
        self._over: list[int] = []  # blocks, free after the next step
        self._pulls = PullLedger()
        self._transfers: dict[str, _Transfer] = {}
        self._orphans: list[_Transfer] = []

    # The engine in it.

    @property
    def used_blocks(self) -> int:
        """Blocks that anything holds: requests, leases, late bytes."""
        return len(self.blocks) - len(self._free)

    def compute(self, request_id: str, kv: list[bytes]) -> None:
        """Prefill: `kv` goes into blocks of the request. Raises ValueError if there are not enough."""
        blocks = self._take(len(kv))
        for block, content in zip(blocks, kv, strict=True):
            self.blocks[block] = content
        self._held_by[request_id] = blocks

    def kv(self, request_id: str) -> list[bytes]:
        """What the blocks of a request hold."""
        return [self.blocks[block] for block in self._held_by[request_id]]

    def free(self, request_id: str) -> None:
        """The request is over. Blocks that a pull may still write are free later. Unknown ids do nothing."""
        if request_id in self._transfers:
            self._orphan(request_id, PullOutcome.FAILED, "the request was cancelled")
        self._free.extend(self._held_by.pop(request_id, []))

    def _take(self, num_blocks: int) -> list[int]:
        if num_blocks > len(self._free):
            raise ValueError(f"{self.engine_id} has {len(self._free)} free blocks, {num_blocks} are needed")
        taken, self._free = self._free[:num_blocks], self._free[num_blocks:]
        return taken

    # Offers.

    def offer(self, request_id: str, num_tokens: int | None = None) -> Handoff:
        """Offer the KV of a computed request: its blocks are the lease's from now on."""
        blocks = self._held_by.pop(request_id)
        tokens = len(blocks) * self._block_tokens if num_tokens is None else num_tokens
        self._leases.grant(request_id, len(blocks), self._fabric.clock(), self._lease_s)
        offer = _Offer(blocks, self._fabric.nonce())
        self._offers[request_id] = offer
        return Handoff(
            request_id,
            self.engine_id,
            num_tokens=tokens,
            kv_bytes=tokens * self._bytes_per_token,
            lease_s=self._lease_s,
            params={"nonce": offer.nonce, "checksums": [[_checksum(self.blocks[block]) for block in blocks]]},
        )

    def offered(self, request_id: str) -> list[int]:
        """The blocks that an offer holds. Raises KeyError if it is over."""
        return self._offers[request_id].blocks

    def stands(self, request_id: str, nonce: int) -> bool:
        """The lease word: whether this very offer still holds its blocks."""
        offer = self._offers.get(request_id)
        return offer is not None and offer.nonce == nonce

    def notify(self, request_id: str, nonce: int) -> None:
        """A target has it all: the lease is over."""
        if self.stands(request_id, nonce):
            self.release(request_id)

    def address(self) -> PeerAddress:
        """A made-up address."""
        return PeerAddress(self.engine_id, "fake", 0)

    def leases(self) -> list[Lease]:
        """Leases that stand, the shortest first."""
        return self._leases.left(self._fabric.clock())

    def release(self, request_id: str) -> bool:
        """End a lease; the blocks are free after the next step."""
        if not self._leases.release(request_id):
            return False
        self._over.extend(self._offers.pop(request_id).blocks)
        return True

    # Pulls.

    def start_pull(self, request_id: str, handoff: Handoff, deadline_s: float, cached_blocks: int = 0) -> bool:
        """Begin to pull what lies behind `cached_blocks`. False if the pull is over already, and failed."""
        now_s = self._fabric.clock()
        checksums = handoff.params.get("checksums")
        self._pulls.begin(OpenPull(request_id, handoff.source, now_s, now_s + deadline_s, checksums=checksums))
        source = self._fabric.find(handoff.source)
        if source is None:
            return not self._pulls.end(request_id, PullOutcome.FAILED, now_s, f"{handoff.source} is gone")
        nonce = int(handoff.params["nonce"])
        offer = source._offers.get(handoff.request_id)
        if offer is None or not source.stands(handoff.request_id, nonce):
            return not self._pulls.end(
                request_id, PullOutcome.LEASE_LOST, now_s, "it had ended before the pull"
            )
        wanted = offer.blocks[cached_blocks:]
        if not wanted:
            source.notify(handoff.request_id, nonce)
            return self._pulls.end(request_id, PullOutcome.CACHED, now_s)
        self._held_by[request_id] = self._take(len(wanted))
        self._transfers[request_id] = _Transfer(
            request_id,
            source,
            handoff.request_id,
            nonce,
            pairs=list(zip(wanted, self._held_by[request_id], strict=True)),
            link=self._fabric.link(handoff.source, self.engine_id),
            seen_s=now_s,
        )
        return True

    def take_pulls(self) -> list[Pull]:
        """Pulls that ended since the last call."""
        return self._pulls.take()

    def held_blocks(self) -> int:
        """Blocks that wait for late bytes."""
        return sum(len(orphan.pairs) for orphan in self._orphans)

    def probe(self, peer: PeerAddress) -> Link:
        """The true link, delays included."""
        source = self._fabric.find(peer.engine_id)
        if source is None or source.faults.stalled:
            raise TransferError(f"engine {peer.engine_id} does not answer: dead or stopped")
        link = self._fabric.link(peer.engine_id, self.engine_id)
        return Link(link.source, link.target, link.latency_s + source.faults.delay_s, link.bytes_per_s)

    def step(self) -> None:
        """Move bytes, end pulls and leases, free blocks. A port that is dead or stalled does nothing."""
        if self.faults.source_dead or self.faults.stalled:
            return
        now_s = self._fabric.clock()
        for transfer in list(self._transfers.values()):
            self._advance(transfer, now_s)
        for request_id in self._pulls.late(now_s):
            self._orphan(request_id, PullOutcome.LATE, "the deadline passed while bytes were under way")
        for orphan in list(self._orphans):
            self._drain(orphan, now_s)
        for request_id in self._leases.expire(now_s):
            self._over.extend(self._offers.pop(request_id).blocks)
        self._free.extend(self._over)
        self._over = []

    def _advance(self, transfer: _Transfer, now_s: float) -> None:
        failure = self._copy(transfer, now_s)
        if failure is not None:
            self._fail(transfer, PullOutcome.FAILED, failure)
        elif transfer.copied == len(transfer.pairs):
            if not transfer.source.stands(transfer.offer_id, transfer.nonce):
                self._fail(transfer, PullOutcome.LEASE_LOST, "the lease had ended when the bytes were in")
            elif wrong := self._differs(transfer):
                self._fail(transfer, PullOutcome.CORRUPT, wrong)
            else:
                transfer.source.notify(transfer.offer_id, transfer.nonce)
                del self._transfers[transfer.request_id]
                self._pulls.end(transfer.request_id, PullOutcome.PULLED, now_s)

    def _differs(self, transfer: _Transfer) -> str:
        """What is wrong with the bytes that have come; empty if nothing is."""
        pull = self._pulls.get(transfer.request_id)
        assert pull is not None
        wanted = len(transfer.pairs) * self._block_tokens * self._bytes_per_token
        if pull.kv_bytes < wanted:
            return f"{pull.kv_bytes} of {wanted} bytes came"
        arrived = [[_checksum(self.blocks[here]) for _, here in transfer.pairs]]
        return difference(pull.checksums or [[]], arrived)

    def _copy(self, transfer: _Transfer, now_s: float) -> str | None:
        """Copy the blocks whose time has come. What went wrong, None if nothing did."""
        faults = transfer.source.faults
        if self._fabric.find(transfer.source.engine_id) is not transfer.source:
            return f"{transfer.source.engine_id} is gone"
        if not faults.stalled:
            transfer.progress_s += now_s - transfer.seen_s
        transfer.seen_s = now_s
        block_bytes = self._block_tokens * self._bytes_per_token
        moving_s = transfer.progress_s - transfer.link.latency_s - faults.delay_s
        due = int(max(moving_s, 0.0) * transfer.link.bytes_per_s / block_bytes + 1e-9)
        if faults.lease_ends and due:
            transfer.source.release(transfer.offer_id)
        for there, here in transfer.pairs[transfer.copied : due]:
            if faults.fail_at is not None and transfer.copied >= faults.fail_at * len(transfer.pairs):
                return "the transport failed"
            transfer.copied += 1
            if faults.short and transfer.copied == len(transfer.pairs):
                continue
            content = transfer.source.blocks[there]
            self.blocks[here] = _flipped(content) if faults.corrupt else content
            self._pulls.moved(transfer.request_id, block_bytes)
        return None

    def _fail(self, transfer: _Transfer, outcome: PullOutcome, detail: str) -> None:
        del self._transfers[transfer.request_id]
        self._free.extend(self._held_by.pop(transfer.request_id))
        self._pulls.end(transfer.request_id, outcome, self._fabric.clock(), detail)

    def _orphan(self, request_id: str, outcome: PullOutcome, detail: str) -> None:
        """Give a pull up whose bytes still come: its blocks belong to nobody until they have come."""
        self._orphans.append(self._transfers.pop(request_id))
        del self._held_by[request_id]
        self._pulls.end(request_id, outcome, self._fabric.clock(), detail)

    def _drain(self, orphan: _Transfer, now_s: float) -> None:
        gone = self._copy(orphan, now_s) is not None
        if gone or orphan.copied == len(orphan.pairs):
            self._orphans.remove(orphan)
            self._free.extend(here for _, here in orphan.pairs)


def _checksum(block: bytes) -> int:
    return zlib.crc32(block)


def _flipped(block: bytes) -> bytes:
    return bytes([block[0] ^ 1]) + block[1:] if block else b"?"
