"""The cluster that faults are put into: its processes, what it tells of itself, and when it is well again."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from coordinator.cluster_process import ClusterProcess
from engine.errors import SlosserveError

POLL_S = 0.02
WATCH_S = 0.05
NEVER_S = 60.0  # no moment to strike came in so long
WELL_S = 180.0  # nodes are back after so long, or are not coming back
Node = Mapping[str, Any]


@dataclass(slots=True)
class Watched:
    """What was seen of the nodes: when each was first found to be lost."""

    lost_s: dict[str, float] = field(default_factory=dict)


class Cluster:
    """A running cluster as the first endpoint tells of it."""

    def __init__(self, process: ClusterProcess) -> None:
        self.process = process
        self.urls = list(process.state.urls)
        self._http = httpx.AsyncClient(timeout=30.0)

    async def close(self) -> None:
        """Let go of the connection."""
        await self._http.aclose()

    async def nodes(self) -> dict[str, Node]:
        """By name, as `/cluster` shows them."""
        state = (await self._http.get(f"{self.urls[0]}/cluster")).raise_for_status().json()
        return {node["name"]: node for node in state["nodes"]}

    async def record(self, url: str, request_id: str) -> dict[str, Any] | None:
        """What an endpoint remembers of a request."""
        response = await self._http.get(f"{url}/requests/{request_id}")
        return response.json() if response.status_code == httpx.codes.OK else None

    async def role_changes(self) -> list[dict[str, Any]]:
        """Nodes that took another role, as the coordinator remembers them, first to last."""
        state = (await self._http.get(f"{self.urls[0]}/cluster")).raise_for_status().json()
        return list(state["rebalancing"]["changes"])

    async def set_pools(self, **sizes: int) -> None:
        """Roles as asked for. Raises SlosserveError if they are refused."""
        key = self.process.admin_key
        headers = {"authorization": f"Bearer {key}"} if key else {}
        response = await self._http.post(f"{self.urls[0]}/cluster/pools", json=sizes, headers=headers)
        if response.is_error:
            raise SlosserveError(f"pools were not changed: {response.text[:300]}")

    async def strike(self, role: str, suits: Callable[[Node], bool]) -> Node:
        """The node of a pool that has most to do, once one is at the moment that is wanted.

        Raises SlosserveError if that does not come.
        """
        deadline_s = time.monotonic() + NEVER_S
        while time.monotonic() < deadline_s:
            pool = [node for node in (await self.nodes()).values() if node["role"] == role and suits(node)]
            if pool:
                return max(pool, key=lambda node: int(node["requests"]))
            await asyncio.sleep(POLL_S)
        raise SlosserveError(f"no {role} node was at the moment to be struck within {NEVER_S:g} s")

    async def watch(self, watched: Watched) -> None:
        """Note when nodes are found lost, until cancelled."""
        while True:
            try:
                for node in (await self.nodes()).values():
                    if node["state"] != "ready":
                        watched.lost_s.setdefault(node["name"], time.monotonic())
            except (httpx.HTTPError, KeyError, ValueError):
                pass  # nobody answers for a moment: the coordinator is what was struck
            await asyncio.sleep(WATCH_S)

    async def blocks(self) -> int:
        """KV blocks in use on all nodes."""
        return sum(int(node["used_blocks"]) for node in (await self.nodes()).values())

    async def well(self) -> float:
        """Seconds until every node serves. Raises SlosserveError with those that do not come back."""
        began_s, ill = time.monotonic(), {"cluster": "silent"}
        while time.monotonic() - began_s < WELL_S:
            try:
                nodes = await self.nodes()
                ill = {name: node["state"] for name, node in nodes.items() if node["state"] != "ready"}
                ready = (await self._http.get(f"{self.urls[0]}/health/ready")).status_code == httpx.codes.OK
                if not ill and ready:
                    return time.monotonic() - began_s
            except httpx.HTTPError:
                pass
            await asyncio.sleep(0.1)
        raise SlosserveError(f"after {WELL_S:g} s: {ill}")

    async def idle(self, within_s: float) -> int:
        """KV blocks in use once nobody is served, or after so long."""
        deadline_s = time.monotonic() + within_s
        while True:
            nodes = (await self.nodes()).values()
            left = sum(int(node["used_blocks"]) + int(node["requests"]) + int(node["leases"]) for node in nodes)
            if not left or time.monotonic() > deadline_s:
                return await self.blocks()
            await asyncio.sleep(0.1)


def send(pid: int, number: signal.Signals) -> None:
    """A signal; to one that is gone already, nothing."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
