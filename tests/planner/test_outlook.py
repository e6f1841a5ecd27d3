"""The compiled outlook gives what the slow one in arrays does."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.planner.lengths import KnownLengths, LengthDistribution
from coordinator.planner.memory import Resident, outlook
from tests.planner import outlook_reference
from tests.planner.test_memory import chat

LEARNED = chat()
LEARNED.observe_at_least("other", 9000, 700)


@st.composite
def residents(draw: st.DrawFn) -> Resident:
    most = draw(st.integers(1, 3000))
    made = draw(st.integers(0, most))
    prompt = draw(st.integers(0, 9000))
    known: LengthDistribution
    if draw(st.booleans()):
        known = LEARNED.lengths(draw(st.sampled_from(["chat", "other"])), prompt, most)
    else:
        known = KnownLengths().lengths("", prompt, most)
    held = draw(st.none() | st.integers(made, made + 5000))
    pace_s = draw(st.floats(1e-3, 1.0))
    return Resident(prompt, made, pace_s, known, draw(st.floats(-1.0, 10.0)), held)


@given(
    st.lists(residents(), max_size=30),
    st.lists(residents(), max_size=3),
    st.integers(0, 300_000),
    st.sampled_from([1, 16, 128]),
    st.floats(0, 4),
)
@settings(max_examples=300, deadline=None)
def test_it_gives_what_the_slow_one_does(
    running: list[Resident], newcomers: list[Resident], capacity: int, block: int, z: float
) -> None:
    expected = outlook_reference.outlook(running, newcomers, capacity, block, z)
    assert outlook(running, newcomers, capacity, block, z) == expected


def test_an_output_longer_than_any_is_like_the_longest() -> None:
    """Times far away are more tokens than any output has, not more than a number holds."""
    quick = Resident(100, 0, 1e-12, LEARNED.lengths("chat", 100, 1000))
    slow = Resident(100, 0, 1e6, LEARNED.lengths("chat", 100, 1000))
    free = outlook([quick, slow], [], 10_000).free
    assert 0 < free[0].tokens < 10_000
