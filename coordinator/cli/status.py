"""`slosserve status`: nodes with the roles that they themselves report, load, and promises kept."""

from __future__ import annotations

import json
import time
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live

from coordinator.cli.client import find_cluster
from coordinator.cli.status_view import status_view

WATCH_S = 1.0


def status(
    watch: Annotated[bool, typer.Option("--watch", help="Again every second, until ctrl-C.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what the cluster answers, as it is.")] = False,
    url: Annotated[str | None, typer.Option(help="Of an endpoint, if it was not started here.")] = None,
    name: Annotated[str | None, typer.Option(help="Which cluster of this machine.")] = None,
) -> None:
    """Show each node's role as the node reports it, KV in use, load, links, and promises kept.

    Example: slosserve status --watch
    """
    cluster = find_cluster(url, name)
    if as_json:
        while True:
            typer.echo(json.dumps(cluster.cluster(), indent=None if watch else 1))
            if not watch:
                return
            time.sleep(WATCH_S)
    if not watch:
        Console().print(status_view(cluster.url, cluster.cluster()))
        return
    with Live(status_view(cluster.url, cluster.cluster()), screen=True) as live:
        while True:
            time.sleep(WATCH_S)
            live.update(status_view(cluster.url, cluster.cluster()))
