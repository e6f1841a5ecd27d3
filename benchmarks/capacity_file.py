"""The file of capacities: a run adds what it measured, and what it did not measure stays, with its commit."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.earlier import earlier

Row = dict[str, Any]
TABLES = ("rows", "bounds", "fixed_rates")
# What makes two rows figures of the same thing.
CELL = ("hardware", "scenario", "system", "mode", "column", "acceptance")
BOUND = ("hardware", "scenario", "acceptance")


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


def _joined(before: Sequence[Row], now: Sequence[Row], key: Callable[[Row], Hashable]) -> list[Row]:
    fresh = {key(row) for row in now}
    return [row for row in before if key(row) not in fresh] + list(now)


def _key(fields: Sequence[str]) -> Callable[[Row], Hashable]:
    return lambda row: tuple(row[field] for field in fields)
