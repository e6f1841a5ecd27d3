"""What the planner costs and what it wins: time and memory of a call, and value against simpler choices.

Instances are drawn from the scenarios of SLOs-Serve on its own profile, OPT-7B on an A100-40G (see mixes).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks.mixes import SCENARIOS, Mix
from benchmarks.planner_speed import (
    MEMORY_SHAPES,
    RUNNING,
    SHAPES,
    TPOTS_S,
    WAITING,
    WARM_UP_CALLS,
    call_memory,
    compile_times,
    time_calls,
    time_compose,
)
from benchmarks.planner_value import CASES, ORDERS, compare
from benchmarks.provenance import provenance
from coordinator.planner.admission import warm_up

CALL_TARGET_MS, COMPOSE_TARGET_MS, PAPER_MS = 1.0, 0.2, 10.0
TARGET_CALL = {"running": 64, "newcomers": 10, "tiers": 3}


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured. `row_s`: most seconds to draw the instances of a row, and to time each way."""

    calls: int
    batches: int
    overloads: int
    exhaustive: int
    row_s: float


FULL = Effort(calls=500, batches=2000, overloads=600, exhaustive=60, row_s=6.0)
QUICK = Effort(calls=100, batches=200, overloads=20, exhaustive=4, row_s=0.5)


