"""What a simulated replica still has of earlier calls: prefixes by chain, the oldest forgotten first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from enum import StrEnum

from engine.sessions import Sessions


class Keeping(StrEnum):
    """Whose KV stays when a call has ended, in memory that nobody uses.

    NEXT_CALLS: of calls that another follows. ALL: of every call. SESSIONS: of every call, and that of sessions
    that may call again before all else, within the budget of a node.
    """

    NEXT_CALLS = "next calls"
    ALL = "all"
    SESSIONS = "sessions"


class PrefixMemory:
    """KV of calls that ended, in memory that nobody uses. A prefix is kept whole or not at all.

    With `sessions`, the policy of a node, chains that it keeps are forgotten after all others.
    """

    def __init__(self, sessions: Sessions | None = None) -> None:
        self._tokens: OrderedDict[int, int] = OrderedDict()
        self._sessions = sessions
        self._held: dict[str, int] = {}

    @property
    def held(self) -> Mapping[str, int]:
        """Tokens kept for sessions, by their names."""
        return self._held

    def called(self, chain: int, now_s: float) -> None:
        """A call of `chain` has come here."""
        if self._sessions is not None:
            self._sessions.called(str(chain), now_s)

    def keep(self, chain: int, tokens: int, now_s: float = 0.0) -> None:
        """A call of `chain` has ended here and leaves so many tokens."""
        self._tokens[chain] = tokens
        self._tokens.move_to_end(chain)
        if self._sessions is not None:
            self._sessions.answered(str(chain), now_s)
            self._held[str(chain)] = tokens
            for name in self._sessions.review(self._held, now_s):
                del self._held[name]

    def close(self, chain: int) -> None:
        """Nothing is kept for it any more before others: it went on elsewhere."""
        if self._held.pop(str(chain), None) is not None and self._sessions is not None:
            self._sessions.close(str(chain))

    def cached_tokens(self, chain: int, wanted: int, free_tokens: int) -> int:
        """Tokens of the prefix that are still here, when `free_tokens` of memory are not in use."""
        total = sum(self._tokens.values())
        while self._tokens and total > free_tokens:
            total -= self._forget_one()
        return min(self._tokens.get(chain, 0), wanted)

    def _forget_one(self) -> int:
        """The oldest that no session holds, else the oldest; its tokens."""
        lost = next((chain for chain in self._tokens if str(chain) not in self._held), next(iter(self._tokens)))
        self._held.pop(str(lost), None)
        return self._tokens.pop(lost)
