"""`slosserve explain`: why a request was slow, deferred or refused, in words and times."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table

from coordinator.cli.client import find_cluster

BAR = 30  # characters
Row = Mapping[str, Any]


def explain(
    request_id: Annotated[str, typer.Argument(help="From the response header x-slosserve-request-id.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print what the cluster answers, as it is.")] = False,
    url: Annotated[
        str | None, typer.Option(help="Of the endpoint that served it, if not of this machine.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Which cluster of this machine.")] = None,
) -> None:
    """Say why a request was slow, deferred or refused: stages, where its time went, and who else was asked.

    Example: slosserve explain chatcmpl-0a1b2c
    """
    found = find_cluster(url, name).explain(request_id)
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    Console(highlight=False, soft_wrap=False).print(view(found))


def view(found: Row) -> RenderableType:
    """An answer of /explain for people."""
    name, verdict = escape(found["request_id"]), found["verdict"] or "not placed"
    title = f"[bold]{name}[/bold]  {verdict}, {found['outcome']}"
    parts: list[RenderableType] = [title, *(escape(sentence) for sentence in found["why"])]
    if found["stages"]:
        parts.append(_stages(found["stages"]))
    if found["times"]:
        parts.append(_times(found["times"]))
    if found["candidates"]:
        parts.append(_candidates(found["candidates"], found["placement"]))
    return Group(*parts)


def _stages(stages: Sequence[Row]) -> Table:
    table = Table(title="stages", title_justify="left")
    for heading in ("stage", "tokens", "due", "done", "latest token", ""):
        table.add_column(heading, justify="left" if heading in ("stage", "") else "right")
    for stage in stages:
        met = {True: "[green]kept[/green]", False: "[red]missed[/red]", None: "-"}[stage["met"]]
        late = f"{abs(stage['late_s']) * 1e3:.0f} ms {'late' if stage['late_s'] > 0 else 'early'}"
        due, actual = f"{stage['due_s']:.3f} s", f"{stage['actual_s']:.3f} s"
        table.add_row(stage["kind"], str(stage["tokens"]), due, actual, late, met)
    return table


def _times(times: Sequence[Row]) -> Table:
    whole_s = sum(one["seconds"] for one in times)
    table = Table(title="where the time went", title_justify="left")
    table.add_column("")
    table.add_column("seconds", justify="right")
    table.add_column("", no_wrap=True)
    for one in times:
        share = max(one["seconds"], 0.0) / whole_s if whole_s > 0 else 0.0
        table.add_row(escape(one["part"]), f"{one['seconds']:.4f}", "\u2588" * round(share * BAR))
    table.add_row("in all", f"{whole_s:.4f}", "")
    return table


def _candidates(candidates: Sequence[Row], placement: Sequence[str]) -> Table:
    table = Table(title="candidates", title_justify="left")
    for heading in ("where", "fits", "would cost others", "why not"):
        table.add_column(heading)
    for one in candidates:
        taken = " (taken)" if one["name"] == ">".join(placement) else ""
        loss = "-" if one["loss_s"] is None else f"{one['loss_s'] * 1e3:.1f} ms"
        table.add_row(f"{one['name']}{taken}", "yes" if one["feasible"] else "no", loss, escape(one["reason"]))
    return table
