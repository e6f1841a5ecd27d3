"""The demo counts what was sent, kept and moved, and a cluster that fails makes it fail."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import typer
from rich.console import Console
from sse_server import SseServer, running
from typer.testing import CliRunner, Result

from benchmarks import agent, cluster_facts, demo_run
from benchmarks.board import report, timeline_steps
from benchmarks.client import ToolCall
from benchmarks.demo import demo
from benchmarks.prompts import PromptWriter
from benchmarks.traces import Arrival

TRACE = "t_s,in_tokens,out_tokens\n" + "".join(f"{n},120,60\n" for n in range(40))


@pytest.fixture(autouse=True)
def _quick_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "TOOL_MEDIAN_S", 0.05)
    monkeypatch.setattr(demo_run, "FACTS_EVERY_S", 0.1)


def _run(server: SseServer, folder: Path, *options: str) -> Result:
    trace = folder / "trace.csv"
    trace.write_text(TRACE)
    app = typer.Typer()
    app.command()(demo)
    fixed = ["--url", server.base_url, "--trace", str(trace), "--out", str(folder / "out" / "summary.json")]
    return CliRunner().invoke(app, [*fixed, "--duration-s", "1", "--rate", "12", *options])


def test_summary_counts_everything(tmp_path: Path) -> None:
    with running(SseServer(token_delay_s=0.002)) as server:
        result = _run(server, tmp_path)
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["errors"] == 0
    assert summary["requests"] == summary["completed"] == len(server.bodies) > 12
    assert summary["handoffs"] == summary["placed_on_pairs"] == len(server.bodies)
    assert summary["kv_bytes"] == 10 * len(server.bodies)
    assert summary["handoff_p50_s"] == 0.01
    assert summary["attainment"]["chatbot"]["stages"]["prefill"]["attainment"] == 1.0
    assert (summary["engine"], summary["transport"]) == ("double 1", "none")
    assert summary["one_request"]["decode_node"] == "d"
    assert summary["provenance"]["seed"] == 1
    assert summary["provenance"]["hardware"]["cores"] >= 1
    assert 0 <= summary["client_lateness_p50_s"] <= summary["client_lateness_p99_s"]
    chatbot = summary["client"]["chatbot"]
    assert 0 < chatbot["ttft_p50_s"] < 1
    assert 0 < chatbot["tpot_p50_s"] < 0.1


def test_requests_carry_class_length_and_session(tmp_path: Path) -> None:
    with running(SseServer()) as server:
        _run(server, tmp_path)
    plain = [body for body in server.bodies if body["slo"]["class"] != "tool"]
    assert {body["slo"]["class"] for body in plain} == {"chatbot", "coder", "summarizer"}
    assert {body["max_tokens"] for body in plain} == {10}
    assert all(body["ignore_eos"] and body["stream"] for body in plain)
    sessions = {h["x-session-id"] for h in server.headers if "x-session-id" in h}
    assert len(sessions) >= 3


def test_agents_send_results_back_and_end_with_a_plain_answer(tmp_path: Path) -> None:
    with running(SseServer()) as server:
        _run(server, tmp_path)
    sessions: dict[str, list[dict[str, object]]] = {}
    for body, headers in zip(server.bodies, server.headers, strict=True):
        if "x-session-id" in headers:
            sessions.setdefault(headers["x-session-id"], []).append(body)
    for bodies in sessions.values():
        assert 2 <= len(bodies) <= 4
        assert all("tools" in body for body in bodies[:-1])
        assert "tools" not in bodies[-1]
        roles = [message["role"] for message in bodies[-1]["messages"]]  # type: ignore[attr-defined]
        assert roles == ["system", "user"] + ["assistant", "tool"] * (len(bodies) - 1)


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("refuse", "no room"),
        ("cut", "incomplete"),
        ("truncate", "JSONDecodeError"),
        ("misfit", "arguments that do not fit"),
    ],
)
def test_a_failing_cluster_makes_the_demo_fail(tmp_path: Path, fault: str, expected: str) -> None:
    with running(SseServer(fault=fault)) as server:
        result = _run(server, tmp_path)
    assert result.exit_code == 1
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["errors"] > 0
    assert any(expected in text for text in summary["error_samples"]), summary["error_samples"]


def test_nobody_there_is_said_clearly(tmp_path: Path) -> None:
    result = _run(SseServer(base_url="http://127.0.0.1:9"), tmp_path)
    assert result.exit_code == 2
    assert "http://127.0.0.1:9" in result.stderr
    assert "Traceback" not in result.output


def test_only_the_run_itself_is_counted() -> None:
    def facts(requests: int, met: int, pairs: int) -> cluster_facts.Facts:
        stages = {"decode": {"met": met, "total": requests}}
        return {
            "attainment": {"coder": {"requests": requests, "met": met, "stages": stages}},
            "placements": {"pair": pairs},
        }

    before, after = facts(10, 4, 7), facts(30, 19, 20)
    kept = cluster_facts.attainment(before, after)["coder"]
    assert (kept["requests"], kept["met"], kept["attainment"]) == (20, 15, 0.75)
    assert kept["stages"]["decode"] == {"total": 20, "met": 15, "attainment": 0.75}
    assert cluster_facts.placed_on_pairs(before, after) == 13
    assert cluster_facts.attainment(after, after) == {}
    assert cluster_facts.handoffs({}, {})["handoffs"] == 0


def test_a_timeline_with_gaps_is_still_told() -> None:
    assert timeline_steps({}) == []
    steps = timeline_steps({"decode_node": "d", "placed_s": 0.5, "first_token_s": 1.0, "decode": None})
    assert [at_s for at_s, _ in steps] == [0.5, 1.0]


def test_the_report_prints_without_facts() -> None:
    summary = {
        "attainment": {},
        "completed": 1,
        "requests": 1,
        "errors": 1,
        "tool_calls": 0,
        "agent_sessions": 0,
        "engine": None,
        "transport": None,
        "placed_on_pairs": 0,
        "one_request": {},
        "error_samples": ["[broken]"],
        **cluster_facts.handoffs({}, {}),
    }
    console = Console(record=True, width=120)
    console.print(report(summary))
    assert "[broken]" in console.export_text()


@pytest.mark.parametrize(
    ("name", "arguments", "result"),
    [
        ("calculate", {"a": 6, "b": 7, "operation": "times"}, "42"),
        ("look_up", {"topic": "decode", "entry": 3}, "keeps a pace"),
    ],
)
def test_tools_run(name: str, arguments: dict[str, object], result: str) -> None:
    tool = next(tool for tool in agent.TOOLS if tool.name == name)
    assert tool.answer(ToolCall("1", name, arguments)) == result


@pytest.mark.parametrize("arguments", [{}, {"city": "atlantis"}, {"city": "lima", "more": 1}])
def test_tools_refuse_what_does_not_fit(arguments: dict[str, object]) -> None:
    tool = next(tool for tool in agent.TOOLS if tool.name == "clock")
    with pytest.raises(ValueError, match="do not fit"):
        tool.answer(ToolCall("1", "clock", arguments))


def test_every_tool_is_strict_and_closed() -> None:
    for tool in agent.TOOLS:
        function = tool.schema["function"]
        assert function["strict"] is True
        assert function["parameters"]["additionalProperties"] is False
        assert function["parameters"]["required"] == list(tool.parameters)


def test_prompts_have_their_length_and_differ() -> None:
    writer = PromptWriter(seed=1)
    texts = [writer.write(Arrival(0.0, 200, 10, "chatbot")) for _ in range(20)]
    assert len(set(texts)) == 20
    assert all(170 < len(text.split()) <= 200 for text in texts)
    assert texts[0] == PromptWriter(seed=1).write(Arrival(0.0, 200, 10, "chatbot"))


def test_prompts_share_the_blocks_that_a_trace_shares() -> None:
    writer = PromptWriter(seed=1, block_tokens=50)
    first, second = (writer.write(Arrival(0.0, 170, 1, "", prefix_hashes=(7, 8, last))) for last in (1, 2))
    shared = np.array(first.split()[:102]) == np.array(second.split()[:102])
    assert shared.all()
    assert first != second
