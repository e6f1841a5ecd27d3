"""Bad input gets a clear error, and the cluster serves on as if nothing had been."""

from __future__ import annotations

from typing import Any

import pytest

from tests.e2e.conftest import Client
from tests.e2e.test_ways_in import ADD, ASK


def _chat(cluster: Client, **body: Any) -> Any:
    return cluster.post(
        "/v1/chat/completions", json={"model": "tiny", "messages": ASK, "max_tokens": 4, **body}
    )


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_over_the_context_says_how_long_it_may_be(cluster: Client, stream: bool) -> None:
    response = cluster.complete("word " * 6000, stream=stream)
    assert response.status_code == 400
    assert "maximum context length is 4096" in response.json()["error"]["message"]


def test_bad_json_is_a_400(cluster: Client) -> None:
    response = cluster.post(
        "/v1/chat/completions",
        content=b'{"model": "tiny", "slo": ',
        headers={"content-type": "application/json"},
    )
    assert response.status_code == 400
    assert "JSON" in response.json()["error"]["message"]


def test_an_unknown_tool_is_a_400_that_says_so(cluster: Client) -> None:
    response = _chat(cluster, tools=[ADD], tool_choice={"type": "function", "function": {"name": "subtract"}})
    assert response.status_code == 400
    assert "does not match any" in response.json()["error"]["message"]


def test_an_unknown_model_is_a_404_that_names_the_one_there_is(cluster: Client) -> None:
    response = _chat(cluster, model="gpt-17")
    assert response.status_code == 404
    assert "tiny" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"max_tokens": -1}, "max_tokens"),
        ({"temperature": -2}, "temperature"),
        ({"n": 0}, "n"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "user", "content": "x"}], "logit_bias": {"99999999": 1}}, "logit_bias"),
    ],
)
def test_parameters_out_of_range_are_400s_that_name_them(
    cluster: Client, body: dict[str, Any], words: str
) -> None:
    response = _chat(cluster, **body)
    assert response.status_code == 400
    assert words in response.text


def test_an_unknown_request_is_a_404(cluster: Client) -> None:
    assert "remembered" in cluster.get("/requests/chatcmpl-none")["error"]["message"]


def test_after_all_that_it_serves_on(cluster: Client) -> None:
    assert cluster.complete("still there?").status_code == 200
