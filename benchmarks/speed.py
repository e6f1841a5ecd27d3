"""`slosserve bench speed`: simulated seconds per second and replica, for every system."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.capacity import Setting, measure
from benchmarks.provenance import provenance
from benchmarks.simulator.systems import DESIGNS

TARGET = 150.0
# Rates per GPU near the capacity of ours, where its planner has most to do.
RATES = {"chatbot": 4.0, "coder": 3.0, "summarizer": 2.8, "mixed": 3.0, "tool": 3.0}
WARM_UP_S = 10.0


def speed(
    seconds: Annotated[float, typer.Option(min=10, help="Simulated, of each run.")] = 300.0,
    replicas: Annotated[int, typer.Option(min=1)] = 2,
    seed: Annotated[int, typer.Option()] = 1,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("out/bench/speed.json"),
) -> None:
    """Run every system once in every scenario, alone on a core, and say how fast simulated time went.

    Example: slosserve bench speed --seconds 300
    """
    rows: list[dict[str, Any]] = []
    table = Table(title=f"simulated seconds per second and replica (target {TARGET:g})")
    table.add_column("scenario")
    systems = [design for design in DESIGNS.values() if not design.drafts and not design.disaggregated]
    for design in systems:
        table.add_column(design.label, justify="right")
    for scenario, rate in RATES.items():
        cells = []
        for design in systems:
            row = _row(scenario, rate, design.name, replicas, seconds, seed)
            rows.append(row)
            cells.append(f"{row['simulated_s_per_s_and_replica']:.0f}")
        table.add_row(scenario, *cells)
    out.parent.mkdir(parents=True, exist_ok=True)
    ours = [row["simulated_s_per_s_and_replica"] for row in rows if row["system"] == "ours"]
    results = {"target": TARGET, "ours_least": min(ours), "rows": rows, "provenance": provenance(seed)}
    out.write_text(json.dumps(results, indent=1))
    Console().print(table)


def _row(scenario: str, rate: float, system: str, replicas: int, seconds: float, seed: int) -> dict[str, Any]:
    defaults = DESIGNS[system].defaults
    measure(
        Setting(scenario, "paper", system, "colocated", replicas, defaults, duration_s=WARM_UP_S), rate, seed
    )
    setting = Setting(scenario, "paper", system, "colocated", replicas, defaults, duration_s=seconds)
    begun_s = time.perf_counter()
    point = measure(setting, rate, seed)
    wall_s = time.perf_counter() - begun_s
    simulated_s = point.facts["simulated_s"]
    return {
        "scenario": scenario,
        "system": system,
        "rate_per_gpu": point.rate_per_gpu,
        "attainment": point.attainment,
        "simulated_s": simulated_s,
        "wall_s": wall_s,
        "simulated_s_per_s_and_replica": simulated_s * replicas / wall_s,
    }
