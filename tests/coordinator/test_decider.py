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


def test_a_session_is_at_home_where_its_last_call_ended_as_long_as_that_node_lives() -> None:
    decider, mirrors = Decider(8, 8), {name: _node(name, RoleName.MIXED) for name in ("a", "b")}
    call = _finished(ASK, session="s", nodes=["a", "b"], prefix_hashes=[1, 2])
    decider.finished(call, mirrors, 1.0)
    assert decider.sessions.home("s") == "b"
    decider.finished(replace(call, nodes=["a"], outcome="cancelled"), mirrors, 2.0)
    assert decider.sessions.home("s") == "b", "what did not end is no history"
    decider.forget_node("b")
    assert decider.sessions.home("s") is None


def test_without_reasons_the_decisions_are_the_same() -> None:
    asks = [replace(LATE, request_id=str(at), prompt_tokens=100 * at + 1) for at in range(20)]

    def verdicts(decider: Decider) -> list[tuple[str, str]]:
        mirrors = {"m": _node("m", RoleName.MIXED, FULL[2:])}
        placed = [decider.place(ask, ENDPOINT, mirrors, {}, 0.0) for ask in asks]
        return [(one.verdict, one.reason) for one in placed]

    explained, silent = verdicts(Decider(99, 8)), verdicts(Decider(99, 0, why=False))
    assert [verdict for verdict, _ in silent] == [verdict for verdict, _ in explained]
    assert {verdict for verdict, _ in silent} == {"admitted", "best_effort"}
    assert {reason for verdict, reason in silent if verdict == "best_effort"} == {
        "it does not fit beside those admitted"
    }


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


def test_those_whose_time_is_over_leave_their_place_in_the_queue_to_others() -> None:
    decider, mirror = Decider(2, 8), _full_node()
    mirrors = {"m": mirror}
    for index in range(2):
        decider.place(replace(LATE, request_id=f"r{index}"), ENDPOINT, mirrors, {}, 0.0)
    assert decider.place(replace(LATE, request_id="r2"), ENDPOINT, mirrors, {}, 6.0).verdict == "best_effort"


def test_a_long_queue_is_asked_about_in_turns_and_nobody_starves() -> None:
    decider, mirror = Decider(99, 8), _full_node()
    mirrors = {"m": mirror}
    asks = [replace(LATE, request_id=f"r{index}", prompt_tokens=60_000) for index in range(9)]
    small = replace(LATE, request_id="small", prompt_tokens=100)
    for ask in (*asks, small):
        decider.place(ask, ENDPOINT, mirrors, {}, 0.0)
    hopeless = [replace(_waiting(ask), prompt_tokens=60_000, prefill_left_tokens=59_999) for ask in asks]
    _report(mirror, [*FULL[1:], *hopeless, replace(_waiting(small), prompt_tokens=100)], 0.1)
    promoted = [one for _ in range(3) for one in decider.ask_again(mirrors, {}, 0.1)]
    assert [one.deferred.request.request_id for one in promoted] == ["small"]


def test_a_deferred_prefill_that_was_handed_on_is_not_promised_where_it_was() -> None:
    decider = Decider(8, 8)
    prefill, decode = _node("p", RoleName.PREFILL), _node("d", RoleName.DECODE, FULL)
    mirrors = {"p": prefill, "d": decode}
    decider.place(LATE, ENDPOINT, mirrors, FAST, 0.0)
    _report(prefill, [replace(_waiting(LATE, 1), kind=WorkKind.PREFILL)], 0.1)
    _report(decode, [], 0.1)
    assert decider.ask_again(mirrors, FAST, 0.1) == []
    assert len(decider.deferred) == 0


def test_a_promotion_counts_until_the_node_itself_says_that_it_is_one() -> None:
    decider, mirror = Decider(8, 8), _full_node()
    mirrors = {"m": mirror}
    decider.place(LATE, ENDPOINT, mirrors, {}, 0.0)
    _report(mirror, [*FULL[1:], _waiting(LATE)], 0.1)
    assert len(decider.ask_again(mirrors, {}, 0.1)) == 1
    _report(mirror, [*FULL[1:], _waiting(LATE)], 0.2)  # sent before the node heard of it
    other = replace(LATE, request_id="other")
    assert decider.place(other, ENDPOINT, mirrors, {}, 0.2).verdict == "best_effort"


