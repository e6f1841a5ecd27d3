"""Ours without a part does without it, and only without it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from watching import deployment

from benchmarks.scenarios import make
from benchmarks.simulator.outcome import Outcome
from benchmarks.simulator.run import run
from benchmarks.simulator.slosserve import Resize
from benchmarks.simulator.systems import roles_for
from benchmarks.simulator.variants import (
    KNOWN_LENGTHS,
    NO_ADMISSION,
    NO_BURSTS,
    NO_PRICE,
    NO_ROUTING,
    VARIANTS,
)
from benchmarks.simulator.world import NOBODY
from coordinator.planner.price import RoomPrice
from engine.errors import ConfigError
from engine.request import RoleName

TOO_MUCH = make("chatbot", 14.0, 30.0, 1)  # requests a second, of two replicas that hold about 9


def _run(name: str) -> Outcome:
    return run(TOO_MUCH, replace(deployment("ours", 2), variant=name))


@pytest.fixture(scope="module")
def full() -> Outcome:
    return _run("")


def test_full_leaves_some_unpromised(full: Outcome) -> None:
    assert 0.2 < full.admitted.mean() < 0.95
    assert full.drained


def test_without_admission_all_are_promised_and_fewer_are_kept(full: Outcome) -> None:
    out = _run(NO_ADMISSION)
    assert out.admitted.all()
    assert not out.world.dropped.any()
    assert full.met[full.admitted].mean() > 0.97 > 0.8 > out.attainment


def test_without_routing_a_request_sees_one_replica_by_turns() -> None:
    out = _run(NO_ROUTING)
    assert (out.world.prefilled_on == NOBODY).all()
    assert (out.world.decoded_on == np.arange(len(TOO_MUCH)) % 2).all()


def test_without_burst_handling_what_does_not_fit_is_refused_at_once(full: Outcome) -> None:
    out = _run(NO_BURSTS)
    assert (out.admitted != out.world.dropped).all()
    assert (out.world.ended_s == out.world.arrived_s)[out.world.dropped].all()
    assert not full.world.dropped.any()


def test_without_a_price_nobody_is_too_dear(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(RoomPrice, "too_dear", lambda self, *_: bool(asked.append(1)))
    _run(NO_PRICE)
    assert not asked
    _run("")
    assert asked


def test_known_lengths_are_at_least_as_good_within_noise(full: Outcome) -> None:
    out = _run(KNOWN_LENGTHS)
    assert out.attainment >= full.attainment - 0.03
    assert (TOO_MUCH.max_tokens > TOO_MUCH.output_tokens).any(), "the workload itself does not tell"


def test_an_unknown_variant_lists_those_there_are() -> None:
    with pytest.raises(ConfigError, match=NO_ROUTING):
        replace(deployment("ours", 2), variant="no such thing").build()
    assert all(replace(deployment("ours", 2), variant=name).build() for name in VARIANTS)


def test_turns_need_nodes_that_do_both() -> None:
    pools = roles_for("disaggregated", 0, 1, 1)
    with pytest.raises(ConfigError, match="mixed"):
        replace(deployment("ours", 2), roles=pools, variant=NO_ROUTING).build()


def test_resized_pools_place_by_their_new_roles_and_lose_nothing() -> None:
    load = make("chatbot", 4.0, 20.0, 1)
    pools = roles_for("disaggregated", 0, 3, 1)
    out = run(load, replace(deployment("ours", 4), roles=pools, resizes=(Resize(10.0, 1, 3),)))
    world = out.world
    assert np.isfinite(world.ended_s).all()
    assert not world.dropped.any()
    early, late = world.arrived_s < 10.0, world.arrived_s >= 10.0
    assert set(world.decoded_on[early].tolist()) == {pools.index(RoleName.DECODE)}
    assert len(set(world.prefilled_on[late & (world.prefilled_on != NOBODY)].tolist())) == 1
    assert len(set(world.decoded_on[late].tolist())) == 3


def test_pools_that_are_not_resized_are_as_without() -> None:
    load = make("chatbot", 4.0, 20.0, 1)
    pools = roles_for("disaggregated", 0, 2, 2)
    kept = replace(deployment("ours", 4), roles=pools)
    once, again = run(load, kept), run(load, replace(kept, resizes=(Resize(10.0, 2, 2),)))
    assert np.array_equal(once.world.token_times_s, again.world.token_times_s)
