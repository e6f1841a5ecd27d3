"""`slosserve advise` compares every split of the GPUs on one trace, and says in words what follows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner, Result

from benchmarks.advise import Advice, advise
from benchmarks.hardware import hardware
from benchmarks.simulator.run import Network
from benchmarks.splits import (
    LADDER_GBPS,
    Job,
    Question,
    Split,
    Tried,
    Turn,
    best_ratio,
    noise,
    splits,
    turning_point,
)
from engine.errors import ConfigError

APP = typer.Typer()
APP.command()(advise)


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 chat requests, two a second."""
    rng = np.random.default_rng(3)
    at_s = np.cumsum(rng.exponential(0.5, 120))
    lines = [f"{t:.3f},{rng.integers(100, 900)},{rng.integers(20, 200)}" for t in at_s - at_s[0]]
    path = tmp_path_factory.mktemp("trace") / "chat.csv"
    path.write_text("t_s,in_tokens,out_tokens\n" + "\n".join(lines) + "\n")
    return path


def _advise(trace: Path, *words: str) -> Result:
    asked = ["--trace", str(trace), "--profile", "paper", "--workers", "1", "--seconds", "15", *words]
    return CliRunner().invoke(APP, asked, env={"COLUMNS": "160"})


def _json(trace: Path, *words: str) -> dict[str, Any]:
    found = _advise(trace, *words, "--json")
    assert found.exit_code == 0, found.output
    said: dict[str, Any] = json.loads(found.stdout)
    return said


def test_splits_are_colocated_mixed_and_every_ratio() -> None:
    assert [one.name for one in splits(4)] == ["colocated", "mixed", "1P:3D", "2P:2D", "3P:1D"]
    assert [one.name for one in splits(1)] == ["colocated"]
    many = splits(64)
    assert len(many) == 11
    assert {one.name for one in many} >= {"1P:63D", "32P:32D", "63P:1D"}
    assert all(len(one.roles) == 64 for one in many)


def test_every_split_serves_the_same_requests_and_the_best_comes_first(trace: Path) -> None:
    said = _json(trace, "--gpus", "2", "--class", "chatbot", "--rate", "30")
    assert said["value_is"] == "attainment"
    assert {one["split"] for one in said["splits"]} == {"colocated", "mixed", "1P:1D"}
    assert len({one["counted"] for one in said["splits"]}) == 1
    values = [one["value"] for one in said["splits"]]
    assert values == sorted(values, reverse=True)
    assert said["best"] == said["splits"][0]["split"]
    assert said["margin"] == pytest.approx(values[0] - values[1])
    assert said["provenance"]["seed"] == 1


def test_a_rate_that_tells_nothing_is_said_and_capacity_searched(trace: Path) -> None:
    said = _json(trace, "--gpus", "1", "--class", "coder", "--rate", "0.5", "--seconds", "10")
    assert said["value_is"] == "capacity_per_gpu"
    assert "the rate is too low" in said["advice"][0]
    assert "every split keeps more than 99.5%" in said["advice"][0]
    assert said["value"] > 2
    assert said["advice"][-1].startswith("One replica cannot be split: it holds")
    assert said["next_best"] is None
    assert said["link_that_changes_it_gbps"] is None


def test_words_of_a_search_compare_capacities() -> None:
    facts = {"kv_transfer_s": 0.02, "kv_share_of_pace": 0.4, "pairs": 3}
    tried = [Tried(one, value, facts, ()) for one, value in zip(splits(2), (4.0, 3.0, 1.0), strict=True)]
    _, best, pools = Advice(_question(), Network(), tried, True, Turn(200.0, 5.0)).sentences()
    assert best == "colocated holds 4.00 requests/s a GPU, 1.33x as much as mixed (noise 0.12)."
    assert (
        "Disaggregation is not worth it here: 1P:1D holds 1.00 requests/s a GPU, colocated holds 4.00" in pools
    )
    assert "Moving KV takes 20 ms at the median, after the first token: 0.4 times what the pace" in pools
    assert "From about 200 Gbit/s on it would be ahead." in pools


def test_splits_within_the_noise_are_called_level() -> None:
    facts = {"kv_transfer_s": None, "kv_share_of_pace": None, "pairs": 0}
    met = tuple([True, False] * 50)
    tried = [Tried(one, 0.5, facts, met) for one in splits(2)]
    best, unused, pools = Advice(_question(), Network(), tried, False, None).sentences()
    assert "colocated, mixed, 1P:1D are level; colocated is the simplest." in best
    assert unused == "Mixed never found a second node worth its transfer."
    assert pools.startswith("Disaggregation changes little here")


