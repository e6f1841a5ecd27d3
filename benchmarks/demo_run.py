"""The traffic of the demo against one endpoint: requests sent at their time, and agents in loops."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
from openai import AsyncOpenAI, OpenAIError

from benchmarks import cluster_facts
from benchmarks.agent import Agent
from benchmarks.board import Tally
from benchmarks.client import Ask, Reply, send
from benchmarks.cluster_facts import Facts
from benchmarks.prompts import PromptWriter
from benchmarks.traces import Arrival
from engine.errors import ConfigError

AGENTS = 3
AGENT_CLASS = "tool"
ERROR_SAMPLES = 5
FACTS_EVERY_S = 1.0
VIEW_EVERY_S = 0.25
CONTEXT_MARGIN_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Workload:
    """What is sent: requests in order of time, how long agents go on, and the seed of all else."""

    arrivals: Sequence[Arrival]
    duration_s: float
    seed: int
    block_tokens: int = 512


class DemoRun:
    """One run. `show` is called a few times a second, with the run itself, to draw it."""

    def __init__(
        self,
        base_url: str,
        workload: Workload,
        show: Callable[[DemoRun], None],
        api_key: str | None = None,
        agents: int = AGENTS,
    ) -> None:
        self.workload = workload
        self.tallies: dict[str, Tally] = {}
        self.before: Facts = {}
        self.after: Facts = {}
        self.one_request: Facts = {}
        self.agents: list[Agent] = []
        self._show = show
        self._start_s = 0.0
        self._misfits: list[str] = []
        self._model = ""
        self._max_model_len = 0
        self._http = httpx.AsyncClient(base_url=base_url)
        self._openai = AsyncOpenAI(base_url=f"{base_url}/v1", api_key=api_key or "none", max_retries=0)
        self._writer = PromptWriter(workload.seed, workload.block_tokens)
        for number, rng in enumerate(np.random.default_rng(workload.seed).spawn(agents)):
            name = f"agent-{workload.seed}-{number}"
            self.agents.append(Agent(name, self._send, self._misfits.append, rng))

    @property
    def elapsed_s(self) -> float:
        """Seconds since the first request could be sent."""
        return time.monotonic() - self._start_s

    async def run(self) -> None:
        """Send everything and wait for every answer. Raises ConfigError if no cluster is there."""
        try:
            async with self._openai, self._http:
                await self._meet()
                self._start_s = time.monotonic()
                await self._traffic()
                self.after = await self._settled_facts()
                self.one_request = await self._typical_timeline()
        except OpenAIError as error:
            raise ConfigError(f"{self._openai.base_url}: {error}") from error

    def summary(self) -> dict[str, Any]:
        """Figures of the run, for people and machines."""
        replies = [reply for tally in self.tallies.values() for reply in tally.replies]
        failures = [reply.error for reply in replies if reply.error is not None] + self._misfits
        lateness_s = [reply.lateness_s for reply in replies if reply.slo_class != AGENT_CLASS] or [0.0]
        return {
            "requests": sum(tally.sent for tally in self.tallies.values()),
            "completed": sum(reply.error is None for reply in replies),
            "errors": len(failures),
            "error_samples": failures[:ERROR_SAMPLES],
            "tool_calls": sum(agent.tool_calls for agent in self.agents),
            "agent_sessions": sum(agent.sessions for agent in self.agents),
            **cluster_facts.handoffs(self.before, self.after),
            "placed_on_pairs": cluster_facts.placed_on_pairs(self.before, self.after),
            "placements": cluster_facts.placements(self.before, self.after),
            "attainment": cluster_facts.attainment(self.before, self.after),
            "engine": self.after.get("engine"),
            "transport": self.after.get("transport"),
            "model": self._model,
            "nodes": self.after.get("nodes"),
            "links": self.after.get("links"),
            "client": {name: tally.facts() for name, tally in self.tallies.items()},
            "client_lateness_p50_s": float(np.percentile(lateness_s, 50)),
            "client_lateness_p99_s": float(np.percentile(lateness_s, 99)),
            "one_request": self.one_request,
        }

    async def _meet(self) -> None:
        models = (await self._openai.models.list()).data
        if not models:
            raise ConfigError(f"{self._openai.base_url}: no model is served there")
        self._model = models[0].id
        self._max_model_len = int(getattr(models[0], "max_model_len", None) or 2**31)
        self.before = self.after = await cluster_facts.fetch_facts(self._http)
        for name in sorted({arrival.slo_class for arrival in self.workload.arrivals}):
            self.tallies[name] = Tally()
        self.tallies[AGENT_CLASS] = Tally()

    async def _traffic(self) -> None:
        watcher = asyncio.create_task(self._watch())
        try:
            async with asyncio.TaskGroup() as group:
                for number, arrival in enumerate(self.workload.arrivals):
                    group.create_task(self._send_at(arrival, self._ask(arrival, number)))
                for agent in self.agents:
                    group.create_task(agent.work(lambda: self.elapsed_s >= self.workload.duration_s))
        finally:
            watcher.cancel()
            await asyncio.wait([watcher])
        self._show(self)

    async def _watch(self) -> None:
        facts_due_s = 0.0
        while True:
            if self.elapsed_s >= facts_due_s:
                self.after = await cluster_facts.fetch_facts(self._http)
                facts_due_s = self.elapsed_s + FACTS_EVERY_S
            self._show(self)
            await asyncio.sleep(VIEW_EVERY_S)

    async def _send_at(self, arrival: Arrival, ask: Ask) -> None:
        await asyncio.sleep(max(0.0, arrival.at_s - self.elapsed_s))
        await self._send(ask, lateness_s=max(0.0, self.elapsed_s - arrival.at_s))

    async def _send(self, ask: Ask, lateness_s: float = 0.0) -> Reply:
        tally = self.tallies[ask.slo_class]
        tally.sent += 1
        reply = await send(self._openai, self._model, ask, lateness_s)
        tally.replies.append(reply)
        return reply

    def _ask(self, arrival: Arrival, number: int) -> Ask:
        room = self._max_model_len - CONTEXT_MARGIN_TOKENS
        out_tokens = min(arrival.out_tokens, room // 2)
        # A word may be more than one token for a model that is not ours: keep to half of what is left.
        fitting = Arrival(
            arrival.at_s,
            min(arrival.in_tokens, (room - out_tokens) // 2),
            out_tokens,
            arrival.slo_class,
            arrival.prefix_hashes,
        )
        return Ask(
            slo_class=arrival.slo_class,
            messages=[{"role": "user", "content": self._writer.write(fitting)}],
            max_tokens=out_tokens,
            slo={"class": arrival.slo_class},
            seed=self.workload.seed + number,
        )

    async def _settled_facts(self) -> Facts:
        """The cluster's facts once it has counted what it has just ended."""
        facts = await cluster_facts.fetch_facts(self._http)
        while True:
            await asyncio.sleep(FACTS_EVERY_S)
            newer = await cluster_facts.fetch_facts(self._http)
            if newer.get("placements") == facts.get("placements"):
                return newer
            facts = newer

    async def _typical_timeline(self) -> Facts:
        """Of the call on a pair (else of any) whose time to the first token is the median."""
        replies = [r for tally in self.tallies.values() for r in tally.replies]
        known = [r for r in replies if r.error is None and r.request_id is not None and r.ttft_s is not None]
        on_pairs = [r for r in known if r.placement is not None and ">" in r.placement]
        by_ttft = sorted(on_pairs or known, key=lambda reply: reply.ttft_s or 0.0)
        if not by_ttft:
            return {}
        request_id = by_ttft[len(by_ttft) // 2].request_id
        assert request_id is not None
        return await cluster_facts.fetch_timeline(self._http, request_id)
