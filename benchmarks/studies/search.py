"""The capacity of one setting on one seed, as a row; and how rows of several seeds are compared."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.capacity import FIRST_STEP, PRECISION, Cache, Point, Setting, capacity, spread, tune
from benchmarks.simulator.systems import OURS_NAME, design
from benchmarks.studies.crew import Row

SHARE = 0.9
TUNING_SEED = 0  # never one that is reported
# Requests a second and GPU to begin with, of about what ours holds without speculation on the paper's machine.
GUESS_PER_GPU: Mapping[str, float] = {
    "chatbot": 4.6,
    "coder": 4.0,
    "summarizer": 3.4,
    "mixed": 4.7,
    "tool": 7.0,
    "reasoning": 0.045,
}
OTHER_GUESS_PER_GPU = 2.0


def guess(scenario: str) -> float:
    """Where a search begins."""
    return GUESS_PER_GPU.get(scenario, OTHER_GUESS_PER_GPU)


def search(
    setting: Setting,
    seed: int,
    begin: float,
    folder: Path | None,
    precision: float = PRECISION,
    first_step: float = FIRST_STEP,
) -> Row:
    """Capacity per GPU at SHARE, and the rates asked for between which it lies. See `capacity` for the options.

    `fails_at_per_gpu` is None where no rate tried was too high.
    """
    cache = Cache(folder)
    found, points = capacity(
        lambda rate: cache.point(setting, rate, seed, SHARE), SHARE, begin, precision, first_step
    )
    held = max((point.asked_per_gpu for point in points if point.holds(SHARE)), default=0.0)
    return {
        "seed": seed,
        "capacity_per_gpu": found,
        "holds_at_per_gpu": held,
        "fails_at_per_gpu": _least_failed(points, held),
        "points": len(points),
    }


def _least_failed(points: Iterable[Point], above: float) -> float | None:
    failed = (point.asked_per_gpu for point in points if not point.holds(SHARE))
    return min((rate for rate in failed if rate > above), default=None)


def tuned_setting(setting: Setting, folder: Path | None) -> Setting:
    """A baseline at its best on the tuning seed. Ours runs as it comes."""
    if setting.system == OURS_NAME:
        return setting
    start = replace(setting, tuning=design(setting.system).defaults)
    best, _ = tune(start, SHARE, guess(setting.scenario), TUNING_SEED, Cache(folder))
    return replace(setting, tuning=best)


def capacities(rows: Sequence[Row]) -> dict[str, float]:
    """Mean, least and most over seeds, per GPU."""
    return spread([row["capacity_per_gpu"] for row in rows])


def ratio(over: Sequence[float], under: Sequence[float]) -> Row:
    """Of the means, and the least and the most of a seed; None where there is nothing to divide by."""
    each = [a / b for a, b in zip(over, under, strict=True) if b > 0]
    whole = sum(over) / sum(under) if sum(under) > 0 else None
    return {"mean": whole, "least": min(each, default=None), "most": max(each, default=None)}


def geometric_mean(values: Sequence[float | None]) -> float | None:
    """None if one of them is, or if there are none."""
    known = [value for value in values if value is not None and value > 0]
    if not values or len(known) < len(values):
        return None
    return math.exp(sum(map(math.log, known)) / len(known))