def bench_planner(
    quick: Annotated[bool, typer.Option("--quick", help="Few instances a row: a look, not a result.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of all instances.")] = 1,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("out/bench/planner.json"),
) -> None:
    """Time the planner and compare what it admits with simpler choices.

    Example: python -m benchmarks.planner --quick
    """
    console = Console()
    effort = QUICK if quick else FULL
    with _progress(console) as progress:
        warm_up()
        rows = measure(jobs(effort, seed), progress)
    results = {
        "targets": targets(rows["calls"], rows["compose"]),
        **rows,
        "method": _method(effort),
        "provenance": provenance(seed),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    _print(console, results)
    console.print(f"figures in {out}")


@dataclass(frozen=True, slots=True)
class Job:
    """One row to measure, for the list `figure` of the JSON. `weight`: about how long it takes."""

    figure: str
    weight: float
    text: str
    measure: Callable[[], dict[str, Any]]


def jobs(effort: Effort, seed: int) -> list[Job]:
    """Every row of the command, in order."""
    mixes = {name: Mix.of(name, seed) for name in SCENARIOS}
    mixed = mixes["Mixed"]
    listed = [Job("compile", 15, "compiling", compile_times)]
    for shape in SHAPES:
        text = f"calls: {shape.running} running, {shape.newcomers} newcomers, {shape.tiers} tiers"
        once = partial(time_calls, mixed, shape, effort.calls, effort.row_s, seed)
        listed.append(Job("calls", 1 + shape.newcomers / 10 + shape.running / 64, text, once))
    for running, waiting in product(RUNNING, WAITING):
        text = f"batches: {running} running, {waiting} waiting"
        once = partial(time_compose, running, waiting, effort.batches, effort.row_s, seed)
        listed.append(Job("compose", 1 + running / 64, text, once))
    listed += [
        Job("memory", 0.5, "memory", partial(call_memory, mixed, *sizes, seed)) for sizes in MEMORY_SHAPES
    ]
    for case in CASES:
        once = partial(compare, mixes[case.scenario], case, effort.overloads, effort.exhaustive, seed)
        listed.append(Job("value", 3, f"value: {case.scenario}", once))
    return listed


def measure(listed: Sequence[Job], progress: Progress) -> dict[str, list[dict[str, Any]]]:
    """Rows by figure."""
    task = progress.add_task("starting", total=sum(job.weight for job in listed))
    rows: dict[str, list[dict[str, Any]]] = {job.figure: [] for job in listed}
    for job in listed:
        progress.update(task, description=job.text)
        rows[job.figure].append(job.measure())
        progress.advance(task, job.weight)
    return rows


def targets(calls: Sequence[Mapping[str, Any]], composed: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures that were promised, each the worst over its rows, and whether it holds."""
    aimed = [row for row in calls if all(row[key] == value for key, value in TARGET_CALL.items())]
    batches = [row for row in composed if row["running"] == TARGET_CALL["running"]]
    return {
        "call_p99_ms": {**_target(aimed, CALL_TARGET_MS), **TARGET_CALL},
        "compose_p99_ms": {**_target(batches, COMPOSE_TARGET_MS), "running": TARGET_CALL["running"]},
        "any_call_p99_ms": _target(calls, PAPER_MS),
    }


def _target(rows: Sequence[Mapping[str, Any]], below_ms: float) -> dict[str, Any]:
    worst_ms = max(row["p99_ms"] for row in rows)
    thread_ms = max(row["thread_p99_ms"] for row in rows)
    return {"worst": worst_ms, "worst_by_thread": thread_ms, "below": below_ms, "met": worst_ms < below_ms}


def _method(effort: Effort) -> dict[str, Any]:
    return {
        "effort": asdict(effort),
        "tpots_ms_by_tiers": [tpot_s * 1e3 for tpot_s in TPOTS_S],
        "warm_up_calls_dropped": WARM_UP_CALLS,
        "garbage_collector": "as Python sets it; the instances, drawn before, are frozen out of its sight",
        "p50_ms, p99_ms, max_ms": "solve(instance, why=False) by the wall; with_why: solve(instance)",
        "thread_p99_ms": "by the thread's own clock: what is left when other processes take the core",
        "not_timed": "instances in which the promised alone do not fit (redrawn)",
        "lengths": "known (the oracle): value and time of the choice are compared, not of the forecast",
        "value": "value_lost_percent: 100 (1 - sum of values in order / sum of values of the DP)",
        "exhaustive": "most value over every subset for which the planner's own check finds a plan",
    }


def _progress(console: Console) -> Progress:
    text = TextColumn("[progress.description]{task.description}")
    return Progress(text, BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), console=console)


def _print(console: Console, results: Mapping[str, Any]) -> None:
    console.print(_calls_table(results["calls"]))
    console.print(_compose_table(results["compose"]))
    console.print(_value_table(results["value"]))
    tried = [row["exhaustive"] for row in results["value"]]
    console.print(
        f"every subset tried: {sum(row['dp_below_best'] for row in tried)} of "
        f"{sum(row['instances'] for row in tried)} instances have a better one than the DP's"
    )
    for row in results["memory"]:
        rss_mib = row["peak_rss_growth_mib"]
        grown = "unknown" if rss_mib is None else f"{rss_mib:.1f} MiB"
        console.print(
            f"memory of a call, {row['running']} running, {row['newcomers']} newcomers: the process grows by "
            f"{grown}, {row['tracemalloc_peak_mib']:.1f} MiB are asked for"
        )
    for row in results["compile"]:
        console.print(
            f"first call: {row['compile_s']:.1f} s to compile, {row['load_from_cache_s']:.2f} s from the cache"
        )
    for name, row in results["targets"].items():
        verdict = "met" if row["met"] else "[red]missed[/red]"
        console.print(
            f"{name}: {row['worst']:.2f} (thread {row['worst_by_thread']:.2f}), "
            f"target < {row['below']:g}: {verdict}",
            highlight=False,
        )


def _calls_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    columns = ("run", "new", "tiers", "KV", "n", "p50", "p99", "max", "thr99", "why99", "exact", "labels")
    table = _table("one admission, ms (thr99: p99 by thread time; why99: p99 with reasons)", columns)
    for row in rows:
        table.add_row(
            *(str(row[key]) for key in ("running", "newcomers", "tiers")),
            "tight" if row["memory_tight"] else "ample",
            str(row["instances"]),
            *(_ms(row[key]) for key in ("p50_ms", "p99_ms", "max_ms", "thread_p99_ms")),
            _ms(row["with_why"]["p99_ms"]),
            f"{row['exact_share']:.0%}",
            str(row["peak_labels"]),
        )
    return table


def _compose_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("one batch, ms", ("running", "waiting", "n", "p50", "p99", "max", "thr99"))
    for row in rows:
        table.add_row(
            *(str(row[key]) for key in ("running", "waiting", "batches")),
            *(f"{row[key]:.3f}" for key in ("p50_ms", "p99_ms", "max_ms", "thread_p99_ms")),
        )
    return table


def _value_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    columns = ("scenario", "value", "KV", "n", "tight", "DP ms", *(name.split()[0] for name in ORDERS))
    table = _table("value lost against the DP, %; p50 ms of each in the last row", columns)
    for row in rows:
        table.add_row(
            row["scenario"],
            row["value"],
            row["kv"],
            str(row["instances"]),
            f"{row['memory_tight_share']:.0%}",
            _ms(row["dp"]["p50_ms"]),
            *(f"{row['orders'][name]['value_lost_percent']:.1f}" for name in ORDERS),
        )
    medians_ms = [float(np.median([row["orders"][name]["p50_ms"] for row in rows])) for name in ORDERS]
    table.add_row("p50 ms", "", "", "", "", "", *map(_ms, medians_ms))
    return table


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:.2f}" if milliseconds < 10 else f"{milliseconds:.0f}"


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, justify="right")
    return table


if __name__ == "__main__":
    typer.run(bench_planner)
