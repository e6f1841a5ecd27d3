"""The benchmark of step times: every table is fitted, drawn and held against its targets."""

from __future__ import annotations

import json
from pathlib import Path

import typer
from typer.testing import CliRunner, Result

from benchmarks.steps import bench_steps
from engine.cost import Piece, StepCost
from tests.engine.step_rows import made_table

COST = StepCost((Piece(5e-3, 5e-5),), per_context_token_s=3e-7)


def _run(*options: str) -> Result:
    app = typer.Typer()
    app.command()(bench_steps)
    return CliRunner().invoke(app, options, env={"SLOSSERVE_DATA": ""})


def test_every_table_is_scored_and_drawn(tmp_path: Path) -> None:
    made_table(COST, 100, lambda draw: draw.gauss(1.0, 0.01)).write(tmp_path / "data" / "steps" / "a.csv.gz")
    made_table(COST, 100, lambda draw: draw.uniform(0.5, 2.0)).write(tmp_path / "noisy.csv")
    out = tmp_path / "out" / "steps.json"
    done = _run("--data", str(tmp_path / "data"), "--steps", str(tmp_path / "noisy.csv"), "--out", str(out))
    assert done.exit_code == 0, done.output
    results = json.loads(out.read_text(encoding="utf-8"))
    assert [table["name"] for table in results["tables"]] == ["a", "noisy"]
    assert (results["tables"][0]["rows"], results["tables"][0]["held_out_rows"]) == (100, 20)
    assert results["tables"][0]["r2"] > 0.97
    assert not results["targets"]["median_error"]["met"]
    assert {path.name for path in (tmp_path / "out" / "steps").iterdir()} == {"a.png", "noisy.png"}
    exact = [fit for fit in results["published"] if fit["noise"] == 0]
    assert len(exact) == 5
    assert all(abs(fit["found"]["base_s"] / fit["published"]["base_s"] - 1) < 1e-6 for fit in exact)


def test_a_folder_without_tables_is_an_error(tmp_path: Path) -> None:
    done = _run("--data", str(tmp_path), "--out", str(tmp_path / "steps.json"))
    assert done.exit_code != 0
    assert "has no *.csv" in str(done.exception)
