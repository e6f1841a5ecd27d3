"""Pools: who prefills, who decodes, who does both, and what must change to reach other sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engine.errors import RequestError
from engine.request import RoleName


@dataclass(frozen=True, slots=True)
class PoolNode:
    """A node as far as its role goes. `requests`: how many it serves now."""

    name: str
    role: RoleName
    requests: int


@dataclass(frozen=True, slots=True)
class Flip:
    """One node's change of role."""

    node: str
    before: RoleName
    after: RoleName


def sizes(nodes: Sequence[PoolNode]) -> dict[str, int]:
    """How many nodes each pool has."""
    return {str(role): sum(node.role is role for node in nodes) for role in RoleName}


def plan_flips(nodes: Sequence[PoolNode], want: Mapping[RoleName, int]) -> list[Flip]:
    """The fewest changes of role that give these sizes, in the order in which they are to be made.

    The least loaded nodes of a pool change, and what they serve goes on there. New prefill nodes come last: at
    no moment is there a prefill node without a decode node, unless there was. Raises RequestError when the
    sizes do not add up to the nodes there are, or could serve nothing.
    """
    if any(count < 0 for count in want.values()):
        raise RequestError("a pool cannot have fewer than 0 nodes")
    total = sum(want.values())
    if total != len(nodes):
        raise RequestError(
            f"the cluster has {len(nodes)} nodes, but {total} were asked for "
            f"({', '.join(f'{role} {count}' for role, count in want.items())})"
        )
    if want.get(RoleName.PREFILL, 0) and not want.get(RoleName.DECODE, 0):
        raise RequestError("prefill nodes need at least one decode node to hand their KV to")
    spare: list[PoolNode] = []
    missing: list[RoleName] = []
    for role in RoleName:
        members = sorted((node for node in nodes if node.role is role), key=lambda node: node.requests)
        surplus = len(members) - want.get(role, 0)
        spare += members[: max(surplus, 0)]
        missing += [role] * max(-surplus, 0)
    flips = [Flip(node.name, node.role, role) for node, role in zip(spare, missing, strict=True)]
    return sorted(flips, key=lambda flip: flip.after is RoleName.PREFILL)
