"""A real node asked over HTTP: open-loop runs, and what a lone request takes beside its steps."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import psutil

from benchmarks.cluster_facts import Facts, fetch_facts, fetch_timeline
from benchmarks.open_loop import TIMEOUT_S, Sent, Writer, by_class, followers, send, send_all
from benchmarks.workload import Workload
from engine.cost import StepCost
from engine.errors import EngineError
from engine.models import load_recipe

LONE_PROMPTS = (32, 64, 128, 256, 512)
LONE_OUTPUT, LONE_ROUNDS = 64, 3  # of a usual step, the last 64 are all but a thousandth
TOLD_S = 0.5  # by then the coordinator has the node's report of what has just ended
REST_S = 3.0  # before a run: what the last one taught the node of its speed fades meanwhile
FACTS_EVERY_S = 2.0
KEPT_ALIVE_S = 2.0  # uvicorn drops a connection after 5 s: a request sent in that moment would be lost


@dataclass(frozen=True, slots=True)
class Lone:
    """A request that had the node to itself: when the client had its tokens, and what the node says of it.

    `step_s`: a usual step, as the node measured it. `at_node_s`: from its submission to its first token there.
    """

    prompt_tokens: int
    token_times_s: list[float]
    step_s: float
    at_node_s: float

    @property
    def tpot_s(self) -> float:
        """Between two tokens, at the client."""
        return (self.token_times_s[-1] - self.token_times_s[0]) / (len(self.token_times_s) - 1)


@dataclass(frozen=True, slots=True)
class Served:
    """A run: what came of each request, what the node said of itself meanwhile, and who else was at work.

    `placing`: what the last decisions of the coordinator took. `other_cores`: cores of the machine that were
    busy with neither the cluster nor the client, on average.
    """

    sent: list[Sent]
    node: list[Facts]
    placing: Facts
    other_cores: float

    def facts(self) -> Facts:
        """Of the node: how far its steps were from what it measured at the start, and what it gave up."""
        busy = [one for one in self.node if one["running"]] or self.node
        return {
            "step_over_predicted": float(np.mean([one["cost_drift"] for one in busy])),
            "cost_margin": float(np.mean([one["cost_margin"] for one in busy])),
            "promises_preempted": self.node[-1]["promises_preempted"] - self.node[0]["promises_preempted"],
            "placing": self.placing,
            "other_cores": self.other_cores,
        }


class RealNode:
    """The endpoint of a cluster with one node of the model `recipe`. `seed`: of prompts."""

    def __init__(self, base_url: str, recipe: str, seed: int) -> None:
        self._base_url = base_url
        self._vocab_size = load_recipe(recipe).vocab_size
        # One for all runs: runs of a seed have the same lengths, and with the same tokens in them the prefix
        # cache would have every prompt from the second run on.
        self._rng = np.random.default_rng([seed, self._vocab_size])

    async def facts(self) -> Facts:
        """What the cluster says of itself."""
        async with self._client() as client:
            return await fetch_facts(client)

    async def lone(self, slo_class: str) -> list[Lone]:
        """Requests one at a time. The first round, which warms up, is not told of.

        Raises EngineError for one that fails.
        """
        gone = []
        async with self._client() as client:
            writer = await self._writer(client)
            for prompt in LONE_PROMPTS * (LONE_ROUNDS + 1):
                body = writer.body(prompt, LONE_OUTPUT, 2 * LONE_OUTPUT, {"class": slo_class})
                sent = await send(client, json.dumps(body).encode(), time.perf_counter())
                if sent.error is not None or len(sent.token_times_s) != LONE_OUTPUT:
                    raise EngineError(f"a lone request gave {len(sent.token_times_s)} tokens: {sent.error}")
                await asyncio.sleep(TOLD_S)
                step_s = (await _node(client))["step_ms"] / 1e3
                timeline = await fetch_timeline(client, str(sent.request_id))
                gone.append(Lone(prompt, sent.token_times_s, step_s, timeline["decode"]["first_token_s"]))
        return gone[len(LONE_PROMPTS) :]

    async def serve(self, workload: Workload, tell: Callable[[float], None]) -> Served:
        """Send a workload open loop. `tell` is called now and then with the time."""
        said: list[Facts] = []
        async with self._client() as client:
            written = (await self._writer(client)).bodies(workload, by_class(workload))
            bodies = [json.dumps(body).encode() for body in written]

            async def call(index: int, due_s: float) -> Sent:
                return await send(client, bodies[index], due_s)

            await asyncio.sleep(REST_S)
            said.append(await _node(client))
            watching = asyncio.create_task(_watch(client, said))
            try:
                with _others() as others:
                    sent = await send_all(call, workload.arrival_s.tolist(), tell, followers(workload))
            finally:
                watching.cancel()
            after = await fetch_facts(client)
            said.append(after["nodes"][0])
        return Served(sent, said, after["placing"], others[0])

    def _client(self) -> httpx.AsyncClient:
        limits = httpx.Limits(
            max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEPT_ALIVE_S
        )
        return httpx.AsyncClient(base_url=self._base_url, timeout=TIMEOUT_S, limits=limits)

    async def _writer(self, client: httpx.AsyncClient) -> Writer:
        response = await client.get("/v1/models")
        response.raise_for_status()
        return Writer(str(response.json()["data"][0]["id"]), self._vocab_size, self._rng)


def overheads(cost: StepCost, max_batch_tokens: int, lone: Sequence[Lone]) -> dict[str, Any]:
    """What lone requests took beside the engine's steps, in ms: medians over all, and by prompt length.

    `overhead_ms`: a first token, beyond the prefill that `cost` predicts; `outside_ms` of it outside the node.
    `host_ms`: the time between two tokens at the client, beyond the step that `cost` predicts.
    """
    by_prompt = []
    for prompt in sorted({one.prompt_tokens for one in lone}):
        those = [one for one in lone if one.prompt_tokens == prompt]
        steps = range(1, len(those[0].token_times_s))
        seconds = {
            "ttft_ms": _median(one.token_times_s[0] for one in those),
            "at_node_ms": _median(one.at_node_s for one in those),
            "prefill_predicted_ms": cost.prefill_alone_s(prompt, max_batch_tokens),
            "tpot_ms": _median(one.tpot_s for one in those),
            "step_ms": _median(one.step_s for one in those),
            "step_predicted_ms": _median(cost.predict(1, seqs=1, context_tokens=prompt + n) for n in steps),
        }
        by_prompt.append({"prompt_tokens": prompt} | {key: 1e3 * value for key, value in seconds.items()})
    return {
        "overhead_ms": _median(row["ttft_ms"] - row["prefill_predicted_ms"] for row in by_prompt),
        "outside_ms": 1e3 * _median(one.token_times_s[0] - one.at_node_s for one in lone),
        "host_ms": _median(row["tpot_ms"] - row["step_predicted_ms"] for row in by_prompt),
        "by_prompt": by_prompt,
    }


def _median(values: Iterable[float]) -> float:
    return float(np.median(list(values)))


async def _node(client: httpx.AsyncClient) -> Facts:
    facts: Facts = (await fetch_facts(client))["nodes"][0]
    return facts


async def _watch(client: httpx.AsyncClient, said: list[Facts]) -> None:
    while True:
        await asyncio.sleep(FACTS_EVERY_S)
        said.append(await _node(client))


@contextmanager
def _others() -> Iterator[list[float]]:
    """A list that has, after the block, how many cores others kept busy during it."""
    measured: list[float] = []
    began_s, busy_s, ours_s = time.perf_counter(), _busy_s(), _ours_s()
    yield measured
    seconds = time.perf_counter() - began_s
    measured.append(max(_busy_s() - busy_s - (_ours_s() - ours_s), 0.0) / seconds)


def _busy_s() -> float:
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0))


def _ours_s() -> float:
    """CPU seconds of this process and of all that it has started and that still run."""
    total_s = 0.0
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total_s += times.user + times.system
    return total_s
