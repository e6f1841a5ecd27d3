"""A judge of the admission DP that knows nothing of its plans: it searches for the batches, tick by tick.

Searched: every sequence of batches that end on a whole tick, of any length that what is due allows, with idle
time between; in each, every choice of how many decodes of each tier make a token (a batch holds at most one
of each) and of how many prefill tokens there are; every start of the newcomers' KV that memory allows. Not
searched: batches that end between ticks, and prefills out of the order of their deadlines (among those whose
KV may be held), which could only help to make decode tokens before they are owed.

Kept: every deadline, and every token due until `HORIZON_TPOTS` of the slowest tier after the last deadline;
from then on a necessary condition only: the most efficient steady batch holds what the decodes need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import combinations, product
from math import lcm
from typing import Any

import numpy as np

from tests.planner.instances import Case, Job
from tests.planner.step_search import FOUND, UNDECIDED, enough_time, search

HORIZON_TPOTS = 3
EFFORT = 20_000_000  # comparisons of states in one search; beyond it the answer is Undecided


class Undecided(Exception):
    """The search was given up: too many states."""


def best(case: Case, known: int = 0) -> int:
    """The most value of a set that is feasible; 0 too if the promised alone are not. Raises Undecided.

    `known`: a value that some feasible set is known to have, so that only better ones are searched.
    """
    return _most_value(case, known, lambda ids: feasible(case, ids))


def at_most(case: Case, known: int = 0) -> int:
    """No less than `best`: a set whose search is given up counts as feasible."""

    def possibly(ids: frozenset[str]) -> bool:
        try:
            return feasible(case, ids)
        except Undecided:
            return True

    return _most_value(case, known, possibly)


def _most_value(case: Case, known: int, accepts: Callable[[frozenset[str]], bool]) -> int:
    """Over subsets, the most valuable first; what holds a refused set is refused too."""
    worth = {job.id: job.value for job in case.newcomers}
    sets = [frozenset(ids) for n in range(len(worth), 0, -1) for ids in combinations(worth, n)]
    sets.sort(key=lambda ids: -sum(worth[each] for each in ids))
    refused: list[frozenset[str]] = []
    for ids in sets:
        value = sum(worth[each] for each in ids)
        if value <= known:
            return known
        if any(smaller <= ids for smaller in refused):
            continue
        if accepts(ids):
            return value
        refused.append(_smallest_refused(case, ids))
    return known


def _smallest_refused(case: Case, ids: frozenset[str]) -> frozenset[str]:
    """A subset that is still plainly infeasible: it rules out more sets at once."""
    for each in sorted(ids):
        if len(ids) > 1 and _plainly_infeasible(case, ids - {each}):
            ids -= {each}
    return ids


def feasible(case: Case, accepted: Iterable[str]) -> bool:
    """Whether some sequence of batches keeps every promise, those to `accepted` included."""
    ids = frozenset(accepted)
    if _plainly_infeasible(case, ids):
        return False
    newcomers = [job for job in case.newcomers if job.id in ids]
    searches = [_rows(case, newcomers, starts) for starts in _earliest_starts(case, newcomers)]
    for effort in (EFFORT // 1000, EFFORT // 20, EFFORT):
        open_ = []
        for rows in searches:
            answers = [search(*rows, True, effort), search(*rows, False, effort)]
            if FOUND in answers:
                return True
            if answers[1] == UNDECIDED:
                open_.append(rows)
        if not open_:
            return False
        searches = open_
    raise Undecided(f"more than {EFFORT} comparisons")


def _plainly_infeasible(case: Case, ids: frozenset[str]) -> bool:
    """A cheap test that only ever says so of sets that are."""
    newcomers = [job for job in case.newcomers if job.id in ids]
    if len(newcomers) > case.free_seqs or not _steady(case, newcomers):
        return True
    if next(_earliest_starts(case, newcomers), None) is None:
        return True
    rows = _rows(case, newcomers, (0,) * len(newcomers))
    return not enough_time(*rows[:-1])


def _rows(case: Case, newcomers: list[Job], starts: tuple[int, ...]) -> tuple[Any, ...]:
    """The problem as `search` takes it: its first state, the cost, the tiers, and the jobs by deadline."""
    names, tpots = [name for name, _ in case.tpots], [tpot for _, tpot in case.tpots]
    pairs = [(job, 0) for job in case.promised]
    pairs += [(job, case.free_kv[k][0]) for job, k in zip(newcomers, starts, strict=True)]
    pairs.sort(key=lambda pair: pair[0].deadline)
    jobs = [job for job, _ in pairs]
    dues = [
        sorted(
            [each.due for each in case.runners if each.tier == name]
            + [job.deadline + tpot for job in jobs if job.tier == name]
        )
        for name, tpot in case.tpots
    ]
    last = max([0, *(job.deadline for job in jobs), *(each.due for each in case.runners)])
    offsets = [1 + len(jobs) + sum(len(each) for each in dues[:i]) for i in range(len(dues) + 1)]
    return (
        np.array([0, *(job.tokens for job in jobs), *(due for each in dues for due in each)], np.int64),
        case.base,
        case.rate,
        case.max_batch_tokens,
        last + HORIZON_TPOTS * max(tpots),
        np.array(tpots, np.int64),
        np.array(offsets, np.int64),
        np.array([job.deadline for job in jobs], np.int64),
        np.array([names.index(job.tier) if job.tier else -1 for job in jobs], np.int64),
        np.array([start for _, start in pairs], np.int64),
    )


def _earliest_starts(case: Case, newcomers: list[Job]) -> Iterator[tuple[int, ...]]:
    """Start intervals that memory allows, none of which could be earlier alone or all together."""
    found: list[tuple[int, ...]] = []
    for starts in sorted(product(range(len(case.free_kv)), repeat=len(newcomers)), key=sum):
        if any(all(a <= b for a, b in zip(other, starts, strict=True)) for other in found):
            continue
        if _fits(case, newcomers, starts):
            found.append(starts)
            yield starts


def _fits(case: Case, newcomers: list[Job], starts: tuple[int, ...]) -> bool:
    return all(
        sum(job.kv[k] for job, start in zip(newcomers, starts, strict=True) if start <= k) <= free
        for k, (_, free) in enumerate(case.free_kv)
    )


def _steady(case: Case, newcomers: list[Job]) -> bool:
    """The longest batches that the fastest tier allows hold a token per TPOT of every decode."""
    tpots = dict(case.tpots)
    tiers = [job.tier for job in (*case.promised, *newcomers) if job.tier] + [
        each.tier for each in case.runners
    ]
    if not tiers:
        return True
    length = min(case.longest, *(tpots[tier] for tier in tiers))
    whole = lcm(*tpots.values())
    return sum(length * whole // tpots[tier] for tier in tiers) <= case.cap(length) * whole
