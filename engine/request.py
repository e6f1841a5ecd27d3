"""The words that every part of the cluster uses of a request: stages, SLO, role, kind of work."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class StageKind(StrEnum):
    """A request is a chain of stages: a prefill with a deadline, then decode stages with a pace each."""

    PREFILL = "prefill"
    THINKING = "thinking"
    ANSWER = "answer"


class RoleName(StrEnum):
    """What a node does. A rule of the coordinator and a parameter of the node, never of the engine."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"


class WorkKind(StrEnum):
    """What a node is asked to do for a request."""

    PREFILL = "prefill"  # compute the prompt, say the first token, offer the KV
    DECODE = "decode"  # pull the KV, go on after the first token
    WHOLE = "whole"  # both, on one node


@dataclass(frozen=True, slots=True)
class Slo:
    """What a request was promised or asks for, in seconds.

    `ttft_s` from arrival at the endpoint to the first token; `tpot_s` per token of the answer;
    `thinking_tpot_s` per token until the end of thinking (None: no thinking stage). `refuse`: the caller wants
    429 rather than best effort when the promise cannot be made.
    """

    class_name: str
    ttft_s: float
    tpot_s: float
    thinking_tpot_s: float | None = None
    refuse: bool = False

    def __post_init__(self) -> None:
        for name in ("ttft_s", "tpot_s", "thinking_tpot_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 86_400:
                raise ValueError(f"{name} must be more than 0 and less than a day, got {value!r}")

    @property
    def first_pace_s(self) -> float:
        """Pace of the first decode stage."""
        return self.tpot_s if self.thinking_tpot_s is None else self.thinking_tpot_s


@dataclass(frozen=True, slots=True)
class Pace:
    """A promise as it travels to a node: the time LEFT to the first token, then seconds per token.

    Clock readings never leave a host, so a node turns `first_token_left_s` into its own clock, counted from
    when the message came. `answer_tpot_s`: seconds per token once thinking has ended, where `tpot_s` is the
    pace of thinking. `begun`: the answer began elsewhere, so that its first token here is one in the pace;
    late, it delays none after it.
    """

    first_token_left_s: float
    tpot_s: float
    best_effort: bool = False
    answer_tpot_s: float | None = None
    begun: bool = False


BEST_EFFORT = Pace(first_token_left_s=3600.0, tpot_s=3600.0, best_effort=True)


def work_id(request_id: str, attempt: int) -> str:
    """The id of one attempt at a request inside an engine."""
    return f"{request_id}#{attempt}"


def split_work_id(value: str) -> tuple[str, int]:
    """The inverse of `work_id`."""
    request_id, _, attempt = value.rpartition("#")
    return request_id, int(attempt)
