"""Small workloads made by hand, and a system around a system that looks at every step of every replica."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from benchmarks.hardware import Hardware, hardware
from benchmarks.parts import promise
from benchmarks.simulator.links import SharedLinks
from benchmarks.simulator.run import promises
from benchmarks.simulator.slosserve import Slosserve
from benchmarks.simulator.systems import Deployment, Tuning, design, roles_for
from benchmarks.simulator.world import NOBODY, System, World
from benchmarks.workload import Workload
from engine.rows import NO_PULL, PULL_WAITS
from engine.virtual_kernel import (
    BLOCK_TOKENS,
    FREE_BLOCKS,
    LIVE,
    MAX_SEQS,
    NUM_BLOCKS,
    RUNNING,
    SEQS,
    STEPS,
    TOKENS,
)

PAPER = hardware("paper")
LONG_S = 1e6  # a run until nothing is left to do
SYSTEMS = ("vllm", "sarathi", "sarathi-edf", "distserve", "ours")
LATENCY_S, BYTES_PER_S = 10e-6, 12e9


@dataclass(frozen=True, slots=True)
class Part:
    """One row's share of a step."""

    request: int
    chunk_tokens: int
    drafts: int
    new_tokens: int


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a replica."""

    replica: int
    begins_s: float
    seconds: float
    parts: tuple[Part, ...]

    @property
    def ends_s(self) -> float:
        return self.begins_s + self.seconds

    @property
    def tokens(self) -> int:
        return sum(part.chunk_tokens for part in self.parts)

    @property
    def chunks(self) -> dict[int, int]:
        """New tokens by request, in the order of the batch."""
        return {part.request: part.chunk_tokens for part in self.parts}


@dataclass(slots=True)
class Watch:
    """Steps one by one, asks `inner` what to do, and checks what must always hold."""

    inner: System
    steps: list[Step] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    offers: list[int] = field(default_factory=list)
    tick_s: float | None = 0.0
    _now_s: float = 0.0
    _seen: dict[int, tuple[int, float, float]] = field(default_factory=dict)  # steps, busy and begin
    _due_s: dict[int, float] = field(default_factory=dict)

    def arrive(self, world: World, request: int) -> None:
        self._goes_on(world)
        self.inner.arrive(world, request)

    def offered(self, world: World, request: int, replica: int) -> None:
        self._goes_on(world)
        self._note(world, replica)
        self.offers.append(request)
        self.inner.offered(world, request, replica)

    def ended(self, world: World, request: int, replica: int) -> None:
        self._goes_on(world)
        self._note(world, replica)
        self.ends.append(request)
        self.inner.ended(world, request, replica)

    def turn(self, world: World) -> None:
        self._goes_on(world)
        self.inner.turn(world)

    def tick(self, world: World, replica: int) -> None:
        self._goes_on(world)
        self._note(world, replica)
        check_memory(world, replica)
        if self.inner.tick_s is not None and world.now_s >= self._due_s.get(replica, 0.0):
            self._due_s[replica] = world.now_s + self.inner.tick_s
            self.inner.tick(world, replica)
        steps, busy_s, _ = self._seen.get(replica, (0, 0.0, 0.0))
        self._seen[replica] = steps, busy_s, world.now_s

    def _goes_on(self, world: World) -> None:
        assert world.now_s >= self._now_s, "time went backwards"
        self._now_s = world.now_s

    def _note(self, world: World, replica: int) -> None:
        """Take down the step that this replica has made since it was last looked at."""
        station = world.stations[replica]
        steps, busy_s, begins_s = self._seen.get(replica, (0, 0.0, 0.0))
        now_steps, now_busy_s = int(station.replica.counts[STEPS]), float(station.times[2])
        if now_steps == steps:
            return
        assert now_steps == steps + 1, "more than one step between two looks"
        count = int(station.replica.batch[SEQS])
        parts = tuple(
            Part(
                request,
                int(world.rows[request]["chunk_tokens"]),
                int(world.rows[request]["verify_tokens"]),
                int(world.rows[request]["new_tokens"]),
            )
            for request in station.replica.members[:count].tolist()
        )
        step = Step(replica, begins_s, now_busy_s - busy_s, parts)
        assert step.tokens == station.replica.batch[TOKENS]
        assert world.now_s >= step.ends_s - 1e-9, "a step overlaps another of its replica"
        self.steps.append(step)
        self._seen[replica] = now_steps, now_busy_s, begins_s


def check_memory(world: World, replica: int) -> None:
    """KV conserved: free + held by rows + by leases is all there is, and nobody holds less than it needs."""
    held, counts = world.stations[replica].replica, world.stations[replica].replica.counts
    live = held.live[: counts[LIVE]]
    rows = world.rows[live]
    assert len(set(live.tolist())) == len(live)
    assert (rows["blocks"] >= 0).all()
    assert counts[FREE_BLOCKS] >= 0
    leased = sum(world.leases[replica].values())
    assert counts[FREE_BLOCKS] + rows["blocks"].sum() + leased == counts[NUM_BLOCKS]
    assert rows["running"].sum() == counts[RUNNING] <= counts[MAX_SEQS]
    assert rows["running"][: counts[RUNNING]].all(), "running rows come first"
    there = rows["running"] | (rows["pull"] > PULL_WAITS)
    assert (rows["blocks"][there] * counts[BLOCK_TOKENS] >= rows["computed_tokens"][there]).all()
    waits = ~rows["running"] & (rows["pull"] <= PULL_WAITS) & (rows["pull"] >= NO_PULL)
    assert (rows["blocks"][waits] == 0).all()


def workload(
    requests: Sequence[tuple[float, int, int]],
    *,
    parent: Sequence[int] | None = None,
    delay_s: Sequence[float] | None = None,
    slo_class: str = "chatbot",
    tpot_scale: float = 1.0,
) -> Workload:
    """Requests of (arrival_s, prompt tokens, output tokens) of one class; calls arrive with their chain."""
    count = len(requests)
    zeros = np.zeros(count, dtype=np.int64)
    times_s, prompt, output = zip(*requests, strict=True)
    arrival_s = list(times_s)
    for request, before in enumerate(parent or ()):
        arrival_s[request] = arrival_s[before] if before >= 0 else arrival_s[request]
    return Workload(
        name="by hand",
        duration_s=max(arrival_s) + 1.0,
        arrival_s=np.array(arrival_s, dtype=np.float64),
        prompt_tokens=np.array(prompt, dtype=np.int64),
        output_tokens=np.array(output, dtype=np.int64),
        thinking_tokens=zeros,
        max_tokens=np.array(output, dtype=np.int64),
        class_index=zeros,
        class_names=(slo_class,),
        slo_classes={slo_class: promise(slo_class, tpot_scale)},
        parent=zeros - 1 if parent is None else np.array(parent, dtype=np.int64),
        delay_s=np.zeros(count) if delay_s is None else np.array(delay_s, dtype=np.float64),
        prefix_tokens=zeros,
    )


def deployment(system: str, replicas: int = 1, machine: Hardware = PAPER, **more: object) -> Deployment:
    """A system as it comes, on `replicas` (distserve: so many that prefill, and as many that decode)."""
    chosen = design(system)
    mode = "disaggregated" if chosen.disaggregated else "colocated"
    tuning = more.pop("tuning", chosen.defaults)
    assert isinstance(tuning, Tuning)
    roles = roles_for(mode, replicas, replicas, replicas)
    return Deployment(system, machine, roles, tuning, **more)


def world_of(
    load: Workload,
    deployed: Deployment,
    *,
    seed: int = 0,
    watch: bool = True,
    latency_s: float = LATENCY_S,
    bytes_per_s: float = BYTES_PER_S,
) -> tuple[World, Watch]:
    """A world at time 0, and who watches it (nobody, if not `watch`)."""
    specs, system, kv_bytes = deployed.build()
    watching = Watch(system)
    world = World(
        load,
        promises(load, deployed.hardware),
        specs,
        SharedLinks(len(specs), latency_s, bytes_per_s),
        kv_bytes,
        watching if watch else system,
        seed=seed,
        reports=isinstance(system, Slosserve),
    )
    return world, watching


def served(load: Workload, deployed: Deployment, **more: object) -> tuple[World, Watch]:
    """A world that was watched until nothing was left to do, and was found sound."""
    world, watch = world_of(load, deployed, **more)
    assert world.run(LONG_S), "the run did not come to an end"
    check_over(world, watch)
    return world, watch


def check_over(world: World, watch: Watch) -> None:
    """What holds when all is done: each request ended once with all its tokens, and nothing is held."""
    count = len(world.workload)
    assert world.over == count, f"{count - world.over} requests never ended"
    completed = np.flatnonzero(~world.dropped)
    at_prefill = [one for one in watch.offers if world.decoded_on[one] == NOBODY]  # one token, no decode
    once = watch.ends + at_prefill
    assert sorted(once) == completed.tolist(), "each request ends once"
    for replica, station in enumerate(world.stations):
        check_memory(world, replica)
        assert station.replica.counts[LIVE] == 0
        assert station.replica.counts[FREE_BLOCKS] == station.replica.counts[NUM_BLOCKS]
        assert not world.leases[replica]
    assert (world.outstanding == 0).all()
    for request in completed.tolist():
        times_s = tokens_of(world, request)
        assert np.isfinite(times_s).all()
        assert (np.diff(times_s) >= 0).all()
        assert times_s[0] > world.arrived_s[request] >= world.workload.arrival_s[request]
        assert world.ended_s[request] == times_s[-1]


def tokens_of(world: World, request: int) -> np.ndarray:
    """When each token of a request was made."""
    return world.token_times_s[world.first_time[request] : world.first_time[request + 1]]


def scaled(machine: Hardware, factor: float) -> Hardware:
    """The same machine, whose steps take `factor` times as long."""
    return replace(
        machine,
        cost=machine.cost.scaled(factor),
        speculative_cost=machine.speculative_cost.scaled(factor),
        tpot_scale=machine.tpot_scale * factor,
    )
