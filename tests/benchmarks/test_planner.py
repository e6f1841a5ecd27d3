"""The planner's benchmark: what it draws, what its rows say, and that no order beats an exact choice."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console
from rich.progress import Progress

from benchmarks.mixes import (
    PAPER_COST,
    PAPER_KV_TOKENS,
    SCENARIOS,
    TIGHT_TPOT_S,
    Mix,
    Spread,
    call,
    overload,
)
from benchmarks.planner import Job, measure, targets
from benchmarks.planner_speed import (
    NEWCOMERS,
    RUNNING,
    SHAPES,
    TIERS,
    TPOTS_S,
    Shape,
    call_memory,
    draw_batch,
    draw_calls,
    time_calls,
    time_compose,
)
from benchmarks.planner_value import CASES, ORDERS, Case, best_subset, compare, draw_overloads, in_order
from coordinator.planner.admission import Problem, solve, warm_up

SEED = 3
SMALL = Shape(running=6, newcomers=4, tiers=2, memory_tight=True)


@pytest.fixture(scope="module")
def mixed() -> Mix:
    warm_up()
    return Mix.of("Mixed", SEED)


def test_lengths_have_the_mean_of_the_paper_and_its_clip() -> None:
    rng = np.random.default_rng(SEED)
    lengths = [Spread(763, 424, 100_000).draw(rng) for _ in range(4000)]
    assert np.mean(lengths) == pytest.approx(763, rel=0.05)
    assert np.std(lengths) == pytest.approx(424, rel=0.15)
    clipped = [Spread(1333, 444).draw(rng) for _ in range(1000)]
    assert max(clipped) == 2048
    assert min(Spread(2, 40).draw(rng) for _ in range(500)) == 1


def test_a_request_that_thinks_keeps_one_pace_and_then_another() -> None:
    mix = Mix.of("Reasoning", SEED)
    assert {stay.tpot_s for stay in mix.asking} == {TIGHT_TPOT_S}, "it begins by thinking"
    assert len(mix.staying) == 2 * len(mix.asking)
    thinking, answering = mix.staying[:2]
    assert answering.prompt_tokens == thinking.prompt_tokens + thinking.stage_tokens
    assert thinking.output_tokens == thinking.stage_tokens + answering.output_tokens
    prefill_s = PAPER_COST.prefill_alone_s(thinking.prompt_tokens, 2048)
    assert thinking.ttft_s == pytest.approx(3 * prefill_s)


def test_long_requests_are_met_more_often_than_they_arrive(mixed: Mix) -> None:
    rng = np.random.default_rng(SEED)
    arriving = np.mean([stay.seconds for stay in mixed.asking])
    met = mixed.stay(rng, 2000)
    assert np.mean([stay.seconds for stay, _ in met]) > 1.3 * arriving
    assert all(0 <= made < stay.stage_tokens for stay, made in met)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_burst_is_what_the_comparison_says(scenario: str) -> None:
    mix = Mix.of(scenario, SEED)
    rng = np.random.default_rng(SEED)
    for by_tokens in (False, True):
        instance = overload(mix, rng, newcomers=(4, 16), by_tokens=by_tokens, ample_kv=False)
        assert 4 <= len(instance.newcomers) <= 16
        assert all(0 <= free.tokens <= PAPER_KV_TOKENS for free in instance.free_kv)
        assert sum(decode.context_tokens for decode in instance.decodes) <= PAPER_KV_TOKENS
        assert all(one.value > 1 if by_tokens else one.value == 1 for one in instance.newcomers)


def test_the_same_seed_draws_the_same_instances(mixed: Mix) -> None:
    first, again = (draw_calls(mixed, SMALL, 3, 60.0, SEED)[0] for _ in range(2))
    assert first == again
    assert len({instance.newcomers for instance in first}) == 3


def test_every_promised_row_is_measured() -> None:
    sizes = {(shape.running, shape.newcomers, shape.tiers, shape.memory_tight) for shape in SHAPES}
    assert len(sizes) == len(SHAPES) == len(RUNNING) * len(NEWCOMERS) * len(TIERS) * 2
    assert len(CASES) == len(SCENARIOS) * 4


def test_a_call_has_the_size_of_its_row(mixed: Mix) -> None:
    rng = np.random.default_rng(SEED)
    for tight in (False, True):
        instance = call(mixed, rng, running=9, newcomers=5, tpots_s=TPOTS_S[:3], tight=tight)
        assert (len(instance.decodes), len(instance.newcomers), len(instance.tiers)) == (9, 5, 3)
        assert Problem(instance).tight is tight


def test_rows_of_calls_have_their_figures(mixed: Mix) -> None:
    row = time_calls(mixed, SMALL, count=5, budget_s=60.0, seed=SEED)
    assert (row["running"], row["newcomers"], row["tiers"], row["memory_tight"]) == (6, 4, 2, True)
    assert row["instances"] == 5
    assert 0 < row["p50_ms"] <= row["p99_ms"] <= row["max_ms"]
    assert row["with_why"]["p50_ms"] > 0
    assert 0 <= row["exact_share"] <= 1
    assert row["peak_labels"] >= 1
    assert sum(row["methods"].values()) == 5
    assert "none" not in row["methods"], "only instances in which the promised fit are timed"


def test_rows_of_batches_have_their_figures() -> None:
    row = time_compose(running=5, waiting=3, count=4, budget_s=60.0, seed=SEED)
    assert (row["running"], row["waiting"], row["batches"]) == (5, 3, 4)
    assert 0 < row["p50_ms"] <= row["p99_ms"] <= row["max_ms"]


def test_a_batch_has_its_decodes_and_its_prompts() -> None:
    seqs, duties, _ = draw_batch(np.random.default_rng(SEED), running=40, waiting=10)
    assert sum(seq.decoding for seq in seqs) == 40
    assert sum(seq.prefill_left > 0 and not seq.decoding for seq in seqs) >= 9
    assert 0 < sum(duty.best_effort for duty in duties.values()) < 25


def test_memory_of_a_call_is_seen(mixed: Mix) -> None:
    row = call_memory(mixed, running=6, newcomers=4, tiers=2, seed=SEED)
    assert row["tracemalloc_peak_mib"] > 0
    assert row["peak_rss_growth_mib"] is None or row["peak_rss_growth_mib"] >= 0


@pytest.mark.parametrize("scenario", ["Mixed", "Reasoning"])
def test_no_order_beats_an_exact_choice_and_no_subset_does(scenario: str) -> None:
    mix = Mix.of(scenario, SEED)
    for ample_kv in (False, True):
        case = Case(scenario, by_tokens=True, ample_kv=ample_kv)
        found = draw_overloads(mix, case, 4, (3, 6), SEED)
        assert len(found.instances) == 4
        for instance, plan in zip(found.instances, found.plans, strict=True):
            assert plan.exact
            assert plan.value == pytest.approx(best_subset(instance))
            for name in ORDERS:
                assert in_order(instance, name) <= plan.value + 1e-6


def test_orders_are_what_they_are_called(mixed: Mix) -> None:
    rng = np.random.default_rng(SEED)
    problem = Problem(overload(mixed, rng, newcomers=(8, 8), by_tokens=True, ample_kv=True))
    newcomers = problem.instance.newcomers
    ordered = {name: [newcomers[problem.position[item]] for item in of(problem)] for name, of in ORDERS.items()}
    assert ordered["arrival order"] == list(newcomers)
    assert [one.deadline_s for one in ordered["EDF order"]] == sorted(one.deadline_s for one in newcomers)
    assert [one.tokens for one in ordered["shortest first"]] == sorted(one.tokens for one in newcomers)
    density = [one.value / one.tokens for one in ordered["density"]]
    assert density == sorted(density, reverse=True), "where memory is ample"
    assert all({one.id for one in order} == {one.id for one in newcomers} for order in ordered.values())


def test_a_row_of_the_comparison_adds_up(mixed: Mix) -> None:
    row = compare(mixed, Case("Mixed", by_tokens=False, ample_kv=False), count=3, exhaustive=1, seed=SEED)
    assert (row["scenario"], row["value"], row["instances"]) == ("Mixed", "uniform", 3)
    assert 0 < row["overloaded_share"] <= 1
    assert row["exact_share"] == 1
    assert set(row["orders"]) == {"arrival order", "EDF order", "shortest first", "density"}
    for order in row["orders"].values():
        assert 0 <= order["value_lost_percent"] <= order["worst_lost_percent"] <= 100
        assert order["p50_ms"] > 0
    assert row["exhaustive"]["dp_below_best"] == 0


def test_overloaded_means_that_somebody_is_deferred(mixed: Mix) -> None:
    found = draw_overloads(mixed, Case("Mixed", by_tokens=False, ample_kv=True), 3, (4, 16), SEED)
    assert found.drawn >= len(found.instances) == 3
    for instance in found.instances:
        plan = solve(instance)
        assert plan.kept
        assert plan.deferred


def test_a_target_is_judged_by_its_worst_row() -> None:
    def row(running: int, newcomers: int, p99_ms: float) -> dict[str, float]:
        return {
            "running": running,
            "newcomers": newcomers,
            "tiers": 3,
            "p99_ms": p99_ms,
            "thread_p99_ms": p99_ms,
        }

    result = targets(
        [row(64, 10, 0.5), row(64, 10, 0.9), row(256, 50, 12.0)], [row(64, 0, 0.3), row(256, 0, 1)]
    )
    assert result["call_p99_ms"]["worst"] == 0.9
    assert result["call_p99_ms"]["met"] is True
    assert result["compose_p99_ms"]["worst"] == 0.3
    assert result["compose_p99_ms"]["met"] is False
    assert result["any_call_p99_ms"]["met"] is False


def test_rows_are_kept_by_figure_and_progress_ends() -> None:
    jobs = [Job("calls", 2, "one", lambda: {"n": 1}), Job("calls", 1, "two", lambda: {"n": 2})]
    jobs.append(Job("value", 1, "three", lambda: {"n": 3}))
    with Progress(console=Console(file=io.StringIO())) as progress:
        rows = measure(jobs, progress)
        assert progress.finished
    assert rows == {"calls": [{"n": 1}, {"n": 2}], "value": [{"n": 3}]}
