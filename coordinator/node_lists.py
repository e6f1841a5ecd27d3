"""Keeps the directory of sessions true: a node is asked for its list whenever that may be another one."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping

from coordinator.mirror import NodeMirror
from coordinator.sessions import UNLISTED_GRACE_S, SessionDirectory
from engine.errors import SlosserveError
from engine.messages import SessionsListed

logger = logging.getLogger(__name__)

LIST_EVERY_S = 0.5  # of one node, at most


class SessionLists:
    """Which list of each node is known, and when another is due. `ask` sends ListSessions and waits."""

    def __init__(self, directory: SessionDirectory, ask: Callable[[str], Awaitable[SessionsListed]]) -> None:
        self._directory = directory
        self._ask = ask
        self._known: dict[str, tuple[str, int]] = {}  # by node: its boot id, and the version of the list
        self._again_s: dict[str, float] = {}
        self._not_before_s: dict[str, float] = {}
        self._asking: set[str] = set()

    def answered(self, node: str, now_s: float) -> None:
        """A call of a session has ended there: whether the node keeps it, its list tells in a while."""
        self._again_s.setdefault(node, now_s + UNLISTED_GRACE_S)

    def forget(self, node: str) -> None:
        """A node is gone for good."""
        for known in (self._known, self._again_s, self._not_before_s):
            known.pop(node, None)

    def due(self, mirrors: Mapping[str, NodeMirror], now_s: float) -> Iterator[str]:
        """Nodes whose list is to be fetched now."""
        for name, mirror in mirrors.items():
            report = mirror.report
            if report is None or not mirror.serving or name in self._asking:
                continue
            # A node begins with none.
            another = self._known.get(name, (report.boot_id, 0)) != (report.boot_id, report.sessions_version)
            again = now_s >= self._again_s.get(name, math.inf)
            if (another or again) and now_s >= self._not_before_s.get(name, 0.0):
                yield name

    async def fetch(self, name: str, boot_id: str) -> None:
        """Ask a node for its list, and note it."""
        self._asking.add(name)
        self._again_s.pop(name, None)
        try:
            listed = await self._ask(name)
        except SlosserveError as error:
            logger.warning("sessions of %s: %s", name, error)
        else:
            self._known[name] = boot_id, listed.version
            if not self._directory.listed(name, listed.tokens, time.monotonic()):
                self.answered(name, time.monotonic())
        finally:
            self._asking.discard(name)
            self._not_before_s[name] = time.monotonic() + LIST_EVERY_S
