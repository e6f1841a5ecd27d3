"""A host of virtual nodes that runs in a thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from engine import batch
from engine.host_socket import HostSocket
from engine.node import Node
from engine.request import RoleName
from engine.virtual import VirtualEngine, warm_up
from engine.virtual_config import VirtualEngineConfig
from engine.virtual_host import VirtualHost
from tests.engine.served_node import ROLES
from tests.engine.virtual_replica import QUICK, virtual_config


@dataclass(slots=True)
class Hosted:
    """The host, its address, and its engines by node."""

    host: VirtualHost
    address: str
    engines: dict[str, VirtualEngine]

    def node(self, name: str) -> str:
        """Address of a node."""
        return f"{self.address}/{name}"


@contextmanager
def hosting(nodes: Mapping[str, RoleName], **settings: Any) -> Iterator[Hosted]:
    """Serve these nodes until the end."""
    batch.warm_up()
    warm_up()
    socket = HostSocket("127.0.0.1", "host")
    made: list[tuple[Node, VirtualEngine]] = []
    for name, role in nodes.items():
        config: VirtualEngineConfig = virtual_config(f"{name}-engine", **({"cost": QUICK} | settings))
        engine = VirtualEngine(config)
        node = Node(name, engine, engine.start(), ROLES, role, config.cost, socket.line(name))
        made.append((node, engine))
    host = VirtualHost(socket, made)
    thread = threading.Thread(target=host.run)
    thread.start()
    try:
        yield Hosted(host, socket.address, {node.name: engine for node, engine in made})
    finally:
        host.stop()
        thread.join(5)
        assert not thread.is_alive()
