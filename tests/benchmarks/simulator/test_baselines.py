"""The systems to compare with do what their authors say, on situations of two to four requests."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from watching import LONG_S, PAPER, Step, deployment, served, tokens_of, workload, world_of

from benchmarks.simulator.systems import Tuning
from engine.virtual_kernel import FREE_BLOCKS

BASE_S, TOKEN_S = 24.8e-3, 6.88e-5  # of a step of the paper's machine


def _chunks(steps: list[Step], replica: int = 0) -> list[dict[int, int]]:
    return [step.chunks for step in steps if step.replica == replica]


def test_vllm_prefills_whole_prompts_before_it_decodes() -> None:
    """Two fit the budget and go together; the third waits for the next batch; nobody decodes meanwhile."""
    load = workload([(0.0, 200, 3), (0.0, 50, 2), (0.0, 20, 2), (0.001, 100, 2)])
    world, watch = served(load, deployment("vllm", tuning=Tuning(256)))
    assert _chunks(watch.steps)[:4] == [{0: 200, 1: 50}, {2: 20, 3: 100}, {3: 1, 2: 1, 1: 1, 0: 1}, {0: 1}]
    assert tokens_of(world, 0)[0] == BASE_S + 250 * TOKEN_S
    assert tokens_of(world, 1)[0] == tokens_of(world, 0)[0]


def test_vllm_takes_a_prompt_longer_than_its_budget_alone() -> None:
    _, watch = served(workload([(0.0, 300, 1), (0.0, 10, 1)]), deployment("vllm", tuning=Tuning(256)))
    assert _chunks(watch.steps) == [{0: 300}, {1: 10}]


def test_vllm_gets_in_order_even_where_a_later_prompt_would_fit() -> None:
    load = workload([(0.0, 200, 2), (0.0, 100, 1), (0.0, 20, 1)])
    _, watch = served(load, deployment("vllm", tuning=Tuning(256)))
    assert _chunks(watch.steps)[:2] == [{0: 200}, {1: 100, 2: 20}]


def test_vllm_keeps_blocks_free_for_those_that_run_but_not_from_one_alone() -> None:
    """A hundredth of the memory: a prompt that needs it waits for others, and goes when it is alone."""
    _, watch = served(workload([(0.0, 16, 8), (0.0, 1584, 1)]), deployment("vllm", kv_tokens=1600))
    assert _chunks(watch.steps)[0] == {0: 16}
    assert _chunks(watch.steps)[-1] == {1: 1584}
    served(workload([(0.0, 1590, 4), (0.0, 16, 2)]), deployment("vllm", kv_tokens=1600))


def test_vllm_preempts_the_last_one_in_and_computes_it_again() -> None:
    """Blocks for both prompts, not for both outputs: the second gives way, keeps its tokens, and comes back."""
    load = workload([(0.0, 40, 60), (0.0, 40, 60)])
    world, watch = served(load, deployment("vllm", kv_tokens=128))
    assert world.rows["preempted"].tolist() == [0, 1]
    again = [step for step in watch.steps if step.chunks.get(1, 0) > 1][1:]
    made = int((tokens_of(world, 1) <= again[0].begins_s).sum())
    assert [step.chunks for step in again] == [{1: 40 + made}]
    assert again[0].begins_s >= world.ended_s[0]


def test_sarathi_decodes_first_and_fills_its_budget_with_chunks_in_order() -> None:
    load = workload([(0.0, 100, 4), (0.03, 150, 2), (0.03, 40, 2)])
    _, watch = served(load, deployment("sarathi", tuning=Tuning(128)))
    expected = [{0: 100}, {0: 1, 1: 127}, {0: 1, 1: 23, 2: 40}, {0: 1, 1: 1, 2: 1}]
    assert _chunks(watch.steps) == [{**one} for one in expected]
    assert all(step.tokens <= 128 for step in watch.steps)


def test_sarathi_does_not_let_a_short_prompt_overtake() -> None:
    _, watch = served(workload([(0.0, 300, 1), (0.0, 10, 1)]), deployment("sarathi", tuning=Tuning(128)))
    assert _chunks(watch.steps) == [{0: 128}, {0: 128}, {0: 44, 1: 10}]


def test_edf_takes_the_earliest_deadline_first() -> None:
    """The TTFT SLO grows with the prompt: of three that come at once the shortest is due first."""
    load = workload([(0.0, 900, 1), (0.0, 500, 1), (0.0, 100, 1)])
    _, watch = served(load, deployment("sarathi-edf", tuning=Tuning(600)))
    assert _chunks(watch.steps) == [{2: 100, 1: 500}, {0: 600}, {0: 300}]


def test_edf_sizes_chunks_so_that_no_decode_is_late() -> None:
    """Prompts come faster than a decode can afford to wait for: each batch ends as its next token is due."""
    load = workload([(0.0, 400, 60), *((0.2, 2000, 1) for _ in range(18))])
    world, watch = served(load, deployment("sarathi-edf", tuning=Tuning(4096)))
    slo = world.slos[0]
    due_s = slo.ttft_s + np.arange(60) * slo.tpot_s
    assert (tokens_of(world, 0) <= due_s + 1e-9).all()
    beside = [step for step in watch.steps if step.chunks.get(0) == 1 and step.tokens > 1]
    slack_s = [due_s[np.searchsorted(tokens_of(world, 0), step.ends_s)] - step.ends_s for step in beside]
    assert min(slack_s) < TOKEN_S  # the chunk was as large as it could be


def test_edf_makes_progress_with_prompts_even_where_decodes_are_late() -> None:
    """Decodes that cannot keep their pace leave `least_chunk` tokens to the prompt that is next."""
    slow = replace(PAPER, tpot_scale=0.01)  # a pace of 1 ms: no step is that short
    load = workload([(0.0, 100, 400), (0.4, 640, 1)], tpot_scale=0.01)
    world, watch = served(load, deployment("sarathi-edf", machine=slow))
    late = [step for step in watch.steps if step.begins_s > 0.5 and 1 in step.chunks]
    assert late[0].chunks == {0: 1, 1: 64}
    assert world.ended_s[1] < 1.2


def test_edf_with_relegation_puts_late_prompts_behind_those_in_time() -> None:
    """The third long prompt is late when a short one comes; it is next all the same, but for relegation."""
    load = workload([(0.0, 1900, 1), (0.0, 1900, 1), (0.0, 1900, 1), (1.1, 1500, 1)])
    orders = {}
    for relegate in (False, True):
        tuning = Tuning(128, relegate=relegate)
        world, _ = served(load, deployment("sarathi-edf", tuning=tuning))
        assert world.slos[2].ttft_s < 1.1
        orders[relegate] = world.ended_s[3] < world.ended_s[2]
    assert orders == {False: False, True: True}


def test_edf_holds_nobody_up_for_a_prompt_that_cannot_get_in() -> None:
    """One slot: a more urgent prompt waits for it, and the chunks go to the one that has it."""
    load = workload([(0.0, 400, 2), (0.01, 20, 1)])
    world, watch = served(load, deployment("sarathi-edf", tuning=Tuning(128, max_seqs=1)))
    assert _chunks(watch.steps)[:4] == [{0: 128}, {0: 128}, {0: 128}, {0: 16}]
    assert world.ended_s[1] > world.ended_s[0]


def test_distserve_batches_whole_prompts_and_decodes_elsewhere() -> None:
    load = workload([(0.0, 200, 3), (0.0, 50, 3), (0.0, 100, 1)])
    world, watch = served(load, deployment("distserve", tuning=Tuning(256)))
    assert _chunks(watch.steps, 0) == [{0: 200, 1: 50}, {2: 100}]
    assert {part.chunk_tokens for step in watch.steps if step.replica == 1 for part in step.parts} == {1}
    first_s = BASE_S + 250 * TOKEN_S
    assert tokens_of(world, 0)[0] == tokens_of(world, 1)[0] == first_s
    assert tokens_of(world, 2)[0] == first_s + BASE_S + 100 * TOKEN_S
    assert (world.decoded_on == [1, 1, -1]).all()


def test_distserve_decodes_after_the_transfer_and_holds_the_kv_until_then() -> None:
    """A gigabyte a second: 200 tokens of 512 KiB take 105 ms, in which the source holds 13 blocks."""
    load = workload([(0.0, 200, 3)])
    world, watch = world_of(load, deployment("distserve"), bytes_per_s=1e9, latency_s=0.01)
    offered_s = BASE_S + 200 * TOKEN_S
    there_s = offered_s + 200 * world.kv_bytes_per_token / 1e9 + 0.01
    world.run(there_s - 1e-6)
    blocks = world.specs[0].kv_tokens // 16
    assert tokens_of(world, 0)[0] == pytest.approx(offered_s)
    assert world.leases[0] == {0: 13}
    assert world.stations[0].replica.counts[FREE_BLOCKS] == blocks - 13
    assert world.stations[1].replica.counts[FREE_BLOCKS] == blocks - 13  # and so does the target
    world.run(LONG_S)
    assert world.stations[0].replica.counts[FREE_BLOCKS] == blocks
    decodes = [step for step in watch.steps if step.replica == 1]
    assert decodes[0].begins_s == pytest.approx(there_s)
    assert [step.chunks for step in decodes] == [{0: 1}, {0: 1}]
    assert tokens_of(world, 0)[1] == pytest.approx(there_s + BASE_S + TOKEN_S)


def test_distserve_leaves_the_kv_at_the_source_while_the_target_is_full() -> None:
    """Room for one at the decode node: the second stays where it was prefilled, and the third waits for it."""
    load = workload([(0.0, 100, 20), (0.0, 110, 20), (0.01, 110, 2)])
    world, _ = world_of(load, deployment("distserve", kv_tokens=208))
    world.run(0.3)
    assert world.leases[0] == {1: 7}
    assert np.isnan(world.ended_s[0])
    assert np.isnan(tokens_of(world, 2)[0])
    assert world.run(LONG_S)
    assert tokens_of(world, 1)[1] > world.ended_s[0]


def test_distserve_goes_on_where_a_preempted_decode_and_pulled_ones_fill_the_memory() -> None:
    """Ten blocks: 4 of the first, 6 of one on its way. The first needs a fifth and gives up all; if it kept the
    other out until there is room for both, neither would ever go on."""
    load = workload([(0.0, 60, 90), (0.0, 95, 4)])
    world, _ = served(load, deployment("distserve", kv_tokens=160), bytes_per_s=2e8)
    assert world.rows["preempted"].tolist() == [1, 0]
    assert world.ended_s[1] < world.ended_s[0]


def test_distserve_computes_again_what_was_preempted_before_it_pulls_more() -> None:
    """What comes later must not take the blocks that a preempted decode waits for, one after the other."""
    load = workload([(0.0, 60, 90), (0.0, 95, 4), *((0.3 + 0.01 * at, 60, 30) for at in range(6))])
    world, _ = served(load, deployment("distserve", kv_tokens=160), bytes_per_s=2e8)
    assert world.rows["preempted"][0] >= 1
    assert world.ended_s[0] < np.sort(world.ended_s)[-3]


def test_the_least_loaded_replica_takes_the_next_request() -> None:
    load = workload([(0.0, 500, 50), (0.0, 10, 1), (0.0, 10, 1), (0.2, 10, 1)])
    world, _ = served(load, deployment("sarathi", 2))
    assert world.decoded_on.tolist() == [0, 1, 0, 1]
