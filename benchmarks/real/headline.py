"""What capacities on real engines add up to: ours over stock vLLM, and what of the admitted was kept."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from rich.table import Table

Row = dict[str, Any]
Key = tuple[str, int]


def headline(rows: Sequence[Row], loads: Sequence[Row], windows: Sequence[Row]) -> Row:
    """Ours in its best mode over the best stock system, without speculation; None where nothing is compared.

    `admitted_kept`: the least share of the admitted that met every stage, over all windows of ours on one
    engine, up to twice its capacity, and `admitted_kept_in_all` that of these windows together: two engines
    here leave no core for those who ask. `kept_at_twice`: requests kept a second at twice the capacity, over
    those at the capacity; the least.
    """
    plain = [row for row in rows if not row["drafts"]]
    default, tuned = ratios(plain, tuned=False), ratios(plain, tuned=True)
    drafting = ratios([row for row in rows if row["drafts"]], tuned=False)
    promised = [(int(one["admitted"]), float(one["admitted_kept"])) for one in _promised(plain, windows)]
    admitted = sum(count for count, _ in promised)
    twice = [row for row in loads if row["load"] == 2.0]
    return {
        "geomean_vs_stock_default": _geomean(default.values()),
        "geomean_vs_stock_tuned": _geomean(tuned.values()),
        "worst_ratio": min(tuned.values(), default=None),
        "admitted_kept": min((kept for _, kept in promised), default=None),
        "admitted_kept_in_all": sum(count * kept for count, kept in promised) / admitted if admitted else None,
        "kept_at_twice": min(_known(_over_capacity(row, loads) for row in twice), default=None),
        "geomean_with_drafts": _geomean(drafting.values()),
        "ratios": {
            name: {f"{scenario} on {engines}": value for (scenario, engines), value in found.items()}
            for name, found in (("default", default), ("tuned", tuned), ("with drafts", drafting))
        },
    }


def _promised(rows: Iterable[Row], windows: Iterable[Row]) -> list[Row]:
    """Windows of ours on one engine, at up to twice what it holds, in which something was admitted."""
    most = {(row["scenario"], row["system"]): 2.0 * row["mean"] for row in rows if _alone(row)}
    return [
        one
        for one in windows
        if one["engines"] == 1
        and one["asked_per_s"] <= most.get((one["scenario"], one["system"]), 0.0) * (1 + 1e-9)
        and one["admitted"]
    ]


def _alone(row: Row) -> bool:
    return bool(row["ours"]) and row["engines"] == 1


def ratios(rows: Iterable[Row], *, tuned: bool) -> dict[Key, float]:
    """By scenario and engines: our best mode over the best of vLLM, `tuned` or only as it comes."""
    ours: dict[Key, float] = {}
    stock: dict[Key, float] = {}
    for row in rows:
        key = (str(row["scenario"]), int(row["engines"]))
        if row["ours"]:
            ours[key] = max(ours.get(key, 0.0), float(row["mean"]))
        elif tuned or not row["tuned"]:
            stock[key] = max(stock.get(key, 0.0), float(row["mean"]))
    return {key: ours[key] / stock[key] for key in ours if stock.get(key, 0.0) > 0}


def table(rows: Sequence[Row]) -> Table:
    """Capacity of every system, for the terminal."""
    shown = Table(title="requests a second with nine of ten kept, real engines", title_justify="left")
    for heading in ("scenario", "engines", "system", "settings", "capacity", "least to most", "simulator"):
        shown.add_column(heading, justify="left" if heading in ("scenario", "system", "settings") else "right")
    for row in rows:
        shown.add_row(
            row["scenario"],
            str(row["engines"]),
            row["system"],
            row["tuning"],
            f"{row['mean']:.2f}",
            f"{row['least']:.2f} to {row['most']:.2f}",
            f"{row['predicted']:.2f}",
        )
    return shown


def windows_table(windows: Sequence[Row]) -> Table:
    """Every window as it was measured, for the terminal."""
    shown = Table(title="windows on real engines", title_justify="left")
    for heading in ("scenario", "engines", "system", "requests/s", "kept", "simulator", "TTFT p50", "TPOT p50"):
        shown.add_column(heading, justify="left" if heading in ("scenario", "system") else "right")
    for row in windows:
        kept, foreseen = row["attainment"], row["predicted"]["attainment"]
        times = (row["ttft_s"]["p50"], row["tpot_s"]["p50"])
        shown.add_row(
            row["scenario"],
            str(row["engines"]),
            row["system"],
            f"{row['rate_per_s']:.2f}",
            "-" if kept is None else f"{kept:.1%}",
            f"{foreseen:.1%}",
            *("-" if seconds is None else f"{seconds * 1e3:.0f} ms" for seconds in times),
        )
    return shown


def _over_capacity(row: Row, loads: Iterable[Row]) -> float | None:
    """None where nothing was kept at capacity: there is nothing to compare with."""
    same = ("scenario", "engines", "system")
    (base,) = (one for one in loads if one["load"] == 1.0 and all(one[key] == row[key] for key in same))
    return float(row["kept_per_s"] / base["kept_per_s"]) if base["kept_per_s"] else None


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _geomean(values: Iterable[float]) -> float | None:
    found = list(values)
    return math.exp(sum(map(math.log, found)) / len(found)) if found and min(found) > 0 else None
