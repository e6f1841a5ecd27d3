"""`slosserve chaos`: what clients see, and what is left behind, when parts of a cluster fail under load."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.chaos.cluster import Cluster
from benchmarks.chaos.hosts import Host
from benchmarks.chaos.ray_hosts import ray_hosts
from benchmarks.chaos.run import Chaos, Row
from benchmarks.chaos.scenarios import SCENARIOS, Scenario, scenario
from benchmarks.provenance import provenance
from benchmarks.startup import show_progress
from benchmarks.studies.crew import write
from coordinator.cluster_process import ClusterProcess
from coordinator.config import ClusterConfig, load_config
from coordinator.process_tree import processes_of
from coordinator.run_state import run_directory
from engine.errors import ConfigError, SlosserveError
from kv_transfer.faults import FOLDER

DETECTION_S = 1.0
LOOKED_S = 0.1  # the cluster is asked every 0.05 s, and answers a bit later
LEASE_S = 4.0
SETTINGS: dict[str, Any] = {
    "name": "chaos",
    "dtype": "float32",  # ties in bfloat16 flip with the shape of a batch: tokens are compared
    "endpoint.port": 0,
    "endpoint.count": 2,
    "endpoint.max_waiting": 96,
    "pools.prefill": 2,
    "pools.decode": 2,
    "transfer.lease_s": LEASE_S,
}


def fault_folder(name: str) -> Path:
    """Where the engines of a cluster of this name look for faults (kv_transfer/faults.py)."""
    return run_directory(name) / "faults"


def chaos(
    only: Annotated[list[str] | None, typer.Option(help="This scenario; again for more; else all.")] = None,
    listed: Annotated[bool, typer.Option("--list", help="Say which scenarios there are, and stop.")] = False,
    config: Annotated[str, typer.Option(help="Configuration of the cluster: a name or a file.")] = "laptop",
    prefill: Annotated[int, typer.Option(min=1, help="Nodes that prefill.")] = 2,
    decode: Annotated[int, typer.Option(min=1, help="Nodes that decode.")] = 2,
    hosts: Annotated[int, typer.Option(min=1, help="Network namespaces that the nodes are spread over.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 1,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("out/bench/chaos.json"),
) -> None:
    """Start a cluster of real engines, break a part of it under load, and compare with the same load unbroken.

    A row for each line of the failure contract: errors that clients saw, tokens that differ, when a loss was
    noticed, how long streams paused, KV blocks and processes that were left. Exits 1 if any of it is not as
    promised.

    With `--hosts 2` the nodes are on two hosts, which are network namespaces of this machine (root makes them),
    and the link between them can be cut, and Ray's head ended: two rows more.

    Example: slosserve chaos --only decode-dies --only decode-hangs
    """
    console = Console()
    if listed:
        for one in SCENARIOS:
            console.print(f"{one.name:24} {one.contract}", highlight=False)
        return
    chosen = _chosen(only, hosts)
    folder = fault_folder(SETTINGS["name"])
    asked = SETTINGS | {"pools.prefill": prefill, "pools.decode": decode, f"engine.env.{FOLDER}": str(folder)}
    if load_config(config, asked).engines == "virtual":
        raise ConfigError("virtual nodes share a process: give a configuration with real engines")
    rows: list[Row] = []
    try:
        with ray_hosts(hosts) as on:
            loaded = load_config(config, asked | on.settings)
            with show_progress(console, "starting the cluster") as progress:
                process = ClusterProcess.start(loaded, progress=progress)
            with process:
                asyncio.run(_run(chosen, process, loaded, on.hosts, seed, rows, console))
            if any(one.action == "kill ray head" for one in chosen):
                on.stop_ray()
            left = len(processes_of(process.state.run_id, process.state.processes.values())) + on.nodes_left()
    finally:
        if rows:
            _keep(rows, None, seed, out)
    rows = [row | {"processes_left": left} for row in rows]
    _keep(rows, left, seed, out)
    console.print(_table(rows))
    console.print(f"figures in {out}")
    broken = [row["name"] for row in rows if not row["as_promised"]]
    if broken or left:
        raise SlosserveError(f"not as promised: {', '.join(broken) or f'{left} processes were left'}")


def _chosen(only: Sequence[str] | None, hosts: int) -> list[Scenario]:
    if not only:
        return [one for one in SCENARIOS if one.hosts <= hosts]
    found = {name: scenario(name) for name in only}
    unknown = [name for name, one in found.items() if one is None]
    if unknown:
        names = ", ".join(one.name for one in SCENARIOS)
        raise ConfigError(f"no scenario {', '.join(unknown)}; there are {names}")
    chosen = [one for one in SCENARIOS if one.name in found]
    for one in chosen:
        if one.hosts > hosts:
            raise ConfigError(f"{one.name} is of {one.hosts} hosts: give --hosts {one.hosts}")
    return chosen


async def _run(
    chosen: Sequence[Scenario],
    process: ClusterProcess,
    config: ClusterConfig,
    hosts: Sequence[Host],
    seed: int,
    rows: list[Row],
    console: Console,
) -> None:
    cluster = Cluster(process)
    model = config.served_model_name or config.model
    breaking = Chaos(
        cluster, model, seed, config.transfer.lease_s, hosts=hosts, fault_folder=fault_folder(config.name)
    )
    try:
        for number, one in enumerate(chosen, 1):
            with console.status(f"{number} of {len(chosen)}: {one.contract}"):
                row = await breaking.run(one)
            row["as_promised"] = as_promised(one, row)
            rows.append(row)
            console.print(f"  {one.name}: {_words(row)}", highlight=False)
    finally:
        await cluster.close()


def as_promised(one: Scenario, row: Row) -> bool:
    """No error that the contract does not allow, no wrong token, no block left; losses are noticed in a second,
    and KV that is to be found wrong is not used.
    """
    clean = row["client_errors"] == row["wrong_tokens"] == row["blocks_leaked"] == 0
    noticed = not one.detected or (
        row["detection_s"] is not None and row["detection_s"] <= DETECTION_S + LOOKED_S
    )
    refused = not one.kv_refused or row["kv_not_used"] > 0
    return clean and noticed and refused and row["in_flight"] > 0


def _words(row: Row) -> str:
    verdict = "[green]as promised[/]" if row["as_promised"] else "[red]not as promised[/]"
    counts = {"in_flight": "in flight", "client_errors": "errors", "wrong_tokens": "wrong tokens"}
    told = [f"{row[name]} {words}" for name, words in counts.items()]
    if row["resumed"]:
        told.append(f"{row['resumed']} streams went on after {row['resume_gap_p50_s']} s")
    if row["errors"]:
        told.append(escape(row["errors"][0]))
    return f"{verdict}: {', '.join(told)}"


def _keep(rows: Sequence[Row], left: int | None, seed: int, out: Path) -> None:
    write(out, {"processes_left": left, "rows": list(rows), "provenance": provenance(seed)})


# Headings and figures that fit into a terminal of 80 characters; the file has the others. `left`: blocks of KV.
COLUMNS = (
    ("errors", "client_errors"),
    ("turned away", "turned_away"),
    ("wrong tokens", "wrong_tokens"),
    ("noticed s", "detection_s"),
    ("gap p50 s", "resume_gap_p50_s"),
    ("gap p99 s", "resume_gap_p99_s"),
    ("left", "blocks_leaked"),
)


def _table(rows: Sequence[Row]) -> Table:
    table = Table(title="what breaks, and what clients see", title_justify="left", box=SIMPLE_HEAD, padding=0)
    table.add_column("scenario", no_wrap=True, min_width=22)
    for heading, _ in COLUMNS:
        table.add_column(heading, justify="right", min_width=max(map(len, heading.split())))
    table.add_column("", justify="right", min_width=3)
    for row in rows:
        cells = ["-" if row.get(name) is None else str(row[name]) for _, name in COLUMNS]
        table.add_row(row["name"], *cells, "[green]yes[/]" if row["as_promised"] else "[red]no[/]")
    return table
