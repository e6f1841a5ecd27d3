"""The demo on the terminal: a table that lives while it runs, and the report at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from benchmarks.client import Reply


@dataclass(slots=True)
class Tally:
    """Calls of one class so far, as this client saw them."""

    sent: int = 0
    replies: list[Reply] = field(default_factory=list)

    @property
    def failed(self) -> int:
        """Calls that ended with an error."""
        return sum(reply.error is not None for reply in self.replies)

    @property
    def running(self) -> int:
        """Calls whose stream is open."""
        return self.sent - len(self.replies)

    def ttft_s(self, percentile: float) -> float | None:
        """Seconds to the first token."""
        return _percentile([r.ttft_s for r in self.replies if r.ttft_s is not None], percentile)

    def tpot_s(self, percentile: float) -> float | None:
        """Mean seconds a token, over calls."""
        return _percentile([r.tpot_s for r in self.replies if r.tpot_s is not None], percentile)

    def facts(self) -> dict[str, Any]:
        """For the summary."""
        return {
            "sent": self.sent,
            "completed": len(self.replies) - self.failed,
            "failed": self.failed,
            "in_tokens": sum(reply.in_tokens for reply in self.replies),
            "out_tokens": sum(reply.out_tokens for reply in self.replies),
            "ttft_p50_s": self.ttft_s(50),
            "ttft_p99_s": self.ttft_s(99),
            "tpot_p50_s": self.tpot_s(50),
            "tpot_p99_s": self.tpot_s(99),
        }


def live_view(
    tallies: Mapping[str, Tally],
    kept: Mapping[str, Any],
    nodes: Sequence[Mapping[str, Any]],
    elapsed_s: float,
    duration_s: float,
) -> RenderableType:
    """The table and the nodes below it. `kept`: attainment by class as the cluster counts it."""
    title = "draining" if elapsed_s >= duration_s else f"{duration_s - elapsed_s:.0f} s of traffic left"
    table = Table(title=f"slosserve demo: {title}", title_justify="left")
    table.add_column("class")
    for column in ("sent", "running", "done", "failed", "TTFT p50", "TPOT p50", "kept"):
        table.add_column(column, justify="right")
    for name, tally in tallies.items():
        table.add_row(
            name,
            str(tally.sent),
            str(tally.running),
            str(len(tally.replies) - tally.failed),
            Text(str(tally.failed), style="red" if tally.failed else ""),
            in_ms(tally.ttft_s(50)),
            in_ms(tally.tpot_s(50)),
            _percent((kept.get(name) or {}).get("attainment")),
        )
    return Group(table, *(Text(_node_line(node), style="dim") for node in nodes))


def report(summary: Mapping[str, Any]) -> RenderableType:
    """What is printed at the end."""
    parts: list[RenderableType] = [_kept_table(summary["attainment"])]
    parts.append(Text(_calls_line(summary)))
    parts.append(Text(_handoff_line(summary)))
    if summary["one_request"]:
        parts.append(_timeline_table(summary["one_request"]))
    parts += [Text(f"error: {text}", style="red") for text in summary["error_samples"]]
    return Group(*parts)


def _kept_table(attainment: Mapping[str, Any]) -> Table:
    stages = sorted({stage for kept in attainment.values() for stage in kept["stages"]}, reverse=True)
    table = Table(title="promises kept", title_justify="left")
    table.add_column("class")
    for column in ("requests", "all stages", *stages):
        table.add_column(column, justify="right")
    for name, kept in sorted(attainment.items()):
        shares = [_percent((kept["stages"].get(stage) or {}).get("attainment")) for stage in stages]
        table.add_row(name, str(kept["requests"]), _percent(kept["attainment"]), *shares)
    return table


def _calls_line(summary: Mapping[str, Any]) -> str:
    return (
        f"{summary['completed']} of {summary['requests']} calls completed, {summary['errors']} errors, "
        f"{summary['tool_calls']} tool calls in {summary['agent_sessions']} agent sessions; "
        f"engine {summary['engine']}, KV by {summary['transport']}"
    )


def _handoff_line(summary: Mapping[str, Any]) -> str:
    rate = summary["handoff_bytes_per_s"]
    speed = "" if rate is None else f", {rate / 1e6:.0f} MB/s"
    return (
        f"{summary['handoffs']} handoffs of {summary['placed_on_pairs']} requests placed on a pair: "
        f"{summary['kv_bytes'] / 1e6:.1f} MB, p50 {in_ms(summary['handoff_p50_s'])}{speed}"
    )


def _timeline_table(timeline: Mapping[str, Any]) -> Table:
    asked = f"{timeline.get('prompt_tokens', '?')} tokens in, {timeline.get('output_tokens', '?')} out"
    title = f"where the time of one request went: {timeline.get('request_id', '?')}, {asked}"
    table = Table(title=title, title_justify="left")
    table.add_column("from its arrival", justify="right")
    table.add_column("")
    for at_s, text in timeline_steps(timeline):
        table.add_row(in_ms(at_s), text)
    return table


def timeline_steps(timeline: Mapping[str, Any]) -> list[tuple[float, str]]:
    """(seconds since arrival, what happened) in order. What the endpoint did not say is left out."""
    prefill, decode = timeline.get("prefill") or {}, timeline.get("decode") or {}
    pair = timeline.get("prefill_node") is not None
    nodes = [timeline[key] for key in ("prefill_node", "decode_node") if timeline.get(key)]
    steps = [
        (timeline.get("placed_s"), f"placed on {' > '.join(nodes)} ({timeline.get('verdict', '?')})"),
        (timeline.get("first_token_s"), f"first token{_waited(prefill if pair else decode)}"),
        (timeline.get("taken_up_s"), f"second token{_pulled(decode)}"),
        (timeline.get("ended_s"), "last token"),
    ]
    return [(float(at_s), text) for at_s, text in steps if at_s is not None]


def in_ms(seconds: float | None) -> str:
    """Milliseconds for people."""
    return "-" if seconds is None else f"{seconds * 1e3:.1f} ms"


def _waited(timing: Mapping[str, Any]) -> str:
    queued_s = timing.get("queued_s")
    return "" if queued_s is None else f" (waited {in_ms(queued_s)} for its first batch)"


def _pulled(timing: Mapping[str, Any]) -> str:
    if timing.get("pull_s") is None:
        return ""
    size = f"{timing.get('pulled_bytes', 0) / 1e6:.2f} MB"
    return f" (KV {timing.get('pull_outcome', 'pulled')}: {size} in {in_ms(timing['pull_s'])})"


def _node_line(node: Mapping[str, Any]) -> str:
    def shown(key: str) -> Any:
        return node.get(key, "-")

    return (
        f"{shown('name')}: {shown('role')}, {shown('state')}; {shown('running')} running, "
        f"{shown('waiting')} waiting; KV blocks {shown('used_blocks')} of {shown('num_blocks')}"
    )


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _percentile(values: Sequence[float], percentile: float) -> float | None:
    return float(np.percentile(values, percentile)) if values else None
