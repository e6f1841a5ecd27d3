"""An agent: it asks, the model calls a tool, the tool runs here, its result goes back, until the answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np

from benchmarks.client import Ask, Reply, ToolCall

ANSWER_TOKENS = 24
CALL_TOKENS = 256  # white space inside a forced call is the model's own choice
TOOL_MEDIAN_S = 1.0
LONGEST_TOOL_S = 3.0
# The last call writes the answer for a person, at a person's pace (SLOs-Serve, table 1).
ANSWER_TPOT_MS = 100
CITIES = {"lisbon": 0, "vienna": 1, "tokyo": 9, "lima": -5}
FACTS = {
    "lease": ("held until the pull", "thirty seconds", "ends with a notification"),
    "prefill": ("reads the prompt", "bound by compute", "ends with the first token"),
    "decode": ("one token a step", "bound by memory", "keeps a pace"),
}


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool and how it is run. `parameters` are the properties of its JSON schema; all are required."""

    name: str
    description: str
    parameters: Mapping[str, Mapping[str, Any]]
    run: Callable[..., str]

    @property
    def schema(self) -> dict[str, Any]:
        """As OpenAI's API takes it, strict: the arguments fit the schema or there are none."""
        return {
            "type": "function",
            "function": {
                "name": self.name,
                "description": self.description,
                "strict": True,
                "parameters": {
                    "type": "object",
                    "properties": dict(self.parameters),
                    "required": list(self.parameters),
                    "additionalProperties": False,
                },
            },
        }

    def answer(self, call: ToolCall) -> str:
        """Run it. Raises ValueError if the arguments do not fit."""
        try:
            return self.run(**call.arguments)
        except (TypeError, KeyError, IndexError) as error:
            given = json.dumps(call.arguments)[:120]
            raise ValueError(f"{call.name} was called with arguments that do not fit: {given}") from error


def calculate(a: int, b: int, operation: str) -> str:
    """a plus, minus or times b."""
    return str({"plus": a + b, "minus": a - b, "times": a * b}[operation])


def clock(city: str) -> str:
    """Local time of a city, without summer time."""
    return (datetime.now(UTC) + timedelta(hours=CITIES[city])).strftime("%H:%M")


def look_up(topic: str, entry: int) -> str:
    """An entry, 1 to 3, about a topic."""
    return FACTS[topic][entry - 1]


_NUMBER = {"type": "integer", "minimum": 0, "maximum": 99}
TOOLS = (
    Tool(
        "calculate",
        "Add, subtract or multiply two numbers.",
        {"a": _NUMBER, "b": _NUMBER, "operation": {"type": "string", "enum": ["plus", "minus", "times"]}},
        calculate,
    ),
    Tool("clock", "The time in a city.", {"city": {"type": "string", "enum": list(CITIES)}}, clock),
    Tool(
        "look_up",
        "A fact about a topic.",
        {"topic": {"type": "string", "enum": list(FACTS)}, "entry": {"type": "integer", "enum": [1, 2, 3]}},
        look_up,
    ),
)


class Agent:
    """Holds conversations of 2 to 4 calls one after another; the last call of each is a plain answer.

    `send` makes a call, `failed` is told of a reply whose tool call cannot be carried out.
    """

    def __init__(
        self,
        name: str,
        send: Callable[[Ask], Awaitable[Reply]],
        failed: Callable[[str], None],
        rng: np.random.Generator,
    ) -> None:
        self.name = name
        self.tool_calls = 0
        self.sessions = 0
        self._send = send
        self._failed = failed
        self._rng = rng

    async def work(self, until: Callable[[], bool]) -> None:
        """Hold conversations until `until` says that it is time to stop; one that began is finished."""
        while not until():
            await self._converse()

    async def _converse(self) -> None:
        session_id = f"{self.name}-{self.sessions}"
        calls = int(self._rng.integers(2, 5))
        messages: list[dict[str, Any]] = [
            {"role": "system", "content": f"You are agent {session_id}. Use the tools, then answer briefly."},
            {"role": "user", "content": f"Task {int(self._rng.integers(10_000))}: find out, then tell me."},
        ]
        for _ in range(calls - 1):
            if not await self._use_a_tool(session_id, messages):
                return
        await self._send(self._ask(session_id, messages, None))
        self.sessions += 1

    async def _use_a_tool(self, session_id: str, messages: list[dict[str, Any]]) -> bool:
        tool = TOOLS[int(self._rng.integers(len(TOOLS)))]
        reply = await self._send(self._ask(session_id, messages, tool))
        call = reply.tool_call
        if call is None:
            return False
        try:
            result = tool.answer(call)
        except ValueError as error:
            self._failed(str(error))
            return False
        await asyncio.sleep(min(LONGEST_TOOL_S, TOOL_MEDIAN_S * float(self._rng.lognormal(0.0, 0.5))))
        self.tool_calls += 1
        messages += _exchange(call, result)
        return True

    def _ask(self, session_id: str, messages: list[dict[str, Any]], tool: Tool | None) -> Ask:
        slo: dict[str, Any] = {"class": "tool"}
        if tool is None:
            slo["tpot_ms"] = ANSWER_TPOT_MS
        return Ask(
            slo_class="tool",
            messages=list(messages),
            max_tokens=ANSWER_TOKENS if tool is None else CALL_TOKENS,
            slo=slo,
            seed=int(self._rng.integers(2**31)),
            tool=None if tool is None else tool.schema,
            session_id=session_id,
        )


def _exchange(call: ToolCall, result: str) -> list[dict[str, Any]]:
    function = {"name": call.name, "arguments": json.dumps(call.arguments)}
    return [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": call.call_id, "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": call.call_id, "content": result},
    ]
