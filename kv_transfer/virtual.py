"""KV transfers that take time and move nothing: for engines whose blocks are counted and hold no bytes.

The failure contract is that of every transport (kv_transfer/base.py). There are no bytes to sum up: a source is
told when what it sends shall be wrong. All ports of a fabric live in one process and are used from one thread,
so a lease is checked by looking at it. A source of another process is not found: such a pull fails, and its
prompt is recomputed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

from kv_transfer.base import Handoff, KvPort, Lease, Link, PeerAddress, Pull, PullOutcome, TransferError
from kv_transfer.lease import LeaseTable
from kv_transfer.pulls import OpenPull, PullLedger


@dataclass(slots=True)
class _Transfer:
    """A read under way. `ends_s`: when its last byte is there, unless the source stalls."""

    request_id: str
    source: VirtualPort
    offer: tuple[str, int]
    ends_s: float
    kv_bytes: int


@dataclass(slots=True)
class Settled:
    """What has ended since an engine last asked, by request: it moves the blocks, the port does not.

    `arrived`: pulls that are here. `failed`: to be recomputed. `late`: the same, but bytes may still come into
    their blocks; `drained`: late ones whose blocks are free now. `over`: offers whose lease has ended.
    """

    arrived: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    late: list[str] = field(default_factory=list)
    drained: list[str] = field(default_factory=list)
    over: list[str] = field(default_factory=list)


class VirtualFabric:
    """The ports of a process, the links between them, and one clock. Every pair has the same link.

    An engine sends one transfer at a time and takes one at a time: concurrent ones share the rate by turns.
    """

    def __init__(self, clock: Callable[[], float], latency_s: float, bytes_per_s: float) -> None:
        self.clock = clock
        self.latency_s = latency_s
        self.bytes_per_s = bytes_per_s
        self._ports: dict[str, VirtualPort] = {}
        self._nonces = itertools.count(1)

    def port(self, engine_id: str, lease_s: float, host: str = "virtual", port: int = 0) -> VirtualPort:
        """A new port. An id that was used before replaces the old one."""
        made = VirtualPort(self, PeerAddress(engine_id, host, port), lease_s)
        self._ports[engine_id] = made
        return made

    def remove(self, port: VirtualPort) -> None:
        """The engine is gone, with all that it offers."""
        engine_id = port.address().engine_id
        if self._ports.get(engine_id) is port:
            del self._ports[engine_id]

    def find(self, engine_id: str) -> VirtualPort | None:
        """The port of an engine, None if it is unknown or gone."""
        return self._ports.get(engine_id)

    def nonce(self) -> int:
        """A number never used before."""
        return next(self._nonces)


class VirtualPort(KvPort):
    """One engine's end. `stirred` is called when another engine ends a lease.

    Its faults: `stalled`: as after a SIGSTOP. `corrupt`: offers whose blocks are no longer what they were.
    `short`: what is read from here does not come whole.
    """

    def __init__(self, fabric: VirtualFabric, address: PeerAddress, lease_s: float) -> None:
        self.stalled = False
        self.corrupt: set[str] = set()
        self.short = False
        self.stirred: Callable[[], None] = lambda: None
        self._fabric = fabric
        self._address = address
        self._lease_s = lease_s
        self._leases = LeaseTable()
        self._nonces: dict[str, int] = {}
        self._asked: dict[str, tuple[Handoff, float]] = {}  # pulls that have not ended, and their deadlines
        self._moving: dict[str, _Transfer] = {}
        self._orphans: dict[str, _Transfer] = {}
        self._blocks: dict[str, int] = {}  # that a transfer fills
        self._pulls = PullLedger()
        self._settled = Settled()
        self._out_free_s = 0.0
        self._in_free_s = 0.0

    def address(self) -> PeerAddress:
        """Who it is; nobody connects to it."""
        return self._address

    # ---- offers ------------------------------------------------------------------------------------------

    def offer(self, request_id: str, num_blocks: int, num_tokens: int, kv_bytes: int) -> Handoff:
        """Offer computed KV: its blocks are the lease's until `settle` says that it is over."""
        self._leases.grant(request_id, num_blocks, self._fabric.clock(), self._lease_s)
        nonce = self._nonces[request_id] = self._fabric.nonce()
        source = self._address.engine_id
        return Handoff(request_id, source, num_tokens, kv_bytes, self._lease_s, {"nonce": nonce})

    def stands(self, offer: tuple[str, int]) -> bool:
        """Whether this very offer still holds its blocks."""
        self._expire()
        request_id, nonce = offer
        return self._nonces.get(request_id) == nonce

    def notify(self, offer: tuple[str, int]) -> None:
        """A target has it all: the lease is over."""
        if self.stands(offer):
            self.release(offer[0])
            self.stirred()

    def leases(self) -> list[Lease]:
        """Leases that stand, the shortest first."""
        return self._leases.left(self._fabric.clock())

    def release(self, request_id: str) -> bool:
        """End a lease; the blocks are free after the next step."""
        if not self._leases.release(request_id):
            return False
        self._over(request_id)
        return True

    def _expire(self) -> None:
        if len(self._leases):
            for request_id in self._leases.expire(self._fabric.clock()):
                self._over(request_id)

    def _over(self, request_id: str) -> None:
        del self._nonces[request_id]
        self.corrupt.discard(request_id)
        self._settled.over.append(request_id)

    # ---- pulls -------------------------------------------------------------------------------------------

    def ask(self, request_id: str, handoff: Handoff, deadline_s: float) -> bool:
        """A request wants this KV within `deadline_s`. False if the pull is over already, and failed."""
        now_s = self._fabric.clock()
        self._pulls.begin(OpenPull(request_id, handoff.source, now_s, now_s + deadline_s))
        if self._fabric.find(handoff.source) is None:
            detail = f"{handoff.source} is gone, or in another process"
            return not self._pulls.end(request_id, PullOutcome.FAILED, now_s, detail)
        self._asked[request_id] = handoff, now_s + deadline_s
        return True

    def read(self, request_id: str, num_blocks: int, kv_bytes: int) -> None:
        """Begin to move the bytes into blocks that are there now; no bytes: all of it was here already."""
        now_s = self._fabric.clock()
        handoff, _ = self._asked[request_id]
        source, offer = self._fabric.find(handoff.source), (handoff.request_id, int(handoff.params["nonce"]))
        self._pulls.started(request_id, now_s)
        if source is None:
            self._end(request_id, PullOutcome.FAILED, f"{handoff.source} is gone")
        elif not source.stands(offer):
            self._end(request_id, PullOutcome.LEASE_LOST, "it had ended before the pull")
        elif kv_bytes == 0:
            source.notify(offer)
            self._end(request_id, PullOutcome.CACHED)
        else:
            begins_s = max(now_s, source._out_free_s, self._in_free_s)
            ends_s = begins_s + kv_bytes / self._fabric.bytes_per_s
            source._out_free_s = self._in_free_s = ends_s
            arrives_s = ends_s + self._fabric.latency_s
            self._moving[request_id] = _Transfer(request_id, source, offer, arrives_s, kv_bytes)
            self._blocks[request_id] = num_blocks

    def give_up(self, request_id: str) -> bool:
        """A request with a pull is cancelled. Whether bytes may still come: then its blocks are `late`."""
        moving = request_id in self._moving
        if request_id in self._asked:
            self._end(request_id, PullOutcome.FAILED, "the request was cancelled", tell=False)
        return moving

    def take_pulls(self) -> list[Pull]:
        """Pulls that ended since the last call."""
        return self._pulls.take()

    def held_blocks(self) -> int:
        """Blocks that wait for late bytes."""
        return sum(self._blocks[request_id] for request_id in self._orphans)

    def probe(self, peer: PeerAddress) -> Link:
        """The true link of an idle pair."""
        source = self._fabric.find(peer.engine_id)
        if source is None or source.stalled:
            raise TransferError(
                f"engine {peer.engine_id} does not answer: gone, stopped, or in another process"
            )
        me = self._address.engine_id
        return Link(peer.engine_id, me, self._fabric.latency_s, self._fabric.bytes_per_s)

    # ---- time --------------------------------------------------------------------------------------------

    def settle(self) -> Settled:
        """End what is over by now, and say all that has ended since the last call."""
        now_s = self._fabric.clock()
        self._expire()
        for transfer in list(self._moving.values()):
            self._arrive(transfer, now_s)
        for request_id in self._pulls.late(now_s):
            self._end(request_id, PullOutcome.LATE, "the deadline passed before the bytes were here")
        for request_id, transfer in list(self._orphans.items()):
            if self._is_gone(transfer) or (now_s >= transfer.ends_s and not transfer.source.stalled):
                del self._orphans[request_id], self._blocks[request_id]
                self._settled.drained.append(request_id)
        settled, self._settled = self._settled, Settled()
        return settled

    def wake_s(self) -> float:
        """When something here will end by itself; never, if nothing can."""
        now_s = self._fabric.clock()
        if self._settled.over:
            return now_s
        times = [transfer.ends_s for transfer in (*self._moving.values(), *self._orphans.values())]
        times += [deadline_s for _, deadline_s in self._asked.values()]
        times += [now_s + lease.left_s for lease in self._leases.left(now_s)[:1]]
        return min(times, default=math.inf)

    def _arrive(self, transfer: _Transfer, now_s: float) -> None:
        if self._is_gone(transfer):
            self._end(transfer.request_id, PullOutcome.FAILED, "the source has gone")
        elif now_s >= transfer.ends_s and not transfer.source.stalled:
            self._pulls.moved(transfer.request_id, transfer.kv_bytes)
            if not transfer.source.stands(transfer.offer):
                lost = "the lease had ended when the bytes were in"
                self._end(transfer.request_id, PullOutcome.LEASE_LOST, lost)
            elif transfer.source.short or transfer.offer[0] in transfer.source.corrupt:
                self._end(transfer.request_id, PullOutcome.CORRUPT, "the blocks are not what was offered")
            else:
                transfer.source.notify(transfer.offer)
                self._end(transfer.request_id, PullOutcome.PULLED)

    def _is_gone(self, transfer: _Transfer) -> bool:
        return self._fabric.find(transfer.source.address().engine_id) is not transfer.source

    def _end(self, request_id: str, outcome: PullOutcome, detail: str = "", *, tell: bool = True) -> None:
        """A pull has an outcome. One that is given up while bytes move leaves an orphan behind."""
        del self._asked[request_id]
        self._pulls.end(request_id, outcome, self._fabric.clock(), detail)
        transfer = self._moving.pop(request_id, None)
        if outcome in (PullOutcome.PULLED, PullOutcome.CACHED):
            ended = self._settled.arrived
        elif transfer is not None and (tell is False or outcome is PullOutcome.LATE):
            self._orphans[request_id] = transfer
            ended = self._settled.late
        else:
            ended = self._settled.failed
        if request_id not in self._orphans:
            self._blocks.pop(request_id, None)
        if tell:
            ended.append(request_id)
