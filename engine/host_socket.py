"""One socket for all nodes of a host: a peer links to the host once, and has a channel to each node.

On the wire a channel's name stands before the message: `NODE:N`, where N tells the links of one peer apart, so
that every link begins with no credit. The unnamed channel is the host's own: there a peer says now and then
that it lives (`Watch`) and hears that the host does (`Alive`). Whoever asked for reports gets them there too,
those that have changed, several to a message.
"""

from __future__ import annotations

import collections
import logging
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import islice

import zmq

from engine.errors import ProtocolError
from engine.messages import Alive, Message, Report, Reports, Watch, decode, encode
from engine.socket import Heard

logger = logging.getLogger(__name__)

HOST_CHANNEL = b""
WATCHED_S = 2.0  # reports go to a peer that has asked no longer ago
UNCHANGED_EVERY_S = 5.0  # an idle node is told of again
# A coordinator takes tens of microseconds for a report, and a placement may be waiting meanwhile.
REPORTS_A_MESSAGE = 16
REPORTS_A_SECOND = 1000.0
_SEPARATOR = b"\0"


@dataclass(slots=True)
class _Watcher:
    """A peer that wants reports. `news`: nodes whose report it has not been sent, the oldest news first.

    `may_tell` grows with time: where many nodes are busy, each is told of less often, and as it is by then.
    """

    asked_s: float
    told_s: float
    may_tell: float = REPORTS_A_MESSAGE
    news: dict[str, None] = field(default_factory=dict)


class HostSocket:
    """A ROUTER socket for many nodes, used from the one thread that drives them all."""

    def __init__(self, host: str, name: str) -> None:
        self._name = name
        self._context = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.setsockopt(zmq.LINGER, 200)
        self._router.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._router.setsockopt(zmq.SNDHWM, 0)
        self._router.setsockopt(zmq.RCVHWM, 0)
        port = self._router.bind_to_random_port(f"tcp://{host}")
        self.address = f"tcp://{host}:{port}"
        self.rejected_messages = 0
        self._lines: dict[str, HostedLine] = {}
        self._heard_s: dict[bytes, float] = {}
        self._watchers: dict[bytes, _Watcher] = {}

    def line(self, node: str) -> HostedLine:
        """The line of a node of this name."""
        self._lines[node] = HostedLine(self, node)
        return self._lines[node]

    def receive(self, wait_s: float) -> Iterable[str]:
        """Take what has come, waiting up to `wait_s` for the first. Names of the nodes that it is for."""
        if not self._router.poll(math.ceil(max(wait_s, 0.0) * 1e3)):
            return ()
        asked: dict[str, None] = {}
        while True:
            try:
                identity, *frames = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return asked
            node = self._take(identity, frames)
            if node is not None:
                asked[node] = None

    def _take(self, identity: bytes, frames: list[bytes]) -> str | None:
        """Take a message; the name of the node that has to act."""
        try:
            channel, *rest = frames
            message = decode(rest)
            line = None if channel == HOST_CHANNEL else self._lines[channel.decode().rpartition(":")[0]]
        except (ProtocolError, ValueError, KeyError):
            self.rejected_messages += 1
            return None
        self._heard_s[identity] = time.monotonic()
        if isinstance(message, Watch):
            self._watched(identity, line, message)
            return None
        if line is None:
            self.rejected_messages += 1
            return None
        line.take(identity + _SEPARATOR + channel, message)
        return line.node

    def _watched(self, identity: bytes, line: HostedLine | None, watch: Watch) -> None:
        if line is None:
            self._send(identity, HOST_CHANNEL, Alive(self._name, 0.0))
        if watch.reports:
            now_s = time.monotonic()
            watcher = self._watchers.setdefault(identity, _Watcher(now_s, now_s))
            watcher.asked_s = now_s
            if line is not None:
                watcher.news[line.node] = None

    def heard_s(self, peer: bytes) -> float:
        """When the peer behind a channel last said anything, by `time.monotonic`."""
        return self._heard_s.get(peer.partition(_SEPARATOR)[0], 0.0)

    def send(self, peer: bytes, message: Message) -> None:
        """Say something to a peer, on the channel on which it asked."""
        identity, _, channel = peer.partition(_SEPARATOR)
        self._send(identity, channel, message)

    def _send(self, identity: bytes, channel: bytes, message: Message) -> None:
        self._router.send_multipart([identity, channel, *encode(message)])

    def has_news(self, node: str) -> None:
        """A node has a new report."""
        for watcher in self._watchers.values():
            watcher.news[node] = None

    def tell_news(self) -> bool:
        """Send some of the new reports to whoever watches. Whether there are more."""
        now_s = time.monotonic()
        more = False
        for identity, watcher in list(self._watchers.items()):
            if now_s - watcher.asked_s > WATCHED_S:
                del self._watchers[identity]
                continue
            earned = (now_s - watcher.told_s) * REPORTS_A_SECOND
            watcher.may_tell, watcher.told_s = min(watcher.may_tell + earned, REPORTS_A_MESSAGE), now_s
            told = list(islice(watcher.news, int(watcher.may_tell)))
            watcher.may_tell -= len(told)
            for node in told:
                del watcher.news[node]
            reports = [report for node in told if (report := self._lines[node].aged_report(now_s))]
            if reports:
                self._send(identity, HOST_CHANNEL, Reports(reports))
            more = more or bool(watcher.news)
        return more

    def close(self) -> None:
        """Send what is queued, then close."""
        self._router.close()
        self._context.term()


