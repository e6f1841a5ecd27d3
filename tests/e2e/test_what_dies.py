"""What dies takes nothing along that others need: the coordinator no stream, a prefill node no request.

Runs last of the end-to-end tests: it leaves other processes behind than it found.
"""

from __future__ import annotations

import os
import signal
import time

import httpx
import pytest

from coordinator.cluster_process import ClusterProcess
from tests.e2e.conftest import Client


def _wait_ready(cluster: Client, timeout_s: float = 20.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while httpx.get(cluster.base_url + "/health/ready", timeout=20).status_code != 200:
        assert time.monotonic() < deadline_s, "the cluster did not become ready again"
        time.sleep(0.1)


def test_a_coordinator_that_dies_takes_no_stream_along_and_the_next_one_knows_all(
    cluster: Client, cluster_process: ClusterProcess
) -> None:
    agent = httpx.Client(base_url=cluster.base_url, headers={"x-session-id": "before"}, timeout=60)
    asked = {"model": "tiny", "prompt": "before it died. " * 20, "max_tokens": 4}
    assert agent.post("/v1/completions", json=asked).status_code == 200
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
    cluster_process.restart_coordinator()
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
    response = cluster.complete("and now?", slo={"class": "chatbot"})
    assert response.headers["x-slosserve-placement"] == "prefill-0>decode-0"


def test_a_prefill_node_that_dies_costs_no_request_and_comes_back(cluster: Client) -> None:
    cluster.wait_idle()
    pid = cluster.nodes()["prefill-0"]["pid"]
    os.kill(pid, signal.SIGKILL)
    for turn in range(5):
        response = cluster.complete(f"turn {turn}", slo={"class": "chatbot"})
        assert response.status_code == 200, response.text
        assert response.headers["x-slosserve-placement"] == "decode-0"
    deadline_s = time.monotonic() + 120
    while (node := cluster.nodes()["prefill-0"])["pid"] == pid or node["state"] != "ready":
        if time.monotonic() > deadline_s:
            pytest.fail(f"prefill-0 did not come back: {node}")
        time.sleep(0.2)
    _wait_ready(cluster)
    response = cluster.complete("as before", slo={"class": "chatbot"})
    assert response.headers["x-slosserve-placement"] == "prefill-0>decode-0"
