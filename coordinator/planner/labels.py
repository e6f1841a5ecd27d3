"""The label search behind admission: Algorithm 1 in whole batches, compiled.

A label is a way to have decided on the items so far: `t`, the end of its last batch; `pb`, tokens that its
batches could hold beyond what was taken out of them; `mem`, KV per memory interval; `w`, what batches that
began in or after an interval could hold; counts of joined decodes per tier, and the value accepted. Labels
with the same counts at the same time have the same future, so of those only undominated ones are kept: more
value, more budget, less memory, fewer sequences.

Everything is a flat array: this module is compiled by numba (which comes with vLLM), in about 50 times less
time a call than the same code in Python.
"""

from __future__ import annotations

import math

import numpy as np

from engine.compiled import compiled

# Kinds of items: a running tier begins to bind, promised, asking, memory comes free (a batch may end there).
ACTIVATE, PREFILL, NEWCOMER, MEMORY = 0, 1, 2, 3
DROPPED, MANDATORY, OPTIONAL = 0, 1, 2  # what a search may do with an item
SKIPPED, WHOLE, SHORT = 0, 1, 2  # how the stretch before an item ended: after whole batches, or a short one

EPS_S = 1e-9
EPS_TOKENS = 1e-6
TICK_S = 1e-11  # times are rounded to it, so that equal times compare equal
HASH_SIZE = 4096  # a power of two
BEAM = 128  # labels that go on from an item that must be taken


@compiled
def capacity(seconds, share_s, line, load, period_s, counts, tier_s, joined_s):  # type: ignore[no-untyped-def]
    """Time2BS: most tokens of a batch that takes `seconds` beside the decodes that are there (a float, whole).

    Decodes take part in a share `share_s / period` of such batches, at most in each.
    line: [P, 2] base and seconds per token of each piece; load: most tokens, tokens for late ones; tier_s: [T]
    seconds that a step costs beyond its tokens for the running decodes of a tier, joined_s for one that joined.
    """
    left_s = seconds
    for tier in range(len(period_s)):
        share = min(1.0, share_s / period_s[tier])
        left_s -= (tier_s[tier] + counts[tier] * joined_s[tier]) * share
    tokens = load[0]
    for piece in range(line.shape[0]):
        tokens = min(tokens, (left_s - line[piece, 0]) / line[piece, 1])
    return max(math.floor(tokens + EPS_TOKENS) - load[1], 0.0)


@compiled
def net_budget(seconds, share_s, line, load, period_s, slots, counts, tier_s, joined_s):  # type: ignore[no-untyped-def]
    """B(x, n): what a batch of `seconds` holds beside the joined decodes, at their fluid rate. Can be < 0."""
    tokens = capacity(seconds, share_s, line, load, period_s, counts, tier_s, joined_s)
    joined = 0.0
    for tier in range(len(period_s)):
        joined += counts[tier] * slots[tier] * seconds / period_s[tier]
    return math.floor(tokens - joined + EPS_TOKENS)


@compiled
def _length(full_s, period_s, counts, active):  # type: ignore[no-untyped-def]
    """L: the longest that a batch may take with these decodes."""
    length_s = full_s
    for tier in range(len(period_s)):
        if counts[tier] > 0 or active[tier]:
            length_s = min(length_s, period_s[tier])
    return length_s


@compiled
def _needed(before_s, due_s, due_slots):  # type: ignore[no-untyped-def]
    """need(x): tokens of running decodes that are due before `before_s`."""
    return due_slots[np.searchsorted(due_s, before_s - EPS_S)]


@compiled
def _sustainable(full_s, line, load, period_s, slots, counts, running, tier_s, joined_s):  # type: ignore[no-untyped-def]
    """Whether every decode, running and joined, could be kept for ever in batches of the tightest pace."""
    length_s = full_s
    for tier in range(len(period_s)):
        if counts[tier] + running[tier] > 0:
            length_s = min(length_s, period_s[tier])
    tokens = 0.0
    for tier in range(len(period_s)):
        tokens += (counts[tier] + running[tier]) * slots[tier] * length_s / period_s[tier]
    return (
        capacity(length_s, length_s, line, load, period_s, counts, tier_s, joined_s) + EPS_TOKENS >= tokens
        or tokens == 0.0
    )


