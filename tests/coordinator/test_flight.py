"""A flight keeps one sequence on its way: attempts, handoffs, declines, losses, and nothing said twice."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.endpoint.flight import MAX_ATTEMPTS, MAX_RESUMES, Flight, Passenger
from engine.errors import NoCapacity, NodeLost, Refused, RequestError, SlosserveError
from engine.messages import Cancel, Declined, Delta, NodeAddress, Placed, Release, Submit, Timing
from engine.request import Slo, WorkKind
from kv_transfer.base import Handoff

P, D = NodeAddress("p", "tcp://p"), NodeAddress("d", "tcp://d")
HANDOFF = Handoff("r#1", "p-engine", 3, 4096, 30.0)


@dataclass
class Trip:
    """A flight, what it sent, how it failed and how often it asked to be placed again."""

    slo: Slo | None = None
    sent: list[tuple[str, Any]] = field(default_factory=list)
    failures: list[SlosserveError] = field(default_factory=list)
    retries: int = 0
    more_tokens: int = 0
    delivery_s: float = 0.0

    def __post_init__(self) -> None:
        most = 10 + self.more_tokens
        passenger = Passenger(
            "r",
            [1, 2, 3],
            b"how",
            most,
            self.slo,
            False,
            None,
            time.monotonic(),
            delivery_s=self.delivery_s,
        )
        self.flight = Flight(
            passenger,
            lambda node, message: self.sent.append((node.node, message)),
            10.0,
            lambda flight, error: self.failures.append(error),
        )
        self.flight.on_retry = self._again

    def _again(self, flight: Flight) -> None:
        self.retries += 1

    def place(self, *, pair: bool = True, verdict: str = "admitted") -> Trip:
        question = self.flight.question()
        self.flight.depart(Placed("r", question.attempt, verdict, prefill=P if pair else None, decode=D))
        return self

    def delta(self, index: int, tokens: list[int], **kwargs: Any) -> Delta | None:
        return self.flight.take(Delta("r", kwargs.pop("attempt", self.flight.attempt), index, tokens, **kwargs))

    def sent_to(self, node: str, kind: type[Any]) -> list[Any]:
        return [message for name, message in self.sent if name == node and isinstance(message, kind)]


def test_a_pair_prefills_then_hands_over_then_streams() -> None:
    trip = Trip().place()
    assert [submit.kind for submit in trip.sent_to("p", Submit)] == [WorkKind.PREFILL]
    assert not trip.sent_to("d", Submit)
    first = trip.delta(0, [6], handoff=HANDOFF, finish_reason="length")
    assert first is not None
    assert (first.token_ids, first.finish_reason) == ([6], None), "the prefill node says the first token"
    (decode,) = trip.sent_to("d", Submit)
    assert (decode.kind, decode.handoff, decode.said_token_ids) == (WorkKind.DECODE, HANDOFF, [6])
    assert trip.delta(1, [7])
    assert trip.delta(2, [8, 9], finish_reason="stop")
    assert trip.flight.over
    assert trip.flight.output_token_ids == [6, 7, 8, 9]
    assert trip.flight.nodes == ["p", "d"]


@pytest.mark.parametrize(("reason", "more_tokens"), [("stop", 0), ("length", -9)])
def test_a_first_token_that_is_all_ends_it_on_the_prefill_node(reason: str, more_tokens: int) -> None:
    trip = Trip(more_tokens=more_tokens).place()
    said = trip.delta(0, [6], handoff=None if reason == "stop" else HANDOFF, finish_reason=reason)
    assert said is not None
    assert said.finish_reason == reason
    assert trip.flight.over
    assert trip.flight.ended_itself == (reason == "stop")
    assert not trip.sent_to("d", Submit)
    assert trip.sent_to("p", Cancel), "its KV is let go"
    assert trip.flight.nodes == ["p"], "the decode node has nothing of it"


def test_what_is_handed_over_stays_in_the_pace_that_its_first_token_began() -> None:
    trip = Trip(slo=Slo("chatbot", ttft_s=5.0, tpot_s=0.1)).place()
    trip.delta(0, [6], handoff=HANDOFF, finish_reason="length")
    (decode,) = trip.sent_to("d", Submit)
    assert decode.pace.begun
    assert decode.pace.first_token_left_s == pytest.approx(5.1, abs=0.5)


def test_tokens_are_asked_for_early_enough_to_be_delivered_when_they_are_due() -> None:
    trip = Trip(slo=Slo("chatbot", ttft_s=5.0, tpot_s=0.1), delivery_s=2.0)
    assert trip.flight.question().first_token_left_s == pytest.approx(3.0, abs=0.5)
    trip.place()
    (prefill,) = trip.sent_to("p", Submit)
    assert prefill.pace.first_token_left_s == pytest.approx(3.0, abs=0.5)
    trip.delta(0, [6], handoff=HANDOFF, finish_reason="length")
    (decode,) = trip.sent_to("d", Submit)
    assert decode.pace.first_token_left_s == pytest.approx(3.1, abs=0.5)


def test_a_prefill_for_an_answer_that_has_begun_says_nothing() -> None:
    trip = Trip().place()
    trip.delta(0, [6], handoff=HANDOFF, finish_reason="length")
    trip.flight.lost(D)
    trip.place()
    assert trip.sent_to("p", Submit)[-1].sampling == b""
    assert trip.delta(0, [99], handoff=HANDOFF, finish_reason="length") is None
    assert trip.sent_to("d", Submit)[-1].said_token_ids == [6]
    assert not trip.sent_to("d", Submit)[-1].pace.begun, "the gap is what it is"
    assert trip.delta(1, [7])
    assert trip.flight.output_token_ids == [6, 7]


def test_output_of_an_older_attempt_is_discarded() -> None:
    trip = Trip().place(pair=False)
    trip.flight.declined("d", Declined("r", 1, "busy"))
    trip.place(pair=False)
    assert not trip.delta(0, [7], attempt=1)
    assert trip.delta(0, [8], attempt=2)
    assert len(trip.flight.token_times_s) == 1


def test_a_token_said_twice_is_taken_once() -> None:
    trip = Trip().place(pair=False)
    assert trip.delta(0, [7, 8])
    assert not trip.delta(0, [7, 8])
    assert not trip.delta(1, [8])
    assert trip.delta(2, [9])


def test_tokens_lost_on_the_way_end_the_attempt_instead_of_hanging_it() -> None:
    trip = Trip().place(pair=False)
    assert not trip.delta(3, [7])
    assert trip.retries == 1
    assert trip.sent_to("d", Cancel) == [Cancel("r", 1)]


def test_a_decline_is_placed_again_elsewhere_and_cancelled_here() -> None:
    trip = Trip().place()
    trip.flight.declined("p", Declined("r", 1, "256 requests wait here already"))
    assert trip.retries == 1
    assert trip.flight.question().avoid == ["p"]
    assert trip.sent_to("p", Cancel) == [Cancel("r", 1)]


def test_a_late_decline_of_an_older_attempt_or_another_node_changes_nothing() -> None:
    trip = Trip().place()
    trip.delta(0, [], handoff=HANDOFF)
    trip.flight.declined("p", Declined("r", 1, "the engine failed"))  # its part is over
    trip.flight.declined("d", Declined("r", 0, "old"))
    assert trip.retries == 0
    assert trip.delta(0, [7])


def test_a_node_lost_before_the_first_token_means_another_attempt() -> None:
    trip = Trip().place()
    trip.flight.lost(D)  # it has been asked for nothing yet
    assert trip.retries == 0
    trip.flight.lost(P)
    assert trip.retries == 1


def test_a_prefill_node_lost_after_the_handoff_is_the_pulls_business() -> None:
    trip = Trip().place()
    trip.delta(0, [], handoff=HANDOFF)
    trip.flight.lost(P)
    assert trip.retries == 0
    assert trip.delta(0, [7])


def test_a_stream_whose_node_is_lost_goes_on_elsewhere_after_what_was_said() -> None:
    trip = Trip().place()
    trip.delta(0, [], handoff=HANDOFF)
    trip.delta(0, [7, 8])
    trip.flight.lost(D)
    assert (trip.retries, trip.failures) == (1, [])
    question = trip.flight.question()
    assert (question.prompt_tokens, question.said_tokens, question.max_tokens) == (5, 2, 8)
    assert question.avoid == ["d"]
    trip.sent.clear()
    trip.flight.depart(Placed("r", question.attempt, "admitted", prefill=P, decode=D))
    trip.delta(0, [], handoff=HANDOFF)
    (prefill,), (decode,) = trip.sent_to("p", Submit), trip.sent_to("d", Submit)
    assert (prefill.prompt_token_ids, prefill.said_token_ids) == ([1, 2, 3], [])
    assert (decode.prompt_token_ids, decode.said_token_ids) == ([1, 2, 3], [7, 8])
    assert not trip.delta(1, [8], attempt=1), "what the lost node says when it wakes up"
    assert trip.delta(2, [9], finish_reason="stop")
    assert trip.flight.output_token_ids == [7, 8, 9]
    assert "went on after 2 tokens" in trip.flight.timeline.events[-1]
    assert len(trip.flight.gaps_s) == 1


def test_what_is_promised_to_a_stream_that_goes_on_begins_anew_at_the_pace_it_was_at() -> None:
    trip = Trip(slo=Slo("reasoning", ttft_s=5.0, tpot_s=0.1, thinking_tpot_s=0.05, refuse=True))
    trip.flight.think_end_id = 99
    trip.place(pair=False).delta(0, [1, 2])
    trip.flight.lost(D)
    thinking = trip.flight.question()
    assert thinking.tpot_s == 0.05
    assert 5.0 <= thinking.first_token_left_s <= 5.1
    assert thinking.may_defer, "no 429 in the middle of an answer"
    trip.flight.depart(Placed("r", thinking.attempt, "admitted", decode=D))
    trip.delta(2, [3, 99, 4])
    trip.flight.lost(D)
    answering = trip.flight.question()
    assert answering.tpot_s == 0.1
    trip.flight.depart(Placed("r", answering.attempt, "admitted", decode=D))
    assert trip.sent_to("d", Submit)[-1].pace.answer_tpot_s is None


def test_a_stream_that_no_node_survives_ends_with_an_error_that_says_so() -> None:
    trip = Trip(more_tokens=100)
    for turn in range(MAX_RESUMES + 1):
        assert trip.retries == turn
        trip.place(pair=False).delta(turn, [7])
        trip.flight.lost(D)
    assert isinstance(trip.failures[0], NodeLost)
    assert f"after {MAX_RESUMES + 1} tokens" in str(trip.failures[0])


def test_attempts_are_bounded() -> None:
    trip = Trip()
    for _ in range(MAX_ATTEMPTS):
        trip.place(pair=False)
        trip.flight.declined("d", Declined("r", trip.flight.attempt, "no"))
    assert trip.retries == MAX_ATTEMPTS - 1
    assert isinstance(trip.failures[0], NoCapacity)


def test_a_failed_pull_gives_the_lease_back() -> None:
    trip = Trip().place()
    trip.delta(0, [], handoff=HANDOFF)
    trip.delta(0, [7], timing=Timing(0.0, 0.1, 0.05, "lease_lost"))
    assert trip.sent_to("p", Release) == [Release("r", 1)]
    assert "recomputed" in trip.flight.timeline.events[0]


def test_what_no_node_could_serve_is_a_400_and_what_an_engine_broke_is_tried_again() -> None:
    bad = Trip().place(pair=False)
    bad.delta(0, [], error="a token id is outside the vocabulary", error_status=400)
    assert isinstance(bad.failures[0], RequestError)
    broken = Trip().place(pair=False)
    broken.delta(0, [], error="vLLM gave up on it")
    assert broken.retries == 1
    streaming = Trip().place(pair=False)
    streaming.delta(0, [7])
    streaming.delta(1, [], error="vLLM gave up on it")
    assert (streaming.retries, streaming.failures) == (1, [])


def test_an_abort_reaches_both_nodes_and_silences_what_is_on_its_way() -> None:
    trip = Trip().place()
    trip.flight.abort()
    assert trip.sent_to("p", Cancel)
    assert trip.sent_to("d", Cancel)
    assert not trip.delta(0, [], handoff=HANDOFF)
    assert not trip.sent_to("d", Submit)
    trip.flight.abort()
    assert len(trip.sent_to("p", Cancel)) == 1


def test_a_refusal_and_no_capacity_are_raised_with_when_to_come_back() -> None:
    trip = Trip()
    trip.flight.question()
    with pytest.raises(Refused) as refused:
        trip.flight.depart(Placed("r", 1, "refused", reason="late by 1 s", retry_after_s=2.0))
    assert refused.value.retry_after_s == 2.0
    with pytest.raises(NoCapacity):
        trip.flight.depart(Placed("r", 1, "no_capacity", reason="no node"))


def test_the_time_left_shrinks_and_the_end_of_thinking_is_found() -> None:
    trip = Trip(slo=Slo("reasoning", ttft_s=5.0, tpot_s=0.1, thinking_tpot_s=0.05))
    question = trip.flight.question()
    assert 4.5 < question.first_token_left_s <= 5.0
    assert question.tpot_s == 0.05
    trip.flight.think_end_id = 99
    trip.flight.attempt = 0
    trip.place(pair=False)
    trip.delta(0, [1, 2])
    assert trip.flight.thinking_tokens == 2
    trip.delta(2, [3, 99, 4])
    trip.delta(5, [99])
    assert trip.flight.thinking_tokens == 4


moves = st.lists(
    st.one_of(
        st.tuples(
            st.just("delta"), st.integers(0, 3), st.integers(0, 8), st.lists(st.integers(0, 9), max_size=3)
        ),
        st.tuples(st.just("decline"), st.sampled_from("pdx"), st.integers(0, 3), st.none()),
        st.tuples(st.just("lost"), st.sampled_from("pdx"), st.none(), st.none()),
        st.tuples(st.just("handoff"), st.integers(0, 3), st.none(), st.none()),
        st.tuples(st.just("abort"), st.none(), st.none(), st.none()),
    ),
    max_size=25,
)


def test_the_loss_of_a_node_as_it_was_before_does_not_concern_who_is_with_it_now() -> None:
    trip = Trip().place(pair=False)
    trip.flight.lost(NodeAddress("d", "tcp://d-before"))
    assert not trip.flight.timeline.events
    trip.flight.lost(D)
    assert trip.flight.timeline.events == ["attempt 1: d stopped answering"]


@given(moves, st.booleans())
def test_whatever_nodes_say_tokens_come_once_in_order_and_nothing_follows_the_end(
    events: list[Any], pair: bool
) -> None:
    trip = Trip().place(pair=pair)
    taken: list[int] = []
    for kind, first, second, tokens in events:
        if trip.flight.placed is None and not trip.flight.over and not trip.failures:
            trip.place(pair=pair)
        before = len(trip.flight.token_times_s)
        if kind == "delta":
            delta = Delta("r", first, second, tokens)
            if trip.flight.take(delta):
                assert not trip.flight.over or delta.finish_reason
                assert (first, second) == (trip.flight.attempt, before)
                taken += tokens
        elif kind == "decline":
            trip.flight.declined(first, Declined("r", second, "no"))
        elif kind == "lost":
            trip.flight.lost(NodeAddress(first, f"tcp://{first}"))
        elif kind == "handoff":
            trip.flight.take(Delta("r", first, 0, [], handoff=HANDOFF))
        else:
            trip.flight.abort()
        if trip.failures:
            trip.flight.abort()
        assert len(trip.flight.token_times_s) == len(taken)
