"""`slosserve soak`: mixed load for half an hour, clients that leave, a fault a minute; then what has grown."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import cycle, pairwise
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.chaos.clients import PROMPTS, Clients
from benchmarks.chaos.cluster import Cluster
from benchmarks.chaos.command import LEASE_S, SETTINGS, fault_folder
from benchmarks.chaos.memory import MemoryWatch, Trend
from benchmarks.chaos.run import Chaos, Row
from benchmarks.chaos.scenarios import SCENARIOS, Load, Scenario
from benchmarks.provenance import provenance
from benchmarks.startup import show_progress
from benchmarks.studies.crew import write
from coordinator.cluster_process import ClusterProcess
from coordinator.config import load_config
from coordinator.process_tree import processes_of
from engine.errors import ConfigError, SlosserveError
from kv_transfer.faults import FOLDER

CHAT = Load(clients=3)
DOCUMENTS = Load(clients=2, prompt_tokens=1500, output_tokens=32)
ALLOWED = (429, 503)  # with Retry-After: there are floods, and a coordinator that dies
ENDPOINTS_STAY = "endpoint-dies"  # nobody starts one again, so it is no fault to be soaked in
NONE_OF = ("client_errors", "wrong_tokens", "blocks_leaked", "processes_left", "not_well", "swings")
FAULT_EVERY_S = 60.0
SAMPLED_EVERY_S = 10.0
LEAVES_AFTER_S = 1.0  # on average


def soak(
    minutes: Annotated[float, typer.Option(min=1, help="Of load.")] = 30.0,
    config: Annotated[str, typer.Option(help="Configuration of the cluster: a name or a file.")] = "laptop",
    prefill: Annotated[int, typer.Option(min=2, help="Nodes that prefill.")] = 2,
    decode: Annotated[int, typer.Option(min=2, help="Nodes that decode.")] = 2,
    faults: Annotated[bool, typer.Option(help="A fault a minute; else nothing but load.")] = True,
    auto: Annotated[bool, typer.Option("--auto", help="Pools follow the load; a swing is an error.")] = False,
    seed: Annotated[int, typer.Option(help="Of prompts, faults, and when clients leave.")] = 1,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("out/bench/soak.json"),
) -> None:
    """Serve mixed load for long, with clients that go away and a fault a minute, and see what is left of it.

    Every token is compared with an unbroken run. The memory of each process is sampled, and its slope told;
    one node of each pool is never killed, so that theirs is seen over the whole time. Exits 1 if a client saw
    an error that the failure contract does not allow, a token was wrong, a KV block or a process was left, or
    the memory of a process grew; with --auto, if a change of roles was undone by the next.

    Example: slosserve soak --minutes 10 --no-faults --auto
    """
    console = Console()
    asked: dict[str, Any] = {
        "name": "soak",
        "pools.prefill": prefill,
        "pools.decode": decode,
        "pools.auto": auto,
    }
    asked[f"engine.env.{FOLDER}"] = str(fault_folder("soak"))
    loaded = load_config(config, SETTINGS | asked)
    if loaded.engines == "virtual":
        raise ConfigError("virtual nodes share a process: give a configuration with real engines")
    with show_progress(console, "starting the cluster") as progress:
        process = ClusterProcess.start(loaded, progress=progress)
    with process:
        model = loaded.served_model_name or loaded.model
        found = asyncio.run(_soak(process, model, minutes * 60, seed, console, faults=faults))
    found["processes_left"] = len(processes_of(process.state.run_id, process.state.processes.values()))
    write(out, {**found, "provenance": provenance(seed)})
    console.print(_table(found["memory"]))
    console.print(_words(found))
    console.print(f"figures in {out}")
    wrong = [name for name in NONE_OF if found[name]]
    wrong += [f"memory of {one['process']}" for one in found["memory"] if not one["flat"]]
    if wrong:
        raise SlosserveError(f"not as promised: {', '.join(wrong)}")


async def _soak(
    process: ClusterProcess, model: str, seconds: float, seed: int, console: Console, *, faults: bool
) -> Row:
    cluster = Cluster(process)
    nodes = await cluster.nodes()
    here = [one for one in SCENARIOS if one.hosts == 1 and one.name != ENDPOINTS_STAY] if faults else []
    kinds = [replace(one, load=CHAT) for one in here]
    random.Random(seed).shuffle(kinds)
    spared = {role: name for name, node in reversed(nodes.items()) if (role := str(node["role"]))}
    breaking = Chaos(cluster, model, seed, LEASE_S, spared.values(), fault_folder=fault_folder("soak"))
    loads = {load: Clients(cluster.urls, model, load, seed) for load in (CHAT, DOCUMENTS)}
    try:
        for load, clients in loads.items():
            await breaking.learn(load, clients)
        blocks_before = await cluster.idle(LEASE_S)
        memory = MemoryWatch()
        for clients in loads.values():
            clients.start()
        beside = [
            asyncio.create_task(_sample(cluster, memory)),
            asyncio.create_task(_leave(loads[CHAT], cluster.urls, seed)),
        ]
        try:
            struck = await _faults(breaking, cluster, loads[CHAT], seconds, kinds, console)
        finally:
            for task in beside:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            answers = {load: await clients.stop() for load, clients in loads.items()}
        judged = [breaking.judged(load, told, ALLOWED) for load, told in answers.items()]
        changes = await cluster.role_changes()
        blocks_after = await cluster.idle(LEASE_S + 5.0)
        counted = ("client_errors", "turned_away", "wrong_tokens", "tokens")
        return {
            "seconds": seconds,
            "requests": sum(map(len, answers.values())),
            **{name: sum(row[name] for row in judged) for name in counted},
            "errors": [error for row in judged for error in row["errors"]],
            "blocks_before": blocks_before,
            "blocks_after": blocks_after,
            "blocks_leaked": blocks_after - blocks_before,
            "faults": struck,
            "not_well": sum("not_well" in row for row in struck),
            "role_changes": changes,
            "swings": swings(changes) if process.config.pools.auto else 0,
            "memory": [_row(trend) for trend in memory.trends()],
        }
    finally:
        for clients in loads.values():
            await clients.close()
        await cluster.close()


async def _faults(
    breaking: Chaos,
    cluster: Cluster,
    clients: Clients,
    seconds: float,
    kinds: Sequence[Scenario],
    console: Console,
) -> list[Row]:
    """A fault a minute, each kind in turn; the last minute is quiet."""
    began_s, rows = time.monotonic(), list[Row]()
    for number, kind in enumerate(cycle(kinds), 1):
        due_s = number * FAULT_EVERY_S
        if due_s > seconds - FAULT_EVERY_S:
            break
        with console.status(f"{_clock(began_s)} of {seconds / 60:g} min: {kind.contract}"):
            await asyncio.sleep(max(began_s + due_s - FAULT_EVERY_S / 2 - time.monotonic(), 0.0))
            row: Row = {"at_s": round(time.monotonic() - began_s, 1), "fault": kind.name}
            told = await _fault(breaking, cluster, clients, kind, row)
        rows.append(row)
        console.print(f"  {_clock(began_s)} {kind.name} {told}", highlight=False)
    with console.status("the last of the load"):
        await asyncio.sleep(max(began_s + seconds - time.monotonic(), 0.0))
    return rows


def swings(changes: Sequence[Mapping[str, Any]]) -> int:
    """Changes of role that undo the one before them, whichever nodes they were of."""
    return sum(
        (one["before"], one["after"]) == (next_one["after"], next_one["before"])
        for one, next_one in pairwise(changes)
    )


async def _fault(breaking: Chaos, cluster: Cluster, clients: Clients, kind: Scenario, row: Row) -> str:
    """One fault, noted in its row. Returns what came of it in words."""
    try:
        strike = await breaking.strike(kind, clients)
    except SlosserveError as error:
        row["passed_over"] = str(error)
        return f"passed over: {error}"
    row |= {"victim": strike.victim, "in_flight": strike.under_way}
    try:
        row["well_again_s"] = round(await cluster.well(), 1)
    except SlosserveError as error:
        row["not_well"] = str(error)
        return f"({strike.victim}): {strike.under_way} in flight; [red]not well again[/]: {error}"
    return f"({strike.victim}): {strike.under_way} in flight, well again"


async def _leave(clients: Clients, urls: Sequence[str], seed: int) -> None:
    """Clients that go away before they have their answer, until cancelled."""
    numbers = random.Random(seed)
    while True:
        await clients.ask(
            numbers.randrange(PROMPTS), numbers.choice(urls), numbers.expovariate(1 / LEAVES_AFTER_S)
        )


async def _sample(cluster: Cluster, memory: MemoryWatch) -> None:
    """What the processes of the cluster hold, until cancelled."""
    while True:
        with contextlib.suppress(httpx.HTTPError, KeyError, ValueError):  # the coordinator may be away
            nodes = {name: int(node["pid"]) for name, node in (await cluster.nodes()).items() if "pid" in node}
            await asyncio.to_thread(memory.sample, cluster.process.pids | nodes)
        await asyncio.sleep(SAMPLED_EVERY_S)


def _row(trend: Trend) -> Row:
    return {
        "process": trend.process,
        "pid": trend.pid,
        "minutes": round(trend.minutes, 1),
        "mib": round(trend.mib, 1),
        "mib_per_min": round(trend.mib_per_min, 3),
        "flat": trend.flat,
    }


def _clock(began_s: float) -> str:
    minutes, seconds = divmod(int(time.monotonic() - began_s), 60)
    return f"{minutes:02d}:{seconds:02d}"


def _words(found: Mapping[str, Any]) -> str:
    told = ", ".join(
        f"{found[name]} {words}"
        for name, words in {
            "requests": "requests",
            "turned_away": "turned away",
            "client_errors": "errors",
            "wrong_tokens": "wrong tokens",
            "blocks_leaked": "blocks leaked",
            "processes_left": "processes left",
        }.items()
    )
    faults = sum("victim" in fault for fault in found["faults"])  # the others found nobody to strike
    return f"{faults} faults in {found['seconds'] / 60:g} min: {told}"


def _table(rows: Sequence[Row]) -> Table:
    table = Table(title="memory of processes", title_justify="left", box=SIMPLE_HEAD)
    for name in ("process", "pid", "minutes seen", "MiB at the end", "MiB a minute", ""):
        table.add_column(name, justify="left" if name == "process" else "right")
    for row in rows:
        cells = [str(row[name]) for name in ("process", "pid", "minutes", "mib", "mib_per_min")]
        table.add_row(*cells, "[green]flat[/]" if row["flat"] else "[red]grows[/]")
    return table
