"""When pools follow the load: which of prefill and decode gets a node of the other, if any.

What counts is queueing that is seen, not averages: requests that were turned away for want of one pool, prompts
that wait longer than a bound, memory that is full. A pool gives a node only while what binds it leaves room
without it. A change needs the same answer for some windows in a row; one that undoes the last change needs
twice as many each time, so that a load between two sizes does not swing them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from engine.request import RoleName

WINDOW_S = 1.0
QUEUE_S = 1.0  # of prompts that wait for a prefill node: more is too much
FULL = 0.95  # of what binds a decode node
ROOM = 0.75  # of what binds a pool, once it has given a node
PATIENCE = 3  # windows in a row that must say the same
MOST_PATIENCE = 48
SETTLE_S = 5.0  # after a change, until its effect can be seen
CALM_S = 300.0  # without a change, until the one before it counts for nothing
OTHER = {RoleName.PREFILL: RoleName.DECODE, RoleName.DECODE: RoleName.PREFILL}


@dataclass(frozen=True, slots=True)
class PoolLoad:
    """A pool in one window. `turned_away`: requests that it had no room for; `queue_s`: of prompts that wait,
    in seconds of each of its nodes; `used`: the share in use of what binds it (time, memory or slots), 0 to 1.
    """

    nodes: int
    turned_away: int = 0
    queue_s: float = 0.0
    used: float = 0.0

    @property
    def short(self) -> bool:
        """Whether somebody waits for it."""
        return self.lacking or self.backed_up

    @property
    def lacking(self) -> bool:
        """Whether it had no room for somebody, or has none."""
        return self.turned_away > 0 or self.used >= FULL

    @property
    def backed_up(self) -> bool:
        """Whether prompts wait for long."""
        return self.queue_s > QUEUE_S

    @property
    def can_give(self) -> bool:
        """Whether it would have room with a node less."""
        left = self.nodes - 1
        return left > 0 and not self.lacking and self.used * self.nodes / left <= ROOM

    @property
    def words(self) -> str:
        """For people: what is short of it, or how much is used."""
        told = [f"{self.used:.0%} used"]
        if self.queue_s > QUEUE_S:
            told.insert(0, f"prompts wait {self.queue_s:.1f} s")
        if self.turned_away:
            told.insert(0, f"{self.turned_away} turned away in {WINDOW_S:g} s")
        return ", ".join(told)


@dataclass(frozen=True, slots=True)
class Move:
    """A node goes from one pool to the other, and why."""

    before: RoleName
    after: RoleName
    why: str


class PoolPolicy:
    """Decides from window to window. Times are the caller's, in seconds, and never go back."""

    def __init__(self) -> None:
        self.says = "nothing has been looked at yet"
        self._leaning: RoleName | None = None
        self._windows = 0
        self._patience = PATIENCE
        self._last: tuple[RoleName, float] | None = None

    def decide(self, loads: Mapping[RoleName, PoolLoad], now_s: float) -> Move | None:
        """What to change now, if anything. `says` has the reason, also for leaving all as it is."""
        if self._last is not None and now_s - self._last[1] < SETTLE_S:
            self.says = "a change was just made: its effect is waited for"
            return None
        grows = self._grows(loads)
        self._windows = self._windows + 1 if grows is not None and grows is self._leaning else 1
        self._leaning = grows
        if grows is None:
            return None
        needed = self._needed(grows, now_s)
        gives = OTHER[grows]
        why = f"{grows} is short ({loads[grows].words}) and {gives} has room ({loads[gives].words})"
        if self._windows < needed:
            self.says = f"{why}, for {self._windows} of {needed} windows"
            return None
        self._patience = needed if self._undoes(grows) else PATIENCE
        self._last, self._leaning, self._windows = (grows, now_s), None, 0
        self.says = why
        return Move(gives, grows, why)

    def _grows(self, loads: Mapping[RoleName, PoolLoad]) -> RoleName | None:
        short = [role for role in OTHER if loads[role].short]
        if len(short) == 2 and not loads[RoleName.PREFILL].lacking:
            short = [RoleName.DECODE]  # prompts also wait where their KV would find no decode node
        if not short:
            self.says = "nobody waits"
            return None
        if len(short) == 2:
            self.says = "both pools are short: more nodes are needed, not others"
            return None
        (grows,) = short
        gives = OTHER[grows]
        if not loads[gives].can_give:
            self.says = f"{grows} is short ({loads[grows].words}), but {gives} has no node to give"
            self.says += f" ({loads[gives].words})"
            return None
        return grows

    def _undoes(self, grows: RoleName) -> bool:
        return self._last is not None and self._last[0] is not grows

    def _needed(self, grows: RoleName, now_s: float) -> int:
        """Windows that must agree: more where the last change would be undone, and was not long ago."""
        if self._last is None or now_s - self._last[1] > CALM_S:
            return PATIENCE
        return min(2 * self._patience, MOST_PATIENCE) if self._undoes(grows) else PATIENCE
