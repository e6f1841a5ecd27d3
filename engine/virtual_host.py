"""Many virtual nodes in one process and one thread: a node is visited when a batch of its ends, or is asked.

A batch of a virtual engine is a wait, so the thread that would sleep for one node serves the others meanwhile.
What a node is sent during a batch it hears when the batch is over, as a node with a thread of its own does.
"""

from __future__ import annotations

import heapq
import itertools
import os
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine import batch
from engine.actor import NodeActor, load
from engine.base import StepResult
from engine.host_socket import HostSocket
from engine.node import REPORT_EVERY_S, Node
from engine.request import RoleName
from engine.role import Role
from engine.virtual import VirtualEngine, warm_up
from engine.virtual_config import VirtualEngineConfig

IDLE_UPKEEP_S = 1.0
MOST_WAIT_S = 0.1
NEWS_WAIT_S = 5e-3  # while reports are left to be told
LEAST_WAIT_S = 1e-3  # before a node that could not go on is asked again
NOTHING = StepResult([], None)


@dataclass(slots=True)
class Station:
    """A node and its engine. `ends_s`: of its batch in flight; `upkeep_s`, `next_s`: when it is due, and when
    it is next visited."""

    node: Node
    engine: VirtualEngine
    ends_s: float | None = None
    upkeep_s: float = 0.0
    next_s: float = 0.0


class VirtualHost:
    """Drives virtual nodes from the thread that calls `run`."""

    def __init__(self, socket: HostSocket, nodes: Sequence[tuple[Node, VirtualEngine]]) -> None:
        self._socket = socket
        self._stations = {node.name: Station(node, engine) for node, engine in nodes}
        self._heap: list[tuple[float, int, Station]] = []
        self._order = itertools.count()
        self._stirred: list[Station] = []
        self._more_news = False
        self._stopping = threading.Event()
        for station in self._stations.values():
            self._watch(station)

    def _watch(self, station: Station) -> None:
        station.engine.kv.stirred = lambda: self._stirred.append(station)

    def stop(self) -> None:
        """Ask `run` to return soon."""
        self._stopping.set()

    def describe(self) -> list[dict[str, str]]:
        """Name, address and present role of each node."""
        return [
            {"name": name, "address": f"{self._socket.address}/{name}", "role": str(station.node.role)}
            for name, station in self._stations.items()
        ]

    def run(self) -> None:
        """Serve until `stop`. Raises what an engine raises: the process is lost, with every node in it."""
        begins_s = time.monotonic()
        for at, station in enumerate(self._stations.values()):
            station.node.keep_up()
            # Spread over the period, or all of them would be due at once for ever.
            station.upkeep_s = begins_s + IDLE_UPKEEP_S * at / len(self._stations)
            self._visit_at(station, station.upkeep_s)
        try:
            while not self._stopping.is_set():
                self._turn()
        finally:
            self._socket.close()

    def _turn(self) -> None:
        wait_s = self._heap[0][0] - time.monotonic() if self._heap else MOST_WAIT_S
        for name in self._socket.receive(min(wait_s, NEWS_WAIT_S if self._more_news else MOST_WAIT_S)):
            self._visit(self._stations[name])
        now_s = time.monotonic()
        while self._heap and self._heap[0][0] <= now_s:
            at_s, _, station = heapq.heappop(self._heap)
            if at_s == station.next_s:  # else it has been visited since, and is due at another time
                self._visit(station)
        while self._stirred:
            self._visit(self._stirred.pop())
        self._more_news = self._socket.tell_news()

    def _visit(self, station: Station) -> None:
        """Let a node do all that can be done now, and note when it is to be visited again."""
        now_s = time.monotonic()
        node, engine = station.node, station.engine
        if station.ends_s is not None:
            if now_s < station.ends_s:
                return
            station.ends_s = None
            node.take(engine.finish())
        node.hear()
        if now_s >= station.upkeep_s:
            node.keep_up()  # before the next batch: a report tells of a node between two
            station.upkeep_s = now_s + (REPORT_EVERY_S if node.busy else IDLE_UPKEEP_S)
        elif node.busy:
            station.upkeep_s = min(station.upkeep_s, now_s + REPORT_EVERY_S)
        again_s = self._begin(station, now_s)
        if station.ends_s is None:
            again_s = min(again_s, station.upkeep_s)
        self._visit_at(station, again_s)

    def _begin(self, station: Station, now_s: float) -> float:
        """Begin a batch if there is one. When the node has to be visited again for it."""
        engine, node = station.engine, station.node
        if not engine.has_work():
            return now_s + IDLE_UPKEEP_S
        station.ends_s = engine.begin(node.compose)
        if station.ends_s is not None:
            return station.ends_s
        node.take(NOTHING)
        return max(engine.wake_s(), now_s + LEAST_WAIT_S)

    def _visit_at(self, station: Station, at_s: float) -> None:
        station.next_s = at_s
        heapq.heappush(self._heap, (at_s, next(self._order), station))


class VirtualHostActor(NodeActor):
    """The Ray actor of a host. `spec` is that of a node, with `nodes` (name -> first role) and no role.

    Its `engine` holds the settings of every engine (VirtualEngineConfig, less what differs by node).
    """

    def describe(self) -> dict[str, Any]:
        """Its nodes (name, address, role) and process id."""
        assert isinstance(self._node, VirtualHost)
        return {"name": self._spec["name"], "nodes": self._node.describe(), "pid": os.getpid()}

    def _build(self) -> VirtualHost:
        spec = self._spec
        batch.warm_up()
        warm_up()
        roles: dict[RoleName, Role] = {RoleName(name): load(path)() for name, path in spec["roles"].items()}
        socket = HostSocket(self._host(), spec["name"])
        nodes = [
            self._hosted(name, RoleName(role), roles, socket) for name, role in sorted(spec["nodes"].items())
        ]
        self._node = VirtualHost(socket, nodes)
        return self._node

    def _hosted(
        self, name: str, role: RoleName, roles: dict[RoleName, Role], socket: HostSocket
    ) -> tuple[Node, VirtualEngine]:
        spec = self._spec
        settings = {key: value for key, value in spec["engine"].items() if key != "kind"}
        config = VirtualEngineConfig(engine_id=f"{name}-{uuid.uuid4().hex[:8]}", **settings)
        engine = VirtualEngine(config)
        node = Node(
            name,
            engine,
            engine.start(),
            roles,
            role,
            config.cost,
            socket.line(name),
            max_waiting=int(spec["max_waiting"]),
            peer_silent_s=float(spec["peer_silent_s"]),
            session_ttl_s=float(spec["session_ttl_s"]),
            session_kv_share=float(spec["session_kv_share"]),
        )
        return node, engine
