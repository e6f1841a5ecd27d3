"""`slosserve`: finds the verb, runs it, and turns errors of ours into one clear message."""

from __future__ import annotations

import importlib
import signal
import sys
from importlib.metadata import entry_points, version
from types import FrameType
from typing import Annotated, Any

import typer
import typer.core

from engine.errors import SlosserveError

# Verb -> where it is, and its line in --help, so that --help imports none of them.
VERBS = {
    "up": ("coordinator.cli.up:up", "Start a cluster and watch it start."),
    "down": ("coordinator.cli.down:down", "Stop a cluster and everything it started."),
    "status": ("coordinator.cli.status:status", "Show nodes, roles, load and promises kept."),
    "explain": ("coordinator.cli.explain:explain", "Say why a request was slow, deferred or refused."),
    "pools": ("coordinator.cli.pools:pools", "Show how many nodes prefill, decode, or do both."),
    "rebalance": ("coordinator.cli.pools:rebalance", "Change what nodes do while they serve."),
    "scale": ("coordinator.cli.scale:scale", "Add nodes, or let some leave, while they serve."),
    "plan": ("coordinator.cli.plan:plan", "Ask whom a replica could promise, and in what batches."),
    "profile": ("coordinator.cli.profile:app", "Measure what steps cost, and fit a model to it."),
    "model": ("coordinator.cli.model:app", "Make the models that tests, demo and benchmarks use."),
}
# Verbs of other packages, by entry point.
PLUGIN_GROUP = "slosserve.commands"
PLUGIN_HELP = {
    "advise": "Say which split of prefill and decode nodes keeps most promises for a trace.",
    "bench": "Measure the cluster against vLLM, Sarathi-Serve and DistServe.",
    "bench-endpoint": "Measure what our endpoint costs beside vLLM's own server.",
    "chaos": "Break parts of a cluster under load, and see what clients see.",
    "demo": "Serve mixed traffic on this machine and report which promises were kept.",
    "fuzz": "Send the endpoint all that its description allows, and much that it does not.",
    "simulate": "Serve a scenario or a trace in simulated time, and score every request.",
    "soak": "Serve for long with a fault a minute, and see what is left of it.",
    "traces": "List and fetch public traces.",
}
EXIT_FAILED = 1
EXIT_USAGE = 2


class LazyVerbs(typer.core.TyperGroup):
    """Verbs that are imported when they are called; --help lists them from the table above."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Ours in the order of the table, then those of installed plugins."""
        return [*VERBS, *sorted(point.name for point in entry_points(group=PLUGIN_GROUP))]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The verb itself; only its name and line while --help lists them all."""
        if ctx.resilient_parsing or not _is_called(ctx, cmd_name):
            return _line_of_help(cmd_name)
        return _load(cmd_name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """As the base class does, with the verb imported now."""
        ctx.meta["slosserve.verb"] = args[0] if args else None
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=LazyVerbs,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    epilog="Example: slosserve up --config laptop --detach && slosserve status",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"slosserve {version('slosserve')}")
        raise typer.Exit


@app.callback()
def slosserve(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Serve LLM requests that were promised, as they were promised."""


def main() -> None:
    """Entry point of the console script.

    SIGTERM, and SIGHUP of a terminal that closes, take the way of ctrl-C: what a verb has started is ended.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup asks for that
            signal.signal(number, _interrupt)
    try:
        app()
    except SlosserveError as error:
        _complain(str(error))
        raise SystemExit(EXIT_USAGE if error.http_status == 400 else EXIT_FAILED) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _complain(message: str) -> None:
    from rich.console import Console

    Console(stderr=True, soft_wrap=True, highlight=False).print("[bold red]error:[/] ", end="")
    print(message, file=sys.stderr, flush=True)


def _is_called(ctx: Any, name: str) -> bool:
    return bool(ctx.meta.get("slosserve.verb") == name)


def _load(name: str) -> Any:
    if name in VERBS:
        target = _import(VERBS[name][0])
    else:
        points = entry_points(group=PLUGIN_GROUP, name=name)
        if not points:
            return None
        target = next(iter(points)).load()
    if isinstance(target, typer.Typer):
        return typer.main.get_command(target)
    if callable(target) and not hasattr(target, "make_context"):
        return as_command(name, target)
    return target


def as_command(name: str, function: Any) -> Any:
    """A plain function as a command; its docstring ends with its example."""
    help_text, _, example = (function.__doc__ or "").partition("Example:")
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    single.command(
        name=name, help=help_text.strip(), epilog=f"Example: {example.strip()}" if example else None
    )(function)
    return typer.main.get_command(single)


def _line_of_help(name: str) -> Any:
    """A command that has a name and a line, for the list."""
    line = VERBS[name][1] if name in VERBS else PLUGIN_HELP.get(name, "")
    return typer.core.TyperCommand(name, help=line)


def _import(path: str) -> Any:
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)
