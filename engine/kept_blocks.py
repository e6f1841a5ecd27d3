"""KV blocks of sessions that are idle: held for their next call, and the first to go when memory is needed."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, OrderedDict
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from engine.sessions import common_start, is_aside


class KeptBlocks:
    """Blocks by session, the one that was used longest ago first.

    `pool` is vLLM's: a reference more keeps a block from being given to others. A block may be held for several
    sessions, and by works that found it. `chains`: who uses a block of a session uses those before it too, as
    where all layers see all of a context.
    """

    def __init__(self, pool: Any, *, chains: bool) -> None:
        self._pool = pool
        self._chains = chains
        self._blocks: OrderedDict[str, list[Any]] = OrderedDict()
        self._aside: set[str] = set()  # sessions whose last call was none of their history
        self._holds: Counter[int] = Counter()

    def keep(self, session: str, blocks: Sequence[Any]) -> None:
        """Hold these for a session, in place of what it had; not those of one call beside its history."""
        held = self._blocks.get(session, ())
        common = common_start([block.block_id for block in held], [block.block_id for block in blocks])
        if is_aside(len(held), len(blocks), common) and session not in self._aside:
            self._aside.add(session)
            self._blocks.move_to_end(session)
            return
        self._pool.touch(blocks)
        self._holds.update(block.block_id for block in blocks)
        self.give_up(session)
        if blocks:
            self._blocks[session] = list(blocks)

    def give_up(self, session: str) -> bool:
        """Let a session's blocks go: they can be found until somebody needs them. Whether it had any."""
        blocks = self._blocks.pop(session, None)
        self._aside.discard(session)
        if blocks is None:
            return False
        self._holds.subtract(block.block_id for block in blocks)
        self._holds += Counter()  # without those at 0
        self._pool.free_blocks(reversed(blocks))  # the end of a history is of less use than its beginning
        return True

    def give_up_oldest(self) -> bool:
        """Let go what was used longest ago. False if nothing is kept."""
        return self.give_up(next(iter(self._blocks))) if self._blocks else False

    def counts(self) -> dict[str, int]:
        """Blocks of each session, the one that was used longest ago first."""
        return {session: len(blocks) for session, blocks in self._blocks.items()}

    @property
    def held_blocks(self) -> int:
        """Blocks that are held for sessions, each counted once."""
        return len(self._holds)

    def idle(self) -> int:
        """Blocks that nobody but sessions holds: free, for whoever needs them.

        Asked for each batch: of chains the end of what is in use is searched for, and not each block looked at.
        """
        used: set[int] = set()
        for blocks in self._blocks.values():
            if not self._chains:
                used.update(block.block_id for block in blocks if self._is_used(block))
            elif self._is_used(blocks[0]):
                end = bisect_left(blocks, True, key=lambda block: not self._is_used(block))
                fresh = takewhile(lambda block: block.block_id not in used, reversed(blocks[:end]))
                used.update([block.block_id for block in fresh])
        return len(self._holds) - len(used)

    def _is_used(self, block: Any) -> bool:
        return bool(block.ref_cnt > self._holds[block.block_id])
