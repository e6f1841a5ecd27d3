"""What a node counts of its batches."""

from __future__ import annotations

from engine.base import BatchPlan, Seq, StepReport
from engine.tally import Tally


def _seq(work_id: str, *, computed: int, output: int = 0, running: bool = True) -> Seq:
    return Seq(work_id, 100, computed, output, running)


def test_chunks_and_skips_are_counted_and_whole_prompts_and_decodes_are_not() -> None:
    seqs = [
        _seq("part", computed=0),
        _seq("whole", computed=40),
        _seq("decode", computed=104, output=5),
        _seq("held", computed=104, output=5),
        _seq("waits", computed=0, running=False),
    ]
    chunks = {"part": 60, "whole": 60, "decode": 1}
    tally = Tally()
    tally.plan(BatchPlan(chunk_tokens=chunks, skip=frozenset({"held", "waits"})), seqs)
    assert (tally.chunked, tally.skipped) == (1, 1)
    tally.plan(BatchPlan(), seqs)
    assert (tally.chunked, tally.skipped) == (1, 1)


def test_batches_add_up() -> None:
    tally = Tally()
    report = StepReport(
        0.5, 9, 3, 3, 70, 0.0, drafted_tokens=6, accepted_tokens=4, preempted=1, planning_s=0.01
    )
    for _ in range(3):
        tally.batch(report, 0.4)
    assert (tally.busy_s, tally.drafted_tokens, tally.accepted_tokens, tally.preempted) == (1.5, 18, 12, 3)
    assert abs(tally.planning_s - 0.03) < 1e-12
    assert abs(tally.profiled_s - 1.2) < 1e-12
