"""The SLO of a request: what its headers and body say, and what that means in seconds.

A class by name (`chatbot`, `coder`, `summarizer`, `tool`, `reasoning`, or another of the configuration), or
numbers, or a class with a number of its own. Numbers are in ms: in headers under llm-d's names, in a body in an
`slo` object or in `vllm_xargs`. What cannot be read is the lowest urgency (best effort), said in a response
header, never an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coordinator.config import SloClass
from engine.cost import StepCost
from engine.request import Slo

CUSTOM_CLASS = "custom"
DEFAULT_TPOT_MS = 100.0
MAX_MS = 3_600_000.0

HEADER_FIELDS = {
    b"x-llm-d-slo-ttft-ms": "ttft_ms",
    b"x-llm-d-slo-tpot-ms": "tpot_ms",
    b"x-slosserve-slo-ttft-ms": "ttft_ms",
    b"x-slosserve-slo-tpot-ms": "tpot_ms",
    b"x-slosserve-slo-thinking-tpot-ms": "thinking_tpot_ms",
    b"x-slosserve-slo-class": "class",
    b"x-slosserve-on-miss": "on_miss",
    b"x-slosserve-loop-ms": "loop_ms",
    b"x-slosserve-loop-calls": "loop_calls",
    b"x-slosserve-call": "call",
}
XARGS_FIELDS = {
    "slo_ttft_ms": "ttft_ms",
    "slo_tpot_ms": "tpot_ms",
    "slo_thinking_tpot_ms": "thinking_tpot_ms",
    "slo_class": "class",
    "slo_on_miss": "on_miss",
    "slo_loop_ms": "loop_ms",
    "slo_loop_calls": "loop_calls",
    "slo_call": "call",
}
BODY_FIELDS = frozenset(HEADER_FIELDS.values())
ON_MISS = ("defer", "refuse")
CALLS = ("loop", "last")
MOST_CALLS = 10_000


@dataclass(frozen=True, slots=True)
class Asked:
    """What a client asked for. `malformed` says what could not be read; then nothing else counts.

    All None: the request carries no SLO, and is served best effort. Of a tool loop: `loop_ms` from its first
    call to the end of its answer, `loop_calls` left with this one, and `call`, whether this is the last one
    (None: it is if its answer calls no tool).
    """

    class_name: str | None = None
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    thinking_tpot_ms: float | None = None
    refuse: bool = False
    malformed: str | None = None
    loop_ms: float | None = None
    loop_calls: int | None = None
    call: str | None = None

    @property
    def empty(self) -> bool:
        """No SLO at all."""
        asked = (self.class_name, self.ttft_ms, self.tpot_ms, self.thinking_tpot_ms, self.loop_ms)
        return all(value is None for value in asked)

    @property
    def last(self) -> bool:
        """Whether the client says that this call answers."""
        return self.call == "last"


def read_asked(fields: Mapping[str, Any], classes: Mapping[str, SloClass]) -> Asked:
    """Check the fields that headers and body gave. Never raises: what is wrong is in `malformed`."""
    unknown = sorted(set(fields) - BODY_FIELDS)
    if unknown:
        return Asked(malformed=f"unknown field {unknown[0][:40]!r}; there are {', '.join(sorted(BODY_FIELDS))}")
    class_name = fields.get("class")
    if class_name is not None and class_name not in list(classes):
        return Asked(
            malformed=f"unknown class {str(class_name)[:40]!r}; there are {', '.join(sorted(classes))}"
        )
    on_miss = fields.get("on_miss", "defer")
    if on_miss not in ON_MISS:
        return Asked(malformed=f"on_miss is {str(on_miss)[:40]!r}; it may be {' or '.join(ON_MISS)}")
    call = fields.get("call")
    if call is not None and call not in CALLS:
        return Asked(malformed=f"call is {str(call)[:40]!r}; it may be {' or '.join(CALLS)}")
    loop_calls = _count(fields.get("loop_calls"))
    if isinstance(loop_calls, str):
        return Asked(malformed=f"loop_calls is {loop_calls}; it must be a whole number of calls, 1 or more")
    numbers: dict[str, float | None] = {}
    for key in ("ttft_ms", "tpot_ms", "thinking_tpot_ms", "loop_ms"):
        value = _positive_ms(fields.get(key))
        if isinstance(value, str):
            return Asked(malformed=f"{key} is {value}; it must be a number of milliseconds, more than 0")
        numbers[key] = value
    return Asked(
        class_name=class_name,
        ttft_ms=numbers["ttft_ms"],
        tpot_ms=numbers["tpot_ms"],
        thinking_tpot_ms=numbers["thinking_tpot_ms"],
        refuse=on_miss == "refuse",
        loop_ms=numbers["loop_ms"],
        loop_calls=loop_calls,
        call=call,
    )


def _positive_ms(value: Any) -> float | str | None:
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return repr(value)[:40]
    in_range = not isinstance(value, bool) and 0 < number <= MAX_MS
    return number if in_range else repr(value)[:40]


def _count(value: Any) -> int | str | None:
    if value is None:
        return None
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        return repr(value)[:40]
    whole = not isinstance(value, bool) and (not isinstance(value, float) or value == number)
    return number if whole and 1 <= number <= MOST_CALLS else repr(value)[:40]


def to_slo(
    asked: Asked, classes: Mapping[str, SloClass], prompt_tokens: int, cost: StepCost, max_batch_tokens: int
) -> Slo | None:
    """The promise in seconds: TTFT = c * T0(p), T0 the time of a prefill of p tokens alone on an idle replica
    (SLOs-Serve, table 1). None for a request without an SLO. The last call of a loop has a pace of its own."""
    if asked.malformed is not None or asked.empty:
        return None
    slo_class = classes.get(asked.class_name) if asked.class_name is not None else None
    if slo_class is None:
        slo_class = SloClass(tpot_ms=DEFAULT_TPOT_MS)
    ttft_ms = asked.ttft_ms or slo_class.ttft_ms
    if ttft_ms is None:
        alone_ms = cost.prefill_alone_s(prompt_tokens, max_batch_tokens) * 1e3
        ttft_ms = max(slo_class.ttft_scale * alone_ms, slo_class.ttft_floor_ms)
    thinking_ms = asked.thinking_tpot_ms or slo_class.thinking_tpot_ms
    return Slo(
        class_name=asked.class_name or CUSTOM_CLASS,
        ttft_s=ttft_ms / 1e3,
        tpot_s=(asked.tpot_ms or (asked.last and slo_class.last_tpot_ms) or slo_class.tpot_ms) / 1e3,
        thinking_tpot_s=None if thinking_ms is None else thinking_ms / 1e3,
        refuse=asked.refuse,
    )
