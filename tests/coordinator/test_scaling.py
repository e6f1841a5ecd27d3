"""Nodes come and go while others serve: who is chosen, that nothing new goes to one that leaves, and that a
coordinator that takes over knows."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator import scaling
from coordinator.mirror import NodeMirror
from coordinator.pools import PoolNode
from coordinator.scaling import Scaling, plan_scale
from engine.errors import EngineStartError, NoCapacity, RequestError
from engine.request import RoleName
from tests.coordinator.test_rebalance import report

P, D, M = RoleName.PREFILL, RoleName.DECODE, RoleName.MIXED


def pool(*roles: RoleName, requests: int = 1) -> list[PoolNode]:
    return [PoolNode(f"n{at}", role, requests) for at, role in enumerate(roles)]


def after(nodes: list[PoolNode], count: int, role: RoleName | None = None) -> list[RoleName]:
    plan = plan_scale(nodes, {node.name for node in nodes}, count, role)
    left = [node.role for node in nodes if node.name not in plan.removed]
    return sorted([*left, *plan.added.values()])


@pytest.mark.parametrize(
    ("before", "count", "wanted"),
    [
        ([P, D], 4, [P, P, D, D]),
        ([P, D, D], 6, [P, P, D, D, D, D]),
        ([P, P, D, D, D, D], 3, [P, D, D]),
        ([M, M], 5, [M] * 5),
        ([P, D, M], 2, [D, M]),
        ([P, D], 1, [D]),
    ],
)
def test_pools_keep_their_shares(before: list[RoleName], count: int, wanted: list[RoleName]) -> None:
    assert after(pool(*before), count) == sorted(wanted)


ROLES = st.lists(st.sampled_from(RoleName), min_size=1, max_size=8)


def serves(roles: list[RoleName]) -> bool:
    return D in roles or (M in roles and P not in roles)


@given(ROLES.filter(serves), st.integers(1, 12), st.none() | st.sampled_from(RoleName))
def test_a_plan_has_the_count_that_was_asked_for_and_what_is_left_serves(
    before: list[RoleName], count: int, role: RoleName | None
) -> None:
    nodes = pool(*before)
    try:
        plan = plan_scale(nodes, {node.name for node in nodes}, count, role)
    except RequestError:
        return
    assert len(nodes) + len(plan.added) - len(plan.removed) == count
    assert not (plan.added and plan.removed)
    assert len(set(plan.removed)) == len(plan.removed)
    assert not set(plan.added) & {node.name for node in nodes}
    left = [node.role for node in nodes if node.name not in plan.removed]
    assert serves([*left, *plan.added.values()])
    touched = [*plan.added.values(), *(node.role for node in nodes if node.name in plan.removed)]
    assert role is None or set(touched) <= {role}


def test_the_least_loaded_leave_and_before_them_those_that_do_not_serve() -> None:
    nodes = [PoolNode("a", D, 5), PoolNode("b", D, 2), PoolNode("c", P, 0), PoolNode("d", P, -1)]
    assert plan_scale(nodes, set(), 3).removed == ["d"]
    assert plan_scale(nodes, set(), 2).removed == ["d", "b"]


@pytest.mark.parametrize(
    ("before", "count", "role", "told"),
    [
        ([P, D], 1, D, "of 1 prefill, 1 decode no decode can leave"),
        ([P, D], 0, None, "slosserve down"),
        ([P, D, D], 1, D, "can leave"),
        ([M, M], 1, P, "no prefill can leave"),
        ([M], 2, P, "--role decode"),
        ([P, D], 2, D, "slosserve rebalance"),
    ],
)
def test_what_would_leave_nothing_that_serves_is_refused_with_what_to_do(
    before: list[RoleName], count: int, role: RoleName | None, told: str
) -> None:
    with pytest.raises(RequestError, match=told):
        plan_scale(pool(*before), set(), count, role)


class Cluster:
    """A fleet and its coordinator: nodes that start or do not, and reports as the test makes them."""

    def __init__(self, *roles: RoleName, room: int = 9, fails: str | None = None) -> None:
        self.mirrors = {f"n{at}": NodeMirror(f"n{at}", f"tcp://n{at}", role) for at, role in enumerate(roles)}
        self.wanted = {name: mirror.role for name, mirror in self.mirrors.items()}
        for name, mirror in self.mirrors.items():
            mirror.take_report(report(name, mirror.role), 0.0)
        self.room, self.fails = room, fails
        self.ended: list[str] = []
        self.kept: Mapping[str, RoleName] = {}
        self.tasks: list[asyncio.Task[None]] = []
        self.scaling = Scaling(self, self, self.mirrors, self.wanted, self.spawn, lambda: None, asyncio.Lock())

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        self.tasks.append(asyncio.get_running_loop().create_task(coroutine))

    def check_room(self, nodes: int) -> None:
        if nodes > self.room:
            raise NoCapacity("no room")

    def start(self, name: str, role: RoleName) -> dict[str, Any]:
        if name == self.fails:
            raise EngineStartError("no memory")
        return {"name": name, "address": f"tcp://{name}", "role": str(role), "pid": 1}

    def end(self, name: str) -> None:
        self.ended.append(name)

    def keep(self, names: Mapping[str, RoleName]) -> None:
        self.kept = names

    def expect(self, names: Mapping[str, RoleName]) -> None:
        self.wanted |= names
        self.mirrors |= {name: NodeMirror(name, "", role) for name, role in names.items()}

    def add_node(self, name: str, address: str) -> None:
        self.mirrors[name].take_report(report(name, self.wanted[name]), 0.0)

    def fail_node(self, name: str, reason: str) -> None:
        self.mirrors[name].state = f"failed: {reason}"

    def remove_node(self, name: str) -> None:
        assert name not in self.ended, "it is forgotten before it ends: else its end would be a loss"
        del self.mirrors[name]

    async def scale(self, count: int | None, **more: Any) -> dict[str, Any]:
        return await self.scaling.set_nodes(count, **{"drain_s": 60.0, **more})

    async def settled(self) -> None:
        await asyncio.gather(*self.tasks)


@pytest.fixture(autouse=True)
def _soon_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "LEFT_S", 0.05)
    monkeypatch.setattr(scaling, "POLL_S", 0.01)


async def test_a_node_that_comes_is_seen_at_once_and_serves_when_it_is_up() -> None:
    cluster = Cluster(P, D)
    answer = await cluster.scale(3, role=D)
    assert answer["added"] == {"decode-0": "decode"}
    assert cluster.mirrors["decode-0"].state == "starting"
    await cluster.settled()
    assert cluster.mirrors["decode-0"].serving
    assert cluster.kept == {"n0": P, "n1": D, "decode-0": D}


async def test_a_node_that_leaves_gets_nothing_new_and_ends_when_what_it_serves_is_over() -> None:
    cluster = Cluster(P, D, D)
    for name in ("n1", "n2"):
        cluster.mirrors[name].take_report(report(name, D, prompts=2), 0.0)
    answer = await cluster.scale(2)
    (leaving,) = answer["removed"]
    assert not cluster.mirrors[leaving].serving
    assert leaving not in cluster.kept, "a coordinator that takes over does not start it again"
    await asyncio.sleep(0.2)
    assert cluster.ended == []
    cluster.mirrors[leaving].take_report(report(leaving, D), 0.0)
    await cluster.settled()
    assert cluster.ended == [leaving]
    assert leaving not in cluster.mirrors


async def test_a_node_that_does_not_get_done_is_ended_when_its_time_is_over() -> None:
    cluster = Cluster(D, D)
    cluster.mirrors["n1"].take_report(report("n1", D, prompts=2), 0.0)
    cluster.mirrors["n0"].take_report(report("n0", D, prompts=3), 0.0)
    await cluster.scale(1, drain_s=0.1)
    await cluster.settled()
    assert cluster.ended == ["n1"]


async def test_a_node_that_falls_silent_while_it_leaves_is_waited_for_and_not_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(scaling.AWAY_S, "lost", 0.3)
    cluster = Cluster(D, D)
    cluster.mirrors["n0"].take_report(report("n0", D, prompts=3), 0.0)
    cluster.mirrors["n1"].take_report(report("n1", D, prompts=2), 0.0)
    await cluster.scale(1)
    leaving = cluster.mirrors["n1"]
    leaving.lose()
    await asyncio.sleep(0.15)
    leaving.take_report(report("n1", D, prompts=2), 0.0)
    await asyncio.sleep(0.3)
    assert cluster.ended == [], "it is back, and goes on"
    leaving.lose()
    await cluster.settled()
    assert cluster.ended == ["n1"]


async def test_a_coordinator_that_takes_over_goes_on_with_a_leave_and_ends_nobody_before_it_knows_him() -> None:
    cluster = Cluster(D, D)
    cluster.mirrors["n1"] = NodeMirror("n1", "tcp://n1", M)  # of which nothing was reported yet
    cluster.scaling.send_away("n1", 60.0)
    await asyncio.sleep(0.02)
    assert cluster.ended == []
    cluster.mirrors["n1"].take_report(report("n1", D, prompts=2), 0.0)
    await asyncio.sleep(0.15)
    assert cluster.ended == [], "it still serves"
    cluster.mirrors["n1"].take_report(report("n1", D), 0.0)
    await cluster.settled()
    assert cluster.ended == ["n1"]


async def test_no_room_changes_nothing() -> None:
    cluster = Cluster(P, D, room=1)
    with pytest.raises(NoCapacity, match="no room"):
        await cluster.scale(4)
    assert list(cluster.mirrors) == ["n0", "n1"]


async def test_a_dry_run_changes_nothing() -> None:
    cluster = Cluster(P, D)
    assert len((await cluster.scale(4, dry_run=True))["added"]) == 2
    assert (list(cluster.mirrors), cluster.kept, cluster.tasks) == (["n0", "n1"], {}, [])


async def test_a_node_that_does_not_start_is_shown_with_the_reason_and_is_the_first_to_leave() -> None:
    cluster = Cluster(D, D, fails="decode-0")
    await cluster.scale(3)
    await cluster.settled()
    assert cluster.mirrors["decode-0"].state == "failed: no memory"
    assert (await cluster.scale(2))["removed"] == ["decode-0"]
    await cluster.settled()
    assert list(cluster.mirrors) == ["n0", "n1"]


async def test_nodes_leave_by_name_unless_what_is_left_serves_nothing() -> None:
    cluster = Cluster(P, D, M)
    with pytest.raises(RequestError, match="no node n7; there are n0, n1, n2"):
        await cluster.scale(None, remove=["n7"])
    with pytest.raises(RequestError, match=r"left \(1 prefill\) could serve nothing"):
        await cluster.scale(None, remove=["n1", "n2"])
    assert (await cluster.scale(None, remove=["n0", "n2"]))["after"] == 1
    await cluster.settled()
    assert list(cluster.mirrors) == ["n1"]
