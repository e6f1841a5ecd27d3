"""A cluster's state as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

LAST_CHANGES = 5
VIRTUAL = "The engines are virtual: no model runs, steps take the time of a profile, and the text is made up."


def status_view(url: str, state: Mapping[str, Any]) -> Group:
    """All of GET /cluster that a person asks for first."""
    pools = ", ".join(f"{count} {role}" for role, count in state["pools"].items() if count)
    heading = (
        f"[bold]{escape(url)}[/]  {escape(str(state['model']))} on {state['engine']},"
        f" {state['transport']}; {pools} ({state['mode']})"
    )
    parts: list[RenderableType] = [heading]
    if str(state["engine"]).startswith("virtual"):
        parts.append(f"[bold yellow]{VIRTUAL}[/]")
    if (ray := state.get("ray") or {}).get("head") == "lost":
        parts.append(f"[bold red]{escape(ray['says'])}[/]")
    parts.append(_nodes(state["nodes"]))
    if state["links"]:
        parts.append(_links(state["links"]))
    if state["attainment"]:
        parts.append(_attainment(state["attainment"]))
    parts += _sessions_and_loops(state)
    parts += _rebalancing(state.get("rebalancing") or {})
    parts += [_line("placements", state["placements"]), _line("handoffs", state["handoffs"])]
    return Group(*parts)


def _rebalancing(state: Mapping[str, Any]) -> list[RenderableType]:
    """Whether pools follow the load, and the last changes; nothing where there is nothing to tell."""
    changes = state.get("changes") or []
    if not state.get("follow_load") and not changes:
        return []
    follows = "pools follow the load" if state.get("follow_load") else "pools stay as they were set"
    lines: list[RenderableType] = [f"{follows}: {escape(str(state.get('says', '')))}"]
    for change in changes[-LAST_CHANGES:]:
        at = datetime.fromtimestamp(change["at_s"]).strftime("%H:%M:%S")
        lines.append(
            f"  {at} {change['node']}: {change['before']} -> {change['after']}: {escape(change['why'])}"
        )
    return lines


def _nodes(nodes: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("node", "role", "state", "KV blocks", "running", "waiting", "step ms", "heard s ago", "pid")
    for node in nodes:
        used = f"{node['used_blocks']} / {node['num_blocks']}" if node["num_blocks"] else "-"
        table.add_row(
            node["name"],
            node["role"],
            _colored(node["state"]),
            used,
            *(_number(node[key]) for key in ("running", "waiting", "step_ms", "age_s", "pid")),
        )
    return table


def _links(links: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("link", "latency ms", "GB/s", "")
    for link in links:
        pair = f"{link['source']} > {link['target']}"
        if "error" in link:
            table.add_row(pair, "-", "-", f"[red]{escape(link['error'])}[/]")
        else:
            table.add_row(pair, f"{link['latency_s'] * 1e3:.2f}", f"{link['bytes_per_s'] / 1e9:.2f}", "")
    return table


def _attainment(attainment: Mapping[str, Any]) -> Table:
    table = _table("class", "promises kept")
    for name, kept in attainment.items():
        table.add_row(name, _kept(kept))
    return table


def _sessions_and_loops(state: Mapping[str, Any]) -> list[RenderableType]:
    """What is kept for agents between their calls, and how many of their loops were in time."""
    kept = {
        node["name"]: f"{node['sessions']} ({node['session_tokens']} tokens)"
        for node in state["nodes"]
        if node.get("sessions")
    }
    loops = {
        name: f"{counts['met']} of {counts['total']} in time" for name, counts in state.get("loops", {}).items()
    }
    lines = (("sessions kept", kept), ("loops", loops))
    return [_line(title, values) for title, values in lines if values]


def _kept(kept: Any) -> str:
    if isinstance(kept, Mapping):
        return ", ".join(f"{stage} {_kept(value)}" for stage, value in kept.items())
    return _number(kept)


def _line(title: str, values: Mapping[str, Any]) -> str:
    return f"{title}: " + (", ".join(f"{key} {_number(value)}" for key, value in values.items()) or "none")


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else escape(str(value))


def _colored(state: str) -> str:
    color = {"ready": "green", "lost": "red", "failed": "red"}.get(state, "yellow")
    return f"[{color}]{state}[/]"


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in columns:
        table.add_column(column)
    return table
