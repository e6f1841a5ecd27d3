"""`slosserve pools` and `slosserve rebalance`: who prefills, who decodes, who does both."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.console import Console

from coordinator.cli.client import ClusterClient, find_cluster
from coordinator.cluster_state import LEAVING
from engine.errors import NoCapacity

PAUSE_TOLD_S = 1.0
POLL_S = 0.1
ROLES = ("prefill", "decode", "mixed")

Url = Annotated[str | None, typer.Option(help="Of an endpoint, if it was not started here.")]
Name = Annotated[str | None, typer.Option(help="Which cluster of this machine.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def pools(as_json: AsJson = False, url: Url = None, name: Name = None) -> None:
    """Show how many nodes prefill, decode, or do both, by the roles that they report.

    Example: slosserve pools --json
    """
    roles = _roles(find_cluster(url, name).cluster())
    if as_json:
        typer.echo(json.dumps({"pools": _sizes(roles), "nodes": roles}))
        return
    for role in ROLES:
        names = ", ".join(node for node, its in roles.items() if its == role)
        Console().print(f"{role:8} {_sizes(roles)[role]}  {names}", highlight=False)


def rebalance(
    prefill: Annotated[int | None, typer.Option(min=0, help="Nodes that prefill.")] = None,
    decode: Annotated[int | None, typer.Option(min=0, help="Nodes that decode.")] = None,
    mixed: Annotated[int, typer.Option(min=0, help="Nodes that do both.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would change.")] = False,
    auto: Annotated[
        bool | None, typer.Option("--auto/--no-auto", help="Let pools follow the load from now on, or not.")
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Until nodes serve nothing any more that is of their former role.")
    ] = False,
    timeout_s: Annotated[float, typer.Option(min=1, help="Of --wait.")] = 600.0,
    as_json: AsJson = False,
    admin_key: Annotated[str | None, typer.Option(help="If the endpoint asks for one.")] = None,
    url: Url = None,
    name: Name = None,
) -> None:
    """Change what nodes do while they serve, and read their roles back from them. Exits 1 if they do not match.

    What a node serves goes on there; only new work goes by the new role. With --auto a pool that is short gets
    a node of the other while that has room; `slosserve status` says what was changed, and why.

    Example: slosserve rebalance --prefill 0 --decode 2 --wait
    """
    some, both = prefill is not None or decode is not None, prefill is not None and decode is not None
    if (auto is None and not both) or (auto is not None and (some or mixed or dry_run or wait)):
        raise typer.BadParameter("give either --prefill and --decode, or --auto (or --no-auto) alone")
    cluster = find_cluster(url, name, admin_key)
    if auto is not None:
        answer = cluster.follow_load(auto)
        told = "pools follow the load" if auto else "pools stay as they are"
        typer.echo(json.dumps(answer) if as_json else told)
        return
    assert prefill is not None
    assert decode is not None
    wanted = {"prefill": prefill, "decode": decode, "mixed": mixed}
    before = _roles(cluster.cluster())
    answer = cluster.set_pools(prefill, decode, mixed, dry_run=dry_run)
    state = _settled(cluster, answer, timeout_s if wait else None)
    read_back = _roles(state)
    # A dry run must change nothing; otherwise believe the nodes, not the answer.
    matches = read_back == before if dry_run else _sizes(read_back) == wanted
    result = {
        "dry_run": dry_run,
        "wanted": wanted,
        "before": before,
        "after": answer.get("after"),
        "read_back": read_back,
        "matches": matches,
        "pauses_ms": _pauses_ms(state, answer),
        "of_former_role": {node["name"]: node.get("of_former_role", 0) for node in state["nodes"]},
    }
    if as_json:
        typer.echo(json.dumps({**answer, **result}))
    else:
        _print(result)
    if not matches:
        raise typer.Exit(1)


def _settled(
    cluster: ClusterClient, answer: Mapping[str, Any], drained_within_s: float | None
) -> Mapping[str, Any]:
    """The cluster once nodes have told of their pause, or had none to tell of soon; if they are waited for,
    once they are done with what was there. Raises NoCapacity with what is left if that takes too long.
    """
    changed = {flip["node"] for flip in answer.get("flips", ())}
    busy = {change["node"] for change in answer.get("changes", ()) if change["requests"]}
    began_s = time.monotonic()
    while True:
        state = cluster.cluster()
        nodes = [node for node in state["nodes"] if node["name"] in changed]
        waited_s = time.monotonic() - began_s
        untold = any(node["name"] in busy and node.get("role_pause_ms") is None for node in nodes)
        left = {node["name"]: node["of_former_role"] for node in nodes if node.get("of_former_role")}
        drained = drained_within_s is None or not left
        if drained and (not untold or waited_s > PAUSE_TOLD_S):
            return state
        if drained_within_s is not None and left and waited_s > drained_within_s:
            raise NoCapacity(
                f"after {drained_within_s:g} s nodes still serve what is of their former role: {left}. They go"
                " on with it; give --wait a longer --timeout-s, or look at `slosserve status`."
            )
        time.sleep(POLL_S)


def _pauses_ms(state: Mapping[str, Any], answer: Mapping[str, Any]) -> dict[str, float | None]:
    """Between the batches around the change, of each node that changed; None where nothing went on."""
    changed = {flip["node"] for flip in answer.get("flips", ())}
    return {node["name"]: node.get("role_pause_ms") for node in state["nodes"] if node["name"] in changed}


def _roles(state: Mapping[str, Any]) -> dict[str, str]:
    """Of those that stay."""
    return {node["name"]: str(node["role"]) for node in state["nodes"] if node.get("state") != LEAVING}


def _sizes(roles: Mapping[str, str]) -> dict[str, int]:
    counts = Counter(roles.values())
    return {role: counts[role] for role in ROLES}


def _print(result: Mapping[str, Any]) -> None:
    console = Console(highlight=False)
    after = result["after"] or {}
    for node, role in result["before"].items():
        told = after.get(node, role)
        change = role if told == role else f"{role} -> {told}"
        line = f"{node}: {change}; says now: {result['read_back'].get(node, 'nothing')}"
        if node in result["pauses_ms"] and not result["dry_run"]:
            pause_ms = result["pauses_ms"][node]
            line += "; it was idle" if pause_ms is None else f"; paused for {pause_ms:.1f} ms"
            if result["of_former_role"].get(node):
                line += f"; {result['of_former_role'][node]} requests of its former role go on there"
        console.print(line)
    if result["dry_run"]:
        console.print("dry run: nothing was changed")
    elif not result["matches"]:
        sizes = ", ".join(f"{count} {role}" for role, count in _sizes(result["read_back"]).items())
        console.print(f"[red]the roles read back ({sizes}) are not those wanted[/]")
