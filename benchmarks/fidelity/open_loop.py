"""Open-loop load over HTTP: every request of a workload is sent at its time, whatever became of the others.

Prompts are token ids, so that lengths are exact. Outputs end by a token that the model may not say before its
time and cannot help saying then: the engine does not know when they end, which `max_tokens` would tell it. The
raw stream is read and little is looked for in it, so that the client's own cost stays small.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import httpx
import numpy as np

from benchmarks.workload import Workload

PATH = "/v1/completions"
TIMEOUT_S = 300.0
KEPT_BYTES = 4096  # of a stream, for the count that a read may have cut in two, and for what went wrong
COUNT = b'"completion_tokens":'
FIRST_TOKEN_ID = 256  # below are control tokens, and bytes that are no characters
SURE_BIAS = 100.0


@dataclass(slots=True)
class Sent:
    """How a request went. Times are seconds since it should have been sent, one per output token.

    `late_s`: by how much this client sent it later than that. `verdict`: what the endpoint said at first.
    """

    late_s: float = 0.0
    token_times_s: list[float] = field(default_factory=list)
    request_id: str | None = None
    verdict: str | None = None
    error: str | None = None


class Writer:
    """Writes bodies for a model. Prompts come from `rng` and share no beginning: no prefix cache has any."""

    def __init__(self, model: str, vocab_size: int, rng: np.random.Generator) -> None:
        self._model = model
        self._stop_id = vocab_size - 1
        self._rng = rng

    def body(self, slo_class: str, prompt_tokens: int, output_tokens: int, max_tokens: int) -> bytes:
        """A request with a prompt of just so many tokens, answered by just so many."""
        return json.dumps(
            {
                "model": self._model,
                "prompt": self._rng.integers(FIRST_TOKEN_ID, self._stop_id, prompt_tokens).tolist(),
                "max_tokens": max_tokens,
                "min_tokens": output_tokens - 1,
                "stop_token_ids": [self._stop_id],
                "logit_bias": {str(self._stop_id): SURE_BIAS},
                "ignore_eos": True,
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True, "continuous_usage_stats": True},
                "slo": {"class": slo_class},
            }
        ).encode()

    def bodies(self, workload: Workload) -> list[bytes]:
        """Of every request, made beforehand."""
        names = [workload.class_names[index] for index in workload.class_index.tolist()]
        sizes = (workload.prompt_tokens, workload.output_tokens, workload.max_tokens)
        rows = zip(names, *(column.tolist() for column in sizes), strict=True)
        return [self.body(*row) for row in rows]


async def send_all(
    client: httpx.AsyncClient, asked: Sequence[bytes], arrival_s: Sequence[float], tell: Callable[[float], None]
) -> list[Sent]:
    """Send each body at its time and wait for all answers. `tell` is called now and then with the time."""
    began_s = time.perf_counter() + 0.1
    tasks: list[asyncio.Task[Sent]] = []
    watching = asyncio.create_task(_watch(began_s, tell))
    try:
        async with asyncio.TaskGroup() as group:
            for body, at_s in zip(asked, arrival_s, strict=True):
                await asyncio.sleep(began_s + at_s - time.perf_counter())
                tasks.append(group.create_task(send(client, body, began_s + at_s)))
    finally:
        watching.cancel()
    return [task.result() for task in tasks]


async def send(client: httpx.AsyncClient, body: bytes, due_s: float) -> Sent:
    """Send one body now and read its stream. `due_s`: when it should have been sent, as perf_counter says."""
    sent = Sent(late_s=time.perf_counter() - due_s)
    counted, tail = 0, b""
    headers = {"content-type": "application/json"}
    try:
        async with client.stream("POST", PATH, content=body, headers=headers) as response:
            sent.request_id = response.headers.get("x-slosserve-request-id")
            sent.verdict = response.headers.get("x-slosserve-verdict")
            async for part in response.aiter_raw():
                now_s = time.perf_counter() - due_s
                tail = (tail + part)[-KEPT_BYTES:]
                counted = max(count_in(tail), counted)
                sent.token_times_s += [now_s] * (counted - len(sent.token_times_s))
    except httpx.HTTPError as error:
        sent.error = f"{type(error).__name__}: {error}"
        return sent
    if response.status_code != httpx.codes.OK or not tail.rstrip().endswith(b"data: [DONE]"):
        sent.error = f"status {response.status_code}: {tail[-300:].decode(errors='replace')}"
    return sent


def count_in(stream: bytes) -> int:
    """The last whole count of output tokens in a piece of a stream; 0 if there is none."""
    end = len(stream)
    while (at := stream.rfind(COUNT, 0, end)) >= 0:
        digits = stream[at + len(COUNT) : at + len(COUNT) + 12].lstrip()
        number = digits[: len(digits) - len(digits.lstrip(b"0123456789"))]
        if number and len(number) < len(digits):
            return int(number)
        end = at  # cut off: the rest comes with the next read
    return 0


async def _watch(began_s: float, tell: Callable[[float], None]) -> None:
    while True:
        tell(time.perf_counter() - began_s)
        await asyncio.sleep(1.0)
