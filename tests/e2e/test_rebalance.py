"""Pools: roles are read back from the nodes, and the next request goes where they say."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.e2e.conftest import Client


@pytest.fixture
def pair(cluster: Client) -> Iterator[Client]:
    """The cluster, which is 1 prefill and 1 decode before and after."""
    yield cluster
    cluster.wait_idle()
    if _roles(cluster) != {"prefill-0": "prefill", "decode-0": "decode"}:
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


def test_a_node_takes_another_role_while_its_stream_goes_on(pair: Client) -> None:
    pair.wait_idle()
    alone = pair.complete("a long story", max_tokens=400, ignore_eos=True).json()["choices"][0]["text"]
    pair.wait_idle()  # what is seen running from now on is the stream
    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(pair.complete, "a long story", max_tokens=400, ignore_eos=True)
        while pair.nodes()["decode-0"]["running"] == 0:  # before that it awaits its KV, and has no batches
            time.sleep(0.02)
        answer = pair.set_pools(prefill=0, decode=0, mixed=2).json()
        response = stream.result()
    assert _roles(pair) == {"prefill-0": "mixed", "decode-0": "mixed"}
    requests = {change["node"]: change["requests"] for change in answer["changes"]}
    assert requests["decode-0"] == 1
    assert response.headers["x-slosserve-placement"] == "prefill-0>decode-0"
    assert response.json()["choices"][0]["text"] == alone
    assert pair.nodes()["decode-0"]["role_pause_ms"] > 0, "between two of its batches"


SIZES = ({"prefill": 0, "decode": 2}, {"prefill": 1, "decode": 1}, {"prefill": 0, "decode": 0, "mixed": 2})


def test_roles_change_under_load_and_every_request_says_what_it_would_have_said(pair: Client) -> None:
    pair.wait_idle()
    prompts = [f"{name} " * 60 for name in ("north", "east", "south", "west")]
    alone = {prompt: pair.complete(prompt, max_tokens=24).json()["choices"][0]["text"] for prompt in prompts}
    changing = threading.Event()
    changing.set()

    def keep_asking(prompt: str) -> list[str]:
        texts = []
        while changing.is_set():
            response = pair.complete(prompt, max_tokens=24, slo={"ttft_ms": 5000, "tpot_ms": 500})
            assert response.status_code == 200, response.text
            texts.append(response.json()["choices"][0]["text"])
        return texts

    with ThreadPoolExecutor(len(prompts)) as pool:
        clients = {prompt: pool.submit(keep_asking, prompt) for prompt in prompts}
        for turn in range(9):
            assert pair.set_pools(**SIZES[turn % len(SIZES)]).status_code == 200
            time.sleep(0.3)
        changing.clear()
        said = {prompt: client.result() for prompt, client in clients.items()}
    assert min(map(len, said.values())) > 1
    assert {prompt: set(texts) for prompt, texts in said.items()} == {
        prompt: {text} for prompt, text in alone.items()
    }


def test_pools_follow_the_load_when_told_to_and_not_when_sizes_are_set(pair: Client) -> None:
    followed = pair.set_pools(auto=True)
    assert followed.status_code == 200, followed.text
    assert pair.get("/cluster")["rebalancing"]["follow_load"]
    assert pair.set_pools(auto=True, prefill=1, decode=1).status_code == 400
    assert pair.set_pools(prefill=1, decode=1).status_code == 200
    assert not pair.get("/cluster")["rebalancing"]["follow_load"]
