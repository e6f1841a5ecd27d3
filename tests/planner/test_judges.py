"""The judges of the planner give the known answer where there is one, and each of them can say no."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.planner import moore_hodgson, reference, step_oracle
from tests.planner.instances import TICK_S, Case, Job, Runner, seeded_case, seeded_grid_case

# A batch of 10 ticks holds 40 tokens, one of 20 ticks 120, one of 25 ticks (the largest) 160.
BARE = Case(base=5, rate=8, max_batch_tokens=160, tpots=(("fast", 10), ("slow", 20)))
FAST = Runner("d", "fast", 10)


def asking(case: Case, *jobs: Job) -> Case:
    return replace(case, newcomers=jobs)


def both_accept(case: Case) -> bool:
    """Whether everybody is accepted; the two judges have to agree on it."""
    ids = frozenset(job.id for job in case.newcomers)
    by_plan = ids in reference.accepted_sets(case)
    assert step_oracle.feasible(case, ids) == by_plan
    return by_plan


def test_an_idle_replica_fills_one_batch_up_to_the_deadline_and_not_a_token_more() -> None:
    assert both_accept(asking(BARE, Job("n", 120, 20)))
    assert not both_accept(asking(BARE, Job("n", 121, 20)))


def test_a_batch_is_no_larger_than_the_engine_allows() -> None:
    assert both_accept(asking(BARE, Job("n", 160, 29)))
    assert not both_accept(asking(BARE, Job("n", 161, 29)))


def test_a_running_decode_cuts_time_into_batches_of_its_pace() -> None:
    # Two batches of 40; one token each for the decode, and the one due at tick 30 has to wait for the next.
    assert both_accept(asking(replace(BARE, runners=(FAST,)), Job("n", 78, 20)))
    assert not both_accept(asking(replace(BARE, runners=(FAST,)), Job("n", 79, 20)))


def test_a_running_decode_with_slack_lets_a_longer_batch_through() -> None:
    # Due at 20 first: one batch of 20 ticks, of which one token is the decode's.
    assert both_accept(asking(replace(BARE, runners=(Runner("d", "fast", 20),)), Job("n", 119, 20)))
    assert not step_oracle.feasible(
        asking(replace(BARE, runners=(Runner("d", "fast", 20),)), Job("n", 120, 20)), ["n"]
    )


def test_a_promised_prefill_comes_first() -> None:
    promised = replace(BARE, promised=(Job("p", 100, 20),))
    assert both_accept(asking(promised, Job("n", 20, 20)))
    assert not both_accept(asking(promised, Job("n", 21, 20)))


def test_what_is_promised_already_may_be_too_much() -> None:
    case = asking(replace(BARE, promised=(Job("p", 121, 20),)), Job("n", 1, 60))
    assert reference.best(case) == reference.Best(0, (), False)
    assert not step_oracle.feasible(case, ())


def test_more_decodes_than_a_batch_holds_are_never_accepted() -> None:
    # 40 tokens fit in 10 ticks; 39 run.
    crowd = replace(BARE, runners=tuple(Runner(f"d{i}", "fast", 10) for i in range(39)))
    assert both_accept(asking(crowd, Job("n", 1, 40, "fast")))
    assert not both_accept(asking(crowd, Job("n", 1, 40, "fast"), Job("m", 1, 50, "fast")))


def test_no_more_are_accepted_than_there_are_sequences_free() -> None:
    case = asking(BARE, Job("n", 1, 20), Job("m", 1, 20))
    assert both_accept(replace(case, free_seqs=2))
    assert not both_accept(replace(case, free_seqs=1))


def test_memory_that_comes_free_later_delays_the_start() -> None:
    # 10 KV tokens are free at once, 50 from tick 20 on: n may compute from there only, in a batch of 15 ticks.
    memory = replace(BARE, free_kv=((0, 10), (20, 50)))
    late = asking(memory, Job("n", 80, 35, None, 1, (50, 50)))
    assert step_oracle.feasible(late, ["n"])
    assert not step_oracle.feasible(asking(memory, Job("n", 81, 35, None, 1, (50, 50))), ["n"])
    assert not both_accept(asking(memory, Job("n", 80, 35, None, 1, (51, 51))))


def test_memory_is_shared_between_those_accepted() -> None:
    case = asking(BARE, Job("n", 5, 40, None, 1, (30,)), Job("m", 5, 40, None, 1, (30,)))
    assert both_accept(replace(case, free_kv=((0, 60),)))
    assert not both_accept(replace(case, free_kv=((0, 59),)))


def test_the_most_value_is_chosen_not_the_most_requests() -> None:
    case = asking(
        BARE, Job("large", 120, 20, None, 5), Job("small", 60, 20, None, 2), Job("other", 60, 20, None, 2)
    )
    assert reference.best(case) == reference.Best(5, ("large",), True)
    assert step_oracle.best(case) == 5
    cheaper = replace(case, newcomers=(replace(case.newcomers[0], value=3), *case.newcomers[1:]))
    assert reference.best(cheaper) == reference.Best(4, ("other", "small"), True)
    assert step_oracle.best(cheaper) == 4


def test_a_batch_may_begin_when_memory_comes_free() -> None:
    # A batch that ends at 20, then one of 15 ticks: whole batches of 25 would start at 0 and at 25.
    case = asking(replace(BARE, free_kv=((0, 10), (20, 50))), Job("n", 80, 35, None, 1, (50, 50)))
    assert reference.best(case) == reference.Best(1, ("n",), True)
    assert step_oracle.best(case) == 1


def test_a_batch_holds_one_token_of_a_decode_and_takes_its_base() -> None:
    # Every batch of 6 ticks holds 8 tokens, but one of them for each decode: none catches up once it is late.
    case = replace(BARE, tpots=(("fast", 6),), runners=(Runner("d", "fast", 6),))
    assert step_oracle.feasible(case, ())
    assert not step_oracle.feasible(replace(case, runners=(Runner("d", "fast", 5),)), ())
    assert not step_oracle.feasible(replace(case, tpots=(("fast", 5),)), ())


def test_bunched_tokens_after_the_last_deadline_count() -> None:
    # 2 tokens a batch of 10 ticks; the decodes need 1.92. With one token more the bunch before 70 is late.
    case = Case(
        base=8,
        rate=1,
        max_batch_tokens=32,
        tpots=(("a", 10), ("b", 17), ("c", 30)),
        runners=(Runner("d0", "a", 10), Runner("d1", "b", 17), Runner("d2", "c", 30)),
        newcomers=(Job("n", 1, 47),),
    )
    assert step_oracle.feasible(case, ())
    assert not step_oracle.feasible(case, ["n"])


def test_an_oracle_that_gives_up_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_oracle, "EFFORT", 0)
    with pytest.raises(step_oracle.Undecided):
        step_oracle.feasible(asking(BARE, Job("n", 60, 20)), ["n"])


def test_a_subset_of_what_the_oracle_accepts_is_accepted() -> None:
    for seed in range(40):
        case = seeded_case(seed)
        admitted = reference.best(case).admitted
        for left_out in admitted:
            assert step_oracle.feasible(case, set(admitted) - {left_out})


def test_moore_and_hodgson_drop_the_longest_when_one_is_late() -> None:
    # Batches of 40 tokens, one of them the running decode's (and one is due before the first ends).
    grid = replace(BARE, tpots=(("fast", 10),), runners=(FAST,))
    jobs = (Job("n", 30, 10, "fast"), Job("m", 30, 20, "fast"), Job("o", 44, 20, "fast"))
    assert moore_hodgson.most_admitted(asking(grid, *jobs[:2])) == 2
    assert moore_hodgson.most_admitted(asking(grid, *jobs)) == 2
    assert moore_hodgson.most_admitted(asking(replace(grid, promised=(Job("p", 40, 10, "fast"),)))) == -1


def test_moore_and_hodgson_agree_with_every_plan() -> None:
    declined = 0
    for seed in range(300):
        case = seeded_grid_case(seed)
        most = moore_hodgson.most_admitted(case)
        found = reference.best(case)
        assert (found.value if found.kept else -1) == most
        declined += len(case.newcomers) - most
    assert declined > 100


def test_random_problems_are_overloaded_and_of_every_kind() -> None:
    drawn = [seeded_case(seed) for seed in range(90)]
    assert {len(case.tpots) for case in drawn} == {1, 2, 3}
    assert {len(case.free_kv) for case in drawn} == {1, 2, 3}
    assert max(len(case.newcomers) for case in drawn) == 8
    assert max(len(case.runners) for case in drawn) == 6
    assert any(each.due > dict(case.tpots)[each.tier] for case in drawn for each in case.runners)
    found = [reference.best(case) for case in drawn]
    assert sum(each.kept for each in found) > 0.8 * len(drawn)
    asked, admitted = sum(len(case.newcomers) for case in drawn), sum(len(each.admitted) for each in found)
    assert 0.25 * asked < asked - admitted < 0.75 * asked


def test_seconds_are_the_ticks_exactly() -> None:
    case = seeded_case(3)
    instance = case.instance()
    assert [tier.tpot_s / TICK_S for tier in instance.tiers] == [tpot for _, tpot in case.tpots]
    assert [each.deadline_s / TICK_S for each in instance.newcomers] == [job.deadline for job in case.newcomers]
    assert instance.cost.predict(case.max_batch_tokens) / TICK_S == case.longest
