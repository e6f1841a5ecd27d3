"""Leases: every one ends exactly once, and what is held is what was granted and not ended."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kv_transfer.lease import LeaseTable


def test_a_lease_ends_when_its_time_is_up() -> None:
    table = LeaseTable()
    table.grant("a", num_blocks=3, now_s=10.0, lease_s=2.0)
    assert table.expire(now_s=11.9) == []
    assert table.expire(now_s=12.0) == ["a"]
    assert table.expire(now_s=13.0) == []


def test_an_extension_never_shortens_and_never_revives() -> None:
    table = LeaseTable()
    table.grant("a", num_blocks=3, now_s=0.0, lease_s=10.0)
    assert table.extend("a", now_s=1.0, lease_s=2.0)
    assert table.left(now_s=1.0)[0].left_s == pytest.approx(9.0)
    assert table.extend("a", now_s=5.0, lease_s=10.0)
    assert table.left(now_s=5.0)[0].left_s == pytest.approx(10.0)
    assert not table.extend("a", now_s=15.0, lease_s=10.0)
    assert not table.extend("b", now_s=1.0, lease_s=1.0)


def test_release_tells_the_blocks_once() -> None:
    table = LeaseTable()
    table.grant("a", num_blocks=3, now_s=0.0, lease_s=1.0)
    assert table.release("a") == 3
    assert table.release("a") == 0


def test_a_second_grant_or_an_empty_one_is_refused() -> None:
    table = LeaseTable()
    table.grant("a", num_blocks=3, now_s=0.0, lease_s=1.0)
    with pytest.raises(ValueError, match="already has a lease"):
        table.grant("a", num_blocks=1, now_s=0.0, lease_s=1.0)
    with pytest.raises(ValueError, match="before it began"):
        table.grant("b", num_blocks=1, now_s=0.0, lease_s=0.0)


@given(st.lists(st.floats(0.01, 10.0), min_size=1, max_size=8), st.floats(0.0, 10.0))
def test_left_lists_what_expire_leaves(lease_s: list[float], now_s: float) -> None:
    table = LeaseTable()
    for number, seconds in enumerate(lease_s):
        table.grant(str(number), num_blocks=1, now_s=0.0, lease_s=seconds)
    left = [lease.request_id for lease in table.left(now_s)]
    gone = table.expire(now_s)
    assert sorted(left + gone) == sorted(map(str, range(len(lease_s))))
    assert all(lease.left_s > 0 for lease in table.left(now_s))


class Leases(RuleBasedStateMachine):
    """Any order of calls: blocks are conserved."""

    def __init__(self) -> None:
        super().__init__()
        self.table = LeaseTable()
        self.now_s = 0.0
        self.granted: dict[str, int] = {}

    @rule(name=st.sampled_from("abcd"), blocks=st.integers(1, 9), lease_s=st.floats(0.1, 5.0))
    def grant(self, name: str, blocks: int, lease_s: float) -> None:
        if name not in self.granted:
            self.table.grant(name, blocks, self.now_s, lease_s)
            self.granted[name] = blocks

    @rule(name=st.sampled_from("abcd"))
    def release(self, name: str) -> None:
        assert self.table.release(name) == self.granted.pop(name, 0)

    @rule(name=st.sampled_from("abcd"), lease_s=st.floats(0.1, 5.0))
    def extend(self, name: str, lease_s: float) -> None:
        assert not self.table.extend(name, self.now_s, lease_s) or name in self.granted

    @rule(seconds=st.floats(0.0, 3.0))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        for name in self.table.expire(self.now_s):
            del self.granted[name]

    @invariant()
    def held_is_granted_and_not_ended(self) -> None:
        assert self.table.num_blocks == sum(self.granted.values())
        assert len(self.table) == len(self.granted)


TestLeases = Leases.TestCase
