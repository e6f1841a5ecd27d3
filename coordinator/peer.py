"""A link from a coordinator or an endpoint to one node: its socket, its liveness."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from engine.errors import ProtocolError
from engine.messages import Message, Watch, decode, encode

logger = logging.getLogger(__name__)

WATCH_EVERY_S = 0.1
REPORT_EVERY = 2  # questions; the others ask only whether it lives
CONNECT_MS = 1000  # then once more: TCP itself would wait ever longer, and a link is mended meanwhile
NOTICED = 0.8  # of the silence after which a node is lost: the rest is for those who look at it now and then


class Peer:
    """A DEALER socket to a node. `on_message` is called in the event loop for everything it says.

    The node is `lost` as soon as its process has closed the connection, or when it has left the questions of
    `silent_s` unanswered, one every 0.1 s, so that who looks at it ten times a second knows by then. Questions
    are counted and not seconds: an observer that was starved itself has asked nothing, and must not think that
    everybody else is dead.
    """

    def __init__(
        self,
        context: zmq.asyncio.Context,
        address: str,
        identity: str,
        on_message: Callable[[Message], None],
        *,
        reports: bool,
        silent_s: float = 1.0,
    ) -> None:
        self.address = address
        self.on_message = on_message
        self._unanswered = 0
        self._most_unanswered = max(int(NOTICED * silent_s / WATCH_EVERY_S), 2)
        self._disconnected = False
        self._wants_reports = reports
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, identity.encode())
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.CONNECT_TIMEOUT, CONNECT_MS)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._socket.connect(address)
        self._tasks = [
            asyncio.create_task(task)
            for task in (self._receive(), self._keep_watching(), self._notice_closing())
        ]

    def send(self, message: Message) -> None:
        """Queue a message; never blocks."""
        self._send(encode(message))

    def _send(self, frames: list[bytes]) -> None:
        self._socket.send_multipart(frames)

    @property
    def lost(self) -> bool:
        """Whether the node is gone, or silent for too long."""
        return self._disconnected or self._unanswered >= self._most_unanswered

    def close(self) -> None:
        """Let go of the node."""
        for task in self._tasks:
            task.cancel()
        self._socket.disable_monitor()
        self._socket.close(linger=0)

    async def _receive(self) -> None:
        while True:
            self._answered(await self._socket.recv_multipart())

    def _answered(self, frames: list[bytes]) -> None:
        self._unanswered = 0
        try:
            self._take(frames)
        except ProtocolError:
            logger.exception("from %s", self.address)

    def _take(self, frames: list[bytes]) -> None:
        self._hand(decode(frames), self.on_message)

    def _hand(self, message: Message, on_message: Callable[[Message], None]) -> None:
        try:
            on_message(message)
        except Exception:
            logger.exception("handling %s from %s", type(message).__name__, self.address)

    async def _keep_watching(self) -> None:
        for turn in itertools.count():
            self.send(Watch(reports=self._wants_reports and turn % REPORT_EVERY == 0))
            self._unanswered += 1
            await asyncio.sleep(WATCH_EVERY_S)

    async def _notice_closing(self) -> None:
        while True:
            event = parse_monitor_message(await self._monitor.recv_multipart())
            if event["event"] == zmq.EVENT_DISCONNECTED:
                # For good: what was on its way is lost, so whoever wants to go on links anew and asks again.
                self._disconnected = True
