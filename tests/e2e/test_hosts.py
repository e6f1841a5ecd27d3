"""A cluster on two hosts, which are network namespaces: where nodes go and listen, a link that is cut, and the
loss of Ray's head. The last of these tests takes the head away."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import psutil
import pytest

from benchmarks.chaos.hosts import check_possible
from benchmarks.chaos.ray_hosts import RayHosts, ray_hosts
from coordinator.cluster_process import ClusterProcess
from coordinator.spread import lacking
from engine.errors import ConfigError
from tests.e2e.conftest import Client

SETTINGS: dict[str, Any] = {
    "name": "test-hosts",
    "dtype": "float32",
    "endpoint.port": 0,
    "endpoint.api_key": "test-key",
    "pools.prefill": 0,
    "pools.decode": 0,
    "pools.mixed": 2,
}
CUT_S = 2.5
SLOW_MBIT_PER_S = 20  # 12 MB take 5 s
PATIENCE_S = 30.0
LONG = 500  # tokens of a stream that is under way when something breaks


@pytest.fixture(scope="module")
def on() -> Iterator[RayHosts]:
    try:
        check_possible()
    except ConfigError as error:
        pytest.skip(str(error))
    with pytest.MonkeyPatch.context() as patch:
        # An engine that another test has had in this process has said here which interface is its own.
        patch.delenv("UCX_NET_DEVICES", raising=False)
        with ray_hosts(2) as hosts:
            yield hosts


@pytest.fixture(scope="module")
def hosted(on: RayHosts) -> Iterator[Client]:
    with ClusterProcess.start("laptop", SETTINGS | on.settings) as cluster:
        yield Client(cluster.base_url, cluster.admin_key)


def _ask(
    client: Client, prompt: Sequence[int] | str, tokens: int, told: list[int] | None = None, salt: str = "none"
) -> list[int]:
    """Token ids of a stream. `told`: appended to with each as it comes. `salt`: whose prefixes it shares."""
    body = {
        "model": "tiny",
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
        "cache_salt": salt,
    }
    said = [] if told is None else told
    key = {"authorization": "Bearer test-key"}
    with httpx.stream(
        "POST", f"{client.base_url}/v1/completions", json=body, headers=key, timeout=60
    ) as answer:
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            if line.startswith("data: ") and not line.endswith("[DONE]"):
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                said += [token for choice in event["choices"] for token in choice.get("token_ids") or []]
    return said


def _wait_for(what: Any, timeout_s: float = PATIENCE_S) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline_s
        time.sleep(0.1)


def _states(client: Client) -> dict[str, str]:
    return {name: node["state"] for name, node in client.nodes().items()}


def test_nodes_are_spread_and_listen_on_the_address_of_their_host_alone(hosted: Client, on: RayHosts) -> None:
    nodes = hosted.nodes().values()
    at = {node["address"].removeprefix("tcp://").partition(":")[0]: node["pid"] for node in nodes}
    assert set(at) == {host.address for host in on.hosts}
    for address, pid in at.items():
        found = {one.laddr.ip for one in psutil.Process(pid).net_connections("tcp") if one.status == "LISTEN"}
        # The workers of Ray itself listen everywhere (README).
        assert found <= {address, "127.0.0.1", "::"}
    links = {(link["source"], link["target"]): link.get("error") for link in hosted.get("/cluster")["links"]}
    assert links == {("mixed-0", "mixed-1"): None, ("mixed-1", "mixed-0"): None}


def test_kv_goes_from_host_to_host(hosted: Client) -> None:
    prompt = list(range(100, 500))
    alone = _ask(hosted, prompt, 24)
    assert hosted.set_pools(prefill=1, decode=1).status_code == 200
    assert _ask(hosted, prompt, 24) == alone
    assert hosted.get("/cluster")["handoffs"]["count"] >= 1
    hosted.wait_idle()
    assert hosted.set_pools(prefill=0, decode=0, mixed=2).status_code == 200


def test_without_the_key_of_the_endpoint_nothing_is_served(hosted: Client) -> None:
    assert hosted.complete("hello").status_code == 401


def test_a_link_that_is_cut_costs_no_token_and_its_host_comes_back(hosted: Client, on: RayHosts) -> None:
    prompts = [list(range(start, start + 40)) for start in (100, 200, 300)]
    alone = [_ask(hosted, prompt, LONG) for prompt in prompts]
    hosted.wait_idle()  # what is seen on the nodes from now on is new
    told: list[list[int]] = [[] for _ in prompts]
    asking = [
        threading.Thread(target=_ask, args=(hosted, prompt, LONG, said))
        for prompt, said in zip(prompts, told, strict=True)
    ]
    away = next(name for name, node in hosted.nodes().items() if on.hosts[1].address in node["address"])
    for thread in asking:
        thread.start()
        time.sleep(0.3)  # placed by the load of the nodes, which is told ten times a second
    _wait_for(lambda: hosted.nodes()[away]["requests"] > 0, 5)
    on.hosts[1].cut()
    try:
        _wait_for(lambda: _states(hosted)[away] == "lost", 5)
        time.sleep(CUT_S)
    finally:
        on.hosts[1].mend()
    for thread in asking:
        thread.join(PATIENCE_S)
    assert told == alone
    _wait_for(lambda: set(_states(hosted).values()) == {"ready"})
    hosted.wait_idle()


def test_a_link_that_is_cut_during_a_transfer_costs_no_token_and_no_block(hosted: Client, on: RayHosts) -> None:
    prompt = [100 + at % 700 for at in range(3000)]  # 12 MB of KV
    alone = _ask(hosted, prompt, 24)
    hosted.wait_idle()  # what is seen on the nodes from now on is new
    near, far = (
        next(name for name, node in hosted.nodes().items() if host.address in node["address"])
        for host in on.hosts
    )
    other: list[int] = []
    stream = threading.Thread(target=_ask, args=(hosted, "what keeps the near node busy", LONG, other))
    stream.start()
    _wait_for(lambda: hosted.nodes()[near]["requests"] + hosted.nodes()[far]["requests"] > 0)
    busy = near if hosted.nodes()[near]["requests"] else far
    assert hosted.set_pools(prefill=1, decode=1).status_code == 200
    roles = {name: node["role"] for name, node in hosted.nodes().items()}
    assert roles[busy] == "decode", "the least busy node takes the new role that comes first"
    stream.join(PATIENCE_S)
    hosted.wait_idle()
    source = next(name for name, role in roles.items() if role == "prefill")
    on.hosts[1].slow(SLOW_MBIT_PER_S)
    said: list[int] = []
    asking = threading.Thread(target=_ask, args=(hosted, prompt, 24, said, "all KV has to move"))
    try:
        asking.start()
        _wait_for(lambda: hosted.nodes()[source]["leases"] > 0)
        time.sleep(0.5)
        assert hosted.nodes()[source]["leases"] > 0, "the transfer is under way"
        on.hosts[1].cut()
        _wait_for(lambda: _states(hosted)[far] == "lost", 5)
        time.sleep(CUT_S)
    finally:
        on.hosts[1].mend()
        on.hosts[1].quicken()
    asking.join(PATIENCE_S)
    assert said == alone
    _wait_for(lambda: set(_states(hosted).values()) == {"ready"})
    hosted.wait_idle(timeout_s=40.0)
    assert hosted.set_pools(prefill=0, decode=0, mixed=2).status_code == 200


def test_streams_and_new_requests_go_on_without_the_head_of_ray(hosted: Client, on: RayHosts) -> None:
    assert hosted.get("/cluster")["ray"]["head"] == "ready"
    said: list[int] = []
    stream = threading.Thread(target=_ask, args=(hosted, "a long story", LONG, said))
    stream.start()
    _wait_for(lambda: len(said) > 10)
    (head,) = [process for process in on.hosts[0].processes() if process.name() == "gcs_server"]
    head.kill()
    assert len(_ask(hosted, "and another", 20)) == 20
    stream.join(PATIENCE_S)
    assert len(said) == LONG
    _wait_for(lambda: hosted.get("/cluster")["ray"]["head"] == "lost")
    assert "is gone" in hosted.get("/cluster")["ray"]["says"]
    assert set(_states(hosted).values()) == {"ready"}


def test_what_is_lacking_is_told_host_by_host() -> None:
    free = {"10.0.0.2": {"CPU": 4.0}, "10.0.0.1": {"CPU": 0.5, "GPU": 1.0}}
    words = lacking("2 decode nodes", {"CPU": 1.0, "GPU": 1.0}, free)
    assert "2 decode nodes: each needs 1 CPU, 1 GPU" in words
    assert "10.0.0.1: 0.5 CPU, 1 GPU; 10.0.0.2: 4 CPU, 0 GPU" in words
