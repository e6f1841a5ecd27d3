"""What a start waits for, as a live table: one row for each process and node."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

STYLES = {"ready": "green", "failed": "red"}


@dataclass(slots=True)
class Row:
    """One process or node. `ended_s` is set when it is ready or has failed."""

    state: str
    detail: str
    began_s: float
    ended_s: float | None = None


@dataclass(slots=True)
class StartupView:
    """Takes the events of a ClusterProcess; draws itself."""

    title: str
    clock: Callable[[], float] = time.monotonic
    rows: dict[str, Row] = field(default_factory=dict)

    def take(self, event: dict[str, Any]) -> None:
        """Note an event."""
        now_s = self.clock()
        name = str(event.get("name") or event["process"])
        state = str(event.get("state") or event["event"])
        row = self.rows.setdefault(name, Row(state, "", now_s))
        row.state = state
        row.detail = str(event.get("detail") or event.get("url") or event.get("error") or row.detail)
        row.ended_s = now_s if state in STYLES else None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The table as it stands."""
        table = Table(title=f"starting {self.title}", title_justify="left", box=None, padding=(0, 2, 0, 0))
        for column in ("", "", "s", ""):
            table.add_column(column, justify="right" if column == "s" else "left", no_wrap=True)
        for name, row in self.rows.items():
            seconds = (self.clock() if row.ended_s is None else row.ended_s) - row.began_s
            table.add_row(name, self._state_of(row), f"{seconds:.0f}", Text(row.detail, overflow="ellipsis"))
        yield table

    def _state_of(self, row: Row) -> Text | Spinner:
        if row.state in STYLES:
            return Text(row.state, style=STYLES[row.state])
        return Spinner("dots", text=row.state)
