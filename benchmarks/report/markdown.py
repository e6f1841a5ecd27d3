"""Figures and tables as markdown. What is missing is a dash, never NaN."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

NOTHING = "-"
# A home folder says nothing about a result: of an absolute path its last part is shown.
ABSOLUTE_PATH = re.compile(r"(?<![\w.~/-])/(?:[^\s/]+/)+(?=[^\s/]+)")


def is_number(value: Any) -> bool:
    """Whether it is a figure that can be shown."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any, unit: str = "") -> str:
    """Three figures that count, never in powers of ten."""
    if not is_number(value):
        return NOTHING
    if isinstance(value, int):
        return f"{value:,}{unit}"
    digits = 2 if value == 0 else min(max(2 - math.floor(math.log10(abs(value))), 0), 6)
    return f"{value:,.{digits}f}{unit}"


def ratio(value: Any, unit: str = "") -> str:
    """Two places after the point: what is near 1."""
    return f"{value:.2f}{unit}" if is_number(value) else NOTHING


def percent(value: Any, digits: int = 1) -> str:
    """A share."""
    return f"{value:.{digits}%}" if is_number(value) else NOTHING


def mean(values: Any) -> float | None:
    """Of those that are figures; None if none is."""
    listed = [value for value in values or [] if is_number(value)]
    return sum(listed) / len(listed) if listed else None


def spread(values: Any, show: Any = number) -> str:
    """`mean (least to most)`; one value alone as it is."""
    listed = [value for value in values or [] if is_number(value)]
    if not listed:
        return NOTHING
    least, most = show(min(listed)), show(max(listed))
    middle = str(show(sum(listed) / len(listed)))
    return middle if least == most else f"{middle} ({least} to {most})"


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], others: str = "---:") -> str:
    """The first column to the left, the others to the right, or as given."""
    lines = [headings, ["---", *[others] * (len(headings) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def origin(file: Mapping[str, Any]) -> Mapping[str, Any]:
    """The provenance of a result, wherever its file keeps it."""
    found = file.get("provenance")
    return found if isinstance(found, Mapping) else file


def command_of(file: Mapping[str, Any]) -> str:
    """As it was typed, without folders of the machine."""
    return ABSOLUTE_PATH.sub("", str(origin(file).get("command", "unknown command")))


def source(file: Mapping[str, Any], hardware: str = "", seeds: Sequence[Any] = ()) -> str:
    """The line below a table: command, commit, hardware, seeds."""
    facts = origin(file)
    parts = [f"`{command_of(file)}`", f"commit {facts.get('commit') or 'unknown'}"]
    parts += [hardware] if hardware else []
    listed = ", ".join(str(seed) for seed in seeds) or str(facts.get("seed", ""))
    parts += [f"seed{'s' if len(seeds) > 1 else ''} {listed}"] if listed else []
    return "<sub>" + "; ".join(parts) + "</sub>"


def machine(file: Mapping[str, Any]) -> str:
    """On what a command ran."""
    facts = origin(file).get("hardware")
    if not isinstance(facts, Mapping):
        return NOTHING
    return f"{facts.get('cores', '?')} cores of {facts.get('cpu', 'an unknown CPU')}"


def image(file: str, caption: str) -> str:
    """A picture with its caption as the text for who cannot see it."""
    return f"![{caption}]({file})"
