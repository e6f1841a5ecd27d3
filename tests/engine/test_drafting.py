"""Speculation on a node: who accepts little gets none, a class teaches its next, each pace has its depth."""

from __future__ import annotations

from dataclasses import replace

from engine.cost import StepCost
from engine.drafting import Drafted, Drafting
from engine.speculation import MAX_DEPTH

COST = StepCost.line(0.025, 1e-5)
MAX_BATCH_TOKENS = 2048


def decode(drafting: Drafting, class_name: str = "chat", tpot_s: float = 0.05) -> Drafted:
    return Drafted(class_name, tpot_s, 500, 0.05, drafting.estimate(class_name))


def learn(drafting: Drafting, one: Drafted, accepted: int, times: int = 60) -> None:
    """Verifies of four drafts, of which so many were right each time."""
    for _ in range(times):
        one.estimate = drafting.verified(one.class_name, one.estimate, 4, accepted + 1)


def planned(drafting: Drafting, decodes: list[Drafted], *, kv_bound: bool = True) -> list[int]:
    drafting.plan(decodes, COST, MAX_BATCH_TOKENS, kv_bound=kv_bound)
    return [one.depth for one in decodes]


def test_an_engine_that_does_not_draft_is_not_asked_to() -> None:
    assert not Drafting(0).on
    assert Drafting(4).on


def test_an_engine_that_drafts_more_than_is_ever_worth_it_is_asked_for_less() -> None:
    drafting = Drafting(20)
    one = decode(drafting)
    learn(drafting, one, accepted=4)
    assert planned(drafting, [one])[0] <= MAX_DEPTH


def test_a_request_that_accepts_little_gets_no_drafts_beside_one_that_accepts_much() -> None:
    drafting = Drafting(4)
    good, bad = decode(drafting), decode(drafting)
    learn(drafting, good, accepted=4)
    learn(drafting, bad, accepted=0)
    dear = StepCost.line(0.005, 1e-3)  # a token more costs a fifth of a step
    drafting.plan([good, bad], dear, MAX_BATCH_TOKENS, kv_bound=True)
    assert bad.depth == 1
    assert good.depth > 1


def test_a_new_request_begins_with_what_its_class_has_shown() -> None:
    drafting = Drafting(4)
    learn(drafting, decode(drafting, "code"), accepted=4)
    learn(drafting, decode(drafting, "prose"), accepted=0)
    assert drafting.estimate("code").acceptance > 0.9
    assert drafting.estimate("prose").acceptance < 0.3


def test_drafts_beyond_the_engine_are_never_planned_and_nobody_is_no_trouble() -> None:
    drafting = Drafting(2)
    sure = [decode(drafting) for _ in range(3)]
    for one in sure:
        learn(drafting, one, accepted=4)
    assert max(planned(drafting, sure)) <= 3
    assert planned(drafting, []) == []


def test_each_pace_is_planned_for_itself() -> None:
    drafting = Drafting(4)
    tight, loose = decode(drafting, "tool", 0.03), decode(drafting, "chat", 0.2)
    for one in (tight, loose):
        learn(drafting, one, accepted=3)
    behind = replace(tight, slack_s=-1.0)
    depths = planned(drafting, [behind, loose], kv_bound=False)
    assert depths[1] == 1, "the loose pace does not bind: plain steps are enough"
    assert depths[0] > 1


def test_any_number_of_paces_is_planned_for_and_drafts_go_on() -> None:
    drafting = Drafting(4)
    decodes = [decode(drafting, tpot_s=0.05 + 0.0005 * at) for at in range(100)]
    for one in decodes:
        learn(drafting, one, accepted=4, times=8)
    assert max(planned(drafting, decodes, kv_bound=True)) > 1
    assert planned(drafting, decodes, kv_bound=False)
