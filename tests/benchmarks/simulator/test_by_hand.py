"""The compiled simulator makes the very token times of a plain one that was written beside it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sarathi_by_hand import Sarathi
from watching import PAPER, deployment, served, tokens_of, workload

from benchmarks.hardware import hardware
from benchmarks.scenarios import make
from benchmarks.simulator.systems import Tuning

LLAMA = hardware("a100-llama-2-7b")  # has every term that a cost can have
AT_S = st.sampled_from([0.0, 0.5]) | st.floats(0, 2)
REQUESTS = st.lists(st.tuples(AT_S, st.integers(1, 200), st.integers(1, 120)), min_size=1, max_size=16)


@pytest.mark.parametrize("machine", [PAPER, LLAMA], ids=["paper", "llama"])
@settings(max_examples=40, derandomize=True)
@given(
    requests=REQUESTS,
    budget=st.sampled_from([16, 64, 256]),
    max_seqs=st.sampled_from([1, 3, 64]),
    blocks=st.sampled_from([20, 30, 60, 1000]),
)
def test_token_times_are_those_of_a_plain_sarathi(
    machine: object, requests: list[tuple[float, int, int]], budget: int, max_seqs: int, blocks: int
) -> None:
    requests = sorted(requests)
    tuning = Tuning(budget, max_seqs)
    world, _ = served(
        workload(requests), deployment("sarathi", machine=machine, tuning=tuning, kv_tokens=16 * blocks)
    )
    plain = Sarathi(machine.cost, budget, max_seqs, blocks, 16)
    for request, seq in enumerate(plain.serve(requests)):
        assert tokens_of(world, request).tolist() == pytest.approx(seq.token_times_s, abs=1e-9)
    assert world.rows["preempted"].sum() == plain.preemptions


@pytest.mark.parametrize(("name", "rate_per_s"), [("chatbot", 5.0), ("coder", 6.0)])
def test_token_times_of_a_scenario_beyond_capacity_too(name: str, rate_per_s: float) -> None:
    load = make(name, rate_per_s, 30.0, 1)
    requests = list(
        zip(load.arrival_s.tolist(), load.prompt_tokens.tolist(), load.output_tokens.tolist(), strict=True)
    )
    world, _ = served(load, deployment("sarathi", kv_tokens=16 * 600))
    plain = Sarathi(PAPER.cost, 512, 256, 600, 16)
    times_s = np.concatenate([seq.token_times_s for seq in plain.serve(requests)])
    assert world.token_times_s == pytest.approx(times_s, abs=1e-9)
    assert plain.preemptions > 0
