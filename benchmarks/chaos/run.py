"""One scenario after another on a live cluster: the fault, what clients were told, and what was left behind."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.chaos.clients import Answer, Clients
from benchmarks.chaos.cluster import Cluster, Node, Watched, send
from benchmarks.chaos.hosts import Host
from benchmarks.chaos.scenarios import Load, Scenario
from coordinator.run_state import COORDINATOR
from engine.errors import SlosserveError
from kv_transfer import faults

Row = dict[str, Any]
WARM_S = 2.0  # of load before the fault
AFTER_S = 3.0  # of load after it, at least
SLOW_S = 0.1  # by turns stopped and going
FLOOD = 400
SLOW_MBIT_PER_S = 40  # 6 MB, the KV of a long prompt of `tiny`, take more than a second
KV_UNUSED = "KV not used"  # in an event of a request whose prompt was computed again
LEAVERS = 6  # clients that go away, at a time
MOMENTS: dict[str, Callable[[Node], bool]] = {
    "any": lambda node: True,
    "prefilling": lambda node: int(node["requests"]) > int(node["leases"]),
    "offering": lambda node: int(node["leases"]) > 0,
    "decoding": lambda node: int(node["running"]) > 0,
}


@dataclass(frozen=True, slots=True)
class Strike:
    """A fault: whom it struck, when, and how many requests were under way. `nodes`: those it takes away."""

    victim: str
    struck_s: float
    under_way: int
    nodes: Sequence[str] = ()


class Chaos:
    """Puts faults into a cluster. `lease_s`: after so long no KV may be left in use. `spared`: nodes that are
    not killed. `hosts`: what it is on. `fault_folder`: where its engines look for what is to go wrong.
    """

    def __init__(
        self,
        cluster: Cluster,
        model: str,
        seed: int,
        lease_s: float,
        spared: Collection[str] = (),
        hosts: Sequence[Host] = (),
        fault_folder: Path = Path(),
    ) -> None:
        self._cluster = cluster
        self._hosts = hosts
        self._model = model
        self._seed = seed
        self._lease_s = lease_s
        self._spared = spared
        self._fault_folder = fault_folder
        self._alone: dict[Load, list[list[int]]] = {}
        self._gone: set[str] = set()  # endpoints that were killed

    async def run(self, scenario: Scenario) -> Row:
        """One scenario. Raises SlosserveError where it cannot be carried out, or a node does not come back."""
        await self._cluster.well()
        urls = [url for url in self._cluster.urls if url not in self._gone]
        clients = Clients(urls, self._model, scenario.load, self._seed)
        try:
            return await self._run(scenario, clients)
        finally:
            await clients.close()

    async def _run(self, scenario: Scenario, clients: Clients) -> Row:
        await self.learn(scenario.load, clients)
        blocks_before = await self._cluster.idle(self._lease_s)
        watched = Watched()
        watching = asyncio.create_task(self._cluster.watch(watched))
        clients.start()
        await asyncio.sleep(WARM_S)
        try:
            strike = await self.strike(scenario, clients)
            await asyncio.sleep(AFTER_S)
            well_s = await self._cluster.well()
        finally:
            answers = await clients.stop()
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching
        blocks_after = await self._cluster.idle(self._lease_s + 5.0)
        struck_s = strike.struck_s
        lost_s = [watched.lost_s.get(node) for node in strike.nodes]
        detected_s = None if not lost_s or None in lost_s else max(at for at in lost_s if at is not None)
        return {
            "name": scenario.name,
            "contract": scenario.contract,
            "victim": strike.victim,
            "struck_at_s": round(time.time() - (time.monotonic() - struck_s), 3),
            "in_flight": strike.under_way,
            "requests": len(answers),
            **self.judged(scenario.load, answers, scenario.allowed),
            **await self._recorded(answers),
            "detection_s": None if detected_s is None else round(detected_s - struck_s, 3),
            "well_again_s": round(well_s, 1),
            "blocks_before": blocks_before,
            "blocks_after": blocks_after,
            "blocks_leaked": blocks_after - blocks_before,
        }

    # ---- what is told ------------------------------------------------------------------------------------

    async def learn(self, load: Load, clients: Clients) -> None:
        """What the prompts of a load are answered while nothing is broken, unless that is known."""
        if load not in self._alone:
            self._alone[load] = await clients.alone()
            clients.answers.clear()

    def judged(self, load: Load, answers: Sequence[Answer], allowed: Collection[int]) -> Row:
        """Answers against what the same prompts got while nothing was broken. `allowed`: HTTP statuses."""
        alone = self._alone[load]
        failed = [answer for answer in answers if answer.error is not None]
        turned_away = [one for one in failed if one.status in allowed and one.retry_after is not None]
        cut_off = [one for one in failed if one.url in self._gone]
        errors = [one for one in failed if one not in turned_away and one not in cut_off]
        wrong = sum(
            sum(said != right for said, right in zip(answer.tokens, alone[answer.prompt], strict=False))
            + max(len(answer.tokens) - len(alone[answer.prompt]), 0)
            for answer in answers
        )
        return {
            "client_errors": len(errors),
            "errors": sorted({f"{one.status}: {one.error}" for one in errors})[:5],
            "turned_away": len(turned_away),
            "cut_off": len(cut_off),
            "wrong_tokens": wrong,
            "tokens": sum(len(answer.tokens) for answer in answers),
        }

    async def _recorded(self, answers: Sequence[Answer]) -> Row:
        """By the endpoints' own records: gaps of streams that went on elsewhere, and pulls that took long."""
        records = [
            await self._cluster.record(answer.url, answer.request_id) or {}
            for answer in answers
            if answer.request_id is not None and answer.url not in self._gone
        ]
        gaps_s = [gap_s for record in records for gap_s in record.get("gaps_s") or []]
        pulls_s = [pull["pull_s"] or 0.0 for record in records if (pull := record.get("decode"))]
        unused = [event for record in records for event in record.get("events") or [] if KV_UNUSED in event]
        quantiles = np.quantile(gaps_s, (0.5, 0.99)) if gaps_s else (None, None)
        names = ("resume_gap_p50_s", "resume_gap_p99_s")
        rounded = (None if quantile is None else round(float(quantile), 3) for quantile in quantiles)
        return {
            "resumed": len(gaps_s),
            **dict(zip(names, rounded, strict=True)),
            "longest_pull_s": round(max(pulls_s, default=0.0), 3),
            "kv_not_used": len(unused),
        }

    # ---- what is done ------------------------------------------------------------------------------------

    async def strike(self, scenario: Scenario, clients: Clients) -> Strike:
        """The fault."""
        actions: dict[str, Callable[[Scenario, Clients], Awaitable[Strike]]] = {
            "kill": self._signal,
            "stop": self._signal,
            "slow": self._slow,
            "hang up": self._hang_up,
            "kill coordinator": self._kill_coordinator,
            "kill endpoint": self._kill_endpoint,
            "kill ray head": self._kill_ray_head,
            "flood": self._flood,
            "rebalance": self._rebalance,
            "cut": self._cut,
            "corrupt": self._corrupt,
        }
        return await actions[scenario.action](scenario, clients)

    async def _victim(self, scenario: Scenario) -> Node:
        spared = self._spared if scenario.action == "kill" else ()
        suits = MOMENTS[scenario.moment]
        return await self._cluster.strike(
            scenario.role, lambda node: node["name"] not in spared and suits(node)
        )

    async def _signal(self, scenario: Scenario, clients: Clients) -> Strike:
        node = await self._victim(scenario)
        number = signal.SIGKILL if scenario.action == "kill" else signal.SIGSTOP
        send(node["pid"], number)
        struck_s, under_way = time.monotonic(), clients.under_way()
        if scenario.action == "stop":
            await asyncio.sleep(scenario.seconds)
            send(node["pid"], signal.SIGCONT)
        return Strike(node["name"], struck_s, under_way, [node["name"]])

    async def _slow(self, scenario: Scenario, clients: Clients) -> Strike:
        node = await self._victim(scenario)
        struck_s, under_way = time.monotonic(), clients.under_way()
        while time.monotonic() - struck_s < scenario.seconds:
            send(node["pid"], signal.SIGSTOP)
            await asyncio.sleep(SLOW_S)
            send(node["pid"], signal.SIGCONT)
            await asyncio.sleep(SLOW_S)
        return Strike(node["name"], struck_s, under_way, [node["name"]])

    async def _hang_up(self, scenario: Scenario, clients: Clients) -> Strike:
        struck_s, under_way, numbers = time.monotonic(), clients.under_way(), random.Random(self._seed)
        while time.monotonic() - struck_s < scenario.seconds:
            url = numbers.choice([url for url in self._cluster.urls if url not in self._gone])
            leaving = [
                clients.ask(numbers.randrange(len(self._alone[scenario.load])), url, numbers.expovariate(4.0))
                for _ in range(LEAVERS)
            ]
            await asyncio.gather(*leaving)
        return Strike("clients", struck_s, under_way)

    async def _kill_coordinator(self, scenario: Scenario, clients: Clients) -> Strike:
        process = self._cluster.process
        send(process.pids["coordinator"], signal.SIGKILL)
        struck_s, under_way = time.monotonic(), clients.under_way()
        await asyncio.to_thread(process.restart, COORDINATOR)
        return Strike("coordinator", struck_s, under_way)

    async def _kill_endpoint(self, scenario: Scenario, clients: Clients) -> Strike:
        if len(self._cluster.urls) - len(self._gone) < 2:
            raise SlosserveError("one endpoint must be left: give endpoint.count 2 or more")
        label = f"endpoint-{len(self._cluster.urls) - 1}"
        self._gone.add(self._cluster.urls[-1])
        send(self._cluster.process.pids[label], signal.SIGKILL)
        return Strike(label, time.monotonic(), clients.under_way())

    async def _kill_ray_head(self, scenario: Scenario, clients: Clients) -> Strike:
        (head,) = [process for process in self._hosts[0].processes() if process.name() == "gcs_server"]
        send(head.pid, signal.SIGKILL)
        return Strike("ray head", time.monotonic(), clients.under_way())

    async def _flood(self, scenario: Scenario, clients: Clients) -> Strike:
        struck_s, under_way = time.monotonic(), clients.under_way()
        asked = [clients.ask(n % len(self._alone[scenario.load]), self._cluster.urls[0]) for n in range(FLOOD)]
        await asyncio.gather(*asked)
        return Strike("cluster", struck_s, under_way)

    async def _rebalance(self, scenario: Scenario, clients: Clients) -> Strike:
        struck_s, under_way = time.monotonic(), clients.under_way()
        nodes = (await self._cluster.nodes()).values()
        sizes = {role: sum(node["role"] == role for node in nodes) for role in ("prefill", "decode", "mixed")}
        total = len(nodes)
        others = ({"prefill": 1, "decode": total - 1}, {"prefill": 0, "decode": 0, "mixed": total})
        turn = 0
        while time.monotonic() - struck_s < scenario.seconds:
            await self._cluster.set_pools(**others[turn % len(others)])
            turn += 1
            await asyncio.sleep(0.7)
        await self._cluster.set_pools(**sizes)
        return Strike("roles", struck_s, under_way)

    async def _corrupt(self, scenario: Scenario, clients: Clients) -> Strike:
        asked = self._fault_folder / faults.CORRUPT
        asked.parent.mkdir(parents=True, exist_ok=True)
        struck_s, under_way = time.monotonic(), clients.under_way()
        asked.touch()
        try:
            await asyncio.sleep(scenario.seconds)
        finally:
            asked.unlink()
        return Strike("transfers", struck_s, under_way)

    async def _cut(self, scenario: Scenario, clients: Clients) -> Strike:
        host = self._hosts[-1]

        def is_there(node: Node) -> bool:
            return f"//{host.address}:" in node["address"]

        away = [name for name, node in (await self._cluster.nodes()).items() if is_there(node)]
        suits = MOMENTS[scenario.moment]
        # A transfer within a host is over at once: an offer that is seen now is on its way over the link.
        host.slow(SLOW_MBIT_PER_S)
        try:
            await self._cluster.strike(scenario.role, lambda node: is_there(node) and suits(node))
            host.cut()
            struck_s, under_way = time.monotonic(), clients.under_way()
            await asyncio.sleep(scenario.seconds)
        finally:
            host.mend()
            host.quicken()
        return Strike(host.address, struck_s, under_way, away)
