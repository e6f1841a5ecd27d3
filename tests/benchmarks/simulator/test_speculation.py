"""Drafts: the same luck for every system, and as many tokens of a verify as theory says."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from watching import PAPER, deployment, served, workload

from benchmarks.scenarios import make
from benchmarks.simulator.systems import Tuning
from engine.virtual_kernel import accepts

SEEDS = np.random.default_rng(3).integers(1 << 62, size=40)


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.7, 1.0])
def test_a_draft_is_right_as_often_as_it_should(acceptance: float) -> None:
    luck = np.array([[accepts(seed, position, acceptance) for position in range(500)] for seed in SEEDS])
    assert luck.mean() == pytest.approx(acceptance, abs=0.01)
    if 0 < acceptance < 1:  # and whether it is says nothing of the next one
        assert np.corrcoef(luck[:, :-1].ravel(), luck[:, 1:].ravel())[0, 1] == pytest.approx(0.0, abs=0.02)


def test_a_draft_that_is_right_stays_right_at_a_higher_acceptance() -> None:
    for seed in SEEDS[:5]:
        right = [{at for at in range(200) if accepts(seed, at, chance)} for chance in (0.3, 0.5, 0.7, 0.9)]
        assert all(few <= many for few, many in pairwise(right))


@pytest.mark.parametrize("drafts", [1, 3, 5])
@pytest.mark.parametrize("acceptance", [0.5, 0.7, 0.9])
def test_a_verify_makes_as_many_tokens_as_the_geometric_sum(acceptance: float, drafts: int) -> None:
    """(1 - a^s) / (1 - a) with s the drafts and one more."""
    load = workload([(0.0, 16, 4000)] * 5)
    deployed = deployment("vllm-spec", tuning=Tuning(2048, draft_tokens=drafts), acceptance=acceptance)
    _, watch = served(load, deployed)
    verifies = [part for step in watch.steps for part in step.parts if part.drafts == drafts]
    mean = np.mean([part.new_tokens for part in verifies])
    assert mean == pytest.approx((1 - acceptance ** (drafts + 1)) / (1 - acceptance), rel=0.03)


def test_no_draft_or_every_draft_is_right_at_the_edges() -> None:
    load = workload([(0.0, 16, 101)])
    for acceptance, steps in ((0.0, 100), (1.0, 25)):
        deployed = deployment("vllm-spec", tuning=Tuning(2048, draft_tokens=3), acceptance=acceptance)
        _, watch = served(load, deployed)
        made = [sum(part.new_tokens for part in step.parts) for step in watch.steps[1:]]
        assert made == [100 // steps] * steps


def test_every_system_meets_the_same_luck() -> None:
    """What a verify makes is told by request and position, whoever scheduled it, whatever ran beside."""
    load = make("chatbot", 2.0, 20.0, 1)
    seeds = {}
    for system, tuning in (("vllm-spec", Tuning(2048, draft_tokens=3)), ("ours", Tuning(2048))):
        world, watch = served(load, deployment(system, tuning=tuning, acceptance=0.7), seed=5)
        seeds[system] = world.rows["seed"]
        made = np.zeros(len(load), dtype=np.int64)
        for step in watch.steps:
            for part in step.parts:
                seed, first = world.rows[part.request]["seed"], int(made[part.request])
                made[part.request] += part.new_tokens
                if made[part.request] == load.output_tokens[part.request]:
                    continue  # cut at its end
                right = [accepts(seed, first + at, 0.7) for at in range(part.drafts)]
                assert part.new_tokens == (part.new_tokens and 1 + [*right, False].index(False))
    assert np.array_equal(*seeds.values())


def test_a_verify_costs_its_tokens_and_the_steps_of_the_draft_model() -> None:
    deployed = deployment("vllm-spec", tuning=Tuning(2048, draft_tokens=7), acceptance=0.0)
    _, watch = served(workload([(0.0, 16, 3), (0.0, 16, 3)]), deployed)
    cost = PAPER.speculative_cost
    prefill_s, verify_s = cost.predict(32, seqs=2), cost.predict(16, seqs=2, draft_steps=7)
    assert [step.seconds for step in watch.steps] == pytest.approx([prefill_s, verify_s, verify_s])


def test_drafts_that_find_no_memory_do_not_end_the_run() -> None:
    """The last verify asks for a block beyond all: the only request gives way to itself, and goes on."""
    deployed = deployment("vllm-spec", tuning=Tuning(2048, draft_tokens=7), acceptance=0.5, kv_tokens=160)
    world, _ = served(workload([(0.0, 100, 60)]), deployed)
    assert world.rows["preempted"][0] > 0
