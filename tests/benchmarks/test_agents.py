"""The benchmark of tool loops: what is drawn, how a loop is held, and what a window adds up to."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from benchmarks.agents import simulated
from benchmarks.agents.client import SeenCall, SeenLoop
from benchmarks.agents.command import WAYS, bench_agents, compared_at, headline, slower, table
from benchmarks.agents.load import (
    FEWEST_CALLS,
    LEAST_TOOL_S,
    MOST_CALLS,
    MOST_TOOL_S,
    Call,
    Loop,
    busy_s,
    draw_loops,
)
from benchmarks.agents.measure import add_up, loop_seconds
from benchmarks.agents.simulated import SIMULATED_ON, SimulatedAgents
from benchmarks.hardware import hardware
from benchmarks.real.systems import SYSTEMS
from benchmarks.simulator.prefixes import PrefixMemory
from benchmarks.simulator.run import run
from benchmarks.simulator.systems import Deployment, design, roles_for
from engine.sessions import Sessions

SCALE = hardware("scale")
BLOCK = 32


@settings(max_examples=20)
@given(seed=st.integers(0, 2**20))
def test_histories_grow_by_what_was_said_and_what_tools_gave_back(seed: int) -> None:
    for loop in draw_loops(SCALE, 1.0, 20.0, seed):
        assert FEWEST_CALLS <= len(loop.calls) <= MOST_CALLS
        assert loop.calls[0].reusable_tokens == 0
        for before, call in zip(loop.calls, loop.calls[1:], strict=False):
            assert call.reusable_tokens == before.prompt_tokens + before.output_tokens - 1
            assert LEAST_TOOL_S <= before.tool_s <= MOST_TOOL_S
            assert call.tpot_s >= before.tpot_s, "the answer is the loose one"


def test_a_seed_names_the_loops_and_a_rate_how_many_come() -> None:
    assert draw_loops(SCALE, 1.0, 50.0, 7) == draw_loops(SCALE, 1.0, 50.0, 7)
    assert draw_loops(SCALE, 1.0, 50.0, 7) != draw_loops(SCALE, 1.0, 50.0, 8)
    assert len(draw_loops(SCALE, 2.0, 400.0, 7)) == pytest.approx(800, rel=0.15)
    assert 0.1 < busy_s(SCALE, draw_loops(SCALE, 1.0, 50.0, 7)) < 30


LOOP = Loop(0.0, [Call(64, 3, 1.0, 64, 0.5, 0.1), Call(10, 2, 2.0, 76, 0.5, 0.1)])


def _seen(*, late_s: float = 0.0, cached: int = 64, seconds: float = 2.0) -> SeenLoop:
    first = SeenCall(0.0, [0.1, 0.2, 0.3], 0, "admitted", None)
    second = SeenCall(0.0, [0.2 + late_s, 0.3 + late_s], cached, "best_effort", None)
    return SeenLoop([first, second], seconds)


def test_a_window_adds_up() -> None:
    row = add_up([LOOP, LOOP], [_seen(), _seen(late_s=1.0, cached=32, seconds=4.0)], BLOCK)
    assert (row["loops"], row["ended"], row["calls"], row["errors"]) == (2, 2, 4, 0)
    assert row["reused_share"] == pytest.approx((64 + 32) / 128), "66 were computed before, 64 in whole blocks"
    assert row["attainment"] == 0.75
    assert row["stages"] == {"prefill": 0.75, "answer": 1.0}
    assert row["loop_attainment"] == 0.5
    assert (row["admitted"], row["admitted_kept"]) == (2, 1.0)
    assert row["loop_s"]["p50"] == pytest.approx(2.0), "a second of each was its tool's"


def test_what_was_cut_short_is_missed_with_all_that_did_not_come() -> None:
    cut = SeenLoop([SeenCall(0.0, [0.1], 0, "admitted", "ReadTimeout")], None)
    row = add_up([LOOP], [cut], BLOCK)
    assert (row["ended"], row["calls"], row["attainment"], row["loop_attainment"]) == (0, 2, 0.0, 0.0)
    assert row["error_samples"] == ["ReadTimeout"]
    assert row["reused_share"] is None
    assert loop_seconds([LOOP], [cut]) == [None]


def _row(way: str, load: float, *, attainment: float = 0.95, p99: float = 1.0, reused: float = 0.9) -> Any:
    return {
        "way": way,
        "load": load,
        "rate_per_s": load,
        "attainment": attainment,
        "loop_attainment": attainment,
        "loop_s": {"p50": p99 / 2, "p99": p99},
        "reused_share": reused,
        "errors": 0,
    }


def test_ways_are_compared_at_the_highest_load_that_vllm_holds() -> None:
    rows = [
        *(
            _row("vllm", load, attainment=kept, p99=4.0)
            for load, kept in ((0.3, 0.99), (0.5, 0.91), (0.7, 0.5))
        ),
        *(_row("sessions", load, p99=2.0 + load, reused=load) for load in (0.3, 0.5, 0.7)),
    ]
    assert compared_at(rows) == 0.5
    found = headline(rows, 0.5)
    assert found["prompt_tokens_reused_share"] == 0.5
    assert found["loop_p99_ratio_vs_stock"] == pytest.approx(2.5 / 4)
    assert compared_at([_row("vllm", 0.3, attainment=0.2), _row("vllm", 0.5, attainment=0.1)]) == 0.3
    assert headline([], None) == {"prompt_tokens_reused_share": None, "loop_p99_ratio_vs_stock": None}


def test_loops_that_sessions_made_slower_are_counted() -> None:
    seen = {("sessions", 0.3, 1): [1.0, 1.2, None, 2.0], ("no-sessions", 0.3, 1): [1.0, 1.0, 1.0, 4.0]}
    assert slower(seen) == {"loops": 3, "slower": 1, "largest_ratio": 1.2}
    assert slower({}) == {"loops": 0, "slower": 0, "largest_ratio": None}


def test_every_way_has_a_system_on_one_engine_and_on_two_and_a_line_in_the_table() -> None:
    for way in WAYS:
        assert {way.on(engines).name for engines in (1, 2)} <= set(SYSTEMS)
    assert table([_row(way.name, 0.3) for way in WAYS]).row_count == len(WAYS)


def test_help_shows_an_example() -> None:
    import typer

    app = typer.Typer()
    app.command()(bench_agents)
    shown = CliRunner().invoke(app, ["--help"])
    assert shown.exit_code == 0
    assert "Example: slosserve bench agents" in shown.output


def test_simulated_loops_come_back_as_clients_see_them_and_find_their_history() -> None:
    machine = hardware(SIMULATED_ON)
    agents = SimulatedAgents(machine, SIMULATED_ON, 2, 30.0, lambda said: None)
    rows: list[dict[str, Any]] = []
    agents.windows([(0.3, 0.3)], [1], rows.append)
    assert [row["way"] for row in rows] == list(simulated.WAYS)
    for row in rows:
        assert row["ended"] == row["loops"] >= 5
        assert row["reused_share"] > 0.95, "nothing else wants the memory"
        assert row["errors"] == 0
        assert 0 < row["loop_s"]["p50"] <= row["loop_s"]["p99"]
    assert len({row["calls"] for row in rows}) == 1, "all are asked the same"
    assert set(agents.seen) == {(way, 0.3, 1) for way in simulated.WAYS}


def test_a_loop_that_did_not_end_is_seen_as_far_as_it_went() -> None:
    machine = hardware(SIMULATED_ON)
    loops = draw_loops(machine, 0.5, 30.0, 1, simulated.TIMES)
    deployment = Deployment("vllm", machine, roles_for("colocated", 1), design("vllm").defaults)
    out = run(simulated.as_workload(loops, 30.0), deployment, slos=simulated.slos_of(loops))
    out.world.ended_s[-1] = math.nan
    *_, last = simulated.as_seen(loops, out, ours=False)
    assert last.seconds is None
    assert last.calls[-1].error == "it did not end"


def test_sessions_hold_their_history_before_strangers_do() -> None:
    def kept(keeping: PrefixMemory) -> list[int]:
        for chain in (1, 2):
            keeping.called(chain, 0.0)
            keeping.keep(chain, 100, 0.0)
        keeping.close(2)
        keeping.called(3, 1.0)
        keeping.keep(3, 100, 1.0)
        return [keeping.cached_tokens(chain, 100, free_tokens=200) for chain in (1, 2, 3)]

    assert kept(PrefixMemory(Sessions(300.0, 1000))) == [100, 0, 100], "the one that was closed goes first"
    assert kept(PrefixMemory()) == [0, 100, 100], "the oldest goes first"
