"""Where the cost model is exact, ours keeps what it admits, up to twice what it can serve."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from watching import LONG_S, PAPER, deployment, workload, world_of

from benchmarks.capacity import Setting, measure
from benchmarks.parts import joined
from benchmarks.scenarios import make
from benchmarks.simulator.outcome import score_request
from benchmarks.simulator.systems import OURS_NAME, Tuning, roles_for

CAPACITY_PER_S = {"chatbot": 4.5, "coder": 5.0, "tool": 5.0}
RUNS = [(1.0, 2), (1.0, 4), (2.0, 2), (2.0, 4)]  # share of the capacity, seed


def _kept(name: str, share: float, seed: int) -> np.ndarray:
    """Of each admitted request, whether its promise was kept."""
    load = make(name, CAPACITY_PER_S[name] * share, 40.0, seed)
    world, watch = world_of(load, deployment("ours"), watch=False)
    assert world.run(LONG_S)
    return np.array([score_request(world, one).met for one in np.flatnonzero(watch.inner.admitted).tolist()])


@pytest.mark.parametrize("name", CAPACITY_PER_S)
def test_admitted_requests_are_kept(name: str) -> None:
    """Nearly: what is placed between two reports is not seen in its order, and memory may run over."""
    kept = np.concatenate([_kept(name, *which) for which in RUNS])
    assert len(kept) > 400
    assert kept.mean() >= 0.99


@pytest.mark.parametrize(("name", "rate_per_s"), [("mixed", 8.0), ("chatbot", 12.0), ("coder", 12.0)])
def test_pools_keep_what_they_admit_beyond_their_capacity(name: str, rate_per_s: float) -> None:
    """And everybody gets an answer: best effort neither stops promised requests nor is it stopped for ever.

    Less surely than on one node: a burst meets on the link.
    """
    kept: list[bool] = []
    for seed in (1, 2):
        load = make(name, rate_per_s, 60.0, seed)
        pools = replace(deployment("ours"), roles=roles_for("disaggregated", 0, 2, 1), one_node=False)
        world, watch = world_of(load, pools, watch=False)
        assert world.run(LONG_S)
        assert np.isfinite(world.ended_s).all()
        admitted = np.flatnonzero(watch.inner.admitted).tolist()
        assert len(admitted) > len(load) / 4
        kept += [score_request(world, one).met for one in admitted]
    assert np.mean(kept) >= 0.97


@pytest.mark.parametrize("mode", ["colocated", "disaggregated"])
def test_best_effort_beyond_all_capacity_costs_no_promise(mode: str) -> None:
    """Hundreds of it wait at every node; who is promised something is taken before them."""
    tools = make("tool", 1.0, 60.0, 1, arrivals="poisson")
    others = make("summarizer", 25.0, 60.0, 2, arrivals="poisson")
    hopeless = others.slo_classes["summarizer"].model_copy(update={"ttft_ms": 0.5})
    others = replace(others, class_names=("other",), slo_classes={"other": hopeless})
    roles = roles_for("mixed" if mode == "colocated" else mode, 2, 1, 1)
    cluster = replace(deployment("ours"), roles=roles, one_node=mode == "colocated")
    load = joined("tools beside others", [tools, others])
    world, _ = world_of(load, cluster, watch=False)
    assert world.run(LONG_S)
    is_tool = load.class_index != load.class_names.index("other")
    assert is_tool.sum() > 40
    met = [score_request(world, one).met for one in np.flatnonzero(is_tool).tolist()]
    assert np.mean(met) >= 0.97
    assert world.dropped[~is_tool].any(), "too many of the others, so that some were turned away"


def test_pools_keep_what_they_admit_where_steps_read_long_contexts() -> None:
    """There a decode node takes twice as long for a step as for its tokens alone."""
    alike = Setting(
        "chatbot",
        "rtxpro6000-llama-3.1-8b",
        OURS_NAME,
        "disaggregated",
        replicas=2,
        tuning=Tuning(2048, 256, prefill=1, decode=1),
        duration_s=60.0,
    )
    facts = measure(alike, 9.0, seed=1).facts
    assert facts["pairs"] > 0.8 * facts["counted"]
    assert facts["admitted"] > 0.8 * facts["counted"]
    assert facts["admitted_kept"] >= 0.99


def test_no_promise_counts_on_a_batch_that_is_in_flight() -> None:
    """The second comes in the long batch of the first, which began in the instant of a report."""
    load = workload([(0.0, 2000, 10), (0.01, 100, 10)])
    world, watch = world_of(load, deployment("ours", tuning=Tuning(2048, 16)), watch=False)
    assert world.run(LONG_S)
    deadline_s = world.arrived_s[1] + world.slos[1].ttft_s
    assert world.rows["first_token_s"][0] + PAPER.cost.predict(100) > deadline_s
    assert watch.inner.admitted.tolist() == [True, False]
