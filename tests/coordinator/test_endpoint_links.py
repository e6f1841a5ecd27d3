"""An endpoint's links to nodes: one that began anew is another, and nobody is left waiting for the old."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import zmq.asyncio

from coordinator.best_effort import place_best_effort
from coordinator.endpoint.links import NO_CREDIT, CoordinatorLink, NodeLinks
from engine.messages import (
    Cancel,
    Credit,
    Declined,
    Delta,
    Message,
    NodeAddress,
    NodeLoad,
    Release,
    Submit,
    View,
)
from engine.request import RoleName
from engine.socket import NodeSocket
from tests.engine.served_node import submit


class Events:
    """What the endpoint is told."""

    def __init__(self) -> None:
        self.declined: list[Declined] = []
        self.lost: list[NodeAddress] = []

    def on_deltas(self, node: str, items: list[Delta]) -> None:
        raise AssertionError((node, items))

    def on_declined(self, node: str, declined: Declined) -> None:
        self.declined.append(declined)

    def on_lost(self, node: NodeAddress) -> None:
        self.lost.append(node)


@pytest.fixture
async def made() -> AsyncIterator[tuple[NodeLinks, Events]]:
    context, events = zmq.asyncio.Context(), Events()
    links = NodeLinks(context, "endpoint", events, silent_s=1.0, stuck_limit_s=30.0)
    yield links, events
    links.close()
    await asyncio.sleep(0)
    context.destroy(linger=0)


@pytest.fixture
def nodes() -> Iterator[Callable[[], NodeSocket]]:
    """Makes sockets of a node of one name, each as if it had begun anew."""
    started: list[NodeSocket] = []

    def begin() -> NodeSocket:
        started.append(NodeSocket("127.0.0.1", "node", time.monotonic))
        started[-1].start()
        return started[-1]

    yield begin
    for node in started:
        node.stop()


async def asked(node: NodeSocket, kind: type[Message]) -> list[tuple[bytes, Message]]:
    """Who asked for something of this kind; waits up to 5 s for the first."""
    deadline_s = time.monotonic() + 5.0
    found: list[tuple[bytes, Message]] = []
    while not found and time.monotonic() < deadline_s:
        await asyncio.sleep(0.01)
        found = [(one.peer, one.message) for one in node.drain() if isinstance(one.message, kind)]
    return found


async def test_what_concerns_a_node_as_it_was_leaves_the_link_to_it_as_it_is_alone(
    made: tuple[NodeLinks, Events], nodes: Callable[[], NodeSocket]
) -> None:
    links, events = made
    before, now = nodes(), nodes()
    links.send(NodeAddress("node", now.address), submit("r"))
    assert await asked(now, Submit)
    for late in (Cancel("old", 1, False), Release("old", 1)):
        links.send(NodeAddress("node", before.address), late)
    links.send(NodeAddress("node", now.address), Cancel("r", 1, False))
    assert await asked(now, Cancel), "over the link that was there"
    assert not [one for one in now.drain() if isinstance(one.message, Credit)], "it was not made again"
    await asyncio.sleep(0.3)
    assert events.lost == []


async def test_a_node_that_has_forgotten_us_is_lost_to_all_who_wait_for_it(
    made: tuple[NodeLinks, Events], nodes: Callable[[], NodeSocket]
) -> None:
    links, events = made
    node = nodes()
    address = NodeAddress("node", node.address)
    links.send(address, submit("r"))
    (peer, _), *_ = await asked(node, Submit)
    node.send(peer, Declined("r", 1, f"{NO_CREDIT} granted: reconnect"))
    deadline_s = time.monotonic() + 5.0
    while not events.lost and time.monotonic() < deadline_s:
        await asyncio.sleep(0.01)
    assert [one.request_id for one in events.declined] == ["r"]
    assert events.lost == [address]
    links.send(address, submit("again"))
    (another, _), *_ = await asked(node, Submit)
    assert another != peer, "a new link, which grants credit of its own"


async def test_requests_that_come_within_one_view_of_the_nodes_are_spread(tmp_path: Path) -> None:
    link = CoordinatorLink(zmq.asyncio.Context.instance(), "endpoint", tmp_path, wait_s=1.0)
    nodes = [NodeLoad(f"m{at}", f"tcp://m{at}", RoleName.MIXED, 2 * at) for at in range(3)]
    link._take(View(nodes))
    went: Counter[str] = Counter()
    for _ in range(9):
        view = link.fresh_view()
        assert view is not None
        way = place_best_effort(view.nodes, one_node=False)
        assert way is not None
        link.count(way[1], 1)
        went[way[1].node] += 1
    assert went == {"m0": 5, "m1": 3, "m2": 1}
