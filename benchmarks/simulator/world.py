"""Simulated time: replicas that step, messages that arrive, and one order for all of it.

Events happen in order of time; at equal times in the order of `Kind`, then in the order in which they were
asked for. A step of a replica begins after every event of its time. So a run is a function of its inputs.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import numpy as np

from benchmarks.simulator.links import SharedLinks
from benchmarks.simulator.prefixes import Keeping, PrefixMemory
from benchmarks.simulator.steps import CLOCK_S, EVENTS, IDLE, OFFERED, Settings, Station, advance, begin_pulls
from benchmarks.workload import Workload
from engine.cost import StepCost
from engine.request import Slo
from engine.rows import NO_PULL, PULL_WAITS, ROW, CostArrays
from engine.score import TOLERANCE
from engine.sessions import KV_SHARE, TTL_S, Sessions
from engine.virtual_kernel import BLOCK_TOKENS, FREE_BLOCKS, Replica, enqueue, pulled

NOBODY = -1
DRAIN_S = 20.0  # after the last deadline: a queue that is not empty by then has grown


class Kind(IntEnum):
    """Events, in the order in which those of one time happen."""

    PULLED = 0
    ENDED = 1
    OFFERED = 2
    ARRIVAL = 3
    TURN = 4


@dataclass(frozen=True, slots=True)
class ReplicaSpec:
    """One replica: what its steps cost, its memory, and how its scheduler is set."""

    cost: StepCost
    kv_tokens: int
    settings: Settings
    block_tokens: int = 16
    max_seqs: int = 256
    max_batch_tokens: int = 2048


class System(Protocol):
    """Whoever decides where requests go. Called in order of time; `world` is what it acts on."""

    tick_s: float | None  # how often `tick` is called for a replica that runs; None: never

    def arrive(self, world: World, request: int) -> None:
        """A request has come: put it on a replica, or drop it."""
        ...

    def offered(self, world: World, request: int, replica: int) -> None:
        """A prefill has ended and its KV is offered."""
        ...

    def ended(self, world: World, request: int, replica: int) -> None:
        """A request is over."""
        ...

    def turn(self, world: World) -> None:
        """What was asked for by `world.turn_at`."""
        ...

    def tick(self, world: World, replica: int) -> None:
        """Time for the upkeep of a replica, between two of its steps."""
        ...


class World:
    """One run. Columns have a row per request of the workload."""

    def __init__(
        self,
        workload: Workload,
        slos: Sequence[Slo],
        specs: Sequence[ReplicaSpec],
        links: SharedLinks,
        kv_bytes_per_token: int,
        system: System,
        *,
        seed: int = 0,
        reports: bool = False,
        keeping: Keeping = Keeping.NEXT_CALLS,
    ) -> None:
        count = len(workload)
        self.workload, self.slos, self.specs, self.links = workload, slos, specs, links
        self.kv_bytes_per_token = kv_bytes_per_token
        self.now_s = 0.0
        self.rows = _rows(workload, slos, seed)
        self.first_time = np.concatenate([[0], np.cumsum(workload.output_tokens)]).astype(np.int64)
        self.token_times_s = np.full(int(self.first_time[-1]), math.nan)
        self.arrived_s = np.full(count, math.nan)
        self.ended_s = np.full(count, math.nan)
        self.dropped = np.zeros(count, dtype=np.bool_)
        self.prefilled_on = np.full(count, NOBODY, dtype=np.int64)
        self.decoded_on = np.full(count, NOBODY, dtype=np.int64)
        self.chain = _chains(workload)
        self.stations = [_station(spec, count) for spec in specs]
        self.keeping = keeping
        self.prefixes = [_prefixes(spec, keeping) for spec in specs]
        self.reused_tokens = np.zeros(count, dtype=np.int64)
        self.outstanding = np.zeros(len(specs), dtype=np.int64)
        self.leases: list[dict[int, int]] = [{} for _ in specs]  # request -> blocks that its KV holds there
        self.over = 0
        self._system = system
        self._reports = reports
        self._idle = [True] * len(specs)
        self._pulls_wait = [0] * len(specs)
        self._tick_due_s = [0.0] * len(specs)
        self._next_of = _next_calls(workload)
        self._heap: list[tuple[float, Kind, int, int, int]] = []
        self._order = itertools.count()
        self._started = np.empty(max(count, 1), dtype=np.int64)
        for request in np.flatnonzero(workload.parent < 0).tolist():
            self._push(float(workload.arrival_s[request]), Kind.ARRIVAL, request)

    # ---- what a system does ------------------------------------------------------------------------------

    def submit(self, request: int, replica: int, *, offers: bool = False) -> None:
        """A request goes to a replica, whole; with `offers`, for its prefill alone."""
        row = self.rows[request]
        row["offers"] = offers
        self.prefixes[replica].called(int(self.chain[request]), self.now_s)
        row["cached_tokens"] = self.reused_tokens[request] = self.cached_tokens(request, replica)
        self.outstanding[replica] += 1
        if offers:
            self.prefilled_on[request] = replica
        else:
            self.decoded_on[request] = replica
        self._enqueue(request, replica)

    def hand_over(self, request: int, target: int) -> None:
        """`target` pulls the KV that a request has offered, and goes on. A lease holds it till then."""
        source, row = int(self.prefilled_on[request]), self.rows[request]
        self.leases[source][request] = int(row["blocks"])
        row["blocks"] = 0
        row["offers"] = False
        row["pull"] = PULL_WAITS
        row["may_pull"] = True
        self.decoded_on[request] = target
        self.outstanding[target] += 1
        self._pulls_wait[target] += 1
        self._enqueue(request, target)

    def say_first(self, request: int) -> None:
        """The prefill of a request has given its first token."""
        row = self.rows[request]
        self.token_times_s[self.first_time[request]] = row["first_token_s"] = self.now_s
        row["output_tokens"] = 1
        row["due_s"] = max(row["first_due_s"], self.now_s) + row["tpot_s"]

    def end_offered(self, request: int, replica: int) -> None:
        """The first token was all: nobody comes for the KV."""
        row = self.rows[request]
        self.leases[replica][request] = int(row["blocks"])
        row["blocks"] = 0
        self.release(request, replica)
        self.end(request)

    def release(self, request: int, replica: int) -> None:
        """What a request still holds on a replica whose work for it is over."""
        self.outstanding[replica] -= 1
        blocks = self.leases[replica].pop(request, 0)
        self.stations[replica].replica.counts[FREE_BLOCKS] += blocks
        if blocks:
            self.wake(replica)

    def end(self, request: int) -> None:
        """A request is over: its client goes on."""
        self.ended_s[request] = self.now_s
        self.over += 1
        following = self._next_of.get(request)
        if following is not None:
            self._push(self.now_s + float(self.workload.delay_s[following]), Kind.ARRIVAL, following)

    def drop(self, request: int) -> None:
        """A request is turned away."""
        self.dropped[request] = True
        self.end(request)

    def turn_at(self, at_s: float) -> None:
        """Call `turn` of the system then."""
        self._push(at_s, Kind.TURN, NOBODY)

    def cached_tokens(self, request: int, replica: int) -> int:
        """How much of a prompt a replica has from the call before."""
        wanted = int(self.workload.prefix_tokens[request])
        if wanted <= 0:
            return 0
        counts = self.stations[replica].replica.counts
        free_tokens = int(counts[FREE_BLOCKS] * counts[BLOCK_TOKENS])
        return self.prefixes[replica].cached_tokens(int(self.chain[request]), wanted, free_tokens)

    def is_idle(self, replica: int) -> bool:
        """Whether a replica has no step in flight and none to begin."""
        return self._idle[replica] and self.clock_s(replica) <= self.now_s

    def clock_s(self, replica: int) -> float:
        """When a replica can begin its next step."""
        return float(self.stations[replica].times[CLOCK_S])

    # ---- time --------------------------------------------------------------------------------------------

    def run(self, until_s: float) -> bool:
        """Go on until nothing is left to do (True), or until `until_s`."""
        while True:
            event_s = self._heap[0][0] if self._heap else math.inf
            replica, clock_s, next_s = self._next_replica()
            if min(event_s, clock_s) > until_s:
                return event_s == math.inf and clock_s == math.inf
            if clock_s < event_s:
                self._advance(replica, clock_s, min(event_s, next_s))
            else:
                self._happen()

    def _next_replica(self) -> tuple[int, float, float]:
        """Whose step comes first, when, and when the next one's could."""
        first, first_s, next_s = NOBODY, math.inf, math.inf
        for replica, station in enumerate(self.stations):
            if not self._idle[replica]:
                clock_s = float(station.times[CLOCK_S])
                if clock_s < first_s:
                    first, first_s, next_s = replica, clock_s, first_s
                elif clock_s < next_s:
                    next_s = clock_s
        return first, first_s, next_s

    def _advance(self, replica: int, clock_s: float, until_s: float) -> None:
        station = self.stations[replica]
        if self._pulls_wait[replica] and self._start_pulls(replica, clock_s):
            return  # the bytes may be here before the step ends: look again whose turn it is
        if self._pulls_wait[replica]:
            until_s = clock_s  # they may find room before each step, so one at a time
        if self._system.tick_s is not None:
            if clock_s >= self._tick_due_s[replica]:
                self.now_s = clock_s
                self._tick_due_s[replica] = clock_s + self._system.tick_s
                self._system.tick(self, replica)
            until_s = min(until_s, self._tick_due_s[replica])
        why, events = advance(
            station,
            self.rows,
            max(until_s, math.nextafter(clock_s, math.inf)),
            self.specs[replica].settings,
            self._reports,
            self.token_times_s,
            self.first_time,
        )
        if why == IDLE:
            self._idle[replica] = True
        elif why == EVENTS:
            at_s = float(station.times[CLOCK_S])
            for request, kind in station.events[:events].tolist():
                self._push(at_s, Kind.OFFERED if kind == OFFERED else Kind.ENDED, request, replica)

    def _happen(self) -> None:
        self.now_s, kind, _, request, replica = heapq.heappop(self._heap)
        match kind:
            case Kind.ARRIVAL:
                self.arrived_s[request] = self.now_s
                row = self.rows[request]
                row["arrived_s"] = self.now_s
                row["first_due_s"] = row["due_s"] = self.now_s + self.slos[request].ttft_s
                row["grace_s"] = TOLERANCE * self.slos[request].ttft_s
                self._system.arrive(self, request)
            case Kind.ENDED:
                self.outstanding[replica] -= 1
                known = int(self.workload.prompt_tokens[request] + self.workload.output_tokens[request])
                if request in self._next_of or self.keeping is not Keeping.NEXT_CALLS:
                    self.prefixes[replica].keep(int(self.chain[request]), known, self.now_s)
                self._system.ended(self, request, replica)
                self.end(request)
            case Kind.OFFERED:
                self._system.offered(self, request, replica)
            case Kind.PULLED:
                self.release(request, int(self.prefilled_on[request]))
                pulled(self.rows, request)
                self.wake(replica)
            case Kind.TURN:
                self._system.turn(self)

    def _push(self, at_s: float, kind: Kind, request: int, replica: int = NOBODY) -> None:
        heapq.heappush(self._heap, (at_s, kind, next(self._order), request, replica))

    def _enqueue(self, request: int, replica: int) -> None:
        enqueue(self.stations[replica].replica, self.rows, request)
        self.wake(replica)

    def wake(self, replica: int) -> None:
        """Something has changed there: it looks again whether it can begin a step."""
        times = self.stations[replica].times
        times[CLOCK_S] = max(times[CLOCK_S], self.now_s)
        self._idle[replica] = False

    def _start_pulls(self, replica: int, now_s: float) -> bool:
        settings = self.specs[replica].settings
        count = begin_pulls(self.stations[replica], self.rows, now_s, settings, self._started)
        for request in self._started[:count].tolist():
            kv_bytes = int(self.workload.prompt_tokens[request]) * self.kv_bytes_per_token
            source = int(self.prefilled_on[request])
            at_s = self.links.transfer(source, replica, kv_bytes, now_s)
            self._push(at_s, Kind.PULLED, request, replica)
        self._pulls_wait[replica] -= int(count)
        return bool(count)