def test_a_retry_leaves_nothing_of_the_attempt_before_it() -> None:
    decider = Decider(8, 8)
    nodes = {name: _node(name, RoleName.PREFILL) for name in ("p", "q")} | {"d": _node("d", RoleName.DECODE)}
    links = {(name, "d"): replace(FAST["p", "d"], source=name) for name in ("p", "q")}
    decider.place(LATE, ENDPOINT, nodes, links, 0.0)
    decider.place(replace(LATE, attempt=2, avoid=["p"]), ENDPOINT, nodes, links, 0.1)
    assert [node.requests for node in nodes.values()] == [0, 1, 1]


def test_all_sequences_of_a_request_are_counted() -> None:
    decider, mirror = Decider(8, 8), _node("m", RoleName.MIXED)
    mirrors = {"m": mirror}
    several = replace(LATE, sequences=4, siblings=["r-1", "r-2", "r-3"])
    assert decider.place(several, ENDPOINT, mirrors, {}, 0.0).verdict == "admitted"
    assert mirror.requests == 4
    other = replace(LATE, request_id="other")
    assert decider.place(other, ENDPOINT, mirrors, {}, 0.0).verdict == "best_effort"
    assert decider.explain("r-3") is not None


def test_a_prefill_for_elsewhere_is_due_earlier_by_what_the_handoff_takes() -> None:
    decider = Decider(8, 8)
    mirrors = {"p": _node("p", RoleName.PREFILL), "d": _node("d", RoleName.DECODE)}
    begun = replace(LATE, said_tokens=5)
    placed = decider.place(begun, ENDPOINT, mirrors, FAST, 0.0)
    assert placed.handoff_s > 0
    (work,) = mirrors["p"].works
    assert work.first_token_left_s == LATE.first_token_left_s - placed.handoff_s
    (work,) = mirrors["d"].works
    assert work.first_token_left_s == LATE.first_token_left_s


def test_the_prefill_node_says_the_first_token_and_the_decode_node_the_next_one() -> None:
    decider = Decider(8, 8)
    mirrors = {"p": _node("p", RoleName.PREFILL), "d": _node("d", RoleName.DECODE)}
    placed = decider.place(LATE, ENDPOINT, mirrors, FAST, 0.0)
    assert placed.handoff_s == 0
    (work,) = mirrors["p"].works
    assert work.first_token_left_s == LATE.first_token_left_s
    (work,) = mirrors["d"].works
    assert work.first_token_left_s == LATE.first_token_left_s + LATE.tpot_s
    assert (work.prompt_tokens, work.max_tokens) == (LATE.prompt_tokens + 1, LATE.max_tokens - 1)


def test_kv_that_was_never_computed_is_not_believed_to_be_there() -> None:
    decider, mirror = Decider(8, 8), _node("m", RoleName.MIXED)
    mirrors = {"m": mirror}
    hashes = list(range(16))
    long = replace(ASK, prompt_tokens=2100, first_token_left_s=0.1, prefix_hashes=hashes)
    cancelled = _finished(long, nodes=["m"], prefix_hashes=hashes, output_tokens=0, outcome="cancelled")
    decider.finished(cancelled, mirrors)
    assert decider.place(long, ENDPOINT, mirrors, {}, 0.0).verdict == "best_effort"
    without = Decider(8, 8, prefix_caching=False)
    without.finished(_finished(long, nodes=["m"], prefix_hashes=hashes), mirrors)
    assert without.place(long, ENDPOINT, mirrors, {}, 0.0).verdict == "best_effort"


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


def test_of_candidates_that_were_not_taken_the_words_are_kept() -> None:
    decider = Decider(8, 2)
    mirrors = {name: _node(name, RoleName.MIXED) for name in ("a", "b")}
    decider.place(ASK, ENDPOINT, mirrors, {}, 0.0)
    explained = decider.explain(ASK.request_id)
    assert explained is not None
    assert [bool(one["decisions"]) for one in explained["candidates"]] == [True, False]
