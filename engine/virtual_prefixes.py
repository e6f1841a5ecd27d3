"""Cached prefixes of a virtual engine: which full blocks it knows, and which of them nobody holds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class PrefixCache:
    """Blocks by the number of all tokens up to their end. Those that nobody holds live in free memory.

    Blocks that are let go are forgotten the least recently used first, of one work the last block first.
    """

    def __init__(self) -> None:
        self._holders: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    def known(self, blocks: Sequence[int]) -> int:
        """How many of these, from the first, are known."""
        count = 0
        for block in blocks:
            if block not in self._holders and block not in self._idle:
                break
            count += 1
        return count

    def hold(self, blocks: Sequence[int]) -> None:
        """A work has these now, found or computed."""
        for block in blocks:
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

    def fit(self, free_blocks: int) -> None:
        """Forget what free memory has no room for."""
        while len(self._idle) > free_blocks:
            self._idle.popitem(last=False)

    def forget(self) -> None:
        """Forget all that nobody holds."""
        self._idle.clear()
