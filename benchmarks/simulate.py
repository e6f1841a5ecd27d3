"""`slosserve simulate`: one workload on one system in simulated time, and which promises were kept."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks.hardware import HARDWARE, LINKS, hardware
from benchmarks.provenance import provenance
from benchmarks.scenarios import SCENARIOS, TRACES, from_file, make
from benchmarks.simulator.outcome import Outcome, summary, write_requests
from benchmarks.simulator.run import Network, run
from benchmarks.simulator.systems import DESIGNS, MODES, OURS_NAME, Deployment, Tuning, design, roles_for
from benchmarks.workload import Workload
from engine.errors import ConfigError

SYSTEMS = ", ".join(DESIGNS)
DURATION_S = 600.0


def simulate(
    scenario: Annotated[
        str | None, typer.Option(help=f"Of {', '.join(SCENARIOS)}, {', '.join(TRACES)}.")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Instead: t_s,in_tokens,out_tokens CSV, Azure CSV, Mooncake jsonl.")
    ] = None,
    system: Annotated[str, typer.Option(help=f"Of {SYSTEMS}.")] = "ours",
    profile: Annotated[
        str, typer.Option(help=f"Of {', '.join(HARDWARE)}, or a file of `slosserve profile fit`.")
    ] = "paper",
    kv_tokens: Annotated[int | None, typer.Option(min=64, help="KV memory of a replica, in tokens.")] = None,
    mode: Annotated[str | None, typer.Option(help=f"Of {', '.join(MODES)}; follows from the pools.")] = None,
    replicas: Annotated[int | None, typer.Option(min=1, help="Nodes that do both.")] = None,
    prefill: Annotated[int, typer.Option(min=0, help="Prefill nodes.")] = 0,
    decode: Annotated[int, typer.Option(min=0, help="Decode nodes.")] = 0,
    rate: Annotated[
        float | None, typer.Option(help="Requests a second, all GPUs; a trace: as recorded.")
    ] = None,
    slo_class: Annotated[str | None, typer.Option("--class", help="Of a trace: chatbot, coder, ...")] = None,
    slo_ttft_ms: Annotated[float | None, typer.Option(help="Of a trace: first token within.")] = None,
    slo_tpot_ms: Annotated[float | None, typer.Option(help="Of a trace: pace of the answer.")] = None,
    link_gbps: Annotated[
        float | None, typer.Option(help="Of a port between replicas, in gigabits a second.")
    ] = None,
    duration_s: Annotated[float | None, typer.Option(help="Of arrivals; 600, a trace: as recorded.")] = None,
    acceptance: Annotated[
        float | None, typer.Option(min=0, max=1, help="Speculate; a draft is right with this chance.")
    ] = None,
    token_budget: Annotated[int | None, typer.Option(min=16, help="Of a batch; else the default.")] = None,
    max_seqs: Annotated[int | None, typer.Option(min=1, help="In a batch; else the default.")] = None,
    draft_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of every verify, with --acceptance; ours chooses.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of arrivals, lengths and drafts.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
    requests_out: Annotated[Path | None, typer.Option(help="Write a row per request, as CSV.")] = None,
) -> None:
    """Serve a scenario or a trace in simulated time, by the code that serves, and score every request.

    Example: slosserve simulate --scenario chatbot --system sarathi --replicas 2 --rate 7 --json
    """
    chosen = hardware(profile, kv_tokens=kv_tokens)
    for name, number in (("--rate", rate), ("--duration-s", duration_s), ("--link-gbps", link_gbps)):
        if number is not None and number <= 0:
            raise ConfigError(f"{name} must be above 0, not {number:g}")
    mode = mode or ("colocated" if not (prefill or decode) else "mixed" if replicas else "disaggregated")
    deployment = Deployment(
        system,
        chosen,
        roles_for(mode, *_nodes(mode, system, replicas, prefill, decode)),
        _tuning(system, token_budget, max_seqs, draft_tokens, prefill, decode, acceptance),
        acceptance,
        kv_tokens,
        one_node=mode == "colocated",
    )
    workload = _workload(
        scenario, trace, rate, duration_s, seed, slo_class, slo_ttft_ms, slo_tpot_ms, chosen.tpot_scale
    ).clipped((kv_tokens or chosen.kv_tokens) // 2)
    network = Network() if link_gbps is None else Network(LINKS["100gbe"].latency_s, link_gbps * 1e9 / 8)
    begun_s = time.perf_counter()
    outcome = _run(workload, deployment, network, seed)
    seconds = time.perf_counter() - begun_s
    facts = {
        "workload": workload.name,
        "system": system,
        "mode": mode,
        "profile": chosen.name,
        "kv_tokens": kv_tokens or chosen.kv_tokens,
        "replicas": len(deployment.roles),
        "tuning": deployment.tuning.words,
        "acceptance": acceptance,
        "duration_s": workload.duration_s,
        **summary(outcome, deployment.gpus),
        "wall_s": seconds,
        "simulated_s_per_s_and_replica": outcome.world.now_s * len(deployment.roles) / max(seconds, 1e-9),
        "provenance": provenance(seed),
    }
    if requests_out is not None:
        write_requests(outcome, requests_out)
    if as_json:
        typer.echo(json.dumps(facts))
    else:
        _show(facts, requests_out)


def _nodes(mode: str, system: str, replicas: int | None, prefill: int, decode: int) -> tuple[int, int, int]:
    """Replicas that do both, prefill and decode nodes. Raises ConfigError for what does not fit the mode."""
    pools = bool(prefill or decode)
    if design(system).disaggregated and mode != "disaggregated":
        raise ConfigError(f"{system} has a prefill and a decode pool: give --prefill and --decode")
    if mode == "colocated" and pools:
        raise ConfigError("--mode colocated has no pools: give --replicas, or leave out --mode")
    if mode == "disaggregated" and (replicas or not (prefill and decode)):
        raise ConfigError(
            "pools are a prefill and a decode pool: give --prefill and --decode, at least 1 each, no --replicas"
        )
    if bool(prefill) != bool(decode):
        raise ConfigError("prefill nodes need decode nodes to hand over to, and these need prefills: give both")
    if system != "ours" and mode == "mixed":
        raise ConfigError(f"only ours runs mixed: give {system} --replicas, or --prefill and --decode")
    return (replicas or (0 if pools else 1)), prefill, decode


def _tuning(
    system: str,
    budget: int | None,
    cap: int | None,
    drafts: int | None,
    prefill: int,
    decode: int,
    acceptance: float | None,
) -> Tuning:
    """The settings of a system. Raises ConfigError for drafts that nobody would make."""
    tuning = design(system).defaults
    if drafts is not None and system == OURS_NAME:
        raise ConfigError("--draft-tokens: ours chooses how deep it drafts; leave it out")
    if drafts is not None and acceptance is None:
        raise ConfigError("--draft-tokens needs --acceptance, the chance that a draft is right")
    if acceptance is not None and system != OURS_NAME and not (drafts or tuning.draft_tokens):
        raise ConfigError(
            f"--acceptance: {system} drafts nothing by itself; give --draft-tokens, or leave it out"
        )
    given: dict[str, Any] = {"token_budget": budget, "max_seqs": cap, "draft_tokens": drafts}
    tuning = replace(tuning, **{name: value for name, value in given.items() if value is not None})
    return replace(tuning, prefill=prefill, decode=decode)


def _workload(
    scenario: str | None,
    trace: Path | None,
    rate: float | None,
    duration_s: float | None,
    seed: int,
    slo_class: str | None,
    ttft_ms: float | None,
    tpot_ms: float | None,
    tpot_scale: float,
) -> Workload:
    if (scenario is None) == (trace is None):
        raise ConfigError("give either --scenario or --trace")
    if trace is not None:
        ttft_s = None if ttft_ms is None else ttft_ms / 1e3
        return from_file(
            trace, slo_class, rate, duration_s, seed, ttft_s=ttft_s, tpot_ms=tpot_ms, tpot_scale=tpot_scale
        )
    assert scenario is not None
    if rate is None:
        raise ConfigError("give --rate, in requests a second over all GPUs")
    if slo_class or ttft_ms or tpot_ms:
        raise ConfigError("a scenario has SLOs of its own: --class and --slo-* go with --trace")
    return make(scenario, rate, duration_s or DURATION_S, seed, tpot_scale=tpot_scale)


def _run(workload: Workload, deployment: Deployment, network: Network, seed: int) -> Outcome:
    console = Console(stderr=True)
    columns = (TextColumn("simulating"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=1.0)
        return run(
            workload, deployment, network, seed=seed, progress=lambda share: bar.update(task, completed=share)
        )


def _show(facts: dict[str, Any], requests_out: Path | None) -> None:
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"[bold]{facts['system']}[/bold] ({facts['mode']}, {facts['replicas']} replicas, {facts['tuning']}) on "
        f"{facts['profile']}: {facts['workload']} at {facts['rate_per_s']:.2f} requests a second, "
        f"{facts['rate_per_gpu_per_s']:.2f} a GPU"
    )
    table = Table(show_header=False, box=None)
    table.add_column()
    table.add_column(justify="right")
    halves = f"{facts['attainment_first_half']:.1%}, {facts['attainment_second_half']:.1%}"
    table.add_row("every promise kept", f"{facts['attainment']:.1%}")
    table.add_row("first half, second half", halves)
    for name, share in facts["by_class"].items():
        table.add_row(f"of class {name}", f"{share:.1%}")
    for name, share in facts["by_stage"].items():
        if share is not None:
            table.add_row(f"stage {name}", f"{share:.1%}")
    for name, unit in (("ttft_s", "TTFT"), ("tpot_s", "TPOT")):
        p50, p99 = facts[name]["p50"], facts[name]["p99"]
        if p50 is not None:
            table.add_row(f"{unit} p50, p99", f"{p50 * 1e3:.0f} ms, {p99 * 1e3:.0f} ms")
    table.add_row("requests counted, admitted", f"{facts['counted']}, {facts['admitted']}")
    spare = f"{facts['best_effort']}, {facts['best_effort_completed']}"
    table.add_row("best effort, of which completed", spare)
    if not facts["drained"]:
        table.add_row("[red]the queue did not drain[/red]", "")
    console.print(table)
    if requests_out is not None:
        console.print(f"a row per request: {requests_out}")
