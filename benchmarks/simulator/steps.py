"""Steps of one simulated replica, compiled: a scheduler composes, the virtual engine runs it, time passes."""

from __future__ import annotations

import math
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

from benchmarks.baselines.distserve import decode_all, whole_prompts
from benchmarks.baselines.sarathi import chunked_prefill
from benchmarks.baselines.sarathi_edf import dynamic_chunks
from benchmarks.baselines.vllm import prefill_first
from engine.batch_kernel import POUR, compose_rows
from engine.compiled import compiled
from engine.messages import TELL_EVERY_S
from engine.rows import PULLING, ROW, CostArrays, Index, Rows
from engine.virtual_kernel import (
    BATCH,
    BLOCK_TOKENS,
    DRAFTED,
    FREE_BLOCKS,
    LIVE,
    MAX_BATCH_TOKENS,
    MAX_SEQS,
    NUM_BLOCKS,
    PREEMPTED,
    PROMISES_STARVED,
    RUNNING,
    SEQS,
    TOKENS,
    Replica,
    batch_s,
    carry_out,
    finish,
    preempt,
    runnable,
    start_pulls,
)

OURS, PREFILL_FIRST, CHUNKED, EDF, WHOLE_PROMPTS, DECODE_ALL = range(6)  # who composes
IDLE, PAUSED, EVENTS = range(3)  # why `advance` came back
ENDED, OFFERED = 0, 1  # kinds of events

CLOCK_S, REPORTED_S, BUSY_S, STEP_S, TOLD_OF_S = range(5)  # of `Station.times`


class Settings(NamedTuple):
    """Of the scheduler of a replica. `draft_tokens`: a fixed number for each verify, where it is not planned.
    `acceptance`: chance that a draft is right; `max_draft_tokens`: that the engine drafts, 0 for none."""

    composer: int
    token_budget: int
    draft_tokens: int
    relegate: bool
    least_chunk: int
    acceptance: float
    max_draft_tokens: int


class Station(NamedTuple):
    """A replica with its clock, its scratch space, and what it last reported of itself.

    `times` [5]: when its next step can begin, when it last reported, seconds of all steps, and of a usual one,
    and the moment of which that report tells.
    `events` [n, 2]: row and kind of what the last step ended. `report` [n]: copies of its live rows at the last
    report, of which `reported[0]` count; `reported_ids` says which rows they are; `reported[1]`: promises
    that were late for want of memory until then.
    """

    replica: Replica
    cost: CostArrays
    times: npt.NDArray[np.float64]
    active: Index
    order: Index
    pour: Rows
    events: Index
    report: Rows
    reported_ids: Index
    reported: Index

    @classmethod
    def of(cls, replica: Replica, cost: CostArrays) -> Self:
        """At time 0, idle."""
        most = len(replica.live)
        pour = np.zeros(1, dtype=POUR)
        pour["promised_s"] = -math.inf
        return cls(
            replica,
            cost,
            np.array([0.0, -math.inf, 0.0, 0.0, 0.0]),
            np.empty(most, dtype=np.int64),
            np.empty(most, dtype=np.int64),
            pour,
            np.empty((most, 2), dtype=np.int64),
            np.zeros(most, dtype=ROW),
            np.empty(most, dtype=np.int64),
            np.zeros(2, dtype=np.int64),
        )


@compiled
def take_report(station, rows, now_s):
    """Remember the replica as it is now, between two batches."""
    count = station.replica.counts[LIVE]
    for at in range(count):
        station.report[at] = rows[station.replica.live[at]]
        station.reported_ids[at] = station.replica.live[at]
    station.reported[0] = count
    station.reported[1] = station.replica.counts[PROMISES_STARVED]
    station.times[REPORTED_S] = station.times[TOLD_OF_S] = now_s


@compiled
def announce(station, rows, now_s, end_s):
    """Remember the replica as it will be when the batch that begins now has ended, as far as can be known: each
    of its sequences goes on, and a verify makes one token."""
    take_report(station, rows, now_s)
    station.times[TOLD_OF_S] = end_s
    for at in range(station.reported[0]):
        row = station.report[at]
        if row.chunk_tokens == 0:
            continue
        known = row.prompt_tokens + row.output_tokens
        if row.computed_tokens + row.chunk_tokens < known:
            row.computed_tokens += row.chunk_tokens
            continue
        row.computed_tokens = known
        if not row.offers:
            origin_s = max(row.first_due_s, end_s) if row.output_tokens == 0 else row.due_s
            row.due_s = origin_s + row.tpot_s
            row.output_tokens += 1


