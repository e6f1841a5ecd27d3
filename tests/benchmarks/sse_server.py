"""A small OpenAI-like server on a real port, with faults that a healthy cluster does not show on demand."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

ARGUMENTS = {
    "calculate": '{"a": 3, "b": 4, "operation": "plus"}',
    "clock": '{"city": "lima"}',
    "look_up": '{"topic": "lease", "entry": 2}',
}


@dataclass
class SseServer:
    """Answers every call at once. `fault`: none, refuse, cut, truncate or misfit (a tool's arguments)."""

    fault: str = "none"
    token_delay_s: float = 0.0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    base_url: str = ""

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/models", self.models),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/completions", self.completions, methods=["POST"]),
                Route("/cluster", self.cluster),
                Route("/requests/{request_id}", self.request),
            ]
        )

    async def models(self, _: Request) -> Response:
        model = {"id": "m", "object": "model", "created": 0, "owned_by": "us", "max_model_len": 4096}
        return JSONResponse({"object": "list", "data": [model]})

    async def cluster(self, _: Request) -> Response:
        done = len(self.bodies)
        tally = {
            "busy_s": done,
            "planning_s": done / 50,
            "profiled_s": done / 2,
            "drafted_tokens": 0,
            "accepted_tokens": 0,
        }
        counts = {"requests": done, "met": done, "stages": {"prefill": {"met": done, "total": done}}}
        return JSONResponse(
            {
                "engine": "double 1",
                "transport": "none",
                "nodes": [{"name": "p", "role": "prefill", "state": "ready", "tally": tally}],
                "handoffs": {
                    "count": done,
                    "kv_bytes": 10 * done,
                    "p50_s": 0.01,
                    "p99_s": 0.02,
                    "bytes_per_s": 9.0,
                },
                "attainment": {"chatbot": counts} if done else {},
                "placements": {"pair": done, "one_node": 0, "best_effort": 0},
            }
        )

    async def request(self, request: Request) -> Response:
        return JSONResponse(
            {
                "request_id": request.path_params["request_id"],
                "prefill_node": "p",
                "decode_node": "d",
                "verdict": "admitted",
                "placed_s": 0.001,
                "handed_off_s": 0.02,
                "first_token_s": 0.03,
                "ended_s": 0.5,
                "decode": {"pull_s": 0.004, "pull_outcome": "pulled", "pulled_bytes": 2_000_000},
            }
        )

    async def chat(self, request: Request) -> Response:
        body = await self._take(request)
        if self.fault == "refuse":
            return JSONResponse({"error": {"message": "no room"}}, status_code=503)
        number = len(self.bodies)
        headers = {"x-slosserve-request-id": f"r{number}", "x-slosserve-placement": "p>d"}
        return StreamingResponse(self._events(body), media_type="text/event-stream", headers=headers)

    async def completions(self, request: Request) -> Response:
        body = await self._take(request)
        if self.fault == "refuse":
            return JSONResponse({"error": {"message": "no room"}}, status_code=503)
        if not body["stream"]:  # as vLLM answers a prompt whose KV is to be fetched
            return JSONResponse({"kv_transfer_params": {"remote_host": "here", "number": len(self.bodies)}})
        headers = {"x-slosserve-slo": "malformed, served best effort"} if self.fault == "malformed" else {}
        return StreamingResponse(self._texts(body), media_type="text/event-stream", headers=headers)

    async def _take(self, request: Request) -> dict[str, Any]:
        body: dict[str, Any] = json.loads(await request.body())
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        return body

    async def _events(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
        if "tools" in body:
            deltas += self._tool_deltas(body["tool_choice"]["function"]["name"])
        else:
            deltas += [{"content": "word "}] * body["max_tokens"]
        for number, delta in enumerate(deltas):
            if self.fault == "cut" and number == 2:
                await asyncio.sleep(0.05)  # the first parts are out by then
                raise RuntimeError("the connection is cut here, on purpose")
            await asyncio.sleep(self.token_delay_s)
            yield _event({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
        yield _event({"choices": [], "usage": _usage(len(deltas) - 1)})
        yield b"data: [DONE]\n\n"

    def _tool_deltas(self, name: str) -> list[dict[str, Any]]:
        arguments = ARGUMENTS[name]
        if self.fault == "truncate":
            arguments = arguments[:-3]
        if self.fault == "misfit":
            arguments = '{"x": 1}'
        head = {"index": 0, "id": "c1", "type": "function", "function": {"name": name, "arguments": ""}}
        parts = [arguments[:5], arguments[5:]]
        return [
            {"tool_calls": [head]},
            *({"tool_calls": [{"index": 0, "function": {"arguments": part}}]} for part in parts),
        ]

    async def _texts(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        tokens = body.get("min_tokens", body["max_tokens"] - 1) + 1
        counts = body.get("stream_options", {}).get("continuous_usage_stats", False)
        for number in range(tokens):
            await asyncio.sleep(self.token_delay_s)
            usage = {"usage": _usage(number + 1)} if counts else {}
            yield _event({"choices": [{"index": 0, "text": "word "}], **usage})
        if self.fault != "truncate":
            yield _event({"choices": [], "usage": _usage(tokens)})
        yield b"data: [DONE]\n\n"


@contextmanager
def running(server: SseServer) -> Iterator[SseServer]:
    """The server on a free port, in a thread, until the block ends."""
    uvicorn_server = uvicorn.Server(uvicorn.Config(server.app(), port=0, log_level="critical"))
    thread = threading.Thread(target=uvicorn_server.run)
    thread.start()
    try:
        while not uvicorn_server.started:
            thread.join(0.01)
        port = uvicorn_server.servers[0].sockets[0].getsockname()[1]
        server.base_url = f"http://127.0.0.1:{port}"
        yield server
    finally:
        uvicorn_server.should_exit = True
        thread.join()


def _event(fields: dict[str, Any]) -> bytes:
    chunk = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 0, "model": "m", **fields}
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def _usage(tokens: int) -> dict[str, int]:
    return {"prompt_tokens": 9, "completion_tokens": tokens, "total_tokens": 9 + tokens}
