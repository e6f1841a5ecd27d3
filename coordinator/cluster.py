"""Nodes as Ray actors: placed, named, found again and ended. Ray is imported when one of these is called.

Actors are detached and live in the namespace of their cluster, so they outlive the coordinator, and a new one
finds them by name. Work never passes through Ray.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordinator.config import ClusterConfig
from coordinator.node_spec import node_environment, node_spec
from engine.errors import EngineStartError, NodeLost, SlosserveError

ACTOR = "coordinator.ray_node:RayNode"
MAX_RESTARTS = 3
# start() blocks while the engine loads; log_tail() and stop() must get through.
CONCURRENT_CALLS = 4
ANSWER_S = 5.0
LOOPBACK = "127.0.0.1"

logger = logging.getLogger(__name__)


class Cluster:
    """The nodes of one cluster, as the coordinator uses them. Its methods block; call them from threads."""

    def __init__(self, config: ClusterConfig, run_dir: Path) -> None:
        self._config = config
        self._run_dir = run_dir
        self._roles: dict[str, str] = {}

    @property
    def host(self) -> str:
        """The address of this machine that the nodes can reach: loopback where all are in one machine."""
        if self._local:
            return LOOPBACK
        import ray

        return str(ray.util.get_node_ip_address())

    def connect(self) -> None:
        """Join the cluster's Ray. Raises NodeLost if nothing answers."""
        connect(self._config)

    def start_node(self, name: str, role: str) -> dict[str, Any]:
        """Bring a node to the point where it serves, making it if there is none of that name.

        Returns its name, address, role now and pid. Raises EngineStartError with the tail of its log.
        """
        self._roles[name] = str(role)
        node = find_node(self._config, name) or self._create(name)
        return self._describe_or_start(node)

    def revive(self, name: str) -> str | None:
        """The address of a node that fell silent: the old one if it speaks again, a new one if it was replaced.

        None if it hangs or is being restarted: ask again later. Raises EngineStartError.
        """
        try:
            node = find_node(self._config, name) or self._create(name)
            return str(self._describe_or_start(node)["address"])
        except NodeLost as error:
            logger.warning("%s", error)
            return None

    def _describe_or_start(self, node: NodeRef) -> dict[str, Any]:
        try:
            return node.describe()
        except EngineStartError:  # its process is there, its engine is not: a first start, or Ray's restart
            return node.start(self._config.timeouts.node_start_s)

    def _create(self, name: str) -> NodeRef:
        role = self._roles[name]
        spec = node_spec(self._config, self._run_dir, name, role, LOOPBACK if self._local else None)
        return start_node(self._config, name, role, spec)

    @property
    def _local(self) -> bool:
        return (self._config.ray.address or LOOPBACK).startswith(LOOPBACK)


@dataclass(frozen=True, slots=True)
class NodeRef:
    """A node's actor. `actor` is Ray's handle."""

    name: str
    actor: Any

    def start(self, timeout_s: float) -> dict[str, Any]:
        """Start the engine and wait for it. Raises EngineStartError, or NodeLost if the actor died."""
        try:
            started: dict[str, Any] = self._call("start", timeout_s)
        except TimeoutError:
            raise EngineStartError(f"{self.name} was not ready within {timeout_s:.0f} s") from None
        return started

    def describe(self, timeout_s: float = ANSWER_S) -> dict[str, Any]:
        """What the node says of itself: name, address, role, pid.

        Raises EngineStartError if its engine was never started, NodeLost if it died or does not answer.
        """
        try:
            described: dict[str, Any] = self._call("describe", timeout_s)
        except TimeoutError:
            raise NodeLost(f"{self.name} does not answer") from None
        return described

    def _call(self, method: str, timeout_s: float) -> Any:
        import ray

        try:
            return ray.get(getattr(self.actor, method).remote(), timeout=timeout_s)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            raise (cause if isinstance(cause, SlosserveError) else EngineStartError(str(error))) from None
        except ray.exceptions.GetTimeoutError:
            raise TimeoutError from None
        except (ray.exceptions.RayActorError, ray.exceptions.ActorUnavailableError) as error:
            raise NodeLost(f"{self.name}: its process ended: {error}") from None


def namespace(config: ClusterConfig) -> str:
    """Where the cluster's actors are found."""
    return f"slosserve-{config.name}"


def connect(config: ClusterConfig) -> None:
    """Join the Ray of `config.ray.address`. Raises NodeLost if nothing answers there."""
    import ray

    try:
        ray.init(
            address=config.ray.address,
            namespace=namespace(config),
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise NodeLost(f"no Ray at {config.ray.address}: {error}") from None


def disconnect() -> None:
    """Leave Ray. Detached actors stay."""
    import ray

    ray.shutdown()


def start_node(
    config: ClusterConfig, name: str, role: str, spec: Mapping[str, Any], *, actor_class: str = ACTOR
) -> NodeRef:
    """Create the actor of a node; returns before its process is up. Call `start` on what is returned.

    `spec` goes to the actor's constructor with `name` and `role` added. Raises EngineStartError if a node of
    that name exists.
    """
    import ray

    options = {
        "name": name,
        "namespace": namespace(config),
        "lifetime": "detached",
        "max_restarts": MAX_RESTARTS,
        "max_concurrency": CONCURRENT_CALLS,
        "num_cpus": config.engine.num_cpus,
        "num_gpus": config.engine.num_gpus,
        "runtime_env": {"env_vars": node_environment(config)},
    }
    module, _, class_name = actor_class.partition(":")
    remote_class = ray.remote(getattr(importlib.import_module(module), class_name))
    try:
        return NodeRef(name, remote_class.options(**options).remote({**spec, "name": name, "role": role}))
    except ValueError as error:
        raise EngineStartError(f"{name}: {error}") from None


def find_node(config: ClusterConfig, name: str) -> NodeRef | None:
    """The node's actor if Ray knows one that lives or is being restarted."""
    import ray

    try:
        return NodeRef(name, ray.get_actor(name, namespace(config)))
    except ValueError:
        return None


def list_nodes(config: ClusterConfig) -> list[NodeRef]:
    """The cluster's nodes that Ray knows, by name, whoever created them."""
    import ray

    rows = ray.util.list_named_actors(all_namespaces=True)
    names = sorted(row["name"] for row in rows if row["namespace"] == namespace(config))
    return [node for node in (find_node(config, name) for name in names) if node is not None]


def kill_node(node: NodeRef) -> None:
    """End a node's process at once, for good: Ray does not restart it."""
    import ray

    ray.kill(node.actor, no_restart=True)


def kill_nodes(config: ClusterConfig) -> list[str]:
    """End every node of the cluster, from a process that is not connected. Returns their names."""
    connect(config)
    try:
        nodes = list_nodes(config)
        for node in nodes:
            kill_node(node)
        return [node.name for node in nodes]
    finally:
        disconnect()
