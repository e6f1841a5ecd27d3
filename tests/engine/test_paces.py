"""Paces in groups: few, none looser than it was."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.paces import MOST_PACES, grouped

PACES = st.lists(st.floats(1e-4, 3600, allow_nan=False), max_size=200)


@given(PACES)
def test_groups_are_few_and_no_pace_gets_looser(paces_s: list[float]) -> None:
    groups = grouped(paces_s)
    assert set(groups) == set(paces_s)
    assert len(set(groups.values())) <= MOST_PACES
    assert all(group_s <= pace_s and groups[group_s] == group_s for pace_s, group_s in groups.items())


def test_a_few_paces_stay_as_they_are() -> None:
    assert grouped([0.1, 0.05, 0.1]) == {0.05: 0.05, 0.1: 0.1}