def _station(spec: ReplicaSpec, most_rows: int) -> Station:
    blocks = spec.kv_tokens // spec.block_tokens
    replica = Replica.empty(most_rows, blocks, spec.block_tokens, spec.max_seqs, spec.max_batch_tokens)
    return Station.of(replica, CostArrays.of(spec.cost))


def _prefixes(spec: ReplicaSpec, keeping: Keeping) -> PrefixMemory:
    if keeping is not Keeping.SESSIONS:
        return PrefixMemory()
    return PrefixMemory(Sessions(TTL_S, int(KV_SHARE * spec.kv_tokens)))


def _rows(workload: Workload, slos: Sequence[Slo], seed: int) -> np.ndarray:
    rows = np.zeros(len(workload), dtype=ROW)
    rows["prompt_tokens"] = workload.prompt_tokens
    rows["end_tokens"] = workload.output_tokens
    rows["promised"] = True
    rows["tpot_s"] = rows["thinking_tpot_s"] = [slo.first_pace_s for slo in slos]
    rows["answer_tpot_s"] = [slo.tpot_s for slo in slos]
    thinks = np.array([slo.thinking_tpot_s is not None for slo in slos])
    rows["thinking_tokens"] = np.where(thinks, workload.thinking_tokens, 0)
    rows["pull"] = NO_PULL
    rows["first_token_s"] = math.nan
    rows["seed"] = np.random.default_rng([seed, 77]).integers(1 << 62, size=len(workload))
    return rows


def _next_calls(workload: Workload) -> dict[int, int]:
    later = np.flatnonzero(workload.parent >= 0)
    return dict(zip(workload.parent[later].tolist(), later.tolist(), strict=True))


def _chains(workload: Workload) -> np.ndarray:
    """The first call of each call's chain."""
    chain = np.arange(len(workload))
    for request in np.flatnonzero(workload.parent >= 0).tolist():
        chain[request] = chain[workload.parent[request]]
    return chain
