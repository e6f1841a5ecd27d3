"""Pools: roles are read back from the nodes, and the next request goes where they say."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from tests.e2e.conftest import Client


@pytest.fixture
def pair(cluster: Client) -> Iterator[Client]:
    """The cluster, which is 1 prefill and 1 decode before and after."""
    yield cluster
    cluster.wait_idle()
    if {name: node["role"] for name, node in cluster.nodes().items()}["prefill-0"] != "prefill":
        assert cluster.set_pools(prefill=1, decode=1).status_code == 200


def _roles(cluster: Client) -> dict[str, str]:
    return {name: node["role"] for name, node in cluster.nodes().items()}


def test_a_rebalance_is_seen_on_the_nodes_and_in_the_next_placement(pair: Client) -> None:
    pair.wait_idle()
    answer = pair.set_pools(prefill=0, decode=2).json()
    assert answer["before"] == {"prefill-0": "prefill", "decode-0": "decode"}
    assert answer["after"] == {"prefill-0": "decode", "decode-0": "decode"}
    time.sleep(0.5)  # a report later it still holds
    assert _roles(pair) == {"prefill-0": "decode", "decode-0": "decode"}
    placed = {pair.complete(f"hello {turn}").headers["x-slosserve-placement"] for turn in range(4)}
    assert placed <= {"prefill-0", "decode-0"}
    pair.wait_idle()
    assert pair.set_pools(prefill=1, decode=1).json()["pools"] == {"prefill": 1, "decode": 1, "mixed": 0}
    assert pair.complete("hello again").headers["x-slosserve-placement"] == "prefill-0>decode-0"


def test_two_mixed_nodes_answer_as_a_pair_does(pair: Client) -> None:
    before = pair.complete("the same prompt " * 30, max_tokens=12).json()["choices"][0]["text"]
    pair.wait_idle()
    assert pair.set_pools(prefill=0, decode=0, mixed=2).status_code == 200
    assert _roles(pair) == {"prefill-0": "mixed", "decode-0": "mixed"}
    alone = pair.complete("the same prompt " * 30, max_tokens=12)
    assert alone.headers["x-slosserve-placement"] in ("prefill-0", "decode-0")
    assert alone.json()["choices"][0]["text"] == before


def test_a_dry_run_changes_nothing(pair: Client) -> None:
    pair.wait_idle()
    answer = pair.set_pools(prefill=0, decode=2, dry_run=True).json()
    assert answer["after"]["prefill-0"] == "decode"
    assert _roles(pair)["prefill-0"] == "prefill"


def test_sizes_that_do_not_add_up_are_refused(pair: Client) -> None:
    response = pair.set_pools(prefill=3, decode=2)
    assert response.status_code == 400
    assert "2 nodes, but 5" in response.json()["error"]["message"]
    assert _roles(pair) == {"prefill-0": "prefill", "decode-0": "decode"}


def test_without_the_admin_key_nothing_changes(pair: Client) -> None:
    response = pair.post("/cluster/pools", json={"prefill": 0, "decode": 2})
    assert response.status_code == 401
    assert _roles(pair) == {"prefill-0": "prefill", "decode-0": "decode"}


def test_a_busy_node_is_not_flipped_and_its_stream_goes_on(pair: Client) -> None:
    pair.wait_idle()
    done: list[int] = []

    def stream() -> None:
        response = pair.complete("a long story", max_tokens=600, ignore_eos=True)
        done.append(response.json()["usage"]["completion_tokens"])

    thread = threading.Thread(target=stream)
    thread.start()
    while pair.nodes()["decode-0"]["requests"] == 0:
        time.sleep(0.02)
    response = pair.set_pools(prefill=0, decode=0, mixed=2)
    assert response.status_code == 409
    assert "decode-0 serves 1" in response.json()["error"]["message"]
    thread.join()
    assert done == [600]
