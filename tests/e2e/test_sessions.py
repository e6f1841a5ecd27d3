"""Sessions on real engines: the next call finds its history, and a loop of calls has one deadline."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from msgspec import structs

from benchmarks.agents import anthropic_agent, openai_agent
from benchmarks.agents.client import AgentsJob, run
from benchmarks.agents.load import Loop, draw_loops
from benchmarks.agents.measure import add_up
from benchmarks.hardware import hardware
from engine.models import load_recipe
from tests.e2e.conftest import Client

EASY = {"ttft_ms": 5000, "tpot_ms": 500}
PATIENCE_S = 10.0


def _call(cluster: Client, session: str, messages: list[dict[str, Any]], **more: Any) -> httpx.Response:
    body = {"model": "tiny", "messages": messages, "max_tokens": 24, "temperature": 0, "ignore_eos": True}
    return cluster.post("/v1/chat/completions", json=body | more, headers={"x-session-id": session})


def _record(cluster: Client, response: httpx.Response) -> dict[str, Any]:
    found: dict[str, Any] = cluster.get(f"/requests/{response.headers['x-slosserve-request-id']}")
    return found


def _kept(cluster: Client, session: str) -> httpx.Response:
    return httpx.get(f"{cluster.base_url}/v1/sessions/{session}", timeout=10)


def _close(cluster: Client, session: str) -> httpx.Response:
    return httpx.delete(f"{cluster.base_url}/v1/sessions/{session}", timeout=10)


def _wait_kept(cluster: Client, session: str, status: int) -> httpx.Response:
    deadline_s = time.monotonic() + PATIENCE_S
    while (answer := _kept(cluster, session)).status_code != status:
        assert time.monotonic() < deadline_s, answer.text
        time.sleep(0.05)
    return answer


@pytest.mark.parametrize("slo", [None, EASY], ids=["best effort", "promised"])
def test_the_next_call_of_a_session_goes_where_its_history_is_and_computes_what_is_new(
    cluster: Client, slo: dict[str, Any] | None
) -> None:
    session = "loop" if slo is None else "promised-loop"
    more = {} if slo is None else {"slo": slo}
    history: list[dict[str, Any]] = [{"role": "user", "content": f"{session}: look at this. " * 30}]
    first = _call(cluster, session, history, **more)
    assert first.headers["x-slosserve-placement"] == "prefill-0>decode-0"
    prompt_tokens = first.json()["usage"]["prompt_tokens"]
    deadline_s = time.monotonic() + PATIENCE_S
    while (kept := _wait_kept(cluster, session, 200).json())["kept_tokens"] < prompt_tokens - 32:
        assert time.monotonic() < deadline_s, f"all full blocks of {prompt_tokens} tokens, and not {kept}"
        time.sleep(0.05)
    assert kept["node"] == "decode-0"
    # The answer of a random model does not come back as the tokens it was: what is sure is the prompt.
    history += [first.json()["choices"][0]["message"], {"role": "user", "content": "And now?"}]
    second = _call(cluster, session, history, **more)
    assert second.headers["x-slosserve-placement"] == "decode-0", "no KV has to move"
    assert _record(cluster, second)["cached_tokens"] >= 0.8 * prompt_tokens
    assert _close(cluster, session).json()["closed"]
    assert _wait_kept(cluster, session, 404).json()["error"]["message"]


def test_an_idle_session_outlasts_what_passes_through_and_costs_a_promise_nothing(cluster: Client) -> None:
    before = cluster.nodes()["decode-0"]
    history: list[dict[str, Any]] = [{"role": "user", "content": "remember me. " * 40}]
    first = _call(cluster, "idle", history)
    _wait_kept(cluster, "idle", 200)
    cluster.wait_idle()
    node = cluster.nodes()["decode-0"]
    assert node["used_blocks"] == before["used_blocks"] == 0, "what is kept is free for whoever needs it"
    assert node["sessions"] >= 1
    for turn in range(6):
        passing = cluster.complete(f"passing through {turn}. " * 60, max_tokens=4, slo=EASY)
        assert passing.headers["x-slosserve-verdict"] == "admitted"
    again = _call(cluster, "idle", history)
    assert again.headers["x-slosserve-placement"] == "decode-0"
    assert _record(cluster, again)["cached_tokens"] >= first.json()["usage"]["prompt_tokens"] - 32
    _close(cluster, "idle")
    _wait_kept(cluster, "idle", 404)


@contextlib.contextmanager
def _stream_on(cluster: Client, node: str) -> Iterator[None]:
    """A long stream on a node, and none elsewhere."""
    long = {"model": "tiny", "prompt": "a long story", "max_tokens": 2000, "ignore_eos": True, "stream": True}
    with httpx.Client(base_url=cluster.base_url, timeout=60) as client:
        streams: list[httpx.Response] = []
        while not streams or streams[-1].headers["x-slosserve-placement"] != node:
            assert len(streams) < 4, f"none was placed on {node}"
            streams.append(client.send(client.build_request("POST", "/v1/completions", json=long), stream=True))
        for stream in streams[:-1]:
            stream.close()
        deadline_s = time.monotonic() + PATIENCE_S
        while [name for name, one in cluster.nodes().items() if one["requests"]] != [node]:
            assert time.monotonic() < deadline_s, cluster.nodes()
            time.sleep(0.05)
        yield
        streams[-1].close()


def _links(cluster: Client) -> list[tuple[str, str]]:
    """Those that were measured: KV can go over them."""
    links = cluster.get("/cluster")["links"]
    return [(link["source"], link["target"]) for link in links if not link.get("error")]


def _wait_done(cluster: Client, node: str) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while cluster.nodes()[node]["requests"] or cluster.nodes()[node]["placed"]:
        assert time.monotonic() < deadline_s, cluster.nodes()[node]
        time.sleep(0.05)


@pytest.fixture
def swapped(cluster: Client) -> Iterator[Client]:
    """The cluster, whose nodes have their roles again when a test has exchanged them."""
    yield cluster
    cluster.wait_idle()
    for sizes in ({"prefill": 0, "decode": 2}, {"prefill": 1, "decode": 1}):
        assert cluster.set_pools(**sizes).status_code == 200
    assert cluster.nodes()["prefill-0"]["role"] == "prefill"


def test_a_history_moves_to_another_node_where_the_one_that_has_it_only_prefills(swapped: Client) -> None:
    history: list[dict[str, Any]] = [{"role": "user", "content": "where does this go? " * 40}]
    swapped.wait_idle()
    assert swapped.set_pools(prefill=0, decode=2).status_code == 200
    with _stream_on(swapped, "prefill-0"):  # the one with less to do gets the call, and then the other role
        first = _call(swapped, "moves", history, slo=EASY)
        assert first.headers["x-slosserve-placement"] == "decode-0", "nobody else has read this"
        assert _wait_kept(swapped, "moves", 200).json()["node"] == "decode-0"
        _wait_done(swapped, "decode-0")
        assert swapped.set_pools(prefill=1, decode=1).status_code == 200
    prompt_tokens = first.json()["usage"]["prompt_tokens"]
    swapped.wait_idle()
    assert swapped.nodes()["decode-0"]["role"] == "prefill"
    deadline_s = time.monotonic() + PATIENCE_S
    while ("decode-0", "prefill-0") not in _links(swapped):
        assert time.monotonic() < deadline_s, _links(swapped)
        time.sleep(0.05)
    history += [{"role": "assistant", "content": "To you."}, {"role": "user", "content": "And now?"}]
    second = _call(swapped, "moves", history, slo=EASY)
    elsewhere = _call(swapped, "nobody's", history, slo=EASY, cache_salt="nothing of it is cached")
    assert second.headers["x-slosserve-placement"] == "decode-0>prefill-0"
    assert _record(swapped, second)["cached_tokens"] >= 0.8 * prompt_tokens, "only what is new is computed"
    assert second.json()["choices"][0]["message"] == elsewhere.json()["choices"][0]["message"]
    deadline_s = time.monotonic() + PATIENCE_S
    while _kept(swapped, "moves").json().get("node") != "prefill-0":
        assert time.monotonic() < deadline_s, _kept(swapped, "moves").text
        time.sleep(0.05)
    for session in ("moves", "nobody's"):
        _close(swapped, session)
        _wait_kept(swapped, session, 404)


def test_nobody_elses_history_is_there_to_be_seen(cluster: Client) -> None:
    """A session is a hint of where KV is; what it is, prompts say."""
    mine = [{"role": "user", "content": "a history of mine. " * 30}]
    other = [{"role": "user", "content": "something else altogether. " * 30}]
    _call(cluster, "shared", mine)
    _wait_kept(cluster, "shared", 200)
    alone = _call(cluster, "nobody", other).json()["choices"][0]["message"]["content"]
    theirs = _call(cluster, "shared", other)
    assert theirs.json()["choices"][0]["message"]["content"] == alone
    for session in ("shared", "nobody"):
        _close(cluster, session)
        _wait_kept(cluster, session, 404)


def test_a_session_that_never_was_is_not_found_and_can_be_closed(cluster: Client) -> None:
    assert _kept(cluster, "never").status_code == 404
    assert "never" in _kept(cluster, "never").text
    assert _close(cluster, "never").status_code == 200


NUMBER = {"type": "integer", "minimum": 1, "maximum": 9}
PARAMETERS = {
    "type": "object",
    "properties": {"n": NUMBER},
    "required": ["n"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "look", "strict": True, "parameters": PARAMETERS}}]
LOOK = {"type": "function", "function": {"name": "look"}}
FORCED = {"tools": TOOLS, "tool_choice": LOOK, "ignore_eos": False}


def test_a_loop_of_calls_has_one_deadline_and_ends_with_the_call_that_answers(cluster: Client) -> None:
    before = cluster.get("/cluster")["loops"].get("tool", {"total": 0, "met": 0, "calls": 0})
    slo = {"class": "tool", "ttft_ms": 5000, "tpot_ms": 500, "loop_ms": 60_000}
    history: list[dict[str, Any]] = [{"role": "user", "content": "find it"}]
    left_s: list[float] = []
    for turn in range(2):
        called = _call(cluster, "deadline", history, slo=slo, max_tokens=64, **FORCED)
        message = called.json()["choices"][0]["message"]
        loop = _record(cluster, called)["loop"]
        assert loop["call"] == turn + 1
        assert "met" not in loop, "a tool is called: it goes on"
        left_s.append(loop["left_s"])
        result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "here"}
        history += [message, result]
        time.sleep(0.2)
    answer = _call(cluster, "deadline", history, slo=slo, tools=TOOLS, tool_choice="none")
    loop = _record(cluster, answer)["loop"]
    assert (loop["call"], loop["met"], loop["calls"]) == (3, True, 3)
    assert 60 >= left_s[0] > left_s[1] + 0.2 > loop["left_s"] + 0.4
    assert 0.4 < loop["seconds"] < 60
    deadline_s = time.monotonic() + PATIENCE_S
    while (after := cluster.get("/cluster")["loops"].get("tool", before))["total"] == before["total"]:
        assert time.monotonic() < deadline_s, "the loop was not counted"
        time.sleep(0.05)
    assert (after["total"], after["met"]) == (before["total"] + 1, before["met"] + 1)
    words = " ".join(cluster.get(f"/explain/{answer.headers['x-slosserve-request-id']}")["why"])
    assert "Call 3 of its loop" in words
    assert "It was the last" in words
    again = _call(cluster, "deadline", history[:1], slo=slo, tools=TOOLS, tool_choice="none")
    assert _record(cluster, again)["loop"]["call"] == 1, "the next question is a loop of its own"
    _close(cluster, "deadline")
    _wait_kept(cluster, "deadline", 404)


def test_a_deadline_without_a_session_is_said_to_be_one_too_few(cluster: Client) -> None:
    response = cluster.complete("alone", slo={"loop_ms": 1000})
    assert response.status_code == 200
    assert "x-session-id" in response.headers["x-slosserve-slo"]


async def test_agents_of_the_benchmark_get_their_histories_back(cluster: Client) -> None:
    known = hardware("scale")
    loops = draw_loops(known, 2.0, 2.0, seed=3)
    shorter = [
        Loop(loop.at_s, [structs.replace(call, tool_s=0.1) for call in loop.calls[:3]]) for loop in loops
    ]
    job = AgentsJob(
        targets=[cluster.base_url],
        sticky=False,
        sessions=True,
        slos=False,
        name="test-agents",
        model="tiny",
        vocab_size=load_recipe("tiny").vocab_size,
        loops=shorter,
        cut_off_s=60.0,
    )
    before = cluster.get("/cluster")["placements"]["one_node"]
    seen = await run(job)
    row = add_up(shorter, seen, block_tokens=16)
    assert row["ended"] == row["loops"] == len(shorter) > 0
    assert row["errors"] == 0, row["error_samples"]
    assert row["reused_share"] > 0.8
    later = sum(len(loop.calls) - 1 for loop in shorter)
    alone = cluster.get("/cluster")["placements"]["one_node"] - before
    assert alone >= later // 2, "histories of half a block more than new stay where they are"
    for number in range(len(shorter)):
        _close(cluster, f"test-agents-{number}")


@pytest.mark.parametrize("agent", [openai_agent, anthropic_agent], ids=["OpenAI", "Anthropic"])
def test_the_agents_of_the_readme_run_their_tools_and_come_back_in_time(
    cluster: Client, agent: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def loops() -> int:
        counts = cluster.get("/cluster")["loops"]
        return sum(count["met"] for count in counts.values())

    before = loops()
    agent.main(["What is here?", "--url", cluster.base_url, "--turns", "2", "--loop-ms", "60000"])
    lines = capsys.readouterr().out.splitlines()
    assert sum("look" in line for line in lines[:2]) == 2
    deadline_s = time.monotonic() + PATIENCE_S
    while loops() == before:
        assert time.monotonic() < deadline_s, "its loop was not counted as met"
        time.sleep(0.05)


def test_a_response_that_names_the_one_before_goes_on_from_its_history(cluster: Client) -> None:
    ask = {"model": "tiny", "max_output_tokens": 24, "temperature": 0}
    text = "look at this, and this. " * 40
    first = cluster.openai.responses.create(input=text, **ask)
    _wait_kept(cluster, first.id, 200)
    second = cluster.openai.responses.create(input="and now?", previous_response_id=first.id, **ask)
    third = cluster.openai.responses.create(input="and then?", previous_response_id=second.id, **ask)
    for response in (second, third):
        assert response.usage is not None
        assert response.usage.input_tokens_details.cached_tokens > response.usage.input_tokens // 2
    assert _close(cluster, first.id).status_code == 200
