"""`slosserve bench`: the benchmark suite, one command per result."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import typer
from rich.console import Console

EXAMPLE = "Example: slosserve bench capacity --quick && slosserve bench report --from out/bench"
# Command -> where it is. Each is a function whose docstring ends with its example.
COMMANDS = {
    "capacity": "benchmarks.capacity_table:bench_capacity",
    "ablation": "benchmarks.studies.ablation:ablation",
    "scaling": "benchmarks.studies.scaling:scaling",
    "burst": "benchmarks.studies.burst:burst",
    "lengths": "benchmarks.lengths:bench_lengths",
    "rebalance": "benchmarks.studies.rebalance:rebalance",
    "distserve-facts": "benchmarks.distserve_facts:distserve_facts",
    "fidelity": "benchmarks.fidelity:fidelity",
    "thousand": "benchmarks.thousand:thousand",
    "speed": "benchmarks.speed:speed",
    "report": "benchmarks.report:report",
}

app = typer.Typer(no_args_is_help=True, add_completion=False)


@app.callback(epilog=EXAMPLE)
def bench() -> None:
    """Measure the cluster against vLLM, Sarathi-Serve and DistServe, in simulated time and on real engines."""


def _register(name: str, path: str) -> None:
    module, _, function = path.partition(":")
    target: Callable[..., Any] = getattr(import_module(module), function)
    text, _, example = (target.__doc__ or "").partition("Example:")
    epilog = f"Example: {example.strip()}" if example else None
    app.command(name=name, help=text.strip(), epilog=epilog)(target)


for _name, _path in COMMANDS.items():
    _register(_name, _path)


def fail(message: str) -> None:
    """Say what is wrong, on stderr, and end with status 2."""
    Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {message}", highlight=False)
    raise typer.Exit(2)
