"""One streaming call through the official OpenAI SDK, and what it was like for the client."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx2
from openai import AsyncOpenAI, OpenAIError

CALL_TIMEOUT_S = 120.0
TEMPERATURE = 0.7


@dataclass(frozen=True, slots=True)
class Ask:
    """What to send. `slo` goes into the body as it is; a `tool` is forced on the model."""

    slo_class: str
    messages: Sequence[Mapping[str, Any]]
    max_tokens: int
    slo: Mapping[str, Any]
    seed: int
    tool: Mapping[str, Any] | None = None
    session_id: str | None = None


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model made. `arguments` is checked JSON."""

    call_id: str
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Reply:
    """How a call went. Times in seconds from its sending; `tpot_s` is the mean after the first token.

    `lateness_s`: how much later than planned this client sent it. `placement`: what the endpoint said.
    """

    slo_class: str
    request_id: str | None = None
    placement: str | None = None
    lateness_s: float = 0.0
    ttft_s: float | None = None
    tpot_s: float | None = None
    total_s: float = 0.0
    in_tokens: int = 0
    out_tokens: int = 0
    text: str = ""
    tool_call: ToolCall | None = None
    error: str | None = None


class Recording:
    """Gathers the chunks of one stream."""

    def __init__(self, start_s: float) -> None:
        self.start_s = start_s
        self.first_s: float | None = None
        self.last_s = start_s
        self.in_tokens = 0
        self.out_tokens = 0
        self.text = ""
        self.call_id = ""
        self.tool_name = ""
        self.arguments = ""

    def take(self, chunk: Any) -> None:
        """Take a chunk of the SDK."""
        if chunk.usage is not None:
            self.in_tokens, self.out_tokens = chunk.usage.prompt_tokens, chunk.usage.completion_tokens
        for choice in chunk.choices:
            if choice.delta.content or choice.delta.tool_calls:
                self.last_s = time.monotonic()
                self.first_s = self.first_s or self.last_s
            self.text += choice.delta.content or ""
            for call in choice.delta.tool_calls or ():
                self.call_id = call.id or self.call_id
                self.tool_name = call.function.name or self.tool_name
                self.arguments += call.function.arguments or ""

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds a token after the first."""
        if self.first_s is None or self.out_tokens < 2:
            return None
        return (self.last_s - self.first_s) / (self.out_tokens - 1)

    def tool_call(self) -> ToolCall:
        """The forced call. Raises ValueError if there is none or its arguments are no JSON object."""
        if not self.tool_name:
            raise ValueError("the tool was forced but not called")
        arguments = json.loads(self.arguments)
        if not isinstance(arguments, dict):
            raise ValueError(f"tool arguments are no object: {self.arguments[:80]}")
        return ToolCall(self.call_id, self.tool_name, arguments)


async def send(client: AsyncOpenAI, model: str, ask: Ask, lateness_s: float = 0.0) -> Reply:
    """Make the call and read its stream. What fails is in the reply's `error`; nothing is tried again."""
    recording = Recording(time.monotonic())
    headers: Mapping[str, str] = {}
    tool_call: ToolCall | None = None
    error: str | None = None
    try:
        raw = await client.chat.completions.with_raw_response.create(**_arguments(model, ask))
        headers = raw.headers
        async with raw.parse() as stream:
            async for chunk in stream:
                recording.take(chunk)
        if recording.first_s is None:
            error = "the stream ended without a token"
        elif ask.tool is not None:
            tool_call = recording.tool_call()
    # A stream that breaks off raises the SDK's own transport's errors, unwrapped.
    except (OpenAIError, httpx2.HTTPError, ValueError) as failure:
        error = _described(failure)
    first_s = recording.first_s
    return Reply(
        slo_class=ask.slo_class,
        request_id=headers.get("x-slosserve-request-id"),
        placement=headers.get("x-slosserve-placement"),
        lateness_s=lateness_s,
        ttft_s=None if first_s is None else first_s - recording.start_s,
        tpot_s=recording.tpot_s,
        total_s=time.monotonic() - recording.start_s,
        in_tokens=recording.in_tokens,
        out_tokens=recording.out_tokens,
        text=recording.text,
        tool_call=tool_call,
        error=error,
    )


def _described(failure: BaseException) -> str:
    """The SDK says "Connection error." and keeps the reason as the cause."""
    text = f"{type(failure).__name__}: {failure}"
    return text if failure.__cause__ is None else f"{text} ({_described(failure.__cause__)})"


def _arguments(model: str, ask: Ask) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "model": model,
        "messages": list(ask.messages),
        "max_tokens": ask.max_tokens,
        "temperature": TEMPERATURE,
        "seed": ask.seed,
        "stream": True,
        "stream_options": {"include_usage": True},
        "timeout": CALL_TIMEOUT_S,
        "extra_body": {"slo": dict(ask.slo)},
    }
    if ask.tool is not None:
        arguments["tools"] = [ask.tool]
        arguments["tool_choice"] = {"type": "function", "function": {"name": ask.tool["function"]["name"]}}
    else:
        # The length is the workload's, not the model's mood.
        arguments["extra_body"]["ignore_eos"] = True
    if ask.session_id is not None:
        arguments["extra_headers"] = {"x-session-id": ask.session_id}
    return arguments
