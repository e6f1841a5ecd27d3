"""A list of what a node holds is fetched when it is another one, and again when it may have come too early."""

from __future__ import annotations

from dataclasses import replace

from coordinator.node_lists import LIST_EVERY_S, NodeLists
from coordinator.sessions import UNLISTED_GRACE_S, SessionDirectory
from engine.errors import SlosserveError
from engine.messages import SessionsListed
from engine.request import RoleName
from tests.coordinator.test_placement import _node


class Lists(NodeLists[SessionsListed]):
    """Of a node that answers what a test says, or does not answer."""

    def __init__(self) -> None:
        self.directory = SessionDirectory()
        self.tokens: dict[str, int] | None = {}
        self.asked: list[tuple[str, int]] = []
        super().__init__("sessions", lambda report: report.sessions_version, self._answer, self._note)

    async def _answer(self, name: str, known: int) -> SessionsListed:
        self.asked.append((name, known))
        if self.tokens is None:
            raise SlosserveError("no answer")
        return SessionsListed(1, 3, self.tokens)

    def _note(self, name: str, listed: SessionsListed, now_s: float) -> tuple[int, bool]:
        return listed.version, self.directory.listed(name, listed.tokens, now_s)

    def due_with(self, version: int, now_s: float, boot_id: str = "b") -> list[str]:
        """Which nodes are to be asked when the one node tells that its list has this version."""
        mirror = _node("d", RoleName.DECODE)
        assert mirror.report is not None
        report = replace(mirror.report, boot_id=boot_id, sessions_version=version)
        mirror.take_report(report, 0.0)
        self.heard("d", report)
        return self.due({"d": mirror}, now_s)


async def test_a_node_is_asked_when_its_list_is_another_one_and_not_too_often() -> None:
    lists = Lists()
    assert lists.due_with(0, 1e6) == [], "it begins with none"
    assert lists.due_with(3, 1e6) == ["d"]
    lists.tokens = {"s": 64}
    await lists.fetch("d", "b")
    assert lists.directory.home("s") == "d"
    assert lists.due_with(3, 1e6) == []
    assert lists.due_with(4, 1e6) == ["d"]
    assert lists.due_with(3, 1e6, boot_id="anew") == ["d"]
    await lists.fetch("d", "b")
    await lists.fetch("d", "anew")
    assert lists.asked == [("d", 0), ("d", 3), ("d", 0)], "one that began anew has none of what it had"
    assert lists.due_with(4, 0.0) == [], f"it was asked less than {LIST_EVERY_S} s ago"


async def test_whether_an_answered_call_is_kept_is_asked_though_the_list_stays_the_same() -> None:
    lists = Lists()
    lists.directory.answered("s", "d", [1, 2], 256, now_s=-9.0)
    lists.again("d", now_s=1e6)
    assert lists.due_with(0, 1e6) == []
    assert lists.due_with(0, 1e6 + UNLISTED_GRACE_S) == ["d"]
    await lists.fetch("d", "b")
    assert lists.directory.home("s") is None, "the node keeps nothing of it"


async def test_a_node_that_does_not_answer_is_asked_again() -> None:
    lists = Lists()
    lists.tokens = None
    await lists.fetch("d", "b")
    assert lists.due_with(3, 1e6) == ["d"]
