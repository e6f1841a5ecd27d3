"""Start-up of a cluster on the terminal: what is ready, and what is waited for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console


@contextmanager
def show_progress(console: Console, title: str) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A callback for ClusterProcess.start that keeps one line up to date and prints what became ready."""
    start_s = time.monotonic()
    waiting: dict[str, str] = {}
    with console.status(title) as status:

        def take(event: dict[str, Any]) -> None:
            part, state = _part(event), _state(event)
            if state == "ready":
                waiting.pop(part, None)
                console.print(f"  {part} ready after {time.monotonic() - start_s:.1f} s", highlight=False)
            else:
                waiting[part] = state
            status.update(f"{title}: waiting for {', '.join(f'{k} ({v})' for k, v in waiting.items())}")

        yield take


def step(event: dict[str, Any]) -> str:
    """One event as text."""
    return f"{_part(event)} {_state(event)}"


def _part(event: dict[str, Any]) -> str:
    return str(event.get("name") or event.get("process") or "cluster")


def _state(event: dict[str, Any]) -> str:
    return str(event.get("state") or event.get("event") or "")
