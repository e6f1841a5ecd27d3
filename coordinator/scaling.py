"""Nodes that are added to a cluster, and nodes that leave it, while it serves.

A node that leaves is given nothing new; it is ended once what it serves is over. The nodes that are wanted are
kept on disk, so that a coordinator that takes over starts none that was sent away, and goes on with a leave.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from coordinator.mirror import NodeMirror
from coordinator.pools import PoolNode
from engine.errors import RequestError, SlosserveError
from engine.request import RoleName

logger = logging.getLogger(__name__)

LEFT_S = 2.0  # of nothing to do, for what an endpoint has sent and no report shows yet
POLL_S = 0.1
# A node that falls silent while it leaves may come back to its streams; to a coordinator that has taken over,
# one is starting until its first report.
AWAY_S = {"ready": math.inf, "lost": 10.0, "starting": 10.0}


class Fleet(Protocol):
    """Where nodes come from."""

    def check_room(self, nodes: int) -> None:
        """Raise NoCapacity, saying what is short, if so many more nodes cannot be placed."""

    def start(self, name: str, role: RoleName) -> dict[str, Any]:
        """A node that is up: name, address, role, pid. Blocks. Raises EngineStartError or NodeLost."""

    def end(self, name: str) -> None:
        """End a node's process for good. Blocks; one that is gone already is no error."""

    def keep(self, names: Mapping[str, RoleName]) -> None:
        """Write down the nodes that are wanted, for a coordinator that takes over."""


class Members(Protocol):
    """The coordinator, as far as who belongs to it goes."""

    def expect(self, names: Mapping[str, RoleName]) -> None:
        """Nodes that are being started."""

    def add_node(self, name: str, address: str) -> None:
        """Link to a node that is up."""

    def fail_node(self, name: str, reason: str) -> None:
        """A node that could not be started."""

    def remove_node(self, name: str) -> None:
        """Forget a node."""


@dataclass(frozen=True, slots=True)
class ScalePlan:
    """Nodes to start, with the role that each begins in, and nodes that leave."""

    added: Mapping[str, RoleName]
    removed: Sequence[str]


def plan_scale(
    nodes: Sequence[PoolNode], taken: Collection[str], count: int, role: RoleName | None = None
) -> ScalePlan:
    """Who is to come or to leave, so that there are `count` nodes.

    New ones get `role`, else that of the pool that is furthest below its present share; their names are none
    of `taken`. Those leave first that do not serve (below 0 requests); then, of the pool that is furthest above
    its share, or of `role`, the least loaded. Raises RequestError where what is left could serve nothing.
    """
    if count < 1:
        raise RequestError("a cluster needs at least one node; to end it all use `slosserve down`")
    if role is not None and count == len(nodes):
        raise RequestError(f"there are {count} nodes already; to change what they do use `slosserve rebalance`")
    shares = {one: sum(node.role is one for node in nodes) for one in RoleName}
    sizes, names = Counter(shares), set(taken)
    added: dict[str, RoleName] = {}
    removed: list[str] = []
    for _ in range(count - len(nodes)):
        pool = role or max(shares, key=lambda one: _missing(one, shares, sizes))
        name = next(name for at in range(len(names) + 1) if (name := f"{pool}-{at}") not in names)
        added[name] = pool
        sizes[pool] += 1
        names.add(name)
    leaving = sorted(nodes, key=lambda node: node.requests)
    for _ in range(len(nodes) - count):
        idle = [node for node in leaving if node.requests < 0 and role in (None, node.role)]
        pool = idle[0].role if idle else _shrinking(role, shares, sizes)
        one = idle[0] if idle else next(node for node in leaving if node.role is pool)
        leaving.remove(one)
        removed.append(one.name)
        sizes[pool] -= 1
    if sizes[RoleName.PREFILL] and not sizes[RoleName.DECODE]:
        raise RequestError("prefill nodes need a decode node to hand their KV to: give --role decode")
    return ScalePlan(added, removed)


def plan_leave(nodes: Sequence[PoolNode], names: Sequence[str]) -> ScalePlan:
    """These nodes leave. Raises RequestError for one that is not there, or if what is left serves nothing."""
    there = [node.name for node in nodes]
    unknown = [name for name in names if name not in there]
    if unknown:
        raise RequestError(f"no node {', '.join(unknown)}; there are {', '.join(there)}")
    left = Counter(node.role for node in nodes if node.name not in names)
    if not _serves(left):
        told = ", ".join(f"{left[one]} {one}" for one in RoleName if left[one]) or "none"
        raise RequestError(f"the nodes that are left ({told}) could serve nothing: add or rebalance some first")
    return ScalePlan({}, list(dict.fromkeys(names)))


def _missing(pool: RoleName, shares: Mapping[RoleName, int], sizes: Counter[RoleName]) -> float:
    """By how many nodes a pool would be below its share, were there one node more."""
    return shares[pool] / max(sum(shares.values()), 1) * (sizes.total() + 1) - sizes[pool]


