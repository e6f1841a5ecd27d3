"""Pools: the fewest flips, the least loaded nodes first, and a clear no."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.pools import PoolNode, plan_flips, sizes
from engine.errors import RequestError
from engine.request import RoleName

P, D, M = RoleName.PREFILL, RoleName.DECODE, RoleName.MIXED


def test_one_flip_turns_1p1d_into_two_decoders() -> None:
    flips = plan_flips([PoolNode("a", P, 0), PoolNode("b", D, 0)], {P: 0, D: 2})
    assert [(flip.node, flip.before, flip.after) for flip in flips] == [("a", P, D)]


def test_an_idle_node_is_flipped_before_a_busy_one() -> None:
    flips = plan_flips([PoolNode("a", P, 3), PoolNode("b", P, 0), PoolNode("c", D, 9)], {P: 1, D: 2})
    assert [flip.node for flip in flips] == ["b"]


def test_a_busy_node_changes_where_no_other_can() -> None:
    flips = plan_flips([PoolNode("a", P, 3), PoolNode("b", P, 2), PoolNode("c", D, 0)], {P: 1, D: 2})
    assert [flip.node for flip in flips] == ["b"]


def test_while_roles_change_no_prefill_node_is_without_a_decode_node() -> None:
    mixed = [PoolNode("a", M, 0), PoolNode("b", M, 0)]
    assert [flip.after for flip in plan_flips(mixed, {P: 1, D: 1})] == [D, P]
    swapped = [PoolNode("a", P, 0), PoolNode("b", D, 0), PoolNode("c", M, 0)]
    assert plan_flips(swapped, {P: 2, D: 1})[-1].after is P


@pytest.mark.parametrize(
    ("want", "words"),
    [
        ({P: 2, D: 2}, "2 nodes, but 4"),
        ({P: 2, D: 0}, "at least one decode node"),
        ({P: -1, D: 3}, "fewer than 0"),
    ],
)
def test_sizes_that_cannot_be_are_refused(want: dict[RoleName, int], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        plan_flips([PoolNode("a", P, 0), PoolNode("b", D, 0)], want)


@given(st.lists(st.sampled_from(RoleName), min_size=1, max_size=12), st.data())
def test_flips_give_the_sizes_asked_for_and_are_the_fewest(roles: list[RoleName], data: st.DataObject) -> None:
    nodes = [PoolNode(f"n{index}", role, 0) for index, role in enumerate(roles)]
    decode = data.draw(st.integers(1, len(nodes)))
    prefill = data.draw(st.integers(0, len(nodes) - decode))
    want = {P: prefill, D: decode, M: len(nodes) - decode - prefill}
    flips = plan_flips(nodes, want)
    after = {node.name: node.role for node in nodes} | {flip.node: flip.after for flip in flips}
    assert sizes([PoolNode(name, role, 0) for name, role in after.items()]) == {
        str(role): count for role, count in want.items()
    }
    assert len(flips) == sum(max(count - roles.count(role), 0) for role, count in want.items())
