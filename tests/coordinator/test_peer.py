"""A link to a node knows when the node is gone: at once when its process ends, soon when it hangs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest
import zmq.asyncio

from coordinator.peer import WATCH_EVERY_S, Peer
from engine.messages import Alive, Message
from engine.socket import NodeSocket


@pytest.fixture
async def context() -> AsyncIterator[zmq.asyncio.Context]:
    context = zmq.asyncio.Context()
    yield context
    context.destroy(linger=0)


async def _until(condition: object, timeout_s: float) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        if condition():  # type: ignore[operator]
            return True
        await asyncio.sleep(0.01)
    return False


async def test_a_node_that_answers_is_not_lost_and_one_that_closes_is(context: zmq.asyncio.Context) -> None:
    node = NodeSocket("127.0.0.1", "node", time.monotonic)
    node.start()
    heard: list[Message] = []
    peer = Peer(context, node.address, "me", heard.append, reports=False, silent_s=1.0)
    assert await _until(lambda: len(heard) >= 3, 5)
    assert all(isinstance(message, Alive) for message in heard)
    assert not peer.lost
    node.stop()
    assert await _until(lambda: peer.lost, 1.0)
    peer.close()


async def test_a_node_that_hangs_is_lost_after_its_silence(context: zmq.asyncio.Context) -> None:
    mute = context.socket(zmq.ROUTER)
    port = mute.bind_to_random_port("tcp://127.0.0.1")
    peer = Peer(context, f"tcp://127.0.0.1:{port}", "me", lambda message: None, reports=False, silent_s=0.6)
    assert not peer.lost
    assert await _until(lambda: peer.lost, 5)
    peer.close()
    mute.close()


async def test_an_observer_that_was_starved_itself_does_not_think_the_others_dead(
    context: zmq.asyncio.Context,
) -> None:
    node = NodeSocket("127.0.0.1", "node", time.monotonic)
    node.start()
    heard: list[Message] = []
    peer = Peer(context, node.address, "me", heard.append, reports=False, silent_s=2 * WATCH_EVERY_S)
    assert await _until(lambda: len(heard) >= 1, 5)
    time.sleep(1.0)  # noqa: ASYNC251 - the event loop stands still
    assert not peer.lost
    await asyncio.sleep(0)
    assert not peer.lost
    peer.close()
    node.stop()
