"""`slosserve bench real`: real vLLM engines under our planner and as they ship, side by side.

Scenario after scenario, so that what is compared is measured within minutes of each other, on one machine.
Every window is kept: a run that is interrupted, or out of time, goes on where it was. The file of figures is
filled scenario by scenario, and each says where it was measured: what is there of others stays.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.real.bench import Bench, OutOfTime
from benchmarks.real.cells import LAYOUTS, Cell
from benchmarks.real.headline import table, windows_table
from benchmarks.real.results import SEEDS, Results, of_other_runs
from benchmarks.real.site import CPU, GPU
from benchmarks.real.systems import systems
from benchmarks.studies.crew import write
from engine.errors import ConfigError, SlosserveError

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
    out: Annotated[
        Path | None, typer.Option(help="Where the figures go.", show_default="out/bench/real.json")
    ] = None,
) -> None:
    """Measure what real engines keep of their promises, under ours and as vLLM ships them.

    What was measured before is not measured again: give --minutes, and call it again to go on. On GPUs the
    profile of their steps is left in configs/profiles.

    Example: slosserve bench real --scenario chatbot --engines 1 --minutes 60
    """
    console = Console(width=110, highlight=False)
    name = f"real{'_gpu' if gpu else ''}{'-quick' if quick else ''}.json"
    out = out or Path("out/bench") / name
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
            results = Results(bench, tuple(range(1, seeds + 1)), quick)
            if not quick:
                results.before = of_other_runs(out, results.method())
            try:
                chosen = {
                    cell: [
                        one
                        for one in systems(cell.engines, system, drafting=speculation and not quick)
                        if not quick or not one.tuned
                    ]
                    for cell in cells
                }
                for cell in cells:
                    results.check(cell, chosen[cell])
                for cell in cells:
                    results.measure(cell, chosen[cell])
                    write(out, results.told())
            except OutOfTime:
                console.print("out of time: call it again, and it goes on where it was")
            finally:
                bench.close()
    except SlosserveError as error:
        Console(stderr=True).print(f"[red]error:[/red] {escape(str(error))}", highlight=False)
        raise typer.Exit(2) from error
    told = results.told()
    write(out, told)
    console.print(windows_table(told["windows"]) if quick else table(told["rows"]))
    for key, value in told.items():
        if isinstance(value, float):
            console.print(f"{key}: {value:.3f}")
    console.print(f"figures in {out}", soft_wrap=True)


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
