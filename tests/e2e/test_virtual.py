"""A small virtual cluster, started as a user would: requests go through it as they do through a real one."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from coordinator.cluster_process import ClusterProcess
from tests.e2e.conftest import Client

SETTINGS: dict[str, Any] = {
    "name": "test-virtual",
    "endpoint.port": 0,
    "pools.prefill": 2,
    "pools.decode": 2,
    "pools.mixed": 2,
    "virtual.step_base_ms": 5.0,
    "virtual.step_per_token_us": 20.0,
}
PROMPT = list(range(100, 400))


@pytest.fixture(scope="module")
def virtual_process() -> Iterator[ClusterProcess]:
    with ClusterProcess.start("virtual", SETTINGS) as cluster:
        yield cluster


@pytest.fixture
def virtual(virtual_process: ClusterProcess) -> Iterator[Client]:
    client = Client(virtual_process.base_url, virtual_process.admin_key)
    yield client
    client.wait_idle()


def _placement(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return str(response.headers["x-slosserve-placement"])


def _tokens(response: httpx.Response) -> list[int]:
    return list(response.json()["choices"][0]["token_ids"])


def test_a_prompt_gets_the_same_tokens_wherever_it_is_served(virtual: Client) -> None:
    ask = {"max_tokens": 32, "return_token_ids": True, "slo": {"ttft_ms": 2000, "tpot_ms": 100}}
    with ThreadPoolExecutor(24) as pool:
        responses = list(pool.map(lambda _: virtual.complete(PROMPT, **ask), range(24)))
    assert len({tuple(_tokens(response)) for response in responses}) == 1
    assert {response.headers["x-slosserve-verdict"] for response in responses} == {"admitted"}
    for node in virtual.nodes().values():
        assert node["state"] == "ready"
    cluster = virtual.get("/cluster")
    assert (cluster["local_prefills"], cluster["corrupt_pulls"]) == (0, 0)


def test_a_pair_hands_its_kv_over(virtual: Client) -> None:
    assert virtual.set_pools(prefill=3, decode=3, mixed=0).status_code == 200
    try:
        # A prompt that no decode node has seen: it would prefill the rest itself.
        response = virtual.complete(PROMPT[::-1], return_token_ids=True, slo={"class": "chatbot"})
        alone = virtual.complete(PROMPT[::-1], return_token_ids=True, n=2, temperature=1)
        prefill, _, decode = _placement(response).partition(">")
        assert prefill
        assert decode
        assert _tokens(response) == _tokens(alone)
        told = virtual.get(f"/requests/{response.headers['x-slosserve-request-id']}")
        assert told["stages"] == {"prefill": True, "answer": True}
    finally:
        assert virtual.set_pools(prefill=2, decode=2, mixed=2).status_code == 200
    handoffs = virtual.get("/cluster")["handoffs"]
    assert handoffs["count"] >= 1


def test_it_streams_and_chats_by_the_official_client(virtual: Client) -> None:
    stream = virtual.openai.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hello"}], max_tokens=12, stream=True
    )
    texts = [chunk.choices[0].delta.content for chunk in stream if chunk.choices]
    assert sum(bool(text) for text in texts) > 3


def test_it_says_that_no_model_runs(virtual: Client) -> None:
    state = virtual.get("/cluster")
    assert state["engine"].startswith("virtual")
    assert [row["source"] for row in state["links"]] == ["any"]
    refused = virtual.complete(PROMPT, logprobs=2)
    assert refused.status_code == 400
    assert "virtual" in refused.text


def test_a_host_that_dies_comes_back_with_all_its_nodes(virtual: Client) -> None:
    (pid,) = {node["pid"] for node in virtual.nodes().values()}
    os.kill(pid, signal.SIGKILL)
    response = virtual.complete(PROMPT, max_tokens=4, slo={"class": "chatbot"})
    assert response.status_code in (200, 503)
    deadline_s = time.monotonic() + 30
    while time.monotonic() < deadline_s:
        nodes = virtual.nodes().values()
        if all(node["state"] == "ready" and node["pid"] != pid for node in nodes):
            break
        time.sleep(0.1)
    else:
        pytest.fail(f"not back: {virtual.nodes()}")
    assert _placement(virtual.complete(PROMPT, max_tokens=4))
