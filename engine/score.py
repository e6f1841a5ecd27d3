"""Scoring: was each stage of a request met? The one definition, for real runs, metrics and simulations.

First token by arrival + TTFT SLO. The decode clock starts at t0 = max(arrival + TTFT SLO, first token): a
prefill that ends early gives slack. Token n is due at t0 + (n - 1) * TPOT, piecewise where a request thinks
first. Tolerance 5 %, checked at every 10th token and the last (SLOs-Serve, arXiv 2504.08784; the strict score
checks every token without tolerance).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from engine.request import Slo, StageKind

TOLERANCE = 0.05
CHECK_EVERY = 10


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
    slo: Slo, token_times_s: Sequence[float], *, completed: bool, thinking_tokens: int | None = None
) -> Score:
    """Score one request. Times are seconds since its arrival at the endpoint, one per output token, in order.

    `completed`: it ended as it should; one that failed or was cut off by us has met nothing.
    `thinking_tokens`: how many tokens came before the end of thinking, where the SLO has a thinking stage.
    """
    kinds = [StageKind.PREFILL, StageKind.ANSWER]
    if slo.thinking_tpot_s is not None:
        kinds.insert(1, StageKind.THINKING)
    if not completed or not token_times_s:
        return missed(kinds)
    thinking = 0 if slo.thinking_tpot_s is None else (thinking_tokens or 0)
    dues_s = _due_times(slo, token_times_s[0], len(token_times_s), thinking)
    stages = {StageKind.PREFILL: token_times_s[0] <= slo.ttft_s * (1 + TOLERANCE)}
    last = len(token_times_s)
    spans = {StageKind.THINKING: (1, thinking), StageKind.ANSWER: (thinking + 1, last)}
    for kind in kinds[1:]:
        first, final = spans[kind]
        checked = [n for n in range(max(first, 2), final + 1) if n % CHECK_EVERY == 0 or n == final]
        stages[kind] = all(_in_time(slo, token_times_s, dues_s, n) for n in checked)
    strict = token_times_s[0] <= slo.ttft_s and all(
        time_s <= due_s for time_s, due_s in zip(token_times_s[1:], dues_s[1:], strict=True)
    )
    first_s, last_s = token_times_s[0], token_times_s[-1]
    mean_tpot_s = (last_s - first_s) / max(len(token_times_s) - 1, 1)
    return Score(stages, strict, goodput=first_s <= slo.ttft_s and mean_tpot_s <= slo.tpot_s)


def missed(kinds: Iterable[StageKind]) -> Score:
    """Nothing was met: refused, deferred, failed, or given up by a client whose deadline had passed."""
    return Score(dict.fromkeys(kinds, False), strict=False, goodput=False)


def _due_times(slo: Slo, first_token_s: float, tokens: int, thinking: int) -> list[float]:
    origin_s = max(slo.ttft_s, first_token_s)
    dues_s = [origin_s]
    for n in range(2, tokens + 1):
        dues_s.append(dues_s[-1] + (slo.first_pace_s if n <= thinking else slo.tpot_s))
    return dues_s


def _in_time(slo: Slo, token_times_s: Sequence[float], dues_s: Sequence[float], n: int) -> bool:
    """Token n within 5 % of its time after the decode clock's origin."""
    return token_times_s[n - 1] <= dues_s[0] + (dues_s[n - 1] - dues_s[0]) * (1 + TOLERANCE)
