"""Cached prefixes of a virtual engine: which full blocks it knows, and which of them nobody holds."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence

from engine.prefix import PREFIX_BLOCK_TOKENS
from engine.prefix_log import PrefixLog
from engine.sessions import common_start, is_aside


class PrefixCache:
    """Blocks by the name (engine.prefix) of all tokens up to their end. What nobody holds lives in free memory.

    Blocks that are let go are forgotten the least recently used first, of one work the last block first; those
    that are kept for a session after all others, the session that was used longest ago first.
    """

    def __init__(self, block_tokens: int) -> None:
        self.log = PrefixLog()
        # Blocks from one name that others know to the next; 0: none where blocks end.
        self._named_every = 0 if PREFIX_BLOCK_TOKENS % block_tokens else PREFIX_BLOCK_TOKENS // block_tokens
        self._holders: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._kept: OrderedDict[str, list[int]] = OrderedDict()
        self._keeps: Counter[int] = Counter()  # sessions by block
        self._aside: set[str] = set()  # sessions whose last call was none of their history

    def known(self, blocks: Sequence[int]) -> int:
        """How many of these, from the first, are known."""
        count = 0
        for block in blocks:
            if block not in self._holders and block not in self._idle:
                break
            count += 1
        return count

    def hold(self, blocks: Sequence[int], first: int, end: int) -> None:
        """A work has these of its blocks now, from `first` to before `end`, found or computed."""
        every = self._named_every
        self.log.add(blocks[(first // every + 1) * every - 1 : end : every] if every else ())
        for block in blocks[first:end]:
            self._holders[block] = self._holders.get(block, 0) + 1
            self._idle.pop(block, None)

    def let_go(self, blocks: Sequence[int]) -> None:
        """A work that held these is over."""
        for block in reversed(blocks):
            left = self._holders[block] - 1
            if left:
                self._holders[block] = left
            else:
                del self._holders[block]
                self._idle[block] = None

    def keep(self, session: str, blocks: Sequence[int]) -> None:
        """Keep these for a session, in place of what it had; not those of one call beside its history."""
        held = self._kept.get(session, ())
        if is_aside(len(held), len(blocks), common_start(held, blocks)) and session not in self._aside:
            self._aside.add(session)
            self._kept.move_to_end(session)
            return
        self.give_up(session)
        if blocks:
            self._kept[session] = list(blocks)
            self._keeps.update(blocks)

    def kept(self) -> dict[str, int]:
        """Blocks of each session, the one that was used longest ago first."""
        return {session: len(blocks) for session, blocks in self._kept.items()}

    @property
    def kept_blocks(self) -> int:
        """Blocks that are kept for sessions, each counted once."""
        return len(self._keeps)

    def give_up(self, session: str) -> None:
        """Keep nothing for a session."""
        self._aside.discard(session)
        for block in self._kept.pop(session, ()):
            self._keeps[block] -= 1
            if not self._keeps[block]:
                del self._keeps[block]

    def fit(self, free_blocks: int) -> None:
        """Forget what free memory has no room for."""
        while len(self._idle) > free_blocks:
            if not self._kept:
                self.log.discard([self._idle.popitem(last=False)[0]])
                continue
            spare = [block for block in self._idle if block not in self._keeps]
            spare = spare[: len(self._idle) - free_blocks]
            self.log.discard(spare)
            for block in spare:
                del self._idle[block]
            if len(self._idle) > free_blocks:
                self.give_up(next(iter(self._kept)))

    def forget(self) -> None:
        """Forget all that nobody holds."""
        self.log.discard(self._idle)
        self._idle.clear()
        for session in list(self._kept):
            self.give_up(session)
