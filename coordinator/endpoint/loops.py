"""Tool loops: one deadline for all the calls of a session until it answers, split over them by what is left.

A loop begins with the first call that carries `loop_ms` and ends with the call that the client marks as the
last, or whose answer calls no tool. Each endpoint counts the loops of its own clients.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import dataclass, field, replace

from engine.request import Slo

MOST_LOOPS = 4096
USUAL_CALLS = 4.0  # of a loop, until some have ended
USUAL_OUTPUT_TOKENS = 64.0  # of a call, until some have ended
NEWEST = 0.2  # weight of the last one in what is usual
LEAST_SCALE = 0.25  # of the paces of a class: what is tighter would not be promised, and be served worse

# A call of a tool in an answer: OpenAI's chat and responses, and Anthropic's messages.
_TOOL_CALL = re.compile(rb'"tool_calls":\s*\[\s*\{|"type":\s*"(?:tool_use|function_call)"')
_TAIL_BYTES = 64


@dataclass(frozen=True, slots=True)
class Share:
    """What one call has of its loop: it is the `call`-th, `left_s` are left until the loop is due, of which it
    may take `share_s`, with `calls_left` of them expected, this one included."""

    call: int
    calls_left: int
    left_s: float
    share_s: float


@dataclass(frozen=True, slots=True)
class LoopEnd:
    """A loop that is over: `seconds` from its first call to the end of its answer, of `loop_s`."""

    class_name: str
    calls: int
    seconds: float
    loop_s: float

    @property
    def met(self) -> bool:
        """In time."""
        return self.seconds <= self.loop_s


@dataclass(slots=True)
class _Usual:
    """What the loops of a class are like."""

    calls: float = USUAL_CALLS
    tool_s: float = 0.0
    output_tokens: float = USUAL_OUTPUT_TOKENS


@dataclass(slots=True)
class _Loop:
    class_name: str
    began_s: float
    loop_s: float
    calls: int = 0
    open: int = 0  # calls that are under way
    ended_s: float | None = None  # its last call

    def is_left(self, now_s: float) -> bool:
        """A tool takes no longer than its whole loop may."""
        return not self.open and self.ended_s is not None and now_s - self.ended_s > self.loop_s


@dataclass(slots=True)
class ToolCallSeen:
    """Reads an answer as it goes out: whether it calls a tool."""

    seen: bool = False
    _tail: bytes = b""

    def read(self, body: bytes) -> None:
        """The next bytes of the answer."""
        if not self.seen:
            text = self._tail + body
            self.seen = _TOOL_CALL.search(text) is not None
            self._tail = text[-_TAIL_BYTES:]


@dataclass(slots=True)
class Loops:
    """The loops that are open, by session. Times are on the clock of the endpoint. Bounded."""

    _open: OrderedDict[str, _Loop] = field(default_factory=OrderedDict)
    _usual: dict[str, _Usual] = field(default_factory=dict)

    def begin_call(
        self,
        session: str,
        class_name: str,
        loop_s: float | None,
        calls: int | None,
        now_s: float,
        *,
        last: bool,
    ) -> Share | None:
        """A call has come at `now_s`; its part of the loop. None where the session has no loop with a deadline.

        `calls`: how many are left with this one, where the client knows.
        """
        loop = self._open.get(session)
        if loop is not None and loop.is_left(now_s):
            self.close(session)
            loop = None
        if loop is None:
            if loop_s is None:
                return None
            loop = self._open[session] = _Loop(class_name, now_s, loop_s)
            while len(self._open) > MOST_LOOPS:
                self._open.popitem(last=False)
        self._open.move_to_end(session)
        usual = self._usual_of(loop.class_name)
        if loop.ended_s is not None and not loop.open:
            usual.tool_s += NEWEST * (now_s - loop.ended_s - usual.tool_s)
        loop.ended_s = None
        loop.calls += 1
        loop.open += 1
        left_s = loop.began_s + loop.loop_s - now_s
        expected = max(round(usual.calls) - loop.calls + 1, 1) if calls is None else calls
        expected = 1 if last else expected
        share_s = (left_s - (expected - 1) * usual.tool_s) / expected
        return Share(loop.calls, expected, left_s, max(share_s, 0.0))

    def end_call(
        self,
        session: str,
        now_s: float,
        output_tokens: int,
        *,
        last: bool,
        told: bool = False,
        completed: bool = True,
    ) -> LoopEnd | None:
        """A call is over; what became of its loop, if that was the last. One that did not complete is not.

        Nor is one that answers while others are under way, unless the client `told` so: beside the call that
        the loop waits for it may ask for a title, or for several things at once.
        """
        loop = self._open.get(session)
        if loop is None:
            return None
        loop.open = max(loop.open - 1, 0)
        loop.ended_s = now_s
        if not completed:
            loop.calls -= 1
            return None
        usual = self._usual_of(loop.class_name)
        usual.output_tokens += NEWEST * (output_tokens - usual.output_tokens)
        if not last or (loop.open and not told):
            return None
        del self._open[session]
        usual.calls += NEWEST * (loop.calls - usual.calls)
        return LoopEnd(loop.class_name, loop.calls, now_s - loop.began_s, loop.loop_s)

    def class_of(self, session: str | None, now_s: float) -> str | None:
        """The class of the loop that a session is in."""
        loop = None if session is None else self._open.get(session)
        return None if loop is None or loop.is_left(now_s) else loop.class_name

    def close(self, session: str) -> None:
        """Nobody will call again."""
        self._open.pop(session, None)

    def within(self, slo: Slo, share: Share, max_tokens: int) -> Slo:
        """The paces of a class, tightened in equal proportion where a call at them would take more than its
        share: first token, thinking and answer. A loop that is too late already is held to them as they are."""
        tokens = min(self._usual_of(slo.class_name).output_tokens, float(max_tokens))
        scale = max(share.share_s / (slo.ttft_s + tokens * slo.first_pace_s), LEAST_SCALE)
        if scale >= 1 or share.left_s <= 0:
            return slo
        thinking_s = slo.thinking_tpot_s
        return replace(
            slo,
            ttft_s=slo.ttft_s * scale,
            tpot_s=slo.tpot_s * scale,
            thinking_tpot_s=None if thinking_s is None else thinking_s * scale,
        )

    def _usual_of(self, class_name: str) -> _Usual:
        return self._usual.setdefault(class_name, _Usual())
