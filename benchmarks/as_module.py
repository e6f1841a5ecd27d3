"""How a benchmark runs as `python -m`: one command, and an error of ours in one line."""

from __future__ import annotations

from collections.abc import Callable

import typer
from rich.console import Console
from rich.markup import escape

from engine.errors import SlosserveError


def start(command: Callable[..., None]) -> None:
    """Run `command` with the arguments of the process. An error of ours ends it with status 2."""
    try:
        typer.run(command)
    except SlosserveError as error:
        Console(stderr=True, soft_wrap=True).print(f"[red]error:[/red] {escape(str(error))}", highlight=False)
        raise SystemExit(2) from None
