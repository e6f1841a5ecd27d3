"""The search of the step oracle: depth first over batches in whole ticks, compiled because it is exhaustive.

A state is one row: the tick at which the last batch ended, what every job has left, and when the next token
of every decode is due, sorted within its tier. A decode that waits for its prefill is in the row already.
"""

from __future__ import annotations

import numpy as np
from numba import njit

FOUND, NONE, UNDECIDED = 1, 0, -1


@njit(cache=True)
def search(  # type: ignore[no-untyped-def]
    first, base, rate, most_tokens, until, tpots, offsets, deadlines, tiers, starts, narrow, effort
):
    """FOUND if some sequence of batches keeps everything until tick `until`, NONE if none does.

    `first`: [1 + J + D] the state to start from. `tpots`: [T]. `offsets`: [T + 1] where the decodes of each
    tier begin in the row. `deadlines`, `tiers` (-1: none), `starts`: [J], in order of deadline.
    """
    jobs, width = deadlines.size, first.size
    stack = np.empty((1024, width), np.int64)
    seen = np.empty((1024, width), np.int64)
    stack[0] = first
    depth, known = 1, 0
    counts = np.zeros(tpots.size, np.int64)
    low = np.zeros(tpots.size, np.int64)
    high = np.zeros(tpots.size, np.int64)
    blocked = np.zeros(width, np.bool_)
    shortest = base + 1  # ticks of the shortest batch that holds a token
    while depth > 0:
        depth -= 1
        state = stack[depth].copy()
        effort -= 1 + known
        if effort < 0:
            return UNDECIDED
        if _done(state, jobs, until):
            return FOUND
        if _dominated(state, seen, known, jobs) or not enough_time(
            state, base, rate, most_tokens, until, tpots, offsets, deadlines, tiers
        ):
            continue
        if known == seen.shape[0]:
            seen = _grown(seen)
        seen[known] = state
        known += 1
        _mark_waiting(state, tpots, offsets, deadlines, tiers, blocked)
        last = until
        for j in range(jobs):
            if state[1 + j] > 0:
                last = min(last, deadlines[j])
        for d in range(1 + jobs, width):
            if not blocked[d]:
                last = min(last, state[d])
        for end in range(state[0] + shortest, last + 1):
            soon = end + shortest  # what is due before it cannot wait for the next batch
            if not _forced(state, soon, until, tpots, offsets, blocked, low, high):
                continue
            for pick in range(-1, jobs):
                begin = state[0] if pick < 0 else starts[pick]  # at once, or when some KV may be held
                if pick >= 0 and (begin <= state[0] or state[1 + pick] == 0 or end - begin < shortest):
                    continue
                room = min((end - begin - base) * rate, most_tokens)
                shorter = max(0, min((end - 1 - begin - base) * rate, most_tokens))
                open_tokens = 0
                for j in range(jobs):
                    if starts[j] <= begin:
                        open_tokens += state[1 + j]
                counts[:] = low
                while True:
                    if _useful(counts, low, high, room, shorter, open_tokens, narrow) and not _out_of_order(
                        state, counts, tpots, offsets, blocked
                    ):
                        if depth == stack.shape[0]:
                            stack = _grown(stack)
                        row = stack[depth]
                        row[:] = state
                        row[0] = end
                        spare = room - counts.sum()
                        if _apply(
                            row, begin, soon, spare, counts, until, tpots, offsets, deadlines, starts, blocked
                        ):
                            depth += 1
                    if not _advance(counts, low, high):
                        break
    return NONE


