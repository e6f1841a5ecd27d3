"""Soft admission: the deferred wait their turn, are promised when possible, are bounded, and none is lost."""

from __future__ import annotations

from dataclasses import replace

from coordinator.decider import Decider
from coordinator.mirror import NodeMirror
from engine.messages import Finished, Place, WorkState
from engine.request import RoleName, WorkKind
from tests.coordinator.test_placement import ASK, FAST, _decoding, _node

ENDPOINT = b"endpoint"
FULL = _decoding(0.1, 4)  # every slot of a node


def _full_node() -> NodeMirror:
    return _node("m", RoleName.MIXED, FULL)


def _report(mirror: NodeMirror, works: list[WorkState], now_s: float) -> None:
    assert mirror.report is not None
    mirror.take_report(replace(mirror.report, works=works), now_s)


def _waiting(request: Place, left: int = 500) -> WorkState:
    return WorkState(
        request.request_id, 1, WorkKind.WHOLE, 500, left - 1, 0, 100, 9.0, 0.1, True, "chatbot", None
    )


def _finished(request: Place, **changes: object) -> Finished:
    done = Finished(
        request_id=request.request_id,
        attempt=1,
        class_name="chatbot",
        outcome="completed",
        verdict="admitted",
        met=True,
        strict=True,
        goodput=True,
        stages={},
        placement="one_node",
        prompt_tokens=request.prompt_tokens,
        output_tokens=20,
        ended_itself=True,
    )
    return replace(done, **changes)  # type: ignore[arg-type]


LATE = replace(ASK, first_token_left_s=5.0)


def test_a_deferred_request_is_promised_as_soon_as_there_is_room() -> None:
    decider, mirror = Decider(8, 8), _full_node()
    mirrors = {"m": mirror}
    assert decider.place(LATE, ENDPOINT, mirrors, {}, 0.0).verdict == "best_effort"
    _report(mirror, [*FULL, _waiting(LATE)], 0.1)
    assert decider.ask_again(mirrors, {}, 0.1) == []
    _report(mirror, [*FULL[1:], _waiting(LATE)], 0.2)
    (promotion,) = decider.ask_again(mirrors, {}, 0.2)
    assert promotion.node == "m"
    assert promotion.deferred.endpoint == ENDPOINT
    assert promotion.promote.pace.first_token_left_s == 4.8
    assert not promotion.promote.pace.best_effort
    assert decider.ask_again(mirrors, {}, 0.2) == [], "once"


def test_two_that_wait_do_not_both_get_the_one_slot_and_the_first_comes_first() -> None:
    decider, mirror = Decider(8, 8), _full_node()
    mirrors = {"m": mirror}
    second = replace(LATE, request_id="second")
    for request in (LATE, second):
        decider.place(request, ENDPOINT, mirrors, {}, 0.0)
    _report(mirror, [*FULL[1:], _waiting(LATE), _waiting(second)], 0.1)
    (promotion,) = decider.ask_again(mirrors, {}, 0.1)
    assert promotion.deferred.request.request_id == LATE.request_id


def test_after_its_deadline_or_its_first_token_nobody_is_asked_about_again() -> None:
    decider, mirror = Decider(8, 8), _full_node()
    mirrors = {"m": mirror}
    decider.place(LATE, ENDPOINT, mirrors, {}, 0.0)
    _report(mirror, [_waiting(LATE)], 5.1)
    assert decider.ask_again(mirrors, {}, 5.1) == []
    assert len(decider.deferred) == 0
    decider.place(LATE, ENDPOINT, {"m": _full_node()}, {}, 0.0)
    spoke = replace(_waiting(LATE, 1), output_tokens=3)
    _report(mirror, [spoke], 0.1)
    assert decider.ask_again(mirrors, {}, 0.1) == []
    assert len(decider.deferred) == 0


def test_prefill_done_as_best_effort_counts_when_it_is_promised() -> None:
    decider, mirror = Decider(8, 8), _full_node()
    mirrors = {"m": mirror}
    soon = replace(ASK, prompt_tokens=2000, first_token_left_s=0.25)  # 2000 tokens alone: 0.203 s
    assert decider.place(soon, ENDPOINT, mirrors, {}, 0.0).verdict == "best_effort"
    nothing_done = replace(_waiting(soon), prompt_tokens=2000, prefill_left_tokens=1999)
    _report(mirror, [nothing_done], 0.1)
    assert decider.ask_again(mirrors, {}, 0.1) == []
    _report(mirror, [replace(nothing_done, prefill_left_tokens=499)], 0.1)
    assert len(decider.ask_again(mirrors, {}, 0.1)) == 1


