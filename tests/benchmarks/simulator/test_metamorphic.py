"""What must follow when the inputs change in a way of which the answer is known (common random numbers)."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from watching import BYTES_PER_S, LATENCY_S, LONG_S, PAPER, SYSTEMS, deployment, scaled, workload, world_of

from benchmarks.scenarios import make
from benchmarks.simulator.outcome import outcome
from benchmarks.simulator.run import run
from benchmarks.simulator.systems import Tuning
from benchmarks.workload import Workload
from engine.score import score

# Schedulers do not lose monotonically: one request more can shift which ones share a batch.
ANOMALY = 0.02
BLIND = ("vllm", "sarathi", "distserve")  # to SLOs: what they do does not depend on them


def _looser(load: Workload, factor: float) -> Workload:
    classes = {
        name: one.model_copy(
            update={"ttft_scale": (one.ttft_scale or 1.0) * factor, "tpot_ms": one.tpot_ms * factor}
        )
        for name, one in load.slo_classes.items()
    }
    return replace(load, slo_classes=classes)


@pytest.mark.parametrize("system", SYSTEMS)
def test_attainment_does_not_rise_with_the_rate(system: str) -> None:
    """A higher rate is the same requests, closer together, and more of them."""
    kept = [run(make("chatbot", rate, 60.0, 1), deployment(system)).attainment for rate in (2.0, 4.0, 6.0, 9.0)]
    assert all(later <= earlier + ANOMALY for earlier, later in pairwise(kept)), kept
    assert kept[0] > 0.95
    assert kept[-1] < 0.6


@pytest.mark.parametrize("system", SYSTEMS)
def test_attainment_does_not_fall_with_looser_slos(system: str) -> None:
    load = make("chatbot", 4.5, 60.0, 1)
    tight, loose = (run(_looser(load, factor), deployment(system)) for factor in (1.0, 1.5))
    assert loose.attainment >= tight.attainment - (0.0 if system in BLIND else ANOMALY)
    if system in BLIND:
        assert np.array_equal(tight.world.token_times_s, loose.world.token_times_s, equal_nan=True)
        assert (loose.met >= tight.met).all()


@pytest.mark.parametrize("system", [system for system in SYSTEMS if system != "ours"])
def test_halving_steps_gaps_links_and_slos_halves_every_time(system: str) -> None:
    """To the bit: nothing in the simulator has a length of time of its own."""
    load = make("mixed", 5.0, 40.0, 1)
    half = replace(
        make("mixed", 10.0, 20.0, 1, tpot_scale=0.5), delay_s=load.delay_s / 2, arrival_s=load.arrival_s / 2
    )
    slow, _ = world_of(load, deployment(system), watch=False)
    fast, _ = world_of(
        half,
        deployment(system, machine=scaled(PAPER, 0.5)),
        watch=False,
        latency_s=LATENCY_S / 2,
        bytes_per_s=BYTES_PER_S * 2,
    )
    assert slow.run(LONG_S)
    assert fast.run(LONG_S)
    assert np.array_equal(fast.token_times_s, slow.token_times_s / 2)


def test_halving_changes_next_to_nothing_for_ours() -> None:
    """Nodes report every 0.1 s and deferred requests are asked about as often, however fast the machine."""
    slow = run(make("chatbot", 4.0, 60.0, 1), deployment("ours"))
    fast = run(make("chatbot", 8.0, 30.0, 1, tpot_scale=0.5), deployment("ours", machine=scaled(PAPER, 0.5)))
    assert len(slow.met) == len(fast.met)
    assert fast.attainment == pytest.approx(slow.attainment, abs=0.03)


@pytest.mark.parametrize(
    ("system", "load_share"),
    [("vllm", 0.3), ("vllm", 0.6), ("sarathi", 0.6), ("sarathi-edf", 0.6), ("distserve", 0.6)],
)
def test_equal_prompts_alone_wait_as_in_an_md1_queue(system: str, load_share: float) -> None:
    """Mean time D + rho D / (2 (1 - rho)), and each one's by Lindley's recursion, exactly."""
    prompt, count = 500, 20_000
    step_s = PAPER.cost.predict(prompt, seqs=1)
    gaps_s = np.random.default_rng(7).exponential(step_s / load_share, count)
    load = workload([(at_s, prompt, 1) for at_s in np.cumsum(gaps_s).tolist()])
    world, _ = world_of(load, deployment(system, tuning=Tuning(prompt)), watch=False)
    assert world.run(LONG_S)
    took_s = world.ended_s - world.arrived_s
    waits_s, waited_s = np.zeros(count), 0.0
    for at in range(1, count):
        waited_s = max(waited_s + step_s - gaps_s[at], 0.0)
        waits_s[at] = waited_s
    assert took_s == pytest.approx(waits_s + step_s, abs=1e-6)
    expected_s = step_s + load_share * step_s / (2 * (1 - load_share))
    assert took_s.mean() == pytest.approx(expected_s, rel=0.03)


def test_more_replicas_never_serve_less() -> None:
    """Twice the machines for the same requests. (Each request finds at most half the others beside it.)"""
    load = make("coder", 5.0, 60.0, 2)
    for system in ("vllm", "sarathi", "sarathi-edf", "distserve", "ours"):
        one, two = (run(load, deployment(system, replicas)).attainment for replicas in (1, 2))
        assert two >= one - ANOMALY, system


def test_the_score_is_that_of_the_engine() -> None:
    """One definition: a run is scored by what real runs are scored by, token by token."""
    load = make("reasoning", 0.2, 60.0, 1)
    served = run(load, deployment("sarathi"))
    world = served.world
    for request in range(len(load)):
        first, end = world.first_time[request : request + 2]
        own = score(
            world.slos[request],
            (world.token_times_s[first:end] - world.arrived_s[request]).tolist(),
            completed=True,
            thinking_tokens=int(load.thinking_tokens[request]),
        )
        assert served.scores[request] == own


def test_a_run_that_stops_early_says_the_same_about_the_target() -> None:
    for rate, target in ((3.0, 0.9), (6.0, 0.9)):
        load = make("chatbot", rate, 60.0, 1)
        whole = run(load, deployment("sarathi"))
        early = run(load, deployment("sarathi"), stop_below=target)
        assert (whole.attainment >= target) == (early.attainment >= target)
    assert early.world.now_s < whole.world.now_s


def test_what_was_never_served_has_met_nothing() -> None:
    load = make("chatbot", 4.0, 20.0, 1)
    world, _ = world_of(load, deployment("sarathi"), watch=False)
    world.run(1.0)
    cut = outcome(world, [None] * len(load), None, drained=False)
    assert not cut.met.any()
    assert cut.counted.sum() == (load.arrival_s >= 2.0).sum()
