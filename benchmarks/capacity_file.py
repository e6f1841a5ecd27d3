"""The file of capacities: a run adds what it measured, and what it did not measure stays, with its commit."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.earlier import earlier
from benchmarks.simulator.systems import Tuning

Row = dict[str, Any]
AnyRow = TypeVar("AnyRow", bound=Mapping[str, Any])
TABLES = ("rows", "bounds", "fixed_rates")
# What makes two rows figures of the same thing.
CELL = ("hardware", "scenario", "system", "mode", "column", "acceptance")
BOUND = ("hardware", "scenario", "acceptance")


@dataclass(frozen=True, slots=True)
class Begin:
    """Where the searches of a cell begin: at what an earlier run of it has found.

    `tuning`, and what it held on the tuning seed if that is known; for every share the rates of its seeds.
    """

    tuning: Tuning
    tuned_at: float | None
    at: dict[float, list[float]]


def on_as_many_gpus(rows: Iterable[AnyRow]) -> list[AnyRow]:
    """Rows of a system, without those on more GPUs than its others in that scenario: where requests come in
    bursts more replicas hold more each, so a rate per GPU says nothing of the system then."""
    listed = list(rows)
    least: dict[tuple[Any, Any], int] = {}
    for row in listed:
        key = row["hardware"], row["scenario"]
        least[key] = min(least.get(key, row["gpus"]), row["gpus"])
    return [row for row in listed if row["gpus"] == least[row["hardware"], row["scenario"]]]


def begins(rows: Iterable[Row]) -> dict[tuple[Hashable, ...], Begin]:
    """By cell, as `CELL` names it. Figures of other code are as good a place to begin as any."""
    found: dict[tuple[Hashable, ...], Begin] = {}
    for row in rows:
        asked: list[float] = row.get("asked_per_seed") or row["per_seed"]
        begin = found.setdefault(cell_of(row), Begin(Tuning(**row["settings"]), row.get("tuned_at"), {}))
        begin.at[row["share"]] = [rate for rate in asked if rate > 0]
    return found


def of_other_runs(path: Path, settings: Row) -> dict[str, list[Row]]:
    """The tables of `path`, every row with the commit that made it; empty ones if there is no such file.

    Raises ConfigError for a file that is another, or has other settings.
    """
    found = earlier(path, "settings", settings, TABLES, "no file of capacities")
    if found is None:
        return {name: [] for name in TABLES}
    commit = found.get("provenance", {}).get("commit")
    return {name: [{"commit": commit, **row} for row in found[name]] for name in TABLES}


def joined(before: dict[str, list[Row]], now: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """What was measured now in place of what was before; the rest of that stays."""
    return {
        name: _joined(before.get(name, []), now[name], _key(BOUND if name == "bounds" else CELL))
        for name in TABLES
    }


def cell_of(row: Row) -> tuple[Hashable, ...]:
    """What a row is the figure of, but for the share."""
    return _key(CELL)(row)


def _joined(before: Sequence[Row], now: Sequence[Row], key: Callable[[Row], Hashable]) -> list[Row]:
    fresh = {key(row) for row in now}
    return [row for row in before if key(row) not in fresh] + list(now)


def _key(fields: Sequence[str]) -> Callable[[Row], tuple[Hashable, ...]]:
    return lambda row: tuple(row[field] for field in fields)
