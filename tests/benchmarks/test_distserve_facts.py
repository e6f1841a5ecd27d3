"""The published placement and rate come out of our simulator, on the draw that they were found on."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.distserve_facts import (
    COARSE,
    PUBLISHED_PER_GPU,
    PUBLISHED_PLACEMENT,
    Draw,
    Machine,
    Placement,
    facts,
    highest,
    keeps,
    latencies_s,
    our_draw,
    placements,
    their_draw,
)
from benchmarks.traces import data_directory, read_lengths
from engine.cost import StepCost
from engine.request import RoleName

DATA = data_directory()
REAL = pytest.mark.skipif(DATA is None, reason="needs recorded lengths and coefficients (SLOSSERVE_DATA)")
PREFILL, DECODE = StepCost.line(0.25, 2**-10), StepCost.line(0.125, 2**-10)
BY_HAND = Machine({(1, RoleName.PREFILL): PREFILL, (1, RoleName.DECODE): DECODE}, {1: 10_000})


@REAL
def test_the_published_placement_is_best_at_the_published_rate() -> None:
    assert DATA is not None
    lengths = read_lengths(DATA / "traces" / "lens_sharegpt_distserve_opt_tok.csv.gz")
    machine = Machine.read(DATA / "coefficients" / "distserve_opt13b_a100.json")
    best, *_ = facts(machine, lengths, placements(one_of_each=True), seeds=[1])
    assert best["placement"] == PUBLISHED_PLACEMENT
    assert best["their_search"] == pytest.approx(PUBLISHED_PER_GPU, rel=0.01)
    assert best["their_search"] <= best["their_draw"] < best["their_search"] + COARSE


def test_first_tokens_come_from_the_prefill_and_the_others_from_the_decode_node() -> None:
    draw = Draw(np.array([[256, 3], [256, 1]]), np.array([0.0, 10.0]))
    ttft_s, tpot_s = latencies_s(BY_HAND, Placement(1, 1), draw.workload(1.0))
    assert ttft_s.tolist() == [0.5, 0.5]
    assert tpot_s.tolist() == [0.125 + 2**-10]


def test_a_rate_is_kept_only_below_the_crossing() -> None:
    lengths = np.array([[16, 2]] * 400)
    fast = Machine(
        {(1, RoleName.PREFILL): StepCost.line(0.05, 1e-4), (1, RoleName.DECODE): StepCost.line(0.01, 1e-4)},
        {1: 10_000},
    )
    assert keeps(fast, Placement(1, 1), our_draw(lengths, 1), 0.5)
    assert not keeps(BY_HAND, Placement(1, 1), our_draw(lengths, 1), 0.5)


def test_bisection_ends_within_what_was_asked() -> None:
    assert highest(lambda rate: rate < 1.6, 0.25) == 1.5625
    assert highest(lambda rate: rate < 1.6, 0.01) == pytest.approx(1.6, abs=0.01)


def test_placements_fit_the_gpus_and_a_draw_is_a_function_of_its_seed() -> None:
    assert {one.name for one in placements(one_of_each=True)} == {
        "TP1 + TP1",
        "TP1 + TP2",
        "TP2 + TP1",
        "TP2 + TP2",
    }
    assert max(one.gpus for one in placements(one_of_each=False)) == 4
    lengths = np.arange(2000).reshape(-1, 2)
    for draw in (their_draw, our_draw):
        first, again, other = draw(lengths, 3), draw(lengths, 3), draw(lengths, 4)
        assert np.array_equal(first.lengths, again.lengths)
        assert np.array_equal(first.at_gaps, again.at_gaps)
        assert not np.array_equal(first.lengths, other.lengths)
        assert (np.diff(first.at_gaps) > 0).all()
