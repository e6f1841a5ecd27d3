"""Why: every decision can be asked about and replayed; and a follow-up call goes where its KV is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import httpx
import pytest

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


EASY = {"ttft_ms": 5000, "tpot_ms": 500}
HOPELESS = {"ttft_ms": 1, "tpot_ms": 500}  # no prompt is computed so soon


def _explained(cluster: Client, response: httpx.Response) -> dict[str, Any]:
    """By the command, as a person would ask; and what it printed for people has the same words."""
    request_id = response.headers["x-slosserve-request-id"]
    asked = [sys.executable, "-c", RUN_CLI, "explain", request_id, "--url", cluster.base_url]
    shown = subprocess.run(
        asked, capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "400"}
    )
    told = subprocess.run([*asked, "--json"], capture_output=True, text=True, check=True)
    explained: dict[str, Any] = json.loads(told.stdout)
    for sentence in explained["why"]:
        assert sentence in shown.stdout
    return explained


def _timed(cluster: Client, **body: Any) -> tuple[httpx.Response, float]:
    """Over a connection that is there already: making a client takes as long as some answers."""
    asked = {"model": "tiny", "prompt": "why was this so slow " * 30, "max_tokens": 150, "ignore_eos": True}
    with httpx.Client(base_url=cluster.base_url, timeout=60) as client:
        client.get("/health")
        began_s = time.monotonic()
        response = client.post("/v1/completions", json={**asked, "temperature": 0, **body})
        return response, time.monotonic() - began_s


def test_a_met_request_is_explained_and_its_times_add_up_to_what_its_client_saw(cluster: Client) -> None:
    response, latency_s = _timed(cluster, slo=EASY)
    explained = _explained(cluster, response)
    assert (explained["verdict"], explained["met"]) == ("admitted", True)
    assert "Every stage was kept." in explained["why"]
    assert [(one["kind"], one["tokens"], one["met"]) for one in explained["stages"]] == [
        ("prefill", 1, True), ("answer", 149, True),
    ]  # fmt: skip
    assert sum(one["seconds"] for one in explained["times"]) == pytest.approx(latency_s, rel=0.05)
    decoding = explained["work"][explained["placement"][-1]]
    assert 149 <= decoding["batches"] <= 151
    assert explained["work"]["prefill-0"]["chunks"] >= 1
    assert any("of KV moved to decode-0" in sentence for sentence in explained["why"])


def test_a_missed_request_is_explained_by_the_stage_that_was_late(cluster: Client) -> None:
    """Nodes that sleep for half a second, less than what makes them lost, cannot keep what is promised then."""
    pids = [node["pid"] for node in cluster.nodes().values()]

    def wake() -> None:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)

    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    waking = threading.Timer(0.5, wake)
    waking.start()
    try:
        response, latency_s = _timed(cluster, max_tokens=20, slo={"ttft_ms": 400, "tpot_ms": 500})
    finally:
        waking.join()
        wake()
    explained = _explained(cluster, response)
    assert (explained["verdict"], explained["met"]) == ("admitted", False)
    (prefill, _) = explained["stages"]
    assert (prefill["kind"], prefill["met"]) == ("prefill", False)
    assert prefill["late_s"] > 0
    assert any(sentence.startswith("The first token was late by") for sentence in explained["why"])
    assert sum(one["seconds"] for one in explained["times"]) == pytest.approx(latency_s, rel=0.05)


def test_a_deferred_request_is_explained_by_why_it_could_not_be_promised(cluster: Client) -> None:
    response, latency_s = _timed(cluster, slo=HOPELESS)
    explained = _explained(cluster, response)
    assert (explained["verdict"], explained["met"], explained["outcome"]) == ("best_effort", False, "completed")
    assert "It was deferred" in explained["why"][0]
    assert all(one["reason"] for one in explained["candidates"]), "of everyone who was asked"
    assert sum(one["seconds"] for one in explained["times"]) == pytest.approx(latency_s, rel=0.05)


def test_a_refused_request_is_explained_by_who_was_asked_and_why_not(cluster: Client) -> None:
    headers = {"x-slosserve-on-miss": "refuse"}
    body = {"model": "tiny", "prompt": "no " * 50, "max_tokens": 4, "slo": HOPELESS}
    response = cluster.post("/v1/completions", json=body, headers=headers)
    assert response.status_code == 429
    explained = _explained(cluster, response)
    assert (explained["verdict"], explained["outcome"], explained["placement"]) == ("refused", "refused", [])
    assert "It was refused" in explained["why"][0]
    assert {one["feasible"] for one in explained["candidates"]} == {False}


def test_without_an_slo_there_is_no_promise_to_explain_but_there_are_times(cluster: Client) -> None:
    response, latency_s = _timed(cluster)
    explained = _explained(cluster, response)
    assert "It carried no SLO, so nothing was promised" in explained["why"][0]
    assert (explained["stages"], explained["candidates"]) == ([], [])
    assert sum(one["seconds"] for one in explained["times"]) == pytest.approx(latency_s, rel=0.05)


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
