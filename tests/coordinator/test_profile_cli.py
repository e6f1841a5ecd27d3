"""`slosserve profile`: rows from an engine, a model from rows, and clear errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from coordinator.cli import profile_run
from coordinator.cli.profile_plot import draw_profile
from coordinator.cli.profile_run import Settings, measure
from engine.base import Engine, EngineInfo
from engine.cost import Piece, StepCost
from engine.errors import EngineStartError
from engine.profile import StepProfile
from engine.step_table import StepTable
from tests.engine.step_rows import made_table
from tests.engine.timed_engine import TimedEngine

COMMAND = [sys.executable, "-c", "from coordinator.cli import main; main()", "profile"]
PNG = b"\x89PNG\r\n"
COST = StepCost((Piece(3e-3, 2e-5),), per_context_token_s=3e-7, per_prefill_work_s=1e-8)
SETTINGS = Settings(
    model="tiny",
    shapes=40,
    repeats=3,
    limit_s=60.0,
    max_batch_tokens=256,
    max_model_len=1024,
    kv_cache_gib=None,
    seed=0,
)


def profile(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, check=False, env=env, timeout=200
    )


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profile") / "steps.csv.gz"
    made_table(COST, 200, lambda draw: draw.gauss(1.0, 0.02)).write(path)
    return path


def test_fit_saves_a_model_and_a_picture_and_prints_what_it_saved(steps: Path, tmp_path: Path) -> None:
    out, plot = tmp_path / "p.json", tmp_path / "p.png"
    done = profile("fit", "--steps", str(steps), "--out", str(out), "--plot", str(plot), "--json")
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed["family"] == "additive"
    assert printed["held_out"]["r2"] > 0.97
    assert StepProfile.load(out).sources[0].file == "steps.csv.gz"
    assert plot.read_bytes().startswith(PNG)


def test_fit_shows_every_form_to_a_person(steps: Path, tmp_path: Path) -> None:
    done = profile("fit", "--steps", str(steps), "--out", str(tmp_path / "p.json"))
    assert done.returncode == 0, done.stderr
    assert all(form in done.stdout for form in ("line", "max", "additive", "additive-kv"))


def test_a_bad_file_is_one_clear_error(steps: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.csv"
    made_table(COST, 30).write(bad)
    bad.write_text(bad.read_text(encoding="utf-8") + "1,1,x,0,0,,0,1.0\n", encoding="utf-8")
    done = profile("fit", "--steps", str(steps), "--steps", str(bad), "--out", str(tmp_path / "p.json"))
    assert done.returncode == 2
    assert "bad.csv: row 32, column decode_seqs: 'x'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "p.json").exists()


def test_the_host_is_added_to_every_step(steps: Path, tmp_path: Path) -> None:
    plain, hosted = tmp_path / "plain.json", tmp_path / "hosted.json"
    assert profile("fit", "--steps", str(steps), "--out", str(plain)).returncode == 0
    assert profile("fit", "--steps", str(steps), "--host-ms", "2", "--out", str(hosted)).returncode == 0
    without, with_host = StepProfile.load(plain), StepProfile.load(hosted)
    for tokens in (1, 500, 5000):
        assert with_host.cost.predict(tokens) == pytest.approx(without.cost.predict(tokens) + 2e-3)
    assert with_host.held_out == without.held_out
    assert with_host.about["host_ms"] == "2"


def test_published_coefficients_make_a_model_too(coefficients: Path, tmp_path: Path) -> None:
    out, plot = tmp_path / "p.json", tmp_path / "p.png"
    asked = ("--coefficients", str(coefficients), "--tp", "2", "--phase", "decode", "--system", "vllm")
    done = profile("fit", *asked, "--out", str(out), "--plot", str(plot))
    assert done.returncode == 0, done.stderr
    assert "coefficients-decode" in done.stdout
    assert "switch: published: the second set from batch 95 on" in done.stdout
    saved = StepProfile.load(out)
    assert (saved.about["tp"], saved.about["system"], saved.about["phase"]) == ("2", "vllm", "decode")
    assert saved.cost.predict(1) == pytest.approx((20 + 2 + 0.04) / 1e3)
    assert plot.read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "give either --steps (what was measured) or --coefficients (what was published)"),
        (("--steps", "STEPS", "--coefficients", "COEFFICIENTS"), "give either --steps"),
        (("--steps", "STEPS", "--phase", "prefill"), "--phase goes with --coefficients"),
        (("--coefficients", "COEFFICIENTS"), "--coefficients needs --phase"),
        (("--coefficients", "COEFFICIENTS", "--phase", "mixed"), "coefficients.json: distserve is missing"),
    ],
)
def test_steps_or_coefficients_and_what_goes_with_them(
    steps: Path, coefficients: Path, tmp_path: Path, arguments: tuple[str, ...], complaint: str
) -> None:
    files = {"STEPS": str(steps), "COEFFICIENTS": str(coefficients)}
    given = [files.get(argument, argument) for argument in arguments]
    done = profile("fit", *given, "--out", str(tmp_path / "p.json"))
    assert done.returncode == 2
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "p.json").exists()


@pytest.fixture
def coefficients(tmp_path: Path) -> Path:
    sets = {
        "decoding_large_small_bs_threshold": 95,
        "prefill": [18, 0.1, 7e-6],
        "decoding_smallbs": [20, 6e-4, 0.04],
        "decoding_largebs": [7, 6e-4, 0.16],
    }
    path = tmp_path / "coefficients.json"
    content = {"kv_capacity_tokens": {"2": 60_000}, "vllm": {"2": sets}}
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.mark.parametrize("verb", ["fit", "run"])
def test_each_part_has_help_with_an_example(verb: str) -> None:
    assert f"Example: slosserve profile {verb}" in profile(verb, "--help").stdout


def test_a_run_measures_what_the_engine_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = _instead(monkeypatch)
    table, facts = measure(SETTINGS, tmp_path / "steps.csv")
    assert len(table.rows) == SETTINGS.shapes
    assert facts["rounds"] == SETTINGS.repeats
    assert not engine.has_work()
    assert table.about["model"] == "tiny"
    table.write(tmp_path / "steps.csv")
    cost = StepProfile.fit(StepTable.read([tmp_path / "steps.csv"])).cost
    assert cost.predict(100, context_tokens=1000) == pytest.approx(
        COST.predict(100, context_tokens=1000), rel=0.05
    )


def test_a_run_that_takes_too_long_ends_with_whole_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _instead(monkeypatch)
    table, facts = measure(_with(limit_s=0.0, repeats=50), tmp_path / "steps.csv")
    assert facts["rounds"] == 1
    assert len(table.rows) == SETTINGS.shapes


def test_what_the_engine_prints_is_in_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any) -> tuple[Engine, EngineInfo]:
        os.write(1, b"no room on the device\n")
        raise EngineStartError("it did not start")

    monkeypatch.setattr(profile_run, "_start", fails)
    monkeypatch.setattr(profile_run, "resolve_model", str)
    with pytest.raises(EngineStartError, match=r"(?s)it did not start.*no room on the device"):
        measure(SETTINGS, tmp_path / "steps.csv")
    assert "no room" not in capfd.readouterr().out


@pytest.mark.engines
def test_rows_of_a_real_engine_can_be_fitted(tmp_path: Path) -> None:
    out = tmp_path / "steps.csv.gz"
    done = profile("run", "--model", "tiny", "--shapes", "30", "--repeats", "1", "--out", str(out), "--json")
    assert done.returncode == 0, done.stderr
    # Steps during which somebody else had the core all the time are left out.
    assert 20 <= json.loads(done.stdout)["rows"] <= 30
    fitted = StepProfile.fit(StepTable.read([out]))
    assert fitted.about["model"] == "tiny"
    assert fitted.cost.predict(1000, prefill_work=5e5) > fitted.cost.predict(1)


def test_a_picture_of_one_kind_of_batch_can_be_drawn(tmp_path: Path) -> None:
    table = made_table(COST, 60)
    prefills = StepTable(tuple(row for row in table.rows if row.decode_seqs == 0))
    draw_profile(StepProfile.fit(table), prefills, tmp_path / "deep" / "p.png", title="prefills")
    assert (tmp_path / "deep" / "p.png").read_bytes().startswith(PNG)


def _with(**changes: Any) -> Settings:
    from dataclasses import replace

    return replace(SETTINGS, **changes)


def _instead(monkeypatch: pytest.MonkeyPatch) -> TimedEngine:
    """An engine without a model in place of the real one."""
    engine = TimedEngine(COST)
    monkeypatch.setattr(profile_run, "_start", lambda *_: (engine, engine.start()))
    monkeypatch.setattr(profile_run, "resolve_model", str)
    monkeypatch.setattr(profile_run, "_greedy", lambda max_tokens: b"%d" % max_tokens)
    monkeypatch.setattr(profile_run, "_waited_s", lambda: 0.0)
    return engine
