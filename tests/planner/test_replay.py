"""Plans carried out on the step-time model: its batches keep what was promised, and the composer's do."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings

from coordinator.planner.admission import Plan, solve
from coordinator.planner.instance import Decode, FreeKv, Instance, Newcomer, Prefill, Tier
from coordinator.planner.replay import Replay, replay
from engine.cost import Piece, StepCost
from tests.planner.composed import late_tokens
from tests.planner.instances import Case, cases, seeded_case

TIERS = (Tier("tight", 0.05), Tier("loose", 0.1))
INSTANCE = Instance(
    StepCost.line(0.02, 1e-4),
    1000,
    TIERS,
    decodes=(Decode("d0", "tight", 0.03), Decode("d1", "loose", 0.09)),
    prefills=(Prefill("p0", 300, 0.2, "tight"),),
    newcomers=(Newcomer("n0", 900, 0.4, "loose"), Newcomer("n1", 400, 0.5)),
)
LATE_SHARE = 0.01  # of small random instances, with prompts of a few tokens, in which the composer is late


def check(instance: Instance, plan: Plan, carried: Replay) -> None:
    """Nothing late, every batch within its time, one after another, and nobody before its memory is there."""
    assert carried.missed == ()
    assert not carried.cut_off
    assert bool(carried.batches) <= plan.kept
    end_s = 0.0
    for batch in carried.batches:
        assert batch.start_s >= end_s - 1e-9
        end_s = batch.end_s
        assert batch.predicted_s <= batch.end_s - batch.start_s + 1e-7
        assert sum(batch.tokens.values()) + instance.late_seqs <= instance.max_batch_tokens
        for id_, start in plan.starts.items():
            assert id_ not in batch.tokens or batch.start_s >= instance.free_kv[start].at_s - 1e-9
    if plan.kept:
        done: Counter[str] = Counter()
        for batch in carried.batches:
            done.update(batch.tokens)
        taken = [one for one in instance.newcomers if one.id in plan.starts]
        for prompt in (*instance.prefills, *taken):
            assert done[prompt.id] >= prompt.tokens
        for k, free in enumerate(instance.free_kv):
            held = sum(one.kv_tokens[k] for one in taken if plan.starts[one.id] <= k)
            assert held <= free.tokens


def after_s(instance: Instance) -> float:
    return 3 * max(tier.tpot_s for tier in instance.tiers)


def likely_instance(seed: int, **changes: object) -> Instance:
    """A replica as busy as real ones: up to 48 decodes, prompts of 20 to 4,000 tokens."""
    pick = random.Random(seed)
    tiers = (Tier("a", 0.05), Tier("b", 0.1), Tier("c", 0.075))
    names = [tier.name for tier in tiers]
    running = [(pick.choice(tiers), pick.random(), pick.randint(100, 4000)) for _ in range(pick.randint(0, 48))]
    instance = Instance(
        StepCost.line(0.016, 8.5e-5),
        2048,
        tiers,
        decodes=tuple(
            Decode(f"d{at}", tier.name, tier.tpot_s * (0.4 + 0.6 * part) + 0.01, context)
            for at, (tier, part, context) in enumerate(running)
        ),
        prefills=tuple(
            Prefill(f"p{at}", pick.randint(50, 2000), pick.uniform(0.3, 2), pick.choice(names))
            for at in range(pick.randint(0, 3))
        ),
        newcomers=tuple(
            Newcomer(f"n{at}", pick.randint(20, 4000), pick.uniform(0.1, 3), pick.choice([*names, None]))
            for at in range(pick.randint(1, 10))
        ),
    )
    return replace(instance, **changes)  # type: ignore[arg-type]


@given(cases())
@settings(deadline=None)
def test_a_plan_is_kept_by_its_batches(case: Case) -> None:
    instance = case.instance()
    plan = solve(instance, why=False)
    check(instance, plan, replay(instance, plan, after_s=after_s(instance)))


def test_plans_of_many_small_instances_are_kept() -> None:
    for seed in range(400):
        instance = seeded_case(seed).instance()
        plan = solve(instance, why=False)
        check(instance, plan, replay(instance, plan, after_s=after_s(instance)))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"late_seqs": 5},
        {"cost": StepCost((Piece(0.02, 2e-5), Piece(0.01, 1e-4)))},
        {
            "tiers": (Tier("a", 0.05, 0.8), Tier("b", 0.1, 0.5), Tier("c", 0.075)),
            "max_depth": 4,
            "draft_step_s": 0.001,
            "theta": 0.7,
        },
    ],
    ids=["line", "with late ones", "pieces", "speculation"],
)
def test_plans_of_busy_replicas_are_kept(changes: dict[str, object]) -> None:
    for seed in range(15):
        instance = likely_instance(seed, **changes)
        plan = solve(instance, why=False)
        check(instance, plan, replay(instance, plan, after_s=0.3))


def test_what_comes_late_is_shown() -> None:
    """The judge judges: a plan that takes one more than fits is found out."""
    plan = solve(INSTANCE)
    assert plan.kept
    more = replace(INSTANCE, newcomers=(*INSTANCE.newcomers, Newcomer("much", 2000, 0.45, "loose")))
    missed = replay(more, replace(plan, starts=plan.starts | {"much": 0})).missed
    assert "prefill" in {miss.what for miss in missed}
    crowd = tuple(Decode(f"x{at}", "tight", 0.05) for at in range(400))
    missed = replay(replace(INSTANCE, decodes=crowd), plan).missed
    assert "decode" in {miss.what for miss in missed}


def test_a_newcomer_waits_for_the_memory_that_was_planned_for_it() -> None:
    newcomer = Newcomer("late", 200, 0.8, "loose", (400, 400))
    instance = replace(
        INSTANCE, prefills=(), newcomers=(newcomer,), free_kv=(FreeKv(0.0, 100), FreeKv(0.3, 500))
    )
    plan = solve(instance)
    assert plan.starts == {"late": 1}
    first = next(batch for batch in replay(instance, plan).batches if "late" in batch.tokens)
    assert first.start_s >= 0.3


def test_a_long_plan_is_cut_off_and_says_so() -> None:
    plan = solve(INSTANCE)
    whole = replay(INSTANCE, plan)
    assert not whole.cut_off
    cut = replay(INSTANCE, plan, max_batches=3)
    assert cut.cut_off
    assert cut.batches == whole.batches[:3]
    assert replay(INSTANCE, plan, max_rows=1).cut_off


def test_without_a_plan_there_are_no_batches() -> None:
    broken = replace(INSTANCE, prefills=(Prefill("p", 9000, 0.1, "tight"),))
    assert replay(broken, solve(broken)) == Replay((), (), cut_off=False)


def test_running_decodes_alone_make_their_next_tokens() -> None:
    alone = replace(INSTANCE, prefills=(), newcomers=())
    carried = replay(alone, solve(alone))
    assert carried.missed == ()
    assert {id_ for batch in carried.batches for id_ in batch.tokens} == {"d0", "d1"}


@pytest.mark.parametrize(
    "cost",
    [
        StepCost.line(0.016, 8.5e-5),
        StepCost((Piece(0.02, 1e-6), Piece(0.012, 9e-5))),
        StepCost((Piece(0.016, 8.5e-5),), 5e-8, 2e-9, 2e-5, per_prefill_kv_token_s=2e-8),
    ],
    ids=["line", "pieces", "attention"],
)
def test_the_composer_keeps_what_was_admitted_on_busy_replicas(cost: StepCost) -> None:
    """The closed loop: batches made one by one by the composer, no plan at hand, meet every promise."""
    for seed in range(40):
        instance = likely_instance(seed, cost=cost)
        plan = solve(instance, why=False)
        assert plan.kept
        assert late_tokens(instance, plan, 0.3) == []


def test_the_composer_is_seldom_late_on_small_instances() -> None:
    """Its batches end when a token is due, not on the plan's grid, and its chunks are not the smallest."""
    plans = [(instance, solve(instance, why=False)) for instance in map(_small, range(400))]
    kept = [(instance, plan) for instance, plan in plans if plan.kept]
    late = [1 for instance, plan in kept if late_tokens(instance, plan, after_s(instance))]
    assert len(late) <= LATE_SHARE * len(kept)


def _small(seed: int) -> Instance:
    return seeded_case(seed).instance()
