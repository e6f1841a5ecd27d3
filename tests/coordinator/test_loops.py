"""One deadline over the calls of a loop: what is left is split, paces are tightened in bounds, it ends once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.endpoint.loops import LEAST_SCALE, MOST_LOOPS, LoopEnd, Loops, Share, ToolCallSeen
from engine.request import Slo

SLO = Slo("tool", ttft_s=1.0, tpot_s=0.05)


def _call(loops: Loops, now_s: float, calls: int | None = None, *, last: bool = False) -> Share:
    share = loops.begin_call("s", "tool", 10.0, calls, now_s, last=last)
    assert share is not None
    return share


def test_what_is_left_is_split_over_the_calls_that_are_left() -> None:
    loops = Loops()
    assert _call(loops, 100.0, calls=4) == Share(1, 4, 10.0, 2.5)
    assert loops.end_call("s", 104.0, 10, last=False) is None
    assert _call(loops, 104.0, calls=3) == Share(2, 3, 6.0, 2.0), "the first took more than its share"
    assert loops.end_call("s", 105.0, 10, last=False) is None
    last = _call(loops, 105.0, last=True)
    assert (last.call, last.calls_left, last.share_s) == (3, 1, 5.0)
    assert loops.end_call("s", 109.0, 10, last=True) == LoopEnd("tool", 3, 9.0, 10.0)
    assert LoopEnd("tool", 3, 9.0, 10.0).met
    assert not LoopEnd("tool", 3, 10.1, 10.0).met


def test_a_deadline_counts_from_the_first_call_and_tools_take_of_it() -> None:
    loops = Loops()
    _call(loops, 0.0, calls=2)
    loops.end_call("s", 1.0, 10, last=False)
    after_tool = _call(loops, 7.0, calls=1)
    assert after_tool.left_s == pytest.approx(3.0)
    assert after_tool.share_s == pytest.approx(3.0)


def test_time_that_tools_usually_take_is_not_given_to_a_call() -> None:
    loops = Loops()
    for _ in range(40):
        _call(loops, 0.0, calls=2)
        loops.end_call("s", 1.0, 10, last=False)
        _call(loops, 5.0, last=True)
        loops.end_call("s", 6.0, 10, last=True)
    assert _call(loops, 0.0, calls=2).share_s == pytest.approx((10.0 - 4.0) / 2, rel=0.01)


def test_how_many_calls_a_loop_takes_is_learned() -> None:
    loops = Loops()
    for _ in range(40):
        for call in range(8):
            _call(loops, float(call))
            loops.end_call("s", call + 0.5, 10, last=call == 7)
    assert _call(loops, 0.0).calls_left == 8


def test_the_next_loop_of_a_session_begins_anew() -> None:
    loops = Loops()
    _call(loops, 0.0)
    loops.end_call("s", 1.0, 10, last=True)
    assert _call(loops, 50.0).left_s == 10.0
    loops.close("s")
    assert _call(loops, 99.0).left_s == 10.0


def test_a_loop_that_was_left_is_no_part_of_the_next_and_teaches_nothing() -> None:
    loops = Loops()
    _call(loops, 0.0, calls=2)
    loops.end_call("s", 1.0, 10, last=False)
    back = _call(loops, 5000.0, calls=2)
    assert (back.call, back.left_s, back.share_s) == (1, 10.0, 5.0)


def test_a_call_that_failed_is_no_call_of_its_loop() -> None:
    loops = Loops()
    _call(loops, 0.0)
    assert loops.end_call("s", 1.0, 0, last=True, completed=False) is None
    assert _call(loops, 2.0).call == 1
    assert loops.class_of("s", 2.0) == "tool"
    assert loops.class_of("t", 2.0) is None


def test_a_call_beside_the_loop_does_not_end_it() -> None:
    loops = Loops()
    _call(loops, 0.0)
    _call(loops, 0.1)  # a title for the talk, say
    assert loops.end_call("s", 0.5, 10, last=True) is None
    assert loops.end_call("s", 14.0, 10, last=False) is None
    assert _call(loops, 15.0).left_s == -5.0, "the deadline is still that of the first call"
    _call(loops, 15.1)
    assert loops.end_call("s", 16.0, 10, last=True, told=True) == LoopEnd("tool", 4, 16.0, 10.0)


def test_a_loop_that_was_left_lends_its_class_to_nobody() -> None:
    loops = Loops()
    _call(loops, 0.0)
    loops.end_call("s", 1.0, 10, last=False)
    assert loops.class_of("s", 9.0) == "tool"
    assert loops.class_of("s", 5000.0) is None


def test_without_a_deadline_there_is_no_loop() -> None:
    loops = Loops()
    assert loops.begin_call("s", "tool", None, None, 0.0, last=False) is None
    assert loops.end_call("s", 1.0, 10, last=True) is None


def test_paces_are_tightened_in_equal_proportion_and_never_loosened() -> None:
    loops = Loops()
    tokens = 60.0
    usual_s = SLO.ttft_s + tokens * SLO.tpot_s
    assert loops.within(SLO, Share(1, 1, 99.0, 2 * usual_s), max_tokens=60) == SLO
    tight = loops.within(SLO, Share(1, 1, 99.0, usual_s / 2), max_tokens=60)
    assert (tight.ttft_s, tight.tpot_s) == (pytest.approx(0.5), pytest.approx(0.025))
    assert tight.ttft_s + tokens * tight.tpot_s == pytest.approx(usual_s / 2)


def test_a_loop_that_is_lost_is_served_as_usual_and_a_hopeless_one_no_tighter_than_helps() -> None:
    loops = Loops()
    assert loops.within(SLO, Share(1, 1, -1.0, 0.0), max_tokens=100) == SLO
    assert loops.within(SLO, Share(1, 1, 0.1, 0.1), max_tokens=1000).tpot_s == pytest.approx(
        LEAST_SCALE * SLO.tpot_s
    )


def test_loops_that_are_never_ended_are_bounded() -> None:
    loops = Loops()
    for at in range(MOST_LOOPS + 10):
        loops.begin_call(f"s{at}", "tool", 10.0, None, 0.0, last=False)
    assert loops.end_call("s0", 1.0, 10, last=True) is None
    assert loops.end_call(f"s{MOST_LOOPS}", 1.0, 10, last=True) is not None


@given(
    calls=st.lists(
        st.tuples(st.floats(0, 30), st.floats(0, 30), st.none() | st.integers(1, 20), st.integers(0, 5000)),
        max_size=12,
    )
)
def test_a_share_is_never_more_than_what_is_left(
    calls: list[tuple[float, float, int | None, int]],
) -> None:
    loops, now_s = Loops(), 0.0
    for tool_s, call_s, left, tokens in calls:
        now_s += tool_s
        share = _call(loops, now_s, left)
        assert 0 <= share.share_s <= max(share.left_s, 0.0)
        assert share.calls_left >= 1
        now_s += call_s
        loops.end_call("s", now_s, tokens, last=False)


@pytest.mark.parametrize(
    ("answer", "calls_a_tool"),
    [
        (b'{"message":{"content":"hi","tool_calls":[]},"finish_reason":"stop"}', False),
        (b'{"message":{"tool_calls":[{"id":"1"}]},"finish_reason":"tool_calls"}', True),
        (b'data: {"choices":[{"delta":{"tool_calls": [ {"index":0}]}}]}', True),
        (b'{"content":[{"type":"tool_use","name":"look"}]}', True),
        (b'{"output":[{"type": "function_call","name":"look"}]}', True),
        (b'{"content":[{"type":"text","text":"I could say tool_calls"}]}', False),
    ],
)
@pytest.mark.parametrize("piece", [1, 7, 10_000])
def test_a_tool_call_is_seen_however_the_answer_is_cut(answer: bytes, piece: int, calls_a_tool: bool) -> None:
    seen = ToolCallSeen()
    for at in range(0, len(answer), piece):
        seen.read(answer[at : at + piece])
    assert seen.seen is calls_a_tool
