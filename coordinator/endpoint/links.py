"""An endpoint's links: one to the coordinator, one to each node that it has work on."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import msgspec
import zmq.asyncio

from coordinator.peer import Peer
from coordinator.trunk import Links, NodeLink
from engine.errors import NoCapacity, SlosserveError
from engine.messages import (
    Alive,
    Answer,
    Credit,
    Declined,
    Delta,
    Deltas,
    Message,
    NodeAddress,
    NodeLoad,
    Place,
    Placed,
    Promoted,
    Query,
    Submit,
    View,
)

logger = logging.getLogger(__name__)

CREDIT = 512
LOST_CHECK_S = 0.1
NO_CREDIT = "no credit"
VIEW_FRESH_S = 1.0
ADDRESS_FILE = "coordinator.json"


class NodeEvents(Protocol):
    """What a link to a node tells."""

    def on_deltas(self, node: str, items: list[Delta]) -> None:
        """One step's tokens."""

    def on_declined(self, node: str, declined: Declined) -> None:
        """The node will not do it."""

    def on_lost(self, node: NodeAddress) -> None:
        """The node at this address fell silent, or knows nothing of us any more."""


class NodeLinks:
    """Links to nodes, made when they are first asked for something. Each is to an address: a node that has
    begun anew has another, and what still concerns the one before it leaves the new link alone.
    """

    def __init__(
        self,
        context: zmq.asyncio.Context,
        identity: str,
        events: NodeEvents,
        silent_s: float,
        stuck_limit_s: float,
    ) -> None:
        self._link_to = Links(context, reports=False, silent_s=silent_s)
        self._identity = identity
        self._events = events
        self._stuck_limit_s = stuck_limit_s
        self._links_made = itertools.count()
        self._open: dict[str, _Open] = {}  # by address
        self._watching: asyncio.Task[None] | None = None

    def send(self, node: NodeAddress, message: Message) -> None:
        """Send to a node, linking to it first if it is asked for something. One without a link has no work of
        ours that it could be told about."""
        link = self._open.get(node.address)
        if link is None and isinstance(message, Submit):
            link = self._connect(node)
        if link is not None:
            link.peer.send(message)

    def close(self) -> None:
        """Let go of every node."""
        if self._watching is not None:
            self._watching.cancel()
        for link in list(self._open.values()):
            self._close(link)

    def _connect(self, node: NodeAddress) -> _Open:
        if self._watching is None:
            self._watching = asyncio.create_task(self._watch_for_loss())

        def on_message(message: Message) -> None:
            self._take(link, message)

        # Every link has an identity of its own: a node that still knows an earlier one starts with no credit.
        identity = f"{self._identity}-{next(self._links_made)}"
        link = _Open(node, self._link_to.to(node.address, identity, on_message))
        self._open[node.address] = link
        link.peer.send(Credit(CREDIT))
        return link

    def _close(self, link: _Open) -> None:
        if self._open.get(link.node.address) is link:
            del self._open[link.node.address]
            link.peer.close()

    def _take(self, link: _Open, message: Message) -> None:
        match message:
            case Deltas(_, items):
                self._return_credit(link)
                self._events.on_deltas(link.node.node, items)
            case Declined():
                self._events.on_declined(link.node.node, message)
                if message.reason.startswith(NO_CREDIT):
                    self._lose(link)  # the node has forgotten us, and all that it did for us: link anew
            case Alive():
                link.stuck_s = message.stuck_s
            case _:
                logger.warning("an endpoint does not take %s", type(message).__name__)

    def _return_credit(self, link: _Open) -> None:
        link.credit_used += 1
        if link.credit_used >= CREDIT // 2:
            link.peer.send(Credit(link.credit_used))
            link.credit_used = 0

    async def _watch_for_loss(self) -> None:
        while True:
            await asyncio.sleep(LOST_CHECK_S)
            for link in [link for link in self._open.values() if self._is_lost(link)]:
                self._lose(link)

    def _lose(self, link: _Open) -> None:
        self._close(link)
        try:
            self._events.on_lost(link.node)
        except Exception:
            logger.exception("the loss of %s", link.node.node)

    def _is_lost(self, link: _Open) -> bool:
        """Gone or silent; or it answers, but one step has been running for longer than any step may."""
        return link.peer.lost or link.stuck_s > self._stuck_limit_s


