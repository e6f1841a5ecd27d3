"""The part of RESULTS.md about what breaks: a row for each line of the failure contract."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.report.markdown import NOTHING, table

Row = Mapping[str, Any]


def chaos(file: Row, _: Path) -> list[str]:
    """What clients saw, and what was left."""
    text = (
        "Clients ask again and again at temperature 0 while a part of the cluster fails; their tokens are "
        "compared with those of the same prompts while nothing is broken. A gap is between two tokens of a "
        "stream whose node was lost in between. Turned away: with 429 or 503 and Retry-After, where the "
        "contract has it; cut off: clients of an endpoint that died. KV refused: pulls whose KV was not used."
    )
    headings = ["", "in flight", "errors", "turned away", "cut off", "wrong tokens", "noticed after"]
    headings += ["KV refused", "went on elsewhere", "gap p50", "gap p99", "KV blocks left", "as promised"]
    left = file["processes_left"]
    processes = "" if left is None else f"Processes left when the cluster was down: {left}."
    return [text, table(headings, [_row(row) for row in file["rows"]]), processes]


def soak(file: Row, _: Path) -> list[str]:
    """What clients saw over a long time, and what has grown."""
    faults = [row for row in file["faults"] if "victim" in row]
    text = (
        f"{file['seconds'] / 60:g} minutes of mixed load, clients that go away, and {len(faults)} faults: "
        f"{file['requests']} requests and {file['tokens']} tokens compared with an unbroken run; "
        f"{file['client_errors']} errors outside the contract, {file['turned_away']} turned away with "
        f"Retry-After, {file['wrong_tokens']} wrong tokens, {file['blocks_leaked']} KV blocks and "
        f"{file['processes_left']} processes left. {_followed(file)}Memory that a process has to itself, after "
        "its first two minutes:"
    )
    rows = []
    for row in file["memory"]:
        figures = [f"{row['minutes']:g}", f"{row['mib']:.0f}", f"{row['mib_per_min']:+.2f}"]
        rows.append([row["process"], *figures, "yes" if row["flat"] else "**no**"])
    return [text, table(["", "minutes", "MiB at the end", "MiB a minute", "flat"], rows)]


def _followed(file: Row) -> str:
    """What pools did that follow a load which does not change: of a run without faults."""
    if file["faults"]:
        return ""
    changes = len(file["role_changes"])
    return f"Pools followed the load: {changes} changes of role, {file['swings']} of them back again. "


def fuzz(file: Row, _: Path) -> list[str]:
    """What came of requests that were made from the endpoint's description."""
    after = "answers" if file["answers"] else "does **not** answer"
    return [
        f"schemathesis, for {file['minutes']:g} minutes from the endpoint's own OpenAPI description: "
        f"{file['requests']} requests to {file['operations']} operations, {file['failures']} answered with an "
        f"error of the server's, {file['errors']} not answered. The cluster {after} afterwards, with "
        f"{file['blocks_in_use']} KV blocks in use."
    ]


def _row(row: Row) -> list[str]:
    counts = [str(row[key]) for key in ("in_flight", "client_errors", "turned_away", "cut_off", "wrong_tokens")]
    return [
        row["contract"],
        *counts,
        _seconds(row["detection_s"]),
        str(row["kv_not_used"]),
        str(row["resumed"]),
        _seconds(row["resume_gap_p50_s"]),
        _seconds(row["resume_gap_p99_s"]),
        str(row["blocks_leaked"]),
        "yes" if row["as_promised"] else "**no**",
    ]


def _seconds(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f} s"
