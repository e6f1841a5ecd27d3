"""Algorithm 2: what must hold for every batch, and the choices that it makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.base import BatchPlan, Seq
from engine.batch import MIN_CHUNK_TOKENS, Duty, compose_decode, compose_prefill
from engine.cost import StepCost

COST = StepCost(base_s=25e-3, per_token_s=7e-5)
MAX_BATCH_TOKENS = 512
Compose = Callable[[Sequence[Seq], Mapping[str, Duty], float, StepCost, int], BatchPlan]
BOTH: list[Compose] = [compose_decode, compose_prefill]


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


@pytest.mark.parametrize("compose", BOTH)
@given(situation=situations(), max_batch_tokens=st.integers(1, 600))
def test_every_batch_is_sound(
    compose: Compose, situation: tuple[list[Seq], dict[str, Duty]], max_batch_tokens: int
) -> None:
    seqs, duties = situation
    plan = compose(seqs, duties, 0.0, COST, max_batch_tokens)
    ids = [seq.work_id for seq in seqs]
    assert sorted(plan.order) == sorted(ids), "every id once"
    assert plan.skip <= set(ids)
    assert sum(tokens_of(plan, seq) for seq in seqs) <= max_batch_tokens
    assert all(tokens_of(plan, seq) >= 1 for seq in seqs if seq.work_id not in plan.skip)
    assert all(plan.depth.get(seq.work_id, 0) <= seq.drafts for seq in seqs)
    assert not seqs or len(plan.skip) < len(seqs), "something runs if anything can"


@given(situation=situations(), max_batch_tokens=st.integers(1, 600))
def test_no_promised_token_is_left_out_while_a_prefill_is_in(
    situation: tuple[list[Seq], dict[str, Duty]], max_batch_tokens: int
) -> None:
    seqs, duties = situation
    plan = compose_decode(seqs, duties, 0.0, COST, max_batch_tokens)
    left_out = [s for s in seqs if s.prefill_left == 0 and is_promised(s, duties) and s.work_id in plan.skip]
    prefills = [s for s in seqs if s.prefill_left > 0 and s.work_id not in plan.skip]
    drafts = sum(plan.depth.values())
    assert not left_out or not (prefills or drafts)


@given(situation=situations(), max_batch_tokens=st.integers(1, 600))
def test_best_effort_takes_nothing_that_a_promise_could_use(
    situation: tuple[list[Seq], dict[str, Duty]], max_batch_tokens: int
) -> None:
    seqs, duties = situation
    plan = compose_prefill(seqs, duties, 0.0, COST, max_batch_tokens)
    spare = sum(tokens_of(plan, s) for s in seqs if not is_promised(s, duties))
    wanting = [s.prefill_left + 1 - tokens_of(plan, s) for s in seqs if is_promised(s, duties)]
    crumb = min(MIN_CHUNK_TOKENS, max_batch_tokens)
    assert spare < crumb or not any(wanting)


@given(situation=situations())
def test_with_room_no_decode_waits(situation: tuple[list[Seq], dict[str, Duty]]) -> None:
    seqs, duties = situation
    decodes = [seq for seq in seqs if seq.prefill_left == 0]
    plan = compose_decode(decodes, duties, 0.0, StepCost(1e-3, 1e-6), 600)
    assert not plan.skip


def test_the_tightest_pace_among_the_decodes_caps_the_batch() -> None:
    seqs = [decoding("tight"), decoding("loose"), waiting("prompt", 5000)]
    duties = {
        "tight": promise("tight", due_s=10.0, tpot_s=0.05),
        "loose": promise("loose", due_s=10.0, tpot_s=0.1),
        "prompt": promise("prompt", due_s=3.0, said=False),
    }
    plan = compose_decode(seqs, duties, 0.0, COST, 4096)
    assert plan.chunk_tokens["prompt"] == COST.tokens_in(0.05) - 2
    plan = compose_decode(seqs[1:], duties, 0.0, COST, 4096)
    assert plan.chunk_tokens["prompt"] == COST.tokens_in(0.1) - 1


def test_a_token_that_is_due_soon_shrinks_the_batch_by_half_at_most() -> None:
    seqs = [decoding("a"), waiting("prompt", 5000)]
    for gap_s, allowed_s in ((0.2, 0.1), (0.08, 0.08), (0.01, 0.05), (-3.0, 0.05)):
        duties = {"a": promise("a", due_s=gap_s), "prompt": promise("prompt", 3.0, said=False)}
        plan = compose_decode(seqs, duties, 0.0, COST, 4096)
        assert plan.chunk_tokens["prompt"] == COST.tokens_in(allowed_s) - 1


def test_a_pace_that_nothing_could_keep_does_not_stop_prefills() -> None:
    seqs = [decoding("lost"), waiting("prompt", 5000)]
    duties = {"lost": promise("lost", 1.0, tpot_s=0.01), "prompt": promise("prompt", 3.0, said=False)}
    assert compose_decode(seqs, duties, 0.0, COST, 512).chunk_tokens["prompt"] == 511


@pytest.mark.parametrize("compose", BOTH)
def test_prefills_are_poured_earliest_deadline_first(compose: Compose) -> None:
    seqs = [waiting("late", 300), waiting("free", 300), waiting("soon", 300)]
    duties = {"late": promise("late", 5.0, said=False), "soon": promise("soon", 1.0, said=False)}
    plan = compose(seqs, duties, 0.0, COST, MAX_BATCH_TOKENS)
    assert plan.chunk_tokens == {"soon": 300, "late": 212}
    assert plan.order == ("soon", "late", "free")
    assert plan.skip == {"free"}


@pytest.mark.parametrize("compose", BOTH)
def test_best_effort_gets_what_is_left_in_the_order_in_which_it_came(compose: Compose) -> None:
    seqs = [waiting("second", 300), decoding("said"), waiting("third", 300), waiting("first", 100)]
    duties = {"first": promise("first", 1.0, said=False), "third": Duty("third", 0.0, 0.0, best_effort=True)}
    plan = compose(seqs, duties, 0.0, COST, MAX_BATCH_TOKENS)
    assert plan.chunk_tokens == {"first": 100, "said": 1, "second": 300, "third": 111}


def test_no_crumbs_of_a_prompt_but_for_its_end() -> None:
    first = promise("first", 1.0, said=False)
    plan = compose_prefill([waiting("first", 505), waiting("second", 300)], {"first": first}, 0.0, COST, 512)
    assert plan.skip == {"second"}
    plan = compose_prefill([waiting("first", 505), waiting("second", 7)], {"first": first}, 0.0, COST, 512)
    assert plan.chunk_tokens == {"first": 505, "second": 7}


def test_drafts_are_verified_with_what_prefills_leave() -> None:
    seqs = [decoding("a", drafts=4), decoding("b", drafts=4), waiting("prompt", 500)]
    duties = {key: promise(key, 10.0, tpot_s=1.0) for key in ("a", "b")}
    duties["prompt"] = promise("prompt", 20.0, said=False)
    assert compose_decode(seqs[:2], duties, 0.0, COST, MAX_BATCH_TOKENS).depth == {"a": 4, "b": 4}
    plan = compose_decode(seqs, duties, 0.0, COST, 508)
    assert plan.chunk_tokens == {"a": 5, "b": 3, "prompt": 500}
    assert plan.depth == {"a": 4, "b": 2}


@pytest.mark.parametrize("compose", BOTH)
def test_best_effort_makes_way_for_a_promise_that_was_blocked(compose: Compose) -> None:
    blocked = Seq("promised", 400, 0, 0, running=False, blocked=True)
    seqs = [decoding("early"), decoding("late"), blocked, waiting("behind", 300)]
    duties = {"promised": promise("promised", 1.0, said=False), "early": promise("early", 9.0)}
    plan = compose(seqs, duties, 0.0, COST, MAX_BATCH_TOKENS)
    assert plan.preempt == ("late",)
    assert plan.chunk_tokens["promised"] == 400
    assert plan.chunk_tokens["behind"] == 300, "what the blocked one may not use again is not lost"
    duties["late"] = promise("late", 9.0)
    assert compose(seqs, duties, 0.0, COST, MAX_BATCH_TOKENS).preempt == ()
    seqs[2] = waiting("promised", 400)
    del duties["late"]
    assert compose(seqs, duties, 0.0, COST, MAX_BATCH_TOKENS).preempt == ()


def test_a_pulled_prompt_goes_with_the_decodes() -> None:
    pulled = Seq("pulled", 400, 399, 0, running=False)
    duties = {"pulled": promise("pulled", 0.01, said=False), "prompt": promise("prompt", 0.0, said=False)}
    plan = compose_decode([waiting("prompt", 5000), pulled], duties, 0.0, COST, MAX_BATCH_TOKENS)
    assert plan.order[0] == "pulled"
    assert plan.chunk_tokens["pulled"] == 1
