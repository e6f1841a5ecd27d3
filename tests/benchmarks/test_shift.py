"""A shift of the mix on real engines: what is served, by which cluster, and how it is read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks.hardware import hardware
from benchmarks.real.client import NO_ANSWER, Seen
from benchmarks.real.shift import Plan, cluster_config, requests_of
from benchmarks.simulator.run import promises
from benchmarks.studies.rebalance import Shift, around
from benchmarks.studies.timeline import Window
from coordinator.cli.main import app
from engine.profile import StepProfile

PLAN = Plan(Shift("chatbot", "summarizer", 30.0), 3.0, hardware("scale"))


def test_slow_motion_makes_promises_as_much_longer_as_steps() -> None:
    window = Window(20.0, (("chatbot", 2.0),))
    slow, fast = PLAN, replace(PLAN, times=1.0)
    for kept, wanted in zip(
        promises(slow.workload((window,), 1), slow.slow),
        promises(fast.workload((window,), 1), fast.slow),
        strict=True,
    ):
        assert kept.ttft_s == pytest.approx(3 * wanted.ttft_s)
        assert kept.tpot_s == pytest.approx(3 * wanted.tpot_s)


def test_engines_are_held_to_the_slow_profile_and_have_its_memory(tmp_path: Path) -> None:
    config = cluster_config(PLAN, (1, 3), tmp_path)
    assert (config.pools.prefill, config.pools.decode) == (1, 3)
    assert config.engine.hold_steps
    assert config.step_profile is not None
    held = StepProfile.load(config.step_profile).cost
    assert held.predict(100, seqs=10) == pytest.approx(3 * PLAN.machine.cost.predict(100, seqs=10))
    assert config.engine.kv_cache_gib == pytest.approx(PLAN.machine.kv_tokens * 4096 / 2**30)


def test_a_request_without_an_answer_is_a_miss_and_one_in_time_is_kept() -> None:
    workload = PLAN.workload((Window(30.0, (("chatbot", 1.0),)),), 1)
    slos = promises(workload, PLAN.slow)
    lengths = workload.output_tokens.tolist()
    seen = [
        Seen(0.0, np.linspace(0.1, 0.1 + 0.001 * length, length).tolist(), "admitted", None)
        for length in lengths
    ]
    seen[0] = Seen(0.0, [], None, NO_ANSWER)
    found = requests_of(workload, slos, seen)
    assert not found["met"][0]
    assert np.isnan(found["ttft_s"][0])
    assert found["met"][1:].all()
    assert found["promised"].tolist() == [False] + [True] * (len(seen) - 1)
    told = around(found, 15.0, 30.0)
    assert told["after"]["attainment"] == 1.0
    assert sum(row["requests"] for row in told["series"]) == len(seen)


def test_a_mix_that_does_not_shift_is_refused() -> None:
    refused = CliRunner().invoke(app, ["bench", "shift", "--before", "coder", "--after", "coder"])
    assert refused.exit_code == 2
    assert "the mix does not shift from coder to coder" in refused.output
