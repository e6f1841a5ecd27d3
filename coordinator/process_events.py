"""What a process of the cluster says while it starts: lines of JSON in a file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(slots=True)
class ProcessEvents:
    """Events of one process. `ready` holds the event that said so, empty until then."""

    label: str
    path: Path
    ready: dict[str, Any] = field(default_factory=dict)
    _read_bytes: int = 0

    def take(self) -> list[dict[str, Any]]:
        """Events since the last call. Lines that are no JSON object (a library's greeting) are left out."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self._read_bytes)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._read_bytes += len(whole) + len(newline)
        events = [event for event in map(_event, whole.splitlines()) if event is not None]
        for event in events:
            if event["event"] == "ready":
                self.ready = event
        return events


def tail(path: Path, lines: int) -> str:
    """The last lines of a log, or a word that there are none."""
    text = path.read_text(errors="replace") if path.exists() else ""
    return "\n".join(text.splitlines()[-lines:]) or "(the log is empty)"


def _event(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) and "event" in value else None
