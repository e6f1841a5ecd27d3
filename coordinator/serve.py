"""The coordinator process: `python -m coordinator.serve RUN_DIR`.

Joins the cluster's Ray, starts what nodes are not there yet, finds those that are, and serves. Prints lines of
JSON about its start: {"event": "node", "name", "state", "detail"}, then {"event": "ready", "address"}, or
{"event": "failed", "error"}. Its address is written to RUN_DIR/coordinator.json, where endpoints look for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import zmq.asyncio  # noqa: F401 - before uvloop takes over the event loop

from coordinator.cluster import (
    LOOPBACK,
    ROLES,
    SPREAD,
    NodeRef,
    connect,
    head_address,
    kill_node,
    list_nodes,
    node_names,
    on_loopback,
    start_node,
)
from coordinator.config import ClusterConfig
from coordinator.decider import Decider
from coordinator.endpoint.links import ADDRESS_FILE
from coordinator.links import GivenLinks, KnownLinks, MeasuredLinks
from coordinator.planner.admission import warm_up
from coordinator.ray_head import RayHead
from coordinator.service import Coordinator
from coordinator.spread import check_room, spread
from coordinator.virtual_nodes import VirtualNodes
from engine.errors import SlosserveError
from engine.models import name_for_others
from engine.request import RoleName

logger = logging.getLogger(__name__)

NODES_FILE = "nodes.json"  # the nodes that are wanted, once they are not those of the configuration


def say(event: str, **details: Any) -> None:
    """One line of progress for the parent."""
    print(json.dumps({"event": event, **details}), flush=True)


def node_spec(config: ClusterConfig, name: str, run_dir: Path) -> dict[str, Any]:
    """What a node's actor is told. `host` None: it takes the address under which Ray knows its machine."""
    engine = config.engine
    kv_cache_bytes = None if engine.kv_cache_gib is None else int(engine.kv_cache_gib * 2**30)
    return {
        "host": LOOPBACK if on_loopback(config) else None,
        "log": str(run_dir / "logs" / f"{name}.log"),
        "roles": ROLES,
        "step_profile": None if config.step_profile is None else config.step_profile.read_text("utf-8"),
        "hold_steps": engine.hold_steps,
        "max_waiting": config.endpoint.max_waiting,
        "peer_silent_s": config.timeouts.endpoint_silent_s,
        "session_ttl_s": config.sessions.ttl_s,
        "session_kv_share": config.sessions.kv_share,
        "clock_skew_s": config.clock_skew_s.get(name, 0.0),
        "engine": {
            "kind": config.engines,
            "model": name_for_others(config.model),
            "dtype": config.dtype,
            "max_model_len": engine.max_model_len,
            "block_size": engine.block_size,
            "kv_cache_bytes": kv_cache_bytes,
            "max_num_seqs": engine.max_num_seqs,
            "max_batch_tokens": engine.max_batch_tokens,
            "enable_prefix_caching": engine.enable_prefix_caching,
            "speculative": engine.speculative,
            "async_scheduling": engine.async_scheduling,
            "reasoning_parser": config.endpoint.reasoning_parser,
            "lease_s": config.transfer.lease_s,
            "pull_deadline_s": config.transfer.pull_deadline_s,
            "checksum": config.transfer.checksum,
        },
    }


class Nodes:
    """The cluster's nodes in Ray: found if they are there already, else started."""

    def __init__(self, config: ClusterConfig, run_dir: Path) -> None:
        self._config = config
        self._run_dir = run_dir
        self._refs: dict[str, NodeRef] = {}
        self._strategies: dict[str, Any] = {}
        self.found_running = False

    def connect(self) -> None:
        """Join Ray; find the nodes that an earlier coordinator started, and places for the others."""
        connect(self._config)
        self._refs = {node.name: node for node in list_nodes(self._config)}
        self.found_running = bool(self._refs)
        self._strategies = spread(self._config)

    def start(self, name: str, role: RoleName) -> dict[str, Any]:
        """A node that is up: name, address, role, pid. Raises EngineStartError or NodeLost."""
        if name not in self._refs:
            spec = node_spec(self._config, name, self._run_dir)
            strategy = self._strategies.get(name, SPREAD)
            self._refs[name] = start_node(self._config, name, str(role), spec, strategy=strategy)
        return self._refs[name].start(self._config.timeouts.node_start_s)

    def revive(self, name: str) -> str | None:
        """The address of a node that was silent: the same if it woke up, a new one if Ray restarted it."""
        node = self._refs.get(name)
        return None if node is None else str(node.start(self._config.timeouts.node_start_s)["address"])

    def check_room(self, nodes: int) -> None:
        """Raise NoCapacity, saying what is short, if Ray cannot place so many more nodes."""
        check_room(self._config, nodes)

    def end(self, name: str) -> None:
        """End a node's process for good; one that is gone already is no error."""
        node = self._refs.pop(name, None)
        if node is not None:
            kill_node(node)

    def keep(self, names: Mapping[str, RoleName]) -> None:
        """Write down the nodes that are wanted, for a coordinator that takes over."""
        _replace(self._run_dir / NODES_FILE, {name: str(role) for name, role in names.items()})

    def wanted(self) -> dict[str, RoleName]:
        """Those that are wanted: as they were written down last, else as configured."""
        file = self._run_dir / NODES_FILE
        if not file.exists():
            return node_names(self._config)
        return {name: RoleName(role) for name, role in json.loads(file.read_text(encoding="utf-8")).items()}

    @property
    def running(self) -> list[str]:
        """Nodes that were there before this coordinator."""
        return list(self._refs) if self.found_running else []


