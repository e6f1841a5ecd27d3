"""Why: every decision can be asked about and replayed; and a follow-up call goes where its KV is."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import httpx

from tests.e2e.conftest import REPORT_LAG_S, Client

RUN_CLI = "from coordinator.cli import main; main()"


def test_a_live_decision_is_explained_and_its_problem_replays_to_the_same_answer(cluster: Client) -> None:
    response = cluster.complete("explain this " * 40, max_tokens=4, slo={"ttft_ms": 5000, "tpot_ms": 500})
    explained = cluster.get(f"/explain/{response.headers['x-slosserve-request-id']}")
    assert explained["verdict"] == "admitted"
    chosen = next(one for one in explained["candidates"] if one["feasible"])
    assert chosen["loss_s"] > 0
    assert chosen["decisions"][0]["instance"]["cost"]["per_context_token_s"] > 0, "the model's step profile"
    for decision in chosen["decisions"]:
        replayed = subprocess.run(
            [sys.executable, "-c", RUN_CLI, "plan", "--instance", "-"],
            input=json.dumps(decision["instance"]),
            capture_output=True,
            text=True,
            check=True,
        )
        answer = json.loads(replayed.stdout)
        assert answer["admitted"] == decision["answer"]["admitted"] != []
        assert answer["missed"] == []


def test_what_was_never_decided_cannot_be_explained(cluster: Client) -> None:
    answer = httpx.get(f"{cluster.base_url}/explain/cmpl-nothing", timeout=10)
    assert answer.status_code == 404
    assert "cmpl-nothing" in answer.text


def test_a_follow_up_call_is_a_small_prompt_where_its_kv_is(cluster: Client) -> None:
    slo = {"ttft_ms": 5000, "tpot_ms": 500}
    story = "a session with a long memory " * 60
    first = cluster.complete(story, max_tokens=4, slo=slo)
    assert first.headers["x-slosserve-placement"] == "prefill-0>decode-0"
    time.sleep(REPORT_LAG_S)
    second = cluster.complete(story + "and one more thing", max_tokens=4, slo=slo)
    explained = cluster.get(f"/explain/{second.headers['x-slosserve-request-id']}")
    alone = next(one for one in explained["candidates"] if one["name"] == "decode-0")
    assert alone["feasible"]
    (asked,) = alone["decisions"][0]["instance"]["newcomers"]
    assert 0 < asked["tokens"] < asked["cached_tokens"]
