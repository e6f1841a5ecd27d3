"""Each study's quick way gives figures that are whole and hang together, and goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from benchmarks.simulator.variants import KNOWN_LENGTHS, NO_ADMISSION
from benchmarks.studies import ablation, burst, rebalance, scaling
from benchmarks.studies import crew as crew_module
from benchmarks.studies.crew import Crew, Job
from benchmarks.studies.search import geometric_mean, ratio
from engine.errors import ConfigError

Ways = dict[str, Any]


@pytest.fixture
def ways(tmp_path: Path) -> Ways:
    return {"quick": True, "workers": 1, "cache": tmp_path / "cache", "out": tmp_path / "out.json"}


def _read(ways: Ways) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(ways["out"].read_text())
    assert found["provenance"]["seed"] == 1
    assert found["rows"]
    return found


def test_ablation(ways: Ways, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablation, "QUICK_SECONDS", 4.0)
    monkeypatch.setattr(ablation, "QUICK_NAMES", ("coder",))
    parts = ["no speculation", KNOWN_LENGTHS]
    ablation.ablation(part=parts, **ways)
    found = _read(ways)
    assert list(found["parts"]) == [ablation.FULL, *parts]
    full = found["parts"][ablation.FULL]
    assert full["geometric_mean"] == 1.0
    assert found["parts"]["no speculation"]["paper"] == 1.66
    for row in found["rows"]:
        assert row["holds_at_per_gpu"] < row["fails_at_per_gpu"]
        assert [one["fraction_of_full"] for one in row["at_fractions"]] == list(ablation.FRACTIONS)
    assert "nil" in found["greedy instead of the DP"]["note"]


def test_an_interrupted_study_goes_on_where_it_stopped(ways: Ways, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablation, "QUICK_SECONDS", 4.0)
    monkeypatch.setattr(ablation, "QUICK_NAMES", ("coder",))
    ablation.ablation(part=[NO_ADMISSION], **ways)
    first = _read(ways)
    kept = sorted(ways["cache"].rglob("*.json"))
    monkeypatch.setattr("benchmarks.capacity.measure", None)
    ablation.ablation(part=[NO_ADMISSION], **ways)
    assert _read(ways)["rows"] == first["rows"]
    assert sorted(ways["cache"].rglob("*.json")) == kept


def test_scaling(ways: Ways, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "QUICK_EFFORTS", dict.fromkeys((1, 2), scaling.Effort(1, 10.0)))
    scaling.scaling(system=["ours", "vllm"], **ways)
    found = _read(ways)
    assert {(row["system"], row["replicas"]) for row in found["scaling"]} == {
        ("ours", 1), ("ours", 2), ("vllm", 1), ("vllm", 2),
    }  # fmt: skip
    for row in found["scaling"]:
        assert row["in_all"]["mean"] == row["per_gpu"]["mean"] * row["replicas"]
        if row["replicas"] == 1:
            assert row["times_one"]["mean"] == 1.0
    assert found["method"]["efforts"]["2"] == {"seeds": 1, "duration_s": 10.0}


def test_burst(ways: Ways, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"QUICK_STEADY_S": 10.0, "QUICK_SPIKE_S": 5.0, "QUICK_SEARCH_S": 10.0}.items():
        monkeypatch.setattr(burst, name, seconds)
    burst.burst(system=["ours", "vllm"], **ways)
    rows = _read(ways)["rows"]
    assert {(row["system"], row["load"]) for row in rows} == {
        (system, load) for system in ("ours", "vllm") for load in (burst.SAME, burst.OWN)
    }
    for row in rows:
        assert [one["from_s"] for one in row["series"]] == [0.0, 5.0, 10.0, 15.0, 20.0]
        assert sum(one["requests"] for one in row["series"]) > 0
        before, spike, after = (row["phases"][name] for name in ("before", "spike", "after"))
        assert spike["requests"] / 5.0 > 1.5 * before["requests"] / 9.0
        assert after["requests"] > 0
        if row["system"] == "vllm":
            assert spike["promised"] == spike["requests"], "the others promise everybody"


def test_recovery_needs_bins_in_turn() -> None:
    met = [1.0, 0.2, 0.95, 0.5, 0.95, 1.0, 0.92]
    series = [{"from_s": 5.0 * at, "attainment": share} for at, share in enumerate(met)]
    assert burst.recovered_s(series, 5.0) == 15.0
    assert burst.recovered_s(series[:4], 5.0) is None


def test_rebalance(ways: Ways, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rebalance, "QUICK_HALF_S", 12.0)
    monkeypatch.setattr(rebalance, "QUICK_SEARCH_S", 3.0)
    monkeypatch.setattr(rebalance, "RATIOS", ((3, 1), (1, 3)))
    rebalance.rebalance(**ways)
    found = _read(ways)
    rows = {row["arrangement"]: row for row in found["rows"]}
    assert {"colocated", "mixed", "3P1D, stays", "1P3D, stays"} < set(rows)
    moved = [row for row in rows.values() if row["resizes"]]
    assert [row["resizes"][0]["at_s"] for row in moved] == [12.0, 22.0]
    stays = rows[f"{found['pools']['coder']['best']}, stays"]
    for row in moved:
        first, usual = dict(row["series"][0]), dict(stays["series"][0])
        for key in ("tpot_s", "best_effort_latency_s"):  # of who came before the change, some end after it
            del first[key], usual[key]
        assert first == usual, "nothing differs until the roles change"
    for row in rows.values():
        assert len(row["series"]) == 5
        assert row["before"]["requests"] == stays["before"]["requests"]


@pytest.mark.parametrize("study", [ablation.ablation, burst.burst, rebalance.rebalance, scaling.scaling])
def test_help_shows_an_example(study: Any) -> None:
    app = typer.Typer()
    app.command()(study)
    shown = CliRunner().invoke(app, ["--help"])
    assert shown.exit_code == 0
    assert "Example: slosserve bench" in shown.output
    assert "--quick" in shown.output


def test_what_cannot_be_is_said() -> None:
    for study, wrong in (
        (ablation.ablation, {"scenario": ["nonsense"]}),
        (ablation.ablation, {"part": ["nonsense"]}),
        (scaling.scaling, {"system": ["distserve"]}),
        (scaling.scaling, {"scenario": ["nonsense"]}),
        (burst.burst, {"system": ["vllm-spec"]}),
        (rebalance.rebalance, {"before": "coder", "after": "coder"}),
        (rebalance.rebalance, {"link": "string"}),
    ):
        with pytest.raises(ConfigError):
            study(quick=True, workers=1, **wrong)  # type: ignore[operator]


def test_ratios_over_seeds() -> None:
    assert ratio([2.0, 4.0], [1.0, 1.0]) == {"mean": 3.0, "least": 2.0, "most": 4.0}
    assert ratio([2.0], [0.0]) == {"mean": None, "least": None, "most": None}
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    assert geometric_mean([2.0, None]) is None


def test_a_crew_hands_back_rows_in_the_order_of_its_jobs() -> None:
    jobs = [Job("light", dict, 1.0), Job("heavy", dict, 5.0)]
    with Crew(crew_module.Console(quiet=True), 2, 6.0) as crew:
        assert crew.run(jobs) == [{}, {}]
