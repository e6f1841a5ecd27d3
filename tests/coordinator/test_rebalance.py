"""Changing roles while nodes serve: on demand or by the load; and only what a node says of itself is
believed."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace

import pytest

from coordinator.mirror import NodeMirror
from coordinator.pool_policy import PATIENCE, WINDOW_S
from coordinator.rebalance import Rebalancer
from engine.base import EngineInfo, Usage
from engine.cost import StepCost
from engine.errors import SlosserveError
from engine.messages import Report, RoleSet, WorkState
from engine.request import RoleName, WorkKind
from kv_transfer.base import PeerAddress

P, D, M = RoleName.PREFILL, RoleName.DECODE, RoleName.MIXED
INFO = EngineInfo("vllm", "tiny", "e", 32, 1000, 4096, 4, 2048, 4096, "nixl")


def report(name: str, role: RoleName, *, used_blocks: int = 0, prompts: int = 0) -> Report:
    works = [
        WorkState(f"{name}-{n}", 1, WorkKind.PREFILL, 2048, 2048, 0, 10, 1.0, 0.1, best_effort=True)
        for n in range(prompts)
    ]
    line = StepCost.line(0.003, 0.0001)
    return Report(
        node=name, boot_id="b", role=role, info=INFO, kv=PeerAddress(name, "127.0.0.1", 1),
        usage=Usage(used_blocks, 1000, 0, 0), works=works, leases=[], pulls=[], cost=line, idle_cost=line,
        promises_preempted=0, promises_starved=0, cost_margin=0.0, steps=0, step_s=0.0, stuck_s=0.0,
        local_prefills=0, corrupt_pulls=0, pid=1,
    )  # fmt: skip


class Pools:
    """Nodes that take the roles they are given, or keep those they have."""

    def __init__(self, *roles: RoleName, obedient: bool = True) -> None:
        self.mirrors = {f"n{at}": NodeMirror(f"n{at}", f"tcp://n{at}", role) for at, role in enumerate(roles)}
        self.asked: list[tuple[str, RoleName]] = []
        self.told = 0
        self.slow_s = 0.0
        self.obedient = obedient
        self.lacked: Counter[RoleName] = Counter()
        self.rebalancer = Rebalancer(self.mirrors, self._set_role, self._tell, self.lacked)
        for name, mirror in self.mirrors.items():
            self.report(name, mirror.role)

    def report(self, name: str, role: RoleName, **facts: int) -> None:
        self.mirrors[name].take_report(report(name, role, **facts), now_s=0.0)

    async def _set_role(self, name: str, role: RoleName) -> RoleSet:
        self.asked.append((name, role))
        await asyncio.sleep(self.slow_s)
        return RoleSet(1, role if self.obedient else self.mirrors[name].role)

    def _tell(self) -> None:
        self.told += 1

    @property
    def roles(self) -> list[RoleName]:
        return [mirror.role for mirror in self.mirrors.values()]


async def test_sizes_are_set_while_nodes_serve_and_what_changed_is_told() -> None:
    pools = Pools(P, D)
    pools.report("n0", P, prompts=3)
    answer = await pools.rebalancer.set_sizes({P: 0, D: 2}, dry_run=False)
    assert pools.roles == [D, D]
    assert answer["before"] == {"n0": "prefill", "n1": "decode"}
    assert answer["after"] == {"n0": "decode", "n1": "decode"}
    (change,) = answer["changes"]
    assert (change["node"], change["requests"], change["why"]) == ("n0", 3, "asked for")
    assert pools.told == 1, "endpoints place what carries no promise by the roles they were told last"
    assert pools.rebalancer.wanted["n0"] is D, "it begins anew in this role"


async def test_two_who_set_sizes_at_once_leave_no_pool_empty() -> None:
    """The second would take the node that the first one leaves to decode: it is the least busy meanwhile."""
    pools, wanted = Pools(P, D, D, D), {P: 3, D: 1}
    pools.report("n3", D, prompts=5)
    pools.slow_s = 0.05
    first = asyncio.create_task(pools.rebalancer.set_sizes(wanted, dry_run=False))
    while len(pools.asked) < 2:
        await asyncio.sleep(0.005)
    pools.report("n3", D)
    pools.report("n2", D, prompts=5)
    second = await pools.rebalancer.set_sizes(wanted, dry_run=False)
    assert len((await first)["flips"]) == 2
    assert Counter(pools.roles) == wanted
    assert second["flips"] == [], "it finds what the first has made"


async def test_a_dry_run_asks_no_node() -> None:
    pools = Pools(P, D)
    answer = await pools.rebalancer.set_sizes({P: 0, D: 2}, dry_run=True)
    assert answer["after"] == {"n0": "decode", "n1": "decode"}
    assert (pools.asked, pools.roles) == ([], [P, D])


async def test_a_node_that_keeps_its_role_is_an_error_that_says_so() -> None:
    pools = Pools(P, D, obedient=False)
    with pytest.raises(SlosserveError, match="n0 was asked to be a decode node and says that it is a prefill"):
        await pools.rebalancer.set_sizes({P: 0, D: 2}, dry_run=False)
    assert pools.roles == [P, D]


async def follow(pools: Pools, windows: int, lacked: RoleName | None = None) -> None:
    for window in range(windows):
        if lacked is not None:
            pools.lacked[lacked] += 1
        await pools.rebalancer.review(100.0 + window * WINDOW_S)


async def test_pools_that_follow_the_load_give_the_one_that_is_short_the_least_loaded_node() -> None:
    pools = Pools(P, D, D)
    pools.report("n1", D, used_blocks=200)
    pools.mirrors["n1"].place(replace(report("x", P, prompts=1).works[0], kind=WorkKind.DECODE), 0.0)
    pools.rebalancer.follow(True)
    await follow(pools, PATIENCE + 2, lacked=P)
    assert pools.asked == [("n2", P)]
    assert "turned away" in pools.rebalancer.state()["changes"][0]["why"]


async def test_prompts_that_wait_are_seen_in_what_nodes_report() -> None:
    pools = Pools(P, D, D)
    pools.report("n0", P, prompts=20)  # 0.2 s each
    pools.rebalancer.follow(True)
    await follow(pools, PATIENCE + 2)
    assert pools.roles.count(P) == 2
    assert "prompts wait" in pools.rebalancer.state()["changes"][0]["why"]


async def test_nothing_follows_the_load_unless_asked_to_and_sizes_that_are_set_stay() -> None:
    pools = Pools(P, D, D)
    await follow(pools, 20, lacked=P)
    assert pools.asked == []
    pools.rebalancer.follow(True)
    await pools.rebalancer.set_sizes({P: 1, D: 2}, dry_run=False)
    await follow(pools, 20, lacked=P)
    assert pools.asked == []
    assert pools.rebalancer.state()["says"] == "sizes are as they were set"


async def test_a_cluster_without_pools_has_nothing_to_follow() -> None:
    pools = Pools(M, M)
    pools.rebalancer.follow(True)
    await follow(pools, 20, lacked=P)
    assert pools.asked == []
