"""Why was this slow, and why was it deferred? What is remembered of a request, and an answer in words.

The times of a request add up to its latency: every one of them is between two moments on the endpoint's clock,
or what a node says of the time between them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import accumulate
from typing import Any

from coordinator.endpoint.flight import Flight
from coordinator.endpoint.loops import Share
from engine.messages import Finished
from engine.request import StageKind
from engine.score import stage_times

Record = dict[str, Any]
ON_THE_WAY = "messages on their way"
GENERATING = "generating the answer"
THINKING = "thinking"


def record_of(
    public_id: str,
    session_id: str | None,
    flight: Flight,
    finished: Finished | None,
    share: Share | None = None,
) -> Record:
    """What is remembered of a request; it may still be running (`finished` None)."""
    passenger, slo = flight.passenger, flight.passenger.slo
    times_s = flight.token_times_s
    stages = [] if slo is None else stage_times(slo, times_s, flight.thinking_tokens)
    met: Mapping[str, bool] = {} if finished is None else finished.stages
    return {
        "request_id": public_id,
        "internal_id": passenger.request_id,
        "slo": None if slo is None else asdict(slo),
        "prompt_tokens": len(passenger.prompt_token_ids),
        "output_tokens": len(times_s),
        "attempts": flight.attempt,
        "gaps_s": list(flight.gaps_s),
        "outcome": "running" if finished is None else finished.outcome,
        "met": None if finished is None else finished.met,
        "stages": dict(met),
        "stage_times": [{**asdict(one), "met": met.get(str(one.kind))} for one in stages],
        "session_id": session_id,
        "loop": None if share is None else asdict(share),
        **asdict(flight.timeline),
    }


def explain(record: Record, decision: Record | None) -> Record:
    """What happened and why: `decision` is the coordinator's last one on this request, if it remembers any."""
    told = dict(decision or {})
    told.setdefault("candidates", [])
    times = parts(record)
    return {
        **told,
        "request_id": record["request_id"],
        "verdict": record["verdict"] or told.get("verdict", ""),
        "outcome": record["outcome"],
        "met": record["met"],
        "why": list(_sentences(record, told, times)),
        "stages": record["stage_times"],
        "times": [{"part": part, "seconds": seconds} for part, seconds in times],
        "placement": [node for node in (record["prefill_node"], record["decode_node"]) if node is not None],
        "work": {
            record[f"{role}_node"]: record[f"{role}_account"]
            for role in ("prefill", "decode")
            if record[f"{role}_account"] is not None
        },
        "events": record["events"],
        "timeline": record,
    }


def parts(record: Record) -> list[tuple[str, float]]:
    """Where the time went, in order; the sum is the time from arrival to the last thing that is known of it."""
    asked_s, placed_s = record["asked_s"], record["placed_s"]
    if asked_s is None:
        return []
    found = [("earlier attempts" if record["attempts"] > 1 else "reading the request", asked_s)]
    if placed_s is None or placed_s < asked_s:
        return found if record["ended_s"] is None else [*found, ("placing it", record["ended_s"] - asked_s)]
    found.append(("placing it", placed_s - asked_s))
    begun_s, node, timing = placed_s, record["decode_node"], record["decode"]
    if record["prefill_node"] is not None:
        until_s = record["handed_off_s"]
        found += _on_node(record["prefill_node"], record["prefill"], begun_s, until_s, "computing the prompt")
        if until_s is None:
            return _to_the_end(found, record, f"on {record['prefill_node']}")
        begun_s = until_s
    pair = record["prefill_node"] is not None
    what = "the next token" if pair else "computing the prompt"
    resumes = record["first_token_s"] is not None and record["first_token_s"] < asked_s
    before_s = record["taken_up_s"] if pair else record["resumed_s"] if resumes else record["first_token_s"]
    found += _on_node(node, timing, begun_s, before_s, what)
    if before_s is None:
        return _to_the_end(found, record, f"on {node}")
    for stage in record["stage_times"]:
        if stage["kind"] == StageKind.THINKING and stage["actual_s"] > before_s:
            found.append((THINKING, stage["actual_s"] - before_s))
            before_s = stage["actual_s"]
    ended_s = record["ended_s"]
    return found if ended_s is None else [*found, (GENERATING, ended_s - before_s)]


def _on_node(
    node: str, timing: Mapping[str, Any] | None, begun_s: float, until_s: float | None, what: str
) -> Iterator[tuple[str, float]]:
    """From the moment when it was sent to a node until what was asked for came back."""
    if timing is None or until_s is None:
        return
    pull_s = timing["pull_s"] or 0.0
    waited_s = max(timing["queued_s"] - pull_s, 0.0)
    if timing["pull_s"] is not None:
        yield f"moving KV to {node}", pull_s
    yield f"waiting on {node}", waited_s
    yield f"{what} on {node}", timing["first_token_s"] - waited_s - pull_s
    yield ON_THE_WAY, until_s - begun_s - timing["first_token_s"]


def _to_the_end(found: list[tuple[str, float]], record: Record, part: str) -> list[tuple[str, float]]:
    """With the time that is left over, where a request ended before it got any further."""
    ended_s = record["ended_s"]
    return found if ended_s is None else [*found, (part, ended_s - sum(seconds for _, seconds in found))]


