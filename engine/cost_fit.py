"""Fits step costs to tables of measured steps: robust, on relative error, no coefficient below zero.

Every family is a maximum of lines in tokens and draft steps (as SLOs-Serve has it), plus terms that are linear
in what attention reads and in sequences. Given which line is the dearest for which row, all coefficients are a
linear problem; solving that and asking again which line is the dearest is how the maximum is fitted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.cost import MIN_PER_TOKEN_S, Piece, StepCost
from engine.step_table import Floats, StepTable

HUBER = 0.05  # relative error up to which a row counts in full; beyond it, less and less
REWEIGHTS = 4
ROUNDS = 12  # of asking which line is the dearest; it settles in about five
STARTS = 15
POLISHED = 3  # of the starts, the best go on until they settle

# Coefficient of StepCost -> column that it multiplies.
COLUMN_OF = {
    "per_context_token_s": "decode_context_tokens",
    "per_prefill_work_s": "prefill_work",
    "per_seq_s": "seqs",
    "per_prefill_kv_token_s": "prefill_kv_tokens",
}


@dataclass(frozen=True, slots=True)
class Family:
    """A form of the cost: how many lines, and which terms beside them."""

    name: str
    pieces: int
    terms: tuple[str, ...] = ()


# From few coefficients to many.
FAMILIES = (
    Family("line", 1),
    Family("max", 2),
    Family("additive", 2, ("per_context_token_s", "per_prefill_work_s", "per_seq_s")),
    Family("additive-kv", 2, tuple(COLUMN_OF)),
)


def fit_cost(table: StepTable, family: Family) -> StepCost:
    """The cost of this family that is nearest to the rows, by Huber's loss of the relative error."""
    problem = _Problem.of(table, family)
    tokens = table.column("tokens")
    if family.pieces == 1:
        return problem.cost(problem.solve(np.zeros(len(tokens), dtype=np.intp), REWEIGHTS))
    quantiles = np.quantile(tokens, np.linspace(0.02, 0.95, STARTS))
    starts = [(tokens > edge).astype(np.intp) for edge in np.unique(quantiles)]
    first = sorted((problem.settle(start, rounds=2) for start in starts), key=lambda fit: fit[0])
    settled = [problem.settle(problem.dearest(fit), rounds=ROUNDS) for _, fit in first[:POLISHED]]
    return problem.cost(min(settled, key=lambda fit: fit[0])[1])


def predicted_s(cost: StepCost, table: StepTable) -> Floats:
    """`cost.predict` of every row. Shape [rows]."""
    tokens, drafts = table.column("tokens"), table.column("spec_tokens_per_decode")
    lines = [p.base_s + p.per_token_s * tokens + p.per_draft_step_s * drafts for p in cost.pieces]
    beside = [getattr(cost, term) * table.column(column) for term, column in COLUMN_OF.items()]
    total: Floats = (np.max(lines, axis=0) + np.sum(beside, axis=0)) * cost.drift
    return total


@dataclass(frozen=True)
class _Problem:
    """`lines` [rows, 3] and `beside` [rows, terms], both over the measured seconds of their row."""

    family: Family
    lines: Floats
    beside: Floats
    largest: Floats  # of each column, by which it was divided

    @classmethod
    def of(cls, table: StepTable, family: Family) -> _Problem:
        tokens = table.column("tokens")
        lines = [np.ones_like(tokens), tokens, table.column("spec_tokens_per_decode")]
        columns = np.column_stack([*lines, *(table.column(COLUMN_OF[term]) for term in family.terms)])
        scaled = columns / table.seconds[:, None]
        largest = np.maximum(scaled.max(axis=0), 1e-12)
        scaled /= largest
        return cls(family, scaled[:, :3], scaled[:, 3:], largest)

    def settle(self, dearest: npt.NDArray[np.intp], rounds: int) -> tuple[float, Floats]:
        """Loss and coefficients after `rounds` of solving and asking which line is the dearest."""
        best, best_loss = np.zeros(0), np.inf
        for _ in range(rounds):
            fit = self.solve(dearest, REWEIGHTS)
            loss = self.loss(fit)
            if loss < best_loss:
                best, best_loss = fit, loss
            following = self.dearest(fit)
            if np.array_equal(following, dearest):
                break
            dearest = following
        return best_loss, best

    def solve(self, dearest: npt.NDArray[np.intp], reweights: int) -> Floats:
        """Coefficients [3 * pieces + terms] when row r is on line `dearest[r]`."""
        # scipy is slow to import, and an engine's process fits no table.
        from scipy.optimize import nnls

        parts = [self.lines * (dearest == piece)[:, None] for piece in range(self.family.pieces)]
        design = np.column_stack([*parts, self.beside])
        weight = np.ones(len(design))
        fit = np.zeros(design.shape[1])
        for _ in range(reweights):
            # Only the triangle matters for least squares, and it is small.
            root = np.sqrt(weight)[:, None]
            triangle = np.linalg.qr(root * np.column_stack([design, np.ones(len(design))])).R
            fit, _ = nnls(triangle[:, :-1], triangle[:, -1])
            error = np.abs(design @ fit - 1)
            weight = np.minimum(1.0, HUBER / np.maximum(error, 1e-12))
        return fit

    def dearest(self, fit: Floats) -> npt.NDArray[np.intp]:
        """Which line is the dearest, by row."""
        lines: npt.NDArray[np.intp] = np.argmax(self._line_costs(fit), axis=1)
        return lines

    def loss(self, fit: Floats) -> float:
        """Mean Huber loss of the relative error."""
        beside = self.beside @ fit[3 * self.family.pieces :]
        error = np.abs(self._line_costs(fit).max(axis=1) + beside - 1)
        return float(np.where(error < HUBER, error**2 / 2, HUBER * (error - HUBER / 2)).mean())

    def cost(self, fit: Floats) -> StepCost:
        """The coefficients in seconds, without the lines that no row is on."""
        used = np.unique(self.dearest(fit))
        scales = np.concatenate([np.tile(self.largest[:3], self.family.pieces), self.largest[3:]])
        seconds = [float(value) for value in fit / scales]
        pieces = [Piece(*seconds[3 * piece : 3 * piece + 3]) for piece in used]
        if all(piece.per_token_s == 0 for piece in pieces):
            pieces = [Piece(p.base_s, MIN_PER_TOKEN_S, p.per_draft_step_s) for p in pieces]
        beside: Mapping[str, float] = dict(
            zip(self.family.terms, seconds[3 * self.family.pieces :], strict=True)
        )
        return StepCost(tuple(sorted(pieces, key=lambda piece: piece.per_token_s)), **beside)

    def _line_costs(self, fit: Floats) -> Floats:
        """[rows, pieces]"""
        lines = fit[: 3 * self.family.pieces].reshape(self.family.pieces, 3)
        costs: Floats = self.lines @ lines.T
        return costs
