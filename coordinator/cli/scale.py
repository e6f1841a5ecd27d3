"""`slosserve scale`: more nodes, or fewer, while they serve."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.console import Console

from coordinator.cli.client import ClusterClient, find_cluster
from engine.errors import NoCapacity, SlosserveError
from engine.request import RoleName

POLL_S = 0.2
FAILED = "failed"


def scale(
    nodes: Annotated[int | None, typer.Option(min=1, help="How many there are to be.")] = None,
    role: Annotated[
        RoleName | None, typer.Option(help="Of those that come or leave; else pools keep their shares.")
    ] = None,
    remove: Annotated[list[str] | None, typer.Option(help="Or: this one leaves; again for more.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say who would come or leave.")] = False,
    drain_s: Annotated[
        float, typer.Option(min=0, help="What a leaving node still serves after so long goes on elsewhere.")
    ] = 600.0,
    wait: Annotated[bool, typer.Option(help="Until new nodes serve, and leaving ones are gone.")] = True,
    timeout_s: Annotated[float, typer.Option(min=1, help="Of --wait.")] = 900.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
    admin_key: Annotated[str | None, typer.Option(help="If the endpoint asks for one.")] = None,
    url: Annotated[str | None, typer.Option(help="Of an endpoint, if it was not started here.")] = None,
    name: Annotated[str | None, typer.Option(help="Which cluster of this machine.")] = None,
) -> None:
    """Add nodes to a running cluster, or let some leave. Nothing is dropped.

    New nodes are started where Ray has room. A node that leaves is given nothing new, and is ended once what it
    serves is over. Exits 1 if a node does not start.

    Example: slosserve scale --nodes 4 --role decode
    """
    if (nodes is None) != bool(remove) or (remove and role is not None):
        raise typer.BadParameter("give either --nodes (and --role), or --remove")
    cluster, console = find_cluster(url, name, admin_key), Console(highlight=False)
    answer = cluster.set_nodes(nodes, role, remove or [], dry_run=dry_run, drain_s=drain_s)
    if not as_json:
        console.print(_told(answer, dry_run=dry_run))
    states: dict[str, str] = {}
    if wait and not dry_run:
        with console.status("") as status:
            states = _waited(cluster, answer, timeout_s, lambda line: None if as_json else status.update(line))
    failed = {one: state for one, state in states.items() if state.startswith(FAILED)}
    if as_json:
        typer.echo(json.dumps({**answer, "states": states}))
    elif states:
        for one, state in states.items():
            console.print(f"{one}: {state}")
    if failed:
        raise SlosserveError(
            f"{', '.join(failed)} did not start; the rest serves on. To give up on it:"
            f" slosserve scale --nodes {answer['after'] - len(failed)}"
        )


def _told(answer: Mapping[str, Any], *, dry_run: bool) -> str:
    come = ", ".join(f"{one} ({role})" for one, role in answer["added"].items())
    leave = ", ".join(answer["removed"])
    parts = [f"{verb}: {names}" for verb, names in (("to start", come), ("to leave", leave)) if names]
    told = "; ".join(parts) or "nothing to do"
    return f"{answer['before']} nodes -> {answer['after']}; {told}" + ("; dry run" if dry_run else "")


def _waited(cluster: ClusterClient, answer: Mapping[str, Any], timeout_s: float, tell: Any) -> dict[str, str]:
    """What became of each node that was to come or to leave. Raises NoCapacity where that takes too long."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        found = {node["name"]: node for node in cluster.cluster()["nodes"]}
        states = {one: str(found[one]["state"]) for one in answer["added"] if one in found}
        left = {one: found[one].get("requests", 0) for one in answer["removed"] if one in found}
        coming = [one for one, state in states.items() if state != "ready" and not state.startswith(FAILED)]
        if not coming and not left:
            return {**states, **dict.fromkeys(answer["removed"], "gone")}
        starting = [f"{one} is {states[one]}" for one in coming]
        leaving = [f"{one} leaves, {requests} requests go on there" for one, requests in left.items()]
        tell("; ".join(starting + leaving))
        if time.monotonic() > deadline_s:
            raise NoCapacity(
                f"after {timeout_s:g} s: {'; '.join(starting + leaving)}. It goes on; see `slosserve status`,"
                " or give a longer --timeout-s."
            )
        time.sleep(POLL_S)
