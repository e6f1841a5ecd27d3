"""A pair gives what one engine alone gives, token for token; and every row of the feature table is served
by whom it says (kv_transfer/README.md)."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.e2e.conftest import Client, Stock

LENGTHS = [1, 2, 7, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 96, 127, 200, 333, 512, 777, 1500]


def _prompt(length: int, seed: int = 0) -> list[int]:
    draw = random.Random(length * 1000 + seed)
    return [draw.randrange(10, 1500) for _ in range(length)]


def _tokens(response: Any) -> list[int]:
    assert response.status_code == 200, response.text
    return list(response.json()["choices"][0]["token_ids"])


def test_tokens_through_a_pair_equal_those_of_one_engine_alone(cluster: Client, stock: Stock) -> None:
    prompts = [_prompt(length) for length in LENGTHS]
    with ThreadPoolExecutor(4) as pool:
        responses = list(
            pool.map(lambda prompt: cluster.complete(prompt, max_tokens=24, return_token_ids=True), prompts)
        )
    expected = stock.ask([{"prompt_token_ids": prompt, "max_tokens": 24} for prompt in prompts])
    for prompt, response, answer in zip(prompts, responses, expected, strict=True):
        assert response.headers["x-slosserve-placement"] == "prefill-0>decode-0"
        assert _tokens(response) == answer[0], f"prompt of {len(prompt)} tokens"


FEATURES: dict[str, tuple[str, dict[str, Any]]] = {
    "n": ("decode-0", {"n": 3, "seed": 7, "temperature": 1.0}),
    "prompt_logprobs": ("decode-0", {"prompt_logprobs": 2}),
    "logprobs": ("prefill-0>decode-0", {"logprobs": 3}),
    "penalties": (
        "prefill-0>decode-0",
        {"repetition_penalty": 1.7, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    ),
    "seed": ("prefill-0>decode-0", {"seed": 1234, "temperature": 1.0, "top_p": 0.9}),
    "min_tokens": ("prefill-0>decode-0", {"min_tokens": 12}),
    "logit_bias": ("prefill-0>decode-0", {"logit_bias": {"77": 80.0}}),
}


@pytest.fixture(scope="module")
def expected(stock: Stock) -> dict[str, Any]:
    requests = [{"prompt_token_ids": _prompt(70, seed=5), **extra} for _, extra in FEATURES.values()]
    return dict(zip(FEATURES, stock.ask(requests), strict=True))


@pytest.mark.parametrize("feature", FEATURES)
def test_each_feature_is_served_by_whom_the_table_says_and_as_by_one_engine(
    cluster: Client, expected: dict[str, Any], feature: str
) -> None:
    placement, extra = FEATURES[feature]
    response = cluster.complete(_prompt(70, seed=5), return_token_ids=True, **extra)
    assert response.status_code == 200, response.text
    assert response.headers["x-slosserve-placement"] == placement
    choices = sorted(response.json()["choices"], key=lambda choice: choice["index"])
    assert [choice["token_ids"] for choice in choices] == expected[feature]
    if feature == "logprobs":
        assert len(choices[0]["logprobs"]["token_logprobs"]) == 16
    if feature == "prompt_logprobs":
        assert len(choices[0]["prompt_logprobs"]) == 70


@pytest.mark.parametrize("end", ["length", "stop"])
def test_an_answer_of_one_token_ends_on_the_prefill_node(cluster: Client, end: str) -> None:
    prompt = _prompt(60, seed=11)
    whole = cluster.complete(prompt, return_token_ids=True).json()["choices"][0]["token_ids"]
    more = {"max_tokens": 1} if end == "length" else {"stop_token_ids": whole[:1]}
    response = cluster.complete(prompt, return_token_ids=True, **more)
    (choice,) = response.json()["choices"]
    assert response.headers["x-slosserve-placement"] == "prefill-0>decode-0"
    assert (choice["token_ids"], choice["finish_reason"]) == (whole[:1], end)


def test_a_stop_string_ends_a_stream_on_a_pair(cluster: Client) -> None:
    prompt = _prompt(50, seed=9)
    whole = cluster.complete(prompt, max_tokens=32).json()["choices"][0]["text"]
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    response = cluster.complete(prompt, max_tokens=32, stop=[stop])
    choice = response.json()["choices"][0]
    assert response.headers["x-slosserve-placement"] == "prefill-0>decode-0"
    assert choice["finish_reason"] == "stop"
    assert choice["text"] == whole[: whole.index(stop)]


def test_structured_outputs_are_obeyed_on_a_pair(cluster: Client) -> None:
    response = cluster.complete(
        _prompt(40, seed=3), max_tokens=20, structured_outputs={"choice": ["yes indeed", "no never"]}
    )
    assert response.headers["x-slosserve-placement"] == "prefill-0>decode-0"
    assert response.json()["choices"][0]["text"] in ("yes indeed", "no never")


def test_a_clients_own_kv_transfer_params_are_refused(cluster: Client) -> None:
    response = cluster.complete("hello", kv_transfer_params={"do_remote_prefill": True, "remote_host": "evil"})
    assert response.status_code == 400
    assert "kv_transfer_params is not accepted" in response.text


def test_promises_are_kept_by_a_node_whose_clock_is_off(cluster: Client) -> None:
    """decode-0 runs with its clock 5 s ahead."""
    for seed in range(3):
        response = cluster.complete(_prompt(100, seed=seed), slo={"class": "chatbot"})
        assert response.headers["x-slosserve-verdict"] == "admitted"
        told = cluster.get(f"/requests/{response.headers['x-slosserve-request-id']}")
        assert told["stages"]["prefill"], told
        assert told["attempts"] == 1
