"""The ways in: the official SDKs, streaming, tool calls, two clients at once, SLOs and refusals."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.conftest import Client

PATIENCE_S = 30.0
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two small numbers.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "integer", "enum": [1, 2, 3]},
                "b": {"type": "integer", "enum": [4, 5]},
            },
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}
FORCED = {"type": "function", "function": {"name": "add"}}
ASK = [{"role": "user", "content": "What is two plus four?"}]


def test_a_chat_streams_through_the_openai_sdk(cluster: Client) -> None:
    pieces = list(
        cluster.openai.chat.completions.create(
            model="tiny",
            messages=ASK,
            max_tokens=12,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    whole = cluster.openai.chat.completions.create(model="tiny", messages=ASK, max_tokens=12, temperature=0)
    streamed = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert streamed == whole.choices[0].message.content
    assert pieces[-1].usage.completion_tokens == 12


def test_a_tool_loop_runs_and_comes_back(cluster: Client) -> None:
    client = cluster.openai
    messages: list[dict[str, Any]] = list(ASK)
    first = client.chat.completions.create(
        model="tiny", messages=messages, tools=[ADD], tool_choice=FORCED, max_tokens=120
    )
    call = first.choices[0].message.tool_calls[0]
    arguments = json.loads(call.function.arguments)
    assert arguments["a"] in (1, 2, 3)
    assert arguments["b"] in (4, 5)
    messages += [
        first.choices[0].message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": str(sum(arguments.values()))},
    ]
    last = client.chat.completions.create(
        model="tiny", messages=messages, tools=[ADD], tool_choice="none", max_tokens=8
    )
    assert last.usage.prompt_tokens > first.usage.prompt_tokens


def test_responses_through_the_openai_sdk(cluster: Client) -> None:
    answer = cluster.openai.responses.create(model="tiny", input="Say something.", max_output_tokens=9)
    assert answer.usage.output_tokens == 9
    kinds = [
        event.type
        for event in cluster.openai.responses.create(
            model="tiny", input="Say something.", max_output_tokens=9, stream=True
        )
    ]
    assert kinds[0] == "response.created"
    assert "response.output_text.delta" in kinds


def test_a_response_in_the_background_is_done_when_the_client_comes_back(cluster: Client) -> None:
    responses = cluster.openai.responses
    answer = responses.create(model="tiny", input="Say something.", max_output_tokens=60, background=True)
    assert answer.status in ("queued", "in_progress")
    deadline_s = time.monotonic() + PATIENCE_S
    while (answer := responses.retrieve(answer.id)).status in ("queued", "in_progress"):
        assert time.monotonic() < deadline_s, "it is never done"
        time.sleep(0.05)
    assert answer.usage is not None
    assert answer.usage.output_tokens == 60
    assert answer.output_text


def test_messages_through_the_anthropic_sdk(cluster: Client) -> None:
    ask = [{"role": "user", "content": "Say something."}]
    message = cluster.anthropic.messages.create(model="tiny", max_tokens=9, messages=ask)
    assert message.usage.output_tokens == 9
    with cluster.anthropic.messages.stream(model="tiny", max_tokens=9, messages=ask) as stream:
        assert "".join(stream.text_stream)


def test_two_clients_at_once_get_their_own_answers(cluster: Client) -> None:
    prompts = {name: f"{name} asks for a story about {name}. " * 8 for name in ("alpha", "omega")}
    alone = {name: cluster.complete(prompt, max_tokens=40).json() for name, prompt in prompts.items()}
    together: dict[str, list[str]] = {name: [] for name in prompts}

    def ask(name: str) -> None:
        for _ in range(4):
            answer = cluster.complete(prompts[name], max_tokens=40).json()
            together[name].append(answer["choices"][0]["text"])

    threads = [threading.Thread(target=ask, args=(name,)) for name in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, texts in together.items():
        assert texts == [alone[name]["choices"][0]["text"]] * 4


def test_a_promise_is_admitted_kept_and_scored_by_stage(cluster: Client) -> None:
    response = cluster.complete("hello " * 50, max_tokens=30, slo={"class": "chatbot"})
    assert response.headers["x-slosserve-verdict"] == "admitted"
    told = cluster.get(f"/requests/{response.headers['x-slosserve-request-id']}")
    assert set(told["stages"]) == {"prefill", "answer"}
    counted = cluster.get("/cluster")["attainment"]["chatbot"]
    assert counted["requests"] >= 1
    assert counted["stages"]["prefill"]["total"] == counted["requests"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_promise_that_cannot_be_kept_is_refused_with_429_when_asked_to(cluster: Client, stream: bool) -> None:
    with pytest.raises(openai.RateLimitError) as refusal:
        cluster.openai.completions.create(
            model="tiny",
            prompt="word " * 1000,
            max_tokens=5,
            stream=stream,
            extra_headers={"x-llm-d-slo-ttft-ms": "1", "x-slosserve-on-miss": "refuse"},
        )
    headers = refusal.value.response.headers
    assert int(headers["retry-after"]) >= 1
    assert headers["x-slosserve-reason"] == "slo_unattainable"
    assert "cannot end within" in str(refusal.value)


def test_a_promise_that_cannot_be_kept_is_deferred_when_not(cluster: Client) -> None:
    response = cluster.complete("word " * 300, max_tokens=5, vllm_xargs={"slo_ttft_ms": 1})
    assert response.status_code == 200
    assert response.headers["x-slosserve-verdict"] == "best_effort"


@pytest.mark.parametrize(
    "extra",
    [
        {"slo": {"ttft_ms": "soon"}},
        {"slo": {"class": "chatbto"}},
        {"slo": "fast"},
        {"slo": {"tpot_ms": -4}},
        {"slo": {"on_miss": "refuse"}},
        {"vllm_xargs": {"slo_tpot_ms": "x"}},
        {"vllm_xargs": {"slo_tpotms": 50}},
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_malformed_slo_is_best_effort_said_in_a_header(
    cluster: Client, extra: dict[str, Any], stream: bool
) -> None:
    response = cluster.complete("hello", max_tokens=2, stream=stream, **extra)
    assert response.status_code == 200, response.text
    assert response.headers["x-slosserve-slo"].startswith("malformed")
    assert response.headers["x-slosserve-verdict"] == "best_effort"


def test_metrics_carry_vllms_names_and_ours(cluster: Client) -> None:
    def prompt_tokens() -> float:
        lines = httpx.get(cluster.base_url + "/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:prompt_tokens_total"))

    before = prompt_tokens()
    answer = cluster.complete("count me", max_tokens=4, slo={"class": "coder"}).json()
    assert prompt_tokens() == before + answer["usage"]["prompt_tokens"]
    text = httpx.get(cluster.base_url + "/metrics").text
    for name in (
        "vllm:time_to_first_token_seconds_count",
        "vllm:request_time_per_output_token_seconds_count",
        'slosserve_requests_total{outcome="completed",slo_class="coder"',
        "slosserve_handoff_seconds_count",
    ):
        assert name in text, name


def test_health_says_alive_and_ready(cluster: Client) -> None:
    assert httpx.get(cluster.base_url + "/health").status_code == 200
    assert httpx.get(cluster.base_url + "/health/ready").json() == {"ready": True}
