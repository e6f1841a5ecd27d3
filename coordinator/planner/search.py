"""The label search behind admission: Algorithm 1 in whole batches, compiled.

`search` takes the items in order of deadline. For each, labels that cannot win any more are left out
(`_bound`), the others have children that took it (`_take`), and those of both that nothing dominates go on
(`_go_on`).

Everything is a flat array: this module is compiled by numba (which comes with vLLM), in about 50 times less
time a call than the same code in Python. There is one function that is called from Python: each would compile
all that it calls once more.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from coordinator.planner.budget import (
    EPS_S,
    EPS_TOKENS,
    batch_length_s,
    held_tokens,
    needed_tokens,
    net_budget,
    sustainable,
)
from coordinator.planner.given import ACTIVATE, DROPPED, MANDATORY, NEWCOMER, OPTIONAL, given_of
from coordinator.planner.labels import (
    SHORT,
    SKIPPED,
    WHOLE,
    enter,
    inherit,
    no_labels,
    rounded,
    rows_of,
    undominated,
)
from engine.compiled import compiled, compiled_bare, inlined

EPS_VALUE = 1e-12
BEAM = 128  # labels that go on from an item that must be taken


class Now(NamedTuple):
    """As a search goes on in time: [T] tiers that bind by now, what a step costs for them; room to count in."""

    active: np.ndarray[Any, Any]
    step_s: np.ndarray[Any, Any]
    nobody: np.ndarray[Any, Any]  # [T] zeros
    counts: np.ndarray[Any, Any]  # [T] of a child
    gained: np.ndarray[Any, Any]  # [K] tokens of the batches before it that began in or after an interval


@compiled
def search(modes, lower, order, limit, *flat):  # type: ignore[no-untyped-def]
    """Best value over the optional items (-1: none), and the decisions that give it. At most `limit` labels.

    modes: [I], flat: Given.flat(). Labels that cannot beat `lower` are left out. Then the items of `order` are
    taken one by one, each if it fits beside those that must be: the search of the last that did is returned.
    Returns the value, budget left, how many labels there were, whether some were lost for want of room, and a
    row per item taken, in order: item, ending, start interval, time before and after, length and number of
    whole batches. Changes `modes` by `order`.
    """
    given = given_of(flat)
    labels = no_labels(given, limit)  # once: to ask the system for them takes longer than most searches
    found = (-1.0, 0.0, 0, False, np.empty((0, 7)))
    for turn in range(-1, len(order)):
        if turn >= 0:
            modes[order[turn]] = MANDATORY
        beside = _search(labels, given, modes, lower if turn < 0 else -1.0)
        if turn < 0 or beside[0] >= 0:
            found = beside
        else:
            modes[order[turn]] = DROPPED
    return found


@inlined
def _search(labels, given, modes, lower):  # type: ignore[no-untyped-def]
    now = _at_once(given)
    shortest_s = _shortest_s(given)
    made = _begin(labels, given, now, modes, shortest_s)
    for label in range(made):
        labels.current[label] = label
    alive, overflow = made, False
    for item in range(len(modes)):
        if modes[item] == DROPPED:
            continue
        labels.heads[:] = -1
        if modes[item] == OPTIONAL:
            alive = _bound(labels, alive, given, now, modes, item, lower)
        first_new = made
        made, lost = _take(labels, alive, made, given, now, item, shortest_s)
        alive, cut = _go_on(labels, alive, first_new, made, given, now, modes[item] == OPTIONAL)
        overflow = overflow or lost or cut
        if given.items.kinds[item] == ACTIVATE:
            tier = given.items.tiers[item]
            now.active[tier] = True
            now.step_s[tier] = given.tiers.tier_s[tier]
        if alive == 0:
            break
    best = _best(labels, alive, given, now)
    rows = rows_of(labels, best)
    if best < 0:
        return -1.0, 0.0, made, overflow, rows
    return labels.value[best], labels.budget[best], made, overflow, rows


@compiled
def _at_once(given):  # type: ignore[no-untyped-def]
    """A tier that does not bind yet is ahead: until then its decodes may be left out, and cost nothing."""
    tiers = given.tiers
    count = len(tiers.period_s)
    now = Now(
        np.zeros(max(count, 1), np.bool_),
        np.zeros(count),
        np.zeros(max(count, 1), np.int64),
        np.zeros(max(count, 1), np.int64),
        np.zeros(len(given.memory.from_s)),
    )
    for tier in range(count):
        now.active[tier] = tiers.running[tier] > 0 and tiers.active_s[tier] <= 0.0
        if now.active[tier]:
            now.step_s[tier] = tiers.tier_s[tier]
    return now


@compiled_bare
def _shortest_s(given):  # type: ignore[no-untyped-def]
    """The tightest pace of all that run, whether its tier binds by now or not: any batch may be as short.

    What a label holds must reach to the end of such a batch, and to the end of a longer one that follows.
    """
    shortest_s = given.cost.full_s
    for tier in range(len(given.tiers.period_s)):
        if given.tiers.running[tier] > 0:
            shortest_s = min(shortest_s, given.tiers.period_s[tier])
    return shortest_s


@compiled_bare
def _begin(labels, given, now, modes, shortest_s):  # type: ignore[no-untyped-def]
    """Where plans begin: at once, or after a short batch that ends when a token is due. Returns how many."""
    cost, tiers, dues, items, memory = given.cost, given.tiers, given.dues, given.items, given.memory
    length_s = batch_length_s(cost, tiers, now.nobody, now.active)
    made = 0
    first_due_s = dues.due_s[0] if len(dues.due_s) > 0 else np.inf
    if first_due_s >= min(length_s, shortest_s) - EPS_S:
        labels.t[0], labels.budget[0] = 0.0, 0.0
        labels.since[0, :] = 0.0
        made = 1
    if first_due_s < length_s - EPS_S:
        for item in range(-1, len(items.kinds)):
            end_s = first_due_s if item < 0 else items.deadlines_s[item]
            if item >= 0 and (
                items.kinds[item] == ACTIVATE or modes[item] == DROPPED or not 0 < end_s < first_due_s
            ):
                continue
            held = held_tokens(end_s, end_s + length_s, cost, tiers, now.nobody, now.step_s)
            if held >= needed_tokens(end_s + min(length_s, shortest_s), dues) and made < len(labels.t):
                labels.t[made], labels.budget[made] = rounded(end_s), held
                for k in range(len(memory.from_s)):
                    labels.since[made, k] = held if memory.from_s[k] <= EPS_S else 0.0
                made += 1
    for label in range(made):
        labels.value[label], labels.seqs[label], labels.code[label] = 0.0, 0, 0
        labels.parent[label], labels.item[label] = -1, -1
        labels.ending[label], labels.start[label] = SKIPPED, 0
        labels.counts[label, :] = 0
        labels.began[label] = 0.0 if labels.t[label] > 0 else -1.0
        labels.mem[label, :] = 0.0
        labels.dead[label] = False
    return made


@compiled_bare
def _bound(labels, alive, given, now, modes, item, lower):  # type: ignore[no-untyped-def]
    """Leave out labels that cannot beat `lower` with all that is to come; the others may skip the item.

    What is to come: budget and memory until the last deadline, the rest taken in part. Returns how many of
    them are left.
    """
    cost, tiers, items, memory, bounds = given.cost, given.tiers, given.items, given.memory, given.bounds
    last_s = 0.0
    for other in range(item, len(modes)):
        if modes[other] == OPTIONAL and items.kinds[other] == NEWCOMER:
            last_s = max(last_s, items.deadlines_s[other])
    kept = 0
    for place in range(alive):
        label = labels.current[place]
        length_s = batch_length_s(cost, tiers, labels.counts[label], now.active)
        rate = net_budget(length_s, length_s, cost, tiers, now.nobody, now.step_s) + 1.0
        budget = labels.budget[label] - needed_tokens(last_s, given.dues)
        budget += max(last_s - labels.t[label], 0.0) / length_s * rate + 1.0
        most = _most_by(bounds.by_budget, item, modes, items.tokens, items.values, budget)
        if memory.tight and labels.value[label] + most > lower + EPS_VALUE:
            k = bounds.interval
            room = memory.free[k] - labels.mem[label, k]
            most = min(most, _most_by(bounds.by_memory, item, modes, items.kv[:, k], items.values, room))
        if labels.value[label] + most <= lower + EPS_VALUE:
            continue
        labels.current[kept] = label
        kept += 1
        enter(labels, label)
    return kept


@compiled_bare
def _most_by(order, first, modes, sizes, values, budget):  # type: ignore[no-untyped-def]
    """Most value of optional items from `first` on within `budget`, with the last one taken in part."""
    total = 0.0
    for item in order:
        if item >= first and modes[item] == OPTIONAL:
            if sizes[item] <= budget:
                budget -= sizes[item]
                total += values[item]
            else:
                if budget > 0:
                    total += values[item] * budget / sizes[item]
                break
    return total


@compiled_bare
def _take(labels, alive, made, given, now, item, shortest_s):  # type: ignore[no-untyped-def]
    """Children of the living labels, that took the item. Returns labels made, and whether some were lost.

    Batches run to its deadline: whole ones, and then perhaps a short one that ends there (`way`).
    """
    cost, tiers, dues, items, memory = given.cost, given.tiers, given.dues, given.items, given.memory
    newcomer, activation = items.kinds[item] == NEWCOMER, items.kinds[item] == ACTIVATE
    deadline_s, tier = items.deadlines_s[item], items.tiers[item]
    allowed_s = deadline_s + (tiers.period_s[tier] if activation else 0.0)
    ahead = tiers.slots[tier] if tier >= 0 and not activation else 0.0
    counts = now.counts
    lost = False
    for place in range(alive):
        label = labels.current[place]
        at_s = labels.t[label]
        if at_s > allowed_s + EPS_S or (newcomer and labels.seqs[label] + 1 > memory.free_seqs):
            continue
        length_s = batch_length_s(cost, tiers, labels.counts[label], now.active)
        each = net_budget(length_s, length_s, cost, tiers, labels.counts[label], now.step_s)
        batches = max(0, math.floor((deadline_s - at_s) / length_s + EPS_S))
        end_s = at_s + batches * length_s
        if not _covered_on_the_way(labels, label, length_s, each, batches, given):
            continue
        for other in range(len(counts)):
            counts[other] = labels.counts[label, other]
        if tier >= 0 and not activation:
            counts[tier] += 1
            if not sustainable(cost, tiers, counts):
                continue
        after_s = min(_length_after(item, given, now), shortest_s)
        for way in (WHOLE, SHORT):
            gained = batches * each
            until_s = end_s
            if way == SHORT:
                if activation and tiers.period_s[tier] >= length_s:
                    break
                short = _short_tokens(
                    labels, label, given, now, gained, end_s, deadline_s, length_s, shortest_s
                )
                if short <= 0:
                    break
                gained += short
                until_s = deadline_s
            if memory.tight:
                _gain(labels, label, given, now, way, length_s, each, batches, gained, until_s)
            due = needed_tokens(until_s + after_s, dues)
            starts = len(memory.from_s) if memory.tight and newcomer else 1
            for start in range(starts):
                if start > 0 and memory.from_s[start] >= deadline_s:
                    break
                usable = labels.budget[label] + gained
                if start > 0:  # only of batches that began when its memory was there
                    usable = min(usable, labels.since[label, start] + now.gained[start])
                left = usable - items.tokens[item] - ahead
                if left < due or (newcomer and not _fits(labels, label, given, item, start)):
                    continue
                if made >= len(labels.t):
                    lost = True
                    break
                labels.t[made], labels.budget[made] = rounded(until_s), left
                labels.began[made] = labels.began[label]
                if way == SHORT:
                    labels.began[made] = end_s
                elif batches > 0:
                    labels.began[made] = at_s + (batches - 1) * length_s
                labels.stretch[made, 0], labels.stretch[made, 1] = length_s, batches
                labels.ending[made], labels.start[made] = way, start
                inherit(labels, made, label, given, item, counts, now.gained)
                if undominated(labels, made, memory):
                    made += 1
    return made, lost


@inlined
def _short_tokens(  # type: ignore[no-untyped-def]
    labels, label, given, now, gained, from_s, until_s, length_s, shortest_s
):
    """What a short batch after whole ones holds; 0 if there is none, or what is due would not be covered."""
    short, before = 0.0, labels.budget[label] + gained
    if until_s - from_s > EPS_S and before >= needed_tokens(until_s, given.dues):
        rest_s = until_s - from_s
        counts = labels.counts[label]
        short = net_budget(rest_s, rest_s + length_s, given.cost, given.tiers, counts, now.step_s)
        if before + short < needed_tokens(until_s + min(length_s, shortest_s), given.dues):
            short = 0.0
    return short


@compiled_bare
def _covered_on_the_way(labels, label, length_s, each, batches, given):  # type: ignore[no-untyped-def]
    """Whether each of the next batches covers what is due before the one after it ends."""
    tiers, dues = given.tiers, given.dues
    if batches == 0:
        return True
    if labels.budget[label] < needed_tokens(labels.t[label] + length_s, dues):
        return False
    most_due = 0.0
    for tier in range(len(tiers.period_s)):
        most_due += tiers.running[tier] * tiers.slots[tier] * math.ceil(length_s / tiers.period_s[tier])
    if each >= most_due:
        return True
    return _covered(labels, label, length_s, each, 1, batches, dues)


@compiled_bare
def _covered(labels, label, length_s, each, first, last, dues):  # type: ignore[no-untyped-def]
    for batch in range(first, last + 1):
        due = needed_tokens(labels.t[label] + (batch + 1) * length_s, dues)
        if labels.budget[label] + batch * each < due:
            return False
    return True


@inlined
def _length_after(item, given, now):  # type: ignore[no-untyped-def]
    """The length of batches once the item was taken, with the counts of the child."""
    cost, tiers, items, counts = given.cost, given.tiers, given.items, now.counts
    tier = items.tiers[item]
    if items.kinds[item] != ACTIVATE or now.active[tier]:
        return batch_length_s(cost, tiers, counts, now.active)
    now.active[tier] = True
    after_s = batch_length_s(cost, tiers, counts, now.active)
    now.active[tier] = False
    return after_s


@compiled_bare
def _gain(  # type: ignore[no-untyped-def]
    labels, label, given, now, way, length_s, each, batches, gained, until_s
):
    """[K] tokens of the batches that begin when interval k has; what ran before them is credited once."""
    memory, dues = given.memory, given.dues
    at_s = labels.t[label]
    end_s = at_s + batches * length_s
    for k in range(1, len(memory.from_s)):
        from_s = memory.from_s[k] - EPS_S
        first = max(0, math.ceil((from_s - at_s) / length_s))
        now.gained[k] = max(batches - first, 0) * each
        if first < batches and (first > 0 or labels.began[label] < from_s):
            now.gained[k] += needed_tokens(at_s + (first + 1) * length_s, dues)
        if way == SHORT and end_s >= from_s:
            now.gained[k] += gained - batches * each
            before_s = at_s + (batches - 1) * length_s if batches > 0 else labels.began[label]
            if before_s < from_s:
                now.gained[k] += needed_tokens(until_s, dues)


@inlined
def _fits(labels, label, given, item, start):  # type: ignore[no-untyped-def]
    """Whether the KV of a newcomer fits in each interval from `start` on."""
    memory, items = given.memory, given.items
    for k in range(start, len(memory.from_s)):
        if labels.mem[label, k] + items.kv[item, k] > memory.free[k] + EPS_TOKENS:
            return False
    return True


@compiled
def _go_on(labels, alive, first_new, made, given, now, optional):  # type: ignore[no-untyped-def]
    """Who goes on: those that skip (if they may), and those that took the item.

    Where an item must be taken, at most `BEAM` ways of having done so: those with most budget at one time.
    Returns how many, and whether there were more.
    """
    cost, tiers, current, following = given.cost, given.tiers, labels.current, labels.following
    on = 0
    if optional:
        for place in range(alive):
            if not labels.dead[current[place]]:
                following[on] = current[place]
                on += 1
    for label in range(first_new, made):
        if not labels.dead[label]:
            following[on] = label
            on += 1
    if optional or on <= BEAM:
        for place in range(on):
            current[place] = following[place]
        return on, False
    ranks = np.empty(on)
    for place in range(on):
        label = following[place]
        length_s = batch_length_s(cost, tiers, labels.counts[label], now.active)
        each = net_budget(length_s, length_s, cost, tiers, labels.counts[label], now.step_s)
        ranks[place] = labels.budget[label] - labels.t[label] / length_s * each
    best_first = np.argsort(-ranks)
    for place in range(BEAM):
        current[place] = following[best_first[place]]
    return BEAM, True


@compiled_bare
def _best(labels, alive, given, now):  # type: ignore[no-untyped-def]
    """The label of most value that also covers what comes due in bunches after its last decision; -1: none."""
    cost, tiers, dues = given.cost, given.tiers, given.dues
    best = -1
    for place in range(alive):
        label = labels.current[place]
        if best >= 0 and labels.value[label] <= labels.value[best] + EPS_VALUE:
            continue
        length_s = batch_length_s(cost, tiers, labels.counts[label], now.active)
        each = net_budget(length_s, length_s, cost, tiers, labels.counts[label], now.step_s)
        last = math.floor((dues.horizon_s + EPS_S - labels.t[label]) / length_s)
        if _covered(labels, label, length_s, each, 0, last, dues):
            best = label
    return best
