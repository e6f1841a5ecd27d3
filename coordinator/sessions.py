"""Which node keeps the history of which session, as the nodes say and as far as its calls told."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from engine.prefix import PREFIX_BLOCK_TOKENS
from engine.sessions import common_start, is_aside

MOST_SESSIONS = 65_536
UNLISTED_GRACE_S = 1.0  # a call that has just ended may not be in a node's list yet, nor one closed out of it
MOST_CLOSED = 1024


@dataclass(slots=True)
class _Home:
    node: str
    since_s: float
    hashes: list[int] = field(default_factory=list)  # of the prefixes of its history; none: not known
    prompt_tokens: int = 0  # of its last call: how the history goes on, the next prompt may render otherwise
    tokens: int = 0  # that the node says it keeps
    aside: bool = False  # its last call was none of its history


class SessionDirectory:
    """The home of each session. Bounded: the one that was used longest ago is forgotten first."""

    def __init__(self) -> None:
        self._homes: OrderedDict[str, _Home] = OrderedDict()
        self._at: dict[str, set[str]] = {}  # sessions by node
        self._closed_s: OrderedDict[str, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._homes)

    def answered(
        self, session: str, node: str, hashes: Sequence[int], prompt_tokens: int, now_s: float
    ) -> str | None:
        """A call of it has ended on a node, which holds these prefixes now. Returns the node that has nothing
        to keep for it: the one that it left, or this one, if the call was one beside its history."""
        known = self._homes.get(session)
        if known is not None and not known.aside:
            common_tokens = common_start(known.hashes, hashes) * PREFIX_BLOCK_TOKENS
            if known.hashes and is_aside(known.prompt_tokens, prompt_tokens, common_tokens):
                known.aside, known.since_s = True, now_s
                return node if node != known.node else None
        before = self._forget(session)
        self._closed_s.pop(session, None)
        tokens = max(len(hashes) * PREFIX_BLOCK_TOKENS, prompt_tokens)
        self._settle(session, _Home(node, now_s, list(hashes), prompt_tokens, tokens))
        return before if before != node else None

    def listed(self, node: str, tokens: Mapping[str, int], now_s: float) -> bool:
        """A node says for whom it keeps how much. Of others it keeps nothing any more.

        Whether that is all: where a call has just ended, the list may be from before, and another one is due.
        """
        spared = False
        for session in list(self._at.get(node, ())):
            home = self._homes[session]
            if session in tokens:
                home.tokens = tokens[session]
            elif now_s - home.since_s > UNLISTED_GRACE_S:
                self._forget(session)
            else:
                spared = True
        for session, kept in tokens.items():
            if session not in self._homes and now_s - self._closed_s.get(session, -1e9) > UNLISTED_GRACE_S:
                self._settle(session, _Home(node, now_s, tokens=kept))  # of before this coordinator began
        return not spared

    def home(self, session: str | None) -> str | None:
        """The node that keeps its history, if one does."""
        home = None if session is None else self._homes.get(session)
        return None if home is None else home.node

    def cached_tokens(self, node: str, session: str | None, hashes: Sequence[int]) -> int:
        """Tokens of a prompt with these prefixes that are part of what a node keeps for the session.

        Of a history that only its node knows, the prompt is taken to go on from all of it; and from the whole
        prompt before it where all full blocks of that are the same.
        """
        home = None if session is None else self._homes.get(session)
        if home is None or home.node != node:
            return 0
        common = common_start(home.hashes, hashes) if home.hashes else len(hashes)
        whole = common >= home.prompt_tokens // PREFIX_BLOCK_TOKENS
        return min(max(common * PREFIX_BLOCK_TOKENS, home.prompt_tokens if whole else 0), home.tokens)

    def kept_tokens(self, session: str) -> int:
        """Tokens of KV that its home keeps, as far as is known."""
        home = self._homes.get(session)
        return 0 if home is None else home.tokens

    def close(self, session: str, now_s: float) -> str | None:
        """Forget a session; the node that keeps its history, if one does."""
        self._closed_s[session] = now_s
        while len(self._closed_s) > MOST_CLOSED:
            self._closed_s.popitem(last=False)
        return self._forget(session)

    def forget(self, node: str) -> None:
        """A node began anew."""
        for session in list(self._at.get(node, ())):
            self._forget(session)

    def _settle(self, session: str, home: _Home) -> None:
        self._homes[session] = home
        self._at.setdefault(home.node, set()).add(session)
        while len(self._homes) > MOST_SESSIONS:
            self._forget(next(iter(self._homes)))

    def _forget(self, session: str) -> str | None:
        home = self._homes.pop(session, None)
        if home is None:
            return None
        self._at[home.node].discard(session)
        return home.node
