"""Is the simulator to be believed? The same requests on a real vLLM node over HTTP, and on its simulated twin.

The node serves the scale model on one core. Its twin has the step times that the node measured when it started,
its memory, its limits and its promises; nothing is fitted to the runs that are compared. A step of the twin
also takes what everything around the engine takes a step (`host_ms`), and a request the time that it spends
outside of the node (`latency_ms`), both measured with lone requests beforehand.

Beside it the same at the speed that the node saw during the run (from one step to the next, over what it had
predicted, which it tells): what then still differs is not the step times' doing.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks.fidelity.compared import JUDGED, TARGET, Compared, within, write_series
from benchmarks.fidelity.own_profile import Here, profile_here
from benchmarks.fidelity.real_node import RealNode, overheads
from benchmarks.fidelity.twin import DIVIDE, Twin
from benchmarks.provenance import provenance
from benchmarks.simulator.outcome import WARM_UP_SHARE
from benchmarks.startup import step
from coordinator.config import ClusterConfig, load_config
from engine.errors import SlosserveError
from engine.profile import StepProfile

MODEL = "scale"
OVERRIDES = {"name": "bench-fidelity", "model": MODEL, "dtype": "auto", "endpoint.port": 0}
SCENARIO = "chatbot"
SHARES = (0.5, 0.8, 0.9, 1.0)  # of the capacity of the twin: at the last one a little more is too much
HELD = 0.9
MINUTES, QUICK_MINUTES, PROFILE_MINUTES = 10.0, 1.0, 6.0


def fidelity(
    minutes: Annotated[float, typer.Option(min=0.2, help="Of requests at each rate.")] = MINUTES,
    quick: Annotated[bool, typer.Option("--quick", help=f"{QUICK_MINUTES:g} minute at each rate.")] = False,
    rate: Annotated[
        list[float] | None, typer.Option(help="Requests a second (repeatable); else shares of capacity.")
    ] = None,
    host_ms: Annotated[
        float | None, typer.Option(min=0, help="Host time of a step of the twin; else as measured at idle.")
    ] = None,
    latency_ms: Annotated[
        float | None, typer.Option(min=0, help="From the twin's clients and back; else as measured at idle.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of arrivals, lengths and prompts.")] = 1,
    step_profile: Annotated[
        str | None, typer.Option(help="Of the scale model here; else one that fits, or measured first.")
    ] = None,
    profile_minutes: Annotated[float, typer.Option(min=0.1, help="For measuring one.")] = PROFILE_MINUTES,
    config: Annotated[str, typer.Option(help="Configuration with one mixed node.")] = "colocated",
    requests_out: Annotated[Path | None, typer.Option(help="Both series, a row per request, as CSV.")] = None,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("out/bench/fidelity.json"),
) -> None:
    """Compare the simulator with a real vLLM node: the same requests, the same step times.

    Example: slosserve bench fidelity --quick --rate 2
    """
    console = Console(width=100, highlight=False)
    seconds = 60.0 * (QUICK_MINUTES if quick else minutes)
    columns = (TextColumn("[progress.description]{task.description}"), BarColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=console, refresh_per_second=1) as progress:
            bar = progress.add_task("starting", total=seconds * len(rate or SHARES))
            shown = _Shown(progress, bar)
            settings = load_config(config, OVERRIDES)
            profile = profile_here(
                settings, step_profile, Here.processor(out.parent), profile_minutes, shown.say
            )
            settings = load_config(config, {**OVERRIDES, "engine.step_profile": str(profile)})
            result = _measure(settings, rate, seconds, host_ms, latency_ms, seed, shown, requests_out)
            result["facts"]["step_profile"] = _about(StepProfile.load(profile))
    except SlosserveError as error:
        Console(stderr=True).print(f"[red]error:[/red] {escape(str(error))}", highlight=False)
        raise typer.Exit(2) from error
    result["provenance"] = provenance(seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    console.print(_table(result["rows"]))
    idle = result["facts"]["idle"]
    console.print(
        f"on the idle node a first token came {idle['overhead_ms']:.1f} ms later than its prefill takes; the "
        f"twin is charged {result['facts']['latency_ms']:.1f} ms a request outside the node and "
        f"{result['facts']['host_ms']:.2f} ms a step beside the engine"
    )
    console.print(f"figures in {out}", soft_wrap=True)


@dataclass(slots=True)
class _Shown:
    """What the terminal shows."""

    progress: Progress
    bar: Any
    done_s: float = 0.0

    def say(self, text: str) -> None:
        """What goes on."""
        self.progress.update(self.bar, description=text)

    def at(self, seconds: float) -> None:
        """How far the present run is."""
        self.progress.update(self.bar, completed=self.done_s + max(seconds, 0.0))


def _about(profile: StepProfile) -> dict[str, Any]:
    return {"family": profile.family, "held_out": asdict(profile.held_out), **profile.about}


def _measure(
    config: ClusterConfig,
    rates: Sequence[float] | None,
    seconds: float,
    host_ms: float | None,
    latency_ms: float | None,
    seed: int,
    shown: _Shown,
    requests_out: Path | None,
) -> dict[str, Any]:
    from coordinator.cluster_process import ClusterProcess

    with ClusterProcess.start(config, None, lambda event: shown.say(step(event))) as cluster:
        node = RealNode(cluster.base_url, MODEL, seed)
        told = asyncio.run(node.facts())
        twin = Twin.of(told, cluster.config)
        shown.say("lone requests")
        idle = overheads(twin.cost, twin.max_batch_tokens, asyncio.run(node.lone(SCENARIO)))
        host_s = (max(idle["host_ms"], 0.0) if host_ms is None else host_ms) / 1e3
        latency_s = (max(idle["outside_ms"], 0.0) if latency_ms is None else latency_ms) / 1e3
        twin = replace(twin, host_s=host_s, latency_s=latency_s)
        searched: dict[str, Any] = {}
        if not rates:
            shown.say("capacity of the twin")
            capacity, points = twin.capacity(SCENARIO, seconds, seed, HELD, twin.guess(SCENARIO))
            searched = {
                "capacity_of_the_twin_per_s": capacity,
                "capacity_at": HELD,
                "tried": [{"rate_per_s": one.asked_per_gpu, "attainment": one.attainment} for one in points],
            }
            rates = [share * capacity for share in SHARES]
        runs = []
        for rate in rates:
            workload = twin.workload(SCENARIO, rate, seconds, seed)
            shown.say(f"{rate:.2f} requests a second, real")
            runs.append((workload, asyncio.run(node.serve(workload, shown.at))))
            shown.done_s += seconds
    compared = []
    for workload, served in runs:
        shown.say(f"{workload.rate_per_s:.2f} requests a second, simulated")
        compared.append(Compared.of(twin, workload, served, seed))
    if requests_out is not None:
        write_series(compared, requests_out)
    rows = [one.row() for one in compared]
    return {
        "rows": rows,
        "within_target": all(row["within_target"] for row in rows),
        "within_target_at_run_speed": all(row["at_run_speed"]["within_target"] for row in rows),
        "target": {"at_most": TARGET, "of": JUDGED},
        "facts": {
            "scenario": SCENARIO,
            "lengths_divided_by": DIVIDE,
            "seconds": seconds,
            "share_not_counted": WARM_UP_SHARE,
            **searched,
            "idle": idle,
            "host_ms": twin.host_s * 1e3,
            "host_ms_is": "of every step, as lone requests had it" if host_ms is None else "given",
            "latency_ms": twin.latency_s * 1e3,
            "latency_ms_is": "of every request, as lone ones had it" if latency_ms is None else "given",
            "lengths": "unknown to the planner on both sides: outputs end by a stop token before max_tokens",
            "latency": "from when a request should have been sent, at the client",
            "engine": told["engine"],
            "idle_cost": told["idle_cost"],
            "kv_tokens": twin.kv_tokens,
            "block_tokens": twin.block_tokens,
            "max_seqs": twin.max_seqs,
            "max_batch_tokens": twin.max_batch_tokens,
        },
    }


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="the simulator against a real node", title_justify="left")
    for heading in ("req/s", "requests", "", "TTFT p50", "TTFT p99", "TPOT p50", "attainment"):
        table.add_column(heading, justify="right")
    for row in rows:
        first = (f"{row['rate_per_s']:.2f}", str(row["counted"]))
        table.add_row(*first, "real", *_cells(row["real"]))
        table.add_row("", "", "virtual", *_cells(row["virtual"]))
        table.add_row("", "", *_apart(row["difference"]))
        slower, at_run_speed = row["node"]["step_over_predicted"], row["at_run_speed"]
        table.add_row("", "", f"steps x {slower:.2f}", *_cells(at_run_speed["virtual"]))
        table.add_row("", "", *_apart(at_run_speed["difference"]), end_section=True)
    return table


def _apart(difference: Mapping[str, float]) -> list[str]:
    colour = "green" if within(difference) else "red"
    times = [f"{difference[key]:+.1%}" for key in ("ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms")]
    cells = ["apart", *times, f"{difference['attainment'] * 100:+.1f} points"]
    return [f"[{colour}]{cell}[/]" for cell in cells]


def _cells(figures: Mapping[str, float]) -> list[str]:
    times = [f"{figures[key]:.1f} ms" for key in ("ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms")]
    return [*times, f"{figures['attainment']:.1%}"]


if __name__ == "__main__":
    typer.run(fidelity)
