"""A client that hangs up gives its KV back on both nodes, in whatever phase it does."""

from __future__ import annotations

import contextlib
import random

import httpx
import pytest

from tests.e2e.conftest import Client


def _body(seed: int, prompt_tokens: int = 1500) -> dict[str, object]:
    draw = random.Random(seed)
    prompt = [draw.randrange(10, 1500) for _ in range(prompt_tokens)]
    return {"model": "tiny", "prompt": prompt, "max_tokens": 2000, "ignore_eos": True, "temperature": 0}


@pytest.mark.parametrize("after_s", [0.001, 0.01, 0.03, 0.06, 0.1, 0.15, 0.25, 0.5])
def test_hanging_up_before_the_answer_frees_both_nodes(cluster: Client, after_s: float) -> None:
    """From before placement, through prefill, handoff and pull, into decode."""
    with contextlib.suppress(httpx.TimeoutException):
        httpx.post(cluster.base_url + "/v1/completions", json=_body(int(after_s * 1e3)), timeout=after_s)
        pytest.fail("2000 tokens cannot have been made by then")
    cluster.wait_idle(timeout_s=5)


@pytest.mark.parametrize("after_lines", [1, 3, 40])
def test_hanging_up_in_a_stream_frees_both_nodes(cluster: Client, after_lines: int) -> None:
    body = _body(after_lines) | {"stream": True}
    with httpx.stream("POST", cluster.base_url + "/v1/completions", json=body, timeout=30) as response:
        for count, _ in enumerate(response.iter_lines(), 1):
            if count >= after_lines:
                break
    cluster.wait_idle(timeout_s=5)


def test_hanging_up_on_several_sequences_frees_them_all(cluster: Client) -> None:
    body = _body(99, prompt_tokens=200) | {"stream": True, "n": 4, "temperature": 1.0}
    with httpx.stream("POST", cluster.base_url + "/v1/completions", json=body, timeout=30) as response:
        next(response.iter_lines())
    cluster.wait_idle(timeout_s=5)


def test_the_cluster_serves_on_after_many_hang_ups(cluster: Client) -> None:
    for seed in range(20):
        with contextlib.suppress(httpx.TimeoutException):
            httpx.post(cluster.base_url + "/v1/completions", json=_body(seed), timeout=0.02 + 0.01 * seed)
    cluster.wait_idle(timeout_s=10)
    assert cluster.complete("still there?").status_code == 200
