"""Where a request without a promise goes. Endpoints decide this alone, from the coordinator's last view."""

from __future__ import annotations

from collections.abc import Sequence

from engine.messages import NodeLoad
from engine.request import RoleName


def place_best_effort(nodes: Sequence[NodeLoad], *, one_node: bool) -> tuple[NodeLoad | None, NodeLoad] | None:
    """Where a request without a promise goes: the least loaded pair, or node. None if nobody can serve it."""
    by_role = {
        role: min((node for node in nodes if node.role is role), key=lambda node: node.requests, default=None)
        for role in RoleName
    }
    mixed, prefill, decode = by_role[RoleName.MIXED], by_role[RoleName.PREFILL], by_role[RoleName.DECODE]
    if decode is None:
        return None if mixed is None else (None, mixed)
    paired = prefill if not one_node else None
    busiest = max(decode.requests, 0 if paired is None else paired.requests)
    if mixed is not None and mixed.requests <= busiest:
        return None, mixed
    return paired, decode
