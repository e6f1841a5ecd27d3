"""A seed names a workload, and a workload has the statistics that it claims."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from benchmarks import traffic
from benchmarks.traces import Arrival
from engine.errors import ConfigError

CLASSES = list(traffic.APPLICATIONS)


def _gaps(arrivals: list[Arrival]) -> np.ndarray:
    return np.diff([a.at_s for a in arrivals])


def _cv(gaps: np.ndarray) -> float:
    return float(np.std(gaps) / np.mean(gaps))


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    timed = "t_s,in_tokens,out_tokens\n" + "".join(f"{n},{100 + n},5000\n" for n in range(200))
    for app in traffic.APPLICATIONS.values():
        for name in {app.arrivals_file, app.lengths_file} - {None}:
            (tmp_path / f"{name}.csv.gz").write_bytes(gzip.compress(timed.encode()))
    return tmp_path


def test_a_seed_names_a_workload(traces: Path) -> None:
    for folder in (None, traces):
        first = traffic.mixed(CLASSES, 3.0, 60.0, seed=1, traces=folder)
        assert first == traffic.mixed(CLASSES, 3.0, 60.0, seed=1, traces=folder)
        assert first != traffic.mixed(CLASSES, 3.0, 60.0, seed=2, traces=folder)


@pytest.mark.parametrize(
    ("slo_class", "prompt_mean", "prompt_std", "output_mean"),
    [("chatbot", 763, 424, 266), ("coder", 847, 617, 26), ("summarizer", 1333, 444, 202)],
)
def test_lengths_have_the_published_moments(
    slo_class: str, prompt_mean: float, prompt_std: float, output_mean: float
) -> None:
    arrivals = traffic.draw_class(slo_class, 10.0, 2000.0, np.random.default_rng(3))
    prompts = np.array([a.in_tokens for a in arrivals])
    outputs = np.array([a.out_tokens for a in arrivals])
    assert prompts.min() >= 1
    assert outputs.min() >= 1
    assert max(prompts.max(), outputs.max()) <= traffic.LONGEST_TOKENS
    # Clipping takes a little off the mean and more off the deviation.
    assert prompts.mean() == pytest.approx(prompt_mean, rel=0.04)
    assert prompts.std() == pytest.approx(prompt_std, rel=0.25)
    assert outputs.mean() == pytest.approx(output_mean, rel=0.08)


@pytest.mark.parametrize(("cv", "tolerance"), [(1.0, 0.05), (3.0, 0.4)])
def test_arrivals_have_rate_and_burstiness(cv: float, tolerance: float) -> None:
    times = traffic.arrival_times(5.0, 8000.0, np.random.default_rng(5), cv)
    assert len(times) / 8000 == pytest.approx(5.0, rel=0.1)
    assert _cv(np.diff(times)) == pytest.approx(cv, abs=tolerance)
    assert times[0] >= 0
    assert times[-1] < 8000
    assert (np.diff(times) >= 0).all()


@pytest.mark.parametrize(("rate", "duration", "cv"), [(0, 1, 1), (1, 0, 1), (1, 1, 0), (-1, 1, 1)])
def test_impossible_arrivals_are_refused(rate: float, duration: float, cv: float) -> None:
    with pytest.raises(ConfigError, match="above 0"):
        traffic.arrival_times(rate, duration, np.random.default_rng(0), cv)


def test_mixed_shares_the_rate_equally_and_keeps_order() -> None:
    arrivals = traffic.mixed(CLASSES, 6.0, 1000.0, seed=7)
    counts = {name: sum(a.slo_class == name for a in arrivals) for name in CLASSES}
    assert counts["chatbot"] == pytest.approx(2000, rel=0.1)
    assert counts["summarizer"] == pytest.approx(2000, rel=0.1)
    assert counts["coder"] == pytest.approx(2000, rel=0.25)  # bursty
    assert (_gaps(arrivals) >= 0).all()


def test_recorded_lengths_are_used_and_clipped(traces: Path) -> None:
    arrivals = traffic.mixed(CLASSES, 3.0, 60.0, seed=1, traces=traces)
    assert {a.out_tokens for a in arrivals} == {traffic.LONGEST_TOKENS}
    assert {a.in_tokens for a in arrivals} <= set(range(100, 300))


def test_a_window_of_a_trace_has_the_rate_asked_for() -> None:
    rng = np.random.default_rng(0)
    trace = [Arrival(float(t), 10, 10) for t in np.cumsum(rng.gamma(1 / 9, 9.0, 20_000))]
    window = traffic.at_rate(trace, 4.0, 2000.0, rng)
    assert len(window) / 2000 == pytest.approx(4.0, rel=0.2)
    assert 0 <= window[0].at_s <= window[-1].at_s < 2000
    assert _cv(_gaps(window)) == pytest.approx(_cv(_gaps(trace)), rel=0.25)


def test_a_trace_without_time_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least two arrival times"):
        traffic.at_rate([Arrival(0.0, 1, 1)], 1.0, 10.0, np.random.default_rng(0))


def test_scaling_divides_lengths_and_keeps_a_floor() -> None:
    arrivals = [Arrival(1.0, 1200, 600, "chatbot"), Arrival(2.0, 12, 6, "coder")]
    assert traffic.scaled(arrivals, 6.0) == [Arrival(1.0, 200, 100, "chatbot"), Arrival(2.0, 8, 4, "coder")]


def test_labels_are_by_chance_and_by_seed() -> None:
    arrivals = [Arrival(float(n), 1, 1) for n in range(300)]
    labelled = traffic.label(arrivals, CLASSES, seed=1)
    assert labelled == traffic.label(arrivals, CLASSES, seed=1)
    for name in CLASSES:
        assert 60 < sum(a.slo_class == name for a in labelled) < 140


def test_a_class_without_statistics_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'poet'.*chatbot, coder, summarizer"):
        traffic.draw_class("poet", 1.0, 1.0, np.random.default_rng(0))
