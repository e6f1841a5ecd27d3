"""Pools that follow the load in the simulator: a shift moves them, and a constant load does not swing them."""

from __future__ import annotations

from benchmarks.hardware import LINKS, hardware
from benchmarks.parts import in_turn
from benchmarks.simulator.outcome import Outcome
from benchmarks.simulator.run import Network, run
from benchmarks.simulator.slosserve import Slosserve
from benchmarks.simulator.systems import OURS_NAME, Deployment, Tuning, roles_for
from benchmarks.studies.timeline import Window
from coordinator.pool_policy import Move
from engine.request import RoleName


def served(prefill: int, decode: int, *windows: Window) -> tuple[Outcome, list[tuple[float, Move]]]:
    paper = hardware("paper")
    roles = roles_for("disaggregated", 0, prefill, decode)
    deployment = Deployment(OURS_NAME, paper, roles, Tuning(), follows_load=True)
    loads = [window.load(seed, paper.tpot_scale) for seed, window in enumerate(windows, 1)]
    load = in_turn("follow", loads).clipped(paper.kv_tokens // 2)
    outcome = run(load, deployment, Network(bytes_per_s=LINKS["nvlink"].bytes_per_s), seed=1)
    system = outcome.world._system
    assert isinstance(system, Slosserve)
    return outcome, system.moves


def test_a_shift_to_long_answers_moves_nodes_to_the_decode_pool() -> None:
    before, after = Window(15.0, (("coder", 20.0),)), Window(15.0, (("chatbot", 14.0),))
    _, moves = served(3, 1, before, after)
    assert [move.after for _, move in moves] == [RoleName.DECODE] * len(moves)
    assert len(moves) in (1, 2)
    assert moves[-1][0] > 15.0
    assert "decode is short" in moves[-1][1].why


def test_a_constant_load_beyond_what_is_there_moves_a_node_once_at_most_and_not_back() -> None:
    _, moves = served(2, 2, Window(60.0, (("mixed", 16.0),)))
    assert len(moves) <= 1
