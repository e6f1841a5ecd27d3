"""Scoring: was each stage of a request met? The one definition, for real runs, metrics and simulations.

First token by arrival + TTFT SLO. The decode clock starts at t0 = max(arrival + TTFT SLO, first token): a
prefill that ends early gives slack. Token n is due at t0 + (n - 1) * TPOT, piecewise where a request thinks
first. Tolerance 5 %, checked at every 10th token and the last (SLOs-Serve, arXiv 2504.08784; the strict score
checks every token without tolerance).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.request import Slo, StageKind

TOLERANCE = 0.05
CHECK_EVERY = 10
ARRAYS_FROM = 128  # tokens; below, the fixed cost of array operations is more than they save

Floats = npt.NDArray[np.float64]
Column = list[float] | Floats  # of shape [tokens]


@dataclass(frozen=True, slots=True)
class Score:
    """Which stages were met. `met` is all of them; `strict` checks every token, without tolerance.

    `goodput` is vLLM's own definition: TTFT in time, and the mean time per output token.
    """

    stages: dict[StageKind, bool]
    strict: bool
    goodput: bool

    @property
    def met(self) -> bool:
        """Every stage was met."""
        return all(self.stages.values())


def score(
    slo: Slo, token_times_s: Sequence[float] | Floats, *, completed: bool, thinking_tokens: int | None = None
) -> Score:
    """Score one request. Times are seconds since its arrival at the endpoint, one per output token, in order.

    `completed`: it ended as it should; one that failed or was cut off by us has met nothing.
    `thinking_tokens`: how many tokens came before the end of thinking, where the SLO has a thinking stage; more
    than came at all counts as all.
    """
    kinds = [StageKind.PREFILL, StageKind.ANSWER]
    if slo.thinking_tpot_s is not None:
        kinds.insert(1, StageKind.THINKING)
    count = len(token_times_s)
    if not completed or count == 0:
        return missed(kinds)
    thinking = 0 if slo.thinking_tpot_s is None else min(max(thinking_tokens or 0, 0), count)
    times_s = _column(token_times_s)
    first_s, last_s = float(times_s[0]), float(times_s[-1])
    dues_s = _due_times(slo, first_s, count, thinking)
    stages = {StageKind.PREFILL: first_s <= slo.ttft_s * (1 + TOLERANCE)}
    spans = {StageKind.THINKING: (1, thinking), StageKind.ANSWER: (thinking + 1, count)}
    for kind in kinds[1:]:
        stages[kind] = _in_pace(times_s, dues_s, *spans[kind])
    strict = first_s <= slo.ttft_s and _every(operator.le, times_s[1:], dues_s[1:])
    mean_tpot_s = (last_s - first_s) / max(count - 1, 1)
    return Score(stages, strict, goodput=first_s <= slo.ttft_s and mean_tpot_s <= slo.tpot_s)


@dataclass(frozen=True, slots=True)
class StageTime:
    """A stage as it went, in seconds since the request arrived.

    `due_s` and `actual_s` are of its last token; `late_s` is the most by which any of its tokens was late,
    without tolerance (below 0: all were early).
    """

    kind: StageKind
    tokens: int
    due_s: float
    actual_s: float
    late_s: float


def stage_times(
    slo: Slo, token_times_s: Sequence[float] | Floats, thinking_tokens: int | None = None
) -> list[StageTime]:
    """When the stages that have begun were due, and when they were done, by the rules of `score`."""
    count = len(token_times_s)
    if count == 0:
        return []
    thinking = 0 if slo.thinking_tpot_s is None else min(max(thinking_tokens or 0, 0), count)
    times_s = np.asarray(token_times_s, dtype=np.float64)
    first_s = float(times_s[0])
    dues_s = np.asarray(_due_times(slo, first_s, count, thinking))
    found = [StageTime(StageKind.PREFILL, 1, slo.ttft_s, first_s, first_s - slo.ttft_s)]
    for kind, first, final in ((StageKind.THINKING, 1, thinking), (StageKind.ANSWER, max(thinking, 1), count)):
        if final > first:
            late_s = float((times_s[first:final] - dues_s[first:final]).max())
            last = (float(dues_s[final - 1]), float(times_s[final - 1]))
            found.append(StageTime(kind, final - first, *last, late_s))
    return found


def missed(kinds: Iterable[StageKind]) -> Score:
    """Nothing was met: refused, deferred, failed, or given up by a client whose deadline had passed."""
    return Score(dict.fromkeys(kinds, False), strict=False, goodput=False)


def _column(token_times_s: Sequence[float] | Floats) -> Column:
    """As a list if short, else as an array: what follows takes either."""
    if len(token_times_s) >= ARRAYS_FROM:
        return np.asarray(token_times_s, dtype=np.float64)
    if isinstance(token_times_s, list):
        return token_times_s
    return token_times_s.tolist() if isinstance(token_times_s, np.ndarray) else list(token_times_s)


def _due_times(slo: Slo, first_token_s: float, count: int, thinking: int) -> Column:
    """When each token is due, added up token by token; the first of them is the decode clock's origin."""
    origin_s, thought = max(slo.ttft_s, first_token_s), max(thinking - 1, 0)
    if count < ARRAYS_FROM:
        paces = [slo.first_pace_s] * thought + [slo.tpot_s] * (count - 1 - thought)
        return list(accumulate(paces, initial=origin_s))
    dues_s = np.full(count, slo.tpot_s)
    dues_s[0] = origin_s
    dues_s[1 : thought + 1] = slo.first_pace_s
    return np.cumsum(dues_s, out=dues_s)


def _in_pace(times_s: Column, dues_s: Column, first: int, final: int) -> bool:
    """Of tokens `first` to `final`, from 1, every 10th of the request and the final one are in time."""
    first = max(first, 2)
    if final < first:
        return True
    in_time = partial(_in_time, float(dues_s[0]))
    tenths = slice(-(-first // CHECK_EVERY) * CHECK_EVERY - 1, final, CHECK_EVERY)
    at_end = bool(in_time(times_s[final - 1], dues_s[final - 1]))
    return at_end and _every(in_time, times_s[tenths], dues_s[tenths])


def _in_time(origin_s: float, time_s: Any, due_s: Any) -> Any:
    """Within 5 % of its time after the decode clock's origin: of one token, or of arrays of them."""
    return time_s <= origin_s + (due_s - origin_s) * (1 + TOLERANCE)


def _every(check: Callable[[Any, Any], Any], times_s: Column, dues_s: Column) -> bool:
    """`check(time, due)` of every token: one by one in lists, all at once in arrays."""
    if isinstance(times_s, list):
        return all(map(check, times_s, dues_s))
    return bool(check(times_s, dues_s).all())