@compiled
def _compose(station, rows, active, now_s, settings):
    """Ask the scheduler of the replica. Returns how many tokens the batch may hold."""
    replica, order = station.replica, station.order[: len(active)]
    if settings.composer == OURS:
        pour = station.pour[0]
        counts = replica.counts
        pour.kv_tokens = counts[NUM_BLOCKS] * counts[BLOCK_TOKENS]
        pour.free_tokens = counts[FREE_BLOCKS] * counts[BLOCK_TOKENS]
        pour.free_slots = counts[MAX_SEQS] - counts[RUNNING]
        pour.coming_due_s = math.inf
        for at in range(counts[LIVE]):
            row = rows[replica.live[at]]
            if row.promised:
                pour.promised_s = now_s
            if row.pull == PULLING and row.promised:
                pour.coming_due_s = min(pour.coming_due_s, row.due_s)
        compose_rows(rows, active, now_s, station.cost, counts[MAX_BATCH_TOKENS], pour, order)
        for one in order[pour.seqs :]:
            if rows[one].gives_way:
                rows[one].gives_way = False
                preempt(replica, rows, one)
        return counts[MAX_BATCH_TOKENS]
    if settings.composer == PREFILL_FIRST:
        return prefill_first(replica, rows, active, settings.token_budget, settings.draft_tokens, order)
    if settings.composer == CHUNKED:
        return chunked_prefill(rows, active, settings.token_budget, settings.draft_tokens, order)
    if settings.composer == EDF:
        return dynamic_chunks(
            replica, rows, active, now_s, station.cost, settings.token_budget, settings.relegate,
            settings.least_chunk, order,
        )  # fmt: skip
    if settings.composer == WHOLE_PROMPTS:
        return whole_prompts(replica, rows, active, settings.token_budget, order)
    return decode_all(rows, active, order)


@compiled
def begin_pulls(station, rows, now_s, settings, started):
    """Start the pulls for which there is memory: ours as the plan of the next batch has them, the others first
    come first served. Returns how many; `started` names them."""
    replica = station.replica
    if settings.composer != OURS:
        return start_pulls(replica, rows, replica.live[: replica.counts[LIVE]], started)
    count = runnable(replica, rows, station.active, True)
    replica.batch[:BATCH] = 0
    _compose(station, rows, station.active[:count], now_s, settings)
    first = station.pour[0].seqs
    return start_pulls(replica, rows, station.order[first : first + station.pour[0].pulls], started)


@compiled
def advance(station, rows, until_s, settings, reports, token_times_s, first_time):
    """Step a replica that can begin a step before `until_s`, until then or until a step ended something.

    token_times_s: when each token was made; those of a row begin at first_time[row]. Returns why it came back
    and the number of events, which happened at `times[CLOCK_S]`.
    """
    replica, times = station.replica, station.times
    while times[CLOCK_S] < until_s:
        now_s = times[CLOCK_S]
        count = runnable(replica, rows, station.active, settings.composer == OURS)
        if count == 0:
            return IDLE, 0
        active = station.active[:count]
        replica.batch[:BATCH] = 0
        most = _compose(station, rows, active, now_s, settings)
        carry_out(replica, rows, station.order[:count], most)
        if replica.batch[TOKENS] == 0:
            if replica.batch[PREEMPTED] > 0:
                continue  # what they held is free now
            return IDLE, 0  # nothing fits beside what is held for others
        drafting = settings.max_draft_tokens > 0 and replica.batch[DRAFTED] > 0
        seconds = batch_s(replica, station.cost, settings.draft_tokens if drafting else 0)
        end_s = now_s + seconds
        if reports and (now_s >= times[REPORTED_S] + TELL_EVERY_S or seconds >= TELL_EVERY_S):
            announce(station, rows, now_s, end_s)
        finish(replica, rows, end_s, settings.acceptance, settings.max_draft_tokens)
        times[CLOCK_S] = end_s
        times[BUSY_S] += seconds
        times[STEP_S] = seconds if times[STEP_S] == 0 else times[STEP_S] + 0.1 * (seconds - times[STEP_S])
        events = 0
        for at in range(replica.batch[SEQS]):
            one = replica.members[at]
            row = rows[one]
            if row.new_tokens == 0:
                continue
            if row.offers:
                station.events[events, 0], station.events[events, 1] = one, OFFERED
                events += 1
                continue
            first = first_time[one] + row.output_tokens - row.new_tokens
            token_times_s[first : first + row.new_tokens] = end_s
            if row.output_tokens >= row.end_tokens:
                station.events[events, 0], station.events[events, 1] = one, ENDED
                events += 1
        if events > 0:
            return EVENTS, events
    return PAUSED, 0
