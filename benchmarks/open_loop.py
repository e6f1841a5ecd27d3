"""Open-loop load over HTTP: every request of a workload is sent at its time, whatever became of the others.

Prompts are token ids, so that lengths are exact. No engine is told when an output ends, as `max_tokens` would:
it ends by a token that the model may not say before its time and cannot help saying then, or, where engines
draft (vLLM has no logit bias there), by the client, who hangs up. The raw stream is read and little is looked
for in it, so that the client's own cost stays small.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np

from benchmarks.parts import asked
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
    """Writes bodies for a model. Prompts come from `rng` and share no beginning: no prefix cache has any.

    `ends`: outputs end by a token of their own. Else they go on to `max_tokens`, unless the client hangs up.
    `never`: tokens that outputs which end by a token do not have.
    """

    def __init__(
        self,
        model: str,
        vocab_size: int,
        rng: np.random.Generator,
        *,
        ends: bool = True,
        never: Sequence[int] = (),
    ) -> None:
        self._model = model
        self._stop_id = vocab_size - 1
        self._rng = rng
        self._ends = ends
        self._bias = {str(token_id): -SURE_BIAS for token_id in never} | {str(self._stop_id): SURE_BIAS}

    def body(
        self, prompt_tokens: int, output_tokens: int, max_tokens: int, slo: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """A request with a prompt of just so many tokens, answered by just so many. `slo`: if it has one."""
        body = {
            "model": self._model,
            "prompt": self._rng.integers(FIRST_TOKEN_ID, self._stop_id, prompt_tokens).tolist(),
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        if self._ends:
            end = {"stop_token_ids": [self._stop_id], "logit_bias": self._bias}
            body |= {"min_tokens": output_tokens - 1, **end}
        return body if slo is None else {**body, "slo": dict(slo)}

    def bodies(self, workload: Workload, slos: Sequence[Mapping[str, Any] | None]) -> list[dict[str, Any]]:
        """Of every request, made beforehand."""
        sizes = (workload.prompt_tokens, workload.output_tokens, workload.max_tokens)
        rows = zip(*(column.tolist() for column in sizes), slos, strict=True)
        return [self.body(*row) for row in rows]


def by_class(workload: Workload) -> list[dict[str, str]]:
    """The SLO field of every request: its class by name."""
    return [asked(workload.class_names[index]) for index in workload.class_index.tolist()]


def followers(workload: Workload) -> dict[int, tuple[int, float]]:
    """For a call that another one waits for: which, and how long after its end that comes."""
    later = np.flatnonzero(workload.parent >= 0).tolist()
    return {int(workload.parent[index]): (index, float(workload.delay_s[index])) for index in later}


Call = Callable[[int, float], Awaitable[Sent]]  # sends a request by its number; when it should be sent


async def send_all(
    call: Call,
    arrival_s: Sequence[float],
    tell: Callable[[float], None],
    after: Mapping[int, tuple[int, float]] | None = None,
) -> list[Sent]:
    """Send every request at its time and wait for all answers. `tell` is called now and then with the time.

    `after`, as `followers` gives it: a call of a chain is due when the one before it has ended, and a while.
    """
    after = after or {}
    began_s = time.perf_counter() + 0.1
    sent = [Sent() for _ in arrival_s]
    followed = {index for index, _ in after.values()}

    async def chain(index: int, due_s: float) -> None:
        while True:
            sent[index] = await call(index, due_s)
            if index not in after:
                return
            index, delay_s = after[index]
            due_s = time.perf_counter() + delay_s
            await asyncio.sleep(delay_s)

    watching = asyncio.create_task(_watch(began_s, tell))
    try:
        async with asyncio.TaskGroup() as group:
            for index, at_s in enumerate(arrival_s):
                if index not in followed:
                    await asyncio.sleep(began_s + at_s - time.perf_counter())
                    group.create_task(chain(index, began_s + at_s))
    finally:
        watching.cancel()
    return sent


async def send(client: httpx.AsyncClient, body: bytes, due_s: float, enough: int | None = None) -> Sent:
    """Send one body now and read its stream. `due_s`: when it should have been sent, as perf_counter says.

    `enough`: hang up once there are so many tokens; more of them, said in the same breath, are not counted.
    """
    sent = Sent(late_s=time.perf_counter() - due_s)
    counted, tail = 0, b""
    headers = {"content-type": "application/json"}
    try:
        async with client.stream("POST", PATH, content=body, headers=headers) as response:
            sent.request_id = response.headers.get("x-slosserve-request-id")
            sent.verdict = response.headers.get("x-slosserve-verdict")
            # It runs without what was asked for, so it measures nothing.
            sent.error = response.headers.get("x-slosserve-slo")
            async for part in response.aiter_raw():
                now_s = time.perf_counter() - due_s
                tail = (tail + part)[-KEPT_BYTES:]
                counted = max(count_in(tail), counted)
                if enough is not None and counted >= enough:
                    sent.token_times_s += [now_s] * (enough - len(sent.token_times_s))
                    return sent
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
