"""Links that a coordinator has asked a node to measure, while the node serves.

A peer is reached for beside the steps, however long it takes to answer; between two steps no more is done than
the reads from one peer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from engine.messages import LinksProbed, ProbeLinks
from kv_transfer.base import KvPort, Link, PeerAddress, TransferError

logger = logging.getLogger(__name__)

REACHED_WITHIN_S = 8.0  # by then a peer that has not answered is told as out of reach


@dataclass(slots=True, eq=False)
class _Question:
    asker: bytes
    call_id: int
    until_s: float
    left: list[PeerAddress]
    links: list[Link] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)


class Probing:
    """Used in the step thread. Times are on `clock`."""

    def __init__(self, port: KvPort, clock: Callable[[], float]) -> None:
        self._port = port
        self._clock = clock
        self._questions: list[_Question] = []

    @property
    def busy(self) -> bool:
        """Whether somebody waits for an answer."""
        return bool(self._questions)

    def begin(self, asker: bytes, message: ProbeLinks) -> None:
        """Measure these links, and keep the answer for who asked."""
        until_s = self._clock() + REACHED_WITHIN_S
        self._questions.append(_Question(asker, message.call_id, until_s, list(message.peers)))

    def go_on(self) -> list[tuple[bytes, LinksProbed]]:
        """Measure the next peer that can be reached, of each question. The answers that are whole now."""
        for question in self._questions:
            self._go_on(question)
        whole = [one for one in self._questions if not one.left]
        self._questions = [one for one in self._questions if one.left]
        return [(one.asker, LinksProbed(one.call_id, one.links, one.errors)) for one in whole]

    def _go_on(self, question: _Question) -> None:
        late = self._clock() > question.until_s
        for peer in list(question.left):
            try:
                if self._port.reaches(peer):
                    question.links.append(self._port.probe(peer))
                elif late:
                    raise TransferError(
                        f"no link to engine {peer.engine_id}: no answer in {REACHED_WITHIN_S:g} s"
                    )
                else:
                    continue
            except TransferError as error:
                question.errors[peer.engine_id] = str(error)
            except Exception as error:
                logger.exception("measuring the link to engine %s", peer.engine_id)
                question.errors[peer.engine_id] = f"it could not be measured: {error}"
            question.left.remove(peer)
            return
