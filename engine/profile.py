"""A step-time model and where it comes from: the rows, the form that held out best, how wrong it still is."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Self

import msgspec
import numpy as np

from engine.base import StepReport
from engine.cost import StepCost
from engine.cost_fit import FAMILIES, Family, fit_cost, predicted_s
from engine.errors import ConfigError
from engine.step_table import Source, StepTable

VERSION = 1
HELD_OUT_SHARE = 0.2
SPLIT_SEED = 0
MIN_ROWS = 20
WORST_ROWS = 5
MUST_GAIN = 0.02  # part by which a form with more coefficients must err less to be taken


@dataclass(frozen=True, slots=True)
class Score:
    """How well a model predicts rows that it has not seen. Errors are |predicted - measured| / measured."""

    rows: int
    r2: float
    mean_error: float
    median_error: float
    p99_error: float


@dataclass(frozen=True, slots=True)
class WorstRow:
    """A row that was predicted badly."""

    shape: str
    measured_ms: float
    predicted_ms: float


@dataclass(frozen=True, slots=True)
class StepProfile:
    """`cost` is fitted to all rows; `held_out` and `worst` are of a fit that did not see those rows.

    `compared`: the same score for every form that was tried. A profile of published coefficients is scored on
    batches computed from them (engine.coefficients).
    """

    cost: StepCost
    family: str
    held_out: Score
    compared: dict[str, Score]
    worst: tuple[WorstRow, ...]
    sources: tuple[Source, ...]
    about: dict[str, str] = field(default_factory=dict)
    version: int = VERSION

    def __post_init__(self) -> None:
        if self.version != VERSION:
            raise ValueError(f"version is {self.version}, and this release reads {VERSION}")

    @classmethod
    def fit(cls, table: StepTable) -> Self:
        """Fit every form to four fifths of the rows, take the best on the rest, and fit it to all.

        Raises ConfigError for fewer than MIN_ROWS rows.
        """
        if len(table.rows) < MIN_ROWS:
            raise ConfigError(f"{len(table.rows)} steps are too few to fit and check: give {MIN_ROWS} or more")
        seen, unseen = split(table)
        fits = {family.name: fit_cost(seen, family) for family in FAMILIES}
        scores = {name: score(fitted, unseen) for name, fitted in fits.items()}
        chosen = _choose(scores)
        return cls(
            cost=fit_cost(table, chosen),
            family=chosen.name,
            held_out=scores[chosen.name],
            compared=scores,
            worst=worst(fits[chosen.name], unseen),
            sources=table.sources,
            about=dict(table.about),
        )

    def cost_here(self, reports: Sequence[StepReport]) -> StepCost:
        """The cost on the machine that took `reports`: its shape as fitted, its speed from their median."""
        ratios = [report.seconds / self.cost.of(report) for report in reports if report.tokens > 0]
        return self.cost.scaled(statistics.median(ratios)) if ratios else self.cost

    def with_host(self, host_s: float) -> Self:
        """With what the host adds to every step, where the rows leave it out. `held_out` stays that of rows."""
        if host_s == 0:
            return self
        pieces = tuple(replace(piece, base_s=piece.base_s + host_s) for piece in self.cost.pieces)
        about = self.about | {"host_ms": f"{host_s * 1e3:g}"}
        return replace(self, cost=replace(self.cost, pieces=pieces), about=about)

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.json.format(msgspec.json.encode(asdict(self)), indent=2) + b"\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read it. Raises ConfigError that names the file and the field that is wrong."""
        try:
            text = path.read_bytes()
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from error
        return cls.parse(text, str(path))

    @classmethod
    def parse(cls, text: bytes, origin: str = "the step profile") -> Self:
        """What was written. Raises ConfigError that names the origin and the field that is wrong."""
        try:
            return msgspec.json.decode(text, type=cls)
        except msgspec.ValidationError as error:
            raise ConfigError(f"{origin}: is no step-time profile: {error}") from error
        except msgspec.DecodeError as error:
            raise ConfigError(f"{origin}: is not JSON: {error}") from error


def split(table: StepTable) -> tuple[StepTable, StepTable]:
    """Rows to fit, and rows held out: the same ones for the same number of rows."""
    order = np.random.default_rng(SPLIT_SEED).permutation(len(table.rows))
    held_out = max(round(HELD_OUT_SHARE * len(order)), 1)
    return table.take(np.sort(order[held_out:])), table.take(np.sort(order[:held_out]))


def score(cost: StepCost, table: StepTable) -> Score:
    """How well `cost` predicts these rows."""
    measured, predicted = table.seconds, predicted_s(cost, table)
    error = np.abs(predicted - measured) / measured
    spread = float(((measured - measured.mean()) ** 2).sum())
    missed = float(((measured - predicted) ** 2).sum())
    return Score(
        rows=len(measured),
        r2=1 - missed / spread if spread > 0 else 0.0,
        mean_error=float(error.mean()),
        median_error=float(np.median(error)),
        p99_error=float(np.quantile(error, 0.99)),
    )


def worst(cost: StepCost, table: StepTable) -> tuple[WorstRow, ...]:
    """The rows with the largest relative error, worst first."""
    measured, predicted = table.seconds, predicted_s(cost, table)
    order = np.argsort(-np.abs(predicted - measured) / measured)[:WORST_ROWS]
    return tuple(
        WorstRow(table.rows[row].shape(), float(measured[row] * 1e3), float(predicted[row] * 1e3))
        for row in order
    )


def _choose(scores: Mapping[str, Score]) -> Family:
    """The form that errs least; one with more coefficients only if that gains something."""
    chosen = FAMILIES[0]
    for family in FAMILIES[1:]:
        if scores[family.name].mean_error < (1 - MUST_GAIN) * scores[chosen.name].mean_error:
            chosen = family
    return chosen