class HostedLine:
    """The line (engine.socket.Line) of one node of a host."""

    def __init__(self, host: HostSocket, node: str) -> None:
        self.node = node
        self.address = f"{host.address}/{node}"
        self.reported_s = 0.0
        self.step_began_s: float | None = None
        self._host = host
        self._inbox: collections.deque[Heard] = collections.deque()
        self._peers: dict[bytes, None] = {}
        self._report: Report | None = None
        self._told: Report | None = None
        self._told_s = 0.0

    @property
    def report(self) -> Report | None:
        """The node's last account of itself."""
        return self._report

    @report.setter
    def report(self, report: Report | None) -> None:
        self._report = report
        now_s = time.monotonic()
        if report is not None and (now_s - self._told_s > UNCHANGED_EVERY_S or _is_news(report, self._told)):
            self._told, self._told_s = report, now_s
            self._host.has_news(self.node)

    def aged_report(self, now_s: float) -> Report | None:
        """The report, with its age."""
        return None if self._report is None else replace(self._report, age_s=now_s - self.reported_s)

    def take(self, peer: bytes, message: Message) -> None:
        """Something has come for the node."""
        self._peers[peer] = None
        self._inbox.append(Heard(peer, message, self._host.heard_s(peer)))

    def start(self) -> None:
        """The host serves already."""

    def tell(self) -> None:
        """The host tells by itself what has changed."""

    def send(self, peer: bytes, message: Message) -> None:
        """Say something to a peer."""
        self._host.send(peer, message)

    def drain(self, wait_s: float = 0.0) -> list[Heard]:
        """What has come since the last call; never waits."""
        taken = list(self._inbox)
        self._inbox.clear()
        return taken

    def heard(self) -> list[tuple[bytes, float]]:
        """Every peer that has said anything, and when it last did, on any channel of its."""
        return [(peer, self._host.heard_s(peer)) for peer in self._peers]

    def forget(self, peer: bytes, heard_s: float) -> None:
        """Forget a peer that was last heard at `heard_s`, unless it has spoken since."""
        if self._host.heard_s(peer) == heard_s:
            self._peers.pop(peer, None)

    def stop(self) -> None:
        """The host closes the socket."""


def _is_news(report: Report, told: Report | None) -> bool:
    """Whether a report says more than that time has passed on an idle node."""
    if told is None or report.works or told.works or report.leases or told.leases:
        return True
    return _facts(report) != _facts(told)


def _facts(report: Report) -> tuple[object, ...]:
    counts = report.steps, report.promises_preempted, report.local_prefills
    return report.role, report.usage, *counts, report.sessions_version, report.prefixes_version
