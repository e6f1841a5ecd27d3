"""The comparison with a real node: its client against a real socket, its twin, and its arithmetic."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from benchmarks.fidelity import own_profile
from benchmarks.fidelity.compared import Compared, Side, differences, within, write_series
from benchmarks.fidelity.real_node import Lone, Served, overheads
from benchmarks.fidelity.twin import Twin
from benchmarks.open_loop import Sent
from benchmarks.workload import Workload
from coordinator.config import load_config
from engine.cost import StepCost
from engine.errors import ConfigError, EngineError

VOCABULARY = 3072
COST = StepCost.line(10e-3, 0.3e-3)
CONFIG = load_config("colocated", {"model": "scale"})


def _facts(nodes: int = 1) -> dict[str, Any]:
    return {"nodes": [{"num_blocks": 2000}] * nodes, "idle_cost": msgspec.to_builtins(COST)}


def _twin() -> Twin:
    return Twin.of(_facts(), CONFIG)


def _workload(rate: float = 3.0, seconds: float = 20.0) -> Workload:
    return _twin().workload("chatbot", rate, seconds, seed=1)


def _served(sent: Sequence[Sent]) -> Served:
    node = {"running": 1, "cost_drift": 1.1, "cost_margin": 0.2, "promises_preempted": 0}
    return Served(list(sent), [node, {**node, "promises_preempted": 2}], {"count": 1}, 0.5)


# ---- the twin ----------------------------------------------------------------------------------------------


def test_a_twin_has_what_the_node_told() -> None:
    twin = _twin()
    assert twin.cost == COST
    assert twin.kv_tokens == 2000 * CONFIG.engine.block_size
    assert (twin.max_seqs, twin.max_batch_tokens) == (64, 2048)
    workload = _workload()
    assert workload.slo_classes["chatbot"] == CONFIG.slo_classes["chatbot"]
    with pytest.raises(ConfigError, match="one node"):
        Twin.of(_facts(nodes=2), CONFIG)


def test_a_lone_request_takes_its_prefill_and_its_steps() -> None:
    twin, workload = _twin(), _workload(rate=0.2, seconds=30.0)
    out = twin.serve(workload, seed=1)
    first = workload.prompt_tokens[0]
    assert out.ttft_s[0] == pytest.approx(COST.predict(int(first)))
    assert out.tpot_s[0] == pytest.approx(COST.predict(1))


def test_what_is_promised_does_not_depend_on_how_slow_the_twin_is() -> None:
    twin, workload = _twin(), _workload()
    slow = replace(twin, host_s=5e-3, slowdown=1.5, latency_s=20e-3)
    assert slow.promises(workload) == twin.promises(workload)
    quick, late = twin.serve(workload, seed=1), slow.serve(workload, seed=1)
    assert np.nanmin(late.tpot_s) >= 1.5 * COST.predict(1) + 5e-3
    assert np.nanmedian(late.ttft_s) > 1.5 * np.nanmedian(quick.ttft_s)


def test_a_latency_beyond_the_slo_leaves_nothing_to_meet() -> None:
    twin, workload = replace(_twin(), latency_s=10.0), _workload()
    assert twin.serve(workload, seed=1).attainment == 0.0


def test_capacity_is_between_a_rate_that_holds_and_one_that_does_not() -> None:
    twin = _twin()
    rate, points = twin.capacity("chatbot", 30.0, 1, 0.9, twin.guess("chatbot"))
    held = [point.asked_per_gpu for point in points if point.holds(0.9)]
    failed = [point.asked_per_gpu for point in points if not point.holds(0.9)]
    assert max(held) < min(failed) <= max(held) * 1.04
    assert rate == pytest.approx(max(held), rel=0.25)  # of so few requests, as many came


# ---- the arithmetic ----------------------------------------------------------------------------------------


def _as_simulated(workload: Workload, twin: Twin) -> list[Sent]:
    """What a client would see of a node that does exactly as the twin."""
    world = twin.serve(workload, seed=1).world
    first = world.first_time.tolist()
    times = world.token_times_s - np.repeat(world.arrived_s, workload.output_tokens) + twin.latency_s
    return [Sent(0.001, times[begin:end].tolist(), verdict="admitted") for begin, end in pairwise(first)]


def test_a_node_that_does_as_its_twin_is_not_apart_from_it(tmp_path: Path) -> None:
    twin, workload = replace(_twin(), latency_s=7e-3, host_s=1e-4), _workload()
    compared = Compared.of(twin, workload, _served(_as_simulated(workload, twin)), seed=1)
    row = compared.row()
    assert all(abs(apart) < 1e-9 for apart in row["difference"].values())
    assert row["within_target"] is True
    apart = row["at_run_speed"]["difference"]
    assert apart["tpot_p50_ms"] > 0.05  # its node said that steps took 1.1 times that
    assert row["node"]["promises_preempted"] == 2
    assert row["client_late_ms"]["p99"] == pytest.approx(1.0)
    write_series([compared], tmp_path / "series.csv")
    rows = list(csv.DictReader((tmp_path / "series.csv").open()))
    assert len(rows) == len(workload)
    assert all(one["real_ttft_s"] == one["virtual_ttft_s"] for one in rows)


def test_a_request_that_failed_or_was_cut_short_met_nothing() -> None:
    twin, workload = _twin(), _workload()
    sent = _as_simulated(workload, twin)
    sent[-1].error = "ReadError"
    sent[-2].token_times_s.pop()
    sent[-3].token_times_s.clear()
    side = Side.of_client(workload, twin.promises(workload), sent)
    assert side.met[-4]
    assert not side.met[-3:].any()
    assert not side.done[-3:].any()
    nothing = np.zeros(len(workload), np.bool_)
    with pytest.raises(EngineError, match="not one request"):
        side.figures(nothing)


def test_times_differ_relatively_and_attainment_absolutely() -> None:
    real = {"ttft_p50_ms": 100.0, "ttft_p99_ms": 200.0, "tpot_p50_ms": 20.0, "attainment": 0.9}
    virtual = {"ttft_p50_ms": 95.0, "ttft_p99_ms": 100.0, "tpot_p50_ms": 22.0, "attainment": 0.85}
    apart = differences(real, virtual)
    expected = {"ttft_p50_ms": -0.05, "ttft_p99_ms": -0.5, "tpot_p50_ms": 0.1, "attainment": -0.05}
    assert apart == pytest.approx(expected)
    assert within({**apart, "tpot_p50_ms": 0.1})
    assert not within({**apart, "attainment": 0.11})


def test_overheads_are_what_the_steps_do_not_explain() -> None:
    def lone(prompt: int) -> Lone:
        at_node_s = COST.predict(prompt) + 1e-3
        ttft_s, step_s = at_node_s + 4e-3, COST.predict(1) * 1.1
        return Lone(prompt, [ttft_s + n * (step_s + 0.5e-3) for n in range(8)], step_s, at_node_s)

    found = overheads(COST, 2048, [lone(prompt) for prompt in (32, 32, 128)])
    assert found["overhead_ms"] == pytest.approx(5.0)
    assert found["outside_ms"] == pytest.approx(4.0)
    between = [row["tpot_ms"] - row["step_predicted_ms"] for row in found["by_prompt"]]
    assert found["host_ms"] == pytest.approx(np.median(between))
    assert found["host_ms"] > 0.5  # what the node's own steps are longer than predicted is in it
    assert [row["prompt_tokens"] for row in found["by_prompt"]] == [32, 128]


# ---- the profile -------------------------------------------------------------------------------------------


def test_the_profile_that_ships_is_taken_on_its_own_processor_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    ran: list[tuple[dict[str, str], tuple[str, ...]]] = []
    monkeypatch.setattr(own_profile, "_run", lambda env, *arguments: ran.append((env, arguments)))

    def on(processor: str) -> Path:
        monkeypatch.setattr(own_profile, "provenance", lambda seed: {"hardware": {"cpu": processor}})
        return own_profile.profile_here(CONFIG, None, own_profile.Here.processor(tmp_path), 2.0, said.append)

    shipped = on("Intel(R) Xeon(R) Processor")
    assert shipped.name == "scale.json"
    assert not ran
    assert on("AMD EPYC") == tmp_path.resolve() / "scale-profile.json"
    assert [arguments[0] for _, arguments in ran] == ["run", "fit"]
    assert ran[0][0]["OMP_NUM_THREADS"] == "1"  # as many threads as the node will have
    assert said
    assert (
        own_profile.profile_here(CONFIG, str(shipped), own_profile.Here.processor(tmp_path), 2.0, said.append)
        == shipped
    )
    shelf = own_profile.Here("NVIDIA H100 80GB HBM3", tmp_path / "shelf", tmp_path)
    made = own_profile.profile_here(CONFIG, None, shelf, 2.0, said.append)
    assert made.name == "nvidia-h100-80gb-hbm3-scale.json", "what ships for the processor stays"
    assert "--max-model-len" in ran[-2][1]
    with pytest.raises(ConfigError, match="--step-profile"):
        own_profile.profile_here(CONFIG, "nowhere.json", own_profile.Here.processor(tmp_path), 2.0, said.append)