def links_of(config: ClusterConfig) -> KnownLinks:
    """Measured between real engines, given between virtual ones."""
    if config.engines == "virtual":
        return GivenLinks(config.virtual.link_latency_ms / 1e3, config.virtual.link_bytes_per_s)
    return MeasuredLinks()


async def serve(run_dir: Path) -> None:
    """Serve until SIGTERM or SIGINT."""
    config = ClusterConfig.read(run_dir)
    virtual = config.engines == "virtual"
    nodes: Nodes | VirtualNodes = VirtualNodes(config, run_dir) if virtual else Nodes(config, run_dir)

    async def revive(name: str) -> str | None:
        return await asyncio.to_thread(nodes.revive, name)

    coordinator = Coordinator(
        config.served_model_name or config.model,
        f"tcp://{LOOPBACK}",  # only endpoints connect to it, and they run beside it
        node_silent_s=config.timeouts.node_silent_s,
        stuck_step_s=config.timeouts.stuck_step_s,
        place_s=config.timeouts.place_s,
        revive=revive,
        decider=Decider(
            config.planner.max_deferred,
            config.planner.explained,
            prefix_caching=config.engine.enable_prefix_caching,
        ),
        links=links_of(config),
        fleet=nodes if isinstance(nodes, Nodes) else None,
    )
    _replace(run_dir / ADDRESS_FILE, {"address": coordinator.address})
    names = nodes.wanted() if isinstance(nodes, Nodes) else node_names(config)
    coordinator.expect(names)
    coordinator.follow_load(config.pools.auto)
    serving = asyncio.create_task(coordinator.run())
    await asyncio.gather(asyncio.to_thread(warm_up), asyncio.to_thread(nodes.connect))
    coordinator.watch_ray(RayHead(head_address()))
    if isinstance(nodes, VirtualNodes):
        await _start_hosts(nodes, coordinator)
    else:
        leaving = {name: RoleName.MIXED for name in nodes.running if name not in names}
        coordinator.expect(leaving)
        starting = [_start(nodes, coordinator, name, role) for name, role in {**names, **leaving}.items()]
        await asyncio.gather(*starting)
        for name in leaving:
            coordinator.send_away(name)
    say("links", state="measuring")
    while not coordinator.ready:
        await asyncio.sleep(0.05)
    gc.collect()
    gc.freeze()  # a look through all of Ray would hold up a placement for tens of milliseconds
    say("ready", address=coordinator.address)
    await serving


async def _start_hosts(nodes: VirtualNodes, coordinator: Coordinator) -> None:
    for host, names in nodes.hosts.items():
        say("node", name=host, state="loading", detail=f"{len(names)} virtual nodes")
    for host, names in nodes.hosts.items():
        try:
            described = await asyncio.to_thread(nodes.start_host, host)
        except SlosserveError as error:
            say("node", name=host, state="failed", detail=str(error))
            if not nodes.found_running:
                raise
            for name in names:
                coordinator.lose_node(name)
            continue
        for name in names:
            coordinator.add_node(name, described[name]["address"])
        pid = described[next(iter(names))]["pid"]
        say("node", name=host, state="ready", detail=f"{len(names)} virtual nodes, pid {pid}")


async def _start(nodes: Nodes, coordinator: Coordinator, name: str, role: RoleName) -> None:
    say("node", name=name, state="loading", role=str(role))
    try:
        node = await asyncio.to_thread(nodes.start, name, role)
    except SlosserveError as error:
        say("node", name=name, state="failed", detail=str(error))
        if not nodes.found_running:
            raise
        # A coordinator that takes over serves with the nodes that are left, until this one is back.
        coordinator.lose_node(name)
        return
    coordinator.add_node(name, node["address"])
    say("node", name=name, state="ready", detail=f"pid {node['pid']}", role=node["role"])


def _replace(file: Path, content: Mapping[str, str]) -> None:
    """Write a file in one step: a reader sees the old one or the new one."""
    temporary = file.with_name(file.name + ".new")
    temporary.write_text(json.dumps(content), encoding="utf-8")
    temporary.replace(file)


def main() -> None:
    """Entry point."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with contextlib.suppress(KeyboardInterrupt):
        try:
            asyncio.run(serve(Path(sys.argv[1])))
        except SystemExit:
            raise
        except BaseException as error:
            say("failed", error=str(error))
            raise


if __name__ == "__main__":
    main()
