"""The same agent with Anthropic's SDK, through /v1/messages.

python -m benchmarks.agents.anthropic_agent "what is in this folder?" --url http://127.0.0.1:8000
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

import httpx
from anthropic import Anthropic

from benchmarks.agents.openai_agent import LOOK, look, run

TOOL: Any = {
    "name": "look",
    "strict": True,
    "description": LOOK["function"]["description"],
    "input_schema": LOOK["function"]["parameters"],
}


def ask(url: str, question: str, turns: int, loop_ms: float, key: str = "none") -> str:
    """Loop until the model answers; its answer. The first `turns` calls must be of the tool."""
    session = f"agent-{uuid.uuid4().hex[:8]}"
    headers = {"x-session-id": session, "x-slosserve-slo-class": "tool", "x-slosserve-loop-ms": str(loop_ms)}
    client = Anthropic(base_url=url, api_key=key, default_headers=headers)
    model = client.models.list().data[0].id
    messages: list[Any] = [{"role": "user", "content": question}]
    while True:
        forced = len(messages) < 2 * turns
        reply = client.messages.create(
            model=model,
            messages=messages,
            tools=[TOOL],
            tool_choice={"type": "tool", "name": "look"} if forced else {"type": "none"},
            max_tokens=128,
        )
        used: list[Any] = [block for block in reply.content if block.type == "tool_use"]
        text = "".join(block.text for block in reply.content if block.type == "text")
        print(f"{reply.usage.input_tokens + reply.usage.output_tokens} tokens:", used or text)
        if not used:
            httpx.delete(f"{url}/v1/sessions/{session}", headers={"authorization": f"Bearer {key}"}, timeout=10)
            return text
        messages.append({"role": "assistant", "content": [block.model_dump() for block in used]})
        results = [
            {"type": "tool_result", "tool_use_id": block.id, "content": look(**block.input)} for block in used
        ]
        messages.append({"role": "user", "content": results})


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    run(ask, __doc__.splitlines()[0], arguments)


if __name__ == "__main__":
    main()
