"""A judge of the admission DP in one tier without a limit of memory: Moore and Hodgson's rule (1968).

With batches of one TPOT each, deadlines on their grid and requests of equal value, to admit the most is the
problem of the fewest late jobs: a prefill takes its tokens, and for every TPOT after its deadline one less is
left for the others. So it is as if its length were fixed, and the rule is exact: accept in order of deadline,
and whenever one cannot be met drop the longest of the accepted.
"""

from __future__ import annotations

from tests.planner.instances import Case, Job


def most_admitted(case: Case) -> int:
    """The most newcomers that can be accepted; -1 if the promised alone do not fit.

    For cases of one tier in which a decode runs whose first token is due at the TPOT, all deadlines are
    multiples of the TPOT, memory is ample, batches may last a TPOT, and every job has the tier.
    """
    jobs = sorted(((job, True) for job in case.promised), key=lambda pair: pair[0].deadline)
    jobs = sorted(
        [*jobs, *((job, False) for job in case.newcomers)], key=lambda pair: (pair[0].deadline, not pair[1])
    )
    kept: list[tuple[Job, bool]] = []
    for pair in jobs:
        kept.append(pair)
        while not _meets(case, kept, pair[0].deadline):
            droppable = [other for other in kept if not other[1]]
            if not droppable:
                return -1
            kept.remove(max(droppable, key=lambda other: _length(case, other[0])))
    return sum(not mandatory for _, mandatory in kept)


def _length(case: Case, job: Job) -> int:
    """Tokens that it takes up to any later deadline D, less D / TPOT."""
    (_, tpot), *_ = case.tpots
    return job.tokens - job.deadline // tpot


def _meets(case: Case, kept: list[tuple[Job, bool]], deadline: int) -> bool:
    (_, tpot), *_ = case.tpots
    batches = deadline // tpot
    tokens = sum(job.tokens + 1 + batches - job.deadline // tpot for job, _ in kept)
    return tokens <= batches * case.cap(tpot) - _running(case, deadline + tpot)


def _running(case: Case, before: int) -> int:
    return sum(len(range(each.due, before, tpot)) for each in case.runners for _, tpot in case.tpots)
