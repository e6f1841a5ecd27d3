"""Virtual nodes: many to a process, which Ray places and watches as it does the process of a real node."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coordinator.cluster import (
    LOOPBACK,
    ROLES,
    NodeRef,
    connect,
    list_nodes,
    node_names,
    on_loopback,
    start_node,
)
from coordinator.config import ClusterConfig
from engine.cost import StepCost
from engine.errors import SlosserveError
from engine.profile import StepProfile
from engine.request import RoleName

logger = logging.getLogger(__name__)

HOST_ACTOR = "engine.virtual_host:VirtualHostActor"
FRESH_S = 1.0  # a host that a thousand nodes of it are asked back from is asked once


class VirtualNodes:
    """The hosts of a cluster in Ray: found if they are there already, else started. Safe from any thread."""

    def __init__(self, config: ClusterConfig, run_dir: Path) -> None:
        self._config = config
        self._run_dir = run_dir
        self.hosts = hosted(config)
        self._host_of = {name: host for host, nodes in self.hosts.items() for name in nodes}
        self._refs: dict[str, NodeRef] = {}
        self._locks = {host: threading.Lock() for host in self.hosts}
        self._described: dict[str, tuple[float, dict[str, dict[str, Any]]]] = {}
        self.found_running = False

    def connect(self) -> None:
        """Join Ray and find the hosts that an earlier coordinator started."""
        connect(self._config)
        self._refs = {host.name: host for host in list_nodes(self._config)}
        self.found_running = bool(self._refs)

    def start_host(self, host: str) -> dict[str, dict[str, Any]]:
        """The nodes of a host that is up: name, address, role, pid. Raises EngineStartError or NodeLost."""
        return self._ask(host)

    def revive(self, name: str) -> str | None:
        """The address of a node that was silent; None while its host is not back."""
        host = self._host_of[name]
        with self._locks[host]:
            asked_s, nodes = self._described.get(host, (-FRESH_S, {}))
            if time.monotonic() - asked_s > FRESH_S:
                try:
                    nodes = self._ask(host)
                except SlosserveError as error:
                    logger.warning("bringing %s back: %s", host, error)
                    nodes = {}
                self._described[host] = time.monotonic(), nodes
        return str(nodes[name]["address"]) if nodes else None

    def _ask(self, host: str) -> dict[str, dict[str, Any]]:
        """The nodes of a host by name, once it is up."""
        if host not in self._refs:
            spec = host_spec(self._config, host, self.hosts[host], self._run_dir)
            self._refs[host] = start_node(self._config, host, "", spec, actor_class=HOST_ACTOR)
        said = self._refs[host].start(self._config.timeouts.node_start_s)
        return {node["name"]: node | {"pid": said["pid"]} for node in said["nodes"]}


def hosted(config: ClusterConfig) -> dict[str, dict[str, str]]:
    """Hosts by name, each with its nodes and their first roles: every host gets its part of every pool."""
    hosts: dict[str, dict[str, str]] = {f"virtual-{at}": {} for at in range(config.virtual.processes)}
    for role in RoleName:
        mine = [name for name, of in node_names(config).items() if of is role]
        for at, name in enumerate(mine):
            hosts[f"virtual-{at % len(hosts)}"][name] = str(role)
    return {host: nodes for host, nodes in hosts.items() if nodes}


def host_spec(config: ClusterConfig, host: str, nodes: Mapping[str, str], run_dir: Path) -> dict[str, Any]:
    """What the actor of a host is told."""
    engine, virtual = config.engine, config.virtual
    return {
        "host": LOOPBACK if on_loopback(config) else None,
        "log": str(run_dir / "logs" / f"{host}.log"),
        "nodes": dict(nodes),
        "roles": ROLES,
        "max_waiting": config.endpoint.max_waiting,
        "peer_silent_s": config.timeouts.endpoint_silent_s,
        "session_ttl_s": config.sessions.ttl_s,
        "session_kv_share": config.sessions.kv_share,
        "engine": {
            "kind": config.engines,
            "model": config.model,
            "cost": virtual_cost(config),
            "kv_tokens": virtual.kv_tokens,
            "kv_bytes_per_token": virtual.kv_bytes_per_token,
            "max_model_len": engine.max_model_len,
            "block_size": engine.block_size or 16,
            "max_num_seqs": engine.max_num_seqs,
            "max_batch_tokens": engine.max_batch_tokens,
            "enable_prefix_caching": engine.enable_prefix_caching,
            "max_draft_tokens": virtual.max_draft_tokens,
            "acceptance": virtual.acceptance,
            "lease_s": config.transfer.lease_s,
            "link_latency_s": virtual.link_latency_ms / 1e3,
            "link_bytes_per_s": virtual.link_bytes_per_s,
        },
    }


def virtual_cost(config: ClusterConfig) -> StepCost:
    """What a step of every virtual engine costs."""
    profile = config.step_profile
    if profile is not None:
        return StepProfile.load(profile).cost
    return StepCost.line(config.virtual.step_base_ms / 1e3, config.virtual.step_per_token_us / 1e6)
