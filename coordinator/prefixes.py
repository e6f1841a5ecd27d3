"""Which node holds the KV of which prompt prefix: as finished requests tell at once, and nodes somewhat later.

What is believed and not there costs the request a longer prefill, and what is there and not known, a worse
place. A node tells what its cache holds and gives to others (engine.prefix_log), so a belief that it does not
confirm ends; before it has told anything, it is believed to hold no more than its memory has room for.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from engine.prefix import PREFIX_BLOCK_TOKENS
from engine.prefix_log import PrefixChanges

UNTOLD_GRACE_S = 2.0  # what a request has just left there may not be in what the node tells yet


@dataclass(slots=True)
class _Held:
    """Names of prefixes, least recently used first; of those that the node has not told of, since when."""

    names: OrderedDict[int, None] = field(default_factory=OrderedDict)
    untold_s: OrderedDict[int, float] = field(default_factory=OrderedDict)
    tells: bool = False


class PrefixDirectory:
    """Prefixes by node."""

    def __init__(self) -> None:
        self._nodes: dict[str, _Held] = {}

    def add(self, node: str, hashes: Sequence[int], kv_tokens: int, now_s: float = 0.0) -> None:
        """A request has left these there. `kv_tokens`: how many tokens the node's memory has room for."""
        held = self._nodes.setdefault(node, _Held())
        for value in reversed(hashes):  # the longest prefix is forgotten first
            if held.tells and value not in held.names:
                held.untold_s[value] = now_s
            held.names[value] = None
            held.names.move_to_end(value)
        while len(held.names) * PREFIX_BLOCK_TOKENS > kv_tokens:
            held.names.popitem(last=False)

    def told(self, node: str, changes: PrefixChanges, now_s: float) -> None:
        """A node tells what its cache holds, or what has changed."""
        held = self._nodes.setdefault(node, _Held())
        if not held.tells:
            held.untold_s = OrderedDict.fromkeys(held.names, now_s)
        if changes.whole:
            held.names = OrderedDict.fromkeys([*changes.added, *held.untold_s])
        held.tells = True
        self._drop(held, changes.gone)
        for name in changes.added:
            held.names[name] = None
            held.untold_s.pop(name, None)
        self._drop(held, [name for name, at_s in held.untold_s.items() if now_s - at_s > UNTOLD_GRACE_S])

    def cached_tokens(self, node: str, hashes: Sequence[int]) -> int:
        """Tokens of the longest prefix that a node holds."""
        held = self._nodes.get(node)
        if held is None:
            return 0
        blocks = 0
        for value in hashes:
            if value not in held.names:
                break
            blocks += 1
        return blocks * PREFIX_BLOCK_TOKENS

    def holders(self, hashes: Sequence[int]) -> set[str]:
        """Nodes that hold the first of these at least."""
        if not hashes:
            return set()
        return {node for node, held in self._nodes.items() if hashes[0] in held.names}

    def forget(self, node: str) -> None:
        """A node began anew."""
        self._nodes.pop(node, None)

    @staticmethod
    def _drop(held: _Held, names: Iterable[int]) -> None:
        for name in names:
            held.names.pop(name, None)
            held.untold_s.pop(name, None)
