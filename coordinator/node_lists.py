"""Keeps directories of what nodes hold true: a node is asked for its list whenever that may be another one."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from typing import Any, Generic, TypeVar

from coordinator.mirror import NodeMirror
from coordinator.prefixes import PrefixDirectory
from coordinator.sessions import UNLISTED_GRACE_S, SessionDirectory
from engine.errors import SlosserveError
from engine.messages import ListPrefixes, ListSessions, Message, PrefixesListed, Report, SessionsListed

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


class Holdings:
    """Of each node, whose histories it keeps and which prefixes its cache holds, in the directories of both.

    `call` sends a node what is made of a call's number, and gives its answer. It raises SlosserveError without.
    """

    def __init__(
        self,
        sessions: SessionDirectory,
        prefixes: PrefixDirectory,
        call: Callable[[str, Callable[[int], Message]], Awaitable[Any]],
    ) -> None:
        self._session_directory, self._prefix_directory, self._call = sessions, prefixes, call
        self._sessions = NodeLists(
            "sessions", lambda report: report.sessions_version, self._list_sessions, self._take_sessions
        )
        self._prefixes = NodeLists(
            "prefixes", lambda report: report.prefixes_version, self._list_prefixes, self._take_prefixes
        )

    def heard(self, node: str, report: Report) -> None:
        """A node has told of itself."""
        self._sessions.heard(node, report)
        self._prefixes.heard(node, report)

    def answered(self, node: str, now_s: float) -> None:
        """A call of a session has ended there: whether the node keeps it, its list tells in a while."""
        self._sessions.again(node, now_s)

    def forget(self, node: str) -> None:
        """A node is gone for good."""
        self._sessions.forget(node)
        self._prefixes.forget(node)

    def due(self, mirrors: Mapping[str, NodeMirror], now_s: float) -> Iterator[Coroutine[Any, Any, None]]:
        """What is to be fetched now, to be run."""
        for lists in (self._sessions, self._prefixes):
            for name in lists.due(mirrors, now_s):
                report = mirrors[name].report
                if report is not None:
                    yield lists.fetch(name, report.boot_id)

    async def _list_sessions(self, node: str, _: int) -> SessionsListed:
        listed: SessionsListed = await self._call(node, ListSessions)
        return listed

    def _take_sessions(self, node: str, listed: SessionsListed, now_s: float) -> tuple[int, bool]:
        return listed.version, self._session_directory.listed(node, listed.tokens, now_s)

    async def _list_prefixes(self, node: str, known: int) -> PrefixesListed:
        listed: PrefixesListed = await self._call(node, lambda call_id: ListPrefixes(call_id, known))
        return listed

    def _take_prefixes(self, node: str, listed: PrefixesListed, now_s: float) -> tuple[int, bool]:
        self._prefix_directory.told(node, listed.changes, now_s)
        return listed.changes.version, True
