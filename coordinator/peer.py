"""A link from a coordinator or an endpoint to one node: its socket, its liveness."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import zmq
import zmq.asyncio

from engine.errors import ProtocolError
from engine.messages import Message, Watch, decode, encode

logger = logging.getLogger(__name__)

WATCH_EVERY_S = 0.2


class Peer:
    """A DEALER socket to a node. `on_message` is called in the event loop for everything it says.

    The node is `lost` when it has said nothing for `silent_s`; it is asked for a sign of life every 0.2 s.
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
        self._on_message = on_message
        self._silent_s = silent_s
        self._watch = Watch(reports=reports)
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, identity.encode())
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.connect(address)
        self.heard_s = time.monotonic()
        self._tasks = [asyncio.create_task(self._receive()), asyncio.create_task(self._keep_watching())]

    def send(self, message: Message) -> None:
        """Queue a message; never blocks."""
        self._socket.send_multipart(encode(message))

    @property
    def lost(self) -> bool:
        """Whether the node has been silent for too long."""
        return time.monotonic() - self.heard_s > self._silent_s

    def close(self) -> None:
        """Let go of the node."""
        for task in self._tasks:
            task.cancel()
        self._socket.close(linger=0)

    async def _receive(self) -> None:
        while True:
            frames = await self._socket.recv_multipart()
            self.heard_s = time.monotonic()
            try:
                message = decode(frames)
            except ProtocolError:
                logger.exception("from %s", self.address)
                continue
            try:
                self._on_message(message)
            except Exception:
                logger.exception("handling %s from %s", type(message).__name__, self.address)

    async def _keep_watching(self) -> None:
        while True:
            self.send(self._watch)
            await asyncio.sleep(WATCH_EVERY_S)
