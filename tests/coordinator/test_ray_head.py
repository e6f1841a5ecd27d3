"""Ray's head: its loss is told, with what it means, and its return."""

from __future__ import annotations

import asyncio
import time

import pytest

from coordinator.cluster import connect
from coordinator.config import load_config
from coordinator.listeners import free_ports
from coordinator.ray_head import RayHead
from engine.errors import NodeLost


async def test_a_head_that_goes_and_comes_back_is_told() -> None:
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    head = RayHead(f"127.0.0.1:{port}")
    head._note(await head._answers())
    assert head.state()["head"] == "ready"
    server.close()
    await server.wait_closed()
    for _ in range(2):
        head._note(await head._answers())
    lost = head.state()
    assert lost["head"] == "lost"
    assert f"127.0.0.1:{port} is gone" in lost["says"]
    again = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", port)
    head._note(await head._answers())
    assert head.state()["head"] == "ready"
    again.close()


def test_a_ray_whose_head_is_gone_is_not_waited_for() -> None:
    address = f"127.0.0.1:{free_ports(1)}"
    began_s = time.monotonic()
    with pytest.raises(NodeLost, match=f"no Ray at {address}"):
        connect(load_config(None, {"ray.address": address}))
    assert time.monotonic() - began_s < 5
