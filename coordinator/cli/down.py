"""`slosserve down`: stop a cluster that another terminal started."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console


def down(
    name: Annotated[str | None, typer.Option(help="Which one, if several run.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be stopped.")] = False,
) -> None:
    """Stop a cluster: endpoints, coordinator, nodes and the Ray that it started, and no other.

    Example: slosserve down --name laptop
    """
    from coordinator.run_state import find_run
    from coordinator.run_stop import stop_from_outside

    console = Console()
    run = find_run(name)
    processes = ", ".join(f"{label} (pid {process.pid})" for label, process in run.processes.items())
    if dry_run:
        console.print(f"would stop {run.name}: {processes or 'nothing is left of it'}")
        return
    with console.status(f"stopping {run.name}: {processes}"):
        left = stop_from_outside(run)
    if left:
        console.print(f"{run.name} is not gone: {', '.join(left)} still run", style="red")
        raise typer.Exit(1)
    console.print(f"{run.name} is stopped")
