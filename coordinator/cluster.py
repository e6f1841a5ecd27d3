"""Nodes as Ray actors: placed, named, found again and ended. Ray is imported when one of these is called.

Actors are detached and live in the namespace of their cluster, so they outlive the coordinator, and a new one
finds them by name. Work never passes through Ray.
"""

from __future__ import annotations

import importlib
import logging
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordinator.config import ClusterConfig
from coordinator.ray_head import PATIENCE
from engine.errors import EngineStartError, NodeLost, SlosserveError
from engine.request import RoleName

LOOPBACK = "127.0.0.1"
ROLES = {
    "prefill": "prefill_node.role:PrefillRole",
    "decode": "decode_node.role:DecodeRole",
    "mixed": "decode_node.role:MixedRole",
}
ACTOR = "engine.actor:NodeActor"
ANSWER_S = 5.0
MAX_RESTARTS = -1  # however often: coordinator/revival.py decides when an engine is started again
SPREAD = "SPREAD"  # Ray's strategy: on the host that has the least of them
# start() blocks while the engine loads; log_tail() and stop() must get through.
CONCURRENT_CALLS = 4


@dataclass(frozen=True, slots=True)
class NodeRef:
    """A node's actor. `actor` is Ray's handle."""

    name: str
    actor: Any

    def start(self, timeout_s: float) -> dict[str, Any]:
        """Start the engine and wait for it. Raises EngineStartError, or NodeLost if the actor died."""
        started: dict[str, Any] = self._call("start", timeout_s)
        return started

    def log_tail(self, lines: int, timeout_s: float = 10.0) -> str:
        """The last lines of the node's log."""
        return str(self._call("log_tail", timeout_s, lines))

    def _call(self, method: str, timeout_s: float, *arguments: Any) -> Any:
        import ray

        try:
            return ray.get(getattr(self.actor, method).remote(*arguments), timeout=timeout_s)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            raise (cause if isinstance(cause, SlosserveError) else EngineStartError(str(error))) from None
        except ray.exceptions.GetTimeoutError:
            raise EngineStartError(f"{self.name}: no answer to {method} within {timeout_s:.0f} s") from None
        except (ray.exceptions.RayActorError, ray.exceptions.ActorUnavailableError) as error:
            raise NodeLost(f"{self.name}: its process ended: {error}") from None


def node_names(config: ClusterConfig) -> dict[str, RoleName]:
    """The nodes that a configuration asks for, by name, with the role that each starts in."""
    return {f"{role}-{index}": role for role in RoleName for index in range(getattr(config.pools, str(role)))}


def namespace(config: ClusterConfig) -> str:
    """Where the cluster's actors are found."""
    return f"slosserve-{config.name}"


def on_loopback(config: ClusterConfig) -> bool:
    """Whether the cluster is on this machine alone, and nobody else reaches it."""
    return (config.ray.address or "").startswith(LOOPBACK)


def connect(config: ClusterConfig) -> None:
    """Join the Ray of `config.ray.address`. Raises NodeLost if nothing answers there."""
    _check_answers(config.ray.address)
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


def _check_answers(address: str | None) -> None:
    """Raises NodeLost where nobody listens: Ray itself would wait for as long as `PATIENCE` says."""
    host, _, port = (address or "").rpartition(":")
    if host and port.isdigit() and "/" not in host:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_S).close()
        except OSError as error:
            raise NodeLost(f"no Ray at {address}: {error}") from None


def head_address() -> str:
    """Where the head of the Ray that was joined listens."""
    import ray

    return str(ray.get_runtime_context().gcs_address)


def disconnect() -> None:
    """Leave Ray. Detached actors stay."""
    import ray

    ray.shutdown()


def node_environment(config: ClusterConfig) -> dict[str, str]:
    """Variables of every process that imports vLLM; `engine.env` of the configuration has the last word."""
    fixed = {
        "VLLM_NO_USAGE_STATS": "1",
        # The step loop runs inside the node's process, next to its sockets.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        **PATIENCE,
    }
    offline = {"HF_HUB_OFFLINE": "1"} if Path(config.model).is_dir() else {}
    return {**fixed, **offline, **config.engine.env}


def start_node(
    config: ClusterConfig,
    name: str,
    role: str,
    spec: Mapping[str, Any],
    *,
    actor_class: str = ACTOR,
    strategy: Any = SPREAD,
) -> NodeRef:
    """Create the actor of a node; returns before its process is up. Call `start` on what is returned.

    `spec` goes to the actor's constructor with `name` and `role` added. `strategy` is Ray's, for the host it
    goes to. Raises EngineStartError if a node of that name exists.
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
        "scheduling_strategy": strategy,
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
