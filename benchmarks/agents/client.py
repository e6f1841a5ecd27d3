"""The agents of a window, a process of its own: `python -m benchmarks.agents.client JOB SEEN`.

A loop begins at its time, whatever became of the others. Each call has the whole history in its prompt, as
token ids: what was said comes back as it was, so that all of it could be reused. An output ends by a token that
the model may not say before its time, so that nobody is told its length. Every second the time is printed.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np

from benchmarks.agents.load import Call, Loop
from benchmarks.open_loop import FIRST_TOKEN_ID, PATH, TIMEOUT_S, Writer
from benchmarks.real.client import KEPT_ALIVE_S, NO_ANSWER

SPARE_TOKENS = 64  # that a client asks for beyond what comes: it does not know either


class SeenCall(msgspec.Struct):
    """How a call went. Times are seconds since it should have been sent, one per output token.

    `cached_tokens`: of its prompt, that the engine did not compute, by its own account.
    """

    late_s: float = 0.0
    token_times_s: list[float] = []
    cached_tokens: int = 0
    verdict: str | None = None
    error: str | None = NO_ANSWER


class SeenLoop(msgspec.Struct):
    """How a loop went: its calls as far as it got, and seconds from when it should have begun to its end."""

    calls: list[SeenCall] = []
    seconds: float | None = None


class AgentsJob(msgspec.Struct, frozen=True):
    """What to send where. `sticky`: to the target that the hash of a loop's name says, else to the first.

    `sessions`: calls say of which session they are. `slos`: and what they are promised. `name` makes prompts
    that no other job has.
    """

    targets: list[str]
    sticky: bool
    sessions: bool
    slos: bool
    name: str
    model: str
    vocab_size: int
    loops: list[Loop]
    cut_off_s: float


async def run(job: AgentsJob) -> list[SeenLoop]:
    """Send all of it. What has not ended at `cut_off_s` is given up."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEPT_ALIVE_S)
    clients = [httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=limits) for url in job.targets]
    seen = [SeenLoop() for _ in job.loops]
    began_s = time.perf_counter() + 0.1
    agents: list[_Agent] = []

    async def send_all() -> None:
        async with asyncio.TaskGroup() as group:
            for number, loop in enumerate(job.loops):
                await asyncio.sleep(began_s + loop.at_s - time.perf_counter())
                name = f"{job.name}-{number}"
                chosen = clients[zlib.crc32(name.encode()) % len(clients) if job.sticky else 0]
                agent = _Agent(job, name, chosen, seen[number])
                agents.append(agent)
                group.create_task(agent.work(loop, began_s + loop.at_s))

    sending = asyncio.create_task(send_all())
    while not sending.done() and time.perf_counter() - began_s < job.cut_off_s:
        print(f"{time.perf_counter() - began_s:.1f}", flush=True)
        await asyncio.wait([sending], timeout=1.0)
    finished = sending.done()
    sending.cancel()
    await asyncio.gather(sending, *(agent.close() for agent in agents), return_exceptions=True)
    await asyncio.gather(*(client.aclose() for client in clients))
    if finished:
        sending.result()  # what went wrong in the client itself
    return seen


class _Agent:
    """Holds one loop."""

    def __init__(self, job: AgentsJob, name: str, client: httpx.AsyncClient, seen: SeenLoop) -> None:
        self._job = job
        self._name = name
        self._client = client
        self._seen = seen
        self._rng = np.random.default_rng(zlib.crc32(name.encode()))
        self._writer = Writer(job.model, job.vocab_size, self._rng)
        self._headers = {"content-type": "application/json"} | ({"x-session-id": name} if job.sessions else {})

    async def work(self, loop: Loop, due_s: float) -> None:
        """All calls, one after another; a call that fails ends it."""
        history: list[int] = []
        began_s = due_s
        for number, call in enumerate(loop.calls):
            history += self._rng.integers(FIRST_TOKEN_ID, self._job.vocab_size - 1, call.new_tokens).tolist()
            seen = SeenCall()
            self._seen.calls.append(seen)
            last = number == len(loop.calls) - 1
            history += await self._call(call, history, due_s, seen, last=last)
            if seen.error is not None:
                return
            ended_s = due_s + seen.token_times_s[-1]
            due_s = ended_s + call.tool_s
            if not last:
                await asyncio.sleep(max(due_s - time.perf_counter(), 0.0))
        self._seen.seconds = ended_s - began_s

    async def close(self) -> None:
        """Nobody will call again. (What is kept of one window would be in the way of the next.)"""
        if self._job.sessions:
            await self._client.delete(f"/v1/sessions/{self._name}")

    async def _call(
        self, call: Call, prompt: Sequence[int], due_s: float, seen: SeenCall, *, last: bool
    ) -> list[int]:
        """Send it and read its stream; the tokens that were said, without the one that ends them."""
        body = self._writer.body(1, call.output_tokens, call.output_tokens + SPARE_TOKENS)
        body |= {"prompt": list(prompt), "return_token_ids": True}
        if self._job.slos:
            times = {"ttft_ms": call.ttft_s * 1e3, "tpot_ms": call.tpot_s * 1e3}
            body["slo"] = {"class": "tool", "call": "last" if last else "loop", **times}
        seen.late_s = time.perf_counter() - due_s
        said: list[int] = []
        try:
            async with self._client.stream("POST", PATH, json=body, headers=self._headers) as response:
                seen.verdict = response.headers.get("x-slosserve-verdict")
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        said += _take(json.loads(line[6:]), time.perf_counter() - due_s, seen)
                    elif line and not line.startswith("data: [DONE]"):
                        seen.error = f"status {response.status_code}: {line[:300]}"
                        return said
        except (httpx.HTTPError, ValueError) as error:
            seen.error = f"{type(error).__name__}: {error}"
            return said
        whole = len(said) == call.output_tokens
        seen.error = None if whole else f"{len(said)} tokens came, of {call.output_tokens}"
        return said[:-1]


def _take(event: dict[str, Any], now_s: float, seen: SeenCall) -> list[int]:
    """An event of a stream: the tokens in it."""
    usage = event.get("usage") or {}
    details = usage.get("prompt_tokens_details") or {}
    seen.cached_tokens = max(seen.cached_tokens, details.get("cached_tokens") or 0)
    if event.get("error"):
        raise ValueError(str(event["error"])[:300])
    tokens = [token for choice in event.get("choices", []) for token in choice.get("token_ids") or []]
    seen.token_times_s += [now_s] * len(tokens)
    return tokens


def main() -> None:
    """Entry point."""
    import uvloop

    job = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=AgentsJob)
    seen = uvloop.run(run(job))
    Path(sys.argv[2]).write_bytes(msgspec.json.encode(seen))


if __name__ == "__main__":
    main()
