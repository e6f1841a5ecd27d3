"""What a run on real engines has found so far, beside what other runs have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
LOADS = (0.5, 1.0, 1.5, 2.0)  # of our capacity on one engine: what was admitted is to be kept at each
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
        """Every system in this cell, seed by seed and by turns: what is compared is minutes apart, as machines
        change within an hour. Raises as `check`.
        """
        self.check(cell, chosen)
        searches = []
        for system in chosen:
            self.bench.say(f"{cell.text}: {system.label}, where the simulator sees its knee")
            searches.append(_Search(self, cell, system, *self.bench.expected(cell, system)))
        if self.quick:
            for search in searches:
                for fraction in QUICK_FRACTIONS:
                    search.window(fraction * search.knee, self.seeds[0])
            return
        alike = {(one.system, one.tuning): one for one in searches}
        for seed in self.seeds:
            for search in searches:
                if search.twin_in(alike) is None:
                    search.run(seed)
        for search in searches:
            row = (search.twin_in(alike) or search).row() | search.about()
            self.rows.append(row)
            promises = search.system.ours and not search.system.drafts and cell.engines == 1
            if promises and row["mean"] > 0:
                for load in LOADS:
                    window = search.window(load * row["mean"], self.seeds[0])
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
        return {**headline(**parts), **parts, "method": method, "provenance": about}

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
            "arrivals": {str(engines): name for engines, name in ARRIVALS.items()},
            "share_not_counted": WARM_UP_SHARE,
            "rates_apart": STEP,
            "loads": list(LOADS),
            "tpot_scale": None if tpot_scale == 1.0 else tpot_scale,  # None: paces are those of the classes
            "window_s": self.bench.window_s,  # None: as long as each cell asks for
        }


@dataclass(slots=True)
class _Search:
    """For the capacity of one system in one cell, seed after seed; a seed begins where the last one ended."""

    results: Results
    cell: Cell
    system: RealSystem
    tuning: Tuning
    knee: float
    per_seed: list[float] = field(default_factory=list)
    windows: list[Row] = field(default_factory=list)
    guess: float = 0.0

    def window(self, rate_per_s: float, seed: int) -> Row:
        """One that is among the results from then on."""
        row = self.results.bench.window(self.cell, self.system, self.tuning, rate_per_s, seed)
        if row not in self.results.windows:
            self.results.windows.append(row)
        return row

    def run(self, seed: int) -> None:
        """With one seed."""

        def at(rate: float) -> Point:
            if rate < self.knee / HOPELESS:
                return Point(rate, 0.0, SHARE, True, {})  # not measured: next to nothing is held
            row = self.window(rate, seed)
            self.windows.append(row)
            return Point(rate, row["rate_per_s"], row["attainment"] or 0.0, row["drained"], {})

        guess = self.guess or self.knee
        _, points = capacity(at, SHARE, guess, STEP - 1 + 1e-6, STEP)
        self.per_seed.append(crossing(points))
        self.guess = max((one.asked_per_gpu for one in points if one.holds(SHARE)), default=guess)

    def twin_in(self, searches: Mapping[tuple[RealSystem, Tuning], _Search]) -> _Search | None:
        """Where tuning has found nothing better: the system as it comes, of which all windows are its own."""
        return searches.get((self.system.untuned, self.tuning)) if self.system.tuned else None

    def about(self) -> Row:
        """What a row says of the system."""
        return {
            "scenario": self.cell.scenario,
            "engines": self.cell.engines,
            "arrivals": self.cell.arrivals,
            "system": self.system.name,
            "ours": self.system.ours,
            "tuned": self.system.tuned,
            "drafts": self.system.drafts,
            "tuning": self.tuning.words,
            "predicted": self.knee,
        }

    def row(self) -> Row:
        """What was found."""
        found = {"per_seed": self.per_seed, **spread(self.per_seed)}
        return {**self.about(), **found, "measured_on": _measured_on(self.windows)}


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
