"""A tool-calling agent with OpenAI's SDK: tools run here, and what the model has read stays where it was read.

    python -m benchmarks.agents.openai_agent "what is in this folder?" --url http://127.0.0.1:8000

The session id lets the cluster keep the KV of the history while a tool runs; the deadline is for the whole
loop. A model that was trained to call tools decides by itself; `--turns` makes any model call one first.
"""

from __future__ import annotations

import argparse
import json
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from openai import OpenAI

LOOK: Any = {
    "type": "function",
    "function": {
        "name": "look",
        "strict": True,
        "description": "The names of the first files in a folder.",
        "parameters": {
            "type": "object",
            "properties": {"most": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["most"],
            "additionalProperties": False,
        },
    },
}


def look(most: int) -> str:
    """The tool."""
    return ", ".join(sorted(path.name for path in Path.cwd().iterdir())[:most])


def ask(url: str, question: str, turns: int, loop_ms: float, key: str = "none") -> str:
    """Loop until the model answers; its answer. The first `turns` calls must be of the tool."""
    session = f"agent-{uuid.uuid4().hex[:8]}"
    client = OpenAI(base_url=f"{url}/v1", api_key=key, default_headers={"x-session-id": session})
    model = client.models.list().data[0].id
    messages: list[Any] = [{"role": "user", "content": question}]
    while True:
        forced = len(messages) < 2 * turns
        reply = client.chat.completions.create(
            model=model,
            messages=messages,
            tools=[LOOK],
            tool_choice={"type": "function", "function": {"name": "look"}} if forced else "auto",
            max_tokens=128,
            extra_body={"slo": {"class": "tool", "loop_ms": loop_ms}},
        )
        message = reply.choices[0].message
        print(
            f"{reply.usage.total_tokens if reply.usage else 0} tokens: {message.tool_calls or message.content}"
        )
        if not message.tool_calls:
            client.delete(f"/sessions/{session}", cast_to=object)  # what was kept for it goes to others
            return message.content or ""
        messages.append({"role": "assistant", "content": "", "tool_calls": message.model_dump()["tool_calls"]})
        for call in message.model_dump()["tool_calls"]:
            found = look(**json.loads(call["function"]["arguments"]))
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": found})


def run(ask: Callable[[str, str, int, float], str], about: str, arguments: Sequence[str] | None) -> None:
    """The command line of an agent."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("question", nargs="?", default="What is in this folder?")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--turns", type=int, default=2, help="calls of the tool that are forced")
    parser.add_argument("--loop-ms", type=float, default=30_000, help="for the whole loop")
    given = parser.parse_args(arguments)
    ask(given.url, given.question, given.turns, given.loop_ms)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    run(ask, __doc__.splitlines()[0], arguments)


if __name__ == "__main__":
    main()
