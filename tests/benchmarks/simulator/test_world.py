"""One order for all that happens, the same run for the same inputs, and nothing lost, whatever the load."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from watching import LONG_S, PAPER, SYSTEMS, deployment, served, tokens_of, workload, world_of

from benchmarks.scenarios import make
from benchmarks.simulator.links import SharedLinks
from benchmarks.simulator.steps import CHUNKED, Settings
from benchmarks.simulator.systems import Tuning, roles_for
from benchmarks.simulator.world import ReplicaSpec, World
from benchmarks.workload import Workload
from engine.cost import StepCost
from engine.request import Slo
from engine.score import stage_times

TICK = 2**-10  # seconds a token: sums of such times are exact
EXACT = replace(PAPER, cost=StepCost.line(0.25, TICK))


def _load(seed: int) -> Workload:
    """Up to 30 requests, of a third of the seeds all at once, some in chains; 160 tokens each way at most."""
    rng = np.random.default_rng(seed)
    count, within_s = int(rng.integers(1, 30)), float(rng.choice([0.0, 1.0, 4.0]))
    output = np.where(rng.random(count) < 0.2, 1, rng.integers(1, 160, count))
    at_s, prompt = np.sort(rng.uniform(0, within_s, count)), rng.integers(1, 160, count)
    goes_on = rng.random(count) < 0.2
    return workload(
        list(zip(at_s.tolist(), prompt.tolist(), output.tolist(), strict=True)),
        parent=[at - 1 if at and goes_on[at] else -1 for at in range(count)],
        delay_s=rng.choice([0.0, 0.3], count),
    )


# Each load is one number: what fails is small enough to look at, and random loads find more than short lists.
LOADS = st.integers(0, 2**32 - 1).map(_load)
TUNINGS = st.builds(
    Tuning,
    token_budget=st.sampled_from([64, 512]),
    max_seqs=st.sampled_from([1, 2, 4, 64]),
    relegate=st.booleans(),
)
MEMORY = st.sampled_from([320, 480, 1024, 40_000])


@pytest.mark.parametrize("system", SYSTEMS)
@settings(max_examples=20, derandomize=True)
@given(load=LOADS, tuning=TUNINGS, kv_tokens=MEMORY, replicas=st.integers(1, 2))
def test_every_request_ends_once_and_no_kv_is_lost(
    system: str, load: Workload, tuning: Tuning, kv_tokens: int, replicas: int
) -> None:
    """However little memory: `served` looks at every step, and at the end."""
    served(load, deployment(system, replicas, tuning=tuning, kv_tokens=kv_tokens))


@pytest.mark.parametrize("system", ["vllm", "sarathi", "ours"])
@settings(max_examples=15, derandomize=True)
@given(load=LOADS, tuning=TUNINGS, kv_tokens=MEMORY, acceptance=st.sampled_from([0.0, 0.7, 1.0]))
def test_drafts_lose_nothing_either(
    system: str, load: Workload, tuning: Tuning, kv_tokens: int, acceptance: float
) -> None:
    drafting = tuning if system == "ours" else replace(tuning, draft_tokens=3)
    served(load, deployment(system, tuning=drafting, kv_tokens=kv_tokens, acceptance=acceptance))


@pytest.mark.parametrize("roles", [roles_for("disaggregated", 0, 2, 1), roles_for("mixed", 1, 1, 1)])
@settings(max_examples=20, derandomize=True)
@given(load=LOADS, tuning=TUNINGS, kv_tokens=MEMORY)
def test_ours_in_pools_loses_nothing_either(
    roles: tuple[object, ...], load: Workload, tuning: Tuning, kv_tokens: int
) -> None:
    served(load, replace(deployment("ours", tuning=tuning, kv_tokens=kv_tokens), roles=roles))


@pytest.mark.parametrize("system", SYSTEMS)
@settings(max_examples=15, derandomize=True)
@given(load=LOADS, tuning=TUNINGS, kv_tokens=MEMORY, replicas=st.integers(1, 2), slice_s=st.floats(0.05, 1))
def test_who_looks_on_and_how_time_is_cut_change_nothing(
    system: str, load: Workload, tuning: Tuning, kv_tokens: int, replicas: int, slice_s: float
) -> None:
    """Compiled runs of steps stop wherever anything could happen: one by one they are the same."""
    deployed = deployment(system, replicas, tuning=tuning, kv_tokens=kv_tokens)
    watched, _ = served(load, deployed)
    alone, _ = world_of(load, deployed, watch=False)
    assert alone.run(LONG_S)
    cut, _ = world_of(load, deployed, watch=False)
    until_s = 0.0
    while not cut.run(until_s):
        until_s += slice_s
    assert np.array_equal(watched.token_times_s, alone.token_times_s)
    assert np.array_equal(cut.token_times_s, alone.token_times_s)


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_same_inputs_give_the_same_run_and_another_seed_another(system: str) -> None:
    runs = {}
    for seed in (1, 1, 2):
        world, _ = world_of(make("mixed", 4.0, 20.0, seed), deployment(system), watch=False)
        assert world.run(LONG_S)
        again = runs.setdefault(seed, world.token_times_s)
        assert np.array_equal(again, world.token_times_s)
    assert not np.array_equal(runs[1][:50], runs[2][:50])


def test_a_seed_of_the_world_is_the_luck_of_drafts_alone() -> None:
    deployed = deployment("vllm-spec", acceptance=0.5)
    load = make("chatbot", 2.0, 20.0, 1)
    first, again, other = (served(load, deployed, seed=seed)[0].token_times_s for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    plain = [served(load, deployment("vllm"), seed=seed)[0].token_times_s for seed in (1, 2)]
    assert np.array_equal(*plain)


@dataclass
class Scribe:
    """Takes down what happens. Request 0 is handed over, 1 and 3 are whole, on replica 1."""

    seen: list[str] = field(default_factory=list)
    tick_s: float | None = None

    def arrive(self, world: World, request: int) -> None:
        self.seen.append(f"arrival {request}")
        if request == 0:
            world.turn_at(1.0)
        offers = request in (0, 2)
        world.submit(request, 0 if offers else 1, offers=offers)

    def offered(self, world: World, request: int, replica: int) -> None:
        self.seen.append(f"offered {request}, {len(world.leases[0])} leased")
        world.hand_over(request, 2)

    def ended(self, world: World, request: int, replica: int) -> None:
        self.seen.append(f"ended {request}, {len(world.leases[0])} leased")

    def turn(self, world: World) -> None:
        self.seen.append("turn")

    def tick(self, world: World, replica: int) -> None:
        raise AssertionError("never asked for")


def test_what_happens_at_one_time_happens_in_the_order_of_its_kinds() -> None:
    """At 1.0 s the pull of 0 ends, 1 ends, 2 offers, 3 arrives, and a turn comes that was asked for first."""
    # Steps: 0 on replica 0 until 0.5; 1 on replica 1 until 1.0; 2, there at 0.25, on replica 0 from 0.5 to 1.0.
    load = workload([(0.0, 256, 1), (0.25, 512, 1), (0.25, 256, 1), (1.0, 8, 1)])
    spec = ReplicaSpec(EXACT.cost, 40_000, Settings(CHUNKED, 2048, 0, False, 64, 0.0, 0))
    links = SharedLinks(3, latency_s=0.0, bytes_per_s=512.0)  # 256 tokens of a byte: half a second
    scribe = Scribe()
    world = World(load, [Slo("chatbot", 1.0, 1.0)] * 4, [spec] * 3, links, 1, scribe)
    world.run(1.0)
    at_one = scribe.seen[scribe.seen.index("offered 0, 0 leased") + 1 :]
    assert at_one == ["ended 1, 0 leased", "offered 2, 0 leased", "arrival 3", "turn"]


def test_events_of_one_kind_happen_in_the_order_in_which_they_were_asked_for() -> None:
    scribe = Scribe()
    load = workload([(0.0, 8, 1)] * 4)
    spec = ReplicaSpec(EXACT.cost, 40_000, Settings(CHUNKED, 2048, 0, False, 64, 0.0, 0))
    world = World(load, [Slo("chatbot", 1.0, 1.0)] * 4, [spec] * 3, SharedLinks(3, 0.0, 1.0), 0, scribe)
    world.run(0.0)
    assert scribe.seen == [f"arrival {request}" for request in range(4)]


def test_a_step_begins_after_every_event_of_its_time() -> None:
    """Request 1 comes at the very end of the step that it interrupts, and is in the next one."""
    ends_s = 0.25 + 100 * TICK
    _, watch = served(workload([(0.0, 100, 5), (ends_s, 50, 2)]), deployment("sarathi", machine=EXACT))
    assert watch.steps[1].begins_s == ends_s
    assert watch.steps[1].chunks == {0: 1, 1: 50}


def test_a_call_of_a_chain_comes_when_the_one_before_has_ended_and_its_tool_too() -> None:
    load = workload([(0.5, 100, 4), (0.0, 80, 3), (0.0, 60, 2)], parent=[-1, 0, 1], delay_s=[0.0, 0.75, 0.0])
    world, _ = served(load, deployment("sarathi"))
    assert world.arrived_s.tolist() == [0.5, world.ended_s[0] + 0.75, world.ended_s[1]]


def test_a_chain_goes_on_after_a_call_that_was_turned_away() -> None:
    world, watch = world_of(workload([(0.0, 10, 1), (0.0, 10, 1)], parent=[-1, 0]), deployment("sarathi"))
    watch.inner.arrive = lambda world, request: world.drop(request)
    assert world.run(LONG_S)
    assert world.dropped.all()
    assert world.ended_s.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("bytes_per_s", [2e8, 12e9])
def test_nobody_decodes_before_the_kv_is_there(bytes_per_s: float) -> None:
    load = make("chatbot", 3.0, 20.0, 1)
    world, watch = served(load, deployment("distserve"), bytes_per_s=bytes_per_s)
    decoded = set()
    for step in watch.steps:
        for request in set(step.chunks) - decoded if step.replica == 1 else ():
            moved = int(load.prompt_tokens[request]) * world.kv_bytes_per_token
            assert step.begins_s >= tokens_of(world, request)[0] + moved / bytes_per_s
            decoded.add(request)
    assert decoded == set(np.flatnonzero(load.output_tokens > 1).tolist())


def test_a_call_finds_the_prefix_of_the_one_before_on_its_own_replica() -> None:
    load = workload([(0.0, 320, 4), (0.0, 400, 4)], parent=[-1, 0])
    load = replace(load, prefix_tokens=np.array([0, 324]))
    _, watch = served(load, deployment("sarathi"))
    assert [step.tokens for step in watch.steps] == [320, 1, 1, 1, 400 - 324, 1, 1, 1]


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_batch_keeps_to_the_budget_of_its_system(system: str) -> None:
    budget = 256
    load = make("chatbot", 4.0, 30.0, 3)
    deployed = deployment(system, tuning=Tuning(budget, 32))
    _, watch = served(load, deployed)
    assert max(len(step.parts) for step in watch.steps) <= 32
    for step in watch.steps:
        prompts = [part for part in step.parts if part.chunk_tokens > 1]
        whole = system in ("vllm", "distserve") and len(prompts) == 1  # one that is longer goes alone
        assert step.tokens <= budget or whole


def test_what_has_thought_is_held_to_the_pace_of_its_answer_as_the_score_has_it() -> None:
    thought, output = 7, 20
    load = replace(workload([(0.0, 50, output)], slo_class="reasoning"), thinking_tokens=np.array([thought]))
    world, _ = served(load, deployment("ours", machine=EXACT))
    row, (slo,) = world.rows[0], world.slos
    assert slo.thinking_tpot_s is not None
    assert slo.thinking_tpot_s < slo.tpot_s
    times_s = tokens_of(world, 0)
    last = stage_times(slo, times_s, thought)[-1]
    assert (row["output_tokens"], row["tpot_s"]) == (output, slo.tpot_s)
    # What comes after the last token would be due one pace later.
    assert row["due_s"] == pytest.approx(last.due_s + slo.tpot_s)
