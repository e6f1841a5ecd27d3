"""Explaining: the times of a request add up, whatever became of it, and the words name what was at fault."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from coordinator.cli.explain import view
from coordinator.endpoint.explain import explain, parts, record_of
from coordinator.endpoint.flight import Flight, Passenger
from engine.messages import Account, Delta, Finished, NodeAddress, Placed, Timing
from engine.request import Slo
from engine.score import score
from kv_transfer.base import Handoff

P, D = NodeAddress("p", "tcp://p"), NodeAddress("d", "tcp://d")
SLO = Slo("chatbot", 0.5, 0.1)


class _Flight(Flight):
    """A flight on a clock that is set by hand."""

    now_s = 0.0

    def since_arrival_s(self) -> float:
        return self.now_s


def _flight(slo: Slo | None = SLO) -> _Flight:
    passenger = Passenger("r", [1] * 100, b"", 50, slo, False, None, 0.0)
    flight = _Flight(passenger, lambda node, message: None, 10.0, lambda flight, error: None)
    flight.now_s = 0.004
    flight.question()
    return flight


def _finished(flight: Flight, outcome: str = "completed") -> Finished:
    slo = flight.passenger.slo
    assert slo is not None
    result = score(slo, flight.token_times_s, completed=outcome == "completed")
    verdict = flight.timeline.verdict
    met = result.met and verdict == "admitted"
    stages = {str(kind): kept and verdict == "admitted" for kind, kept in result.stages.items()}
    return Finished("r", 1, "chatbot", outcome, verdict, met, False, False, stages, "pair")


def _on_a_pair(first_token_s: float, *, ends: bool = True) -> _Flight:
    flight = _flight()
    flight.now_s = 0.010
    flight.depart(Placed("r", 1, "admitted", P, D, cached_tokens=64, candidates={}))
    flight.now_s = first_token_s
    waited_s = first_token_s - 0.050
    handoff = Handoff("r", "p", 100, 1000, 10.0)
    account = Account(batches=2, chunks=2, held=1)
    flight.take(Delta("r", 1, 0, [6], "length", handoff=handoff, cached_tokens=64,
                      timing=Timing(waited_s, waited_s + 0.035), account=account))  # fmt: skip
    flight.now_s += 0.05
    flight.take(Delta("r", 1, 1, [7], timing=Timing(0.012, 0.028, 0.008, "pulled", 1000)))
    for index in range(2, 5):
        flight.now_s += 0.05
        last = ends and index == 4
        account = Account(batches=4, drafted_tokens=6, accepted_tokens=2)
        flight.take(Delta("r", 1, index, [7], "length" if last else None, account=account if last else None))
    return flight


def _told(flight: Flight, decision: dict[str, Any] | None = None) -> dict[str, Any]:
    return explain(record_of("cmpl-1", None, flight, _finished(flight)), decision)


def _printed(told: dict[str, Any]) -> str:
    out = io.StringIO()
    Console(file=out, width=160).print(view(told))
    return out.getvalue()


def test_the_times_of_a_pair_add_up_to_the_latency() -> None:
    flight = _on_a_pair(first_token_s=0.4)
    record = record_of("cmpl-1", None, flight, _finished(flight))
    found = parts(record)
    assert sum(seconds for _, seconds in found) == pytest.approx(0.6)
    assert all(seconds >= 0 for _, seconds in found)
    names = [part for part, _ in found]
    assert names == [
        "reading the request", "placing it", "waiting on p", "computing the prompt on p",
        "messages on their way", "moving KV to d", "waiting on d", "the next token on d",
        "messages on their way", "generating the answer",
    ]  # fmt: skip


def test_a_kept_promise_says_so_and_what_was_done_for_it() -> None:
    told = _told(_on_a_pair(first_token_s=0.4))
    words = "\n".join(told["why"])
    assert "That was promised, on p and d." in words
    assert "Every stage was kept." in words
    assert "0.0 MB of KV moved to d in 8.0 ms." in words
    assert "64 of 100 prompt tokens had their KV on p already." in words
    assert "p: 2 batches, the prompt in 2 chunks, held back in 1 for others that were due." in words
    assert "d: 4 batches, 2 of 6 drafted tokens right." in words
    assert [stage["met"] for stage in told["stages"]] == [True, True]
    assert "in all" in _printed(told)


def test_a_missed_first_token_names_what_took_the_time() -> None:
    told = _told(_on_a_pair(first_token_s=0.9))
    words = "\n".join(told["why"])
    assert "The first token was late by 400.0 ms: most of it went into waiting on p" in words
    assert "The answer" not in words, "the pace counts from the first token"
    assert [stage["met"] for stage in told["stages"]] == [False, True]
    assert "missed" in _printed(told)


@pytest.mark.parametrize("first_token_s", [0.6 + at / 1000 for at in range(0, 300, 7)])
def test_what_came_after_a_late_first_token_is_not_blamed_for_it(first_token_s: float) -> None:
    flight = _flight()
    flight.depart(Placed("r", 1, "admitted", None, D, cached_tokens=0, candidates={}))
    flight.now_s = first_token_s
    flight.take(Delta("r", 1, 0, [6], timing=Timing(0.004, first_token_s - 0.006)))
    for index in range(1, 30):
        flight.now_s += 0.4
        flight.take(Delta("r", 1, index, [7], "length" if index == 29 else None, account=Account(batches=3)))
    words = "\n".join(_told(flight)["why"])
    assert "The first token was late" in words
    assert "generating" not in words.split("The first token was late")[1].split("\n")[0]


def test_a_pace_that_was_missed_says_when_it_was_due() -> None:
    flight = _on_a_pair(first_token_s=0.4)
    flight.token_times_s[-1] = flight.timeline.ended_s = 1.6
    told = _told(flight)
    assert (
        "The answer was late by 700.0 ms at its worst; it was due at 900.0 ms and done at 1.60 s."
        in told["why"]
    )


def test_deferred_and_refused_give_the_planners_reason() -> None:
    candidates = [{"name": "d", "feasible": False, "reason": "no room before the deadline", "loss_s": None}]
    decision = {"reason": "it does not fit beside those admitted", "candidates": candidates}
    deferred = _flight()
    deferred.now_s = 0.01
    deferred.depart(Placed("r", 1, "best_effort", None, D, "no room"))
    deferred.now_s = 0.3
    deferred.take(Delta("r", 1, 0, [7], "length", timing=Timing(0.2, 0.25), account=Account(1, 1)))
    told = _told(deferred, decision)
    words = "\n".join(told["why"])
    assert "could not be promised: no room. It was deferred" in words
    assert "What is not promised counts as missed, however quick it was." in words
    assert "d was no candidate: no room before the deadline." in words
    assert sum(one["seconds"] for one in told["times"]) == pytest.approx(0.3)

    forgotten = _told(deferred)
    assert "could not be promised: no room." in forgotten["why"][0], "the coordinator forgets sooner"

    refused = _flight()
    with pytest.raises(Exception, match="not today"):
        refused.depart(Placed("r", 1, "refused", reason="not today"))
    refused.now_s = 0.02
    refused.end()
    told = explain(record_of("cmpl-1", None, refused, _finished(refused, "refused")), decision)
    assert "It was refused: not today." in told["why"][0]
    assert sum(one["seconds"] for one in told["times"]) == pytest.approx(0.02)
    assert "no room before the deadline" in _printed(told)


def test_a_stream_that_went_on_elsewhere_says_where_it_stopped_and_its_times_add_up() -> None:
    flight = _on_a_pair(first_token_s=0.4, ends=False)
    flight.on_retry = lambda one: None
    flight.now_s = 1.4
    flight.lost(D)
    flight.question()
    flight.now_s = 1.45
    flight.depart(Placed("r", 2, "admitted", None, P))
    flight.now_s = 1.7
    flight.take(Delta("r", 2, len(flight.token_times_s), [9], timing=Timing(0.1, 0.22)))
    flight.now_s = 2.0
    flight.take(Delta("r", 2, len(flight.token_times_s), [9], "length", account=Account(2, 1)))
    told = _told(flight)
    assert sum(one["seconds"] for one in told["times"]) == pytest.approx(2.0)
    assert all(one["seconds"] >= 0 for one in told["times"])
    assert told["times"][0] == {"part": "earlier attempts", "seconds": pytest.approx(1.4)}
    words = "\n".join(told["why"])
    assert "Attempt 1: d stopped answering." in words
    assert "Attempt 2: went on after" in words
    assert told["timeline"]["first_token_s"] == pytest.approx(0.4)
    assert len(told["timeline"]["gaps_s"]) == 1


def test_after_a_retry_only_the_last_attempt_has_a_place_and_the_first_is_an_event() -> None:
    flight = _flight()
    flight.on_retry = lambda one: None
    flight.now_s = 0.010
    flight.depart(Placed("r", 1, "admitted", P, D))
    flight.now_s = 0.2
    handoff = Handoff("r", "p", 100, 1000, 10.0)
    flight.take(
        Delta("r", 1, 0, [], "length", handoff=handoff, timing=Timing(0.1, 0.15), account=Account(2, 2))
    )
    flight.now_s = 0.25
    flight.lost(D)
    flight.now_s = 0.26
    flight.question()
    flight.now_s = 0.27
    flight.depart(Placed("r", 2, "admitted", None, NodeAddress("e", "tcp://e")))
    flight.now_s = 0.4
    flight.take(Delta("r", 2, 0, [7], "length", timing=Timing(0.02, 0.12), account=Account(1, 1)))
    told = _told(flight)
    assert told["placement"] == ["e"]
    assert list(told["work"]) == ["e"]
    assert told["events"] == ["attempt 1: d stopped answering"]
    assert told["times"][0] == {"part": "earlier attempts", "seconds": pytest.approx(0.26)}
    assert all(one["seconds"] >= 0 for one in told["times"])
    assert sum(one["seconds"] for one in told["times"]) == pytest.approx(0.4)


def test_what_still_runs_can_be_asked_about() -> None:
    flight = _flight()
    told = explain(record_of("cmpl-1", None, flight, None), None)
    assert told["why"] == [
        "Asked for (chatbot): the first token within 500.0 ms, then a token every 100 ms. "
        "It was not placed yet.",
        "It is still running.",
    ]
    _printed(told)


def test_thinking_has_a_time_and_a_stage_of_its_own() -> None:
    flight = _flight(Slo("reasoning", 0.5, 0.1, 0.05))
    flight.think_end_id = 9
    flight.now_s = 0.01
    flight.depart(Placed("r", 1, "admitted", None, D))
    for index, token in enumerate([7, 7, 9, 7, 7]):
        flight.now_s = 0.1 + 0.1 * index
        flight.take(Delta("r", 1, index, [token], "length" if index == 4 else None,
                          timing=Timing(0.01, 0.09) if index == 0 else None))  # fmt: skip
    told = explain(record_of("cmpl-1", None, flight, None), None)
    assert [(stage["kind"], stage["tokens"]) for stage in told["stages"]] == [
        ("prefill", 1), ("thinking", 2), ("answer", 2),
    ]  # fmt: skip
    assert told["stages"][1]["due_s"] == pytest.approx(0.5 + 2 * 0.05)
    times = {one["part"]: one["seconds"] for one in told["times"]}
    assert times["thinking"] == pytest.approx(0.2)
    assert times["generating the answer"] == pytest.approx(0.2)
