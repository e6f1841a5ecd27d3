"""What room is worth when not everybody fits: the dearest requests are deferred first.

If a share of the requests must be deferred anyway, fewest are lost when these are the dearest ones (each counts
the same). So while requests are found not to fit, some that would fit are deferred too: those that take most of
a replica. How many is a matter of feedback: the share grows while others still do not fit, and shrinks to none
when everybody does.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque

REMEMBERED = 256  # requests whose costs say what is dear
LEAST_KNOWN = 32  # before that nobody is deferred for being dear
STEP = 0.06  # by which one request that does not fit moves the share
AIM = 0.5  # of those turned away, about this part for want of room and the others for being dear
FORGET_S = 20.0  # until 1/e of the share is left when nothing is asked
MOST_SHARE = 0.5
LEAST_SHARE = 0.01  # below it everybody has fitted for a while


class RoomPrice:
    """Remembers costs and how many fitted. Times are the caller's, in seconds, and never go back."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []
        self._share = 0.0
        self._at_s = 0.0

    def too_dear(self, cost_s: float, now_s: float) -> bool:
        """Whether room is too short for a request that takes `cost_s` of a replica."""
        self._fade(now_s)
        if len(self._sorted) < LEAST_KNOWN or self._share <= 0:
            return False
        rank = bisect_left(self._sorted, cost_s) / len(self._sorted)
        return rank >= 1 - self._share

    def short(self, now_s: float) -> bool:
        """Whether somebody did not fit lately: what is taken now, another may want."""
        self._fade(now_s)
        return self._share > LEAST_SHARE

    def note(self, cost_s: float, now_s: float, *, fitted: bool, dear: bool) -> None:
        """A request has been decided on: it fitted or not, or was found too dear without being asked about."""
        self._fade(now_s)
        self._recent.append(cost_s)
        insort(self._sorted, cost_s)
        if len(self._recent) > REMEMBERED:
            del self._sorted[bisect_left(self._sorted, self._recent.popleft())]
        if dear:
            self._share -= STEP * AIM / (1 - AIM)
        elif not fitted:
            self._share += STEP
        self._share = min(max(self._share, 0.0), MOST_SHARE)

    def _fade(self, now_s: float) -> None:
        self._share *= math.exp(-max(now_s - self._at_s, 0.0) / FORGET_S)
        self._at_s = now_s


def work_s(
    least_s: float, per_token_s: float, kv_tokens: int, prompt_tokens: int, output_tokens: float
) -> float:
    """Seconds of a replica that a request takes at least: its tokens, and its share of the KV memory of every
    step for as long as it decodes (`least_s` a step, `kv_tokens` in all)."""
    held = output_tokens * (prompt_tokens + output_tokens / 2)
    return per_token_s * (prompt_tokens + output_tokens) + least_s * held / kv_tokens
