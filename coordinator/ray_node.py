"""The node's actor as Ray starts it: what only the process on its own host can know is filled in here."""

from __future__ import annotations

import socket
import uuid
from typing import Any

from engine.actor import NodeActor


class RayNode(NodeActor):
    """`spec` as of `coordinator.node_spec`, whose `host` may be None: the address of this node in Ray."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(settled(spec))


def settled(spec: dict[str, Any]) -> dict[str, Any]:
    """The spec with host, NIXL port and engine id of this process.

    The engine id is new with every process: peers remember how to reach an id, and would go on asking the one
    that died.
    """
    host = spec["host"] or _own_address()
    engine = {
        **spec["engine"],
        "engine_id": f"{spec['name']}-{uuid.uuid4().hex[:8]}",
        "side_channel_host": host,
        "side_channel_port": _free_port(host),
    }
    return {**spec, "host": host, "engine": engine}


def _own_address() -> str:
    import ray

    return str(ray.util.get_node_ip_address())


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port
