"""Which node holds the KV of which prompt prefix, as far as finished requests tell.

An engine forgets cached prefixes without saying so, the oldest first: a node is believed to hold no more than
its KV memory has room for. What is believed and not there costs the request a longer prefill.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from engine.prefix import PREFIX_BLOCK_TOKENS


class PrefixDirectory:
    """Prefix hashes by node, least recently used first."""

    def __init__(self) -> None:
        self._nodes: dict[str, OrderedDict[int, None]] = {}

    def add(self, node: str, hashes: Sequence[int], kv_tokens: int) -> None:
        """A node holds these now. `kv_tokens`: how many tokens its memory has room for."""
        held = self._nodes.setdefault(node, OrderedDict())
        for value in reversed(hashes):  # the longest prefix is forgotten first
            held[value] = None
            held.move_to_end(value)
        while len(held) * PREFIX_BLOCK_TOKENS > kv_tokens:
            held.popitem(last=False)

    def cached_tokens(self, node: str, hashes: Sequence[int]) -> int:
        """Tokens of the longest prefix that a node holds."""
        held = self._nodes.get(node)
        if not held:
            return 0
        blocks = 0
        for value in hashes:
            if value not in held:
                break
            blocks += 1
        return blocks * PREFIX_BLOCK_TOKENS

    def holders(self, hashes: Sequence[int]) -> set[str]:
        """Nodes that hold the first of these at least."""
        if not hashes:
            return set()
        return {node for node, held in self._nodes.items() if hashes[0] in held}

    def forget(self, node: str) -> None:
        """A node began anew."""
        self._nodes.pop(node, None)
