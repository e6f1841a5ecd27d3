"""Pools that follow the load: who is short gets a node of who has room, slowly, and nothing swings."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from coordinator.pool_policy import (
    MOST_PATIENCE,
    PATIENCE,
    QUEUE_S,
    SETTLE_S,
    WINDOW_S,
    Move,
    PoolLoad,
    PoolPolicy,
)
from engine.request import RoleName

P, D = RoleName.PREFILL, RoleName.DECODE
IDLE = PoolLoad(2, used=0.1)


def run(
    policy: PoolPolicy, prefill: PoolLoad, decode: PoolLoad, windows: int, from_s: float = 0.0
) -> list[Move]:
    decided = (policy.decide({P: prefill, D: decode}, from_s + n * WINDOW_S) for n in range(windows))
    return [move for move in decided if move is not None]


def test_a_pool_for_want_of_which_requests_are_turned_away_gets_a_node_of_the_other() -> None:
    policy = PoolPolicy()
    short = PoolLoad(1, turned_away=4, used=0.9)
    assert run(policy, short, IDLE, PATIENCE - 1) == []
    (move,) = run(policy, short, IDLE, 1)
    assert (move.before, move.after) == (D, P)
    assert "4 turned away" in move.why
    assert "10% used" in move.why


def test_prompts_that_wait_and_memory_that_is_full_count_as_well() -> None:
    waiting = run(PoolPolicy(), PoolLoad(1, queue_s=2 * QUEUE_S), IDLE, PATIENCE)
    assert [(move.before, move.after) for move in waiting] == [(D, P)]
    full = run(PoolPolicy(), IDLE, PoolLoad(1, used=1.0), PATIENCE)
    assert [(move.before, move.after) for move in full] == [(P, D)]


def test_one_window_that_says_otherwise_starts_the_count_anew() -> None:
    policy = PoolPolicy()
    short = PoolLoad(1, turned_away=1)
    assert run(policy, short, IDLE, PATIENCE - 1) == []
    assert run(policy, IDLE, IDLE, 1) == []
    assert run(policy, short, IDLE, PATIENCE - 1) == []
    assert len(run(policy, short, IDLE, 1)) == 1


def test_nothing_changes_while_both_are_short_or_the_other_has_no_node_to_give() -> None:
    short = PoolLoad(2, turned_away=1)
    policy = PoolPolicy()
    assert run(policy, short, short, 50) == []
    assert "more nodes are needed" in policy.says
    for no_room in (PoolLoad(1, used=0.1), PoolLoad(2, used=0.5)):
        policy = PoolPolicy()
        assert run(policy, short, no_room, 50) == []
        assert "has no node to give" in policy.says


def test_prompts_that_wait_for_a_decode_node_are_no_reason_to_keep_prefill_nodes() -> None:
    """Best effort that cannot be handed on fills the prefill nodes while the decode nodes are full."""
    backed_up, full = PoolLoad(2, queue_s=9.0, used=0.2), PoolLoad(2, turned_away=5, used=0.97)
    (move,) = run(PoolPolicy(), backed_up, full, PATIENCE)
    assert (move.before, move.after) == (P, D)


def test_after_a_change_its_effect_is_waited_for() -> None:
    policy = PoolPolicy()
    moves = run(policy, PoolLoad(1, turned_away=1), PoolLoad(4, used=0.1), PATIENCE + int(SETTLE_S / WINDOW_S))
    assert len(moves) == 1


def test_a_load_between_two_sizes_changes_them_less_and_less() -> None:
    """Whatever the sizes, the other pool is short and this one idle: the worst that a policy can be shown."""
    policy, at, times = PoolPolicy(), 0, []
    short = P
    for at in range(600):
        loads = {role: PoolLoad(2, turned_away=3) if role is short else IDLE for role in (P, D)}
        move = policy.decide(loads, at * WINDOW_S)
        if move is not None:
            times.append(at * WINDOW_S)
            short = D if short is P else P
    gaps = [later - before for before, later in pairwise(times)]
    assert gaps == sorted(gaps)
    assert gaps[-1] >= (MOST_PATIENCE - 1) * WINDOW_S
    assert len(times) <= 16


loads = st.builds(
    PoolLoad,
    nodes=st.integers(1, 8),
    turned_away=st.integers(0, 3),
    queue_s=st.floats(0, 3),
    used=st.floats(0, 1),
)


@given(st.lists(st.tuples(loads, loads), max_size=60))
def test_a_pool_that_is_short_or_has_one_node_never_gives_one(windows: list[tuple[PoolLoad, PoolLoad]]) -> None:
    policy = PoolPolicy()
    last_s = None
    for at, (prefill, decode) in enumerate(windows):
        now = {P: prefill, D: decode}
        move = policy.decide(now, at * WINDOW_S)
        if move is None:
            continue
        assert now[move.after].short
        assert not now[move.before].lacking
        assert now[move.before].nodes > 1
        assert last_s is None or at * WINDOW_S - last_s >= SETTLE_S
        last_s = at * WINDOW_S
