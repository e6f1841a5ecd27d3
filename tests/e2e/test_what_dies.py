"""What dies takes nothing along that others need: no node and no coordinator a request or a stream.

Runs last of the end-to-end tests: it leaves other processes behind than it found.
"""

from __future__ import annotations

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from coordinator.cluster_process import ClusterProcess
from tests.e2e.conftest import Client


def _wait_ready(cluster: Client, timeout_s: float = 20.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while httpx.get(cluster.base_url + "/health/ready", timeout=20).status_code != 200:
        assert time.monotonic() < deadline_s, "the cluster did not become ready again"
        time.sleep(0.1)


def _wait_back(cluster: Client, name: str, pid: int, timeout_s: float = 120.0) -> None:
    """Until another process serves as a node that was killed."""
    deadline_s = time.monotonic() + timeout_s
    while (node := cluster.nodes()[name])["pid"] == pid or node["state"] != "ready":
        if time.monotonic() > deadline_s:
            pytest.fail(f"{name} did not come back: {node}")
        time.sleep(0.2)
    _wait_ready(cluster)


def _wait_placement(cluster: Client, name: str, timeout_s: float = 30.0) -> None:
    """Until a promise is placed so: the link to a node that has come back is measured first."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        response = cluster.complete("as before", slo={"class": "chatbot"})
        assert response.status_code == 200, response.text
        if (placed := response.headers["x-slosserve-placement"]) == name:
            return
        assert time.monotonic() < deadline_s, f"still placed on {placed}"
        time.sleep(0.1)


def _prefix_known(cluster: Client, prompt: str) -> int:
    """Tokens of a prompt whose KV its placement knew to be on the prefill node."""
    response = cluster.complete(prompt, max_tokens=1, slo={"ttft_ms": 5000, "tpot_ms": 500})
    assert response.status_code == 200, response.text
    told = cluster.get(f"/explain/{response.headers['x-slosserve-request-id']}")
    return max(
        one["cached_tokens"]
        for candidate in told["candidates"]
        for decision in candidate["decisions"]
        if decision["node"] == "prefill-0"
        for one in decision["instance"]["newcomers"]
    )


def test_a_coordinator_that_dies_takes_no_stream_along_and_the_next_one_knows_all(
    cluster: Client, cluster_process: ClusterProcess
) -> None:
    agent = httpx.Client(base_url=cluster.base_url, headers={"x-session-id": "before"}, timeout=60)
    asked = {"model": "tiny", "prompt": "before it died. " * 20, "max_tokens": 4}
    assert agent.post("/v1/completions", json=asked).status_code == 200
    assert _prefix_known(cluster, "nobody's session " * 40) == 0
    cluster.wait_idle()
    before = {name: (node["pid"], node["role"]) for name, node in cluster.nodes().items()}
    chunks = cluster.openai.completions.create(
        model="tiny",
        prompt="a long story",
        max_tokens=1500,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    next(iter(chunks))
    os.kill(cluster_process.pids["coordinator"], signal.SIGKILL)
    cluster_process.restart("coordinator")
    _wait_ready(cluster)
    after = {name: (node["pid"], node["role"]) for name, node in cluster.nodes().items()}
    assert after == before
    *_, last = chunks
    assert last.usage is not None
    assert last.usage.completion_tokens == 1500
    deadline_s = time.monotonic() + 10
    while (home := agent.get("/v1/sessions/before")).status_code != 200:
        assert time.monotonic() < deadline_s, "nodes did not tell whose histories they keep"
        time.sleep(0.1)
    assert home.json()["node"] == "decode-0"
    while _prefix_known(cluster, "nobody's session " * 40) < 128:
        assert time.monotonic() < deadline_s, "nodes did not tell what their caches hold"
        time.sleep(0.1)
    _wait_placement(cluster, "prefill-0>decode-0")


STREAMS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "penalties": {"presence_penalty": 1.2, "frequency_penalty": 0.5, "repetition_penalty": 1.1},
    "seeded": {"temperature": 1.0, "seed": 5},
    "logprobs": {"logprobs": 1},
    "promised": {"slo": {"ttft_ms": 5000, "tpot_ms": 500}},
    "grammar": {"structured_outputs": {"regex": "([a-z]{3} ){150}"}, "ignore_eos": False},
}
LENGTH = 240  # tokens of each: none is over when the first of them have begun


def _streamed(cluster: Client, name: str, told: list[int] | None = None) -> list[str]:
    """What a stream says, chunk by chunk. `told`: appended to with the tokens of each."""
    prompt = f"{name}: " * 40
    asked = {"model": "tiny", "prompt": prompt, "max_tokens": LENGTH, "temperature": 0, "stream": True}
    asked["return_token_ids"] = True
    body = {**asked, "ignore_eos": True, **STREAMS[name]}
    url, texts = cluster.base_url + "/v1/completions", []
    with httpx.stream("POST", url, json=body, timeout=120) as response:
        for line in response.iter_lines():
            if not line.startswith("data: ") or line.endswith("[DONE]"):
                continue
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event, event
            texts.append(event["choices"][0]["text"])
            if told is not None:
                told += event["choices"][0]["token_ids"]
    return texts


def test_streams_of_a_decode_node_that_dies_go_on_elsewhere_and_say_what_they_would_have_said(
    cluster: Client,
) -> None:
    assert cluster.set_pools(prefill=0, decode=0, mixed=2).status_code == 200
    alone = {name: "".join(_streamed(cluster, name)) for name in STREAMS}
    with ThreadPoolExecutor(2) as pool:  # one on each node, which has its grammar from then on
        list(pool.map(lambda _: _streamed(cluster, "grammar"), range(2)))
    cluster.wait_idle()
    told: dict[str, list[int]] = {name: [] for name in STREAMS}
    with ThreadPoolExecutor(len(STREAMS)) as pool:
        streams = {name: pool.submit(_streamed, cluster, name, told[name]) for name in STREAMS}
        while min(map(len, told.values())) < 10:
            for name, stream in streams.items():
                if stream.done():
                    assert len(told[name]) >= 10, (name, stream.result())
            time.sleep(0.01)
        victim = max(cluster.nodes().values(), key=lambda node: node["requests"])
        os.kill(victim["pid"], signal.SIGKILL)
        said = {name: "".join(stream.result()) for name, stream in streams.items()}
    assert victim["requests"] >= 2, "it was in the middle of them"
    assert said == alone
    _wait_back(cluster, victim["name"], victim["pid"])
    cluster.wait_idle()
    assert cluster.set_pools(prefill=1, decode=1).status_code == 200


def test_a_prefill_node_that_dies_costs_no_request_and_comes_back(cluster: Client) -> None:
    cluster.wait_idle()
    pid = cluster.nodes()["prefill-0"]["pid"]
    os.kill(pid, signal.SIGKILL)
    for turn in range(5):
        response = cluster.complete(f"turn {turn}", slo={"class": "chatbot"})
        assert response.status_code == 200, response.text
        assert response.headers["x-slosserve-placement"] == "decode-0"
    _wait_back(cluster, "prefill-0", pid)
    _wait_placement(cluster, "prefill-0>decode-0")
