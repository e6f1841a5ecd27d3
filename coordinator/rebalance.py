"""Changing what nodes do while they serve: on demand, or as the load asks for.

A node changes its role between two batches. What it serves goes on, and what was placed there before is still
taken; only new work goes by the new role.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from coordinator.mirror import NodeMirror
from coordinator.pool_loads import PoolLoads
from coordinator.pool_policy import PoolPolicy
from coordinator.pools import PoolNode, plan_flips, sizes
from engine.errors import SlosserveError
from engine.messages import RoleSet
from engine.request import RoleName

logger = logging.getLogger(__name__)

REMEMBERED_CHANGES = 64


@dataclass(frozen=True, slots=True)
class Change:
    """A node that took another role. `requests`: how many it served then; `answered_s`: until it said so."""

    at_s: float
    node: str
    before: RoleName
    after: RoleName
    requests: int
    answered_s: float
    why: str


class Rebalancer:
    """Roles of the nodes of `mirrors`. `set_role` asks a node and gives its answer, then `changed` is called.

    `lacked` counts requests that a pool had no room for, and is cleared at the end of each window. `wanted`:
    the role each node is to have, for when it begins anew. `changing` is held from a plan until it is carried
    out: two at a time, each right by itself, could leave a pool empty.
    """

    def __init__(
        self,
        mirrors: Mapping[str, NodeMirror],
        set_role: Callable[[str, RoleName], Awaitable[RoleSet]],
        changed: Callable[[], None],
        lacked: Counter[RoleName],
    ) -> None:
        self.wanted: dict[str, RoleName] = {}
        self.follows = False
        self.changing = asyncio.Lock()
        self._loads = PoolLoads(mirrors, lacked)
        self._mirrors = mirrors
        self._set_role = set_role
        self._changed = changed
        self._policy = PoolPolicy()
        self._changes: deque[Change] = deque(maxlen=REMEMBERED_CHANGES)

    def nodes(self) -> list[PoolNode]:
        """Those that serve."""
        serving = (mirror for mirror in self._mirrors.values() if mirror.serving)
        return [PoolNode(mirror.name, mirror.role, mirror.requests) for mirror in serving]

    async def set_sizes(self, want: Mapping[RoleName, int], *, dry_run: bool) -> dict[str, Any]:
        """Change as few nodes as possible, and say what was changed. Raises RequestError for impossible sizes.

        Somebody who sets sizes wants them kept: from then on they do not follow the load.
        """
        async with self.changing:
            return await self._set_sizes(want, dry_run=dry_run)

    async def _set_sizes(self, want: Mapping[RoleName, int], *, dry_run: bool) -> dict[str, Any]:
        nodes = self.nodes()
        flips = plan_flips(nodes, want)
        before = {node.name: str(node.role) for node in nodes}
        changes = []
        if not dry_run:
            self.follows = False
            changes = [await self.flip(flip.node, flip.after, "asked for") for flip in flips]
        planned = before | {flip.node: str(flip.after) for flip in flips}
        after = planned if dry_run else {node.name: str(node.role) for node in self.nodes()}
        return {
            "dry_run": dry_run,
            "before": before,
            "after": after,
            "flips": [{"node": flip.node, "before": flip.before, "after": flip.after} for flip in flips],
            "changes": [asdict(change) for change in changes],
            "pools_before": sizes(nodes),
            "pools": dict(Counter(after.values())) if dry_run else sizes(self.nodes()),
        }

    async def flip(self, name: str, role: RoleName, why: str) -> Change:
        """Change a node's role and believe only what the node says it is."""
        mirror, began_s = self._mirrors[name], time.monotonic()
        before, requests = mirror.role, mirror.requests
        done = await self._set_role(name, role)
        mirror.role = done.role
        self.wanted[name] = role
        self._changed()
        if done.role is not role:
            raise SlosserveError(f"{name} was asked to be a {role} node and says that it is a {done.role} node")
        change = Change(time.time(), name, before, role, requests, time.monotonic() - began_s, why)
        logger.info("%s: %s -> %s, %d requests go on there: %s", name, before, role, requests, why)
        self._changes.append(change)
        return change

    def state(self) -> dict[str, Any]:
        """What `/cluster` shows: whether pools follow the load, the last decision, and the changes so far."""
        return {
            "follow_load": self.follows,
            "says": self._policy.says if self.follows else "sizes are as they were set",
            "changes": [asdict(change) for change in self._changes],
        }

    def follow(self, on: bool) -> None:
        """Let the pools follow the load from now on, or not."""
        if on and not self.follows:
            self._policy = PoolPolicy()
            self._loads.forget()
        self.follows = on

    async def review(self, now_s: float) -> None:
        """Called often: at the end of each window a node's role is changed, if the load asks for it."""
        if not self.follows or self.changing.locked():
            return
        move = self._loads.next_move(self._policy, now_s)
        if move is not None:
            async with self.changing:
                await self.flip(self._loads.least_loaded(move.before), move.after, move.why)
