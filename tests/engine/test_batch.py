"""Algorithm 2: what must hold for every batch, and the choices that it makes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.base import BatchPlan, Seq
from engine.batch import Duty, Memory, Moment, compose
from engine.batch_kernel import CATCH_UP, LATELY_FLOORS, LATELY_S, MIN_CHUNK_TOKENS, SPARE_FLOORS
from engine.cost import StepCost

COST = StepCost.line(base_s=25e-3, per_token_s=7e-5)
MAX_BATCH_TOKENS = 512
NOW = Moment(0.0, COST, MAX_BATCH_TOKENS)
LARGE = Moment(0.0, COST, 4096)
FAST = Moment(0.0, StepCost.line(base_s=25e-3, per_token_s=1e-6), MAX_BATCH_TOKENS)


def decoding(work_id: str, drafts: int = 0) -> Seq:
    return Seq(work_id, 100, 104, 5, running=True, drafts=drafts)


def waiting(work_id: str, prompt_tokens: int) -> Seq:
    return Seq(work_id, prompt_tokens, 0, 0, running=False)


def promise(work_id: str, due_s: float, tpot_s: float = 0.1, *, said: bool = True) -> Duty:
    return Duty(work_id, due_s, tpot_s, due_s if said else None)


@st.composite
def situations(draw: st.DrawFn) -> tuple[list[Seq], dict[str, Duty]]:
    seqs, duties = [], {}
    for i in range(draw(st.integers(0, 12))):
        prompt_tokens = draw(st.integers(1, 2000))
        output_tokens = draw(st.integers(0, 50))
        known = prompt_tokens + output_tokens
        computed = draw(st.one_of(st.just(known - 1), st.integers(0, known - 1)))
        running = draw(st.booleans())
        drafts = draw(st.integers(0, 5)) if running and output_tokens and computed == known - 1 else 0
        seqs.append(Seq(f"w{i}", prompt_tokens, computed if running else 0, output_tokens, running, drafts))
        if draw(st.booleans()):
            due_s = draw(st.floats(-1.0, 2.0))
            tpot_s = draw(st.sampled_from([0.02, 0.05, 0.1, 1.0]))
            next_s = due_s if output_tokens else None
            duties[f"w{i}"] = Duty(f"w{i}", due_s, tpot_s, next_s, best_effort=draw(st.booleans()))
    return seqs, duties


def tokens_of(plan: BatchPlan, seq: Seq) -> int:
    """What the plan gives a sequence."""
    if seq.work_id in plan.skip:
        return 0
    return min(plan.chunk_tokens[seq.work_id], seq.prefill_left + 1 + plan.depth.get(seq.work_id, 0))


def is_promised(seq: Seq, duties: Mapping[str, Duty]) -> bool:
    return seq.work_id in duties and not duties[seq.work_id].best_effort


@given(situation=situations(), max_batch_tokens=st.integers(1, 600))
def test_every_batch_is_sound(situation: tuple[list[Seq], dict[str, Duty]], max_batch_tokens: int) -> None:
    seqs, duties = situation
    plan = compose(seqs, duties, Moment(0.0, COST, max_batch_tokens))
    ids = [seq.work_id for seq in seqs]
    assert sorted(plan.order) == sorted(ids), "every id once"
    assert plan.skip <= set(ids)
    assert sum(tokens_of(plan, seq) for seq in seqs) <= max_batch_tokens
    assert all(tokens_of(plan, seq) >= 1 for seq in seqs if seq.work_id not in plan.skip)
    assert all(plan.depth.get(seq.work_id, 0) <= seq.drafts for seq in seqs)
    assert not seqs or len(plan.skip) < len(seqs), "something runs if anything can"


@given(situation=situations(), max_batch_tokens=st.integers(1, 600))
def test_no_token_that_is_due_before_the_next_batch_ends_waits_behind_a_prefill(
    situation: tuple[list[Seq], dict[str, Duty]], max_batch_tokens: int
) -> None:
    seqs, duties = situation
    plan = compose(seqs, duties, Moment(0.0, COST, max_batch_tokens))
    inside = [seq for seq in seqs if seq.work_id not in plan.skip]
    batch_s = COST.predict(sum(tokens_of(plan, seq) for seq in inside))
    decodes = [seq for seq in seqs if seq.prefill_left == 0 and is_promised(seq, duties)]
    alone_s = COST.predict(len(decodes))
    pace_s = min((duties[s.work_id].tpot_s for s in decodes if duties[s.work_id].tpot_s > alone_s), default=0.0)
    due = [seq for seq in decodes if duties[seq.work_id].due_s < batch_s + pace_s]
    prefills = [seq for seq in inside if seq.prefill_left > 0]
    drafts = sum(plan.depth.values())
    assert not [s for s in due if s.work_id in plan.skip] or not (prefills or drafts)


@given(situation=situations(), max_batch_tokens=st.integers(1, 600))
def test_best_effort_takes_nothing_that_a_promise_could_use(
    situation: tuple[list[Seq], dict[str, Duty]], max_batch_tokens: int
) -> None:
    seqs, duties = situation
    duties = {key: Duty(key, d.first_token_due_s + 9.0, 99.0, None, d.best_effort) for key, d in duties.items()}
    plan = compose(seqs, duties, Moment(0.0, COST, max_batch_tokens))  # no pace binds: only room is short
    spare = sum(tokens_of(plan, s) for s in seqs if not is_promised(s, duties))
    wanting = [s.prefill_left + 1 - tokens_of(plan, s) for s in seqs if is_promised(s, duties)]
    crumb = min(MIN_CHUNK_TOKENS, max_batch_tokens)
    assert spare < crumb or not any(tokens > 0 for tokens in wanting)


@given(situation=situations())
def test_with_room_no_decode_waits(situation: tuple[list[Seq], dict[str, Duty]]) -> None:
    seqs, duties = situation
    decodes = [seq for seq in seqs if seq.prefill_left == 0]
    plan = compose(decodes, duties, Moment(0.0, StepCost.line(1e-3, 1e-6), 600))
    assert not plan.skip


@given(situation=situations(), context_s=st.sampled_from([0.0, 1e-6]), work_s=st.sampled_from([0.0, 1e-8]))
def test_a_batch_ends_by_the_first_due_token_whatever_attention_costs(
    situation: tuple[list[Seq], dict[str, Duty]], context_s: float, work_s: float
) -> None:
    seqs, duties = situation
    cost = StepCost(COST.pieces, context_s, work_s)
    plan = compose(seqs, duties, Moment(0.0, cost, 4096))
    decodes = [s for s in seqs if s.prefill_left == 0 and is_promised(s, duties)]
    alone_s = cost.predict(
        len(decodes), seqs=len(decodes), context_tokens=sum(s.computed_tokens for s in decodes)
    )
    kept = [duties[s.work_id] for s in decodes if duties[s.work_id].tpot_s > alone_s]
    if not kept:
        return
    first = min(decodes, key=lambda seq: duties[seq.work_id].due_s)
    least_s = cost.predict(1, seqs=1, context_tokens=first.computed_tokens)
    allowed_s = min(
        duty.due_s if duty.due_s >= least_s - 1e-9 else alone_s + CATCH_UP * (duty.tpot_s - alone_s)
        for duty in kept
    )
    inside = [seq for seq in seqs if seq.work_id not in plan.skip]
    batch_s = cost.predict(
        sum(tokens_of(plan, s) for s in inside),
        seqs=len(inside),
        context_tokens=sum(s.computed_tokens for s in inside if s.prefill_left == 0),
        prefill_work=sum(
            tokens_of(plan, s) * (s.computed_tokens + tokens_of(plan, s) / 2) for s in inside if s.prefill_left
        ),
    )
    assert batch_s <= max(allowed_s, alone_s) + 1e-9


def test_the_first_due_token_caps_the_batch_and_slack_may_be_spent() -> None:
    seqs = [decoding("tight"), decoding("loose"), waiting("prompt", 5000)]
    for tight_due_s in (0.05, 0.08, 0.2):
        duties = {
            "tight": promise("tight", due_s=tight_due_s, tpot_s=0.05),
            "loose": promise("loose", due_s=10.0, tpot_s=0.1),
            "prompt": promise("prompt", due_s=3.0, said=False),
        }
        plan = compose(seqs, duties, Moment(0.0, COST, 4096))
        assert plan.chunk_tokens["prompt"] == COST.tokens_in(tight_due_s) - 1
        assert plan.skip == {"loose"}


def test_a_loose_token_waits_only_while_a_prefill_needs_its_slot() -> None:
    duties = {"loose": promise("loose", due_s=10.0, tpot_s=0.1), "tight": promise("tight", 0.05, 0.05)}
    decodes = [decoding("loose"), decoding("tight")]
    assert compose(decodes, duties, NOW).skip == frozenset()
    duties["prompt"] = promise("prompt", 5.0, said=False)
    assert compose([*decodes, waiting("prompt", 5000)], duties, NOW).skip == {"loose"}
    assert compose([*decodes, waiting("prompt", 30)], duties, NOW).skip == frozenset(), "there is room for all"


def test_nothing_is_held_back_while_memory_binds() -> None:
    duties = {"loose": promise("loose", due_s=10.0, tpot_s=0.1), "tight": promise("tight", 0.05, 0.05)}
    duties |= {key: promise(key, 5.0, said=False) for key in ("prompt", "blocked")}
    seqs = [decoding("loose"), decoding("tight"), waiting("prompt", 5000)]
    blocked = Seq("blocked", 400, 0, 0, running=False, blocked=True)
    assert "loose" not in compose([*seqs, blocked], duties, NOW).skip


def test_tokens_that_would_crowd_the_next_batch_are_made_ahead() -> None:
    """All are due at once, and more than a batch holds: some go now, though the next batch is soon enough."""
    cost = StepCost.line(25e-3, 1e-3)  # a batch of 50 ms holds 25
    duties = {f"d{i}": promise(f"d{i}", 0.1, 0.1) for i in range(40)}
    duties |= {"tight": promise("tight", 0.05, 0.05), "prompt": promise("prompt", 9.0, said=False)}
    seqs = [*(decoding(f"d{i}") for i in range(40)), decoding("tight"), waiting("prompt", 5000)]
    plan = compose(seqs, duties, Moment(0.0, cost, 512))
    ahead = sum(1 for key in plan.chunk_tokens if key.startswith("d"))
    assert ahead >= 15


def test_a_batch_ends_by_the_deadline_of_a_prompt_that_ends_in_it() -> None:
    seqs = [waiting("soon", 500), waiting("later", 5000)]
    duties = {"soon": promise("soon", 0.1, said=False), "later": promise("later", 5.0, said=False)}
    plan = compose(seqs, duties, LARGE)
    assert plan.chunk_tokens == {"soon": 500, "later": COST.tokens_in(0.1) - 500}


def test_a_prompt_that_ends_in_a_batch_has_a_margin_where_it_fits_with_one() -> None:
    seqs = [waiting("first", 800), waiting("second", 3000)]  # 81 ms alone
    for due_s, most_s in [(0.2, 0.2 / 1.25), (0.09, 0.09)]:
        duties = {"first": promise("first", due_s, said=False), "second": promise("second", 2.0, said=False)}
        plan = compose(seqs, duties, replace(LARGE, margin=0.25))
        assert plan.chunk_tokens["first"] == 800
        took_s = COST.predict(sum(plan.chunk_tokens.values()))
        assert most_s - 2e-3 < took_s <= most_s


def test_prompts_leave_the_margin_free_beside_decodes_that_run_ahead_by_as_much() -> None:
    """Pace after pace: no batch would be late if it took the margin longer, and none is shorter for that."""
    pace_s, margin, now_s, due_s = 0.1, 0.25, 0.0, 0.1
    for turn in range(20):
        seqs = [decoding("d"), waiting("p", 100_000)]
        duties = {"d": promise("d", due_s, tpot_s=pace_s), "p": promise("p", 60.0, said=False)}
        plan = compose(seqs, duties, Moment(now_s, COST, 100_000, margin=margin))
        assert "d" in plan.chunk_tokens
        assert now_s + plan.expected_s * (1 + margin) <= due_s + 1e-9
        now_s, due_s = now_s + plan.expected_s, due_s + pace_s
        assert turn < 15 or plan.expected_s == pytest.approx(pace_s, rel=0.02)


def test_decodes_alone_have_all_the_time_that_their_pace_leaves() -> None:
    seqs = [decoding(f"d{at}") for at in range(8)]
    cost = StepCost.line(0.08, 0.001)  # 88 ms, and 110 with the margin
    duties = {seq.work_id: promise(seq.work_id, 0.1, tpot_s=0.1) for seq in seqs}
    plan = compose(
        [*seqs, waiting("p", 100)],
        duties | {"p": promise("p", 60.0, said=False)},
        Moment(0.0, cost, 512, margin=0.25),
    )
    assert {seq.work_id for seq in seqs} <= set(plan.chunk_tokens)


def test_a_prompt_whose_deadline_is_lost_lets_the_others_go_first() -> None:
    seqs = [waiting("lost", 500), waiting("kept", 500)]
    duties = {"lost": promise("lost", 0.01, said=False), "kept": promise("kept", 0.1, said=False)}
    plan = compose(seqs, duties, NOW)
    assert plan.order[0] == "kept"
    assert plan.chunk_tokens["kept"] == 500


def test_a_prompt_that_will_be_late_by_less_than_is_forgiven_keeps_its_turn() -> None:
    alone_s = COST.predict(500)
    seqs = [waiting("close", 500), waiting("other", 500)]
    other = promise("other", 0.5, said=False)
    for grace_s, first in [(0.005, "close"), (0.001, "other")]:
        close = replace(promise("close", alone_s - 0.002, said=False), grace_s=grace_s)
        assert compose(seqs, {"close": close, "other": other}, NOW).order[0] == first


def test_a_token_that_is_late_leaves_prompts_most_of_the_room_beside_it() -> None:
    seqs = [decoding("a"), waiting("prompt", 5000)]
    alone_s = COST.predict(1)
    late_s = alone_s + CATCH_UP * (0.1 - alone_s)
    for gap_s, allowed_s in ((0.2, 0.2), (0.08, 0.08), (0.01, late_s), (-3.0, late_s)):
        duties = {"a": promise("a", due_s=gap_s), "prompt": promise("prompt", 3.0, said=False)}
        plan = compose(seqs, duties, LARGE)
        assert plan.chunk_tokens["prompt"] == COST.tokens_in(allowed_s) - 1


def test_catching_up_leaves_no_decode_out() -> None:
    """Each left out to save microseconds would fall behind in its turn."""
    late = {"late": promise("late", -0.1, 0.05)}
    duties = late | {str(i): promise(str(i), 0.06, 0.05) for i in range(20)}
    plan = compose(
        [*map(decoding, duties), waiting("prompt", 2000)], duties | {"prompt": promise("prompt", 9.0)}, NOW
    )
    assert set(duties) <= set(plan.order) - plan.skip


def test_prompts_leave_time_for_a_promise_whose_kv_is_on_its_way() -> None:
    """It joins the batch after this one, which is not to begin too late for it."""
    duties = {"prompt": promise("prompt", 9.0)}
    for left_s, least_s, most_s in [(0.1, 0.07, 0.075), (0.01, 0.045, 0.0502), (9.0, 0.3, 1.0)]:
        plan = compose([waiting("prompt", 6000)], duties, replace(LARGE, coming_due_s=left_s))
        assert least_s < COST.predict(plan.chunk_tokens["prompt"]) <= most_s


def test_a_pace_that_nothing_could_keep_does_not_stop_prefills() -> None:
    seqs = [decoding("lost"), waiting("prompt", 5000)]
    duties = {"lost": promise("lost", 1.0, tpot_s=0.01), "prompt": promise("prompt", 3.0, said=False)}
    assert compose(seqs, duties, NOW).chunk_tokens["prompt"] == 511


def test_prefills_are_poured_earliest_deadline_first() -> None:
    seqs = [waiting("late", 300), waiting("free", 300), waiting("soon", 300)]
    duties = {"late": promise("late", 5.0, said=False), "soon": promise("soon", 1.0, said=False)}
    plan = compose(seqs, duties, NOW)
    assert plan.chunk_tokens == {"soon": 300, "late": 212}
    assert plan.order == ("soon", "late", "free")
    assert plan.skip == {"free"}


def test_best_effort_gets_what_is_left_in_the_order_in_which_it_came() -> None:
    seqs = [waiting("second", 300), decoding("said"), waiting("third", 300), waiting("first", 100)]
    duties = {"first": promise("first", 1.0, said=False), "third": Duty("third", 0.0, 0.0, best_effort=True)}
    plan = compose(seqs, duties, FAST)
    assert plan.chunk_tokens == {"first": 100, "said": 1, "second": 300, "third": 111}


def test_prompts_of_best_effort_make_no_batch_long_while_promises_are_kept() -> None:
    seqs = [decoding("promised"), waiting("spare", 5000)]
    plan = compose(seqs, {"promised": promise("promised", 9.0, tpot_s=9.0)}, LARGE)
    batch_s = COST.predict(sum(plan.chunk_tokens.values()))
    assert batch_s <= SPARE_FLOORS * COST.predict(1) < batch_s + COST.predict(2) - COST.predict(1)
    assert compose(seqs[1:], {}, LARGE).chunk_tokens == {"spare": 4096}, "nobody else is here"


def test_nor_a_long_one_where_promises_have_been_made_lately() -> None:
    """The next one would wait for its end."""

    def batch_s(moment: Moment) -> float:
        return COST.predict(sum(compose([waiting("spare", 5000)], {}, moment).chunk_tokens.values()))

    now_s = 100.0
    long_s = COST.predict(LARGE.max_batch_tokens)
    for promised_s in (-math.inf, now_s - LATELY_S):
        assert batch_s(replace(LARGE, now_s=now_s, promised_s=promised_s)) == long_s
    lately = batch_s(replace(LARGE, now_s=now_s, promised_s=now_s - LATELY_S / 2))
    assert 0.9 * LATELY_FLOORS * COST.predict(1) < lately <= LATELY_FLOORS * COST.predict(1) < long_s


def test_best_effort_is_begun_only_while_memory_stays_free() -> None:
    seqs = [decoding("promised"), waiting("spare", 300), waiting("next", 300)]
    duties = {"promised": promise("promised", 9.0, tpot_s=9.0)}
    memory = Memory(kv_tokens=4000, free_tokens=1600, free_slots=9)
    assert compose(seqs, duties, replace(FAST, memory=memory)).skip == {"next"}
    assert compose(seqs, duties, replace(FAST, memory=replace(memory, free_slots=0))).skip == {"spare", "next"}


def test_best_effort_makes_way_for_a_promise_before_it_is_blocked() -> None:
    spare = [Seq(f"spare{i}", 300, 200, 0, running=True) for i in range(4)]
    seqs = [decoding("promised"), *spare, waiting("new", 500)]
    duties = {"promised": promise("promised", 9.0), "new": promise("new", 1.0, said=False)}
    plan = compose(seqs, duties, replace(NOW, memory=Memory(2000, 150, 9)))
    assert plan.preempt == ("spare2", "spare3"), "as many as it takes, the last first"
    assert plan.chunk_tokens["new"] > 300
    assert compose(seqs, duties, replace(NOW, memory=Memory(2000, 600, 9))).preempt == ()
    assert compose(seqs, duties, replace(NOW, memory=Memory(2000, 600, 0))).preempt == ("spare3",)


def test_no_crumbs_of_a_prompt_but_for_its_end() -> None:
    first = promise("first", 1.0, said=False)
    plan = compose([waiting("first", 505), waiting("second", 300)], {"first": first}, FAST)
    assert plan.skip == {"second"}
    plan = compose([waiting("first", 505), waiting("second", 7)], {"first": first}, FAST)
    assert plan.chunk_tokens == {"first": 505, "second": 7}


def test_drafts_are_verified_with_what_prefills_leave() -> None:
    seqs = [decoding("a", drafts=4), decoding("b", drafts=4), waiting("prompt", 500)]
    duties = {key: promise(key, 1.0, tpot_s=1.0) for key in ("a", "b")}
    duties["prompt"] = promise("prompt", 20.0, said=False)
    assert compose(seqs[:2], duties, NOW).depth == {"a": 4, "b": 4}
    plan = compose(seqs, duties, Moment(0.0, COST, 508))
    assert plan.chunk_tokens == {"a": 5, "b": 3, "prompt": 500}
    assert plan.depth == {"a": 4, "b": 2}
    assert plan.draft_tokens is None


def test_a_planned_depth_is_kept_before_prefills_are_poured() -> None:
    seqs = [decoding("deep", drafts=4), decoding("plain", drafts=4), waiting("prompt", 5000)]
    duties = {
        "deep": Duty("deep", 0.0, 1.0, 1.0, depth=3),
        "plain": Duty("plain", 0.0, 1.0, 1.0, depth=1),
        "prompt": promise("prompt", 20.0, said=False),
    }
    plan = compose(seqs, duties, NOW)
    assert plan.depth == {"deep": 2, "plain": 0}
    assert plan.chunk_tokens == {"deep": 3, "plain": 1, "prompt": 508}
    assert plan.draft_tokens == 2


def test_best_effort_makes_way_for_a_promise_that_was_blocked() -> None:
    blocked = Seq("promised", 400, 0, 0, running=False, blocked=True)
    seqs = [decoding("early"), decoding("late"), blocked, waiting("behind", 300)]
    duties = {"promised": promise("promised", 1.0, said=False), "early": promise("early", 9.0)}
    plan = compose(seqs, duties, NOW)
    assert plan.preempt == ("late",)
    assert plan.chunk_tokens["promised"] == 400
    assert plan.chunk_tokens["behind"] == 300, "what the blocked one may not use again is not lost"
    duties["late"] = promise("late", 9.0)
    assert compose(seqs, duties, NOW).preempt == ()
    seqs[2] = waiting("promised", 400)
    del duties["late"]
    assert compose(seqs, duties, NOW).preempt == ()


def test_a_pulled_prompt_goes_with_the_decodes() -> None:
    pulled = Seq("pulled", 400, 399, 0, running=False)
    duties = {"pulled": promise("pulled", 0.01, said=False), "prompt": promise("prompt", 9.0, said=False)}
    plan = compose([waiting("prompt", 5000), pulled], duties, NOW)
    assert plan.order[0] == "pulled"
    assert plan.chunk_tokens["pulled"] == 1


def test_best_effort_that_went_on_elsewhere_runs_in_the_memory_that_its_pull_took() -> None:
    seqs = [Seq(f"pulled{at}", 1450, 1450, 20, running=False) for at in range(15)]
    full = replace(NOW, memory=Memory(free_tokens=10_000, kv_tokens=32_768, free_slots=64))
    plan = compose(seqs, {}, full)
    assert plan.chunk_tokens.keys() == {seq.work_id for seq in seqs}, "none waits for room that it has"
    fresh = [Seq("fresh", 1500, 0, 0, running=False)]
    assert "fresh" in compose([*seqs, *fresh], {}, full).skip, "there is no spare room for another"


def handed_over(work_id: str, prompt_tokens: int) -> Seq:
    return Seq(work_id, prompt_tokens, 0, 0, running=False, pull_waits=True)


def test_best_effort_makes_way_for_kv_that_a_promise_pulls() -> None:
    seqs = [decoding("spare"), decoding("kept"), handed_over("spare-pull", 50), handed_over("promised", 90)]
    duties = {"promised": promise("promised", 0.2, said=False), "kept": promise("kept", 9.0)}
    plan = compose(seqs, duties, replace(NOW, memory=Memory(1000, 10, 10)))
    assert plan.preempt == ("spare",)
    assert "promised" not in plan.skip
    assert plan.skip >= {"spare", "spare-pull"}, "nor may best effort pull what a promise needs"
    assert "promised" not in plan.chunk_tokens, "a pull takes no tokens of a batch"


def test_pulls_of_promises_that_fit_begin_in_order_of_their_deadlines() -> None:
    seqs = [handed_over("late", 300), handed_over("early", 300), handed_over("spare", 10)]
    duties = {"late": promise("late", 0.9, said=False), "early": promise("early", 0.1, said=False)}
    room_for_one = compose(seqs, duties, replace(NOW, memory=Memory(1000, 400, 10)))
    assert room_for_one.skip == {"late", "spare"}
    unknown = compose(seqs, duties, NOW)
    assert unknown.order == ("early", "late", "spare")
    assert not unknown.skip


def test_best_effort_that_is_handed_over_leaves_most_of_the_memory_free() -> None:
    """Nobody takes back KV that waits to be pulled."""
    seqs = [waiting("spare", 100)]
    busy = replace(NOW, memory=Memory(1000, 600, 10))
    assert "spare" not in compose(seqs, {}, busy).skip
    offers = {"spare": Duty("spare", 0.0, 1.0, best_effort=True, offers=True)}
    assert "spare" in compose(seqs, offers, busy).skip
    assert "spare" not in compose(seqs, offers, replace(NOW, memory=Memory(1000, 1000, 10))).skip


def test_a_prompt_without_memory_takes_no_room_from_who_could_run() -> None:
    seqs = [waiting("promised", 2000), Seq("spare", 100, 99, 0, running=False)]
    duties = {"promised": promise("promised", 9.0, said=False)}
    plan = compose(seqs, duties, replace(NOW, memory=Memory(3000, 100, 10)))
    assert plan.chunk_tokens["spare"] == 1
