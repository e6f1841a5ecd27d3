"""How long outputs will be: quantiles learned online by class and prompt size, given the tokens made so far.

Survival is estimated by hazards (Kaplan and Meier 1958), so that a request that was cut short after x tokens
counts as "longer than x" and no more. A bucket with few requests leans on its class, a class on all requests,
all requests on "runs to max_tokens". Lengths are kept as histograms, exact up to 32 tokens, then with 8 bins an
octave; old requests fade, so memory is bounded and a drift is followed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from coordinator.planner.survival_kernel import BIN_OF, LONGEST_TOKENS, WIDTHS, mean_remaining_of_all
from coordinator.planner.survival_kernel import EDGES as EDGES

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

WINDOW = 2048  # requests of a bucket until 1/e of an old one's weight is left
PRIOR = 16.0  # requests that the wider group counts for at each length
ROOT_PRIOR = 1.0  # rule of succession: one request more, that outlives all seen
MOST_BEFORE_REFRESH = 32  # new lengths that may wait before distributions are made anew
RESCALE_AT = 1e9
ALWAYS: Floats = np.ones(len(EDGES))


@dataclass(frozen=True, slots=True, eq=False)
class LengthDistribution:
    """Chance that an output is longer than each of EDGES, straight lines between; it ends at `max_tokens`."""

    survival: Floats
    max_tokens: int

    def __post_init__(self) -> None:
        if not 1 <= self.max_tokens <= LONGEST_TOKENS:
            raise ValueError(f"max_tokens is {self.max_tokens}; give 1 to {LONGEST_TOKENS}")

    @property
    def certain(self) -> bool:
        """Whether it surely runs to `max_tokens`."""
        return self.survival is ALWAYS

    def longer_than(self, tokens: float, made: int = 0) -> float:
        """P(o > tokens | o > made); 1 up to `made`, 0 from `max_tokens` on."""
        if tokens >= self.max_tokens:
            return 0.0
        if tokens <= made:
            return 1.0
        return float(np.interp(tokens, EDGES, self.survival) / np.interp(made, EDGES, self.survival))

    def mean_remaining(self, made: int = 0) -> float:
        """E[o - made | o > made] in tokens; 0 from `max_tokens` on."""
        return float(stack([self]).mean_remaining(np.array([made]))[0])

    def remaining_quantile(self, quantile: float, made: int = 0) -> int:
        """Least r with P(o - made <= r | o > made) >= quantile, in tokens, at most `max_tokens - made`."""
        if not 0 <= quantile <= 1:
            raise ValueError(f"quantile is {quantile}; give 0 to 1")
        left = self.max_tokens - made
        if left <= 1:
            return max(left, 0)
        target = (1 - quantile) * np.interp(made, EDGES, self.survival)
        # Survival falls along EDGES; np.interp needs it rising.
        tokens = float(np.interp(target, self.survival[::-1], EDGES[::-1]))
        if target < self.survival[-1]:
            tokens = float(self.max_tokens)
        return int(min(max(np.ceil(tokens - made - 1e-9), 1), left))


class Lengths(Protocol):
    """Whoever says how long an output may be."""

    def lengths(self, class_name: str, prompt_tokens: int, max_tokens: int) -> LengthDistribution:
        """What is known of the output of a request like this one."""
        ...

    def survival(self, class_name: str, prompt_tokens: int) -> Floats:
        """The curve of that distribution, which `max_tokens` only cuts."""
        ...


class KnownLengths:
    """The oracle, for comparison only: `max_tokens` is the true length, and every output runs to it."""

    def lengths(self, class_name: str, prompt_tokens: int, max_tokens: int) -> LengthDistribution:
        """Surely `max_tokens`, whatever the class and prompt."""
        return LengthDistribution(ALWAYS, max_tokens)

    def survival(self, class_name: str, prompt_tokens: int) -> Floats:
        """Every output runs to `max_tokens`."""
        return ALWAYS


@dataclass(slots=True, eq=False)
class _Histogram:
    """Weights of lengths by bin (EDGES[k], EDGES[k+1]]. `weight`, that of the next, grows: old ones fade."""

    ended: Floats = field(default_factory=lambda: np.zeros(len(EDGES) - 1))
    cut: Floats = field(default_factory=lambda: np.zeros(len(EDGES) - 1))
    cut_inside: Floats = field(default_factory=lambda: np.zeros(len(EDGES) - 1))
    weight: float = 1.0

    def add(self, tokens: int) -> None:
        self.ended[int(np.searchsorted(EDGES, tokens)) - 1] += self.weight
        self._fade()

    def add_longer_than(self, tokens: int) -> None:
        bin_ = int(np.searchsorted(EDGES, tokens, side="right")) - 1
        self.cut[bin_] += self.weight
        self.cut_inside[bin_] += self.weight * (tokens - EDGES[bin_]) / (EDGES[bin_ + 1] - EDGES[bin_])
        self._fade()

    def hazards(self, prior: Floats, strength: float) -> Floats:
        """[bins] chance to end in each bin once there. One cut inside a bin was at risk for part of it."""
        later = np.cumsum((self.ended + self.cut)[::-1])[::-1] - self.cut + self.cut_inside
        at_risk, ended = later / self.weight, self.ended / self.weight
        hazards: Floats = (ended + strength * prior) / (at_risk + strength)
        return hazards

    def _fade(self) -> None:
        self.weight *= 1 + 1 / WINDOW
        if self.weight > RESCALE_AT:
            for weights in (self.ended, self.cut, self.cut_inside):
                weights /= self.weight
            self.weight = 1.0


class LearnedLengths:
    """Output lengths seen so far: a histogram of all, one a class, one a class and power of two of the prompt.

    Bounded: 3.6 kB a histogram, some 20 of them a class. Distributions are kept until more lengths were seen.
    """

    def __init__(self) -> None:
        self._histograms: dict[tuple[str, int] | str | None, _Histogram] = {}
        self._made: dict[tuple[str, int], Floats] = {}
        self._seen = 0
        self._new = 0

    def observe(self, class_name: str, prompt_tokens: int, output_tokens: int) -> None:
        """An output ended by itself after `output_tokens`; if it hit `max_tokens`, use `observe_at_least`."""
        tokens = min(max(output_tokens, 1), LONGEST_TOKENS)
        for histogram in self._groups(class_name, prompt_tokens):
            histogram.add(tokens)
        self._count()

    def observe_at_least(self, class_name: str, prompt_tokens: int, made_tokens: int) -> None:
        """An output was cut after `made_tokens`, by its client, by us or by its `max_tokens`: it was longer."""
        tokens = min(max(made_tokens, 0), LONGEST_TOKENS - 1)
        for histogram in self._groups(class_name, prompt_tokens):
            histogram.add_longer_than(tokens)
        self._count()

    def lengths(self, class_name: str, prompt_tokens: int, max_tokens: int) -> LengthDistribution:
        """What the outputs seen say of one of this class and prompt; `max_tokens` caps it."""
        return LengthDistribution(self.survival(class_name, prompt_tokens), min(max_tokens, LONGEST_TOKENS))

    def survival(self, class_name: str, prompt_tokens: int) -> Floats:
        """The same without a cap."""
        key = (class_name, bucket(prompt_tokens))
        survival = self._made.get(key)
        if survival is None:
            survival = self._made[key] = self._survival(key)
        return survival

    def _survival(self, key: tuple[str, int]) -> Floats:
        if not self._seen:
            return ALWAYS
        hazards, strength = np.zeros(len(EDGES) - 1), ROOT_PRIOR
        for group in (None, key[0], key):
            histogram = self._histograms.get(group)
            if histogram is not None:
                hazards = histogram.hazards(hazards, strength)
            strength = PRIOR
        return np.concatenate([[1.0], np.cumprod(1 - hazards)])

    def _groups(self, class_name: str, prompt_tokens: int) -> list[_Histogram]:
        keys = (None, class_name, (class_name, bucket(prompt_tokens)))
        return [self._histograms.setdefault(key, _Histogram()) for key in keys]

    def _count(self) -> None:
        self._seen += 1
        self._new += 1
        if self._new >= min(MOST_BEFORE_REFRESH, 1 + self._seen // 16):
            self._made.clear()
            self._new = 0


@dataclass(frozen=True, slots=True, eq=False)
class LengthTable:
    """Distributions of many requests at once. survival [rows, edges]; row [n] and max_tokens [n] of each."""

    survival: Floats
    row: Ints
    max_tokens: Ints

    def longer_than(self, tokens: Ints) -> Floats:
        """P(o > tokens), [n, times], 0 from `max_tokens` on. Divide by that at `made` to condition on it."""
        return np.where(tokens < self.max_tokens[:, None], self._at(tokens), 0.0)

    def mean_remaining(self, made: Ints) -> Floats:
        """E[o - made | o > made], [n] tokens: sum of P(o > x | o > made) over x from made to max_tokens - 1."""
        means: Floats = mean_remaining_of_all(self.survival, self.row, self.max_tokens, made, BIN_OF)
        return means

    def _at(self, tokens: Ints) -> Floats:
        """Survival of each request's row at `tokens` [n, times]."""
        below = BIN_OF[np.minimum(tokens, LONGEST_TOKENS - 1)]
        index = below + (self.row * len(EDGES))[:, None]
        flat = self.survival.reshape(-1)
        low = flat[index]
        at: Floats = low + (tokens - EDGES[below]) / WIDTHS[below] * (flat[index + 1] - low)
        return at


def stack(distributions: Sequence[LengthDistribution]) -> LengthTable:
    """One table of many distributions; those that share a survival curve share a row."""
    rows: dict[int, int] = {}
    curves: list[Floats] = []
    row = np.empty(len(distributions), dtype=np.int64)
    for index, distribution in enumerate(distributions):
        found = rows.setdefault(id(distribution.survival), len(curves))
        if found == len(curves):
            curves.append(distribution.survival)
        row[index] = found
    caps = np.array([distribution.max_tokens for distribution in distributions], dtype=np.int64)
    return LengthTable(np.array(curves).reshape(-1, len(EDGES)), row, caps)


def bucket(prompt_tokens: int) -> int:
    """Power of two of a prompt: prompts of 2^(b-1) to 2^b - 1 tokens are alike."""
    return max(prompt_tokens, 0).bit_length()