@njit(cache=True)
def enough_time(state, base, rate, most_tokens, until, tpots, offsets, deadlines, tiers):  # type: ignore[no-untyped-def]
    """Necessary: up to each of many ticks, room for the tokens due, in the fewest batches that can hold them.

    Every token of a decode needs a batch of its own, and its prefill one before.
    """
    jobs = deadlines.size
    for source in range(1, state.size):
        tpot = 0
        if source > jobs:
            for tier in range(tpots.size):
                if offsets[tier] <= source < offsets[tier + 1]:
                    tpot = tpots[tier]
        elif state[source] == 0:
            continue
        time = deadlines[source - 1] if source <= jobs else state[source]
        while time <= until:
            tokens, batches = 0, 0
            for tier in range(tpots.size):
                for d in range(offsets[tier], offsets[tier + 1]):
                    if state[d] <= time:
                        count = (time - state[d]) // tpots[tier] + 1
                        tokens += count
                        batches = max(batches, count)
            for j in range(jobs):
                if state[1 + j] > 0 and deadlines[j] <= time:
                    tokens += state[1 + j]
                    after = 0
                    if tiers[j] >= 0:
                        after = (time - deadlines[j]) // tpots[tiers[j]]
                    batches = max(batches, 1 + after)
            batches = max(batches, (tokens + most_tokens - 1) // most_tokens)
            if tokens > (time - state[0] - batches * base) * rate:
                return False
            if tpot == 0:
                break
            time += tpot
    return True


@njit(cache=True)
def _useful(counts, low, high, room, shorter, open_tokens, narrow):  # type: ignore[no-untyped-def]
    """Neither too many tokens, nor room left that a decode could use, nor what a shorter batch does as well."""
    decoding, full, fewest = 0, True, True
    for tier in range(counts.size):
        decoding += counts[tier]
        full = full and counts[tier] == high[tier]
        fewest = fewest and counts[tier] == low[tier]
    spare = room - decoding
    if spare < 0 or decoding + min(spare, open_tokens) <= shorter:
        return False
    return (full or spare <= open_tokens) and (full or fewest or not narrow)


@njit(cache=True)
def _advance(counts, low, high):  # type: ignore[no-untyped-def]
    """The next choice of counts between the bounds; False after the last."""
    for tier in range(counts.size):
        if counts[tier] < high[tier]:
            counts[tier] += 1
            return True
        counts[tier] = low[tier]
    return False


@njit(cache=True)
def _done(state, jobs, until):  # type: ignore[no-untyped-def]
    return np.all(state[1 : 1 + jobs] == 0) and np.all(state[1 + jobs :] > until)


@njit(cache=True)
def _dominated(state, seen, known, jobs):  # type: ignore[no-untyped-def]
    """Whether a state met before was no later, with no more left and no token due sooner."""
    for i in range(known - 1, -1, -1):
        other = seen[i]
        better = other[0] <= state[0]
        d = state.size - 1
        while better and d > jobs:
            better = other[d] >= state[d]
            d -= 1
        while better and d > 0:
            better = other[d] <= state[d]
            d -= 1
        if better:
            return True
    return False


@njit(cache=True)
def _grown(rows):  # type: ignore[no-untyped-def]
    more = np.empty((2 * rows.shape[0], rows.shape[1]), np.int64)
    more[: rows.shape[0]] = rows
    return more


@njit(cache=True)
def _mark_waiting(state, tpots, offsets, deadlines, tiers, blocked):  # type: ignore[no-untyped-def]
    """One decode for each prefill that is not done, with the due time of its first token."""
    blocked[:] = False
    for j in range(deadlines.size):
        tier = tiers[j]
        if tier >= 0 and state[1 + j] > 0:
            for d in range(offsets[tier], offsets[tier + 1]):
                if not blocked[d] and state[d] == deadlines[j] + tpots[tier]:
                    blocked[d] = True
                    break


@njit(cache=True)
def _forced(state, soon, until, tpots, offsets, blocked, low, high):  # type: ignore[no-untyped-def]
    """How many decodes of each tier must, and how many may, make a token; False: one would need two."""
    for tier in range(tpots.size):
        low[tier], high[tier] = 0, 0
        for d in range(offsets[tier], offsets[tier + 1]):
            if not blocked[d] and state[d] <= until:
                high[tier] += 1
                if state[d] < soon:
                    low[tier] += 1
                    if state[d] + tpots[tier] < soon:
                        return False
    return True


@njit(cache=True)
def _out_of_order(state, counts, tpots, offsets, blocked):  # type: ignore[no-untyped-def]
    """A decode makes a token and another, due no later and of a faster tier, makes none: never better."""
    for tier in range(tpots.size):
        passed = _nth(state, offsets[tier], offsets[tier + 1], counts[tier], blocked)
        if passed < 0:
            continue
        for other in range(tpots.size):
            if tpots[other] <= tpots[tier] or counts[other] == 0:
                continue
            if _nth(state, offsets[other], offsets[other + 1], counts[other] - 1, blocked) >= passed:
                return True
    return False


@njit(cache=True)
def _nth(state, first, last, n, blocked):  # type: ignore[no-untyped-def]
    """Due time of the n-th of a tier's decodes that may make a token; -1: there is none."""
    for d in range(first, last):
        if not blocked[d]:
            if n == 0:
                return state[d]
            n -= 1
    return -1


@njit(cache=True)
def _apply(row, begin, soon, spare, counts, until, tpots, offsets, deadlines, starts, blocked):  # type: ignore[no-untyped-def]
    """Fill one batch, the most urgent first; False if what is due before the next one's end is left over."""
    for j in range(deadlines.size):
        if starts[j] <= begin:
            done = min(spare, row[1 + j])
            row[1 + j] -= done
            spare -= done
        if row[1 + j] > 0 and deadlines[j] < soon:
            return False
    for tier in range(tpots.size):
        left = counts[tier]
        for d in range(offsets[tier], offsets[tier + 1]):
            if left > 0 and not blocked[d]:
                row[d] = min(row[d] + tpots[tier], until + 1)
                left -= 1
        row[offsets[tier] : offsets[tier + 1]].sort()
    return True
