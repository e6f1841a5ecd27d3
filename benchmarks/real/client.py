"""The client of a window, a process of its own: `python -m benchmarks.real.client JOB SEEN`.

It sends every request at its time and writes down when each token came, counted from when the request should
have been sent. Every second it prints how far it is.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np

from benchmarks.open_loop import PATH, TIMEOUT_S, Call, Sent, Writer, send, send_all

NO_ANSWER = "no answer in time"
KEPT_ALIVE_S = 2.0  # uvicorn drops a connection after 5 s: a request sent in that moment would be lost


class Seen(msgspec.Struct, frozen=True):
    """How a request went. Times are seconds since it should have been sent, one per output token.

    `late_s`: by how much it was sent later. `verdict`: what our endpoint said of it at first.
    """

    late_s: float
    token_times_s: list[float]
    verdict: str | None
    error: str | None


class Job(msgspec.Struct, frozen=True):
    """What to send where. Columns have a row per request; `after` as `open_loop.followers` gives it.

    `pair`: the prompt at the first target and the rest at the second; else targets are asked by turns.
    `hang_up`: outputs end by the client, and by a token of their own otherwise. What has no answer at
    `cut_off_s` is given up. `never`: tokens that outputs do not have.
    """

    targets: list[str]
    pair: bool
    model: str
    vocab_size: int
    seed: int
    hang_up: bool
    arrival_s: list[float]
    prompt_tokens: list[int]
    output_tokens: list[int]
    max_tokens: list[int]
    slos: list[dict[str, Any] | None]
    after: dict[int, tuple[int, float]]
    cut_off_s: float
    never: list[int] = []


async def run(job: Job) -> list[Seen]:
    """Send all of it."""
    rng = np.random.default_rng(job.seed)
    writer = Writer(job.model, job.vocab_size, rng, ends=not job.hang_up, never=job.never)
    rows = zip(job.prompt_tokens, job.output_tokens, job.max_tokens, job.slos, strict=True)
    bodies = [writer.body(*row) for row in rows]
    enough = job.output_tokens if job.hang_up else [None] * len(bodies)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEPT_ALIVE_S)
    clients = [httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=limits) for url in job.targets]
    call = (_pair if job.pair else _by_turns)(clients, bodies, enough)
    seen = [Seen(0.0, [], None, NO_ANSWER) for _ in bodies]

    async def noted(index: int, due_s: float) -> Sent:
        sent = await call(index, due_s)
        seen[index] = Seen(sent.late_s, sent.token_times_s, sent.verdict, sent.error)
        return sent

    sending = asyncio.create_task(send_all(noted, job.arrival_s, _tell, job.after))
    done, _ = await asyncio.wait([sending], timeout=job.cut_off_s)
    sending.cancel()
    await asyncio.gather(sending, *(client.aclose() for client in clients), return_exceptions=True)
    for task in done:
        task.result()  # what went wrong in the client itself
    return seen


def _by_turns(
    clients: Sequence[httpx.AsyncClient], bodies: Sequence[Mapping[str, Any]], enough: Sequence[int | None]
) -> Call:
    encoded = [_encoded(body) for body in bodies]

    async def call(index: int, due_s: float) -> Sent:
        return await send(clients[index % len(clients)], encoded[index], due_s, enough[index])

    return call


def _pair(
    clients: Sequence[httpx.AsyncClient], bodies: Sequence[Mapping[str, Any]], enough: Sequence[int | None]
) -> Call:
    """As vLLM's own proxy does it: the first engine computes the prompt and says where its KV is."""
    prefill, decode = clients
    prompts = [_encoded(_prompt_only(body)) for body in bodies]

    async def call(index: int, due_s: float) -> Sent:
        late_s = time.perf_counter() - due_s
        try:
            headers = {"content-type": "application/json"}
            response = await prefill.post(PATH, content=prompts[index], headers=headers)
            response.raise_for_status()
            where = response.json()["kv_transfer_params"]
        except (httpx.HTTPError, KeyError) as error:
            return Sent(late_s, error=f"prefill: {type(error).__name__}: {error}")
        rest = _encoded({**bodies[index], "kv_transfer_params": where})
        sent = await send(decode, rest, due_s, enough[index])
        sent.late_s = late_s
        return sent

    return call


def _prompt_only(body: Mapping[str, Any]) -> dict[str, Any]:
    # It must end because it is full: vLLM offers no KV of an output that ended by a token.
    left_out = ("min_tokens", "stop_token_ids", "logit_bias", "stream_options", "slo")
    asked = {"max_tokens": 1, "stream": False, "kv_transfer_params": {"do_remote_decode": True}}
    return {**{key: value for key, value in body.items() if key not in left_out}, **asked}


def _encoded(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body).encode()


def _tell(seconds: float) -> None:
    print(f"{seconds:.1f}", flush=True)


def main() -> None:
    """Entry point."""
    import uvloop

    job = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Job)
    seen = uvloop.run(run(job))
    Path(sys.argv[2]).write_bytes(msgspec.json.encode(seen))


if __name__ == "__main__":
    main()
