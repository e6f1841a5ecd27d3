"""The bound on arrivals as they are: work fits only between arrival and the last due token.

Serve as much as possible of requests of work c_i, each anywhere in its window, `capacity` seconds of work a
second: a linear program. What can be placed is a polymatroid (it is limited, between any two times, by what has
its window between them), and the gain is linear in what is placed, so taking what gains most for its work
first, as much as still fits, is optimal. Time is cut into buckets and windows are rounded outward.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from benchmarks.workload import Floats, Ints, Workload
from engine.cost import StepCost
from engine.score import TOLERANCE

BUCKETS = 400
MAX_BATCH_TOKENS = 2048
DRAIN_S = 25.0  # after the last deadline of chains in time: a run has 20 s to drain, and deadlines round
ROUNDING_S = 1e-9
ONE_BY_ONE = 4  # so few jobs are placed one after another


@dataclass(frozen=True, slots=True, eq=False)
class Windows:
    """Columns [requests], seconds: when work may begin, by when the prompt and all of it must be done.

    `slowest_tpot_s`: the loosest pace of any of its tokens. All with the score's tolerance.
    """

    begin_s: Floats
    prefill_end_s: Floats
    end_s: Floats
    slowest_tpot_s: Floats
    chained: np.ndarray

    @classmethod
    def of(cls, workload: Workload, cost: StepCost, max_batch_tokens: int = MAX_BATCH_TOKENS) -> Windows:
        """The windows that the score leaves.

        A call of a chain comes when the one before has ended, whenever that is: its window begins after the
        delays before it and is open until `DRAIN_S` after the last deadline of chains that are in time.
        """
        paces = [workload.slo_classes[name] for name in workload.class_names]
        tpot_s = np.array([pace.tpot_ms / 1e3 for pace in paces])[workload.class_index]
        thinking = [pace.thinking_tpot_ms or pace.tpot_ms for pace in paces]
        thinking_s = np.array([tpot_ms / 1e3 for tpot_ms in thinking])[workload.class_index]
        thought = np.maximum(np.minimum(workload.thinking_tokens, workload.output_tokens), 1)
        decode_s = (thought - 1) * thinking_s + (workload.output_tokens - thought) * tpot_s
        span_s = _ttft_s(workload, cost, max_batch_tokens) * (1 + TOLERANCE)
        begin_s, due_s = workload.arrival_s.astype(float), np.zeros(len(workload))
        for call, parent in enumerate(workload.parent.tolist()):
            came_s = begin_s[call]
            if parent >= 0:
                begin_s[call] = begin_s[parent] + workload.delay_s[call]
                came_s = due_s[parent] + workload.delay_s[call]
            due_s[call] = came_s + span_s[call] + decode_s[call] * (1 + TOLERANCE)
        chained = workload.parent >= 0
        open_end_s = due_s.max(initial=0.0) + DRAIN_S
        return cls(
            begin_s,
            np.where(chained, open_end_s, begin_s + span_s),
            np.where(chained, open_end_s, due_s),
            np.maximum(tpot_s, thinking_s) * (1 + TOLERANCE),
            chained,
        )

    def __getitem__(self, rows: Ints | np.ndarray) -> Windows:
        return Windows(*(getattr(self, name)[rows] for name in self.__slots__))

    def end_after_s(self, tokens: Ints) -> Floats:
        """[requests]: by when `tokens` of output must be done, at the loosest pace."""
        return np.where(self.chained, self.end_s, self.prefill_end_s + (tokens - 1) * self.slowest_tpot_s)


def faster(workload: Workload, factor: float) -> Workload:
    """The same requests, arriving `factor` times as fast."""
    return replace(workload, arrival_s=workload.arrival_s / factor, duration_s=workload.duration_s / factor)


def most_placed(
    begin_s: Floats, end_s: Floats, work_s: Floats, gain: Floats, capacity: float, buckets: int = BUCKETS
) -> Floats:
    """[jobs]: the share of each that is placed where the sum of `gain` is the most that any schedule has.

    `work_s`: above 0, of one replica; `capacity`: replicas.
    """
    placed = np.zeros(len(work_s))
    if not len(work_s):
        return placed
    start_s = float(begin_s.min())
    width_s = (float(end_s.max()) - start_s) / buckets
    first = np.clip((begin_s - start_s) // width_s, 0, buckets - 1).astype(np.int64)
    last = np.clip(np.ceil((end_s - start_s) / width_s), first + 1, buckets).astype(np.int64) - 1
    order = np.argsort(work_s / gain, kind="stable")
    line = _Line(buckets, capacity * width_s)
    placed[order] = line.place(first[order], last[order], work_s[order]) / work_s[order]
    return placed


def runs(first: Ints, counts: Ints) -> tuple[Ints, Ints]:
    """For each of several runs `first, first + 1, ...` of `counts`: which run it is of, and the number."""
    run = np.repeat(np.arange(len(counts)), counts)
    return run, first[run] + np.arange(len(run)) - (np.cumsum(counts) - counts)[run]


class _Line:
    """Time in buckets. `slack_s[s, t]`: work that still fits with its windows within buckets s to t."""

    def __init__(self, buckets: int, bucket_s: float) -> None:
        length = np.arange(buckets) - np.arange(buckets)[:, None] + 1.0
        self.slack_s = np.where(length > 0, length * bucket_s, np.inf)

    def place(self, first: Ints, last: Ints, work_s: Floats) -> Floats:
        """[jobs], seconds placed of each, the first ones first. What all fits is placed at once."""
        placed_s = np.zeros(len(work_s))
        if len(work_s) <= ONE_BY_ONE:
            for job, (begin, end) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):
                beside_s = self.slack_s[: begin + 1, end:]
                placed_s[job] = min(work_s[job], max(beside_s.min(), 0.0))
                beside_s -= placed_s[job]
            return placed_s
        within_s = self._within_s(first, last, work_s)
        if (within_s <= self.slack_s + ROUNDING_S).all():
            self.slack_s -= within_s
            return work_s
        open_ = np.flatnonzero(self._room_s()[first, last] > ROUNDING_S)
        for half in np.array_split(open_, 2):
            placed_s[half] = self.place(first[half], last[half], work_s[half])
        return placed_s

    def _within_s(self, first: Ints, last: Ints, work_s: Floats) -> Floats:
        """[s, t]: work of jobs with their windows within."""
        buckets = len(self.slack_s)
        at = np.bincount(first * buckets + last, work_s, buckets**2).reshape(buckets, buckets)
        return np.asarray(at[::-1].cumsum(axis=0)[::-1].cumsum(axis=1))

    def _room_s(self) -> Floats:
        """[s, t]: the least slack of all that holds s to t."""
        over = np.minimum.accumulate(self.slack_s, axis=0)
        return np.minimum.accumulate(over[:, ::-1], axis=1)[:, ::-1]


def _ttft_s(workload: Workload, cost: StepCost, max_batch_tokens: int) -> Floats:
    """[requests]: the promised time to the first token, by that of each prompt alone on an idle replica."""
    prompts, row = np.unique(workload.prompt_tokens, return_inverse=True)
    alone_s = np.array([cost.prefill_alone_s(prompt, max_batch_tokens) for prompt in prompts.tolist()])[row]
    ttft_s = np.empty(len(workload))
    for index, name in enumerate(workload.class_names):
        rows, promised = workload.class_index == index, workload.slo_classes[name]
        scaled_s = np.maximum(promised.ttft_scale * alone_s[rows], promised.ttft_floor_ms / 1e3)
        ttft_s[rows] = scaled_s if promised.ttft_ms is None else promised.ttft_ms / 1e3
    return ttft_s
