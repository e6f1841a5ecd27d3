"""How GPUs can be split into prefill and decode, and how well each split serves a trace in simulated time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.capacity import PRECISION, Point, capacity
from benchmarks.hardware import Hardware
from benchmarks.scenarios import from_file
from benchmarks.simulator.outcome import Outcome, summary
from benchmarks.simulator.run import Network, run
from benchmarks.simulator.systems import OURS_NAME, Deployment, design
from benchmarks.simulator.world import NOBODY
from benchmarks.workload import Workload
from engine.request import RoleName

MOST_RATIOS = 9
BLOCKS = 10  # of consecutive requests: how much the difference of two splits scatters between them
NOISE_SIGMAS = 2.0
LADDER_GBPS = (1.0, 10.0, 25.0, 50.0, 100.0, 200.0, 400.0, 1600.0)
FREE = Network(0.0, 1e15)


@dataclass(frozen=True, slots=True)
class Split:
    """What the replicas do: so many prefill and decode, or all do both, each request on one node or on two."""

    prefill: int
    decode: int
    both: int
    one_node: bool

    @property
    def name(self) -> str:
        """As people write it."""
        if self.both:
            return "colocated" if self.one_node else "mixed"
        return f"{self.prefill}P:{self.decode}D"

    @property
    def is_disaggregated(self) -> bool:
        """Whether every request goes over a link."""
        return not self.both

    @property
    def roles(self) -> tuple[RoleName, ...]:
        """One per replica."""
        pools = (RoleName.PREFILL,) * self.prefill + (RoleName.DECODE,) * self.decode
        return pools + (RoleName.MIXED,) * self.both


def splits(replicas: int) -> list[Split]:
    """Colocated, mixed, and every ratio of prefill to decode; of many replicas, MOST_RATIOS spread evenly."""
    listed = [Split(0, 0, replicas, one_node=True)]
    if replicas == 1:
        return listed
    ratios = np.unique(np.rint(np.linspace(1, replicas - 1, min(replicas - 1, MOST_RATIOS))).astype(int))
    listed.append(Split(0, 0, replicas, one_node=False))
    return listed + [Split(prefill, replicas - prefill, 0, one_node=False) for prefill in ratios.tolist()]


@dataclass(frozen=True, slots=True)
class Question:
    """The trace, what is promised, on what, and how much of it is served."""

    trace: Path
    slo_class: str | None
    ttft_ms: float | None
    tpot_ms: float | None
    hardware: Hardware
    replicas: int
    rate_per_s: float
    duration_s: float
    share: float
    seed: int

    @property
    def gpus(self) -> int:
        """Of all replicas."""
        return self.replicas * self.hardware.tp

    def workload(self, rate_per_s: float) -> Workload:
        """At this rate, for the same time at every rate: a trace that is shorter goes round."""
        load = from_file(
            self.trace,
            self.slo_class,
            rate_per_s,
            self.duration_s,
            self.seed,
            ttft_s=None if self.ttft_ms is None else self.ttft_ms / 1e3,
            tpot_ms=self.tpot_ms,
            tpot_scale=self.hardware.tpot_scale,
        )
        return load.clipped(self.hardware.kv_tokens // 2)


@dataclass(frozen=True, slots=True)
class Job:
    """One run, or with `search` one search of a capacity."""

    question: Question
    split: Split
    network: Network
    search: bool


@dataclass(frozen=True, slots=True)
class Tried:
    """How a split did: `value` is the share of promises kept or, of a search, the capacity per GPU."""

    split: Split
    value: float
    facts: dict[str, Any]
    met: tuple[bool, ...]


def do(job: Job) -> Tried:
    """Carry out one job."""
    question = job.question
    if not job.search:
        facts, met, _ = _serve(job, question.rate_per_s / question.gpus, None)
        return Tried(job.split, facts["attainment"], facts, met)

    def at(rate_per_gpu: float) -> Point:
        facts, _, out = _serve(job, rate_per_gpu, question.share)
        return Point(rate_per_gpu, facts["rate_per_gpu_per_s"], out.attainment, out.drained, facts)

    found, points = capacity(at, question.share, question.rate_per_s / question.gpus)
    held = [point for point in points if point.holds(question.share)] or points
    return Tried(job.split, found, max(held, key=lambda point: point.asked_per_gpu).facts, ())


def _serve(
    job: Job, rate_per_gpu: float, stop_below: float | None
) -> tuple[dict[str, Any], tuple[bool, ...], Outcome]:
    question, split = job.question, job.split
    deployment = Deployment(
        OURS_NAME, question.hardware, split.roles, design(OURS_NAME).defaults, one_node=split.one_node
    )
    load = question.workload(rate_per_gpu * question.gpus)
    out = run(load, deployment, job.network, seed=question.seed, stop_below=stop_below)
    facts = summary(out, question.gpus) | _moved(out, job.network, question.hardware.kv_bytes_per_token)
    return facts, tuple(out.met[out.counted].tolist()), out


def _moved(out: Outcome, network: Network, kv_bytes_per_token: int) -> dict[str, float | None]:
    """Of requests kept on two nodes: seconds that KV takes on an idle link, and how many of their paces."""
    world = out.world
    pairs = out.counted & out.met & (world.prefilled_on != NOBODY)
    if not pairs.any():
        return {"kv_transfer_s": None, "kv_share_of_pace": None}
    kv_bytes = world.workload.prompt_tokens[pairs] * kv_bytes_per_token
    moved_s = network.latency_s + kv_bytes / network.bytes_per_s
    paces_s = [world.slos[request].first_pace_s for request in np.flatnonzero(pairs).tolist()]
    return {
        "kv_transfer_s": float(np.median(moved_s)),
        "kv_share_of_pace": float(np.median(moved_s / paces_s)),
    }


def noise(first: Tried, second: Tried) -> float:
    """NOISE_SIGMAS standard errors of a difference of shares kept, by blocks; of capacities, the search's."""
    if not first.met or not second.met:
        return PRECISION * max(first.value, second.value)
    gained = np.array(first.met, dtype=float) - np.array(second.met, dtype=float)
    means = [float(block.mean()) for block in np.array_split(gained, min(BLOCKS, len(gained)))]
    return NOISE_SIGMAS * float(np.std(means, ddof=1)) / math.sqrt(len(means)) if len(means) > 1 else 1.0


