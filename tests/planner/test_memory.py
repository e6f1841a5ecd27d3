"""What newcomers are charged and what is free covers what will be held: exactly, if lengths are known."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from coordinator.planner.instance import FreeKv
from coordinator.planner.lengths import KnownLengths, LearnedLengths, LengthDistribution
from coordinator.planner.memory import (
    LEAST_Z,
    MOST_INTERVALS,
    MOST_Z,
    OVERFLOW_AIM,
    OVERFLOW_Z,
    Z_PER_OVERFLOW,
    Outlook,
    Resident,
    free_kv,
    next_z,
    outlook,
)

TICK_S = 1 / 64  # exact in binary: a test need not round
CAPACITY = 20_000
BLOCK = 16


def chat() -> LearnedLengths:
    rng = np.random.default_rng(1)
    lengths = LearnedLengths()
    for tokens in np.maximum(rng.lognormal(5, 0.8, 2000), 1).astype(int).tolist():
        lengths.observe("chat", 500, tokens)
    return lengths


CHAT = chat()


@st.composite
def residents(draw: st.DrawFn, known: bool, fresh: bool = False) -> Resident:
    most = draw(st.integers(2, 1500))
    made = 0 if fresh else draw(st.integers(0, most - 1))
    prompt = draw(st.integers(1, 2000))
    pace_s = draw(st.integers(1, 8)) * TICK_S
    starts_s = draw(st.integers(0, 100)) * TICK_S if made == 0 else 0.0
    kind = KnownLengths() if known else CHAT
    return Resident(prompt, made, pace_s, kind.lengths("chat", prompt, most), starts_s)


def held_tokens(resident: Resident, at_s: float) -> tuple[float, int]:
    """(chance that it is alive, KV tokens it holds then), straight from the definition."""
    made = resident.made_tokens + max(math.floor((at_s - resident.starts_s) / resident.pace_s + 1e-9), 0)
    held = math.ceil((resident.prompt_tokens + made) / BLOCK) * BLOCK
    return resident.lengths.longer_than(made, resident.made_tokens), held


def need_tokens(all_of_them: list[Resident], at_s: float, z: float) -> float:
    """Least of the bounds that take some requests as sure to be alive, and the others as a normal sum."""
    states = [held_tokens(resident, at_s) for resident in all_of_them]
    needs = []
    for sure in itertools.product((False, True), repeat=len(states)):
        certain = sum(held for (alive, held), yes in zip(states, sure, strict=True) if yes and alive > 0)
        rest = [state for state, yes in zip(states, sure, strict=True) if not yes]
        variance = sum(held * held * alive * (1 - alive) for alive, held in rest)
        needs.append(certain + sum(alive * held for alive, held in rest) + z * math.sqrt(variance))
    return min(needs)


def interval_of(free: tuple[FreeKv, ...], at_s: float) -> int:
    return sum(interval.at_s <= at_s for interval in free) - 1


@given(
    st.lists(residents(known=False), max_size=4),
    st.lists(residents(known=False, fresh=True), min_size=1, max_size=3),
    st.sampled_from([1.0, OVERFLOW_Z, 2.5]),
)
@settings(max_examples=120, deadline=None)
def test_separate_charges_cover_the_joint_need(
    running: list[Resident], newcomers: list[Resident], z: float
) -> None:
    found = outlook(running, newcomers, CAPACITY, BLOCK, z)
    horizon_s = max(
        r.starts_s + r.lengths.mean_remaining(r.made_tokens) * r.pace_s for r in [*running, *newcomers]
    )

    for at_s in np.linspace(0, horizon_s, 60)[:-1].tolist():
        index = interval_of(found.free, at_s)
        taken = CAPACITY - found.free[index].tokens + sum(charge[index] for charge in found.charges)
        assert taken >= need_tokens([*running, *newcomers], at_s, z) - 1e-6


@given(st.lists(residents(known=True), min_size=1, max_size=6))
@settings(max_examples=100, deadline=None)
def test_known_lengths_give_the_exact_trajectory(running: list[Resident]) -> None:
    found = free_kv(running, CAPACITY, BLOCK)
    ends_s = [r.starts_s + (r.lengths.max_tokens - r.made_tokens) * r.pace_s for r in running]
    exact = [CAPACITY] * len(found)
    for tick in range(round(max(ends_s) / TICK_S)):
        held = sum(alive * tokens for alive, tokens in (held_tokens(r, tick * TICK_S) for r in running))
        index = interval_of(found, tick * TICK_S)
        exact[index] = min(exact[index], round(CAPACITY - held))

    assert [interval.tokens for interval in found] == exact


@given(residents(known=True, fresh=True), st.lists(residents(known=True), max_size=3))
@settings(max_examples=60, deadline=None)
def test_a_newcomer_of_known_length_is_charged_the_most_it_holds(
    newcomer: Resident, running: list[Resident]
) -> None:
    found = outlook(running, [newcomer], CAPACITY, BLOCK)
    last = newcomer.prompt_tokens + newcomer.lengths.max_tokens - 1

    assert max(found.charges[0]) == math.ceil(last / BLOCK) * BLOCK


@given(st.lists(residents(known=False), max_size=40), st.integers(0, 60_000), st.sampled_from([1, 16, 128]))
@settings(max_examples=80, deadline=None)
def test_free_memory_is_between_none_and_the_capacity(
    running: list[Resident], capacity: int, block: int
) -> None:
    free = free_kv(running, capacity, block)

    assert 1 <= len(free) <= MOST_INTERVALS
    assert free[0].at_s == 0.0
    assert all(before.at_s < after.at_s for before, after in itertools.pairwise(free))
    assert all(0 <= interval.tokens <= capacity - capacity % block for interval in free)


@given(st.lists(residents(known=False), min_size=1, max_size=8), st.floats(0, 3), st.floats(0, 3))
@settings(max_examples=60, deadline=None)
def test_a_larger_z_leaves_less_free(running: list[Resident], low: float, high: float) -> None:
    low, high = min(low, high), max(low, high)
    bold, careful = (free_kv(running, CAPACITY, BLOCK, z) for z in (low, high))

    assert all(a.tokens >= b.tokens for a, b in zip(bold, careful, strict=True))


def test_an_empty_replica_is_all_free() -> None:
    assert free_kv([], 1000, 16) == (FreeKv(0.0, 992),)
    assert outlook([], [], 1000, 16).charges == ()


def test_what_a_node_says_it_holds_is_believed() -> None:
    lengths = KnownLengths().lengths("chat", 1000, 50)
    shared = Resident(1000, 10, 0.05, lengths, kv_tokens=160)

    assert max(CAPACITY - interval.tokens for interval in free_kv([shared], CAPACITY, BLOCK)) == 208


def test_memory_is_seen_to_come_back_as_requests_end() -> None:
    lengths = CHAT.lengths("chat", 500, 4096)
    free = free_kv([Resident(500, 20 * index, 0.05, lengths) for index in range(20)], CAPACITY, BLOCK)

    assert free[-1].tokens > free[0].tokens + 3000


def test_a_full_replica_seldom_overflows_and_is_not_left_empty() -> None:
    rng = np.random.default_rng(7)
    lengths = CHAT.lengths("chat", 500, 4096)
    one = Resident(500, 0, 0.05, lengths)
    count, let_in = 0, 1
    while let_in:
        let_in = fitting(outlook([one] * count, [one] * 10, 40_000, BLOCK, 2.5))
        count += let_in
    peaks = np.array([peak_tokens(sample_lengths(rng, lengths, count), 500) for _ in range(400)])

    assert (peaks > 40_000).mean() <= 0.02
    assert peaks.mean() > 0.85 * 40_000


def test_one_that_surely_fits_alone_is_let_in() -> None:
    newcomers = [Resident(37_000, 0, 0.05, CHAT.lengths("chat", 500, 2900))] * 5

    assert fitting(outlook([], newcomers, 40_000, BLOCK, 3.0)) == 1


def fitting(found: Outlook) -> int:
    """How many go in, first come first served."""
    spare, count = np.array([interval.tokens for interval in found.free]), 0
    for charge in np.array(found.charges):
        if (charge <= spare).all():
            spare -= charge
            count += 1
    return count


def sample_lengths(rng: np.random.Generator, lengths: LengthDistribution, count: int) -> np.ndarray:
    return np.array([lengths.remaining_quantile(quantile) for quantile in rng.random(count)])


def peak_tokens(outputs: np.ndarray, prompt_tokens: int) -> int:
    """Most KV held at once by requests that all start together."""
    at = np.arange(outputs.max())[:, None]
    return int(((prompt_tokens + at) * (outputs > at)).sum(axis=1).max())


@given(st.lists(st.booleans(), min_size=1, max_size=400))
def test_feedback_keeps_the_share_that_overflows_in_bounds(overflows: list[bool]) -> None:
    z = OVERFLOW_Z
    for overflowed in overflows:
        z = next_z(z, 1, int(overflowed))
        assert LEAST_Z <= z <= MOST_Z
        assume(z < MOST_Z)
    share = sum(overflows) / len(overflows)

    assert share <= OVERFLOW_AIM + (MOST_Z - LEAST_Z) / (Z_PER_OVERFLOW * len(overflows)) + 1e-9


@pytest.mark.parametrize(
    ("prompt", "made", "pace_s"), [(-1, 0, 0.05), (5, -1, 0.05), (5, 0, 0.0), (5, 0, float("nan"))]
)
def test_an_impossible_request_is_refused(prompt: int, made: int, pace_s: float) -> None:
    with pytest.raises(ValueError, match="give"):
        Resident(prompt, made, pace_s, CHAT.lengths("chat", 5, 10))
