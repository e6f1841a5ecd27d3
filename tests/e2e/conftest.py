"""One real cluster for all end-to-end tests: Ray, two vLLM engines with NIXL between them, the endpoint.

float32, since ties in bfloat16 flip with the shape of a batch. The decode node's clock is 5 s off throughout:
deadlines travel as time left, so no test may notice.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from anthropic import Anthropic
from openai import OpenAI

from coordinator.cluster_process import ClusterProcess

CLOCK_SKEW_S = 5.0
REPORT_LAG_S = 0.5  # a report that is on its way may still show what is over, or not yet what has begun
SETTINGS: dict[str, Any] = {
    "name": "test-e2e",
    "dtype": "float32",
    "endpoint.port": 0,
    "endpoint.admin_key": "test-admin",
    "clock_skew_s.decode-0": CLOCK_SKEW_S,
    "engine.env.VLLM_ENABLE_RESPONSES_API_STORE": "1",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test of this folder needs a cluster."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.engines)


@dataclass(frozen=True)
class Client:
    """A user of the cluster, and somebody who looks at its nodes."""

    base_url: str
    admin_key: str | None

    @property
    def openai(self) -> OpenAI:
        """The official SDK, without its retries."""
        return OpenAI(base_url=f"{self.base_url}/v1", api_key="none", max_retries=0, timeout=60)

    @property
    def anthropic(self) -> Anthropic:
        """The official SDK, without its retries."""
        return Anthropic(base_url=self.base_url, api_key="none", max_retries=0, timeout=60)

    def post(self, path: str, **kwargs: Any) -> httpx.Response:
        """A plain POST."""
        return httpx.post(self.base_url + path, timeout=60, **kwargs)

    def get(self, path: str) -> Any:
        """JSON of a GET."""
        return httpx.get(self.base_url + path, timeout=60).json()

    def complete(self, prompt: str | list[int], **kwargs: Any) -> httpx.Response:
        """A completion; temperature 0 unless said."""
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 16, "temperature": 0, **kwargs}
        return self.post("/v1/completions", json=body)

    def nodes(self) -> dict[str, dict[str, Any]]:
        """The nodes as `/cluster` shows them, by name."""
        return {node["name"]: node for node in self.get("/cluster")["nodes"]}

    def set_pools(self, **body: Any) -> httpx.Response:
        """POST /cluster/pools with the admin key."""
        return self.post("/cluster/pools", json=body, headers={"authorization": f"Bearer {self.admin_key}"})

    def wait_idle(self, timeout_s: float = 10.0) -> None:
        """Until no node holds a request, a lease or a block. Fails with what is left."""
        idle_since_s = time.monotonic()
        deadline_s = idle_since_s + timeout_s
        while True:
            left = {
                name: {key: node[key] for key in ("used_blocks", "requests", "leases", "placed")}
                for name, node in self.nodes().items()
            }
            if any(value for counts in left.values() for value in counts.values()):
                idle_since_s = time.monotonic()
            elif time.monotonic() - idle_since_s > REPORT_LAG_S:
                return
            if time.monotonic() > deadline_s:
                pytest.fail(f"not idle after {timeout_s} s: {left}")
            time.sleep(0.05)


class Stock:
    """Asks stock vLLM for the token ids of each sequence of each request."""

    def __enter__(self) -> Stock:
        script = Path(__file__).with_name("stock_vllm.py")
        self._log = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._log.close()

    def ask(self, requests: list[dict[str, Any]]) -> list[list[list[int]]]:
        """A request is a dict: prompt_token_ids and sampling parameters."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(requests) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            pytest.fail(self._log.read().decode()[-3000:])
        answers: list[list[list[int]]] = json.loads(line)
        return answers


@pytest.fixture(scope="session")
def cluster_process() -> Iterator[ClusterProcess]:
    with ClusterProcess.start("laptop", SETTINGS) as cluster:
        yield cluster


@pytest.fixture
def cluster(cluster_process: ClusterProcess) -> Iterator[Client]:
    """The cluster, which every test must leave as it found it: idle, with every block free."""
    client = Client(cluster_process.base_url, cluster_process.admin_key)
    yield client
    client.wait_idle()


@pytest.fixture(scope="session")
def stock() -> Iterator[Stock]:
    """Stock vLLM, one engine alone in a process of its own."""
    with Stock() as process:
        yield process
