"""A node's socket: a thread that owns it, so that a long step never makes the node look dead."""

from __future__ import annotations

import collections
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import zmq

from engine.errors import ProtocolError
from engine.messages import Alive, Message, Report, Watch, decode, encode

WATCHES_S = 1.0  # a peer that has not asked for so long is told nothing unasked


@dataclass(frozen=True, slots=True)
class Heard:
    """A message, from whom, and when it came, on the node's clock: what it asks for counts from then, however
    long the step takes that runs meanwhile."""

    peer: bytes
    message: Message
    at_s: float


class Line(Protocol):
    """How a node hears its peers and answers. Called from the step thread.

    The node leaves here what others may ask for while it is in a step: its last report and when it was made,
    and when the present step began (None: none runs); both as `time.monotonic` says.
    """

    report: Report | None
    reported_s: float
    step_began_s: float | None

    def start(self) -> None:
        """Begin to serve."""

    def tell(self) -> None:
        """Send the report to those who watch, without being asked."""

    def send(self, peer: bytes, message: Message) -> None:
        """Queue a message for a peer."""

    def drain(self, wait_s: float = 0.0) -> list[Heard]:
        """What has come since the last call, waiting up to `wait_s` for the first."""

    def heard(self) -> list[tuple[bytes, float]]:
        """Every peer that has said anything, and when it last did, on the node's clock."""

    def forget(self, peer: bytes, heard_s: float) -> None:
        """Forget a peer that was last heard at `heard_s`, unless it has spoken since."""

    def stop(self) -> None:
        """Send what is queued, then close."""


class NodeSocket:
    """A ROUTER socket served by its own thread.

    The step thread takes what peers sent from `drain` and answers with `send`. `Watch` is answered here, at
    once, from the last report that the step thread published: what a peer reads there is how long the present
    step has been running, so a node that hangs in a step is told from one that is idle.
    """

    def __init__(self, host: str, name: str, clock: Callable[[], float]) -> None:
        self._name = name
        self._clock = clock
        self._context = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.setsockopt(zmq.LINGER, 200)
        self._router.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._router.setsockopt(zmq.SNDHWM, 0)
        port = self._router.bind_to_random_port(f"tcp://{host}")
        self.address = f"tcp://{host}:{port}"
        self._inbox: collections.deque[Heard] = collections.deque()
        self._outbox: collections.deque[tuple[bytes, list[bytes]]] = collections.deque()
        self._arrived = threading.Event()
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        self._stopping = False
        self.report: Report | None = None
        self.reported_s = 0.0
        self.step_began_s: float | None = None
        self._heard_s: dict[bytes, float] = {}
        self._watchers: dict[bytes, float] = {}
        self._news = False
        self.rejected_messages = 0
        self._thread = threading.Thread(target=self._serve, name=f"{name}-socket", daemon=True)

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def tell(self) -> None:
        """Send the report to those who watch, without being asked. Called from the step thread."""
        self._news = True
        os.write(self._wake_write, b"x")

    def send(self, peer: bytes, message: Message) -> None:
        """Queue a message for a peer. Called from the step thread."""
        self._outbox.append((peer, encode(message)))
        os.write(self._wake_write, b"x")

    def drain(self, wait_s: float = 0.0) -> list[Heard]:
        """What has come since the last call, waiting up to `wait_s` for the first."""
        if wait_s > 0 and not self._inbox:
            self._arrived.wait(wait_s)
        self._arrived.clear()
        taken = []
        while self._inbox:
            taken.append(self._inbox.popleft())
        return taken

    def heard(self) -> list[tuple[bytes, float]]:
        """Every peer that has said anything, and when it last did, on the node's clock."""
        return list(self._heard_s.items())

    def forget(self, peer: bytes, heard_s: float) -> None:
        """Forget a peer that was last heard at `heard_s`, unless it has spoken since."""
        if self._heard_s.get(peer) == heard_s:
            del self._heard_s[peer]

    def stop(self) -> None:
        """Send what is queued, then close. Nothing may be sent afterwards."""
        if self._thread.ident is None:
            self._close()  # it was never started
        else:
            self._stopping = True
            os.write(self._wake_write, b"x")
            self._thread.join(timeout=2)
        if not self._thread.is_alive():
            os.close(self._wake_read)
            os.close(self._wake_write)

    def _stuck_s(self) -> float:
        began_s = self.step_began_s
        return 0.0 if began_s is None else max(time.monotonic() - began_s, 0.0)

    def _serve(self) -> None:
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._wake_read, zmq.POLLIN)
        while True:
            poller.poll(200)
            self._send_queued()
            if self._stopping:
                break
            self._receive()
        self._close()

    def _close(self) -> None:
        self._router.close()
        self._context.term()

    def _send_queued(self) -> None:
        try:
            while len(os.read(self._wake_read, 4096)) == 4096:
                pass
        except BlockingIOError:
            pass
        while self._outbox:
            peer, frames = self._outbox.popleft()
            self._router.send_multipart([peer, *frames])
        if self._news:
            self._news = False
            self._tell_watchers()

    def _tell_watchers(self) -> None:
        now_s = time.monotonic()
        for peer, watched_s in list(self._watchers.items()):
            if now_s - watched_s > WATCHES_S:
                del self._watchers[peer]
            else:
                self._send_report(peer)

    def _receive(self) -> None:
        arrived = False
        while True:
            try:
                peer, *frames = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            try:
                message = decode(frames)
            except ProtocolError:
                self.rejected_messages += 1
                continue
            heard = Heard(peer, message, self._clock())
            self._heard_s[peer] = heard.at_s
            if isinstance(message, Watch):
                self._answer_watch(peer, message)
            else:
                self._inbox.append(heard)
                arrived = True
        if arrived:
            self._arrived.set()

    def _answer_watch(self, peer: bytes, watch: Watch) -> None:
        if not watch.reports:
            self._router.send_multipart([peer, *encode(Alive(self._name, self._stuck_s()))])
        else:
            self._watchers[peer] = time.monotonic()
            self._send_report(peer)

    def _send_report(self, peer: bytes) -> None:
        if self.report is not None:
            age_s = time.monotonic() - self.reported_s
            report = replace(self.report, stuck_s=self._stuck_s(), age_s=age_s)
            self._router.send_multipart([peer, *encode(report)])
