"""The search for capacity, and what it keeps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import capacity as module
from benchmarks import capacity_cell
from benchmarks.capacity import (
    PRECISION,
    Cache,
    Point,
    Setting,
    capacity,
    highest_held,
    measure,
    spread,
    tune,
)
from benchmarks.capacity_file import Begin, begins, cell_of, joined, of_other_runs
from benchmarks.capacity_table import headline
from benchmarks.simulator.systems import DESIGNS, Tuning
from engine.errors import ConfigError

SETTING = Setting("chatbot", "paper", "sarathi", "colocated", 1, DESIGNS["sarathi"].defaults, duration_s=20.0)


def point(rate: float, attainment: float, *, drained: bool = True) -> Point:
    return Point(rate, rate * 0.98, attainment, drained, {})


@given(knee=st.floats(0.02, 200), guess=st.floats(0.02, 200))
def test_the_highest_rate_that_holds_is_found_from_any_guess(knee: float, guess: float) -> None:
    found, points = capacity(lambda rate: point(rate, 1.0 if rate <= knee else 0.5), 0.9, guess)
    asked = max(one.asked_per_gpu for one in points if one.holds(0.9))
    assert asked <= knee <= asked * (1 + PRECISION) + 1e-8
    assert found == pytest.approx(asked * 0.98), "the rate that came counts, not the one asked for"
    assert len(points) <= 25


@given(knee=st.floats(0.02, 200), guess=st.floats(0.02, 200))
def test_a_search_that_begins_where_another_ended_asks_for_nothing_new(knee: float, guess: float) -> None:
    def at(rate: float) -> Point:
        return point(rate, 1.0 if rate <= knee else 0.5)

    found, points = capacity(at, 0.9, guess)
    again, fewer = capacity(at, 0.9, highest_held(points, 0.9), first_step=1 + PRECISION)
    assert again == found
    assert len(fewer) == 2
    assert {one.asked_per_gpu for one in fewer} <= {one.asked_per_gpu for one in points}


def test_a_guess_that_is_nearly_right_costs_few_points() -> None:
    _, points = capacity(
        lambda rate: point(rate, 1.0 if rate <= 4.0 else 0.5), 0.9, 3.75, first_step=1 + PRECISION
    )
    assert len(points) <= 4
    assert max(point.asked_per_gpu for point in points) < 4.3


def test_a_queue_that_does_not_drain_is_beyond_capacity() -> None:
    found, _ = capacity(lambda rate: point(rate, 1.0, drained=rate <= 3.0), 0.9, 2.0)
    assert found == pytest.approx(3.0, rel=0.06)


def test_nothing_holds_and_the_search_ends() -> None:
    found, points = capacity(lambda rate: point(rate, 0.0), 0.9, 1.0)
    assert found == 0.0
    assert len(points) <= module.MOST_DOUBLINGS


def test_a_point_is_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[float] = []

    def counted(setting: Setting, rate: float, seed: int, stop_below: float | None) -> Point:
        runs.append(rate)
        return point(rate, 1.0)

    monkeypatch.setattr(module, "measure", counted)
    for _ in range(2):
        cache = Cache(tmp_path)
        assert cache.point(SETTING, 1.0, 1, 0.9).attainment == 1.0
        cache.point(SETTING, 1.0, 2, 0.9)
        cache.point(replace(SETTING, replicas=2), 1.0, 1, 0.9)
    assert len(runs) == 3
    monkeypatch.setattr(module, "code_fingerprint", lambda ours=True: "other code")
    Cache(tmp_path).point(SETTING, 1.0, 1, 0.9)
    assert len(runs) == 4, "what older code made is made anew"


def test_the_fingerprint_covers_what_a_point_runs() -> None:
    assert module.code_fingerprint() == module.code_fingerprint()
    assert len(module.code_fingerprint()) == 16
    assert module.code_fingerprint(ours=False) != module.code_fingerprint()


def test_tuning_takes_what_holds_a_higher_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    best = {"token_budget": 1024, "max_seqs": 64}

    def measured(setting: Setting, rate: float, seed: int, stop_below: float | None) -> Point:
        hits = sum(getattr(setting.tuning, name) == value for name, value in best.items())
        return point(rate, 1.0 if rate <= 1.0 + hits else 0.0)

    monkeypatch.setattr(module, "measure", measured)
    tuning, rate = tune(SETTING, 0.9, 1.0, 0, Cache(None))
    assert (tuning.token_budget, tuning.max_seqs) == (1024, 64)
    assert rate == pytest.approx(3.0, rel=0.1)


def test_a_run_that_cannot_hold_any_more_stops() -> None:
    whole = measure(SETTING, 40.0, 1)
    stopped = measure(SETTING, 40.0, 1, stop_below=0.9)
    assert whole.attainment < 0.5
    assert not stopped.holds(0.9)
    assert stopped.facts["simulated_s"] < whole.facts["simulated_s"]


def test_spread_is_mean_least_and_most() -> None:
    assert spread([1.0, 2.0, 6.0]) == {"mean": 3.0, "least": 1.0, "most": 6.0}


def row(scenario: str, system: str, mean: float, column: str = "tuned", **more: Any) -> dict[str, Any]:
    plain = {"share": 0.9, "hardware": "paper", "acceptance": None, "mode": "colocated", "gpus": 2}
    return {**plain, "scenario": scenario, "system": system, "mean": mean, "column": column, **more}


def test_the_headline_compares_the_best_of_each_side() -> None:
    rows = [
        row("chatbot", "ours", 4.0),
        row("chatbot", "ours", 3.0, mode="disaggregated"),
        row("chatbot", "ours", 9.0, mode="disaggregated", gpus=3),  # more GPUs hold more each, in bursts
        row("chatbot", "sarathi", 2.0),
        row("chatbot", "sarathi", 1.0, "default"),
        row("chatbot", "sarathi-edf", 3.9, "default"),
        row("chatbot", "vllm", 8.0, share=0.98),
        row("coder", "ours", 1.0),
        row("coder", "sarathi-edf", 2.0),
        row("coder", "distserve", 0.5, "default", mode="disaggregated"),
    ]
    bounds = [
        {"hardware": "paper", "acceptance": None, "scenario": "chatbot", "blind_per_gpu": 5.0},
        {"hardware": "paper", "acceptance": None, "scenario": "coder", "blind_per_gpu": 10.0},
    ]
    found = headline(rows, bounds, None)
    assert found["geomean_vs_best_tuned"] == pytest.approx((2.0 * 0.5) ** 0.5)
    assert found["geomean_vs_best_default"] == pytest.approx((4.0 * 2.0) ** 0.5)
    assert found["worst_ratio"] == 0.5
    assert found["share_of_bound"] == pytest.approx((0.8 + 0.1) / 2)
    assert headline(rows, bounds, 0.7)["worst_ratio"] is None


def test_tuning_is_said_in_words() -> None:
    assert Tuning(512, 64, 3, relegate=True, prefill=1, decode=2).words == (
        "budget 512, cap 64, drafts 3, relegates, 1P2D"
    )


# ---- the file, filled in parts -------------------------------------------------------------------------------


def _part(system: str, mean: float, **more: Any) -> dict[str, Any]:
    cell = {
        "hardware": "paper",
        "scenario": "chatbot",
        "system": system,
        "mode": "colocated",
        "column": "tuned",
    }
    return {**cell, "acceptance": None, "share": 0.9, "mean": mean, **more}


def _file(path: Path, **changed: Any) -> Path:
    tables = {"rows": [_part("ours", 4.0), _part("vllm", 3.0)], "bounds": [], "fixed_rates": []}
    about = {"settings": {"seeds": 3, "replicas": 2}, "provenance": {"commit": "old"}}
    path.write_text(json.dumps({**tables, **about, **changed}))
    return path


def test_what_a_run_does_not_measure_stays_with_its_commit(tmp_path: Path) -> None:
    before = of_other_runs(_file(tmp_path / "capacity.json"), {"seeds": 3})
    now = {"rows": [_part("ours", 5.0, commit="new")], "bounds": [], "fixed_rates": []}
    rows = {row["system"]: row for row in joined(before, now)["rows"]}
    assert (rows["vllm"]["mean"], rows["vllm"]["commit"]) == (3.0, "old")
    assert (rows["ours"]["mean"], rows["ours"]["commit"]) == (5.0, "new")
    assert len(rows) == 2


def test_a_search_begins_at_what_an_earlier_run_has_found() -> None:
    settings = {"token_budget": 1024, "prefill": 1, "decode": 2}
    old = _part("ours", 4.0, per_seed=[3.9, 0.0, 4.1], settings=settings)
    newer = _part("vllm", 3.0, per_seed=[3.0], asked_per_seed=[3.1], tuned_at=3.2, settings={})
    found = begins([old, {**old, "share": 0.98, "per_seed": [2.0]}, newer])
    ours, vllm = found[cell_of(old)], found[cell_of(newer)]
    assert (ours.tuning, ours.tuned_at) == (Tuning(1024, prefill=1, decode=2), None)
    assert ours.at == {0.9: [3.9, 4.1], 0.98: [2.0]}
    assert (vllm.tuned_at, vllm.at) == (3.2, {0.9: [3.1]})


def test_where_one_seed_has_moved_the_next_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    class Known:
        def __init__(self, folder: Path) -> None:
            del folder

        def point(self, setting: Setting, rate: float, seed: int, share: float | None) -> Point:
            del setting, seed, share
            asked.append(rate)
            return point(rate, 1.0 if rate <= 8.0 else 0.5)

    monkeypatch.setattr(capacity_cell, "Cache", Known)
    begin = Begin(SETTING.tuning, None, {0.9: [4.0, 4.1, 3.9], 0.98: [3.8, 3.9, 3.7]})
    cell = capacity_cell.Cell(replace(SETTING, system="ours"), False, 4.0, 10.0, (1, 2, 3), (0.9, 0.98), begin)
    rows, _ = capacity_cell.measure(cell, Path())
    assert [row["mean"] for row in rows] == pytest.approx([7.8, 7.8], rel=0.03)
    assert len(asked) < 30, "the first seed climbs, and the others begin where it has ended"


def test_both_shares_of_a_cell_are_replaced_together(tmp_path: Path) -> None:
    rows = [_part("ours", 4.0), _part("ours", 3.0, share=0.98), _part("ours", 2.0, mode="mixed")]
    before = of_other_runs(_file(tmp_path / "capacity.json", rows=rows), {})
    now = {"rows": [_part("ours", 5.0, commit="new")], "bounds": [], "fixed_rates": []}
    found = [(row["mode"], row["mean"]) for row in joined(before, now)["rows"]]
    assert found == [("mixed", 2.0), ("colocated", 5.0)]


def test_figures_of_other_settings_are_not_mixed_with_these(tmp_path: Path) -> None:
    assert of_other_runs(tmp_path / "none.json", {"seeds": 3})["rows"] == []
    with pytest.raises(ConfigError, match="seeds = 3, and now it is 1"):
        of_other_runs(_file(tmp_path / "capacity.json"), {"seeds": 1})
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ConfigError, match="no file of capacities"):
        of_other_runs(tmp_path / "other.json", {"seeds": 1})
