"""What a step costs: time as a line over the tokens of a batch, fitted to measured steps and kept fresh.

Source of the form: the published fits `T = k * tokens + b` of a 7B model on an A100 (24.8 ms + 0.069 ms per
token). It has no term for context length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from engine.base import StepReport

MIN_PER_TOKEN_S = 1e-9  # so that a step always holds a finite number of tokens
DRIFT_WEIGHT = 0.05  # of one step in the average: about the last 20 steps count
DRIFT_BOUNDS = (0.2, 5.0)  # one step's measured/predicted ratio is cut to this: a pause is no drift

REST_TIME_S = 10.0  # without a step, until 1/e of the drift is left


@dataclass(frozen=True, slots=True)
class StepCost:
    """`(base_s + per_token_s * tokens) * drift`; `drift` follows how far measured steps are from the fit."""

    base_s: float
    per_token_s: float
    drift: float = 1.0

    def __post_init__(self) -> None:
        if self.base_s < 0 or self.per_token_s <= 0 or self.drift <= 0:
            raise ValueError(f"a step cannot cost {self.base_s} s + {self.per_token_s} s/token x {self.drift}")

    def predict(self, tokens: int) -> float:
        """Seconds of a batch of `tokens`; an empty batch takes none."""
        return (self.base_s + self.per_token_s * tokens) * self.drift if tokens > 0 else 0.0

    def tokens_in(self, seconds: float) -> int:
        """Most tokens of a batch that ends within `seconds` (Time2BS); 0 if not even the base fits."""
        tokens = (seconds / self.drift - self.base_s) / self.per_token_s
        return max(math.floor(tokens + 1e-6), 0)

    def prefill_alone_s(self, prompt_tokens: int, max_batch_tokens: int) -> float:
        """T0: seconds of a prefill alone on an idle replica, in batches of at most `max_batch_tokens`."""
        full, rest = divmod(prompt_tokens, max_batch_tokens)
        return full * self.predict(max_batch_tokens) + self.predict(rest)

    def updated(self, report: StepReport) -> StepCost:
        """The cost after one more measured step: an exponential average of measured over predicted."""
        if report.tokens <= 0 or report.seconds <= 0:
            return self
        low, high = DRIFT_BOUNDS
        predicted_s = self.predict(report.tokens)
        ratio = min(max(report.seconds / predicted_s, low), high) if predicted_s > 0 else 1.0
        return replace(self, drift=self.drift * (1 + DRIFT_WEIGHT * (ratio - 1)))

    def rested(self, seconds: float) -> StepCost:
        """The cost after `seconds` without a step: what drift there was says less and less of the next one."""
        kept = math.exp(-seconds / REST_TIME_S)
        return replace(self, drift=1 + (self.drift - 1) * kept)

    @classmethod
    def fit(cls, reports: Sequence[StepReport]) -> StepCost:
        """Least squares over steps, neither term below zero. Raises ValueError without a step that ran."""
        ran = [report for report in reports if report.tokens > 0]
        if not ran:
            raise ValueError("no measured step to fit a cost to")
        tokens = np.array([report.tokens for report in ran], dtype=float)
        seconds = np.array([report.seconds for report in ran], dtype=float)
        base_s, per_token_s = _line(tokens, seconds)
        return cls(base_s, max(per_token_s, MIN_PER_TOKEN_S))


def _line(tokens: np.ndarray, seconds: np.ndarray) -> tuple[float, float]:
    """Base and slope, both non-negative: where the free optimum is not, the best is on an edge."""
    spread = tokens - tokens.mean()
    variance = float(spread @ spread)
    slope = float(spread @ seconds) / variance if variance > 0 else 0.0
    base = float(seconds.mean()) - slope * float(tokens.mean())
    if slope < 0:
        return float(seconds.mean()), 0.0
    if base < 0:
        return 0.0, float(tokens @ seconds) / float(tokens @ tokens)
    return base, slope
