"""Brings lost nodes back: at once the first times, then less often for one that is lost again and again.

Ray starts a node's process anew however often it dies; what is dear is the engine, which is started from here.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine

logger = logging.getLogger(__name__)

WINDOW_S = 600.0
AT_ONCE = 3  # tries in a window; each further one waits twice as long as the one before
MOST_WAIT_S = 60.0
PAUSE_S = 1.0


def wait_s(tries: int) -> float:
    """Before the next try, after so many in the last window."""
    return 0.0 if tries < AT_ONCE else min(2.0 ** (tries - AT_ONCE + 1), MOST_WAIT_S)


class Revival:
    """`revive` brings a node back and gives its address, None while it cannot; `back` takes both."""

    def __init__(
        self, revive: Callable[[str], Coroutine[None, None, str | None]], back: Callable[[str, str], None]
    ) -> None:
        self._revive = revive
        self._back = back
        self._tries: dict[str, deque[float]] = {}
        self._going: dict[str, asyncio.Task[None]] = {}

    def lost(self, name: str) -> None:
        """Called as long as a node is lost: at most one try goes on at a time."""
        if name not in self._going:
            self._going[name] = asyncio.get_running_loop().create_task(self._try(name))

    def forget(self, name: str) -> None:
        """A node is not wanted any more."""
        self._tries.pop(name, None)

    async def _try(self, name: str) -> None:
        try:
            tries = self._tries.setdefault(name, deque(maxlen=64))
            while tries and time.monotonic() - tries[0] > WINDOW_S:
                tries.popleft()
            pause_s = wait_s(len(tries))
            if pause_s:
                logger.warning("%s was lost %d times in ten minutes: waiting %g s", name, len(tries), pause_s)
                await asyncio.sleep(pause_s)
            tries.append(time.monotonic())
            address = await self._revive(name)
            if address is not None:
                self._back(name, address)
        except Exception:
            logger.exception("bringing %s back", name)
        finally:
            await asyncio.sleep(PAUSE_S)
            del self._going[name]
