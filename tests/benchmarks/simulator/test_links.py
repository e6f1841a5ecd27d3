"""A port is used by one transfer at a time, at its rate; prefixes are kept whole, the oldest lost first."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from benchmarks.simulator.links import SharedLinks
from benchmarks.simulator.prefixes import PrefixMemory

NODES = 3
TRANSFERS = st.lists(
    st.tuples(st.integers(0, NODES - 1), st.integers(0, NODES - 1), st.integers(0, 10**9), st.floats(0, 5)),
    max_size=30,
)


def test_a_transfer_alone_takes_the_latency_and_its_bytes() -> None:
    assert SharedLinks(2, 0.5, 100.0).transfer(0, 1, 200, 1.0) == 1.0 + 2.0 + 0.5


def test_transfers_that_share_a_port_take_turns_and_others_do_not() -> None:
    links = SharedLinks(4, 0.25, 100.0)
    assert links.transfer(0, 1, 100, 0.0) == 1.25
    assert links.transfer(0, 2, 100, 0.0) == 2.25  # the port out of 0 is in use
    assert links.transfer(3, 1, 100, 0.5) == 2.25  # the port into 1
    assert links.transfer(1, 0, 100, 0.0) == 1.25  # the other way is another port
    assert links.transfer(3, 1, 100, 9.0) == 10.25


@given(transfers=TRANSFERS)
def test_no_port_carries_more_than_its_rate(transfers: list[tuple[int, int, int, float]]) -> None:
    """Sent back from its end, each transfer has its ports for itself as long as its bytes take."""
    links = SharedLinks(NODES, 0.125, 1e8)
    used: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for source, target, kv_bytes, now_s in sorted(transfers, key=lambda one: one[3]):
        ends_s = links.transfer(source, target, kv_bytes, now_s) - 0.125
        begins_s = ends_s - kv_bytes / 1e8
        assert begins_s >= now_s - 1e-9
        used.setdefault(("out", source), []).append((begins_s, ends_s))
        used.setdefault(("in", target), []).append((begins_s, ends_s))
    for spans in used.values():
        assert all(first[1] <= second[0] + 1e-9 for first, second in pairwise(spans))


def test_a_probe_finds_the_rate_of_an_idle_link() -> None:
    links = SharedLinks(2, 0.5, 100.0)
    links.transfer(0, 1, 1000, 0.0)
    link = links.between("n0", "n1")
    assert (link.latency_s, link.bytes_per_s) == (0.5, 100.0)


def test_a_prefix_is_there_while_its_memory_is_not_needed() -> None:
    memory = PrefixMemory()
    memory.keep(1, 100)
    memory.keep(2, 200)
    memory.keep(1, 150)  # a later call of the same chain: 2 is the oldest now
    assert memory.cached_tokens(2, 500, free_tokens=350) == 200
    assert memory.cached_tokens(1, 120, free_tokens=350) == 120
    assert memory.cached_tokens(2, 500, free_tokens=349) == 0
    assert memory.cached_tokens(1, 500, free_tokens=349) == 150
    assert memory.cached_tokens(3, 500, free_tokens=10**6) == 0
    assert memory.cached_tokens(1, 500, free_tokens=149) == 0
    assert memory.cached_tokens(1, 500, free_tokens=10**6) == 0  # gone is gone
