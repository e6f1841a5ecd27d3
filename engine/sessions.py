"""Whose KV a node keeps while nobody calls: for how long, within what budget, and who goes first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

TTL_S = 300.0
KV_SHARE = 0.5
USUAL_PAUSE_S = 10.0  # between two calls of a session of which only one has been seen
NEWEST = 0.5  # weight of the last pause in what is expected of the next


def common_start(one: Sequence[int], two: Sequence[int]) -> int:
    """How many of two chains of prefixes or blocks are the same, from the first on."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, two, strict=False)))


def is_aside(held: int, left: int, common: int) -> bool:
    """Whether what a call has left is no part of its session's history, of which `held` tokens (or blocks) are
    kept: much shorter, and another text, such as a title for it. Of `left`, `common` are the same."""
    return 2 * left < held and 2 * common <= left


@dataclass(slots=True)
class _Session:
    idle_since_s: float
    pause_s: float = USUAL_PAUSE_S
    calls: int = 0  # that run now


class Sessions:
    """The sessions of a node. The engine holds their KV, and gives it up by itself where a work needs memory.

    This says what else goes: a session that has been idle for `ttl_s`, and those beyond `budget_tokens`, the
    one first that is the most overdue by its own pace: tools take some sessions a second and others a minute.
    """

    def __init__(self, ttl_s: float, budget_tokens: int) -> None:
        self._ttl_s = ttl_s
        self._budget_tokens = budget_tokens
        self._sessions: OrderedDict[str, _Session] = OrderedDict()
        self._kept: dict[str, int] = {}
        self.version = 0

    @property
    def kept(self) -> Mapping[str, int]:
        """Tokens kept for each, as `review` last saw it."""
        return self._kept

    def called(self, session: str, now_s: float) -> None:
        """A call of it has come."""
        known = self._sessions.get(session)
        if known is None:
            known = self._sessions[session] = _Session(now_s)
        elif not known.calls:
            known.pause_s += NEWEST * (now_s - known.idle_since_s - known.pause_s)
        known.calls += 1

    def answered(self, session: str, now_s: float) -> None:
        """A call of it is over."""
        known = self._sessions.get(session)
        if known is not None:
            known.calls = max(known.calls - 1, 0)
            known.idle_since_s = now_s

    def close(self, session: str) -> None:
        """Nothing is kept for it any more."""
        if self._kept.pop(session, None) is not None:
            self.version += 1

    def review(self, kept: Mapping[str, int], now_s: float, kept_tokens: int | None = None) -> list[str]:
        """Whom to give up, given the tokens that the engine keeps for each. One with a call that runs stays.

        `kept_tokens`: in all, where sessions share some; who goes is taken to take all of its own along, and
        what is still too much goes at the next review. What the engine gave up by itself is forgotten:
        `version` rises with every change of who is kept.
        """
        if not kept and not self._sessions and not self._kept:
            return []
        idle = {name: one for name, one in self._sessions.items() if not one.calls and name in kept}
        gone = [name for name, one in idle.items() if now_s - one.idle_since_s >= self._ttl_s]
        in_all = sum(kept.values()) if kept_tokens is None else kept_tokens
        excess = in_all - sum(kept[name] for name in gone) - self._budget_tokens
        staying = idle.keys() - gone
        for name in sorted(staying, key=lambda name: _overdue(idle[name], now_s), reverse=True):
            if excess <= 0:
                break
            gone.append(name)
            excess -= kept[name]
        left = {name: tokens for name, tokens in kept.items() if name not in set(gone)}
        if left != self._kept:
            self.version += 1
            self._kept = left
        # Who has nothing here and no call is a stranger again.
        for name in [name for name, one in self._sessions.items() if not one.calls and name not in left]:
            del self._sessions[name]
        return gone


def _overdue(session: _Session, now_s: float) -> float:
    """How many of its usual pauses it has been idle for."""
    return (now_s - session.idle_since_s) / max(session.pause_s, 1e-3)
