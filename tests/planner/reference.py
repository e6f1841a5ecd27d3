"""A judge of the admission DP: every plan of its family, one after another, with nothing left out.

Plain recursion over the items in order of their time: at each, every way to the item, every start interval,
and to skip it. No dominance, no bounds, no cache; whole numbers throughout.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import lcm

from tests.planner.instances import Case, Job

ACTIVATION, PROMISED, NEWCOMER, MEMORY = range(4)


@dataclass(frozen=True, slots=True)
class Item:
    """Something to pass in order of time: a tier that becomes active, a promised prefill or a newcomer."""

    at: int
    kind: int
    position: int
    tier: str | None
    job: Job | None = None


@dataclass(frozen=True, slots=True)
class Label:
    """A plan so far: the last batch ends at `at`, with `left` tokens not charged to anybody.

    `since[k]`: tokens of the batches that began in interval k of the free KV or later; `held[k]`: KV taken.
    """

    at: int
    left: int
    held: tuple[int, ...]
    since: tuple[int, ...]
    joined: tuple[str, ...] = ()
    active: frozenset[str] = frozenset()
    accepted: tuple[str, ...] = ()
    began: int = -1  # the last batch


@dataclass(frozen=True, slots=True)
class Best:
    """The most value, and who is accepted for it. `kept`: the promised alone fit."""

    value: int
    admitted: tuple[str, ...]
    kept: bool


def best(case: Case) -> Best:
    """The most value of a plan of the family."""
    worth = {job.id: job.value for job in case.newcomers}
    sets = accepted_sets(case)
    if not sets:
        return Best(0, (), False)
    most = max(sets, key=lambda ids: (sum(worth[each] for each in ids), sorted(ids)))
    return Best(sum(worth[each] for each in most), tuple(sorted(most)), True)


def accepted_sets(case: Case) -> set[frozenset[str]]:
    """Every set of newcomers that some plan of the family accepts; empty if the promised alone do not fit."""
    items = _items(case)
    return {
        frozenset(label.accepted) for start in _initial(case) for label in _survivors(case, items, 0, start)
    }


def _items(case: Case) -> list[Item]:
    activations = [
        Item(at, ACTIVATION, i, name)
        for i, (name, _) in enumerate(case.tpots)
        if (at := _active_from(case, name))
    ]
    promised = [Item(job.deadline, PROMISED, i, job.tier, job) for i, job in enumerate(case.promised)]
    newcomers = [Item(job.deadline, NEWCOMER, i, job.tier, job) for i, job in enumerate(case.newcomers)]
    memory = [Item(at, MEMORY, k, None) for k, (at, _) in enumerate(case.free_kv) if k and _tight(case)]
    items = activations + promised + newcomers + memory
    return sorted(items, key=lambda item: (item.at, item.kind, item.position))


def _active_from(case: Case, tier: str) -> int | None:
    """When the first decode of a running tier comes within one TPOT of its due time; None: none runs."""
    dues = [each.due for each in case.runners if each.tier == tier]
    return max(0, min(dues) - dict(case.tpots)[tier]) if dues else None


def _initial(case: Case) -> Iterator[Label]:
    active = frozenset(name for name, _ in case.tpots if _active_from(case, name) == 0)
    intervals = len(case.free_kv)
    plain = Label(0, 0, (0,) * intervals, (0,) * intervals, active=active)
    length = _length(case, plain)
    first_due = min((each.due for each in case.runners), default=length)
    soonest = min(length, _shortest(case))
    if first_due >= soonest:
        yield plain
    if first_due >= length:
        return
    deadlines = [job.deadline for job in (*case.promised, *case.newcomers)]
    cuts = deadlines + [at for at, _ in case.free_kv if _tight(case)]
    for end in (first_due, *(cut for cut in cuts if 0 < cut < first_due)):
        label = replace(_after(case, plain, 0, end, case.cap(end)), at=end)
        if label.left >= _needed(case, end + soonest):
            yield label


def _survivors(case: Case, items: list[Item], index: int, label: Label) -> Iterator[Label]:
    if index == len(items):
        if _covers_the_rest(case, label):
            yield label
        return
    item = items[index]
    if item.kind in (NEWCOMER, MEMORY):
        yield from _survivors(case, items, index + 1, label)
    for arrived in _ways(case, item, label):
        for taken in _taken(case, item, arrived):
            yield from _survivors(case, items, index + 1, taken)


def _covers_the_rest(case: Case, label: Label) -> bool:
    """Whole batches until twice the longest pace after the last deadline cover what comes due in bunches."""
    deadlines = [job.deadline for job in (*case.promised, *case.newcomers)]
    until = max(deadlines, default=0) + 2 * max(case.longest, *(tpot for _, tpot in case.tpots))
    length = _length(case, label)
    if label.at + length <= until and label.left < _needed(case, label.at + length):
        return False
    while label.at + length <= until:
        label = _after(case, label, label.at, label.at + length, _budget(case, label, length))
        if label.left < _needed(case, label.at + length):
            return False
    return True


def _ways(case: Case, item: Item, label: Label) -> Iterator[Label]:
    """(a) whole batches up to the item; (b) a shorter one after them that ends at it."""
    late = dict(case.tpots)[item.tier] if item.kind == ACTIVATION and item.tier else 0
    if label.at > item.at + late:
        return
    length = _length(case, label)
    if label.at + length <= item.at and label.left < _needed(case, label.at + length):
        return  # what is due in a batch is in the one before it at the latest
    while label.at + length <= item.at:
        label = _after(case, label, label.at, label.at + length, _budget(case, label, length))
        if label.left < _needed(case, label.at + length):
            return
    yield label
    rest = item.at - label.at
    if rest <= 0 or (item.kind == ACTIVATION and late >= length):
        return
    if (budget := _budget(case, label, rest)) > 0 and label.left >= _needed(case, item.at):
        short = _after(case, label, label.at, item.at, budget)
        if short.left >= _needed(case, item.at + min(length, _shortest(case))):
            yield short


def _taken(case: Case, item: Item, label: Label) -> Iterator[Label]:
    joined, active = label.joined, label.active
    if item.kind == ACTIVATION and item.tier:
        active |= {item.tier}
    elif item.tier:
        joined = (*joined, item.tier)
    after = replace(label, joined=joined, active=active)
    if not _sustainable(case, joined):
        return
    needed = _needed(case, label.at + min(_length(case, after), _shortest(case)))
    if item.job is None:
        if label.left >= needed:
            yield after
        return
    charged = item.job.tokens + (1 if item.tier else 0)
    for start in _starts(case, item):
        usable = label.left if start == 0 else min(label.left, label.since[start])
        if usable - charged < needed:
            continue
        taken = replace(after, left=usable - charged)
        if item.kind == NEWCOMER:
            taken = replace(taken, held=_held(label, item.job, start), accepted=(*label.accepted, item.job.id))
        fits = all(used <= free for used, (_, free) in zip(taken.held, case.free_kv, strict=True))
        if fits and len(taken.accepted) <= case.free_seqs:
            yield taken


def _starts(case: Case, item: Item) -> Iterator[int]:
    yield 0
    if item.kind == NEWCOMER and _tight(case):
        yield from (k for k, (at, _) in enumerate(case.free_kv) if k > 0 and at < item.at)


def _tight(case: Case) -> bool:
    return any(sum(job.kv[k] for job in case.newcomers) > free for k, (_, free) in enumerate(case.free_kv))


def _held(label: Label, job: Job, start: int) -> tuple[int, ...]:
    return tuple(used + (job.kv[k] if k >= start else 0) for k, used in enumerate(label.held))


def _after(case: Case, label: Label, begin: int, end: int, tokens: int) -> Label:
    """One more batch, from `begin` to `end`."""
    since = tuple(
        sum_ + ((tokens + (_needed(case, end) if label.began < at else 0)) if begin >= at else 0)
        for sum_, (at, _) in zip(label.since, case.free_kv, strict=True)
    )
    return replace(label, at=end, left=label.left + tokens, since=since, began=begin)


def _length(case: Case, label: Label) -> int:
    tpots = dict(case.tpots)
    return min([case.longest, *(tpots[name] for name in (*label.joined, *label.active))])


def _shortest(case: Case) -> int:
    """A batch may always be as short as the tightest tier that runs asks for, binding or not."""
    tpots = dict(case.tpots)
    return min([case.longest, *(tpots[each.tier] for each in case.runners)])


def _budget(case: Case, label: Label, length: int) -> int:
    """Tokens of a batch less what joined decodes take of it at their rate, rounded down; may be negative."""
    share, whole = _fluid(case, label.joined, length)
    return (case.cap(length) * whole - share) // whole


def _needed(case: Case, before: int) -> int:
    """Tokens of running decodes that are due strictly before a tick, from the start on."""
    tpots = dict(case.tpots)
    return sum(-((each.due - before) // tpots[each.tier]) for each in case.runners if each.due < before)


def _sustainable(case: Case, joined: tuple[str, ...]) -> bool:
    tpots = dict(case.tpots)
    decoding = (*joined, *(each.tier for each in case.runners))
    length = min([case.longest, *(tpots[name] for name in decoding)])
    share, whole = _fluid(case, decoding, length)
    return not decoding or case.cap(length) * whole >= share


def _fluid(case: Case, decoding: tuple[str, ...], length: int) -> tuple[int, int]:
    """Tokens that these decodes take in `length` at their rates, as a fraction."""
    tpots = dict(case.tpots)
    whole = lcm(*tpots.values())
    return sum(length * whole // tpots[name] for name in decoding), whole
