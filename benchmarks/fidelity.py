"""Is the simulator to be believed? The same requests on a real vLLM node over HTTP, and on its simulated twin.

The node serves the scale model on one core. Its twin has the step times that the node measured when it started,
its memory, its limits and its promises; nothing is fitted to the runs that are compared. A step of the twin also
takes what everything around the engine takes per step, measured on the idle node before the runs (`host_ms`).
"""

from __future__ import annotations

import asyncio
import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks.open_loop import Sent
from benchmarks.provenance import provenance
from benchmarks.real_node import RealNode, Served, overheads
from benchmarks.simulator.outcome import WARM_UP_SHARE, Flags, Outcome
from benchmarks.startup import step
from benchmarks.twin import DIVIDE, Twin
from benchmarks.workload import Floats, Workload
from engine.errors import SlosserveError
from engine.request import Slo
from engine.score import score

MODEL = "scale"
SCENARIO = "chatbot"
SHARES = (0.5, 0.8, 1.0)  # of the twin's capacity
HELD = 0.9
MINUTES, QUICK_MINUTES = 10.0, 1.0
TARGET = 0.10  # relative, of attainment absolute
ERROR_SAMPLES = 5
JUDGED = ("ttft_p50_ms", "tpot_p50_ms", "attainment")


@dataclass(frozen=True, slots=True, eq=False)
class Side:
    """How the requests of a run went on one side. Columns [requests]; NaN where nothing came."""

    ttft_s: Floats
    tpot_s: Floats
    met: Flags
    done: Flags

    @classmethod
    def of_client(cls, workload: Workload, slos: Sequence[Slo], sent: Sequence[Sent]) -> Side:
        """As the client saw it, counted from when each request should have been sent."""
        times = [one.token_times_s for one in sent]
        wanted = workload.output_tokens.tolist()
        done = [one.error is None and len(one.token_times_s) == n for one, n in zip(sent, wanted, strict=True)]
        met = [score(slo, seen, completed=ok).met for slo, seen, ok in zip(slos, times, done, strict=True)]
        first = np.array([seen[0] if seen else np.nan for seen in times])
        last = np.array([seen[-1] if seen else np.nan for seen in times])
        return cls(first, _tpot_s(first, last, workload), np.array(met, bool), np.array(done, bool))

    @classmethod
    def of_twin(cls, out: Outcome) -> Side:
        """As simulated."""
        done = np.isfinite(out.world.ended_s) & ~out.world.dropped
        return cls(out.ttft_s, out.tpot_s, out.met, done)

    def figures(self, counted: Flags) -> dict[str, float]:
        """Of the counted requests; times of those that completed, in ms."""
        chosen = counted & self.done
        if not chosen.any():
            raise SlosserveError("not one request completed: the two sides cannot be compared")
        ttft, tpot = self.ttft_s[chosen] * 1e3, self.tpot_s[chosen] * 1e3
        return {
            "ttft_p50_ms": float(np.median(ttft)),
            "ttft_p99_ms": float(np.quantile(ttft, 0.99)),
            "tpot_p50_ms": float(np.nanmedian(tpot)),
            "tpot_p99_ms": float(np.nanquantile(tpot, 0.99)),
            "attainment": float(self.met[counted].mean()),
            "completed": int(chosen.sum()),
        }


def _tpot_s(first: Floats, last: Floats, workload: Workload) -> Floats:
    outputs = workload.output_tokens
    return np.where(outputs > 1, (last - first) / np.maximum(outputs - 1, 1), np.nan)


def differences(real: Mapping[str, float], virtual: Mapping[str, float]) -> dict[str, float]:
    """Virtual against real: relative for times, absolute for attainment."""
    relative = {key: virtual[key] / real[key] - 1 for key in real if key.endswith("_ms")}
    return {**relative, "attainment": virtual["attainment"] - real["attainment"]}


def within(difference: Mapping[str, float]) -> bool:
    """Whether a row meets the target."""
    return all(abs(difference[name]) <= TARGET for name in JUDGED)


def fidelity(
    minutes: Annotated[float, typer.Option(min=0.2, help="Of requests at each rate.")] = MINUTES,
    quick: Annotated[bool, typer.Option("--quick", help=f"{QUICK_MINUTES:g} minute at each rate.")] = False,
    rate: Annotated[
        list[float] | None, typer.Option(help="Requests a second (repeatable); else shares of capacity.")
    ] = None,
    host_ms: Annotated[
        float | None, typer.Option(min=0, help="Host time of a step of the twin; else as measured at idle.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of arrivals, lengths and prompts.")] = 1,
    config: Annotated[str, typer.Option(help="Configuration with one mixed node.")] = "colocated",
    requests_out: Annotated[Path | None, typer.Option(help="Both series, a row per request, as CSV.")] = None,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("out/bench/fidelity.json"),
) -> None:
    """Compare the simulator with a real vLLM node: the same requests, the same step times.

    Example: slosserve bench fidelity --quick --rate 2
    """
    console = Console()
    seconds = 60.0 * (QUICK_MINUTES if quick else minutes)
    columns = (TextColumn("[progress.description]{task.description}"), BarColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=console, refresh_per_second=1) as progress:
            bar = progress.add_task("starting", total=seconds * len(rate or SHARES))
            show = _Shown(progress, bar)
            result = _measure(config, rate, seconds, host_ms, seed, show, requests_out)
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
        f"twin's steps take {result['facts']['host_ms']:.2f} ms beside the engine's"
    )
    console.print(f"figures in {out}")


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


