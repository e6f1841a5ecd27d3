"""A window of closed-loop load: N streams, each sending its next request when the last has ended.

Reads the raw stream and looks for little in it, so that the client's own cost stays small beside what is
measured.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass

import httpx
import numpy as np

from engine.errors import EngineError
from engine.models import corpus_words

PROMPT_WORDS = 96
SHORTEST_OUTPUT_TOKENS = 40
LONGEST_OUTPUT_TOKENS = 56
RAMP_S = 1.0
KEPT_BYTES = 4096  # of the end of a stream: its usage is there
TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Window:
    """What one window measured: seconds to the first token of each request, tokens, and its length."""

    ttft_s: tuple[float, ...]
    tokens: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        """Output tokens of all streams a second."""
        return self.tokens / self.seconds


@dataclass(frozen=True, slots=True)
class Load:
    """Requests of one window, by stream: bodies of /v1/completions, and when each stream begins."""

    streams: Sequence[Sequence[bytes]]
    delays_s: Sequence[float]

    @classmethod
    def draw(cls, model: str, streams: int, requests: int, rng: np.random.Generator) -> Load:
        """`requests` for each of `streams`, with prompts that share no beginning.

        Several streams begin at different times: a burst would measure the queue, not the endpoint.
        """
        words = np.array(corpus_words())

        def body() -> bytes:
            return json.dumps(
                {
                    "model": model,
                    "prompt": " ".join(rng.choice(words, PROMPT_WORDS)),
                    "max_tokens": int(rng.integers(SHORTEST_OUTPUT_TOKENS, LONGEST_OUTPUT_TOKENS + 1)),
                    "ignore_eos": True,
                    "temperature": 0,
                    "stream": True,
                    "stream_options": {"include_usage": True},
                }
            ).encode()

        delays_s = rng.uniform(0, RAMP_S, streams).tolist() if streams > 1 else [0.0]
        return cls([[body() for _ in range(requests)] for _ in range(streams)], delays_s)


async def measure(client: httpx.AsyncClient, load: Load) -> Window:
    """Run a window against the server that `client` points at. Raises EngineError for any failed request."""
    start_s = time.perf_counter()
    streams = zip(load.streams, load.delays_s, strict=True)
    results = await asyncio.gather(*(_stream(client, bodies, delay_s) for bodies, delay_s in streams))
    seconds = time.perf_counter() - start_s
    flat = [result for stream in results for result in stream]
    return Window(tuple(ttft_s for ttft_s, _ in flat), sum(tokens for _, tokens in flat), seconds)


async def _stream(
    client: httpx.AsyncClient, bodies: Sequence[bytes], delay_s: float
) -> list[tuple[float, int]]:
    await asyncio.sleep(delay_s)
    return [await _request(client, body) for body in bodies]


async def _request(client: httpx.AsyncClient, body: bytes) -> tuple[float, int]:
    """(seconds to the first token, tokens)."""
    headers = {"content-type": "application/json"}
    sent_s = time.perf_counter()
    first_s: float | None = None
    last = b""
    try:
        async with client.stream("POST", "/v1/completions", content=body, headers=headers) as response:
            async for part in response.aiter_raw():
                if first_s is None:
                    first_s = time.perf_counter()
                last = (last + part)[-KEPT_BYTES:]
    except httpx.HTTPError as error:
        raise EngineError(f"{client.base_url}: {type(error).__name__} {error}") from error
    if response.status_code != httpx.codes.OK or first_s is None:
        raise EngineError(f"{response.url} answered {response.status_code}: {last.decode(errors='replace')}")
    return first_s - sent_s, _completion_tokens(last)


def _completion_tokens(end_of_stream: bytes) -> int:
    """The usage in the last event before [DONE]. Raises EngineError with what the server said instead."""
    events = [line[6:] for line in end_of_stream.splitlines() if line.startswith(b"data: {")]
    last = json.loads(events[-1]) if events else {}
    if not last.get("usage"):
        said = last.get("error", {}).get("message") or end_of_stream[-200:].decode(errors="replace")
        raise EngineError(f"a stream ended without its usage: {said}")
    return int(last["usage"]["completion_tokens"])
