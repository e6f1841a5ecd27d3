"""From a node's account to a problem: what counts as a promise, what has aged, and which paces share a tier."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.planner.admission import solve
from coordinator.planner.lengths import KnownLengths
from coordinator.planner.replica import Asking, Replica, to_instance
from coordinator.planner.works import Works
from engine.cost import StepCost
from engine.messages import WorkState
from engine.paces import MOST_PACES
from engine.request import WorkKind

IDLE = Replica(StepCost.line(0.01, 1e-4), 1000, kv_tokens=100_000, block_tokens=16, max_seqs=8)
ASKING = Asking("new", 500, 0, left_s=1.0, tpot_s=0.1, max_tokens=100, class_name="chat")
DECODING = WorkState("d", 1, WorkKind.WHOLE, 200, 0, 20, 100, -1.0, 0.05, False, "chat", 0.04)
QUEUED = WorkState("q", 1, WorkKind.WHOLE, 400, 399, 0, 100, 0.5, 0.1, False, "chat", None)
LENGTHS = KnownLengths()


def problem(*works: WorkState, **changes: object):  # type: ignore[no-untyped-def]
    replica = replace(IDLE, works=Works.of(works), **changes)  # type: ignore[arg-type]
    return to_instance(replica, ASKING, LENGTHS)


def test_a_plan_begins_when_the_batch_ends_that_was_told_of() -> None:
    """The works are told of as they will be then, with the times left counted from then."""
    instance = problem(DECODING, QUEUED, age_s=-0.016, step_s=0.5)
    assert instance.decodes[0].due_s == pytest.approx(0.04)
    assert instance.prefills[0].deadline_s == pytest.approx(0.5)
    assert instance.newcomers[0].deadline_s == pytest.approx(1.0 - 0.016)


def test_after_that_batch_some_other_is_half_done() -> None:
    instance = problem(DECODING, QUEUED, age_s=0.01, step_s=0.005)
    assert instance.decodes[0].due_s == pytest.approx(0.04 - 0.01 - 0.0025)
    assert instance.prefills[0].deadline_s == pytest.approx(0.5 - 0.01 - 0.0025)
    assert instance.newcomers[0].deadline_s == pytest.approx(1.0 - 0.0025)


def test_a_batch_in_flight_is_waited_for_only_where_something_runs() -> None:
    assert problem(step_s=0.2).newcomers[0].deadline_s == 1.0


def test_best_effort_is_no_promise_and_takes_no_slot_and_no_memory() -> None:
    best_effort = replace(QUEUED, best_effort=True)
    assert problem(best_effort).prefills == ()
    assert problem(best_effort).free_seqs == 8
    assert problem(best_effort).free_kv[0].tokens == problem().free_kv[0].tokens
    assert problem(QUEUED).free_seqs == 7
    assert problem(QUEUED).free_kv[0].tokens < problem().free_kv[0].tokens


def test_a_promise_that_is_broken_blocks_nobody() -> None:
    """One late request would otherwise stop all admission."""
    lost = replace(QUEUED, first_token_left_s=-0.1)
    assert problem(lost).prefills == ()
    assert solve(problem(lost)).admitted == ("new",)
    far_behind = replace(DECODING, next_due_left_s=-2.0)
    instance = problem(far_behind)
    assert (instance.decodes, instance.late_seqs) == ((), 1)
    assert solve(instance).admitted == ("new",)


def test_a_promise_that_is_a_little_behind_still_counts_and_is_due_at_once() -> None:
    behind = replace(DECODING, next_due_left_s=-0.02)
    instance = problem(behind)
    assert instance.late_seqs == 0
    assert 0 < instance.decodes[0].due_s < 0.02
    assert solve(instance).kept


def test_the_decode_half_of_a_pair_joins_when_its_first_token_is_due() -> None:
    coming = replace(
        DECODING, kind=WorkKind.DECODE, output_tokens=0, first_token_left_s=0.7, next_due_left_s=None
    )
    assert problem(coming).decodes[0].due_s == pytest.approx(0.7)


def test_a_prefill_for_elsewhere_has_no_pace_here() -> None:
    assert problem(replace(QUEUED, kind=WorkKind.PREFILL)).prefills[0].tier is None


@given(st.lists(st.floats(0.001, 10.0), min_size=1, max_size=40))
def test_any_number_of_paces_becomes_a_few_tiers_none_looser_than_promised(paces_s: list[float]) -> None:
    works = [replace(DECODING, request_id=str(at), tpot_s=pace) for at, pace in enumerate(paces_s)]
    instance = problem(*works, max_seqs=99)
    assert len(instance.tiers) <= MOST_PACES
    tpot_s = {tier.name: tier.tpot_s for tier in instance.tiers}
    promised = {f"{at}#1": pace for at, pace in enumerate(paces_s)}
    assert all(tpot_s[decode.tier] <= promised[decode.id] for decode in instance.decodes)


def test_model_error_is_planned_for_by_a_margin() -> None:
    assert problem(margin=0.2).cost.predict(100) == pytest.approx(1.2 * problem().cost.predict(100))


def test_drafts_that_nodes_report_reach_the_plan() -> None:
    drafted = replace(DECODING, acceptance=0.8)
    instance = problem(drafted, max_depth=4)
    assert {tier.name: tier.acceptance for tier in instance.tiers} == {"50 ms": 0.8, "100 ms": None}
    assert instance.max_depth == 4


def test_a_late_report_makes_nobody_late() -> None:
    """Since then the node has made tokens that the report cannot know of."""
    steady = replace(DECODING, next_due_left_s=0.03)
    instance = problem(steady, age_s=0.3, step_s=0.03)
    assert (len(instance.decodes), instance.late_seqs) == (1, 0)
    promised = problem(QUEUED, age_s=0.48)
    assert len(promised.prefills) == 1


def test_a_promised_decode_that_was_preempted_is_a_prefill_due_with_its_next_token() -> None:
    preempted = replace(DECODING, prefill_left_tokens=150, output_tokens=20, next_due_left_s=4.0)
    (prefill,) = problem(preempted).prefills
    assert (prefill.tokens, prefill.deadline_s) == (151, 4.0)


def test_kv_under_a_lease_takes_no_slot() -> None:
    offered = replace(QUEUED, kind=WorkKind.PREFILL, prefill_left_tokens=0)
    assert problem(offered).free_seqs == 8


def test_a_deadline_far_away_costs_no_more_than_a_minute() -> None:
    replica = replace(IDLE, works=Works.of([DECODING]))
    instance = to_instance(replica, replace(ASKING, left_s=3600.0), LENGTHS)
    assert instance.newcomers[0].deadline_s == 60.0