def test_a_deferred_pair_is_promised_on_both_of_its_nodes() -> None:
    decider = Decider(8, 8)
    prefill, decode = _node("p", RoleName.PREFILL), _node("d", RoleName.DECODE, FULL)
    mirrors = {"p": prefill, "d": decode}
    placed = decider.place(LATE, ENDPOINT, mirrors, FAST, 0.0)
    assert placed.verdict == "best_effort"
    _report(prefill, [replace(_waiting(LATE), kind=WorkKind.PREFILL)], 0.1)
    _report(decode, FULL[1:], 0.1)
    (promotion,) = decider.ask_again(mirrors, FAST, 0.1)
    assert promotion.node == "p"
    assert [work.best_effort for work in decode.works] == [False] * 4


def test_the_number_of_deferred_requests_is_bounded_and_beyond_it_a_client_is_told() -> None:
    decider, mirror = Decider(2, 8), _full_node()
    mirrors = {"m": mirror}
    asks = [replace(LATE, request_id=f"r{index}") for index in range(3)]
    placed = [decider.place(ask, ENDPOINT, mirrors, {}, 0.0) for ask in asks]
    assert [one.verdict for one in placed] == ["best_effort", "best_effort", "no_capacity"]
    assert "planner.max_deferred" in placed[2].reason
    assert placed[2].retry_after_s > 0
    assert mirror.requests == 4 + 2, "what was turned away is not counted"
    decider.finished(_finished(asks[0]), mirrors)
    assert decider.place(asks[2], ENDPOINT, mirrors, {}, 0.0).verdict == "best_effort"


def test_who_asks_to_be_refused_is_refused_and_does_not_wait() -> None:
    decider = Decider(8, 8)
    placed = decider.place(replace(LATE, may_defer=False), ENDPOINT, {"m": _full_node()}, {}, 0.0)
    assert placed.verdict == "refused"
    assert len(decider.deferred) == 0


def test_short_outputs_that_were_seen_let_more_in() -> None:
    """Without knowledge each is charged its max_tokens; KV for 32,000 tokens holds eight of 4,000."""
    greedy = replace(ASK, prompt_tokens=100, max_tokens=4000, tpot_s=0.1, first_token_left_s=5.0)

    def admitted(decider: Decider) -> int:
        mirror = _node("m", RoleName.MIXED)
        assert mirror.report is not None
        roomy = replace(mirror.report.info, max_num_seqs=64)
        mirror.take_report(replace(mirror.report, info=roomy), 0.0)
        asks = [replace(greedy, request_id=f"r{index}") for index in range(20)]
        return sum(decider.place(ask, ENDPOINT, {"m": mirror}, {}, 0.0).verdict == "admitted" for ask in asks)

    ignorant, learned = Decider(99, 8), Decider(99, 8)
    for _ in range(200):
        learned.finished(_finished(greedy), {})
    assert admitted(ignorant) <= 8
    assert admitted(learned) == 20


def test_a_follow_up_call_is_believed_to_find_its_kv_where_it_was() -> None:
    decider, mirror = Decider(8, 8), _node("m", RoleName.MIXED)
    mirrors = {"m": mirror}
    hashes = list(range(16))
    long = replace(ASK, prompt_tokens=2100, first_token_left_s=0.1, prefix_hashes=hashes)
    assert decider.place(long, ENDPOINT, mirrors, {}, 0.0).verdict == "best_effort"
    decider.finished(_finished(long, nodes=["m"], prefix_hashes=hashes), mirrors)
    assert decider.place(long, ENDPOINT, mirrors, {}, 0.0).verdict == "admitted"
    decider.forget_node("m")
    decider.finished(_finished(long), mirrors)
    assert decider.place(long, ENDPOINT, mirrors, {}, 0.0).verdict == "best_effort"


def test_every_decision_can_be_explained_and_the_oldest_are_forgotten() -> None:
    decider = Decider(8, 2)
    mirrors = {"p": _node("p", RoleName.PREFILL), "d": _node("d", RoleName.DECODE)}
    for index in range(3):
        decider.place(replace(ASK, request_id=f"r{index}"), ENDPOINT, mirrors, FAST, 0.0)
    assert decider.explain("r0") is None
    explained = decider.explain("r2")
    assert explained is not None
    assert explained["verdict"] == "admitted"
    (candidate,) = explained["candidates"]
    assert candidate["name"] == "p>d"
    assert [decision["node"] for decision in candidate["decisions"]] == ["p", "d"]
    assert candidate["decisions"][0]["instance"]["newcomers"][0]["id"] == "r2"
