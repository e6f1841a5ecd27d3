"""`memory.outlook`, compiled: called for every candidate of every request, on arrays so small that calls of
numpy cost more than what they compute. The tests have the same in arrays.
"""

from __future__ import annotations

import math

import numpy as np

from coordinator.planner.survival_kernel import (
    LONGEST_TOKENS,
    areas_below,
    longer_than,
    mean_remaining,
    survival_at,
)
from engine.compiled import compiled

MOST_INTERVALS = 6
CELLS = 24  # need is bounded cell by cell, by those alive at its start and what they hold at its end
ROUNDING = 1e-6  # of a token: a time that is a whole number of tokens may come out a hair off

# Columns of a request. BASE: KV tokens beside those that it MADE here; CURVE: which of the survival curves.
BASE, MADE, PACE_S, STARTS_S, CURVE, MAX_TOKENS = 0, 1, 2, 3, 4, 5
REQUEST_FIELDS = 6


@compiled
def outlook_of(  # type: ignore[no-untyped-def]
    requests,  # [n, REQUEST_FIELDS], the first `count` are running, the others ask
    spread,  # [n] draws of an exponential distribution
    curves, certain, bin_of,  # [c, edges] and [c]; certain: all of that curve run to their `max_tokens`
    count, usable_tokens, block_tokens, z,
):  # fmt: skip
    """When each interval starts, what is free in it, and what each newcomer is charged: [k], [k], [m, k]."""
    ends_s, sure_ends_s = _ends_s(requests, spread, curves, certain, bin_of, count)
    cell_ends_s, first_cell = _cells(ends_s, sure_ends_s)
    cells, intervals, asking = len(cell_ends_s), len(first_cell) - 1, len(requests) - count
    running = np.zeros((3, cells))
    for one in range(count):
        _add_need(running, requests[one], curves, bin_of, cell_ends_s, block_tokens)
    mean, variance, most = running
    for cell in range(cells):
        # Where few hold much, mean + z * sd may pass what all of them, alive to the end, can hold: that is so.
        if mean[cell] + z * math.sqrt(variance[cell]) >= most[cell]:
            mean[cell], variance[cell] = most[cell], 0.0
    sd = np.sqrt(variance)
    starts_s = np.zeros(intervals)
    free = np.empty(intervals, np.int64)
    for k in range(intervals):
        if first_cell[k] > 0:
            starts_s[k] = cell_ends_s[first_cell[k] - 1]
        least = math.inf
        for cell in range(first_cell[k], first_cell[k + 1]):
            least = min(least, usable_tokens - mean[cell] - z * sd[cell])
        free[k] = max(math.floor(least + ROUNDING), 0)
    charges = np.empty((asking, intervals), np.int64)
    for one in range(asking):
        its_mean, its_variance, its_most = its = np.zeros((3, cells))
        _add_need(its, requests[count + one], curves, bin_of, cell_ends_s, block_tokens)
        for k in range(intervals):
            charge = -math.inf
            for cell in range(first_cell[k], first_cell[k + 1]):
                added = z * (math.sqrt(variance[cell] + its_variance[cell]) - sd[cell])
                charge = max(charge, min(its_mean[cell] + added, its_most[cell]))
            charges[one, k] = math.ceil(charge - ROUNDING)
    return starts_s, free, charges


@compiled
def _ends_s(requests, spread, curves, certain, bin_of, count):  # type: ignore[no-untyped-def]
    """Seconds until each is likely to end, and until those of the first `count` end that surely do then.

    Likely ends are as spread out as completions are, the latest at the longest mean: means alone lie close
    together. So each length is its mean times an evenly spread exponential draw.
    """
    areas = np.empty(curves.shape)
    for row in range(len(curves)):
        areas[row] = areas_below(curves[row])
    ends_s, sure_ends_s = np.empty(len(requests) + 1), np.empty(count)
    longest_s, sure = 0.0, 0
    for one in range(len(requests)):
        request = requests[one]
        row, made, most = int(request[CURVE]), int(request[MADE]), _most(request)
        mean_s = mean_remaining(curves[row], areas[row], most, made, bin_of) * request[PACE_S]
        longest_s = max(longest_s, request[STARTS_S] + mean_s)
        ends_s[one] = request[STARTS_S] + mean_s * (1.0 if certain[row] else spread[one])
        sure_end_s = request[STARTS_S] + (most - made) * request[PACE_S]
        if one < count and certain[row] and sure_end_s > 0:
            sure_ends_s[sure] = sure_end_s
            sure += 1
    ends_s[-1] = longest_s
    return np.minimum(ends_s, longest_s), sure_ends_s[:sure]


