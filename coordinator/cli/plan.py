"""`slosserve plan`: solve one admission problem, and show the batches that carry the answer out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine.errors import RequestError

if TYPE_CHECKING:
    from rich.console import RenderableType

MAX_FILE_BYTES = 64 << 20


def plan(
    instance: Annotated[str | None, typer.Option(help="A JSON file with the problem; - reads stdin.")] = None,
    batches: Annotated[bool, typer.Option(help="Also form the batches that carry the plan out.")] = True,
    table: Annotated[bool, typer.Option("--table", help="Tables to read, instead of JSON.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of a problem.")] = False,
) -> None:
    """Solve one admission problem: whom to promise, whom to defer and why, and in what batches.

    Example: slosserve plan --instance configs/examples/plan.json --table
    """
    # Only here: the planner is compiled by numba, which takes a second to import.
    from coordinator.planner import document

    if schema:
        typer.echo(json.dumps(document.schema(), indent=1))
        return
    if instance is None:
        raise RequestError("say which problem: --instance FILE.json, or - for stdin (--schema prints its form)")
    problem = document.parse(_read(instance))
    from coordinator.planner.admission import solve
    from coordinator.planner.replay import replay

    decided = solve(problem)
    answer = document.answer(decided, replay(problem, decided) if batches else None)
    if not table:
        typer.echo(_as_text(answer))
        return
    from rich.console import Console

    Console().print(*_tables(answer), sep="\n")


def _read(path: str) -> str:
    """The text of the file, or of stdin. Raises RequestError if there is none, or far too much."""
    try:
        if path == "-":
            data = sys.stdin.buffer.read(MAX_FILE_BYTES + 1)
        else:
            with Path(path).open("rb") as file:
                data = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        raise RequestError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    if len(data) > MAX_FILE_BYTES:
        raise RequestError(f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not text in UTF-8: {error.reason} at byte {error.start}") from None


def _as_text(answer: dict[str, Any]) -> str:
    """JSON with a line for each batch, so that a long plan can be read and compared."""
    lines = []
    for name, value in answer.items():
        if name == "batches" and value:
            rows = ",\n  ".join(json.dumps(batch) for batch in value)
            lines.append(f' "{name}": [\n  {rows}\n ]')
        else:
            lines.append(f' "{name}": {json.dumps(value)}')
    return "{\n" + ",\n".join(lines) + "\n}"


def _tables(answer: dict[str, Any]) -> list[RenderableType]:
    from rich.markup import escape
    from rich.table import Table

    exact = "exact" if answer["exact"] else "not exact"
    kept = "" if answer["kept"] else "[red]what was promised earlier cannot all be kept[/]. "
    heading = f"{kept}value {answer['value']:g}, by {answer['method']} ({exact})"
    who = Table("request", "answer", box=None, header_style="dim", padding=(0, 2, 0, 0))
    for name in answer["admitted"]:
        who.add_row(escape(name), "[green]admitted[/]")
    for name, why in answer["deferred"].items():
        who.add_row(escape(name), f"[yellow]deferred[/]: {escape(why)}")
    depths = ", ".join(f"{escape(name)} {depth}" for name, depth in answer["depths"].items())
    parts: list[RenderableType] = [heading, who, f"tokens per verify: {depths or 'no tiers'}"]
    if answer.get("batches"):
        parts += [_batches(answer["batches"])]
    if answer.get("batches_cut_off"):
        parts.append(f"[yellow]only the first {len(answer['batches'])} batches are shown[/]")
    parts += [
        f"[red]late[/]: {escape(miss['id'])}, {miss['what']} due at {miss['due_s']:.3f} s"
        for miss in answer.get("missed", ())
    ]
    return parts


def _batches(batches: list[dict[str, Any]]) -> RenderableType:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for name in ("batch ms", "predicted ms", "tokens"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("tokens of each")
    for batch in batches:
        tokens = batch["tokens"]
        each = ", ".join(f"{escape(name)} {count}" for name, count in tokens.items())
        span = f"{batch['start_s'] * 1e3:.1f} to {batch['end_s'] * 1e3:.1f}"
        table.add_row(span, f"{batch['predicted_s'] * 1e3:.1f}", str(sum(tokens.values())), each)
    return table
