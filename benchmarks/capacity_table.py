"""`slosserve bench capacity`: how many requests a second each system keeps its promises for, per GPU.

For every scenario and hardware each baseline is measured as it comes and tuned, ours in each mode, against the
bounds that hold for any scheduler. Everything is tuned on a seed that is not reported. The file of figures is
filled cell by cell, so that hours may be run in parts: what a run does not measure stays in it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Hashable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from benchmarks.bounds.bound import bound
from benchmarks.capacity import Setting
from benchmarks.capacity_cell import TUNING_SEED, Cell, labels_of, measure
from benchmarks.capacity_file import Begin, begins, cell_of, joined, of_other_runs, on_as_many_gpus
from benchmarks.hardware import hardware
from benchmarks.provenance import commit, provenance
from benchmarks.scenarios import SCENARIOS, TRACES, make
from benchmarks.simulator.systems import DESIGNS, MODES, OURS_NAME, design
from benchmarks.traces import data_directory
from engine.errors import ConfigError

SEEDS = (1, 2, 3)
SHARES = (0.9, 0.98)
REPLICAS = 2
GUESS_OF_BOUND = 0.6
QUICK_SECONDS = 120.0
BOUND_SECONDS = 600.0
COLUMNS = 6  # of scenarios beside each other: a terminal of 80 characters shows them
SHIPPED = Path(__file__).parent / "results" / "capacity.json"
Row = dict[str, Any]


def bench_capacity(
    scenario: Annotated[list[str] | None, typer.Option(help="Only this one (repeatable).")] = None,
    on: Annotated[
        list[str] | None, typer.Option(help="Hardware (repeatable); else paper and a GQA model.")
    ] = None,
    system: Annotated[list[str] | None, typer.Option(help="Only this one (repeatable).")] = None,
    mode: Annotated[
        list[str] | None, typer.Option(help=f"Of ours, only this one (repeatable): {', '.join(MODES)}.")
    ] = None,
    traces: Annotated[bool, typer.Option(help="Also the recorded traces, where they are at hand.")] = True,
    speculation: Annotated[bool, typer.Option(help="Also with speculation, acceptance 0.7.")] = True,
    seeds: Annotated[int, typer.Option(min=1, help="How many are reported.")] = len(SEEDS),
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = os.cpu_count() or 1,
    quick: Annotated[bool, typer.Option(help="Two scenarios, one seed, short runs: a laptop minute.")] = False,
    cache: Annotated[Path, typer.Option(help="Where points are kept.")] = Path("out/bench/cache"),
    out: Annotated[
        Path | None, typer.Option(help="Where the figures go.", show_default="out/bench/capacity.json")
    ] = None,
) -> None:
    """Search the capacity of every system in every scenario. What was measured before is not measured again.

    Rows are added to the file: those of what is not measured now stay, each with the commit that made it.

    Example: slosserve bench capacity --scenario chatbot --on paper --system ours
    """
    console = Console()
    seeds = 1 if quick else seeds
    out = out or Path("out/bench/quick/capacity.json" if quick else "out/bench/capacity.json")
    about = {"tuning_seed": TUNING_SEED, "replicas": REPLICAS, "seeds": seeds}
    before = of_other_runs(out, about)
    plan = _plan(scenario, on, system, mode, traces, speculation, quick)
    rows: list[Row] = []
    fixed: list[Row] = []
    bounds: list[Row] = []
    with _progress(console) as progress, ProcessPoolExecutor(workers) as pool:
        settings = _distinct(plan)
        task = progress.add_task("bounds", total=len(settings))
        found = {}
        for key, row in zip(settings, pool.map(_bound, settings), strict=True):
            found[key] = row
            bounds.append(row)
            progress.advance(task)
        cells = _cells(plan, found, tuple(range(1, seeds + 1)), _begins(before["rows"]))
        progress.update(task, total=len(settings) + len(cells))
        futures: dict[Future[tuple[list[Row], list[Row]]], Cell] = {
            pool.submit(measure, cell, cache): cell for cell in cells
        }
        for future in as_completed(futures):
            more, at_rates = future.result()
            rows += more
            fixed += at_rates
            progress.update(task, description=futures[future].name)
            progress.advance(task)
            if not console.is_terminal:
                console.print(f"{len(rows)} rows: {futures[future].name}")
            _write(out, before, rows, bounds, fixed, about)
    results = _write(out, before, rows, bounds, fixed, about)
    _show(console, results)
    console.print(f"written to {out}")


def _plan(
    scenarios: Sequence[str] | None,
    on: Sequence[str] | None,
    systems: Sequence[str] | None,
    modes: Sequence[str] | None,
    traces: bool,
    speculation: bool,
    quick: bool,
) -> list[Setting]:
    """Every setting of the table, with default tuning. Raises ConfigError for a mode that there is not."""
    for unknown in {*(modes or ())} - {*MODES}:
        raise ConfigError(f"there is no mode {unknown!r}: give {', '.join(MODES)}")
    names = list(scenarios or SCENARIOS)
    recorded = [] if scenarios or quick or not traces or data_directory() is None else list(TRACES)
    machines = list(on or ("paper", "rtxpro6000-llama-3.1-8b"))
    duration_s = QUICK_SECONDS if quick else None
    if quick and not scenarios:
        names = ["chatbot", "coder"]
    if quick and not on:
        machines = ["paper"]
    settings = []
    for machine in machines:
        acceptances = [None, 0.7] if speculation and not quick and machine == machines[0] else [None]
        for name in [*names, *(recorded if machine == machines[0] else [])]:
            for acceptance in acceptances if name in SCENARIOS else [None]:
                found = _of_scenario(name, machine, acceptance, systems, duration_s, quick)
                settings += [one for one in found if one.system != OURS_NAME or one.mode in (modes or MODES)]
    if not settings:
        raise ConfigError("nothing to measure: no system fits what was asked for")
    return settings


def _of_scenario(
    name: str,
    machine: str,
    acceptance: float | None,
    systems: Sequence[str] | None,
    duration_s: float | None,
    quick: bool,
) -> list[Setting]:
    settings = []
    for system in systems or DESIGNS:
        chosen = design(system)
        if chosen.drafts != (acceptance is not None) and system != OURS_NAME:
            continue
        modes = MODES if system == OURS_NAME and acceptance is None and not quick else ("colocated",)
        if chosen.disaggregated:
            modes = ("disaggregated",)
        for mode in modes:
            tuning = chosen.defaults
            if mode == "disaggregated":
                tuning = replace(tuning, prefill=1, decode=1)
            settings.append(
                Setting(name, machine, system, mode, REPLICAS, tuning, acceptance, duration_s=duration_s)
            )
    return settings


Where = tuple[str, str, float | None, float | None]


def _distinct(plan: Iterable[Setting]) -> list[Where]:
    """Scenario, hardware, acceptance and duration: what a bound depends on."""
    return list(dict.fromkeys((s.scenario, s.hardware, s.acceptance, s.duration_s) for s in plan))


def _bound(where: Where) -> Row:
    """The bounds of a scenario on a hardware, from a long run of the tuning seed's arrivals, per GPU."""
    scenario, machine, acceptance, _ = where
    chosen = hardware(machine)
    workload = make(scenario, 10.0, BOUND_SECONDS, TUNING_SEED, tpot_scale=chosen.tpot_scale)
    workload = workload.clipped(chosen.kv_tokens // 2)
    cost = chosen.cost if acceptance is None else chosen.speculative_cost
    found = bound(
        workload, cost, chosen.kv_tokens, 1, share=SHARES[0], acceptance=acceptance, clairvoyant_too=False
    )
    return {
        "scenario": scenario,
        "hardware": machine,
        "acceptance": acceptance,
        "everybody_per_gpu": found.everybody_per_s / chosen.tp,
        "blind_per_gpu": found.steady_blind_per_s / chosen.tp,
        "kept_per_gpu": found.steady_kept_per_s / chosen.tp,
        "clairvoyant_per_gpu": found.steady_clairvoyant_per_s / chosen.tp,
        "limit": found.limit,
        "parts": dict(found.parts),
    }


def _begins(before: Sequence[Row]) -> dict[tuple[Hashable, ...], Begin]:
    """What the file has, and of what it lacks, the results that ship: most of a search is finding the place."""
    shipped = json.loads(SHIPPED.read_text()) if SHIPPED.is_file() else {"rows": []}
    return begins(shipped["rows"]) | begins(before)


def _cells(
    plan: Iterable[Setting],
    bounds: Mapping[Where, Row],
    seeds: tuple[int, ...],
    begin: Mapping[tuple[Hashable, ...], Begin],
) -> list[Cell]:
    """A cell per setting and column: first what is quick, then ours, mode after mode."""
    cells = []
    for setting in plan:
        found = bounds[setting.scenario, setting.hardware, setting.acceptance, setting.duration_s]
        blind = float(found["blind_per_gpu"])
        guess = blind * GUESS_OF_BOUND * (0.5 if setting.mode == "disaggregated" else 1.0)
        plain = setting.duration_s is None and setting.acceptance is None
        shares = SHARES if plain else SHARES[:1]
        columns = (True,) if setting.system == OURS_NAME else (False, True)
        for tuned in columns:
            known = begin.get(cell_of(labels_of(setting, tuned)))
            cells.append(Cell(setting, tuned, guess, blind, seeds, shares, known))

    def effort(cell: Cell) -> tuple[bool, int, float]:
        setting = cell.setting
        return setting.system == OURS_NAME, MODES.index(setting.mode), setting.seconds

    return sorted(cells, key=effort)


def _write(
    out: Path,
    before: dict[str, list[Row]],
    rows: Sequence[Row],
    bounds: Sequence[Row],
    fixed: Sequence[Row],
    about: Row,
) -> dict[str, Any]:
    made = {"rows": rows, "bounds": bounds, "fixed_rates": fixed}
    stamped = {name: [{**row, "commit": commit()} for row in table] for name, table in made.items()}
    tables = joined(before, stamped)
    results = {
        **headline(tables["rows"], tables["bounds"], acceptance=None),
        "with_speculation": headline(tables["rows"], tables["bounds"], acceptance=0.7),
        **tables,
        "settings": about,
        "provenance": provenance(TUNING_SEED),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_suffix(".part")
    unfinished.write_text(json.dumps(results, indent=1))
    unfinished.rename(out)
    return results


def headline(rows: Iterable[Row], bounds: Iterable[Row], acceptance: float | None) -> dict[str, float | None]:
    """Ours against the best of the others over the six scenarios on the first hardware, at 90 %.

    Ours is its best mode, of those on as many GPUs; the others are at whatever ratio is their best. With
    speculation, the others are the best of those with and without it; and as the paper has it, ours with it is
    also put beside what is shipped, which drafts nothing.
    """
    rows = [row for row in rows if row["share"] == SHARES[0] and row["hardware"] == "paper"]
    mine = [row for row in rows if row["system"] == OURS_NAME and row["acceptance"] == acceptance]
    ours = _best(on_as_many_gpus(mine))
    others = [row for row in rows if row["system"] != OURS_NAME and row["acceptance"] in (None, acceptance)]
    claimed = ("vllm", "vllm-spec", "sarathi", "distserve")
    default = _best([r for r in others if r["column"] == "default" and r["system"] in claimed])
    shipped = _best(
        [r for r in others if r["column"] == "default" and r["system"] in claimed and not r["acceptance"]]
    )
    tuned = _best([row for row in others if row["column"] == "tuned"])
    blind = {
        row["scenario"]: row["blind_per_gpu"]
        for row in bounds
        if row["hardware"] == "paper" and row["acceptance"] == acceptance
    }
    names = [name for name in SCENARIOS if name in ours]
    over_tuned = [ours[name] / tuned[name] for name in names if tuned.get(name)]
    over_default = [ours[name] / default[name] for name in names if default.get(name)]
    over_shipped = [ours[name] / shipped[name] for name in names if shipped.get(name)]
    of_bound = [ours[name] / blind[name] for name in names if blind.get(name)]
    drafted = {} if acceptance is None else {"geomean_vs_best_default_without_drafts": _geomean(over_shipped)}
    return {
        **drafted,
        "geomean_vs_best_tuned": _geomean(over_tuned),
        "geomean_vs_best_default": _geomean(over_default),
        "worst_ratio": min(over_tuned, default=None),
        "share_of_bound": sum(of_bound) / len(of_bound) if of_bound else None,
    }


def _best(rows: Iterable[Row]) -> dict[str, float]:
    best: dict[str, float] = {}
    for row in rows:
        best[row["scenario"]] = max(best.get(row["scenario"], 0.0), row["mean"])
    return best


def _geomean(values: Sequence[float]) -> float | None:
    positive = [value for value in values if value > 0]
    if not positive or len(positive) < len(values):
        return 0.0 if values else None
    return math.exp(sum(map(math.log, positive)) / len(positive))


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


def _show(console: Console, results: Mapping[str, Any]) -> None:
    for machine in dict.fromkeys(row["hardware"] for row in results["rows"]):
        for acceptance in (None, 0.7):
            _table(console, results, machine, acceptance)
    for name in ("geomean_vs_best_tuned", "geomean_vs_best_default", "worst_ratio", "share_of_bound"):
        plain, drafted = results[name], results["with_speculation"][name]
        words = ", ".join("-" if value is None else f"{value:.2f}" for value in (plain, drafted))
        console.print(f"{name}: {words} (without, with speculation)")


def _table(console: Console, results: Mapping[str, Any], machine: str, acceptance: float | None) -> None:
    rows = [
        row
        for row in results["rows"]
        if row["hardware"] == machine and row["acceptance"] == acceptance and row["share"] == SHARES[0]
    ]
    if not rows:
        return
    drafts = "" if acceptance is None else f", acceptance {acceptance}"
    systems = list(dict.fromkeys((row["system"], row["mode"], row["column"]) for row in rows))
    systems.sort(key=lambda key: (list(DESIGNS).index(key[0]), key[2], MODES.index(key[1])))
    blind = {
        row["scenario"]: row["blind_per_gpu"]
        for row in results["bounds"]
        if row["hardware"] == machine and row["acceptance"] == acceptance
    }
    figures = {(row["scenario"], row["system"], row["mode"], row["column"]): row["mean"] for row in rows}
    names = list(dict.fromkeys(row["scenario"] for row in rows))
    for at in range(0, len(names), COLUMNS):
        some = names[at : at + COLUMNS]
        title = f"{machine}{drafts}: requests a second and GPU at 90 %"
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("", no_wrap=True)
        for name in some:
            table.add_column(name.replace("-", "\n"), justify="right")
        for system, mode, column in systems:
            found = [figures.get((name, system, mode, column)) for name in some]
            table.add_row(f"{system}, {mode if system == OURS_NAME else column}", *map(_words, found))
        table.add_row("bound", *(_words(blind.get(name)) for name in some))
        console.print(table)


def _words(rate: float | None) -> str:
    return "-" if rate is None or math.isnan(rate) else f"{rate:.2f}" if rate >= 1 else f"{rate:.3f}"
