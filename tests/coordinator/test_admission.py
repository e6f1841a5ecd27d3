"""Admission: a promise is made only where queue, pace and memory allow, and asking never fails."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from coordinator.planner.admission import Prefill, Replica, admit_decode, admit_prefill, prefill_time_s
from engine.cost import StepCost

COST = StepCost(base_s=0.025, per_token_s=0.0001)
EMPTY = Replica(COST, max_batch_tokens=1000, free_kv_tokens=10_000, free_seqs=8)

prefills = st.builds(
    Prefill,
    tokens=st.integers(0, 5000),
    left_s=st.floats(-10, 100),
    tpot_s=st.none() | st.floats(0.001, 10),
)
replicas = st.builds(
    Replica,
    cost=st.builds(StepCost, st.floats(0, 1), st.floats(1e-6, 1e-2)),
    max_batch_tokens=st.integers(1, 4096),
    free_kv_tokens=st.integers(-1000, 100_000),
    free_seqs=st.integers(-2, 64),
    prefills=st.lists(prefills, max_size=5),
    decode_tpots_s=st.lists(st.floats(0.001, 10), max_size=8),
)


def test_an_idle_replica_admits_what_it_can_prefill_in_time() -> None:
    assert admit_prefill(EMPTY, Prefill(1000, left_s=0.13, tpot_s=0.1)).feasible
    late = admit_prefill(EMPTY, Prefill(1000, left_s=0.12, tpot_s=0.1))
    assert not late.feasible
    assert "late by" in late.reason


def test_decodes_leave_less_room_to_a_prefill_and_a_tight_pace_less_still() -> None:
    def seconds(tpots_s: list[float]) -> float:
        return prefill_time_s(EMPTY, 2000, tpots_s)

    assert seconds([]) < seconds([0.1]) < seconds([0.05]) < seconds([0.03])
    assert seconds([0.02]) == float("inf")  # not even an empty step fits


def test_a_newcomer_that_would_make_an_earlier_promise_late_is_not_admitted() -> None:
    earlier = Prefill(1000, left_s=0.2, tpot_s=0.1)
    busy = Replica(COST, 1000, 10_000, 8, prefills=[earlier])
    assert not admit_prefill(busy, Prefill(1000, left_s=0.15, tpot_s=0.1)).feasible
    assert admit_prefill(busy, Prefill(1000, left_s=1.0, tpot_s=0.1)).feasible


def test_memory_slots_and_pace_each_stop_a_decode() -> None:
    assert admit_decode(EMPTY, kv_tokens=10_000, tpot_s=0.1).feasible
    assert "does not fit" in admit_decode(EMPTY, kv_tokens=10_001, tpot_s=0.1).reason
    assert "slot" in admit_decode(EMPTY, kv_tokens=1, tpot_s=0.1, sequences=9).reason
    assert "takes" in admit_decode(EMPTY, kv_tokens=1, tpot_s=0.02).reason


@given(replicas, prefills)
def test_asking_never_fails_and_more_time_never_hurts(replica: Replica, new: Prefill) -> None:
    verdict = admit_prefill(replica, new)
    later = Prefill(new.tokens, new.left_s + 5, new.tpot_s)
    if verdict.feasible and all(other.left_s < new.left_s for other in replica.prefills):
        assert admit_prefill(replica, later).feasible
    admit_decode(replica, new.tokens, new.tpot_s or 1.0)


@given(replicas, prefills)
def test_what_is_admitted_leaves_every_earlier_prefill_in_time(replica: Replica, new: Prefill) -> None:
    if not admit_prefill(replica, new).feasible:
        return
    for earlier in replica.prefills:
        others = [other for other in replica.prefills if other is not earlier]
        without = Replica(
            replica.cost,
            replica.max_batch_tokens,
            replica.free_kv_tokens,
            replica.free_seqs,
            prefills=[*others, new],
            decode_tpots_s=replica.decode_tpots_s,
        )
        assert admit_prefill(without, earlier).feasible
