"""One run: a workload on a deployment, from start to scored outcome. Stops early once that is decided."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.hardware import Hardware
from benchmarks.simulator.links import SharedLinks
from benchmarks.simulator.outcome import Outcome, counted_requests, outcome, score_request
from benchmarks.simulator.slosserve import Slosserve
from benchmarks.simulator.systems import Deployment
from benchmarks.simulator.world import DRAIN_S, World
from benchmarks.workload import Workload
from coordinator.endpoint.slo import Asked, to_slo
from engine.request import Slo
from engine.score import Score

SLICE_S = 5.0  # of simulated time between two looks at how it goes
T0_BATCH_TOKENS = 2048  # of the idle replica by which TTFT SLOs are set, the same for every system
LINK = (10e-6, 12e9)  # latency, bytes a second: 100 GbE

Progress = Callable[[float], None]


@dataclass(frozen=True, slots=True)
class Network:
    """Links between replicas: seconds before the first byte, and bytes a second of each port."""

    latency_s: float = LINK[0]
    bytes_per_s: float = LINK[1]


def promises(workload: Workload, hardware: Hardware) -> list[Slo]:
    """The SLO of each request in seconds, as the endpoint makes it of a class."""
    slos: list[Slo] = []
    memory: dict[tuple[int, int], Slo] = {}
    pairs = zip(workload.class_index.tolist(), workload.prompt_tokens.tolist(), strict=True)
    for index, prompt in pairs:
        slo = memory.get((index, prompt))
        if slo is None:
            asked = Asked(class_name=workload.class_names[index])
            slo = to_slo(asked, workload.slo_classes, prompt, hardware.cost, T0_BATCH_TOKENS)
            assert slo is not None
            memory[index, prompt] = slo
        slos.append(slo)
    return slos


def last_due_s(workload: Workload, slos: Sequence[Slo]) -> float:
    """When the last token of the last request is due, chains taken as if each call ended when it is due."""
    thinking = workload.thinking_tokens
    answer = workload.output_tokens - thinking
    first_pace = np.array([slo.first_pace_s for slo in slos])
    pace = np.array([slo.tpot_s for slo in slos])
    ttft = np.array([slo.ttft_s for slo in slos])
    takes_s = ttft + thinking * first_pace + answer * pace
    due_s = workload.arrival_s + takes_s
    for request in np.flatnonzero(workload.parent >= 0).tolist():
        after = due_s[workload.parent[request]] + workload.delay_s[request]
        due_s[request] = after + takes_s[request]
    return float(due_s.max()) if len(due_s) else 0.0


def run(
    workload: Workload,
    deployment: Deployment,
    network: Network | None = None,
    *,
    seed: int = 0,
    stop_below: float | None = None,
    progress: Progress | None = None,
    slos: Sequence[Slo] | None = None,
) -> Outcome:
    """Serve a workload and score it. With `stop_below`, stop once attainment cannot reach it any more.

    `slos`: what is promised, where that is not what `promises` makes of the workload and the hardware.
    """
    specs, system, kv_bytes = deployment.build()
    network = network or Network()
    slos = promises(workload, deployment.hardware) if slos is None else slos
    links = SharedLinks(len(specs), network.latency_s, network.bytes_per_s)
    ours = isinstance(system, Slosserve)
    keeping = deployment.keeping
    world = World(workload, slos, specs, links, kv_bytes, system, seed=seed, reports=ours, keeping=keeping)
    scores: list[Score | None] = [None] * len(workload)
    scored, failed = np.zeros((2, len(workload)), dtype=np.bool_)
    ttft_s = np.array([slo.ttft_s for slo in slos])
    counted = counted_requests(world)
    may_miss = len(workload) if stop_below is None else (1 - stop_below) * counted.sum()
    until_s, end_s = 0.0, last_due_s(workload, slos) + DRAIN_S
    done = False
    while not done and until_s < end_s:
        until_s = min(until_s + SLICE_S, end_s)
        done = world.run(until_s)
        _score_ended(world, scores, scored, failed)
        missed = int((failed & counted).sum()) + _overdue(world, counted, ttft_s)
        if progress is not None:
            progress(until_s / end_s)
        if missed > may_miss:
            break
    admitted = system.admitted if isinstance(system, Slosserve) and len(system.admitted) else None
    return outcome(world, scores, admitted, drained=world.over == len(workload))


def _score_ended(world: World, scores: list[Score | None], scored: np.ndarray, failed: np.ndarray) -> None:
    """Score what has ended since the last look, and flag it, and what of it has missed."""
    new = np.isfinite(world.ended_s) & ~scored
    for request in np.flatnonzero(new).tolist():
        scores[request] = one = score_request(world, request)
        failed[request] = not one.met
    scored |= new


def _overdue(world: World, counted: np.ndarray, ttft_s: np.ndarray) -> int:
    """Counted requests that have not ended and whose first token is late already."""
    waits = np.isnan(world.rows["first_token_s"]) & np.isfinite(world.arrived_s) & np.isnan(world.ended_s)
    late = world.now_s > world.arrived_s + 1.05 * ttft_s
    return int((waits & late & counted).sum())