@compiled
def _cells(ends_s, sure_ends_s):  # type: ignore[no-untyped-def]
    """Ends of the cells, and where each interval begins among them: now, and at coming completions.

    Cells split the intervals, and end at each completion that is sure: need peaks just before it. The last
    entry of the second, one more than there are intervals, is the number of cells.
    """
    ends_s = np.sort(ends_s[ends_s > 0])
    if len(ends_s) == 0:
        return np.ones(1), np.arange(2)
    bounds_s = np.empty(MOST_INTERVALS + 1)
    bounds_s[0] = 0.0
    intervals = 1
    for pick in range(1, MOST_INTERVALS):
        start_s = ends_s[pick * len(ends_s) // MOST_INTERVALS]
        if bounds_s[intervals - 1] < start_s < ends_s[-1]:
            bounds_s[intervals] = start_s
            intervals += 1
    bounds_s[intervals] = ends_s[-1]
    parts = CELLS // intervals
    cut_s = np.empty(parts * intervals + len(sure_ends_s))
    for at in range(intervals):
        for part in range(parts):
            share = 1.0 if part + 1 == parts else (part + 1) * (1.0 / parts)  # the last is the bound itself
            cut_s[at * parts + part] = bounds_s[at] * (1 - share) + bounds_s[at + 1] * share
    cut_s[parts * intervals :] = sure_ends_s
    cell_ends_s = np.unique(cut_s)
    first_cell = np.searchsorted(cell_ends_s, bounds_s[: intervals + 1], side="right")
    first_cell[intervals] = len(cell_ends_s)
    return cell_ends_s, first_cell


@compiled
def _add_need(need, request, curves, bin_of, cell_ends_s, block_tokens):  # type: ignore[no-untyped-def]
    """Add (mean, variance, most) of the KV tokens that one holds in each cell to `need` [3, cells].

    An upper bound over the cell: alive with the chance of its start, holding what it has at its end. The last
    token is never held: a request ends with it.
    """
    base, made, max_tokens = int(request[BASE]), int(request[MADE]), _most(request)
    curve, last = curves[int(request[CURVE])], max_tokens - 1
    now_alive = survival_at(curve, min(made, last), bin_of)
    by_start = made + int(_tokens_until(0.0, request) + ROUNDING)
    for cell in range(len(cell_ends_s)):
        tokens = _tokens_until(cell_ends_s[cell], request)
        by_end = made + max(math.ceil(tokens - ROUNDING) - 1, 0)
        alive = longer_than(curve, max_tokens, by_start, bin_of) / now_alive
        held = -(-(base + min(by_end, last)) // block_tokens) * block_tokens
        mean = held * alive
        need[0, cell] += mean
        need[1, cell] += held * (mean - mean * alive)
        if alive > 0:
            need[2, cell] += held
        by_start = made + int(tokens + ROUNDING)


@compiled
def _tokens_until(at_s, request):  # type: ignore[no-untyped-def]
    """Tokens that one makes until then, if it goes on for so long, but never more than any output has."""
    return min(max(at_s - request[STARTS_S], 0.0) / request[PACE_S], float(LONGEST_TOKENS))


@compiled
def _most(request):  # type: ignore[no-untyped-def]
    """Most tokens of its output."""
    return min(max(int(request[MAX_TOKENS]), 1), LONGEST_TOKENS)
