"""What one worker of the capacity table measures: a cell, from tuning to attainment at fixed rates."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.bounds.bound import clairvoyant_share
from benchmarks.capacity import (
    FIRST_STEP,
    NEAR_STEP,
    PRECISION,
    Cache,
    Point,
    Setting,
    capacity,
    code_fingerprint,
    highest_held,
    spread,
    tune,
)
from benchmarks.capacity_file import Begin
from benchmarks.hardware import hardware
from benchmarks.scenarios import SCENARIOS, make
from benchmarks.simulator.systems import OURS_NAME

TUNING_SEED = 0
FIXED_FRACTIONS = (0.4, 0.6, 0.8)
BURSTY = tuple(name for name, parts in SCENARIOS.items() if any(one.arrivals == "bursty" for one in parts))
PACED_BOUND = ("coder",)  # where outputs are short the bound may look at each token's due time
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Cell:
    """What one worker measures: a system in a mode, as it comes or tuned, in a scenario on a hardware.

    Searches begin where `begin` says, or, without it, around `guess`.
    """

    setting: Setting
    tuned: bool
    guess: float
    bound_per_gpu: float
    seeds: tuple[int, ...]
    shares: tuple[float, ...]
    begin: Begin | None = None

    @property
    def name(self) -> str:
        """For the progress bar."""
        s = self.setting
        return f"{s.hardware} {s.scenario} {s.system} {s.mode} {'tuned' if self.tuned else 'default'}"


def measure(cell: Cell, folder: Path) -> tuple[list[Row], list[Row]]:
    """Tune, then search the capacity for every share and seed; then the attainment at fixed rates."""
    cache = Cache(folder)
    setting, guess, tuned_at = _tuned(cell, cache)
    rows = []
    step = FIRST_STEP
    moved = 1.0  # by how much the last capacity was more than what an earlier run had found there
    for share in cell.shares:
        known = [] if cell.begin is None else cell.begin.at.get(share, [])
        per_seed, asked_per_seed = [], []
        for number, seed in enumerate(cell.seeds):
            if number < len(known):
                guess, step = known[number] * moved, 1 + PRECISION
            found, points = _search(setting, guess, seed, share, cache, step)
            asked = highest_held(points, share)
            per_seed.append(found)
            asked_per_seed.append(asked)
            if number < len(known) and asked and known[number]:
                moved = asked / known[number]
            guess, step = asked or guess, NEAR_STEP
        guess, step = guess * 0.85, FIRST_STEP
        rows.append(
            {
                **labels_of(setting, cell.tuned),
                "share": share,
                "gpus": setting.deployment().gpus,
                "tuning": setting.tuning.words,
                "settings": asdict(setting.tuning),
                "tuned_at": tuned_at,
                "seconds": setting.seconds,
                "seeds": list(cell.seeds),
                "per_seed": per_seed,
                "asked_per_seed": asked_per_seed,
                **spread(per_seed),
            }
        )
    return rows, [_at_rate(cell, setting, fraction, cache) for fraction in _fractions(cell)]


def _tuned(cell: Cell, cache: Cache) -> tuple[Setting, float, float | None]:
    """The setting to report, where it holds about, and what it held on the tuning seed if it was tuned."""
    setting, begin = cell.setting, cell.begin
    if not cell.tuned or (setting.system == OURS_NAME and setting.mode != "disaggregated"):
        return setting, cell.guess, None
    guess, step = cell.guess, FIRST_STEP
    if begin is not None:
        known = begin.at.get(cell.shares[0], [])
        setting = replace(setting, tuning=begin.tuning)
        guess, step = begin.tuned_at or (sum(known) / len(known) if known else guess), 1 + PRECISION
    tuning, most = tune(setting, cell.shares[0], guess, TUNING_SEED, cache, step)
    return replace(setting, tuning=tuning), most or guess, most


def _search(
    setting: Setting, guess: float, seed: int, share: float, cache: Cache, first_step: float
) -> tuple[float, list[Point]]:
    def at(rate: float) -> Point:
        return cache.point(setting, rate, seed, share)

    return capacity(at, share, guess, PRECISION, first_step)


def labels_of(setting: Setting, tuned: bool) -> Row:
    """What makes a row the figure of a cell."""
    return {
        "hardware": setting.hardware,
        "scenario": setting.scenario,
        "system": setting.system,
        "mode": setting.mode,
        "column": "tuned" if tuned else "default",
        "acceptance": setting.acceptance,
    }


def _fractions(cell: Cell) -> tuple[float, ...]:
    """Fixed rates are for the headline hardware, tuned, without speculation, of ours in one mode."""
    setting = cell.setting
    wanted = cell.tuned and setting.acceptance is None and setting.hardware == "paper"
    wanted &= setting.scenario in SCENARIOS and (setting.system != OURS_NAME or setting.mode == "colocated")
    return FIXED_FRACTIONS if wanted and setting.duration_s is None else ()


def _at_rate(cell: Cell, setting: Setting, fraction: float, cache: Cache) -> Row:
    rate = fraction * cell.bound_per_gpu
    # Where arrivals are smooth one seed says how attainment goes; capacities are of all of them.
    bursty = setting.scenario in BURSTY
    seeds = cell.seeds if bursty else cell.seeds[:1]
    bounded = bursty and setting.system == OURS_NAME
    bound_share = _served_at_most(setting, rate, seeds[:1], cache) if bounded else None
    points = [cache.point(setting, rate, seed, None) for seed in seeds]
    facts = [point.facts for point in points]
    return {
        "hardware": setting.hardware,
        "scenario": setting.scenario,
        "system": setting.system,
        "mode": setting.mode,
        "column": "tuned",
        "acceptance": setting.acceptance,
        "fraction": fraction,
        "rate_per_gpu": rate,
        "bound_attainment": bound_share,
        "attainment": [point.attainment for point in points],
        "attainment_strict": [one["attainment_strict"] for one in facts],
        "goodput_share": [one["goodput_share"] for one in facts],
        "admitted_kept": [one["admitted_kept"] for one in facts],
        "ttft_p99_s": [one["ttft_s"]["p99"] for one in facts],
        "tpot_p99_s": [one["tpot_s"]["p99"] for one in facts],
        "best_effort": [one["best_effort"] for one in facts],
        "best_effort_completed": [one["best_effort_completed"] for one in facts],
    }


def _served_at_most(setting: Setting, rate_per_gpu: float, seeds: Sequence[int], cache: Cache) -> list[float]:
    """What a scheduler that knows lengths and future serves of the same arrivals, at most, by seed."""
    chosen, paced = hardware(setting.hardware), setting.scenario in PACED_BOUND
    rate_per_s = rate_per_gpu * setting.deployment().gpus

    def share(seed: int) -> dict[str, Any]:
        made = make(setting.scenario, rate_per_s, setting.seconds, seed, tpot_scale=chosen.tpot_scale)
        load = made.clipped(chosen.kv_tokens // 2)
        return {"share": clairvoyant_share(load, chosen.cost, chosen.kv_tokens, setting.replicas, ttft=paced)}

    code = code_fingerprint(ours=False) + _bounds_code()
    key = ["clairvoyant share", setting.scenario, setting.hardware, rate_per_gpu, paced]
    return [float(cache.kept([*key, seed], partial(share, seed), code)["share"]) for seed in seeds]


def _bounds_code() -> str:
    sources = sorted((Path(__file__).parent / "bounds").glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
