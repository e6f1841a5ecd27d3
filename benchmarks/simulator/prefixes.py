"""What a simulated replica still has of earlier calls: prefixes by chain, the oldest forgotten first."""

from __future__ import annotations

from collections import OrderedDict


class PrefixMemory:
    """KV of calls that ended, in memory that nobody uses. A prefix is kept whole or not at all."""

    def __init__(self) -> None:
        self._tokens: OrderedDict[int, int] = OrderedDict()

    def keep(self, chain: int, tokens: int) -> None:
        """A call of `chain` has ended here and leaves so many tokens."""
        self._tokens[chain] = tokens
        self._tokens.move_to_end(chain)

    def cached_tokens(self, chain: int, wanted: int, free_tokens: int) -> int:
        """Tokens of the prefix that are still here, when `free_tokens` of memory are not in use."""
        total = sum(self._tokens.values())
        while self._tokens and total > free_tokens:
            _, lost = self._tokens.popitem(last=False)
            total -= lost
        return min(self._tokens.get(chain, 0), wanted)
