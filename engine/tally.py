"""What a node has done since it started, counted: for those who ask what its batches were spent on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.base import BatchPlan, Seq, StepReport


@dataclass(slots=True)
class Tally:
    """Batches and their seconds, and in how many times a sequence was treated which way.

    `planning_s` of `busy_s` went into planning batches; by the step profile they would have taken `profiled_s`.
    `chunked`: a prompt got a part of what it had left; `skipped`: a running sequence was left out of a batch;
    `preempted`: one lost its KV. Drafts: how many tokens were verified, and how many of them were right.
    """

    busy_s: float = 0.0
    planning_s: float = 0.0
    profiled_s: float = 0.0
    chunked: int = 0
    skipped: int = 0
    preempted: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    def plan(self, plan: BatchPlan, seqs: Sequence[Seq]) -> None:
        """Count a batch as it is planned. (A prompt that finds no slot or no memory is counted as well.)"""
        chunks, skip = plan.chunk_tokens, plan.skip
        if not chunks and not skip:
            return
        for seq in seqs:
            if seq.work_id in skip:
                self.skipped += seq.running
            else:
                self.chunked += 0 < chunks.get(seq.work_id, 0) <= seq.prefill_left

    def batch(self, report: StepReport, profiled_s: float) -> None:
        """Count a batch that has ended."""
        self.busy_s += report.seconds
        self.planning_s += report.planning_s
        self.profiled_s += profiled_s
        self.preempted += report.preempted
        self.drafted_tokens += report.drafted_tokens
        self.accepted_tokens += report.accepted_tokens
