"""What a run on real engines has found so far, beside what other runs have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.capacity import Point, capacity, spread
from benchmarks.earlier import earlier
from benchmarks.provenance import provenance
from benchmarks.real.bench import Bench
from benchmarks.real.cells import ARRIVALS, Cell
from benchmarks.real.headline import headline
from benchmarks.real.predicted import SHARE, TUNING_SEED
from benchmarks.real.systems import RealSystem
from benchmarks.real.window import Row
from benchmarks.simulator.outcome import WARM_UP_SHARE
from benchmarks.simulator.systems import Tuning
from engine.errors import ConfigError

SEEDS = (1, 2, 3)
STEP = 1.15  # between two rates; the knee is read off the line between them
LOADS = (0.5, 1.0, 1.5, 2.0)  # of our capacity: what was admitted is to be kept at each
HOPELESS = 10.0  # times below what the simulator says, a search ends
QUICK_FRACTIONS = (0.8, 1.0, 1.2)


@dataclass(slots=True)
class Results:
    """Capacities as they are found, and every window that they are made of.

    `before`: of other runs, as `of_other_runs` gives it.
    """

    bench: Bench
    seeds: tuple[int, ...]
    quick: bool
    rows: list[Row] = field(default_factory=list)
    loads: list[Row] = field(default_factory=list)
    windows: list[Row] = field(default_factory=list)
    before: Row = field(default_factory=dict)
    _whole: set[Cell] = field(default_factory=set)

    def check(self, cell: Cell, chosen: Sequence[RealSystem]) -> None:
        """Raises ConfigError if another run has measured a system of this cell that is not among these: what
        stands side by side is of one run."""
        there = {row["system"] for row in self.before.get("rows", ()) if _cell_of(row) == cell}
        if lacking := sorted(there - {system.name for system in chosen}):
            raise ConfigError(
                f"the figures of {cell.text} have {', '.join(lacking)} as well, and are of one run: measure "
                "all of them, or give another --out"
            )

    def measure(self, cell: Cell, chosen: Sequence[RealSystem]) -> None:
        """Every system in this cell, one after another. Raises as `check`."""
        self.check(cell, chosen)
        for system in chosen:
            self.bench.say(f"{cell.text}: {system.label}, where the simulator sees its knee")
            tuning, knee = self.bench.expected(cell, system)
            if self.quick:
                for fraction in QUICK_FRACTIONS:
                    self._window(cell, system, tuning, fraction * knee, self.seeds[0])
                continue
            row = self._capacity(cell, system, tuning, knee)
            self.rows.append(row)
            if system.ours and not system.drafts and row["mean"] > 0:
                for load in LOADS:
                    window = self._window(cell, system, tuning, load * row["mean"], self.seeds[0])
                    self.loads.append({"load": load, **window})
        self._whole.add(cell)

    def told(self) -> Row:
        """All that is known so far, as JSON takes it: of a cell that is not whole, what another run found."""
        others = [cell for cell in _cells_of(self.before) if cell not in self._whole]
        parts: dict[str, list[Row]] = {}
        for name, mine in (("rows", self.rows), ("loads", self.loads), ("windows", self.windows)):
            kept = [row for row in self.before.get(name, ()) if _cell_of(row) in others]
            parts[name] = kept + [row for row in mine if _cell_of(row) not in others]
        method = {**self.method(), "devices": self.bench.machine.site.devices()}
        about = provenance(self.seeds[0])
        return {**headline(parts["rows"], parts["loads"]), **parts, "method": method, "provenance": about}

    def method(self) -> Row:
        """What must be the same for figures of two runs to stand side by side."""
        site, tpot_scale = self.bench.machine.site, self.bench.machine.hardware.tpot_scale
        return {
            "model": self.bench.model,
            "site": site.name,
            "share": SHARE,
            "seeds": len(self.seeds),
            "tuning_seed": TUNING_SEED,
            "lengths_divided_by": site.divide,
            "outputs_divided_further_by": dict(site.further),
            "arrivals": ARRIVALS,
            "share_not_counted": WARM_UP_SHARE,
            "rates_apart": STEP,
            "loads": list(LOADS),
            "tpot_scale": None if tpot_scale == 1.0 else tpot_scale,  # None: paces are those of the classes
            "window_s": self.bench.window_s,  # None: as long as each cell asks for
        }

    def _window(self, cell: Cell, system: RealSystem, tuning: Tuning, rate: float, seed: int) -> Row:
        row = self.bench.window(cell, system, tuning, rate, seed)
        if row not in self.windows:
            self.windows.append(row)
        return row

    def _capacity(self, cell: Cell, system: RealSystem, tuning: Tuning, knee: float) -> Row:
        per_seed, guess = [], knee
        windows: list[Row] = []
        for seed in self.seeds:

            def at(rate: float, seed: int = seed) -> Point:
                if rate < knee / HOPELESS:
                    return Point(rate, 0.0, SHARE, True, {})  # not measured: next to nothing is held
                row = self._window(cell, system, tuning, rate, seed)
                windows.append(row)
                return Point(rate, row["rate_per_s"], row["attainment"] or 0.0, row["drained"], {})

            _, points = capacity(at, SHARE, guess, STEP - 1 + 1e-6, STEP)
            per_seed.append(crossing(points))
            guess = max((one.asked_per_gpu for one in points if one.holds(SHARE)), default=guess)
        return {
            "scenario": cell.scenario,
            "engines": cell.engines,
            "arrivals": ARRIVALS[cell.scenario],
            "system": system.name,
            "ours": system.ours,
            "tuned": system.tuned,
            "drafts": system.drafts,
            "tuning": tuning.words,
            "predicted": knee,
            "per_seed": per_seed,
            **spread(per_seed),
            "measured_on": _measured_on(windows),
        }


def crossing(points: Sequence[Point]) -> float:
    """Where attainment falls through SHARE, on the line between the last rate that held and the next one.

    The rates are those that came. 0 if no rate held.
    """
    held = [one for one in points if one.holds(SHARE)]
    if not held:
        return 0.0
    last = max(held, key=lambda one: one.asked_per_gpu)
    over = [one for one in points if one.asked_per_gpu > last.asked_per_gpu]
    if not over:
        return last.rate_per_gpu
    first = min(over, key=lambda one: one.asked_per_gpu)
    if not first.drained or first.attainment >= SHARE:
        return last.rate_per_gpu
    part = (last.attainment - SHARE) / (last.attainment - first.attainment)
    return last.rate_per_gpu + part * (first.rate_per_gpu - last.rate_per_gpu)


def _measured_on(windows: Sequence[Row]) -> Row:
    """Where windows were measured, by which commits, and when."""
    found = [row["measured_on"] for row in windows]
    return {key: " and ".join(sorted({str(one[key]) for one in found})) for key in ("device", "commit", "date")}


def of_other_runs(path: Path, method: Row) -> Row:
    """The figures in `path`; none if there is no such file.

    Raises ConfigError for a file that is not of this bench, or was measured by another method.
    """
    return earlier(path, "method", method, ("rows",), "not of this bench") or {}


def _cells_of(found: Row) -> set[Cell]:
    return {_cell_of(row) for row in found.get("rows", ())}


def _cell_of(row: Row) -> Cell:
    return Cell(str(row["scenario"]), int(row["engines"]))
