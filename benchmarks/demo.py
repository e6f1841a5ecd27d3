"""`slosserve demo`: a cluster on this machine, 90 seconds of mixed traffic, and which promises were kept."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.live import Live
from rich.markup import escape

from benchmarks import cluster_facts, traffic
from benchmarks.board import live_view, report
from benchmarks.chaos.ray_hosts import ray_hosts
from benchmarks.demo_run import DemoRun, Workload
from benchmarks.prompts import MOONCAKE_BLOCK_TOKENS
from benchmarks.provenance import provenance
from benchmarks.startup import show_progress
from benchmarks.traces import Arrival, data_directory, read_trace
from engine.errors import ConfigError, SlosserveError

LENGTH_DIVISOR = 6.0
LINE_EVERY_S = 15.0


def demo(
    duration_s: Annotated[float, typer.Option(min=1, help="Seconds of traffic.")] = 90.0,
    rate: Annotated[float, typer.Option(min=0.01, help="Requests a second, beside the agents.")] = 1.5,
    seed: Annotated[int, typer.Option(help="Seed of arrivals, lengths, prompts and agents.")] = 1,
    trace: Annotated[
        Path | None, typer.Option(help="Azure CSV, Mooncake jsonl or t_s,in_tokens,out_tokens CSV (.gz too).")
    ] = None,
    length_divisor: Annotated[float, typer.Option(min=1, help="Lengths are divided by this.")] = LENGTH_DIVISOR,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("out/demo/summary.json"),
    url: Annotated[str | None, typer.Option(help="Use this running endpoint, start nothing.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="Key of the endpoint.")] = None,
    config: Annotated[str, typer.Option(help="Configuration of the cluster: a name or a file.")] = "laptop",
    model: Annotated[
        str | None, typer.Option(help="tiny, scale, llama-8b, a folder or a Hugging Face name.")
    ] = None,
    address: Annotated[str | None, typer.Option(help="Start nodes in this running Ray (HOST:PORT).")] = None,
    hosts: Annotated[
        int, typer.Option(min=1, help="Or on so many hosts, network namespaces made for it (as root).")
    ] = 1,
) -> None:
    """Start a cluster, send it chat, code, summaries and three tool-calling agents, and report promises kept.

    Example: slosserve demo --duration-s 60 --rate 2 --seed 7
    """
    console = Console()
    try:
        arrivals, source = _arrivals(trace, rate, duration_s, seed, length_divisor)
        block_tokens = max(1, round(MOONCAKE_BLOCK_TOKENS / length_divisor))
        workload = Workload(arrivals, duration_s, seed, block_tokens)
        if hosts > 1 and (url or address):
            raise ConfigError("--hosts starts a cluster on hosts of its own: leave out --url and --address")
        given = {key: value for key, value in {"model": model, "ray.address": address}.items() if value}
        with ray_hosts(hosts) as on, _endpoint(url, config, given | on.settings, console) as (base_url, key):
            summary = _run(base_url, workload, api_key or key, console)
    except SlosserveError as error:
        Console(stderr=True).print(f"[red]error:[/red] {escape(str(error))}", highlight=False)
        raise typer.Exit(2) from error
    summary["workload"] = {
        "hosts": hosts,
        "duration_s": duration_s,
        "rate_per_s": rate,
        "length_divisor": length_divisor,
        "source": source,
    }
    summary["provenance"] = provenance(seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    console.print(report(summary))
    console.print(f"figures in {out}")
    if summary["errors"]:
        raise typer.Exit(1)


def _arrivals(
    trace: Path | None, rate: float, duration_s: float, seed: int, length_divisor: float
) -> tuple[list[Arrival], str]:
    """What to send, and where it comes from."""
    classes = list(traffic.APPLICATIONS)
    if trace is not None:
        window = traffic.at_rate(read_trace(trace), rate, duration_s, np.random.default_rng(seed))
        arrivals, source = traffic.label(window, classes, seed), trace.name
    else:
        data = data_directory()
        traces = None if data is None else data / "traces"
        arrivals = traffic.mixed(classes, rate, duration_s, seed, traces)
        source = "published statistics" if traces is None else "recorded traces (Azure 2023, ShareGPT, arXiv)"
    return traffic.scaled(arrivals, length_divisor), source


@contextmanager
def _endpoint(
    url: str | None, config: str, given: Mapping[str, Any], console: Console
) -> Iterator[tuple[str, str | None]]:
    """(base URL, API key) of the endpoint given, or of a cluster that ends with the block."""
    if url is not None:
        yield url.rstrip("/").removesuffix("/v1"), None
        return
    from coordinator.cluster_process import ClusterProcess

    overrides = {"name": "demo", "endpoint.port": 0, **given}
    with show_progress(console, "starting the cluster") as progress:
        cluster = ClusterProcess.start(config, overrides, progress)
    with cluster:
        yield cluster.base_url, cluster.config.endpoint.api_key


def _run(base_url: str, workload: Workload, api_key: str | None, console: Console) -> dict[str, Any]:
    with Live(console=console, refresh_per_second=4, transient=True) as live:
        screen = _Screen(live, console)
        run = DemoRun(base_url, workload, screen.show, api_key)
        asyncio.run(run.run())
    return run.summary()


class _Screen:
    """Draws a run: a live table on a terminal, a line now and then elsewhere."""

    def __init__(self, live: Live, console: Console) -> None:
        self._live = live
        self._console = console
        self._line_due_s = 0.0

    def show(self, run: DemoRun) -> None:
        if self._console.is_terminal:
            kept = cluster_facts.attainment(run.before, run.after)
            nodes = run.after.get("nodes") or []
            view = live_view(run.tallies, kept, nodes, run.elapsed_s, run.workload.duration_s)
            self._live.update(view)
        elif run.elapsed_s >= self._line_due_s:
            self._line_due_s = run.elapsed_s + LINE_EVERY_S
            sent = sum(tally.sent for tally in run.tallies.values())
            done = sum(len(tally.replies) for tally in run.tallies.values())
            left_s = max(0.0, run.workload.duration_s - run.elapsed_s)
            self._console.print(f"{sent} sent, {done} ended, {left_s:.0f} s of traffic left")


if __name__ == "__main__":
    typer.run(demo)
