"""Nodes that come and go while others serve: streams go on, and the next coordinator knows who belongs here."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import psutil
import pytest

from coordinator.cluster_process import ClusterProcess
from tests.e2e.conftest import Client

NEW = "decode-1"


def _scale(cluster: Client, *arguments: str) -> str:
    """What `slosserve scale` says."""
    command = [sys.executable, "-c", "from coordinator.cli import main; main()", "scale"]
    where = ["--url", cluster.base_url, "--admin-key", cluster.admin_key or ""]
    done = subprocess.run([*command, *arguments, *where], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def as_it_was(cluster: Client) -> Iterator[Client]:
    """The cluster, without the new node afterwards whatever a test found."""
    yield cluster
    if NEW in cluster.nodes():
        _scale(cluster, "--remove", NEW)


def _text(response: httpx.Response) -> str:
    return str(response.json()["choices"][0]["text"])


def test_a_node_comes_serves_and_leaves_and_no_stream_notices(
    as_it_was: Client, cluster_process: ClusterProcess
) -> None:
    cluster = as_it_was
    prompts = ["a long story", "another one", "one more", "the last one"]
    asked: dict[str, Any] = {"max_tokens": 600, "ignore_eos": True}

    assert f"{NEW} (decode)" in _scale(cluster, "--nodes", "3", "--role", "decode", "--dry-run")
    assert NEW not in cluster.nodes()
    assert f"{NEW}: ready" in _scale(cluster, "--nodes", "3", "--role", "decode")
    pid = cluster.nodes()[NEW]["pid"]

    os.kill(cluster_process.pids["coordinator"], signal.SIGKILL)
    cluster_process.restart("coordinator")
    assert cluster.nodes()[NEW]["pid"] == pid, "the next coordinator finds it, and starts no other"

    with ThreadPoolExecutor(len(prompts)) as pool:
        streams: list[Future[httpx.Response]] = []
        while not cluster.nodes()[NEW]["running"]:  # streams are placed by what was last heard of the nodes
            assert len(streams) < len(prompts), "the new node was given nothing"
            streams.append(pool.submit(cluster.complete, prompts[len(streams)], **asked))
            deadline_s = time.monotonic() + 20
            while sum(node["running"] for node in cluster.nodes().values()) < sum(
                not one.done() for one in streams
            ):
                assert time.monotonic() < deadline_s, cluster.nodes()
                time.sleep(0.02)
        told = _scale(cluster, "--remove", NEW)
        responses = [stream.result() for stream in streams]
    assert f"{NEW}: gone" in told
    assert list(cluster.nodes()) == ["prefill-0", "decode-0"]
    alone = [cluster.complete(prompt, **asked) for prompt in prompts[: len(responses)]]
    assert [_text(response) for response in responses] == [_text(response) for response in alone]
    deadline_s = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline_s, "its process is still there"
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"remove": ["decode-7"]}, "no node decode-7; there are"),
        ({"remove": ["decode-0"]}, "could serve nothing"),
        ({"nodes": 1, "role": "decode"}, "no decode can leave"),
        ({"nodes": 3, "remove": ["decode-0"]}, "give either nodes"),
        ({}, "give either nodes"),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_do(cluster: Client, body: dict[str, Any], told: str) -> None:
    response = cluster.post(
        "/cluster/nodes", json=body, headers={"authorization": f"Bearer {cluster.admin_key}"}
    )
    assert response.status_code in (400, 422), response.text
    assert told in response.text
    assert list(cluster.nodes()) == ["prefill-0", "decode-0"]


def test_more_than_ray_has_room_for_is_refused_with_what_is_short(cluster: Client) -> None:
    response = cluster.post(
        "/cluster/nodes", json={"nodes": 99}, headers={"authorization": f"Bearer {cluster.admin_key}"}
    )
    assert response.status_code == 503
    assert "no room for 97 more nodes: each needs 0.5 CPU, and free are 127.0.0.1: 1 CPU" in response.text


def test_without_the_admin_key_no_node_comes_or_goes(cluster: Client) -> None:
    assert cluster.post("/cluster/nodes", json={"nodes": 3}).status_code == 401
    assert len(cluster.nodes()) == 2
