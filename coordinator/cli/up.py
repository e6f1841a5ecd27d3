"""`slosserve up`: start a cluster, show how it gets on, keep it until ctrl-C."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.live import Live

from coordinator.cli.startup_view import StartupView
from coordinator.cli.status_view import VIRTUAL
from coordinator.cluster_process import ClusterProcess
from coordinator.config import load_config
from coordinator.config_layers import parse_assignment
from coordinator.keeper import Keeper


def up(
    config: Annotated[
        str, typer.Option(help="A YAML file, or one that ships: laptop, two-gpus, ...")
    ] = "laptop",
    model: Annotated[
        str | None, typer.Option(help="tiny, scale, llama-8b, a folder or a Hugging Face name.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the cluster.")] = None,
    prefill: Annotated[int | None, typer.Option(min=0, help="Nodes that prefill.")] = None,
    decode: Annotated[int | None, typer.Option(min=0, help="Nodes that decode.")] = None,
    mixed: Annotated[int | None, typer.Option(min=0, help="Nodes that do both.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Of the endpoint; 0: a free one.")] = None,
    address: Annotated[str | None, typer.Option(help="Join this running Ray (HOST:PORT or auto).")] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any key of the configuration.")
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Return when it is ready; it runs on.")] = False,
) -> None:
    """Start a cluster: Ray, the nodes, the coordinator and the endpoint. Ctrl-C ends all of it.

    Example: slosserve up --config laptop --prefill 1 --decode 1 --port 8000 --set engine.max_num_seqs=32
    """
    flags = {
        "model": model,
        "name": name,
        "pools.prefill": prefill,
        "pools.decode": decode,
        "pools.mixed": mixed,
        "endpoint.port": port,
        "ray.address": address,
    }
    given = {key: value for key, value in flags.items() if value is not None}
    settings = load_config(config, given | dict(map(parse_assignment, assignments or [])))
    if settings.engines == "virtual":
        Console(stderr=True).print(f"[bold yellow]{VIRTUAL}[/]")
    cluster = _start(settings, detach)
    if detach:
        Console().print(
            f"ready at {cluster.base_url}; it runs on. End it: slosserve down --name {settings.name}"
        )
        return
    with cluster:
        _keep(cluster)


def _start(settings: Any, detach: bool) -> ClusterProcess:
    console = Console(stderr=True)
    view = StartupView(settings.name)
    if not console.is_terminal:
        return ClusterProcess.start(settings, progress=lambda event: _print_line(console, event), detach=detach)
    with Live(view, console=console, refresh_per_second=4):
        return ClusterProcess.start(settings, progress=view.take, detach=detach)


def _keep(cluster: ClusterProcess) -> None:
    """Until ctrl-C, or until something ends that is not started again."""
    Console().print(f"ready at {cluster.base_url} (OpenAI: {cluster.base_url}/v1). Ctrl-C ends it.")
    errors = Console(stderr=True)
    Keeper(cluster, lambda text: errors.print(text, markup=False, highlight=False)).keep()


def _print_line(console: Console, event: dict[str, Any]) -> None:
    what = event.get("name") or event.get("process")
    state = event.get("state") or event.get("event")
    console.print(f"{what}: {state} {event.get('detail') or ''}".rstrip(), markup=False, highlight=False)
