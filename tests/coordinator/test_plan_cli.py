"""`slosserve plan`: one problem in, one JSON answer out; what is wrong is one line and exit code 2."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from coordinator.cli.main import main

EXAMPLE = Path(__file__).parents[2] / "configs/examples/plan.json"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str, stdin: bytes = b"") -> int:
    """The exit code of `slosserve plan`."""
    monkeypatch.setattr(sys, "argv", ["slosserve", "plan", *arguments])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_the_example_is_solved(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--instance", str(EXAMPLE)) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["kept"]
    assert answer["exact"]
    asked = {newcomer["id"] for newcomer in json.loads(EXAMPLE.read_text())["newcomers"]}
    assert {*answer["admitted"], *answer["deferred"]} == asked
    assert answer["admitted"]
    assert answer["deferred"]
    assert answer["missed"] == []
    assert all(batch["predicted_s"] <= batch["end_s"] - batch["start_s"] + 1e-6 for batch in answer["batches"])


def test_stdin_is_read_and_batches_can_be_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--instance", "-", "--no-batches", stdin=EXAMPLE.read_bytes()) == 0
    assert "batches" not in json.loads(capsys.readouterr().out)


def test_a_table_names_everyone_and_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert run(monkeypatch, "--instance", str(EXAMPLE), "--table") == 0
    shown = capsys.readouterr().out
    assert "deferred: " in shown
    assert all(newcomer["id"] in shown for newcomer in json.loads(EXAMPLE.read_text())["newcomers"])


def test_the_schema_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--schema") == 0
    assert "newcomers" in json.loads(capsys.readouterr().out)["properties"]


def _tier_that_is_not_there() -> bytes:
    document: dict[str, Any] = json.loads(EXAMPLE.read_text())
    document["newcomers"][2]["tier"] = "fast"
    return json.dumps(document).encode()


@pytest.mark.parametrize(
    ("stdin", "said"),
    [
        (_tier_that_is_not_there(), "newcomers[2].tier: unknown tier 'fast'; there are tight, loose"),
        (b"{", "not JSON: "),
        (b"\xff\xfe", "- is not text in UTF-8: "),
        (b"", "not JSON: "),
    ],
)
def test_what_is_wrong_is_one_line_on_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stdin: bytes, said: str
) -> None:
    assert run(monkeypatch, "--instance", "-", stdin=stdin) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: {said}")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("path", ["/no/such/file.json", "/", "a\0b"])
def test_a_file_that_cannot_be_read_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], path: str
) -> None:
    assert run(monkeypatch, "--instance", path) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: cannot read {path}: ")


def test_without_a_problem_the_way_to_give_one_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch) == 2
    assert "--instance FILE.json" in capsys.readouterr().err


def test_the_command_line_loads_no_planner() -> None:
    script = "import sys, coordinator.cli.main, coordinator.cli.plan; print('numba' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
