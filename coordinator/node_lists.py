"""Keeps a directory of what nodes hold true: a node is asked for its list whenever that may be another one."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Generic, TypeVar

from coordinator.mirror import NodeMirror
from coordinator.sessions import UNLISTED_GRACE_S
from engine.errors import SlosserveError
from engine.messages import Report

logger = logging.getLogger(__name__)

LIST_EVERY_S = 0.5  # of one node, at most
LISTS_A_SECOND = 200  # of all nodes together

Listed = TypeVar("Listed")


class NodeLists(Generic[Listed]):
    """Which list of each node is known, and when another is due.

    `version` reads off a report which list its node has. `ask` gets it, told the node and the version that is
    known (0: none); it raises SlosserveError if the node does not answer. `take` notes it, told when that is,
    and returns its version, and whether it is complete: one that may be from too early is asked for again.
    """

    def __init__(
        self,
        what: str,
        version: Callable[[Report], int],
        ask: Callable[[str, int], Awaitable[Listed]],
        take: Callable[[str, Listed, float], tuple[int, bool]],
    ) -> None:
        self._what, self._version, self._ask, self._take = what, version, ask, take
        self._known: dict[str, tuple[str, int]] = {}  # by node: its boot id, and the version of the list
        self._again_s: dict[str, float] = {}
        self._not_before_s: dict[str, float] = {}
        self._another: set[str] = set()  # nodes that may have another list than is known
        self._asking: set[str] = set()
        self._every_s = LIST_EVERY_S

    def heard(self, node: str, report: Report) -> None:
        """A node has told of itself."""
        if self._version_of(node, report.boot_id) != self._version(report):
            self._another.add(node)

    def again(self, node: str, now_s: float) -> None:
        """What has just happened there may not be in its list yet: it is asked for once more in a while."""
        self._again_s.setdefault(node, now_s + UNLISTED_GRACE_S)

    def forget(self, node: str) -> None:
        """A node is gone for good."""
        self._another.discard(node)
        for known in (self._known, self._again_s, self._not_before_s):
            known.pop(node, None)

    def due(self, mirrors: Mapping[str, NodeMirror], now_s: float) -> list[str]:
        """Nodes whose list is to be fetched now."""
        self._every_s = max(LIST_EVERY_S, len(mirrors) / LISTS_A_SECOND)
        again = {name for name, at_s in self._again_s.items() if now_s >= at_s}
        return [
            name
            for name in (self._another | again) - self._asking
            if name in mirrors and mirrors[name].serving and now_s >= self._not_before_s.get(name, 0.0)
        ]

    async def fetch(self, name: str, boot_id: str) -> None:
        """Ask a node for its list, and note it."""
        self._asking.add(name)
        self._another.discard(name)
        self._again_s.pop(name, None)
        try:
            listed = await self._ask(name, self._version_of(name, boot_id))
        except SlosserveError as error:
            logger.warning("%s of %s: %s", self._what, name, error)
            self._another.add(name)
        else:
            now_s = time.monotonic()
            version, complete = self._take(name, listed, now_s)
            self._known[name] = boot_id, version
            if not complete:
                self.again(name, now_s)
        finally:
            self._asking.discard(name)
            self._not_before_s[name] = time.monotonic() + self._every_s

    def _version_of(self, name: str, boot_id: str) -> int:
        """Of the list that is known. A node begins with none, of version 0."""
        known_boot_id, version = self._known.get(name, (boot_id, 0))
        return version if known_boot_id == boot_id else 0