@compiled
def _round(seconds):  # type: ignore[no-untyped-def]
    return math.floor(seconds / TICK_S + 0.5) * TICK_S


@compiled
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


@compiled
def search(  # type: ignore[no-untyped-def]
    line, load, full_s,  # cost
    period_s, slots, running, active_s, tier_s, joined_s,  # [T] tiers
    due_s, due_slots, horizon_s,  # [E], [E + 1] tokens of running decodes until then, and their running sum
    kinds, deadlines_s, tokens, tiers, values, kv, modes,  # [I], kv: [I, K] items, by deadline
    kv_from_s, kv_free, tight,  # [K] memory intervals
    free_seqs, lower, by_budget, by_memory, bound_k, limit,
):  # fmt: skip
    """Best value over the optional items (-1: none), and the decisions that give it. At most `limit` labels.

    Labels that cannot beat `lower` are left out; `bound_k` is a memory interval in which every optional item
    holds its KV, whenever it starts. Returns the value, budget left, how many labels there were,
    whether some were lost for want of room, and a row per item taken, in order: item, ending, start interval,
    time before and after, length and number of whole batches.
    """
    T, I, K = len(period_s), len(kinds), len(kv_from_s)  # noqa: N806, E741
    t = np.empty(limit)
    pb = np.empty(limit)
    val = np.empty(limit)
    seqs = np.empty(limit, np.int64)
    code = np.empty(limit, np.int64)
    counts = np.empty((limit, max(T, 1)), np.int64)
    mem = np.empty((limit, K))
    w = np.empty((limit, K))
    stretch = np.empty((limit, 2))
    began = np.empty(limit)
    parent = np.empty(limit, np.int64)
    item_of = np.empty(limit, np.int64)
    ending = np.empty(limit, np.int8)
    start_of = np.empty(limit, np.int16)
    dead = np.empty(limit, np.bool_)
    chain = np.empty(limit, np.int64)
    heads = np.empty(HASH_SIZE, np.int64)
    made = 0
    overflow = False

    # A tier that does not bind yet is ahead: until then its decodes may be left out, and cost a batch nothing.
    active, bind_s = np.zeros(max(T, 1), np.bool_), np.zeros(T)
    for tier in range(T):
        active[tier] = running[tier] > 0 and active_s[tier] <= 0.0
        if active[tier]:
            bind_s[tier] = tier_s[tier]
    nobody = np.zeros(max(T, 1), np.int64)
    length_s = _length(full_s, period_s, nobody, active)
    # Any batch may be as short as the tightest of all that run, whether its tier binds by then or not: what a
    # label holds must reach to the end of such a batch, and where a longer one follows, to the end of that.
    shortest_s = full_s
    for tier in range(T):
        if running[tier] > 0:
            shortest_s = min(shortest_s, period_s[tier])

    # ---- where plans begin: at once, or after a short batch that ends when a token is due
    first_due_s = due_s[0] if len(due_s) > 0 else np.inf
    if first_due_s >= min(length_s, shortest_s) - EPS_S:
        t[0], pb[0] = 0.0, 0.0
        w[0, :] = 0.0
        made = 1
    if first_due_s < length_s - EPS_S:
        for candidate in range(-1, I):
            end_s = first_due_s if candidate < 0 else deadlines_s[candidate]
            if candidate >= 0 and (
                kinds[candidate] == ACTIVATE or modes[candidate] == DROPPED or not 0 < end_s < first_due_s
            ):
                continue
            held = capacity(end_s, end_s + length_s, line, load, period_s, nobody, bind_s, joined_s)
            if held >= _needed(end_s + min(length_s, shortest_s), due_s, due_slots) and made < limit:
                t[made], pb[made] = _round(end_s), held
                for k in range(K):
                    w[made, k] = held if kv_from_s[k] <= EPS_S else 0.0
                made += 1
    for label in range(made):
        val[label], seqs[label], code[label] = 0.0, 0, 0
        parent[label], item_of[label], ending[label], start_of[label] = -1, -1, SKIPPED, 0
        counts[label, :] = 0
        began[label] = 0.0 if t[label] > 0 else -1.0
        mem[label, :] = 0.0
        dead[label] = False

    current = np.empty(limit, np.int64)
    for label in range(made):
        current[label] = label
    alive = made
    following = np.empty(limit, np.int64)
    ranks = np.empty(limit)
    since = np.zeros(K)
    row = np.zeros(max(T, 1), np.int64)

    for item in range(I):
        if modes[item] == DROPPED:
            continue
        optional = modes[item] == OPTIONAL
        deadline_s = deadlines_s[item]
        tier = tiers[item]
        last_s = 0.0
        if optional:
            for other in range(item, I):
                if modes[other] == OPTIONAL and kinds[other] == NEWCOMER:
                    last_s = max(last_s, deadlines_s[other])
        heads[:] = -1
        kept = 0
        if optional:
            for place in range(alive):
                label = current[place]
                # ---- bound: budget and memory until the last deadline, the rest taken in part
                length_s = _length(full_s, period_s, counts[label], active)
                rate = (
                    net_budget(length_s, length_s, line, load, period_s, slots, nobody, bind_s, joined_s) + 1.0
                )
                budget = pb[label] - _needed(last_s, due_s, due_slots)
                budget += max(last_s - t[label], 0.0) / length_s * rate + 1.0
                most = _most_by(by_budget, item, modes, tokens, values, budget)
                if tight and val[label] + most > lower + 1e-12:
                    room = kv_free[bound_k] - mem[label, bound_k]
                    most = min(most, _most_by(by_memory, item, modes, kv[:, bound_k], values, room))
                if val[label] + most <= lower + 1e-12:
                    continue
                following[kept] = label
                kept += 1
                slot = (code[label] * 1000003 + int(t[label] / TICK_S + 0.5)) & (HASH_SIZE - 1)
                chain[label] = heads[slot]
                heads[slot] = label
                dead[label] = False
            for place in range(kept):
                current[place] = following[place]
            alive = kept
        activation = kinds[item] == ACTIVATE
        for place in range(alive):
            label = current[place]
            at_s = t[label]
            allowed_s = deadline_s + (period_s[tier] if activation else 0.0)
            if at_s > allowed_s + EPS_S:
                continue
            if kinds[item] == NEWCOMER and seqs[label] + 1 > free_seqs:
                continue
            length_s = _length(full_s, period_s, counts[label], active)
            each = net_budget(length_s, length_s, line, load, period_s, slots, counts[label], bind_s, joined_s)
            batches = max(0, math.floor((deadline_s - at_s) / length_s + EPS_S))
            end_s = at_s + batches * length_s
            # ---- what is due before the next batch ends must be covered by each batch on the way
            most_due = 0.0
            for other in range(T):
                most_due += running[other] * slots[other] * math.ceil(length_s / period_s[other])
            covered = batches == 0 or pb[label] >= _needed(at_s + length_s, due_s, due_slots)
            if covered and each < most_due:
                for batch in range(1, batches + 1):
                    if pb[label] + batch * each < _needed(at_s + (batch + 1) * length_s, due_s, due_slots):
                        covered = False
                        break
            if not covered:
                continue
            for other in range(T):
                row[other] = counts[label, other]
            was_active = active[tier] if tier >= 0 else False
            if tier >= 0:
                if activation:
                    active[tier] = True
                else:
                    row[tier] += 1
                    if not _sustainable(full_s, line, load, period_s, slots, row, running, tier_s, joined_s):
                        continue
            after_s = min(_length(full_s, period_s, row, active), shortest_s)
            if activation:
                active[tier] = was_active
            tightens = activation and period_s[tier] < length_s
            ahead = slots[tier] if tier >= 0 and not activation else 0.0
            rest_s = deadline_s - end_s
            for way in (WHOLE, SHORT):
                gained = batches * each
                until_s = end_s
                if way == SHORT:
                    if rest_s <= EPS_S or (activation and not tightens):
                        break
                    short = net_budget(
                        rest_s, rest_s + length_s, line, load, period_s, slots, counts[label], bind_s, joined_s
                    )
                    if short <= 0 or pb[label] + gained < _needed(deadline_s, due_s, due_slots):
                        break
                    gained += short
                    until_s = deadline_s
                    if pb[label] + gained < _needed(deadline_s + min(length_s, shortest_s), due_s, due_slots):
                        break
                due = _needed(until_s + after_s, due_s, due_slots)
                for k in range(1, K if tight else 0):
                    # ---- of batches that begin when interval k has; what ran before them is credited once
                    from_s = kv_from_s[k] - EPS_S
                    first = max(0, math.ceil((from_s - at_s) / length_s))
                    since[k] = max(batches - first, 0) * each
                    if first < batches and (first > 0 or began[label] < from_s):
                        since[k] += _needed(at_s + (first + 1) * length_s, due_s, due_slots)
                    if way == SHORT and end_s >= from_s:
                        since[k] += gained - batches * each
                        before_s = at_s + (batches - 1) * length_s if batches > 0 else began[label]
                        if before_s < from_s:
                            since[k] += _needed(until_s, due_s, due_slots)
                starts = 1
                if tight and kinds[item] == NEWCOMER:
                    starts = K
                for start in range(starts):
                    if start > 0 and kv_from_s[start] >= deadline_s:
                        break
                    # ---- budget of batches that began when its memory was there
                    usable = pb[label] + gained
                    if start > 0:
                        usable = min(usable, w[label, start] + since[start])
                    left = usable - tokens[item] - ahead
                    if left < due:
                        continue
                    fits = True
                    if kinds[item] == NEWCOMER:
                        for k in range(start, K):
                            if mem[label, k] + kv[item, k] > kv_free[k] + EPS_TOKENS:
                                fits = False
                                break
                    if not fits:
                        continue
                    if made >= limit:
                        overflow = True
                        break
                    # ---- the child
                    child = made
                    t[child], pb[child] = _round(until_s), left
                    val[child] = val[label] + (values[item] if kinds[item] == NEWCOMER else 0.0)
                    seqs[child] = seqs[label] + (1 if kinds[item] == NEWCOMER else 0)
                    child_code = 0
                    for other in range(T):
                        counts[child, other] = row[other]
                        child_code = child_code * 1009 + row[other]
                    code[child] = child_code
                    for k in range(K):
                        mem[child, k] = mem[label, k]
                        if kinds[item] == NEWCOMER and k >= start:
                            mem[child, k] += kv[item, k]
                        w[child, k] = w[label, k] + since[k] if tight else 0.0
                    began[child] = began[label]
                    if way == SHORT:
                        began[child] = end_s
                    elif batches > 0:
                        began[child] = at_s + (batches - 1) * length_s
                    stretch[child, 0], stretch[child, 1] = length_s, batches
                    parent[child], item_of[child] = label, item
                    ending[child], start_of[child] = way, start
                    # ---- dominance among labels of the same counts at the same time
                    slot = (child_code * 1000003 + int(t[child] / TICK_S + 0.5)) & (HASH_SIZE - 1)
                    other_label = heads[slot]
                    worse = False
                    while other_label >= 0:
                        same = not dead[other_label] and code[other_label] == child_code
                        if same and abs(t[other_label] - t[child]) < TICK_S / 2:
                            if _dominates(
                                other_label, child, val, pb, seqs, counts, mem, w, began, kv_from_s, tight
                            ):
                                worse = True
                                break
                            if _dominates(
                                child, other_label, val, pb, seqs, counts, mem, w, began, kv_from_s, tight
                            ):
                                dead[other_label] = True
                        other_label = chain[other_label]
                    if worse:
                        continue
                    chain[child] = heads[slot]
                    heads[slot] = child
                    dead[child] = False
                    made += 1
        # ---- who goes on: those that skip (if they may), and those that took the item
        on = 0
        if optional:
            for place in range(alive):
                if not dead[current[place]]:
                    following[on] = current[place]
                    on += 1
        first_new = 0
        if made > 0:
            first_new = made
            while first_new > 0 and item_of[first_new - 1] == item:
                first_new -= 1
        for label in range(first_new, made):
            if not dead[label]:
                following[on] = label
                on += 1
        if not optional and on > BEAM:
            # ---- too many ways to have taken what must be taken: those with most budget at one time go on
            overflow = True
            for place in range(on):
                label = following[place]
                length_s = _length(full_s, period_s, counts[label], active)
                each = net_budget(
                    length_s, length_s, line, load, period_s, slots, counts[label], bind_s, joined_s
                )
                ranks[place] = pb[label] - t[label] / length_s * each
            best_first = np.argsort(-ranks[:on])
            for place in range(BEAM):
                current[place] = following[best_first[place]]
            on = BEAM
        else:
            for place in range(on):
                current[place] = following[place]
        alive = on
        if activation:
            active[tier] = True
            bind_s[tier] = tier_s[tier]
        if alive == 0:
            break

    best = -1
    for place in range(alive):
        label = current[place]
        if best >= 0 and val[label] <= val[best] + 1e-12:
            continue
        # ---- what comes due in bunches after the last decision must be covered as well
        length_s = _length(full_s, period_s, counts[label], active)
        each = net_budget(length_s, length_s, line, load, period_s, slots, counts[label], bind_s, joined_s)
        covered = True
        batch = 0
        while t[label] + batch * length_s <= horizon_s + EPS_S:
            if pb[label] + batch * each < _needed(t[label] + (batch + 1) * length_s, due_s, due_slots):
                covered = False
                break
            batch += 1
        if covered:
            best = label
    steps = 0
    label = best
    while label >= 0 and item_of[label] >= 0:
        steps += 1
        label = parent[label]
    rows = np.empty((steps, 7))
    label = best
    for step in range(steps - 1, -1, -1):
        rows[step, 0], rows[step, 1], rows[step, 2] = item_of[label], ending[label], start_of[label]
        rows[step, 3], rows[step, 4] = t[parent[label]], t[label]
        rows[step, 5], rows[step, 6] = stretch[label, 0], stretch[label, 1]
        label = parent[label]
    if best < 0:
        return -1.0, 0.0, made, overflow, rows
    return val[best], pb[best], made, overflow, rows


