"""What is said of a request that is over: its score, and the message that counts it."""

from __future__ import annotations

import time
from dataclasses import replace

from coordinator.endpoint.flight import Flight
from coordinator.endpoint.slo import CUSTOM_CLASS, Asked
from engine.messages import Finished
from engine.request import StageKind
from engine.score import Score, missed, score
from kv_transfer.base import PullOutcome

USED = (PullOutcome.PULLED, PullOutcome.CACHED)


def finished_of(flight: Flight, outcome: str) -> Finished:
    """A flight that is over: `outcome` is completed, cancelled, refused or failed."""
    passenger, timeline = flight.passenger, flight.timeline
    result = score_of(flight, outcome)
    pull = timeline.decode
    return Finished(
        request_id=passenger.request_id,
        attempt=flight.attempt,
        class_name=None if passenger.slo is None else passenger.slo.class_name,
        outcome=outcome,
        verdict=timeline.verdict,
        met=result is not None and result.met,
        strict=result is not None and result.strict,
        goodput=result is not None and result.goodput,
        stages={} if result is None else {str(kind): met for kind, met in result.stages.items()},
        placement=timeline.placement,
        handoff_s=pull.pull_s if pull is not None and pull.pull_outcome in USED else None,
        kv_bytes=0 if pull is None else pull.pulled_bytes,
        prompt_tokens=len(passenger.prompt_token_ids),
        output_tokens=len(flight.token_times_s),
        nodes=flight.nodes,
        prefix_hashes=flight.prefix_hashes(),
        ended_itself=flight.ended_itself,
        session=None if flight.prefilling else passenger.session,  # what was for another node is not kept
    )


def turned_away(asked: Asked) -> Finished:
    """Refused at the door: a miss like any other, if it carried an SLO."""
    stages = () if asked.empty or asked.malformed else (StageKind.PREFILL, StageKind.ANSWER)
    return Finished(
        request_id=f"turned-away-{time.monotonic_ns()}",
        attempt=0,
        class_name=(asked.class_name or CUSTOM_CLASS) if stages else None,
        outcome="refused",
        verdict="no_capacity",
        met=False,
        strict=False,
        goodput=False,
        stages={str(kind): False for kind in stages},
        placement="none",
    )


def score_of(flight: Flight, outcome: str) -> Score | None:
    """None where there is nothing to score: no SLO, or a client that left before anything was late."""
    slo = flight.passenger.slo
    if slo is None:
        return None
    times_s = flight.token_times_s
    if outcome == "cancelled":
        seen_s = times_s or [flight.since_arrival_s()]
        in_time = score(slo, seen_s, completed=True, thinking_tokens=flight.thinking_tokens)
        return None if in_time.met else missed(in_time.stages)
    completed = outcome == "completed"
    result = score(slo, times_s, completed=completed, thinking_tokens=flight.thinking_tokens)
    if flight.timeline.verdict == "admitted":
        return result
    # Not promised is not kept. vLLM's goodput knows of no promises: it asks how quick it was.
    return replace(missed(result.stages), goodput=result.goodput)
