"""A node's list of sessions is fetched when it is another one, and again when it may have come too early."""

from __future__ import annotations

from dataclasses import replace

from coordinator.mirror import NodeMirror
from coordinator.session_lists import LIST_EVERY_S, SessionLists
from coordinator.sessions import UNLISTED_GRACE_S, SessionDirectory
from engine.errors import SlosserveError
from engine.messages import SessionsListed
from engine.request import RoleName
from tests.coordinator.test_placement import _node


class Lists(SessionLists):
    """Of a node that answers what a test says, or does not answer."""

    def __init__(self) -> None:
        self.directory = SessionDirectory()
        self.tokens: dict[str, int] | None = {}
        self.asked: list[str] = []
        super().__init__(self.directory, self._answer)

    async def _answer(self, name: str) -> SessionsListed:
        self.asked.append(name)
        if self.tokens is None:
            raise SlosserveError("no answer")
        return SessionsListed(1, 3, self.tokens)


def _mirror(version: int, boot_id: str = "b") -> dict[str, NodeMirror]:
    mirror = _node("d", RoleName.DECODE)
    assert mirror.report is not None
    mirror.take_report(replace(mirror.report, boot_id=boot_id, sessions_version=version), 0.0)
    return {"d": mirror}


async def test_a_node_is_asked_when_its_list_is_another_one_and_not_too_often() -> None:
    lists = Lists()
    assert list(lists.due(_mirror(0), 1e6)) == [], "it begins with none"
    assert list(lists.due(_mirror(3), 1e6)) == ["d"]
    lists.tokens = {"s": 64}
    await lists.fetch("d", "b")
    assert lists.directory.home("s") == "d"
    assert list(lists.due(_mirror(3), 1e6)) == []
    assert list(lists.due(_mirror(4), 1e6)) == ["d"]
    assert list(lists.due(_mirror(3, boot_id="anew"), 1e6)) == ["d"]
    assert list(lists.due(_mirror(4), 0.0)) == [], f"it was asked less than {LIST_EVERY_S} s ago"


async def test_whether_an_answered_call_is_kept_is_asked_though_the_list_stays_the_same() -> None:
    lists = Lists()
    lists.directory.answered("s", "d", [1, 2], 256, now_s=-9.0)
    lists.answered("d", now_s=1e6)
    assert list(lists.due(_mirror(0), 1e6)) == []
    assert list(lists.due(_mirror(0), 1e6 + UNLISTED_GRACE_S)) == ["d"]
    await lists.fetch("d", "b")
    assert lists.directory.home("s") is None, "the node keeps nothing of it"


async def test_a_node_that_does_not_answer_is_asked_again() -> None:
    lists = Lists()
    lists.tokens = None
    await lists.fetch("d", "b")
    assert list(lists.due(_mirror(3), 1e6)) == ["d"]
