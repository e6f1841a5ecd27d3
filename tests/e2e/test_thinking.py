"""Two paces in one request, on real engines: that of thinking until its end, then that of the answer."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import AutoTokenizer

from engine.models import resolve_model
from tests.e2e.conftest import Client

WORDS = range(500, 530)  # a random model never stops thinking: it says one of these, or the end of thinking
OUTPUT_TOKENS = 90
LONG = 500  # tokens of an answer that takes longer than what thinking was ahead by


@pytest.fixture(scope="module")
def think_end_id() -> int:
    return int(AutoTokenizer.from_pretrained(resolve_model("tiny")).get_vocab()["</think>"])


def _thinks(
    cluster: Client, end_id: int, seed: int, max_tokens: int = OUTPUT_TOKENS, **more: Any
) -> tuple[int, dict[str, Any]]:
    """How many tokens came up to the end of thinking, and what the cluster says of the request."""
    response = cluster.complete(
        "think about it " * 10,
        max_tokens=max_tokens,
        ignore_eos=True,
        temperature=1.0,
        seed=seed,
        allowed_token_ids=[*WORDS, end_id],
        return_token_ids=True,
        **more,
    )
    assert response.status_code == 200, response.text
    tokens = response.json()["choices"][0]["token_ids"]
    thought = tokens.index(end_id) + 1 if end_id in tokens else max_tokens
    return thought, cluster.get(f"/explain/{response.headers['x-slosserve-request-id']}")


def _seed_that_thinks(cluster: Client, end_id: int) -> int:
    return next(seed for seed in range(100) if 5 <= _thinks(cluster, end_id, seed)[0] <= 15)


def test_both_paces_are_promised_kept_and_scored(cluster: Client, think_end_id: int) -> None:
    seed = _seed_that_thinks(cluster, think_end_id)
    slo = {"ttft_ms": 4000, "tpot_ms": 900, "thinking_tpot_ms": 300}
    thought, explained = _thinks(cluster, think_end_id, seed, slo=slo)
    assert (explained["verdict"], explained["met"]) == ("admitted", True)
    prefill, thinking, answer = explained["stages"]
    assert [stage["kind"] for stage in (prefill, thinking, answer)] == ["prefill", "thinking", "answer"]
    assert [stage["met"] for stage in (prefill, thinking, answer)] == [True, True, True]
    assert (thinking["tokens"], answer["tokens"]) == (thought - 1, OUTPUT_TOKENS - thought)
    assert thinking["due_s"] == pytest.approx(4.0 + (thought - 1) * 0.3)
    assert answer["due_s"] == pytest.approx(thinking["due_s"] + (OUTPUT_TOKENS - thought) * 0.9)
    times = {one["part"]: one["seconds"] for one in explained["times"]}
    assert times["thinking"] > 0
    assert times["generating the answer"] > 0


def test_each_stage_is_scored_by_its_own_pace(cluster: Client, think_end_id: int) -> None:
    """An answer whose pace nobody could keep is missed, and thinking that went well before it is not."""
    seed = _seed_that_thinks(cluster, think_end_id)
    slo = {"ttft_ms": 300, "tpot_ms": 0.01, "thinking_tpot_ms": 60}
    _, explained = _thinks(cluster, think_end_id, seed, LONG, slo=slo)
    assert explained["verdict"] == "admitted", "what thinks is promised the pace of its thinking"
    assert [stage["met"] for stage in explained["stages"]] == [True, True, False]
    assert any(sentence.startswith("The answer was late") for sentence in explained["why"])
    kept = cluster.get("/cluster")["attainment"]["custom"]["stages"]
    assert json.dumps(kept).count("met") == 3
    assert kept["thinking"]["met"] >= 1