def _measure(
    config: str,
    rates: Sequence[float] | None,
    seconds: float,
    host_ms: float | None,
    seed: int,
    shown: _Shown,
    requests_out: Path | None,
) -> dict[str, Any]:
    from coordinator.cluster_process import ClusterProcess

    overrides = {"name": "bench-fidelity", "model": MODEL, "dtype": "auto", "endpoint.port": 0}
    with ClusterProcess.start(config, overrides, lambda event: shown.say(step(event))) as cluster:
        node = RealNode(cluster.base_url, MODEL, seed)
        told = asyncio.run(node.facts())
        twin = Twin.of(told, cluster.config)
        shown.say("lone requests")
        idle = overheads(twin.cost, twin.max_batch_tokens, asyncio.run(node.lone(SCENARIO)))
        twin = replace(twin, host_s=(max(idle["host_ms"], 0.0) if host_ms is None else host_ms) / 1e3)
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
        "target": {"at_most": TARGET, "of": JUDGED},
        "facts": {
            "scenario": SCENARIO,
            "lengths_divided_by": DIVIDE,
            "seconds": seconds,
            "share_not_counted": WARM_UP_SHARE,
            **searched,
            "idle": idle,
            "host_ms": twin.host_s * 1e3,
            "host_ms_is": "of lone requests on the idle node" if host_ms is None else "given",
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


@dataclass(frozen=True, slots=True, eq=False)
class Compared:
    """One workload on both sides."""

    workload: Workload
    served: Served
    real: Side
    virtual: Side
    counted: Flags
    virtual_preempted: int

    @classmethod
    def of(cls, twin: Twin, workload: Workload, served: Served, seed: int) -> Compared:
        """Simulate what was served."""
        out = twin.serve(workload, seed)
        real = Side.of_client(workload, twin.promises(workload), served.sent)
        preempted = int(out.world.rows["preempted"].sum())
        return cls(workload, served, real, Side.of_twin(out), out.counted, preempted)

    def row(self) -> dict[str, Any]:
        """What the table and the JSON tell."""
        real, virtual = self.real.figures(self.counted), self.virtual.figures(self.counted)
        difference = differences(real, virtual)
        late_ms = np.array([one.late_s for one in self.served.sent]) * 1e3
        errors = [one.error for one in self.served.sent if one.error is not None]
        return {
            "rate_per_s": self.workload.rate_per_s,
            "requests": len(self.workload),
            "counted": int(self.counted.sum()),
            "real": real,
            "virtual": {**virtual, "preempted": self.virtual_preempted},
            "difference": difference,
            "within_target": within(difference),
            "node": self.served.facts(),
            "admitted_at_once": sum(one.verdict == "admitted" for one in self.served.sent),
            "errors": len(errors),
            "error_samples": errors[:ERROR_SAMPLES],
            "client_late_ms": {
                "p50": float(np.median(late_ms)),
                "p99": float(np.quantile(late_ms, 0.99)),
                "most": float(late_ms.max()),
            },
        }


def write_series(compared: Sequence[Compared], path: Path) -> None:
    """A row per request with both sides in it, as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(
            ["rate_per_s", "arrival_s", "in_tokens", "out_tokens", "counted", "verdict", "late_s",
             "real_ttft_s", "virtual_ttft_s", "real_tpot_s", "virtual_tpot_s", "real_met", "virtual_met"]
        )  # fmt: skip
        for one in compared:
            work, real, virtual = one.workload, one.real, one.virtual
            for i, sent in enumerate(one.served.sent):
                writer.writerow(
                    [
                        f"{work.rate_per_s:.4f}", f"{work.arrival_s[i]:.6f}", work.prompt_tokens[i],
                        work.output_tokens[i], int(one.counted[i]), sent.verdict, f"{sent.late_s:.6f}",
                        f"{real.ttft_s[i]:.6f}", f"{virtual.ttft_s[i]:.6f}", f"{real.tpot_s[i]:.6f}",
                        f"{virtual.tpot_s[i]:.6f}", int(real.met[i]), int(virtual.met[i]),
                    ]
                )  # fmt: skip


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="the simulator against a real node", title_justify="left")
    for heading in ("req/s", "requests", "", "TTFT p50", "TTFT p99", "TPOT p50", "attainment", "late p99"):
        table.add_column(heading, justify="right")
    for row in rows:
        late = f"{row['client_late_ms']['p99']:.1f} ms"
        first = (f"{row['rate_per_s']:.2f}", str(row["counted"]))
        table.add_row(*first, "real", *_cells(row["real"]), late)
        table.add_row("", "", "virtual", *_cells(row["virtual"]), "")
        apart = row["difference"]
        times = (f"{apart[key]:+.1%}" for key in ("ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms"))
        colour = "green" if row["within_target"] else "red"
        cells = ("apart", *times, f"{apart['attainment'] * 100:+.1f} points")
        table.add_row("", "", *(f"[{colour}]{cell}[/]" for cell in cells), "", end_section=True)
    return table


def _cells(figures: Mapping[str, float]) -> list[str]:
    times = [f"{figures[key]:.1f} ms" for key in ("ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms")]
    return [*times, f"{figures['attainment']:.1%}"]


if __name__ == "__main__":
    typer.run(fidelity)
