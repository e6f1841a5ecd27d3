"""Survival of outputs, compiled: chances and means that the planner asks for of many requests at many times.

A curve is the chance that an output is longer than each of EDGES, with straight lines between (lengths.py).
"""

from __future__ import annotations

import numpy as np

from engine.compiled import compiled

LONGEST_TOKENS = 1 << 20
EDGES = np.concatenate([np.arange(32), np.rint(2 ** np.arange(5, 20.01, 1 / 8))]).astype(np.int64)
WIDTHS = np.diff(EDGES)
# [LONGEST_TOKENS]: a search costs 20 times a look-up. Too large for a constant: functions get it as `bin_of`.
BIN_OF = np.repeat(np.arange(len(WIDTHS)), WIDTHS)


@compiled
def survival_at(curve, tokens, bin_of):  # type: ignore[no-untyped-def]
    """P(o > tokens), whatever its `max_tokens`."""
    below = bin_of[min(max(tokens, 0), LONGEST_TOKENS - 1)]
    low = curve[below]
    return low + (tokens - EDGES[below]) / WIDTHS[below] * (curve[below + 1] - low)


@compiled
def longer_than(curve, max_tokens, tokens, bin_of):  # type: ignore[no-untyped-def]
    """P(o > tokens), 0 from `max_tokens` on."""
    return survival_at(curve, tokens, bin_of) if tokens < max_tokens else 0.0


@compiled
def areas_below(curve):  # type: ignore[no-untyped-def]
    """[edges] area below a curve up to each edge."""
    areas = np.zeros(len(EDGES))
    for edge in range(len(WIDTHS)):
        areas[edge + 1] = areas[edge] + (curve[edge + 1] + curve[edge]) / 2 * WIDTHS[edge]
    return areas


@compiled
def _area_until(curve, areas, tokens, bin_of):  # type: ignore[no-untyped-def]
    below = bin_of[min(max(tokens, 0), LONGEST_TOKENS - 1)]
    return areas[below] + (tokens - EDGES[below]) * (curve[below] + survival_at(curve, tokens, bin_of)) / 2


@compiled
def mean_remaining(curve, areas, max_tokens, made, bin_of):  # type: ignore[no-untyped-def]
    """E[o - made | o > made]: sum of P(o > x | o > made) over x from made to max_tokens - 1."""
    made = min(made, max_tokens)
    first, last = survival_at(curve, made, bin_of), survival_at(curve, max_tokens, bin_of)
    # Edges are whole numbers, so a sum over tokens is the area and half of what is lost on the way.
    total = _area_until(curve, areas, max_tokens, bin_of) - _area_until(curve, areas, made, bin_of)
    return max((total + (first - last) / 2) / first, 0.0)


@compiled
def mean_remaining_of_all(curves, row, max_tokens, made, bin_of):  # type: ignore[no-untyped-def]
    """`mean_remaining` of many: made [n] and its answer."""
    means = np.empty(len(made))
    for at in range(len(made)):
        curve = curves[row[at]]
        means[at] = mean_remaining(curve, areas_below(curve), max_tokens[at], made[at], bin_of)
    return means
