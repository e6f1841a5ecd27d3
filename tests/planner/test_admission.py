"""Admission: a promise is made only where prefill, pace, memory and slots allow, and a refusal says which."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.planner import admission
from coordinator.planner.admission import Problem, solve
from coordinator.planner.budget import capacity
from coordinator.planner.instance import Decode, FreeKv, Instance, Newcomer, Prefill, Tier
from coordinator.planner.replay import replay
from engine.cost import Piece, StepCost

COST = StepCost.line(0.025, 1e-4)  # 50 ms hold 250 tokens, 100 ms 750
TIGHT, LOOSE = Tier("tight", 0.05), Tier("loose", 0.1)
EMPTY = Instance(COST, 1000, (TIGHT, LOOSE))


def asks(name: str, tokens: int, deadline_s: float, tier: str | None = "loose", kv: int = 0) -> Newcomer:
    return Newcomer(name, tokens, deadline_s, tier, (kv,))


def running(count: int, tier: str = "loose") -> list[Decode]:
    return [Decode(f"r{index}", tier, 0.1) for index in range(count)]


def test_an_idle_replica_admits_what_it_can_prefill_in_time() -> None:
    assert solve(replace(EMPTY, newcomers=[asks("a", 999, 0.125)])).admitted == ("a",)
    late = solve(replace(EMPTY, newcomers=[asks("a", 999, 0.12)]))
    assert late.admitted == ()
    assert "cannot end within 0.120 s" in late.deferred["a"]


LONG_CONTEXTS = replace(StepCost.line(0.013, 1e-5), per_context_token_s=1.4e-7)  # 30 of 3,000: 12.6 ms more


def long_decodes(due_s: float) -> Instance:
    decodes = [Decode(f"r{index}", "tight", due_s, 3000) for index in range(30)]
    return Instance(LONG_CONTEXTS, 2048, (TIGHT,), decodes=decodes)


def test_decodes_that_are_ahead_cost_a_batch_nothing_until_they_bind() -> None:
    """They may be left out of a batch that ends before any of their tokens is due."""
    soon = [asks("a", 100, 0.016, "tight")]
    ahead = replace(long_decodes(due_s=2.0), newcomers=soon)
    plan = solve(ahead)
    assert plan.admitted == ("a",)
    assert not replay(ahead, plan).missed
    assert solve(replace(long_decodes(due_s=0.05), newcomers=soon)).admitted == ()


def test_decodes_a_little_ahead_of_a_pace_that_is_twice_the_shortest_step_are_kept() -> None:
    """The longest batch takes 30 times the pace: a plan need not leave room for one before they bind."""
    slow = StepCost((Piece(0.054, 1.6e-3), Piece(0.009, 1.84e-3)))
    decodes = (Decode("r0", "loose", 0.102, 91), Decode("r1", "loose", 0.551, 305))
    instance = Instance(slow, 2048, (LOOSE,), decodes=decodes, newcomers=[asks("a", 84, 0.95)])
    plan = solve(instance)
    assert plan.kept
    assert plan.admitted == ("a",)
    assert not replay(instance, plan).missed


def test_decodes_that_are_ahead_must_still_be_kept_for_ever() -> None:
    too_many = [Decode(f"r{index}", "tight", 2.0, 3000) for index in range(90)]  # 38 ms of context in 50
    instance = Instance(
        LONG_CONTEXTS, 2048, (TIGHT,), decodes=too_many, newcomers=[asks("a", 100, 1.0, "tight")]
    )
    assert solve(instance).admitted == ()


def test_each_thing_that_is_lacking_is_named() -> None:
    def why(newcomer: Newcomer, **changes: object) -> str:
        plan = solve(replace(EMPTY, newcomers=[newcomer], **changes))  # type: ignore[arg-type]
        assert plan.admitted == ()
        return plan.deferred[newcomer.id]

    assert "KV for 200 tokens" in why(asks("a", 10, 1.0, kv=200), free_kv=[FreeKv(0.0, 199)])
    assert "no free sequence slot" in why(asks("a", 10, 1.0), free_seqs=0)
    assert "decode at 50 ms" in why(asks("a", 10, 1.0, "tight"), decodes=running(600))
    assert "cannot end" in why(asks("a", 5000, 0.3))
    assert "cannot all be kept" in why(asks("a", 10, 1.0), prefills=[Prefill("p", 5000, 0.3, "loose")])


def test_what_was_promised_is_never_dropped_for_more_value() -> None:
    promised = Prefill("promised", 700, 0.1, "loose")
    rich = Newcomer("rich", 700, 0.1, "loose", (0,), value=100.0)
    plan = solve(replace(EMPTY, prefills=[promised], newcomers=[rich]))
    assert plan.kept
    assert plan.admitted == ()


def test_value_decides_who_is_admitted_where_not_all_fit() -> None:
    small = [asks(f"s{index}", 300, 0.1) for index in range(2)]
    large = asks("large", 700, 0.1)
    assert set(solve(replace(EMPTY, newcomers=[large, *small])).admitted) == {"s0", "s1"}
    worth = replace(large, value=3.0)
    plan = solve(replace(EMPTY, newcomers=[worth, *small]))
    assert plan.admitted == ("large",)
    assert plan.deferred["s0"] == "it fits alone, but not beside those admitted"


def test_a_tight_newcomer_is_weighed_against_what_it_does_to_the_batches() -> None:
    """One tight decode cuts the batches of all: it would keep two of three loose prompts out."""
    loose = [asks(f"l{index}", 1600, 0.25 + 0.2 * index) for index in range(3)]
    tight = asks("tight", 100, 0.05, "tight")
    plan = solve(replace(EMPTY, newcomers=[tight, *loose]))
    assert plan.admitted == ("l0", "l1", "l2")


def test_memory_that_comes_free_in_time_is_used() -> None:
    newcomer = Newcomer("a", 500, 1.0, "loose", (400, 400))
    soon = [FreeKv(0.0, 100), FreeKv(0.5, 1000)]
    plan = solve(replace(EMPTY, newcomers=[newcomer], free_kv=soon))
    assert plan.starts == {"a": 1}
    too_late = [FreeKv(0.0, 100), FreeKv(0.96, 1000)]
    assert solve(replace(EMPTY, newcomers=[newcomer], free_kv=too_late)).admitted == ()


def test_many_newcomers_are_answered_and_the_answer_says_that_it_is_not_exact() -> None:
    newcomers = [asks(f"n{index}", 100, 0.1 + 0.01 * index) for index in range(60)]
    plan = solve(replace(EMPTY, newcomers=newcomers))
    assert not plan.exact
    assert plan.method == "search and greedy"
    assert plan.admitted
    assert set(plan.admitted) | set(plan.deferred) == {one.id for one in newcomers}


@pytest.mark.parametrize("count", [100, 300])
def test_any_number_of_promises_that_fit_is_kept_and_of_newcomers_admitted(count: int) -> None:
    line = StepCost.line(0.016, 8.5e-5)
    prefills = [Prefill(f"p{index}", 10, 5 + 0.037 * index) for index in range(count)]
    idle = Instance(line, 2048, (TIGHT, LOOSE))
    assert solve(replace(idle, prefills=prefills)).kept
    newcomers = [Newcomer(one.id, one.tokens, one.deadline_s, None, (0,)) for one in prefills]
    assert len(solve(replace(idle, newcomers=newcomers)).admitted) == count


def test_more_than_can_be_looked_at_are_deferred_with_that_reason() -> None:
    newcomers = [asks(f"n{index}", 400, 0.2) for index in range(admission.LOOKED_AT_NEWCOMERS + 5)]
    plan = solve(replace(EMPTY, newcomers=newcomers))
    assert sum("not looked at" in why for why in plan.deferred.values()) == 5


costs = st.builds(
    StepCost,
    st.lists(st.builds(Piece, st.floats(0, 0.05), st.floats(1e-6, 1e-3)), min_size=1, max_size=2).map(tuple),
    drift=st.floats(0.5, 2),
)


@given(costs, st.floats(0.001, 2.0), st.integers(1, 4096))
def test_the_planner_and_the_batches_agree_on_what_a_batch_holds(
    cost: StepCost, seconds: float, most: int
) -> None:
    """PB* and the batches on the nodes come from one step-time model."""
    problem = Problem(Instance(cost, most, ()))
    nothing = np.zeros(0)
    held = capacity(seconds, seconds, problem.line, problem.load, nothing, nothing, nothing, nothing)
    assert held == pytest.approx(min(cost.tokens_in(seconds), most), abs=1)


@given(st.integers(0, 3), st.integers(1, 6), st.floats(0.05, 1.0))
def test_a_looser_deadline_admits_no_less(decodes: int, newcomers: int, deadline_s: float) -> None:
    def value(deadline_s: float) -> float:
        asked = [asks(f"n{index}", 400, deadline_s) for index in range(newcomers)]
        return solve(replace(EMPTY, decodes=running(decodes), newcomers=asked)).value

    assert value(deadline_s) <= value(2 * deadline_s)


def test_a_draft_that_is_often_right_leaves_more_of_each_batch_to_prompts() -> None:
    """Two tokens a verify: the tight pace lets batches be longer, and a prompt fits that did not."""
    drafted = Tier("tight", 0.05, acceptance=0.9)
    decodes = [Decode(f"r{index}", "tight", 0.05) for index in range(4)]
    asked = [asks("a", 1500, 0.32)]
    plain = replace(EMPTY, tiers=(drafted, LOOSE), decodes=decodes, newcomers=asked)
    assert solve(plain).admitted == ()
    plan = solve(replace(plain, max_depth=4))
    assert plan.depths["tight"] > 1
    assert plan.admitted == ("a",)
    never = Tier("tight", 0.05, acceptance=0.0)
    assert solve(replace(plain, max_depth=4, tiers=(never, LOOSE))).depths["tight"] == 1
    assert solve(replace(plain, max_depth=4, draft_step_s=0.1)).depths["tight"] == 1, "drafting is too dear"


def test_attention_makes_a_long_prompt_take_longer() -> None:
    dear = StepCost(COST.pieces, per_prefill_work_s=1e-7)
    asked = [asks("a", 900, 0.13)]
    assert solve(replace(EMPTY, newcomers=asked)).admitted == ("a",)
    assert solve(replace(EMPTY, cost=dear, newcomers=asked)).admitted == ()