def _sentences(record: Record, decision: Record, times: Sequence[tuple[str, float]]) -> Iterator[str]:
    yield _verdict(record, decision)
    if record["outcome"] == "running":
        yield "It is still running."
    elif record["slo"] is not None:
        yield from _stages(record, times)
    if record["loop"] is not None:
        yield from _loop(record["loop"])
    lost = [one for one in decision["candidates"] if not one["feasible"] and one["reason"]]
    for candidate in lost:
        yield f"{candidate['name']} was no candidate: {candidate['reason']}."
    yield from _kv(record)
    for role in ("prefill", "decode"):
        if record[f"{role}_account"] is not None:
            yield _work(record[f"{role}_node"], record[f"{role}_account"])
    yield from (f"{event[0].upper()}{event[1:]}." for event in record["events"])


def _verdict(record: Record, decision: Record) -> str:
    slo, known = record["slo"], record["reason"] or decision.get("reason", "")
    reason, told = known or "no reason is remembered", f" ({known})" if known else ""
    nodes = " and ".join(node for node in (record["prefill_node"], record["decode_node"]) if node is not None)
    if slo is None:
        return f"It carried no SLO, so nothing was promised; it ran on {nodes or 'no node'}."
    thinking_s = slo["thinking_tpot_s"]
    thinking = "" if thinking_s is None else f"{thinking_s * 1e3:g} ms while it thinks, "
    pace = f"a token every {thinking}{slo['tpot_s'] * 1e3:g} ms"
    wanted = f"Asked for ({slo['class_name']}): the first token within {_time(slo['ttft_s'])}, then {pace}."
    match record["verdict"]:
        case "admitted":
            return f"{wanted} That was promised, on {nodes}{told}."
        case "best_effort":
            return f"{wanted} That could not be promised: {reason}. It was deferred: best effort on {nodes}."
        case "refused" | "no_capacity":
            return f"{wanted} It was refused: {reason}."
    return f"{wanted} It was not placed{' yet' if record['outcome'] == 'running' else ''}."


def _stages(record: Record, times: Sequence[tuple[str, float]]) -> Iterator[str]:
    missed = [stage for stage in record["stage_times"] if stage["met"] is False]
    if record["met"]:
        yield "Every stage was kept."
    elif record["outcome"] != "completed":
        yield f"It did not complete: {record['outcome']}."
    elif record["verdict"] != "admitted":
        yield "What is not promised counts as missed, however quick it was."
    for stage in missed:
        if stage["late_s"] <= 0:
            continue
        late = f"late by {_time(stage['late_s'])}"
        if stage["kind"] == StageKind.PREFILL:
            part, seconds = max(_until(times, stage["actual_s"]), key=lambda one: one[1])
            share = f"most of it went into {part} ({_time(seconds)} of {_time(stage['actual_s'])})"
            yield f"The first token was {late}: {share}."
        else:
            due, actual = _time(stage["due_s"]), _time(stage["actual_s"])
            yield f"The {stage['kind']} was {late} at its worst; it was due at {due} and done at {actual}."


def _until(times: Sequence[tuple[str, float]], until_s: float) -> list[tuple[str, float]]:
    """The parts that had begun by then, as far as they had come."""
    begun_s = accumulate((seconds for _, seconds in times), initial=0.0)
    return [
        (part, min(seconds, until_s - begins_s))
        for (part, seconds), begins_s in zip(times, begun_s, strict=False)
        if begins_s < until_s
    ]


def _loop(loop: Mapping[str, Any]) -> Iterator[str]:
    expected = _count(loop["calls_left"], "call was", "calls were")
    left = f"{_time(loop['left_s'])} were left" if loop["left_s"] > 0 else f"{_time(-loop['left_s'])} too late"
    share = f"{_time(loop['share_s'])} of it for this one"
    yield f"Call {loop['call']} of its loop came when {left}; {expected} expected, with {share}."
    if "met" in loop:
        kept = "in time" if loop["met"] else "too late"
        due = f"it was due after {_time(loop['loop_s'])}"
        yield f"It was the last: the loop took {_time(loop['seconds'])}, {kept} ({due})."


def _kv(record: Record) -> Iterator[str]:
    cached = record["cached_tokens"]
    if cached:
        where = record["prefill_node"] or record["decode_node"]
        yield f"{cached} of {record['prompt_tokens']} prompt tokens had their KV on {where} already."
    pull = record["decode"]
    if pull is not None and pull["pull_outcome"] == "pulled":
        size = f"{pull['pulled_bytes'] / 1e6:.1f} MB of KV"
        yield f"{size} moved to {record['decode_node']} in {_time(pull['pull_s'])}."


def _work(node: str, account: Mapping[str, int]) -> str:
    words = f"{node}: {_count(account['batches'], 'batch', 'batches')}"
    if account["chunks"]:
        words += f", the prompt in {_count(account['chunks'], 'chunk', 'chunks')}"
    if account["held"]:
        words += f", held back in {account['held']} for others that were due"
    if account["drafted_tokens"]:
        words += f", {account['accepted_tokens']} of {account['drafted_tokens']} drafted tokens right"
    if account["preempted"]:
        words += f", lost its memory {_count(account['preempted'], 'time', 'times')}"
    return f"{words}."


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if abs(seconds) < 1 else f"{seconds:.2f} s"
