"""What a step costs: a maximum of lines over the tokens of a batch, plus terms for attention, kept fresh.

Source of the form: SLOs-Serve's `T = max_l (k1_l * tokens + k2_l * draft_steps + b_l)`. The paper has no term
for context length; attention of decodes and of prefills, and a share per sequence, are added to it here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from engine.base import StepReport

MIN_PER_TOKEN_S = 1e-9  # so that a step always holds a finite number of tokens
ROUNDING_TOKENS = 1e-6  # a budget that is a whole number of tokens but for rounding holds them all
DRIFT_WEIGHT = 0.2  # of one step in the average: about the last 5 steps count
DRIFT_BOUNDS = (0.5, 2.0)  # one step's measured/predicted ratio is cut to this: a pause is no drift

REST_TIME_S = 10.0  # without a step, until 1/e of the drift is left

PIECE_TERMS = ("base_s", "per_token_s", "per_draft_step_s")
TERMS = ("per_context_token_s", "per_prefill_work_s", "per_seq_s", "per_prefill_kv_token_s")


@dataclass(frozen=True, slots=True)
class Piece:
    """One line of the maximum: `base_s + per_token_s * tokens + per_draft_step_s * draft_steps`."""

    base_s: float
    per_token_s: float
    per_draft_step_s: float = 0.0

    def __post_init__(self) -> None:
        for name in PIECE_TERMS:
            _check(name, getattr(self, name))


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds of a batch: the dearest of `pieces`, plus the other terms, times `drift`.

    `context_tokens`: KV tokens that decodes read, summed. `prefill_work`: sum of chunk * (kv + chunk / 2).
    `prefill_kv_tokens`: KV tokens that chunks of prefills read, summed: reading them takes time however small
    the chunk. `draft_steps`: steps of a draft model, one after another, before the verify. `drift` follows how
    far measured steps are from the fit. Raises ValueError for coefficients that no machine has.
    """

    pieces: tuple[Piece, ...]
    per_context_token_s: float = 0.0
    per_prefill_work_s: float = 0.0
    per_seq_s: float = 0.0
    per_prefill_kv_token_s: float = 0.0
    drift: float = 1.0

    def __post_init__(self) -> None:
        for name in TERMS:
            _check(name, getattr(self, name))
        if not 0 < self.drift < math.inf:
            raise ValueError(f"a step cannot cost drift = {self.drift} times as much: it is more than 0")
        if not any(piece.per_token_s > 0 for piece in self.pieces):
            raise ValueError("a step cannot cost the same for any tokens: no piece has per_token_s above 0")

    @classmethod
    def line(cls, base_s: float, per_token_s: float) -> Self:
        """One line in the tokens, which is the form of most published fits."""
        return cls((Piece(base_s, per_token_s),))

    @property
    def per_token_s(self) -> float:
        """Seconds that one more token adds to a large batch: by the steepest piece."""
        return max(piece.per_token_s for piece in self.pieces) * self.drift

    def predict(
        self,
        tokens: int,
        *,
        seqs: int = 0,
        context_tokens: int = 0,
        prefill_work: float = 0.0,
        draft_steps: int = 0,
        prefill_kv_tokens: int = 0,
    ) -> float:
        """Seconds of a batch of `tokens`; an empty batch takes none."""
        if tokens <= 0:
            return 0.0
        line_s = 0.0
        for piece in self.pieces:
            piece_s = piece.base_s + piece.per_token_s * tokens + piece.per_draft_step_s * draft_steps
            if piece_s > line_s:
                line_s = piece_s
        return (line_s + self._beside_s(seqs, context_tokens, prefill_work, prefill_kv_tokens)) * self.drift

    def tokens_in(
        self,
        seconds: float,
        *,
        seqs: int = 0,
        context_tokens: int = 0,
        prefill_work: float = 0.0,
        draft_steps: int = 0,
        prefill_kv_tokens: int = 0,
    ) -> int:
        """Most tokens of a batch that ends within `seconds` (Time2BS); 0 if not even the base fits."""
        left_s = seconds / self.drift - self._beside_s(seqs, context_tokens, prefill_work, prefill_kv_tokens)
        most = math.inf
        for piece in self.pieces:
            piece_left_s = left_s - piece.base_s - piece.per_draft_step_s * draft_steps
            if piece_left_s < 0:
                return 0
            if piece.per_token_s > 0:
                most = min(most, piece_left_s / piece.per_token_s)
        return math.floor(most + ROUNDING_TOKENS)

    def chunk_in(
        self,
        seconds: float,
        kv_tokens: int,
        *,
        tokens: int = 0,
        seqs: int = 0,
        context_tokens: int = 0,
        prefill_work: float = 0.0,
        draft_steps: int = 0,
        prefill_kv_tokens: int = 0,
    ) -> int:
        """Most new tokens of one prompt, `kv_tokens` of it computed already, in a batch that ends in `seconds`.

        The keyword arguments are what the batch holds without that prompt (which counts as one sequence more).
        """
        read_tokens = prefill_kv_tokens + kv_tokens
        left_s = seconds / self.drift - self._beside_s(seqs + 1, context_tokens, prefill_work, read_tokens)
        work_s = self.per_prefill_work_s
        most = math.inf
        for piece in self.pieces:
            token_s = piece.per_token_s + work_s * kv_tokens
            piece_left_s = (
                left_s - piece.base_s - piece.per_token_s * tokens - piece.per_draft_step_s * draft_steps
            )
            if piece_left_s < 0:
                return 0
            # The larger root of work_s / 2 * chunk^2 + token_s * chunk = piece_left_s, without cancellation.
            slope_s = token_s + math.sqrt(token_s * token_s + 2 * work_s * piece_left_s)
            if slope_s > 0:
                most = min(most, 2 * piece_left_s / slope_s)
        return math.floor(most + ROUNDING_TOKENS)

    def prefill_alone_s(self, prompt_tokens: int, max_batch_tokens: int, cached_tokens: int = 0) -> float:
        """T0: seconds of a prefill alone on an idle replica, in batches of at most `max_batch_tokens`.

        `cached_tokens` of the prompt have their KV already and are only attended to.
        """
        total_s, computed = 0.0, cached_tokens
        while computed < prompt_tokens:
            chunk = min(prompt_tokens - computed, max_batch_tokens)
            work = chunk * (computed + chunk / 2)
            total_s += self.predict(chunk, seqs=1, prefill_work=work, prefill_kv_tokens=computed)
            computed += chunk
        return total_s

    def drifted(self, ratio: float) -> StepCost:
        """The cost after one more step that took `ratio` times what was predicted: an exponential average."""
        low, high = DRIFT_BOUNDS
        return replace(self, drift=self.drift * (1 + DRIFT_WEIGHT * (min(max(ratio, low), high) - 1)))

    def of(self, report: StepReport) -> float:
        """Seconds predicted for the batch of `report`, with drafts as deep as they are on average."""
        draft_steps = -(-report.drafted_tokens // report.decode_seqs) if report.decode_seqs else 0
        return self.predict(
            report.tokens,
            seqs=report.seqs,
            context_tokens=report.decode_context_tokens,
            prefill_work=report.prefill_work,
            draft_steps=draft_steps,
            prefill_kv_tokens=report.prefill_kv_tokens,
        )

    def scaled(self, factor: float) -> StepCost:
        """The same cost on a machine that takes `factor` times as long for everything. Its drift stays."""
        pieces = tuple(Piece(*(getattr(piece, name) * factor for name in PIECE_TERMS)) for piece in self.pieces)
        return replace(self, pieces=pieces, **{name: getattr(self, name) * factor for name in TERMS})

    def rested(self, seconds: float) -> StepCost:
        """The cost after `seconds` without a step: what drift there was says less and less of the next one."""
        kept = math.exp(-seconds / REST_TIME_S)
        return replace(self, drift=1 + (self.drift - 1) * kept)

    @classmethod
    def fit(cls, reports: Sequence[StepReport]) -> Self:
        """A line by least squares over steps, no term below zero. Raises ValueError without a step that ran."""
        ran = [report for report in reports if report.tokens > 0]
        if not ran:
            raise ValueError("no measured step to fit a cost to")
        tokens = np.array([report.tokens for report in ran], dtype=float)
        seconds = np.array([report.seconds for report in ran], dtype=float)
        base_s, per_token_s = _line(tokens, seconds)
        return cls.line(base_s, max(per_token_s, MIN_PER_TOKEN_S))

    def _beside_s(self, seqs: int, context_tokens: int, prefill_work: float, prefill_kv_tokens: int) -> float:
        return (
            self.per_context_token_s * context_tokens
            + self.per_prefill_work_s * prefill_work
            + self.per_seq_s * seqs
            + self.per_prefill_kv_token_s * prefill_kv_tokens
        )


def _check(name: str, seconds: float) -> None:
    if not 0 <= seconds < math.inf:
        raise ValueError(f"a step cannot cost {name} = {seconds}: it is a number of seconds, not below 0")


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