@dataclass(slots=True, eq=False)
class _Open:
    """A link that is open. `credit_used`: messages of the node that it has not been given back credit for."""

    node: NodeAddress
    peer: NodeLink
    credit_used: int = 0
    stuck_s: float = 0.0


class CoordinatorLink:
    """Questions to the coordinator. Its address is in a file of the run directory, so a new one is found."""

    def __init__(self, context: zmq.asyncio.Context, identity: str, run_dir: Path, wait_s: float) -> None:
        self._context = context
        self._identity = identity
        self._file = run_dir / ADDRESS_FILE
        self._wait_s = wait_s
        self._calls = itertools.count()
        self._waiting: dict[object, asyncio.Future[Any]] = {}
        self._peer: Peer | None = None
        self._address = ""
        self._questions: dict[object, Message] = {}
        self._view: View | None = None
        self._viewed_s = 0.0
        self.on_promoted: Callable[[Promoted], None] = lambda promoted: None

    async def connect(self) -> None:
        """Wait for the coordinator's address and link to it."""
        while not self._file.exists():
            await asyncio.sleep(0.05)
        self._link()
        self._relinking = asyncio.create_task(self._follow())

    def send(self, message: Message) -> None:
        """Tell the coordinator something that needs no answer."""
        if self._peer is not None:
            self._peer.send(message)

    def fresh_view(self) -> View | None:
        """The nodes that take work, if the coordinator has said so within the last second."""
        return self._view if time.monotonic() - self._viewed_s < VIEW_FRESH_S else None

    def count(self, node: NodeLoad, requests: int) -> None:
        """So many more go to a node of the present view: until the next one tells of them, this one does. Else
        all that come within a tenth of a second would go to the same node.
        """
        if self._view is not None and node in self._view.nodes:
            nodes = self._view.nodes
            nodes[nodes.index(node)] = replace(node, requests=node.requests + requests)

    async def place(self, place: Place) -> Placed:
        """Ask where a request goes. Raises NoCapacity if the coordinator does not answer in time."""
        placed: Placed = await self._ask((place.request_id, place.attempt), place)
        return placed

    async def query(self, what: str, **args: Any) -> dict[str, Any]:
        """Ask for JSON. Raises what the coordinator answers as an error."""
        call_id = next(self._calls)
        answer: Answer = await self._ask(call_id, Query(call_id, what, args))
        if answer.error is not None:
            raise AnswerError(answer.error, answer.http_status)
        return answer.body

    def close(self) -> None:
        """Let go."""
        self._relinking.cancel()
        if self._peer is not None:
            self._peer.close()

    async def _ask(self, key: object, message: Message) -> Any:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting[key] = future
        self._questions[key] = message
        try:
            self.send(message)
            return await asyncio.wait_for(future, self._wait_s)
        except TimeoutError:
            raise NoCapacity(
                f"the coordinator did not answer within {self._wait_s:g} s; running requests go on",
                reason="coordinator_silent",
                retry_after_s=2.0,
            ) from None
        finally:
            self._waiting.pop(key, None)
            self._questions.pop(key, None)

    def _link(self) -> None:
        address = str(msgspec.json.decode(self._file.read_bytes())["address"])
        if address == self._address:
            return
        if self._peer is not None:
            self._peer.close()
        self._address = address
        self._peer = Peer(self._context, address, self._identity, self._take, reports=False)
        for question in self._questions.values():
            self.send(question)  # the coordinator that was asked is gone

    async def _follow(self) -> None:
        """Link anew when another coordinator has taken over."""
        while True:
            await asyncio.sleep(0.5)
            try:
                self._link()
            except (OSError, ValueError, KeyError):
                continue  # being written

    def _take(self, message: Message) -> None:
        match message:
            case Placed():
                self._resolve((message.request_id, message.attempt), message)
            case Answer():
                self._resolve(message.call_id, message)
            case Promoted():
                self.on_promoted(message)
            case View():
                self._view, self._viewed_s = message, time.monotonic()
            case Alive():
                pass
            case _:
                logger.warning("an endpoint does not take %s", type(message).__name__)

    def _resolve(self, key: object, message: Message) -> None:
        future = self._waiting.get(key)
        if future is not None and not future.done():
            future.set_result(message)


class AnswerError(SlosserveError):
    """The coordinator answered a question with an error; its HTTP status is the instance's own."""

    def __init__(self, message: str, http_status: int) -> None:
        super().__init__(message)
        self.status = http_status
