"""The machines of the benchmark: sizes and step times as stated, drafts charged, profiles of one's own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.hardware import (
    CONFIGS,
    HARDWARE,
    HOST_S,
    LINKS,
    MEASURED,
    fit_measured,
    fitting_tpot_scale,
    hardware,
    with_draft,
)
from benchmarks.traces import data_directory
from engine.cost import StepCost
from engine.errors import ConfigError
from engine.profile import StepProfile
from tests.engine.step_rows import made_table

DATA = data_directory()


@pytest.mark.parametrize(
    ("name", "kv_tokens", "kv_bytes", "tp", "tpot_scale"),
    [
        ("paper", 40_000, 524_288, 1, 1.0),
        ("a100-opt-6.7b", 110_000, 524_288, 1, 1.0),
        ("a100-opt-13b", 60_000, 819_200, 1, 2.0),
        ("a100-opt-13b-tp2", 150_000, 819_200, 2, 2.0),
        ("a100-llama-2-7b", 100_000, 524_288, 1, 1.0),
        ("h100-llama-2-7b", 100_000, 524_288, 1, 1.0),
        ("rtxpro6000-llama-3.1-8b", 500_000, 131_072, 1, 1.0),
        ("scale", 20_000, 12_288, 1, 1.0),
    ],
)
def test_each_machine_has_its_sizes(
    name: str, kv_tokens: int, kv_bytes: int, tp: int, tpot_scale: float
) -> None:
    machine = hardware(name)
    assert machine.name == name
    assert (machine.kv_tokens, machine.kv_bytes_per_token) == (kv_tokens, kv_bytes)
    assert (machine.tp, machine.tpot_scale) == (tp, tpot_scale)
    assert machine.source


def test_the_paper_is_as_published_with_and_without_its_draft() -> None:
    paper = hardware("paper")
    for tokens in (1, 100, 2048):
        assert paper.cost.predict(tokens) == pytest.approx(6.88e-5 * tokens + 24.8e-3)
        for steps in (1, 4, 8):
            verify, draft = (
                6.88e-5 * tokens + 1.2e-6 * steps + 24.8e-3,
                7.52e-5 * tokens + 3.46e-3 * steps + 3.0e-3,
            )
            assert paper.speculative_cost.predict(tokens, draft_steps=steps) == pytest.approx(
                max(verify, draft)
            )


@pytest.mark.parametrize("name", [name for name in HARDWARE if name != "paper"])
def test_elsewhere_a_draft_step_costs_a_twentieth_of_the_shortest_step(name: str) -> None:
    machine = hardware(name)
    floor_s = machine.cost.predict(1, seqs=1)
    for tokens in (1, 300, 1000):
        assert machine.speculative_cost.predict(tokens) == machine.cost.predict(tokens)
        for steps in (1, 6):
            drafted_s = machine.speculative_cost.predict(tokens, draft_steps=steps)
            verified_s = machine.cost.predict(tokens, draft_steps=steps)
            assert drafted_s - verified_s == pytest.approx(0.05 * floor_s * steps)


@pytest.mark.parametrize("name", MEASURED)
def test_fits_ship_with_their_source_and_how_wrong_they_are(name: str) -> None:
    profile = StepProfile.load(CONFIGS / "hardware" / f"{name}.json")
    assert profile.held_out.r2 > 0.97
    assert profile.held_out.median_error < 0.05
    assert [source.file for source in profile.sources] == [f"{MEASURED[name].table}.csv.gz"]
    assert profile.sources[0].sha256 in hardware(name).source
    assert profile.about["host_ms"] == "2"
    assert min(piece.base_s for piece in hardware(name).cost.pieces) > HOST_S


@pytest.mark.skipif(DATA is None, reason="needs the measured steps (SLOSSERVE_DATA)")
@pytest.mark.parametrize("name", MEASURED)
def test_the_command_makes_the_fits_that_ship(name: str) -> None:
    made = fit_measured(name, DATA)
    shipped = StepProfile.load(CONFIGS / "hardware" / f"{name}.json")
    assert (made.family, made.sources, made.about) == (shipped.family, shipped.sources, shipped.about)
    for tokens, context in ((1, 500), (64, 40_000), (2048, 0)):
        assert made.cost.predict(tokens, context_tokens=context) == pytest.approx(
            shipped.cost.predict(tokens, context_tokens=context), rel=1e-6
        )


def test_faster_machines_are_faster() -> None:
    batch = {"tokens": 500, "seqs": 21, "context_tokens": 20_000, "prefill_work": 115_200.0}
    seconds = {name: hardware(name).cost.predict(**batch) for name in MEASURED}  # type: ignore[arg-type]
    assert seconds["h100-llama-2-7b"] < seconds["a100-llama-2-7b"]
    assert seconds["a100-opt-13b-tp2"] < seconds["a100-opt-13b"]
    assert seconds["a100-opt-6.7b"] < seconds["a100-opt-13b"]


def test_a_slow_machine_has_longer_paces_by_a_whole_number() -> None:
    for floor_s, times in ((0.009, 1.0), (0.0248, 1.0), (0.031, 2.0), (0.054, 2.0), (0.062, 3.0)):
        assert fitting_tpot_scale(StepCost.line(base_s=floor_s, per_token_s=1e-5)) == times


def test_a_profile_says_how_many_bytes_its_engine_keeps_of_a_token(tmp_path: Path) -> None:
    saved = json.loads((CONFIGS / "profiles" / "scale.json").read_text())
    saved["about"] = {"model": "scale", "kv_bytes_per_token": "24576"}
    (tmp_path / "mine.json").write_text(json.dumps(saved))
    assert hardware(tmp_path / "mine.json", kv_tokens=100).kv_bytes_per_token == 24_576
    assert hardware("scale").kv_bytes_per_token == 12_288


def test_what_is_given_replaces_what_is_known() -> None:
    assert hardware("scale", kv_tokens=8_000) == replace(hardware("scale"), kv_tokens=8_000)
    assert hardware("paper", max_batch_tokens=512, tpot_scale=2.0).max_batch_tokens == 512


def test_a_profile_of_ones_own_is_a_machine(tmp_path: Path) -> None:
    cost = StepCost.line(10e-3, 5e-5)
    path = tmp_path / "mine.json"
    StepProfile.fit(made_table(cost, 100)).save(path)
    machine = hardware(path, kv_tokens=30_000)
    assert (machine.name, machine.kv_tokens, machine.tp) == ("mine", 30_000, 1)
    assert machine.cost.predict(100) == pytest.approx(cost.predict(100), rel=0.02)
    assert machine.speculative_cost == with_draft(machine.cost)
    assert hardware(path, kv_tokens=30_000, kv_bytes_per_token=1000, tp=4).kv_bytes_per_token == 1000
    with pytest.raises(ConfigError, match=r"mine\.json: .*give kv_tokens"):
        hardware(path)


def test_a_wrong_profile_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    fitted = StepProfile.fit(made_table(StepCost.line(10e-3, 5e-5), 100))
    replace(fitted, about={"tp": "two"}).save(path)
    with pytest.raises(ConfigError, match=r"mine\.json: about\.tp is 'two'"):
        hardware(path, kv_tokens=30_000)


def test_an_unknown_name_lists_the_choices() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean \"a100-opt-13b\"\? Choose one of paper, .*, scale"):
        hardware("a100-opt-13")


@pytest.mark.parametrize("wrong", [{"kv_tokens": 0}, {"tp": -1}, {"tpot_scale": 0.0}])
def test_sizes_that_cannot_be_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))} is .*above 0"):
        hardware("paper", **wrong)


def test_links_have_their_rates() -> None:
    assert {name: kind.bytes_per_s for name, kind in LINKS.items()} == {
        "nvlink": 200e9,
        "100gbe": 12e9,
        "10gbe": 1.2e9,
    }
    prompt_bytes = 1000 * hardware("a100-opt-13b").kv_bytes_per_token
    took_s = [LINKS[name].between("a", "b").transfer_s(prompt_bytes) for name in ("nvlink", "100gbe", "10gbe")]
    assert took_s == pytest.approx([4.1e-3, 68e-3, 0.683], rel=0.01)