def test_words_name_both_sides_and_what_the_transfer_takes(trace: Path) -> None:
    found = _advise(trace, "--gpus", "2", "--rate", "30")
    assert "taken for those of chatbot" in found.stderr
    assert found.exit_code == 0, found.output
    assert "chat.csv (chatbot) on 2 GPUs, paper, links of 12 GB/s" in found.stdout
    assert "Disaggregation" in found.stdout
    assert "1P:1D keeps" in found.stdout
    assert "after the first token" in found.stdout


def test_picture_is_drawn(trace: Path, tmp_path: Path) -> None:
    path = tmp_path / "splits.png"
    found = _advise(trace, "--gpus", "2", "--class", "chatbot", "--rate", "14", "--plot", str(path))
    assert found.exit_code == 0, found.output
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpus", "0", "--class", "chatbot"], "--gpus must be 1 or more"),
        (["--gpus", "2", "--slo-ttft-ms", "300"], "give --class"),
        (["--gpus", "2", "--slo-ttft-ms", "100"], "both --slo-ttft-ms and --slo-tpot-ms"),
        (["--gpus", "2", "--class", "chatty"], "no SLO class 'chatty'"),
        (["--gpus", "2", "--class", "chatbot", "--profile", "a100-opt-13"], "Did you mean"),
        (["--gpus", "3", "--class", "chatbot", "--profile", "a100-opt-13b-tp2"], "give a multiple of 2"),
        (["--gpus", "2", "--class", "chatbot", "--rate", "0"], "--rate must be above 0"),
        (["--gpus", "2", "--class", "chatbot", "--share", "1"], "--share must be between 0 and 1"),
        (["--gpus", "2", "--class", "chatbot", "--link-gbps", "0"], "--link-gbps must be above 0"),
    ],
)
def test_what_cannot_be_is_said(trace: Path, words: list[str], said: str) -> None:
    error = _advise(trace, *words).exception
    assert isinstance(error, ConfigError)
    assert said.lower() in str(error).lower()


def test_a_trace_that_is_not_there_is_named(tmp_path: Path) -> None:
    error = _advise(tmp_path / "none.csv", "--gpus", "2", "--class", "chatbot").exception
    assert isinstance(error, ConfigError)
    assert "none.csv: there is no such file" in str(error)


def _tried(split: Split, value: float) -> Tried:
    return Tried(split, value, {}, ())


@pytest.mark.parametrize(("needs_gbps", "found"), [(40.0, 50.0), (300.0, 400.0), (9e9, None)])
def test_a_faster_link_that_would_change_it_is_found(needs_gbps: float, found: float | None) -> None:
    """Disaggregation wins, 2 to 1, over links of `needs_gbps` and more. It is asked about at 12 Gbit/s."""
    colocated, mixed, ratio = splits(2)

    def value(split: Split, link: Network) -> float:
        if not split.is_disaggregated:
            return 1.0
        return 2.0 if link.bytes_per_s * 8e-9 >= needs_gbps else 0.5

    asked: list[float] = []

    def each(jobs: Sequence[Job]) -> list[Tried]:
        asked.append(jobs[0].network.bytes_per_s)
        return [_tried(job.split, value(job.split, job.network)) for job in jobs]

    now = Network(bytes_per_s=12e9 / 8)
    tried = [_tried(one, value(one, now)) for one in (colocated, mixed, ratio)]
    turn = turning_point(each, _question(), tried, now, search=True)
    assert turn is not None
    assert turn.gbps == found
    assert turn.free == (2.0 if found else 0.5)
    assert len(asked) <= 1 + np.ceil(np.log2(len(LADDER_GBPS)))


def test_a_slower_link_at_which_it_ceases_to_pay_is_found() -> None:
    colocated, mixed, ratio = splits(2)

    def each(jobs: Sequence[Job]) -> list[Tried]:
        return [
            _tried(job.split, 2.0 if job.split == ratio and job.network.bytes_per_s * 8e-9 >= 20 else 1.0)
            for job in jobs
        ]

    tried = [_tried(colocated, 1.0), _tried(mixed, 1.0), _tried(ratio, 2.0)]
    turn = turning_point(each, _question(), tried, Network(), search=True)
    assert turn is not None
    assert (turn.gbps, turn.free) == (10.0, None)
    assert best_ratio(tried).split == ratio


def test_noise_is_that_of_the_difference_not_of_each() -> None:
    rng = np.random.default_rng(0)
    met = rng.random(2000) < 0.8
    other = met.copy()
    other[::50] = False
    colocated, mixed, _ = splits(2)
    first = Tried(colocated, float(met.mean()), {}, tuple(met.tolist()))
    second = Tried(mixed, float(other.mean()), {}, tuple(other.tolist()))
    assert noise(first, first) == 0
    assert 0 < noise(first, second) < 0.01


def _question() -> Question:
    return Question(Path("x"), "chatbot", None, None, hardware("paper"), 2, 1.0, 60.0, 0.9, 1)