def _shrinking(role: RoleName | None, shares: Mapping[RoleName, int], sizes: Counter[RoleName]) -> RoleName:
    """The pool that a node leaves. The last of a pool leaves only if there is another that serves alone."""
    pools = [one for one in RoleName if sizes[one] and (role is None or one is role)]
    able = [one for one in pools if _serves(sizes - Counter({one: 1}))]
    wanted = [one for one in able if sizes[one] > 1] or able
    if not wanted:
        told = ", ".join(f"{sizes[one]} {one}" for one in RoleName if sizes[one])
        raise RequestError(f"of {told} no {role or 'node'} can leave: what is left could serve nothing")
    return min(wanted, key=lambda one: _missing(one, shares, sizes))


def _serves(sizes: Counter[RoleName]) -> bool:
    """Whether nodes of these roles can serve a request from its prompt to its last token."""
    return sizes[RoleName.DECODE] > 0 or (sizes[RoleName.MIXED] > 0 and not sizes[RoleName.PREFILL])


class Scaling:
    """Adds and removes nodes of `members`, whose mirrors are `mirrors`. `wanted`: the roles they are to have.

    `spawn` runs what goes on after the answer; `changed` is called when work may no longer go to a node.
    `changing` is held by whoever plans by the roles of the nodes, until they are what was planned.
    """

    def __init__(
        self,
        fleet: Fleet,
        members: Members,
        mirrors: Mapping[str, NodeMirror],
        wanted: Mapping[str, RoleName],
        spawn: Callable[[Coroutine[Any, Any, None]], None],
        changed: Callable[[], None],
        changing: asyncio.Lock,
    ) -> None:
        self._changing = changing
        self._fleet = fleet
        self._members = members
        self._mirrors = mirrors
        self._wanted = wanted
        self._spawn = spawn
        self._changed = changed

    async def set_nodes(
        self,
        count: int | None,
        *,
        role: RoleName | None = None,
        remove: Sequence[str] = (),
        dry_run: bool = False,
        drain_s: float,
    ) -> dict[str, Any]:
        """Begin to reach `count` nodes, or to remove some; say who comes and leaves: `/cluster` shows the rest.

        What a leaving node still serves after `drain_s` goes on elsewhere. Raises RequestError for what cannot
        be, NoCapacity where there is no room for more.
        """
        async with self._changing:
            return await self._set_nodes(count, role, remove, drain_s, dry_run=dry_run)

    async def _set_nodes(
        self, count: int | None, role: RoleName | None, remove: Sequence[str], drain_s: float, *, dry_run: bool
    ) -> dict[str, Any]:
        staying = [mirror for mirror in self._mirrors.values() if not mirror.leaving]
        # One that does not serve is the first to leave.
        nodes = [PoolNode(one.name, one.role, one.requests if one.serving else -1) for one in staying]
        plan = plan_leave(nodes, remove) if count is None else plan_scale(nodes, self._mirrors, count, role)
        if plan.added:
            await asyncio.to_thread(self._fleet.check_room, len(plan.added))
        if not dry_run:
            for name in plan.removed:
                self.send_away(name, drain_s)
            self._members.expect(plan.added)
            for name, its_role in plan.added.items():
                self._spawn(self._start(name, its_role))
            self._keep()
        return {
            "dry_run": dry_run,
            "before": len(nodes),
            "after": len(nodes) + len(plan.added) - len(plan.removed),
            "added": {name: str(its_role) for name, its_role in plan.added.items()},
            "removed": list(plan.removed),
        }

    def send_away(self, name: str, drain_s: float) -> None:
        """From now on a node is given nothing; it is ended when it has nothing left."""
        mirror = self._mirrors[name]
        mirror.leaving = True
        logger.info("%s leaves; %d requests go on there", name, mirror.requests)
        self._changed()
        self._spawn(self._drain(name, drain_s))

    async def _start(self, name: str, role: RoleName) -> None:
        try:
            node = await asyncio.to_thread(self._fleet.start, name, role)
        except SlosserveError as error:
            logger.warning("%s did not start: %s", name, error)
            if name in self._mirrors:
                self._members.fail_node(name, str(error))
            return
        mirror = self._mirrors.get(name)
        if mirror is None or mirror.leaving:  # it was sent away while it started
            await asyncio.to_thread(self._fleet.end, name)
            return
        self._members.add_node(name, str(node["address"]))

    async def _drain(self, name: str, drain_s: float) -> None:
        mirror = self._mirrors[name]
        idle_since_s = there_s = time.monotonic()
        deadline_s = there_s + drain_s
        while (now_s := time.monotonic()) < deadline_s and now_s - there_s < AWAY_S.get(mirror.state, 0.0):
            if mirror.state == "ready":
                there_s = now_s
            if mirror.requests or (mirror.report is not None and mirror.report.leases):
                idle_since_s = now_s
            elif now_s - idle_since_s > LEFT_S:
                break
            await asyncio.sleep(POLL_S)
        if mirror.state == "ready" and mirror.requests:
            logger.warning("%s: %d requests go on elsewhere: %g s are over", name, mirror.requests, drain_s)
        self._members.remove_node(name)  # first: its end is no loss
        await asyncio.to_thread(self._fleet.end, name)
        logger.info("%s is gone", name)

    def _keep(self) -> None:
        staying = [name for name, mirror in self._mirrors.items() if not mirror.leaving]
        self._fleet.keep({name: self._wanted[name] for name in staying})
