"""Clients of a cluster in which something breaks: what each was told, and when."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import httpx

from benchmarks.chaos.scenarios import Load
from engine.errors import SlosserveError

TIMEOUT_S = 120.0
PROMPTS = 12  # different ones, asked again and again
VOCABULARY = 1000


@dataclass(slots=True)
class Answer:
    """What one request got. `tokens` are ids; times are monotonic seconds. `status` 0: no connection."""

    prompt: int
    url: str
    sent_s: float
    request_id: str | None = None
    status: int = 0
    tokens: list[int] = field(default_factory=list)
    error: str | None = None
    retry_after: str | None = None
    ended_s: float | None = None

    def under_way_at(self, at_s: float) -> bool:
        """Whether it had been sent and not answered in full."""
        return self.sent_s <= at_s and (self.ended_s is None or self.ended_s > at_s)


def prompts(load: Load, seed: int) -> list[list[int]]:
    """Token ids of prompts that share no prefix."""
    numbers = random.Random(seed)
    return [[numbers.randrange(VOCABULARY) for _ in range(load.prompt_tokens)] for _ in range(PROMPTS)]


class Clients:
    """Ask `urls` in turn until `stop`, each client for itself. Each client keeps to one endpoint."""

    def __init__(self, urls: Sequence[str], model: str, load: Load, seed: int) -> None:
        self.answers: list[Answer] = []
        self._urls = urls
        self._model = model
        self._load = load
        self._prompts = prompts(load, seed)
        self._going = True
        self._tasks: list[asyncio.Task[None]] = []
        self._http = httpx.AsyncClient(timeout=TIMEOUT_S, limits=httpx.Limits(max_connections=None))

    async def alone(self) -> list[list[int]]:
        """What each prompt is answered where nothing breaks, one after another."""
        answers = [await self.ask(at, self._urls[0]) for at in range(PROMPTS)]
        wrong = [answer.error for answer in answers if answer.error is not None]
        if wrong:
            raise SlosserveError(f"a request failed while nothing was broken: {wrong[0]}")
        return [answer.tokens for answer in answers]

    def start(self) -> None:
        """Begin to ask."""
        clients = range(self._load.clients)
        self._tasks = [asyncio.create_task(self._keep_asking(number)) for number in clients]

    async def stop(self) -> list[Answer]:
        """Ask no more, and wait for the answers that are under way."""
        self._going = False
        await asyncio.gather(*self._tasks)
        return self.answers

    async def close(self) -> None:
        """Let go of the connections."""
        await self._http.aclose()

    def under_way(self) -> int:
        """Requests that were sent and are not answered in full."""
        now_s = time.monotonic()
        return sum(answer.under_way_at(now_s) for answer in self.answers)

    async def _keep_asking(self, number: int) -> None:
        turn = number
        while self._going:
            answer = await self.ask(turn % PROMPTS, self._urls[number % len(self._urls)])
            turn += self._load.clients
            if answer.status != httpx.codes.OK:
                await asyncio.sleep(0.2)

    async def ask(self, prompt: int, url: str, leave_after_s: float | None = None) -> Answer:
        """One streamed request; with `leave_after_s` the client goes away after so long."""
        answer = Answer(prompt, url, time.monotonic())
        if leave_after_s is None:
            self.answers.append(answer)
        try:
            async with contextlib.AsyncExitStack() as stack:
                if leave_after_s is not None:
                    await stack.enter_async_context(asyncio.timeout(leave_after_s))
                await self._stream(answer)
        except (httpx.HTTPError, TimeoutError) as error:
            answer.error = f"{type(error).__name__}: {error}"
        answer.ended_s = time.monotonic()
        return answer

    async def _stream(self, answer: Answer) -> None:
        body = {
            "model": self._model,
            "prompt": self._prompts[answer.prompt],
            "max_tokens": self._load.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        async with self._http.stream("POST", f"{answer.url}/v1/completions", json=body) as response:
            answer.status = response.status_code
            answer.request_id = response.headers.get("x-slosserve-request-id")
            answer.retry_after = response.headers.get("retry-after")
            if response.status_code != httpx.codes.OK:
                answer.error = (await response.aread()).decode(errors="replace")[:300]
                return
            async for line in response.aiter_lines():
                self._take(answer, line)
        if answer.error is None and len(answer.tokens) != self._load.output_tokens:
            answer.error = f"it ended after {len(answer.tokens)} of {self._load.output_tokens} tokens"

    def _take(self, answer: Answer, line: str) -> None:
        if not line.startswith("data: ") or line.endswith("[DONE]"):
            return
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            answer.error = str(event["error"])[:300]
            return
        for choice in event["choices"]:
            answer.tokens += choice.get("token_ids") or []
