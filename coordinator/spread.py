"""Engines over hosts: each pool has a placement group of Ray, spread, so that a host takes a part of it along.

A group reserves a place for every node of its pool before the first of them loads a model, and says what is
missing if it cannot. It outlives the coordinator, as nodes do. Where a host is gone its places are made anew on
the others, and Ray starts the nodes there. A node that comes later has no place in a group: Ray's own SPREAD
strategy, which looks at what is free then, suits one node as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from coordinator.cluster import SPREAD, node_names, on_loopback
from coordinator.config import ClusterConfig
from engine.errors import EngineStartError, NoCapacity
from engine.request import RoleName


def spread(config: ClusterConfig) -> dict[str, Any]:
    """A scheduling strategy for each node that the configuration names. None on a single host: it needs none.

    Raises EngineStartError, after `timeouts.ray_start_s`, where Ray has no room for all of them.
    """
    needs = _needs(config)
    if on_loopback(config) or len(_hosts()) < 2 or not needs:
        return {}
    names = node_names(config)
    strategies: dict[str, Any] = {}
    for role in RoleName:
        nodes = [name for name, of in names.items() if of is role]
        if nodes:
            group = _find(role) or _made(config, role, [needs] * len(nodes))
            strategies |= {name: _place(group, at) for at, name in enumerate(nodes)}
    return strategies


def check_room(config: ClusterConfig, nodes: int) -> None:
    """Raise NoCapacity, saying what is free where, if so many more nodes have no place."""
    needs = _needs(config)
    if not needs:
        return
    free = _free()
    places = sum(
        min(math.floor(left.get(name, 0.0) / amount + 1e-9) for name, amount in needs.items())
        for left in free.values()
    )
    if places < nodes:
        raise NoCapacity(lacking(f"{nodes} more nodes", needs, free), reason="no_room")


def remove() -> None:
    """Give the places of this cluster's nodes back. The caller has joined its Ray."""
    import ray

    for role in RoleName:
        group = _find(role)
        if group is not None:
            ray.util.remove_placement_group(group)


def lacking(what: str, needs: Mapping[str, float], free: Mapping[str, Mapping[str, float]]) -> str:
    """What cannot be placed, and what each host has free of what a node needs."""
    wanted = ", ".join(f"{amount:g} {name}" for name, amount in needs.items())
    hosts = "; ".join(
        f"{host}: " + ", ".join(f"{left.get(name, 0.0):g} {name}" for name in needs)
        for host, left in sorted(free.items())
    )
    return (
        f"Ray has no room for {what}: each needs {wanted}, and free are {hosts}. Add hosts (`ray start"
        " --address HOST:PORT`), or lower pools or engine.num_cpus and engine.num_gpus."
    )


def _needs(config: ClusterConfig) -> dict[str, float]:
    """What Ray reserves for a node."""
    needs = {"CPU": config.engine.num_cpus, "GPU": config.engine.num_gpus}
    return {name: amount for name, amount in needs.items() if amount}


def _hosts() -> dict[str, str]:
    """Addresses of the hosts that are there, by Ray's id."""
    import ray

    return {host["NodeID"]: host["NodeManagerAddress"] for host in ray.nodes() if host["Alive"]}


def _free() -> dict[str, dict[str, float]]:
    """What each host has free, by its address."""
    from ray._private.state import available_resources_per_node

    hosts, free = _hosts(), available_resources_per_node()
    return {address: free.get(host, {}) for host, address in hosts.items()}


def _find(role: RoleName) -> Any:
    """The group of a pool in this cluster's namespace, None if there is none."""
    import ray

    try:
        return ray.util.get_placement_group(str(role))
    except ValueError:
        return None


def _made(config: ClusterConfig, role: RoleName, bundles: list[dict[str, float]]) -> Any:
    """A group whose places are there. Made one after another: the next sees what the last has left where."""
    import ray

    group = ray.util.placement_group(bundles, SPREAD, name=str(role), lifetime="detached")
    if not group.wait(config.timeouts.ray_start_s):
        words = lacking(f"{len(bundles)} {role} nodes", bundles[0], _free())
        remove()
        raise EngineStartError(words)
    return group


def _place(group: Any, at: int) -> Any:
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    return PlacementGroupSchedulingStrategy(group, at)
