"""Blocks that are kept for sessions: what goes, what stays, and that vLLM's pool gets each of them back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

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
    kept = KeptBlocks(pool)
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
    kept = KeptBlocks(Pool())
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
