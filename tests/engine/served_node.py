"""A node that runs in a thread, and those who ask it for work over real sockets."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import zmq

from decode_node.role import DecodeRole, MixedRole
from engine.base import Work
from engine.batch import warm_up
from engine.messages import (
    Alive,
    Credit,
    Delta,
    Deltas,
    Message,
    Report,
    RoleSet,
    SetRole,
    Submit,
    Watch,
    WorkState,
    decode,
    encode,
)
from engine.node import Node
from engine.request import Pace, RoleName, WorkKind
from engine.socket import NodeSocket
from kv_transfer.fake import FakeFabric, FakePort
from prefill_node.role import PrefillRole
from tests.engine.scripted_engine import BLOCK_TOKENS, COST, NUM_BLOCKS, PATIENCE_S, ScriptedEngine, token

PACE = Pace(first_token_left_s=30.0, tpot_s=1.0)
ROLES = {role.name: role() for role in (PrefillRole, DecodeRole, MixedRole)}
Kind = TypeVar("Kind", bound=Message)


class Client:
    """An endpoint or a coordinator on a real socket. It watches the node only while it waits for something."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str, name: str) -> None:
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, name.encode())
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(address)
        self.heard: list[Message] = []
        self._unanswered = 0

    def send(self, *messages: Message) -> None:
        for message in messages:
            self._socket.send_multipart(encode(message))

    def send_raw(self, *frames: bytes) -> None:
        self._socket.send_multipart(list(frames))

    def take(self, timeout_s: float) -> Message | None:
        """The next message, None if none has come in time."""
        if not self._socket.poll(timeout_s * 1e3):
            return None
        message = decode(self._socket.recv_multipart())
        self.heard.append(message)
        if isinstance(message, Alive | Report):  # a report may also come unasked
            self._unanswered = max(self._unanswered - 1, 0)
        return message

    def settle(self) -> None:
        """Hear the answers to all that was asked: after this the node hears nothing either."""
        while self._unanswered:
            assert self.take(PATIENCE_S) is not None

    def until(self, kind: type[Kind], meets: Callable[[Kind], bool] = lambda _: True) -> Kind:
        """Wait for a message, and watch the node meanwhile (for its reports if that is one)."""
        deadline_s = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline_s:
            self.send(Watch(reports=kind is Report))
            self._unanswered += 1
            message = self.take(0.05)
            while message is not None:
                if isinstance(message, kind) and meets(message):
                    return message
                message = self.take(0)
        raise AssertionError(f"no such {kind.__name__}; heard {self.heard[-5:]}")

    def report(self, meets: Callable[[Report], bool] = lambda _: True) -> Report:
        """A report that meets a condition, once there is one, and no older than this call."""
        self.send(SetRole(-1, self.until(Report).role))  # it answers when it has published a new one
        self.until(RoleSet)
        return self.until(Report, meets)

    def listen(self, seconds: float) -> None:
        """Hear what comes, without a word."""
        deadline_s = time.monotonic() + seconds
        while (left_s := deadline_s - time.monotonic()) > 0:
            self.take(left_s)

    def deltas(self, request_id: str) -> list[Delta]:
        """What has been heard of a request."""
        messages = [message for message in self.heard if isinstance(message, Deltas)]
        return [delta for message in messages for delta in message.items if delta.request_id == request_id]

    def stream(self, request_id: str) -> list[int]:
        """A request to its end: its tokens, each index that of its place."""
        if not any(delta.finish_reason for delta in self.deltas(request_id)):
            self.until(
                Deltas, lambda deltas: any(d.finish_reason and d.request_id == request_id for d in deltas.items)
            )
        return self.tokens(request_id)

    def tokens(self, request_id: str) -> list[int]:
        """The tokens of a request so far."""
        tokens: list[int] = []
        for delta in self.deltas(request_id):
            assert delta.index == len(tokens)
            tokens.extend(delta.token_ids)
        return tokens

    def close(self) -> None:
        self._socket.close()


@dataclass(slots=True)
class Served:
    """A node that runs in a thread, its engine, and a clock that a test may put forward."""

    engine: ScriptedEngine
    node: Node
    address: str
    fabric: FakeFabric
    ahead_s: list[float]
    context: zmq.Context[zmq.Socket[bytes]]
    raised: list[BaseException] = field(default_factory=list)
    clients: list[Client] = field(default_factory=list)

    def client(self, name: str, credit: int = 512) -> Client:
        """An endpoint: it grants credit."""
        client = self.coordinator(name)
        client.send(Credit(credit))
        return client

    def coordinator(self, name: str = "coordinator") -> Client:
        """A peer that asks for reports and grants nothing."""
        self.clients.append(Client(self.context, self.address, name))
        return self.clients[-1]

    def put_clock_forward(self, seconds: float) -> None:
        """As if nobody had said anything for so long."""
        for client in self.clients:
            client.settle()
        self.ahead_s[0] += seconds

    def source(self) -> FakePort:
        """Another engine, from which KV can be pulled."""
        return self.fabric.port("source", NUM_BLOCKS, BLOCK_TOKENS)


Serve = Callable[..., Served]


@contextmanager
def serving() -> Iterator[Serve]:
    """Start nodes with what is yielded; all are stopped in the end."""
    started: list[tuple[Served, threading.Thread]] = []
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()

    def start(role: RoleName = RoleName.MIXED, skew_s: float = 0.0, **limits: Any) -> Served:
        ahead_s = [skew_s]

        def clock() -> float:
            return time.monotonic() + ahead_s[0]

        fabric = FakeFabric(clock)
        engine = ScriptedEngine(fabric)
        socket = NodeSocket("127.0.0.1", "node", clock)
        warm_up()  # compiling takes longer than the tests are patient
        node = Node("node", engine, engine.start(), ROLES, role, COST, socket, clock=clock, **limits)
        served = Served(engine, node, socket.address, fabric, ahead_s, context)

        def run() -> None:
            try:
                node.run()
            except RuntimeError as error:
                served.raised.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        started.append((served, thread))
        return served

    yield start
    for served, thread in started:
        served.engine.gate.set()
        served.node.stop()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
        for client in served.clients:
            client.close()
    context.destroy(linger=0)


def submit(request_id: str, length: int = 20, max_tokens: int = 5, **more: Any) -> Submit:
    return Submit(
        request_id,
        more.pop("attempt", 1),
        more.pop("kind", WorkKind.WHOLE),
        prompt_token_ids=list(range(length)),
        sampling=b"",
        max_tokens=max_tokens,
        pace=more.pop("pace", PACE),
        **more,
    )


def expected(message: Submit) -> list[int]:
    work = Work("", message.prompt_token_ids, b"", message.max_tokens)
    return [token(work, position) for position in range(message.max_tokens)]


def is_idle(report: Report) -> bool:
    return not (report.works or report.leases or report.usage.used_blocks)


def the_work(report: Report) -> WorkState:
    (work,) = report.works
    return work
