"""Blocks that are kept for sessions: what goes, what stays, and that vLLM's pool gets each of them back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.kept_blocks import KeptBlocks


@dataclass(eq=False)
class Block:
    """As far as vLLM's is looked at."""

    block_id: int
    ref_cnt: int = 1  # of the work that computed it


@dataclass
class Pool:
    """Counts references, as vLLM's does."""

    freed: list[int] = field(default_factory=list)

    def touch(self, blocks: Sequence[Block]) -> None:
        for block in blocks:
            block.ref_cnt += 1

    def free_blocks(self, blocks: Sequence[Block]) -> None:
        for block in blocks:
            block.ref_cnt -= 1
            assert block.ref_cnt >= 0
            self.freed.append(block.block_id)


@pytest.fixture
def blocks() -> list[Block]:
    return [Block(at) for at in range(20)]


def test_what_sessions_share_is_held_once_and_free_when_the_last_lets_go(blocks: list[Block]) -> None:
    pool = Pool()
    kept = KeptBlocks(pool, chains=True)
    kept.keep("a", blocks[:8])
    kept.keep("b", [*blocks[:6], *blocks[10:12]])
    pool.free_blocks(blocks)  # the works are over
    assert kept.held_blocks == kept.idle() == 10
    assert kept.counts() == {"a": 8, "b": 8}
    assert kept.give_up("a")
    assert kept.held_blocks == 8
    assert kept.give_up_oldest()
    assert kept.held_blocks == 0
    assert all(block.ref_cnt == 0 for block in blocks)


def test_one_call_beside_the_history_does_not_throw_it_away(blocks: list[Block]) -> None:
    kept = KeptBlocks(Pool(), chains=True)
    kept.keep("a", blocks[:10])
    kept.keep("b", blocks[:2])
    kept.keep("a", blocks[15:18])  # a title, say
    assert kept.counts() == {"b": 2, "a": 10}, "and it was used just now"
    kept.keep("a", blocks[:12])
    kept.keep("a", blocks[15:18])
    assert kept.counts()["a"] == 12
    kept.keep("a", blocks[15:19])
    assert kept.counts()["a"] == 4, "what goes on is the history now"
    assert [block.ref_cnt for block in blocks[:2]] == [2, 2]
    assert all(block.ref_cnt == 1 for block in blocks[2:15])


def _idle_after(calls: list[tuple[int, list[int], bool]], *, chains: bool) -> int:
    """Histories are paths of a tree; the works that computed them run on, or are over."""
    pool, known = Pool(), dict[tuple[int, ...], Block]()
    kept = KeptBlocks(pool, chains=chains)
    for session, turns, runs_on in calls:
        ends = range(1, len(turns) + 1)
        path = [known.setdefault(tuple(turns[:end]), Block(len(known), 0)) for end in ends]
        pool.touch(path)
        kept.keep(f"s{session}", path)
        if not runs_on:
            pool.free_blocks(path)
    return kept.idle()


@given(
    st.lists(st.tuples(st.integers(0, 4), st.lists(st.integers(0, 1), max_size=6), st.booleans()), max_size=20)
)
def test_what_is_free_beside_works_is_found_without_looking_at_each_block(
    calls: list[tuple[int, list[int], bool]],
) -> None:
    assert _idle_after(calls, chains=True) == _idle_after(calls, chains=False)
