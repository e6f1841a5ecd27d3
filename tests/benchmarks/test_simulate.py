"""`slosserve simulate`: one run, its figures, a row per request, and what is said of bad input."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from coordinator.cli.main import app
from engine.errors import ConfigError

RUNNER = CliRunner()


def simulate(*arguments: str) -> dict[str, object]:
    result = RUNNER.invoke(app, ["simulate", *arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found: dict[str, object] = json.loads(result.stdout)
    return found


@pytest.mark.parametrize(
    "arguments",
    [
        ("--system", "ours", "--replicas", "2"),
        ("--system", "ours", "--prefill", "1", "--decode", "1"),
        ("--system", "ours", "--prefill", "1", "--decode", "1", "--replicas", "1", "--mode", "mixed"),
        ("--system", "vllm-spec", "--acceptance", "0.7"),
        ("--system", "distserve", "--prefill", "1", "--decode", "1", "--link-gbps", "100"),
    ],
)
def test_every_kind_of_deployment_runs(arguments: tuple[str, ...]) -> None:
    facts = simulate("--scenario", "chatbot", "--rate", "2", "--duration-s", "20", *arguments)
    assert facts["attainment"] > 0.9  # type: ignore[operator]
    assert facts["drained"]
    for key in ("attainment_first_half", "by_class", "by_stage", "admitted", "best_effort_completed", "ttft_s",
                "tpot_s", "gpus", "rate_per_gpu_per_s", "provenance"):  # fmt: skip
        assert key in facts


def test_a_trace_is_run_as_recorded_with_a_row_per_request(tmp_path: Path) -> None:
    trace, rows = tmp_path / "trace.csv", tmp_path / "requests.csv"
    trace.write_text("t_s,in_tokens,out_tokens\n0,100,10\n1.5,200,20\n2.5,50,1\n")
    facts = simulate(
        "--trace", str(trace), "--slo-ttft-ms", "500", "--slo-tpot-ms", "60", "--requests-out", str(rows)
    )
    assert facts["requests"] == 3
    with rows.open() as file:
        found = list(csv.DictReader(file))
    assert [(one["in_tokens"], one["out_tokens"]) for one in found] == [
        ("100", "10"),
        ("200", "20"),
        ("50", "1"),
    ]
    assert [float(one["arrival_s"]) for one in found] == [0.0, 1.5, 2.5]
    assert all(one["met"] == "1" and one["placement"] == "0" and float(one["ttft_s"]) < 0.5 for one in found)


def test_people_get_a_table() -> None:
    result = RUNNER.invoke(app, ["simulate", "--scenario", "coder", "--rate", "1", "--duration-s", "20"])
    assert result.exit_code == 0
    assert "every promise kept" in result.stdout
    assert "TTFT p50, p99" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "either --scenario or --trace"),
        (("--scenario", "chatbot"), "give --rate"),
        (("--scenario", "no such", "--rate", "1"), "choose from chatbot"),
        (("--scenario", "chatbot", "--rate", "1", "--system", "no such"), "there are vllm"),
        (("--scenario", "chatbot", "--rate", "1", "--profile", "no such"), "paper"),
        (("--scenario", "chatbot", "--rate", "1", "--system", "distserve"), "--prefill and --decode"),
        (("--scenario", "chatbot", "--rate", "1", "--prefill", "1"), "at least 1 each"),
        (("--scenario", "chatbot", "--rate", "1", "--system", "vllm-spec"), "--acceptance"),
        (("--scenario", "chatbot", "--rate", "1", "--slo-ttft-ms", "5"), "go with --trace"),
        (("--trace", "/no/such/file.csv"), "/no/such/file.csv"),
        (("--scenario", "chatbot", "--rate", "0"), "--rate must be above 0"),
        (("--scenario", "chatbot", "--rate", "3", "--duration-s", "0"), "--duration-s must be above 0"),
        (("--scenario", "chatbot", "--rate", "3", "--link-gbps", "-1"), "--link-gbps must be above 0"),
        (("--scenario", "chatbot", "--rate", "3", "--decode", "2"), "give --prefill and --decode"),
        (("--scenario", "chatbot", "--rate", "3", "--system", "vllm", "--acceptance", "0.7"), "--draft-tokens"),
        (("--scenario", "chatbot", "--rate", "3", "--draft-tokens", "2"), "ours chooses how deep"),
        (("--scenario", "chatbot", "--rate", "3", "--system", "vllm", "--draft-tokens", "2"), "--acceptance"),
    ],
)
def test_what_is_wrong_is_said_with_what_to_do(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RUNNER.invoke(app, ["simulate", *arguments], catch_exceptions=False)
