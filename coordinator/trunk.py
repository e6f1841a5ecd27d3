"""Links by address: nodes of one host share a link (engine/host_socket.py), any other has one of its own.

The address of a hosted node is that of its host and, behind a slash, its name.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Protocol

import zmq.asyncio

from coordinator.peer import Peer
from engine.errors import ProtocolError
from engine.host_socket import HOST_CHANNEL
from engine.messages import Message, Report, Reports, Watch, decode, encode

OnMessage = Callable[[Message], None]


class NodeLink(Protocol):
    """A link to one node, however it is reached."""

    address: str

    def send(self, message: Message) -> None:
        """Queue a message; never blocks."""

    @property
    def lost(self) -> bool:
        """Whether the node is gone, or silent for too long."""

    def close(self) -> None:
        """Let go of the node."""


class Trunk(Peer):
    """A link to a host: one socket and one liveness for all its nodes. Each is reached by a channel."""

    def __init__(
        self, context: zmq.asyncio.Context, address: str, identity: str, *, reports: bool, silent_s: float
    ) -> None:
        self.channels: dict[str, Channel] = {}
        self._opened = itertools.count()
        self._reports = reports
        super().__init__(context, address, identity, lambda message: None, reports=reports, silent_s=silent_s)

    def open(self, address: str, node: str, on_message: OnMessage) -> Channel:
        """A channel to a node of this host. It ends an earlier one."""
        channel = Channel(self, address, f"{node}:{next(self._opened)}", on_message)
        self.channels[node] = channel
        if self._reports:
            channel.send(Watch(reports=True))  # the first report; later ones come when something has changed
        return channel

    def shut(self, channel: Channel) -> None:
        """Let go of a node; of the host with the last of them."""
        node = channel.node
        if self.channels.get(node) is channel:
            del self.channels[node]
            if not self.channels:
                self.close()

    def send_to(self, channel: str, message: Message) -> None:
        """Queue a message for a node."""
        self._send([channel.encode(), *encode(message)])

    def send(self, message: Message) -> None:
        """Queue a message for the host itself."""
        self._send([HOST_CHANNEL, *encode(message)])

    async def _receive(self) -> None:
        """As a peer does, but letting others run between two messages: many may be here at once."""
        while True:
            frames = await self._socket.recv_multipart()
            self._answered(frames)
            await asyncio.sleep(0)

    def _take(self, frames: list[bytes]) -> None:
        if len(frames) != 3:
            raise ProtocolError(f"expected 3 frames of a host, got {len(frames)}")
        name, *rest = frames
        message = decode(rest)
        if isinstance(message, Reports):
            for report in message.items:
                self._to_node(report.node, report)
        elif name != HOST_CHANNEL:
            channel = self.channels.get(name.decode().rpartition(":")[0])
            if channel is not None and channel.name == name.decode():
                self._hand(message, channel.on_message)

    def _to_node(self, node: str, report: Report) -> None:
        channel = self.channels.get(node)
        if channel is not None:
            self._hand(report, channel.on_message)


class Channel:
    """A link to one node of a host."""

    def __init__(self, trunk: Trunk, address: str, name: str, on_message: OnMessage) -> None:
        self.address = address
        self.name = name
        self.on_message = on_message
        self._trunk = trunk

    @property
    def node(self) -> str:
        """Whom it leads to."""
        return self.name.rpartition(":")[0]

    def send(self, message: Message) -> None:
        """Queue a message; never blocks."""
        self._trunk.send_to(self.name, message)

    @property
    def lost(self) -> bool:
        """Whether the host is gone, or silent for too long, and every node in it."""
        return self._trunk.lost

    def close(self) -> None:
        """Let go of the node."""
        self._trunk.shut(self)


class Links:
    """Makes links to nodes. `reports`: whether they are to send their reports."""

    def __init__(self, context: zmq.asyncio.Context, *, reports: bool, silent_s: float) -> None:
        self._context = context
        self._reports = reports
        self._silent_s = silent_s
        self._trunks: dict[str, Trunk] = {}

    def to(self, address: str, identity: str, on_message: OnMessage) -> NodeLink:
        """A link to the node at this address. It knows us by `identity`, a host by its first one."""
        host, _, node = address.removeprefix("tcp://").partition("/")
        if not node:
            return Peer(
                self._context, address, identity, on_message, reports=self._reports, silent_s=self._silent_s
            )
        trunk = self._trunks.get(host)
        if trunk is None or trunk.lost or not trunk.channels:
            trunk = Trunk(
                self._context, f"tcp://{host}", identity, reports=self._reports, silent_s=self._silent_s
            )
            self._trunks[host] = trunk
        return trunk.open(address, node, on_message)
