"""`slosserve model`: make the random-weight models of the recipes."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from engine.errors import ConfigError
from engine.models import MODEL_NAMES, load_recipe, make_model

app = typer.Typer(help="Make the models that tests, demo and benchmarks use.", no_args_is_help=True)


@app.callback()
def model() -> None:
    """Make the models that tests, demo and benchmarks use."""


@app.command(epilog="Example: slosserve model make tiny")
def make(
    name: Annotated[str, typer.Argument(help=f"Which one: {' or '.join(MODEL_NAMES)}.")],
    force: Annotated[bool, typer.Option("--force", help="Make it again even if it is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Write a random-weight Llama with tokenizer, chat template and recipe under the cache directory."""
    console = Console(stderr=True)
    start_s = time.monotonic()
    try:
        recipe = load_recipe(name)
        with console.status(f"making {name}: {recipe.description}"):
            path = make_model(name, force=force)
    except ConfigError as error:
        console.print(f"[red]error:[/red] {escape(str(error))}", highlight=False)
        raise typer.Exit(2) from error
    _report(name, path, time.monotonic() - start_s, as_json)


def _report(name: str, path: Path, seconds: float, as_json: bool) -> None:
    made = json.loads((path / "recipe.json").read_text(encoding="utf-8"))
    if as_json:
        facts = {"name": name, "path": str(path), "seconds": round(seconds, 3), **made}
        typer.echo(json.dumps(facts))
        return
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"[bold]{name}[/bold]  {path}")
    console.print(f"  {made['parameters'] / 1e6:.1f} M parameters, {made['recipe']['dtype']}, {seconds:.1f} s")
