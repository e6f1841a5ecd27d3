"""`slosserve bench real`: real vLLM engines under our planner and as they ship, side by side.

Scenario after scenario, so that what is compared is measured within minutes of each other. Every window is
kept: a run that is interrupted, or out of time, goes on where it was.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.capacity import Point, capacity, spread
from benchmarks.provenance import provenance
from benchmarks.real.bench import Bench, OutOfTime
from benchmarks.real.cells import ARRIVALS, LAYOUTS, Cell
from benchmarks.real.fingerprint import fingerprint
from benchmarks.real.headline import headline, table, windows_table
from benchmarks.real.predicted import SHARE, TUNING_SEED
from benchmarks.real.site import CPU, GPU
from benchmarks.real.systems import RealSystem, systems
from benchmarks.real.window import Row
from benchmarks.simulator.outcome import WARM_UP_SHARE
from benchmarks.simulator.systems import Tuning
from benchmarks.studies.crew import write
from engine.errors import ConfigError, SlosserveError

SEEDS = (1, 2, 3)
STEP = 1.15  # between two rates; the knee is read off the line between them
LOADS = (0.5, 1.0, 1.5, 2.0)  # of our capacity: what was admitted is to be kept at each
HOPELESS = 10.0  # times below what the simulator says, a search ends
QUICK_FRACTIONS = (0.8, 1.0, 1.2)
PROFILE_MINUTES = 6.0


def bench_real(
    scenario: Annotated[list[str] | None, typer.Option(help="Only this one (repeatable).")] = None,
    engines: Annotated[list[int] | None, typer.Option(help="1, 2 (repeatable); else both.")] = None,
    system: Annotated[list[str] | None, typer.Option(help="Only this one (repeatable).")] = None,
    speculation: Annotated[bool, typer.Option(help="Also with n-gram drafts.")] = True,
    seeds: Annotated[int, typer.Option(min=1, help="Runs at the knee.")] = len(SEEDS),
    minutes: Annotated[float | None, typer.Option(min=1, help="Begin no window after so long.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Chatbot on one engine at three rates.")] = False,
    window_s: Annotated[float | None, typer.Option(min=1, help="Shorter windows, for a look.")] = None,
    gpu: Annotated[
        bool, typer.Option("--gpu", help="An engine per GPU, not per core; lengths undivided.")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(help="Of `slosserve model make`.", show_default=f"{CPU.model}, or {GPU.model} on GPUs"),
    ] = None,
    step_profile: Annotated[
        str | None, typer.Option(help="Of the model here; else one that fits, or measured first.")
    ] = None,
    profile_minutes: Annotated[float, typer.Option(min=0.1, help="For measuring one.")] = PROFILE_MINUTES,
    cache: Annotated[Path, typer.Option(help="Where windows are kept.")] = Path("out/bench/real"),
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("out/bench/real.json"),
) -> None:
    """Measure what real engines keep of their promises, under ours and as vLLM ships them.

    What was measured before is not measured again: give --minutes, and call it again to go on. On GPUs the
    profile of their steps is left in configs/profiles.

    Example: slosserve bench real --scenario chatbot --engines 1 --minutes 60
    """
    console = Console(width=110, highlight=False)
    began_s = time.monotonic()
    columns = (TextColumn("[progress.description]{task.description}"), BarColumn(), TimeElapsedColumn())
    try:
        site = GPU if gpu else CPU
        cells = [one for one in _cells(scenario, engines, quick) if one.engines <= len(site.devices())]
        if not cells:
            raise ConfigError(f"too few devices here for --engines {engines}: {', '.join(site.devices())}")
        with Progress(*columns, console=console, refresh_per_second=1) as progress:
            bar = progress.add_task("starting", total=None)

            def say(text: str) -> None:
                progress.update(bar, description=text)

            bench = Bench.of(site, model, step_profile, profile_minutes, out.parent, cache, say)
            bench.window_s = window_s
            bench.ends_s = math.inf if minutes is None else began_s + 60 * minutes
            results = _Results(bench, tuple(range(1, seeds + 1)), quick)
            try:
                for cell in cells:
                    chosen = systems(cell.engines, system, drafting=speculation and not quick)
                    results.measure(cell, [one for one in chosen if not quick or not one.tuned])
                    write(out, results.told(seeds))
            except OutOfTime:
                console.print("out of time: call it again, and it goes on where it was")
            finally:
                bench.close()
    except SlosserveError as error:
        Console(stderr=True).print(f"[red]error:[/red] {escape(str(error))}", highlight=False)
        raise typer.Exit(2) from error
    told = results.told(seeds)
    write(out, told)
    console.print(windows_table(told["windows"]) if quick else table(told["rows"]))
    for key, value in told.items():
        if isinstance(value, float):
            console.print(f"{key}: {value:.3f}")
    console.print(f"figures in {out}", soft_wrap=True)


@dataclass(slots=True)
class _Results:
    """Capacities as they are found, and every window that they are made of."""

    bench: Bench
    seeds: tuple[int, ...]
    quick: bool
    rows: list[Row] = field(default_factory=list)
    loads: list[Row] = field(default_factory=list)
    windows: list[Row] = field(default_factory=list)

    def measure(self, cell: Cell, chosen: Sequence[RealSystem]) -> None:
        """Every system in this cell, one after another."""
        for system in chosen:
            self.bench.say(f"{cell.text}: {system.label}, where the simulator sees its knee")
            tuning, knee = self._expected(cell, system)
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

    def told(self, seeds: int) -> Row:
        """All that is known so far, as JSON takes it."""
        about = provenance(self.seeds[0])
        return {**headline(self.rows, self.loads), **self._method(seeds), "provenance": about}

    def _method(self, seeds: int) -> Row:
        site = self.bench.machine.site
        method = {
            "model": self.bench.model,
            "site": site.name,
            "devices": site.devices(),
            "step_profile": self.bench.profile.name,
            "share": SHARE,
            "seeds": seeds,
            "tuning_seed": TUNING_SEED,
            "lengths_divided_by": site.divide,
            "outputs_divided_further_by": dict(site.further),
            "arrivals": ARRIVALS,
            "share_not_counted": WARM_UP_SHARE,
            "rates_apart": STEP,
            "loads": LOADS,
        }
        return {"rows": self.rows, "loads": self.loads, "windows": self.windows, "method": method}

    def _expected(self, cell: Cell, system: RealSystem) -> tuple[Tuning, float]:
        """Settings and knee by the simulator, kept like windows."""

        def make() -> Row:
            machine = self.bench.machine
            tuning = machine.tuned(cell, system) if system.tuned else system.defaults(machine.site)
            knee = machine.knee(cell, system, tuning, TUNING_SEED, machine.guess(cell))
            return {"tuning": asdict(tuning), "knee": knee}

        key = ["expected", asdict(cell), asdict(system), self.bench.profile.read_text(encoding="utf-8")]
        key.append(fingerprint(system.ours, self.bench.machine.site))  # beside the simulator's own
        found = self.bench.cache.kept(key, make)
        return Tuning(**found["tuning"]), float(found["knee"]) or self.bench.machine.guess(cell)

    def _window(self, cell: Cell, system: RealSystem, tuning: Tuning, rate: float, seed: int) -> Row:
        row = self.bench.window(cell, system, tuning, rate, seed)
        if row not in self.windows:
            self.windows.append(row)
        return row

    def _capacity(self, cell: Cell, system: RealSystem, tuning: Tuning, knee: float) -> Row:
        per_seed, guess = [], knee
        for seed in self.seeds:

            def at(rate: float, seed: int = seed) -> Point:
                if rate < knee / HOPELESS:
                    return Point(rate, 0.0, SHARE, True, {})  # not measured: next to nothing is held
                row = self._window(cell, system, tuning, rate, seed)
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


def _cells(scenarios: list[str] | None, engines: list[int] | None, quick: bool) -> list[Cell]:
    known = sorted({name for names in LAYOUTS.values() for name in names})
    strange = sorted(set(scenarios or ()) - set(known))
    if strange:
        raise ConfigError(f"no scenario {strange[0]!r}; there are {', '.join(known)}")
    if quick:
        return [Cell((scenarios or ["chatbot"])[0], 1)]
    unknown = sorted(set(engines or ()) - set(LAYOUTS))
    if unknown:
        raise ConfigError(f"--engines {unknown[0]}: there are {', '.join(map(str, LAYOUTS))}")
    cells = [
        Cell(name, many)
        for many, names in LAYOUTS.items()
        for name in names
        if (not engines or many in engines) and (not scenarios or name in scenarios)
    ]
    if not cells:
        raise ConfigError(f"nothing to measure: there are {json.dumps(LAYOUTS)} (engines: scenarios)")
    return cells
