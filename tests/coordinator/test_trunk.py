"""Nodes of a host share a link, and what happens to the host happens to all of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable

import pytest
import zmq.asyncio

from coordinator.peer import Peer
from coordinator.trunk import Links
from engine.messages import Credit, Deltas, Message, Report
from engine.request import RoleName
from tests.engine.hosted import hosting
from tests.engine.served_node import submit

NODES = {f"m{at}": RoleName.MIXED for at in range(3)}


@pytest.fixture
async def context() -> AsyncIterator[zmq.asyncio.Context]:
    context = zmq.asyncio.Context()
    yield context
    context.destroy(linger=0)


async def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        if condition():
            return True
        await asyncio.sleep(0.01)
    return False


async def test_every_node_is_heard_by_its_own_link(context: zmq.asyncio.Context) -> None:
    heard: dict[str, list[Message]] = {name: [] for name in NODES}
    with hosting(NODES) as hosted:
        links = Links(context, reports=True, silent_s=1.0)
        made = {name: links.to(hosted.node(name), "me", heard[name].append) for name in NODES}
        assert len(links._trunks) == 1
        assert await until(lambda: all(heard.values()))
        for name, messages in heard.items():
            assert {message.node for message in messages if isinstance(message, Report)} == {name}
        made["m1"].send(Credit(10))
        made["m1"].send(submit("r", max_tokens=3))
        assert await until(lambda: any(isinstance(message, Deltas) for message in heard["m1"]))
        assert not any(isinstance(message, Deltas) for message in heard["m0"] + heard["m2"])
        assert not any(link.lost for link in made.values())
    assert await until(lambda: all(link.lost for link in made.values()), 2.0), "the host has closed"
    for link in made.values():
        link.close()


async def test_a_link_made_anew_hears_for_the_old_one(context: zmq.asyncio.Context) -> None:
    first: list[Message] = []
    second: list[Message] = []
    with hosting(NODES) as hosted:
        links = Links(context, reports=True, silent_s=1.0)
        old = links.to(hosted.node("m0"), "me", first.append)
        other = links.to(hosted.node("m1"), "me", lambda message: None)
        assert await until(lambda: bool(first))
        new = links.to(hosted.node("m0"), "me", second.append)
        old.close()
        count = len(first)
        assert await until(lambda: bool(second)), "the host was asked for a report again"
        assert len(first) == count
        new.close()
        other.close()


async def test_a_host_is_let_go_of_with_the_last_of_its_nodes(context: zmq.asyncio.Context) -> None:
    with hosting(NODES) as hosted:
        links = Links(context, reports=False, silent_s=1.0)
        made = [links.to(hosted.node(name), "me", lambda message: None) for name in NODES]
        (trunk,) = links._trunks.values()
        made[0].close()
        assert len(trunk.channels) == 2
        for link in made:
            link.close()
        assert trunk._socket.closed
        again = links.to(hosted.node("m0"), "me-again", lambda message: None)
        assert links._trunks[hosted.address.removeprefix("tcp://")] is not trunk
        again.close()


async def test_a_node_of_its_own_has_a_link_of_its_own(context: zmq.asyncio.Context) -> None:
    link = Links(context, reports=False, silent_s=1.0).to("tcp://127.0.0.1:9", "me", lambda message: None)
    assert isinstance(link, Peer)
    link.close()
