"""Placement: pairs and single nodes compete, refusals say why, and nobody gets the last place twice."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.best_effort import place_best_effort
from coordinator.mirror import NodeMirror
from coordinator.placement import ENOUGH, TOO_DEAR, Knowledge
from coordinator.placement import place as place_and_explain
from coordinator.planner.lengths import LearnedLengths
from coordinator.planner.price import LEAST_KNOWN, RoomPrice
from coordinator.prefixes import PrefixDirectory
from engine.base import EngineInfo, StepReport, Usage
from engine.cost import StepCost
from engine.messages import NodeLoad, Place, Placed, Report, WorkState
from engine.prefix import prefix_hashes
from engine.request import RoleName, WorkKind
from kv_transfer.base import Link, PeerAddress


def place(
    request: Place,
    nodes: list[NodeMirror],
    links: dict[tuple[str, str], Link],
    now_s: float,
    prefixes: PrefixDirectory | None = None,
) -> Placed:
    knowledge = Knowledge(LearnedLengths(), links, prefixes or PrefixDirectory())
    return place_and_explain(request, nodes, knowledge, now_s)[0]


INFO = EngineInfo("vllm", "tiny", "e", 32, 1000, 4096, 4, 2048, 4096, "nixl")


def _node(name: str, role: RoleName, works: list[WorkState] | None = None) -> NodeMirror:
    report = Report(
        node=name,
        boot_id="b",
        role=role,
        info=INFO,
        kv=PeerAddress(name, "127.0.0.1", 1),
        usage=Usage(0, 1000, 0, 0),
        works=works or [],
        leases=[],
        pulls=[],
        cost=StepCost.line(0.003, 0.0001),
        idle_cost=StepCost.line(0.003, 0.0001),
        promises_preempted=0,
        promises_starved=0,
        cost_margin=0.0,
        steps=0,
        step_s=0.0,
        stuck_s=0.0,
        local_prefills=0,
        corrupt_pulls=0,
        pid=1,
    )
    mirror = NodeMirror(name, f"tcp://{name}", role)
    mirror.take_report(report, now_s=0.0)
    return mirror


def _pair() -> list[NodeMirror]:
    return [_node("p", RoleName.PREFILL), _node("d", RoleName.DECODE)]


ASK = Place(
    request_id="r",
    attempt=1,
    prompt_tokens=500,
    max_tokens=100,
    class_name="chatbot",
    first_token_left_s=0.5,
    tpot_s=0.1,
    one_node=False,
    may_defer=True,
)


WORK = WorkState("w", 1, WorkKind.WHOLE, 1000, 1000, 0, 100, 0.5, 0.1, False, "chatbot", None)
FAST = {("p", "d"): Link("p", "d", latency_s=0.0, bytes_per_s=1e9)}


def test_a_request_goes_to_the_pair_when_it_can_be_promised_there() -> None:
    placed = place(ASK, _pair(), FAST, 0.0)
    assert placed.verdict == "admitted"
    assert placed.prefill is not None
    assert placed.decode is not None
    assert (placed.prefill.node, placed.decode.node) == ("p", "d")


def test_without_time_for_a_handoff_a_decode_node_serves_alone() -> None:
    far = {("p", "d"): Link("p", "d", latency_s=0.95, bytes_per_s=1e9)}
    short = replace(ASK, prompt_tokens=50, first_token_left_s=0.03)
    placed = place(short, _pair(), far, 0.0)
    assert (placed.verdict, placed.prefill) == ("admitted", None)
    assert place(short, _pair(), FAST, 0.0).prefill is not None, "with time, a pair is preferred"


def test_a_decode_node_has_budget_for_prompts_when_prefill_nodes_have_none() -> None:
    queued = replace(WORK, kind=WorkKind.PREFILL, prompt_tokens=4600, prefill_left_tokens=4600)
    nodes = [_node("p", RoleName.PREFILL, [queued]), _node("d", RoleName.DECODE)]
    placed = place(ASK, nodes, FAST, 0.0)
    assert (placed.verdict, placed.prefill) == ("admitted", None)
    assert "p: " in placed.candidates["p>d"]


def test_what_no_node_can_promise_waits_where_prompts_are_computed() -> None:
    placed = place(replace(ASK, first_token_left_s=0.001), _pair(), FAST, 0.0)
    assert placed.verdict == "best_effort"
    assert placed.prefill is not None
    assert "d" in placed.candidates, "it was asked about"


def test_a_handoff_waits_for_the_batch_that_prompts_make_long() -> None:
    def handoff_s(works: list[WorkState]) -> float:
        nodes = [_node("p", RoleName.PREFILL), _node("d", RoleName.DECODE, works)]
        ask = replace(ASK, said_tokens=1, first_token_left_s=2.0)  # begun: all of the handoff is waited for
        return place(ask, nodes, FAST, 0.0).handoff_s

    decoding = replace(WORK, prefill_left_tokens=0, output_tokens=4, next_due_left_s=0.1, tpot_s=0.1)
    prompt = replace(WORK, request_id="w2", prompt_tokens=900, prefill_left_tokens=900, tpot_s=0.1)
    assert handoff_s([decoding, prompt]) > handoff_s([decoding]) + 0.08


def test_a_node_that_has_slowed_promises_less_and_new_work_goes_elsewhere() -> None:
    asks = [replace(ASK, request_id=f"r{number}", first_token_left_s=0.3) for number in range(8)]
    slowed = StepCost.line(0.003, 0.0001)  # as of every node here
    step = StepReport(seconds=0.1, tokens=200, seqs=1, decode_seqs=0, decode_context_tokens=0, prefill_work=0.0)
    for _ in range(100):
        slowed = slowed.drifted(step.seconds / slowed.of(step))
    assert slowed.drift == pytest.approx(0.1 / 0.023, rel=0.05), "as slow as what was measured"

    def node(slow: bool) -> NodeMirror:
        mirror = _node("a", RoleName.MIXED)
        assert mirror.report is not None
        if slow:
            mirror.take_report(replace(mirror.report, cost=slowed), 0.0)
        return mirror

    def promised(mirror: NodeMirror) -> int:
        return sum(place(ask, [mirror], {}, 0.0).verdict == "admitted" for ask in asks)

    assert 0 < promised(node(slow=True)) < promised(node(slow=False))
    other = _node("b", RoleName.MIXED)
    placed = [place(ask, [node(slow=True), other], {}, 0.0) for ask in asks[:2]]
    assert [(one.verdict, one.decode and one.decode.node) for one in placed] == [("admitted", "b")] * 2


def test_what_an_idle_node_was_given_a_moment_ago_is_not_taken_for_work_that_can_wait() -> None:
    """It has begun the long prompt, and cannot put the short one before it; nor is the long one in the way of
    what has time until it is over."""
    long = replace(ASK, request_id="long", prompt_tokens=2000, first_token_left_s=1.0)
    alone_s = 0.003 + 2000 * 0.0001
    verdicts = {}
    for left_s in (alone_s - 0.05, alone_s + 0.05):
        node = _node("a", RoleName.MIXED)
        assert place(long, [node], {}, 0.0).verdict == "admitted"
        short = replace(ASK, request_id="short", prompt_tokens=20, first_token_left_s=left_s)
        verdicts[left_s] = place(short, [node], {}, 0.003).verdict
    assert list(verdicts.values()) == ["best_effort", "admitted"]


def test_what_must_stay_on_one_node_is_served_where_it_decodes() -> None:
    placed = place(replace(ASK, one_node=True), _pair(), {}, 0.0)
    assert placed.prefill is None
    assert placed.decode is not None
    assert placed.decode.node == "d"


def test_decode_nodes_serve_everything_once_nobody_prefills() -> None:
    nodes = [_node("a", RoleName.DECODE), _node("b", RoleName.DECODE)]
    placed = place(ASK, nodes, {}, 0.0)
    assert placed.prefill is None
    assert placed.verdict == "admitted"


def test_a_lost_prefill_node_leaves_its_work_to_the_decode_node() -> None:
    placed = place(replace(ASK, avoid=["p"]), _pair(), {}, 0.0)
    assert placed.prefill is None
    assert placed.decode is not None
    assert placed.decode.node == "d"


def test_a_slow_link_takes_from_the_time_that_a_prefill_has() -> None:
    slow = {("p", "d"): Link("p", "d", latency_s=0.0, bytes_per_s=500 * 4096 / 1.4)}
    assert place(ASK, _pair(), FAST, 0.0).verdict == "admitted"
    assert place(ASK, _pair(), FAST, 0.0).prefill is not None
    assert place(ASK, _pair(), slow, 0.0).prefill is None


def test_a_handoff_that_the_pace_makes_good_takes_nothing_from_the_prefill() -> None:
    def taken_s(request: Place) -> float:
        nodes = [_node("p", RoleName.PREFILL), _node("d", RoleName.DECODE, _decoding(0.1, 2))]
        placed = place(request, nodes, FAST, 0.0)
        assert placed.verdict == "admitted"
        return placed.handoff_s

    assert taken_s(ASK) == 0
    assert taken_s(replace(ASK, tpot_s=0.004)) > 0, "a step takes 3.3 ms"
    assert taken_s(replace(ASK, tpot_s=0.008)) == 0
    assert taken_s(replace(ASK, tpot_s=0.008, max_tokens=2)) > 0, "the second token is the last"
    assert taken_s(replace(ASK, said_tokens=5)) > 0, "its next token is the decode node's"


def test_where_answers_may_be_short_a_handoff_is_made_good_by_their_second_token() -> None:
    lengths = LearnedLengths()
    for output_tokens in [2, *[50] * 9] * 5:
        lengths.observe("chatbot", ASK.prompt_tokens, output_tokens)
    ask = replace(ASK, tpot_s=0.005)
    placed = [
        place_and_explain(ask, _pair(), Knowledge(known, FAST), 0.0)[0] for known in (LearnedLengths(), lengths)
    ]
    assert [one.verdict for one in placed] == ["admitted", "admitted"]
    assert placed[0].handoff_s == 0 < placed[1].handoff_s


def test_a_handoff_takes_longer_where_steps_read_much_context() -> None:
    """The decode step that it waits for is that of all contexts there."""
    reads = replace(StepCost.line(0.003, 0.0001), per_context_token_s=2e-6)

    def pair(context_tokens: int) -> list[NodeMirror]:
        works = [replace(work, prompt_tokens=context_tokens) for work in _decoding(0.1, 1)]
        nodes = [_node("p", RoleName.PREFILL), _node("d", RoleName.DECODE, works)]
        for node in nodes:
            assert node.report is not None
            node.take_report(replace(node.report, cost=reads), 0.0)
        return nodes

    ask = replace(ASK, tpot_s=0.006, max_tokens=2)
    short, long = (place(ask, pair(tokens), FAST, 0.0).handoff_s for tokens in (100, 1000))
    assert long > short > 0


def test_a_pair_whose_link_could_not_be_measured_is_promised_nothing() -> None:
    placed = place(ASK, _pair(), {}, 0.0)
    assert placed.prefill is None
    assert "not measured" in placed.candidates["p>d"]


def test_nothing_ready_is_no_capacity_and_says_when_to_come_back() -> None:
    lost = _node("d", RoleName.DECODE)
    lost.state = "lost"
    placed = place(ASK, [lost], {}, 0.0)
    assert placed.verdict == "no_capacity"
    assert placed.retry_after_s > 0


def test_a_refusal_says_why_and_a_deferral_names_a_node() -> None:
    hopeless = replace(ASK, first_token_left_s=0.001)
    assert place(hopeless, _pair(), FAST, 0.0).verdict == "best_effort"
    refused = place(replace(hopeless, may_defer=False), _pair(), FAST, 0.0)
    assert refused.verdict == "refused"
    assert "cannot end within" in refused.reason


def test_what_no_idle_node_could_do_makes_room_no_dearer_for_others() -> None:
    price = RoomPrice()
    knowledge = Knowledge(LearnedLengths(), FAST, price=price)
    hopeless = [
        replace(ASK, first_token_left_s=0.001, may_defer=False),
        replace(ASK, tpot_s=1e-4, may_defer=False),
    ]
    for turn in range(LEAST_KNOWN):
        for ask in hopeless:
            refused, _ = place_and_explain(ask, _pair(), knowledge, float(turn))
            assert refused.reason != TOO_DEAR
    assert not price.too_dear(1e9, float(LEAST_KNOWN))
    refused, _ = place_and_explain(hopeless[0], _pair(), knowledge, float(LEAST_KNOWN))
    assert "cannot end within" in refused.reason


def test_two_requests_placed_in_one_instant_do_not_both_get_the_last_slot() -> None:
    nodes = _pair()
    asks = [replace(ASK, request_id=f"r{index}", first_token_left_s=100.0) for index in range(6)]
    verdicts = [place(ask, nodes, FAST, 0.0).verdict for ask in asks]
    assert verdicts == ["admitted"] * 4 + ["best_effort"] * 2


def test_a_placement_that_never_reaches_a_node_is_forgotten() -> None:
    nodes = _pair()
    place(ASK, nodes, FAST, now_s=0.0)
    assert all(node.placed for node in nodes)
    for node in nodes:
        assert node.report is not None
        node.take_report(node.report, now_s=1000.0)
    assert not any(node.placed for node in nodes)


def test_a_node_that_is_stuck_in_a_step_is_given_nothing_until_that_is_over() -> None:
    node = _node("d", RoleName.MIXED)
    assert node.report is not None
    node.lose()
    node.take_report(replace(node.report, stuck_s=31.0), 1.0, stuck_step_s=30.0)
    assert not node.serving
    node.take_report(replace(node.report, stuck_s=0.0), 2.0, stuck_step_s=30.0)
    assert node.serving


def test_what_a_report_shows_is_not_counted_twice() -> None:
    node = _node("m", RoleName.MIXED)
    place(ASK, [node], {}, 0.0)
    (placement,) = node.placed.values()
    assert node.report is not None
    node.take_report(replace(node.report, works=[placement.state]), 0.1)
    assert not node.placed
    assert [work.request_id for work in node.replica(0.1).works] == [ASK.request_id]


def test_retries_leave_nothing_behind_when_a_request_is_over() -> None:
    nodes = _pair()
    for attempt in (1, 2, 3):
        place(replace(ASK, attempt=attempt, first_token_left_s=100.0), nodes, FAST, 0.0)
    for node in nodes:
        node.forget(ASK.request_id, 3)
    assert not any(node.placed for node in nodes)


def test_best_effort_takes_no_slot_from_a_promise() -> None:
    nodes = _pair()
    for index in range(8):
        place(replace(ASK, request_id=f"b{index}", class_name=None), nodes, FAST, 0.0)
    assert place(replace(ASK, first_token_left_s=100.0), nodes, FAST, 0.0).verdict == "admitted"


def test_a_node_to_be_avoided_serves_when_there_is_nobody_else() -> None:
    placed = place(replace(ASK, avoid=["d"]), _pair(), FAST, 0.0)
    assert placed.decode is not None
    assert placed.decode.node == "d"


loads = st.lists(
    st.builds(NodeLoad, st.text(max_size=3), st.just("tcp://x"), st.sampled_from(RoleName), st.integers(0, 99)),
    max_size=6,
)


@given(loads, st.booleans())
def test_best_effort_goes_where_roles_allow_or_nowhere(nodes: list[NodeLoad], one_node: bool) -> None:
    way = place_best_effort(nodes, one_node=one_node)
    if way is None:
        assert all(node.role is RoleName.PREFILL for node in nodes)
        return
    prefill, decode = way
    assert decode.role is not RoleName.PREFILL
    if prefill is not None:
        assert not one_node
        assert prefill.role is RoleName.PREFILL
        assert decode.role is RoleName.DECODE


works = st.builds(
    WorkState,
    request_id=st.text(min_size=1, max_size=4),
    attempt=st.integers(1, 3),
    kind=st.sampled_from(WorkKind),
    prompt_tokens=st.integers(1, 4000),
    prefill_left_tokens=st.integers(0, 4000),
    output_tokens=st.integers(0, 100),
    max_tokens=st.integers(1, 4000),
    first_token_left_s=st.floats(-100, 100),
    tpot_s=st.floats(0.001, 10),
    best_effort=st.booleans(),
    class_name=st.sampled_from(["", "chatbot"]),
    next_due_left_s=st.none() | st.floats(-100, 100),
)


@given(st.lists(st.tuples(st.sampled_from(RoleName), st.lists(works, max_size=6)), max_size=4), st.booleans())
def test_every_question_has_an_answer_that_roles_allow(
    cluster: list[tuple[RoleName, list[WorkState]]], one_node: bool
) -> None:
    nodes = [_node(f"n{index}", role, load) for index, (role, load) in enumerate(cluster)]
    roles = {node.name: node.role for node in nodes}
    placed = place(replace(ASK, one_node=one_node), nodes, {}, 0.0)
    if placed.verdict == "no_capacity":
        assert placed.decode is None
        return
    assert placed.decode is not None
    assert roles[placed.decode.node] is not RoleName.PREFILL
    if placed.prefill is not None:
        assert not one_node
        assert roles[placed.prefill.node] is RoleName.PREFILL


def _decoding(tpot_s: float, count: int) -> list[WorkState]:
    """Running decodes at a pace."""
    one = WorkState("", 1, WorkKind.WHOLE, 100, 0, 10, 60, -1.0, tpot_s, False, "chatbot", 0.9 * tpot_s)
    return [replace(one, request_id=f"{tpot_s}-{index}") for index in range(count)]


def test_a_tight_request_goes_where_tight_ones_are_served_and_classes_gather() -> None:
    """It would shrink every batch of the loose replica, though that one is less loaded."""
    tight, loose = (
        _node("tight", RoleName.MIXED, _decoding(0.02, 2)),
        _node("loose", RoleName.MIXED, _decoding(0.1, 1)),
    )
    ask = replace(ASK, tpot_s=0.02, first_token_left_s=2.0)
    placed = place(ask, [loose, tight], {}, 0.0)
    assert placed.decode is not None
    assert placed.decode.node == "tight"


def test_a_follow_up_call_goes_where_its_kv_is_as_a_small_prompt() -> None:
    hashes = list(range(16))  # 2048 tokens
    prefixes = PrefixDirectory()
    prefixes.add("d", hashes, kv_tokens=32_000)
    ask = replace(ASK, prompt_tokens=2100, first_token_left_s=0.1, prefix_hashes=hashes)
    assert place(ask, _pair(), FAST, 0.0).verdict == "best_effort", "2100 tokens take 0.2 s"
    placed = place(ask, _pair(), FAST, 0.0, prefixes)
    assert placed.verdict == "admitted"
    assert placed.prefill is None
    assert placed.decode is not None
    assert placed.decode.node == "d"


def _at_home(node: str, hashes: list[int]) -> Knowledge:
    knowledge = Knowledge(LearnedLengths(), FAST)
    knowledge.sessions.answered("s", node, hashes, 480, now_s=0.0)
    return knowledge


HISTORY = prefix_hashes(list(range(480)))
NEXT = replace(ASK, session="s", prefix_hashes=prefix_hashes(list(range(500))))


def test_the_next_call_of_a_session_is_promised_where_its_history_is_as_a_small_prompt() -> None:
    tight = replace(NEXT, first_token_left_s=0.03)  # for what is new, and not for all 500 tokens
    nodes = [_node(name, RoleName.MIXED) for name in ("a", "b")]
    placed, _ = place_and_explain(tight, nodes, _at_home("b", HISTORY), 0.0)
    assert placed.verdict == "admitted"
    assert placed.decode is not None
    assert (placed.decode.node, placed.cached_tokens) == ("b", 480)
    stranger, _ = place_and_explain(replace(tight, session="t"), nodes, _at_home("b", HISTORY), 0.0)
    assert stranger.verdict == "best_effort"


def test_the_next_call_stays_at_home_where_a_pair_would_lose_about_as_little() -> None:
    prefill, home = _pair()
    assert home.report is not None
    slower = replace(home.report, cost=StepCost.line(0.004, 0.00015))  # as a busy machine may make it seem
    home.take_report(slower, now_s=0.0)
    knowledge = _at_home(home.name, HISTORY)
    knowledge.prefixes.add(prefill.name, HISTORY, kv_tokens=32_000)  # it computed them
    placed, candidates = place_and_explain(NEXT, [prefill, home], knowledge, 0.0)
    assert {candidate.name for candidate in candidates if candidate.feasible} == {"d", "p>d"}
    assert placed.prefill is None


def test_a_whole_history_is_not_left_for_a_node_that_knows_its_beginning() -> None:
    busier = _node("home", RoleName.MIXED, _decoding(0.1, 1))
    knowledge = _at_home("home", HISTORY)
    knowledge.prefixes.add("other", prefix_hashes(list(range(256))), kv_tokens=32_000)
    placed, _ = place_and_explain(NEXT, [_node("other", RoleName.MIXED), busier], knowledge, 0.0)
    assert placed.decode is not None
    assert (placed.decode.node, placed.cached_tokens) == ("home", 480)


@pytest.mark.parametrize("count", [7, 8, 20])
def test_home_is_asked_however_many_nodes_there_are(count: int) -> None:
    names = [f"n{at}" for at in range(count)]
    home = names[-2]
    nodes = [_node(name, RoleName.MIXED, _decoding(0.1, 1) if name == home else []) for name in names]
    knowledge = _at_home(home, HISTORY)
    for name in names:
        knowledge.prefixes.add(name, prefix_hashes(list(range(256))), kv_tokens=32_000)  # a system prompt
    placed, candidates = place_and_explain(NEXT, nodes, knowledge, 0.0)
    assert home in {candidate.name for candidate in candidates}
    assert placed.decode is not None
    assert (placed.prefill, placed.decode.node) == (None, home)
    unpromised, _ = place_and_explain(replace(NEXT, class_name=None), nodes, knowledge, 0.0)
    assert unpromised.decode is not None
    assert unpromised.decode.node == home


def test_a_call_without_a_promise_goes_where_most_of_it_is_known() -> None:
    knowledge = _at_home("b", prefix_hashes([7] * 480))  # another history
    knowledge.prefixes.add("c", HISTORY, kv_tokens=32_000)
    nodes = [_node(name, RoleName.MIXED) for name in ("a", "b", "c")]
    placed, _ = place_and_explain(replace(NEXT, class_name=None), nodes, knowledge, 0.0)
    assert placed.decode is not None
    assert (placed.decode.node, placed.cached_tokens) == ("c", 384)


def test_a_call_without_a_promise_goes_home_as_well_unless_home_is_much_busier() -> None:
    def goes_to(busy: int) -> str:
        home = _node("b", RoleName.MIXED, [replace(work, best_effort=True) for work in _decoding(0.1, busy)])
        asked = replace(NEXT, class_name=None)
        placed, _ = place_and_explain(asked, [_node("a", RoleName.MIXED), home], _at_home("b", HISTORY), 0.0)
        assert placed.decode is not None
        return placed.decode.node

    assert goes_to(busy=4) == "b"
    assert goes_to(busy=40) == "a"


def test_several_sequences_of_one_request_are_promised_together_or_not_at_all() -> None:
    ask = replace(ASK, one_node=True, first_token_left_s=100.0)
    assert place(replace(ask, sequences=4), _pair(), FAST, 0.0).verdict == "admitted"
    assert place(replace(ask, sequences=5), _pair(), FAST, 0.0).verdict == "best_effort"


def test_at_scale_the_planner_is_asked_of_few_candidates() -> None:
    nodes = [_node(f"m{index}", RoleName.MIXED) for index in range(40)]
    placed = place(ASK, nodes, {}, 0.0)
    assert placed.verdict == "admitted"
    assert len(placed.candidates) == ENOUGH, "those that can are enough"


def test_idle_nodes_are_used_once_those_that_keep_the_pace_are_full() -> None:
    nodes = [_node(f"m{index}", RoleName.MIXED) for index in range(16)]
    asks = [replace(ASK, request_id=f"r{index}", first_token_left_s=100.0) for index in range(64)]
    verdicts = {place(ask, nodes, {}, 0.0).verdict for ask in asks}
    assert verdicts == {"admitted"}
    assert {node.requests for node in nodes} == {4}


def test_what_is_cached_stays_so_in_what_is_counted() -> None:
    hashes = list(range(40))
    prefixes = PrefixDirectory()
    prefixes.add("m", hashes, kv_tokens=10**6)
    node = _node("m", RoleName.MIXED)
    ask = replace(ASK, prompt_tokens=5150, first_token_left_s=0.1, prefix_hashes=hashes)
    placed = place(ask, [node], {}, 0.0, prefixes)
    assert (placed.verdict, placed.cached_tokens) == ("admitted", 5120)
    assert [work.prefill_left_tokens for work in node.works] == [29]


def test_the_reserve_of_memory_follows_what_was_late_for_want_of_it() -> None:
    node = _node("d", RoleName.MIXED)
    report = node.report
    assert report is not None
    started = node.overflow_z
    place(ASK, [node], {}, 0.0)
    assert node.overflow_z == started, "a promise made while memory is ample is no trial"
    node.take_report(replace(report, usage=Usage(900, 1000, 0, 0)), now_s=1.0)
    place(replace(ASK, request_id="s"), [node], {}, 1.0)
    assert node.overflow_z < started
    before = node.overflow_z
    node.take_report(replace(report, promises_preempted=5), now_s=2.0)
    assert node.overflow_z == before, "who was preempted may be in time all the same"
    node.take_report(replace(report, promises_preempted=5, promises_starved=1), now_s=3.0)
    assert node.overflow_z > started


def test_while_there_is_room_for_everybody_requests_spread_and_once_it_is_short_they_gather() -> None:
    """An idle node loses the most by a tight request, and nobody wants what it loses."""
    busy, idle = _node("busy", RoleName.MIXED, _decoding(0.02, 2)), _node("idle", RoleName.MIXED, [])
    ask = replace(ASK, tpot_s=0.02, first_token_left_s=2.0)
    for lacked, wanted in ((0, "idle"), (2, "busy")):
        price = RoomPrice()
        for _ in range(lacked):
            price.note(1.0, 0.0, fitted=False, dear=False)
        placed, _ = place_and_explain(ask, [busy, idle], Knowledge(LearnedLengths(), {}, price=price), 0.0)
        assert placed.decode is not None
        assert placed.decode.node == wanted
        for node in (busy, idle):
            node.forget(ask.request_id, 1)


def test_a_history_is_not_left_for_a_node_that_is_only_a_bit_less_loaded() -> None:
    home, other = _node("home", RoleName.MIXED, _decoding(0.1, 3)), _node("other", RoleName.MIXED, [])
    knowledge = replace(_at_home("home", HISTORY), price=RoomPrice())
    ask = replace(NEXT, prompt_tokens=500, first_token_left_s=2.0)
    placed, _ = place_and_explain(ask, [home, other], knowledge, 0.0)
    assert placed.decode is not None
    assert placed.decode.node == "home"


def test_a_history_moves_where_its_home_has_no_room_for_the_answer() -> None:
    """Computing 4000 tokens again takes 0.4 s. Where the history is, batches have room for some new tokens of
    the prompt, but not for one more decode at this pace."""
    tokens = list(range(4000))
    knowledge = Knowledge(LearnedLengths(), {("home", "other"): FAST["p", "d"], ("p", "other"): FAST["p", "d"]})
    knowledge.sessions.answered("s", "home", prefix_hashes(tokens), 4000, now_s=0.0)
    nodes = [
        _node("p", RoleName.PREFILL),
        _node("home", RoleName.DECODE, _decoding(0.0036, 3)),
        _node("other", RoleName.DECODE),
    ]
    ask = replace(
        ASK, prompt_tokens=4020, prefix_hashes=prefix_hashes([*tokens, *range(20)]), session="s",
        first_token_left_s=0.3, tpot_s=0.0033,
    )  # fmt: skip
    placed, _ = place_and_explain(ask, nodes, knowledge, 0.0)
    assert placed.verdict == "admitted", placed.candidates
    assert placed.prefill is not None
    assert placed.decode is not None
    assert (placed.prefill.node, placed.decode.node) == ("home", "other")
    assert placed.cached_tokens >= 3900