Each = Callable[[Sequence[Job]], list[Tried]]


@dataclass(frozen=True, slots=True)
class Turn:
    """The link at which disaggregation begins or ceases to pay [Gbit/s]; None if none of LADDER_GBPS is it."""

    gbps: float | None
    free: float | None  # what the best ratio reaches if moving KV takes no time; None if that was not asked


def turning_point(
    each: Each, question: Question, tried: Sequence[Tried], network: Network, search: bool
) -> Turn | None:
    """Try the best ratio again over faster links if it loses, over slower ones if it wins. None if level."""
    ratio, rival = best_ratio(tried), best_other(tried)
    if abs(ratio.value - rival.value) <= noise(ratio, rival):
        return None
    mixed = next(one.split for one in tried if one.split.name == "mixed")
    colocated = next(one for one in tried if one.split.name == "colocated")

    def over(link: Network) -> tuple[float, bool]:
        own, other = each([Job(question, split, link, search) for split in (ratio.split, mixed)])
        return own.value, own.value > max(other.value, colocated.value)

    now_gbps = network.bytes_per_s * 8 / 1e9
    wins = ratio.value > rival.value
    free = None
    if not wins:
        free, would_win = over(FREE)
        if not would_win:
            return Turn(None, free)
    rungs = [gbps for gbps in LADDER_GBPS if (gbps < now_gbps) == wins and gbps != now_gbps]
    rungs.sort(reverse=wins)
    # The answer changes once along the rungs: halve them.
    low, high = 0, len(rungs)
    while low < high:
        middle = (low + high) // 2
        if over(Network(network.latency_s, rungs[middle] * 1e9 / 8))[1] == wins:
            low = middle + 1
        else:
            high = middle
    return Turn(rungs[low] if low < len(rungs) else None, free)


def best_ratio(tried: Sequence[Tried]) -> Tried:
    """The best of those that disaggregate."""
    return max((one for one in tried if one.split.is_disaggregated), key=lambda one: one.value)


def best_other(tried: Sequence[Tried]) -> Tried:
    """The best of colocated and mixed."""
    return max((one for one in tried if not one.split.is_disaggregated), key=lambda one: one.value)
