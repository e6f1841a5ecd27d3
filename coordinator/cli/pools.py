"""`slosserve pools` and `slosserve rebalance`: who prefills, who decodes, who does both."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.console import Console

from coordinator.cli.client import find_cluster

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
    prefill: Annotated[int, typer.Option(min=0, help="Nodes that prefill.")],
    decode: Annotated[int, typer.Option(min=0, help="Nodes that decode.")],
    mixed: Annotated[int, typer.Option(min=0, help="Nodes that do both.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would change.")] = False,
    as_json: AsJson = False,
    admin_key: Annotated[str | None, typer.Option(help="If the endpoint asks for one.")] = None,
    url: Url = None,
    name: Name = None,
) -> None:
    """Change what nodes do, and read their roles back from the nodes. Exits 1 if they do not match.

    Example: slosserve rebalance --prefill 0 --decode 2 --dry-run
    """
    cluster = find_cluster(url, name, admin_key)
    wanted = {"prefill": prefill, "decode": decode, "mixed": mixed}
    before = _roles(cluster.cluster())
    answer = cluster.set_pools(prefill, decode, mixed, dry_run=dry_run)
    read_back = _roles(cluster.cluster())
    # A dry run must change nothing; otherwise believe the nodes, not the answer.
    matches = read_back == before if dry_run else _sizes(read_back) == wanted
    result = {
        "dry_run": dry_run,
        "wanted": wanted,
        "before": before,
        "after": answer.get("after"),
        "read_back": read_back,
        "matches": matches,
    }
    if as_json:
        typer.echo(json.dumps({**answer, **result}))
    else:
        _print(result)
    if not matches:
        raise typer.Exit(1)


def _roles(state: Mapping[str, Any]) -> dict[str, str]:
    return {node["name"]: str(node["role"]) for node in state["nodes"]}


def _sizes(roles: Mapping[str, str]) -> dict[str, int]:
    counts = Counter(roles.values())
    return {role: counts[role] for role in ROLES}


def _print(result: Mapping[str, Any]) -> None:
    console = Console(highlight=False)
    after = result["after"] or {}
    for node, role in result["before"].items():
        told = after.get(node, role)
        change = role if told == role else f"{role} -> {told}"
        console.print(f"{node}: {change}; says now: {result['read_back'].get(node, 'nothing')}")
    if result["dry_run"]:
        console.print("dry run: nothing was changed")
    elif not result["matches"]:
        sizes = ", ".join(f"{count} {role}" for role, count in _sizes(result["read_back"]).items())
        console.print(f"[red]the roles read back ({sizes}) are not those wanted[/]")