@compiled
def take_in_order(  # type: ignore[no-untyped-def]
    order, modes, begun,
    line, load, full_s,
    period_s, slots, running, active_s, tier_s, joined_s,
    due_s, due_slots, horizon_s,
    kinds, deadlines_s, tokens, tiers, values, kv,
    kv_from_s, kv_free, tight,
    free_seqs, by_budget, by_memory, bound_k, limit,
):  # fmt: skip
    """Take items in this order, each if it fits beside those taken: what `modes` makes mandatory, and more.

    `begun`: the search of `modes` as given. Returns the search of what was taken. Changes `modes`.
    """
    found = begun
    for item in order:
        modes[item] = MANDATORY
        beside = search(
            line, load, full_s,
            period_s, slots, running, active_s, tier_s, joined_s,
            due_s, due_slots, horizon_s,
            kinds, deadlines_s, tokens, tiers, values, kv, modes,
            kv_from_s, kv_free, tight,
            free_seqs, -1.0, by_budget, by_memory, bound_k, limit,
        )  # fmt: skip
        if beside[0] < 0:
            modes[item] = DROPPED
        else:
            found = beside
    return found


@compiled
def _dominates(one, two, val, pb, seqs, counts, mem, w, began, kv_from_s, tight):  # type: ignore[no-untyped-def]
    """Whether label `one` is at least as good as `two` for every future (same counts, same time)."""
    if val[one] < val[two] or pb[one] < pb[two] or seqs[one] > seqs[two]:
        return False
    for tier in range(counts.shape[1]):
        if counts[one, tier] != counts[two, tier]:
            return False
    if tight:
        for k in range(mem.shape[1]):
            if mem[one, k] > mem[two, k] or w[one, k] < w[two, k]:
                return False
            if began[one] >= kv_from_s[k] - EPS_S > began[two]:
                return False  # it has had its credit for what ran before interval k
    return True
