"""The open-loop client against a real socket: what it sends, when, and what it counts."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest
from sse_server import SseServer, running

from benchmarks.open_loop import (
    FIRST_TOKEN_ID,
    Call,
    Sent,
    Writer,
    by_class,
    count_in,
    followers,
    send,
    send_all,
)
from benchmarks.scenarios import SCENARIOS, make
from coordinator.config import load_config
from coordinator.endpoint.slo import read_asked

VOCABULARY = 3072


def _writer(**how: bool) -> Writer:
    return Writer("m", VOCABULARY, np.random.default_rng(1), **how)


def _encoded(body: dict[str, Any]) -> bytes:
    return json.dumps(body).encode()


def _caller(client: httpx.AsyncClient, bodies: list[bytes]) -> Call:
    async def call(index: int, due_s: float) -> Sent:
        return await send(client, bodies[index], due_s)

    return call


@pytest.mark.parametrize(
    ("stream", "tokens"),
    [
        (b"", 0),
        (b'data: {"usage":{"prompt_tokens":9}}', 0),
        (b'{"completion_tokens":7}', 7),
        (b'{"completion_tokens": 7, "x": 1}\n\n{"completion_tokens": 12}', 12),
        (b'{"completion_tokens":7}\n\n{"completion_tokens":1', 7),  # the 1 may be the beginning of 12
        (b'{"completion_tokens":7}\n\n{"completion_tokens":', 7),
    ],
)
def test_the_last_whole_count_of_a_stream_is_read(stream: bytes, tokens: int) -> None:
    assert count_in(stream) == tokens


def test_bodies_have_the_lengths_of_the_workload_and_do_not_tell_when_outputs_end() -> None:
    workload = make("chatbot", 3.0, 20.0, 1, divide=6.0)
    bodies = _writer().bodies(workload, by_class(workload))
    assert [len(body["prompt"]) for body in bodies] == workload.prompt_tokens.tolist()
    assert [body["min_tokens"] + 1 for body in bodies] == workload.output_tokens.tolist()
    assert {body["max_tokens"] for body in bodies} == {round(2048 / 6)}
    for body in bodies:
        (stop_id,) = body["stop_token_ids"]
        assert body["logit_bias"] == {str(stop_id): 100.0}
        assert all(FIRST_TOKEN_ID <= token < stop_id < VOCABULARY for token in body["prompt"])
        assert body["slo"] == {"class": "chatbot"}


def test_a_body_without_an_end_or_a_promise_tells_of_neither() -> None:
    body = _writer(ends=False).body(12, 5, 340)
    assert not {"stop_token_ids", "logit_bias", "min_tokens", "slo"} & set(body)
    assert body["max_tokens"] == 340


def test_two_runs_of_a_writer_share_no_prompt() -> None:
    writer = _writer()
    prompts = [writer.body(40, 8, 340)["prompt"][:8] for _ in range(4)]
    assert len({tuple(prompt) for prompt in prompts}) == 4


async def test_tokens_are_timed_from_when_a_request_should_have_been_sent() -> None:
    body = _encoded(_writer().body(12, 5, 340))
    with running(SseServer(token_delay_s=0.02)) as server:
        async with httpx.AsyncClient(base_url=server.base_url) as client:
            sent = await send(client, body, time.perf_counter() - 1.0)
    assert sent.error is None
    assert sent.late_s == pytest.approx(1.0, abs=0.05)
    assert len(sent.token_times_s) == 5
    assert sent.token_times_s == sorted(sent.token_times_s)
    assert sent.token_times_s[0] > 1.02
    assert sent.token_times_s[-1] > 1.1


async def test_a_client_that_has_enough_hangs_up_and_counts_no_more() -> None:
    body = _encoded(_writer(ends=False).body(12, 5, 200))
    with running(SseServer(token_delay_s=0.01)) as server:
        async with httpx.AsyncClient(base_url=server.base_url) as client:
            sent = await send(client, body, time.perf_counter(), enough=5)
    assert sent.error is None
    assert len(sent.token_times_s) == 5
    assert sent.token_times_s[-1] < 1.0  # of 200 tokens the last comes after two seconds


async def test_a_slow_answer_holds_no_other_request_back() -> None:
    bodies = [_encoded(_writer().body(12, 20, 340)) for _ in range(4)]
    told: list[float] = []
    with running(SseServer(token_delay_s=0.03)) as server:
        async with httpx.AsyncClient(base_url=server.base_url) as client:
            sent = await send_all(_caller(client, bodies), [0.0, 0.05, 0.1, 0.15], told.append)
    assert [len(one.token_times_s) for one in sent] == [20] * 4
    assert all(one.token_times_s[0] < 0.5 < one.token_times_s[-1] for one in sent)
    assert told


async def test_a_call_of_a_chain_is_due_when_the_one_before_it_has_ended_and_a_while() -> None:
    began_s: list[tuple[int, float]] = []

    async def call(index: int, due_s: float) -> Sent:
        began_s.append((index, due_s))
        return Sent(late_s=time.perf_counter() - due_s)

    begin_s = time.perf_counter()
    sent = await send_all(call, [0.0, 0.0, 0.0], lambda _: None, {0: (1, 0.1), 1: (2, 0.05)})
    assert [index for index, _ in began_s] == [0, 1, 2]
    due_s = [due - begin_s for _, due in began_s]
    assert due_s[1] >= due_s[0] + 0.1
    assert due_s[2] >= due_s[1] + 0.05
    assert all(one.late_s >= 0 for one in sent)


def test_followers_are_the_calls_that_a_workload_chains() -> None:
    workload = make("tool", 3.0, 20.0, 1, divide=6.0)
    found = followers(workload)
    assert sorted(index for index, _ in found.values()) == np.flatnonzero(workload.parent >= 0).tolist()
    assert all(workload.parent[index] == before for before, (index, _) in found.items())
    assert not followers(replace(workload, parent=np.full(len(workload), -1)))


async def test_what_is_not_served_is_an_error_and_not_an_exception() -> None:
    body = _encoded(_writer().body(12, 5, 340))
    with running(SseServer(fault="refuse")) as server:
        async with httpx.AsyncClient(base_url=server.base_url) as client:
            sent = await send(client, body, time.perf_counter())
    assert sent.error is not None
    assert "503" in sent.error
    async with httpx.AsyncClient(base_url=server.base_url) as client:  # it is gone
        assert (await send(client, body, time.perf_counter())).error is not None


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_an_endpoint_knows_what_every_scenario_asks_for(scenario: str) -> None:
    config = load_config("colocated")
    for field in by_class(make(scenario, 2.0, 30.0, 1)):
        asked = read_asked(field, config.slo_classes)
        assert asked.malformed is None
        assert not asked.empty


@pytest.mark.parametrize("enough", [None, 3])
async def test_what_ran_without_its_slo_is_an_error(enough: int | None) -> None:
    body = _encoded(_writer().body(12, 5, 340, {"class": "unknown"}))
    with running(SseServer(fault="malformed")) as server:
        async with httpx.AsyncClient(base_url=server.base_url) as client:
            sent = await send(client, body, time.perf_counter(), enough)
    assert len(sent.token_times_s) == (enough or 5)
    assert sent.error == "malformed, served best effort"
