"""Step costs from published coefficients, in the form that DistServe's authors give them.

Milliseconds of one iteration: `a + b * sum(len) + c * sum(len^2)` of prompts of `len` tokens computed whole,
and `a + b * sum(context) + c * batch` of decodes, with a second set from a threshold batch on; both pay 2 ms
and 0.0001 ms per token of context besides (DistServe, arXiv 2401.09670, and its simulator, Apache-2.0).

A file holds `kv_capacity_tokens` by TP and, by system and TP, `prefill`, `decoding_smallbs`,
`decoding_largebs` and `decoding_large_small_bs_threshold`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt

from engine.cost import MIN_PER_TOKEN_S, Piece, StepCost
from engine.cost_fit import predicted_s
from engine.errors import ConfigError
from engine.profile import StepProfile, score, worst
from engine.request import RoleName
from engine.step_table import SHA256_DIGITS, Floats, Source, StepRow, StepTable

SYSTEMS = ("distserve", "vllm")
ITERATION_MS, ITERATION_MS_PER_CONTEXT_TOKEN = 2.0, 1e-4  # beside every set of coefficients
MS = 1e-3

# The batches over which the forms are compared with the formulas, as far as they fit the KV capacity.
PROMPTS = (1, 2, 4, 8)
PREFILL_TOKENS = (16, 4096)
DECODES = (1, 256)
CONTEXTS = (16, 2048)  # per decode
GRID_POINTS = 25
SLOPES = 201  # tried between the two published slopes over the context
ROUNDS = 12  # of asking which line is the dearest
SETTLED = 1e-9  # less than this is gained by asking again
GRID = (
    f"prefills of {PROMPTS[0]} to {PROMPTS[-1]} whole prompts, {PREFILL_TOKENS[0]} to {PREFILL_TOKENS[1]} "
    f"tokens together; {DECODES[0]} to {DECODES[1]} decodes over {CONTEXTS[0]} to {CONTEXTS[1]} tokens each"
)

_Milliseconds = Annotated[float, msgspec.Meta(ge=0)]
Line = tuple[_Milliseconds, _Milliseconds, _Milliseconds]
_Count = Annotated[int, msgspec.Meta(ge=1)]
_KvTokens = Annotated[int, msgspec.Meta(ge=CONTEXTS[0])]  # room for the least batch of the grid


class _Sets(msgspec.Struct, frozen=True):
    """One system at one TP, with the names of the file."""

    prefill: Line
    decoding_smallbs: Line
    decoding_largebs: Line
    decoding_large_small_bs_threshold: _Count


@dataclass(frozen=True, slots=True)
class Coefficients:
    """Of one system at one TP, in ms. `large_batch`: from so many decodes on, `decode_large` holds."""

    system: str
    tp: int
    kv_tokens: int
    prefill: Line
    decode_small: Line
    decode_large: Line
    large_batch: int
    source: Source
    note: str = ""

    @classmethod
    def read(cls, path: Path, system: str = SYSTEMS[0], tp: int = 1) -> Coefficients:
        """Those of `system` at `tp`. Raises ConfigError that names the file and the field that is wrong."""
        data = _bytes(path)
        content = _decoded(path, data)
        sets = _converted(path, f"{system}.{tp}", _part(path, content, system, str(tp)), _Sets)
        kv_tokens = _part(path, content, "kv_capacity_tokens", str(tp))
        return cls(
            system,
            tp,
            _converted(path, f"kv_capacity_tokens.{tp}", kv_tokens, _KvTokens),
            sets.prefill,
            sets.decoding_smallbs,
            sets.decoding_largebs,
            sets.decoding_large_small_bs_threshold,
            Source(path.name, 0, hashlib.sha256(data).hexdigest()[:SHA256_DIGITS]),
            str(content.get("note", "")),
        )

    def prefill_s(self, prompts: Sequence[int]) -> float:
        """Seconds of an iteration that computes prompts of so many tokens, whole."""
        a, b, c = self.prefill
        total = sum(prompts)
        return MS * (a + b * total + c * sum(tokens**2 for tokens in prompts) + _iteration_ms(total))

    def decode_s(self, seqs: int, context_tokens: int) -> float:
        """Seconds of an iteration of `seqs` decodes over `context_tokens` together."""
        a, b, c = self.decode_small if seqs < self.large_batch else self.decode_large
        return MS * (a + b * context_tokens + c * seqs + _iteration_ms(context_tokens))

    def profile(self, role: RoleName) -> StepProfile:
        """The cost of a replica that only prefills, only decodes, or does either in turn (mixed).

        `held_out` says how far the form is from the formula over a grid of batches, and nothing of a GPU.
        Nothing is published of batches that hold both kinds: `mixed` adds the terms of both to one base.
        """
        form = {RoleName.PREFILL: self._prefills, RoleName.DECODE: self._decodes, RoleName.MIXED: self._mixed}
        cost, family = form[role](), f"coefficients-{role}"
        grid = self.grid(role)
        compared = {family: score(cost, grid)}
        if role is RoleName.MIXED:
            kinds = (RoleName.PREFILL, RoleName.DECODE)
            compared |= {f"{kind} alone": score(cost, self.grid(kind)) for kind in kinds}
        return StepProfile(
            cost=cost,
            family=family,
            held_out=compared[family],
            compared=compared,
            worst=worst(cost, grid),
            sources=(self.source,),
            about=self._about(role, cost),
        )

    def _prefills(self) -> StepCost:
        a, b, c = self.prefill
        per_context_s = MS * ITERATION_MS_PER_CONTEXT_TOKEN
        return StepCost(
            (Piece(MS * (a + ITERATION_MS), MS * b + per_context_s),),
            per_prefill_work_s=2 * MS * c,  # the work of a whole prompt is len^2 / 2
            per_prefill_kv_token_s=per_context_s,
        )

    def _decodes(self) -> StepCost:
        """The dearer of both sets; over the context, the slope between theirs of the least worst error."""
        grid = self.grid(RoleName.DECODE)
        slopes = np.linspace(self.decode_small[1], self.decode_large[1], SLOPES)
        costs = [self._decodes_over(float(slope)) for slope in slopes]
        return min(costs, key=lambda cost: float(np.abs(_errors(cost, grid)).max()))

    def _decodes_over(self, slope_ms: float) -> StepCost:
        pieces = (
            Piece(MS * (a + ITERATION_MS), max(MS * c, MIN_PER_TOKEN_S))
            for a, _, c in (self.decode_small, self.decode_large)
        )
        return StepCost(
            tuple(sorted(pieces, key=lambda piece: piece.per_token_s)),
            per_context_token_s=MS * (slope_ms + ITERATION_MS_PER_CONTEXT_TOKEN),
        )

    def _mixed(self) -> StepCost:
        """At least what either formula says over the grid, and over longer prompts: no term is below theirs."""
        _, b, c = self.prefill
        per_iteration_s = MS * ITERATION_MS_PER_CONTEXT_TOKEN
        least = (0.0, 0.0, 0.0, MS * b + per_iteration_s, 0.0, 0.0, 2 * MS * c)
        base, slope, steep_base, steep_slope, per_seq_s, per_context_s, per_work_s = _tightest_above(
            self.grid(RoleName.MIXED), least
        )
        return StepCost(
            (Piece(base, max(slope, MIN_PER_TOKEN_S)), Piece(steep_base, steep_slope)),
            per_context_token_s=per_context_s,
            per_prefill_work_s=per_work_s,
            per_seq_s=per_seq_s,
            per_prefill_kv_token_s=per_iteration_s,
        )

    def _about(self, role: RoleName, cost: StepCost) -> dict[str, str]:
        grid = self.grid(role)
        errors = _errors(cost, grid)
        about = {
            "system": self.system,
            "tp": str(self.tp),
            "phase": str(role),
            "kv_tokens": str(self.kv_tokens),
            "error": f"{_range(errors)} of the formula over {len(errors)} batches",
            "batches": f"{GRID}; {self.kv_tokens} tokens of KV at most",
            "held_out": "those batches: how far the form is from the formula, not from measured steps",
        }
        if role is RoleName.DECODE:
            about["switch"] = self._switch(cost)
        return about | ({"note": self.note} if self.note else {})

    def _switch(self, cost: StepCost) -> str:
        """In words, how far the dearer of two lines is from the second set taking over at the threshold."""
        (a_small, _, c_small), (a_large, _, c_large) = self.decode_small, self.decode_large
        meet = (a_small - a_large) / (c_large - c_small) if c_large != c_small else math.inf
        grid = self.grid(RoleName.DECODE)
        errors, is_large = _errors(cost, grid), grid.column("decode_seqs") >= self.large_batch
        small, large = errors[~is_large], errors[is_large]
        return (
            f"published: the second set from batch {self.large_batch} on; here: the dearer line, and they meet "
            f"at batch {meet:.0f}; below the threshold {_range(small)}, from it on {_range(large)}"
        )

    def grid(self, role: RoleName) -> StepTable:
        """Batches that the replica would run, each as long as the formula says."""
        rows: list[StepRow] = []
        if role is not RoleName.DECODE:
            totals = np.unique(np.geomspace(*PREFILL_TOKENS, GRID_POINTS).astype(int)).tolist()
            rows += [self._prefill_row([n // m] * m) for n in totals for m in PROMPTS if n // m >= totals[0]]
        if role is not RoleName.PREFILL:
            seqs = {*np.unique(np.geomspace(*DECODES, GRID_POINTS).astype(int)).tolist()}
            seqs |= {max(self.large_batch - 1, 1), self.large_batch}
            contexts = np.geomspace(*CONTEXTS, 8).astype(int).tolist()
            rows += [self._decode_row(n, n * context) for n in sorted(seqs) for context in contexts]
        return StepTable(tuple(row for row in rows if row.decode_context_tokens <= self.kv_tokens))

    def _prefill_row(self, prompts: Sequence[int]) -> StepRow:
        return StepRow(
            tokens=sum(prompts),
            seqs=len(prompts),
            decode_seqs=0,
            decode_context_tokens=0,
            prefill_chunks=tuple((tokens, 0) for tokens in prompts),
            prefill_work=sum(tokens**2 for tokens in prompts) / 2,
            step_ms=self.prefill_s(prompts) / MS,
        )

    def _decode_row(self, seqs: int, context_tokens: int) -> StepRow:
        return StepRow(seqs, seqs, seqs, context_tokens, (), 0.0, self.decode_s(seqs, context_tokens) / MS)


def _iteration_ms(context_tokens: int) -> float:
    return ITERATION_MS + ITERATION_MS_PER_CONTEXT_TOKEN * context_tokens


def _errors(cost: StepCost, table: StepTable) -> Floats:
    """Relative, positive where `cost` says longer than the formula."""
    errors: Floats = predicted_s(cost, table) / table.seconds - 1
    return errors


def _range(errors: Floats) -> str:
    if not len(errors):
        return "no batch that fits the KV"
    least, most = (round(float(error), 3) + 0.0 for error in (errors.min(), errors.max()))
    return f"{least:+.1%} to {most:+.1%}"


def _tightest_above(table: StepTable, least: Sequence[float]) -> list[float]:
    """Of costs that predict no row too short, the one whose largest excess is least.

    Base and slope of two lines in the tokens, and terms for sequences, context and prefill work, none below
    `least`. Given which line is the dearest for which row this is a linear program: solve it, ask again which
    line is, and keep the best of several starts.
    """
    tokens = table.column("tokens")
    lines = np.column_stack([np.ones_like(tokens), tokens]) / table.seconds[:, None]
    names = ("seqs", "decode_context_tokens", "prefill_work")
    beside = np.column_stack([table.column(name) for name in names]) / table.seconds[:, None]
    best = np.full(len(least) + 1, math.inf)
    for edge in np.unique(np.quantile(tokens, (0.1, 0.25, 0.5, 0.75, 0.9))):
        steep, excess = tokens > edge, math.inf
        for _ in range(ROUNDS):
            found = _least_excess(lines, beside, steep, least)
            if found[-1] >= excess - SETTLED:
                break
            excess = float(found[-1])
            best = min(best, found, key=lambda fit: float(fit[-1]))
            steep = lines @ found[2:4] > lines @ found[0:2]
    return [float(value) for value in best[:-1]]


def _least_excess(
    lines: Floats, beside: Floats, steep: npt.NDArray[np.bool_], least: Sequence[float]
) -> Floats:
    """The coefficients and the excess, if the second line is the dearest for `steep` rows and only for them.

    `lines` [rows, 2] and `beside` [rows, 3] are over the seconds of their row.
    """
    # scipy is slow to import, and an engine's process fits nothing here.
    from scipy.optimize import linprog

    rows, none = len(lines), np.zeros_like(lines)
    excess = np.ones((rows, 1))
    at_most = [np.hstack([lines, none, beside, -excess]), np.hstack([none, lines, beside, -excess])]
    at_least = np.hstack([lines * ~steep[:, None], lines * steep[:, None], beside, 0 * excess])
    matrix = np.vstack([*at_most, -at_least])
    scale = np.maximum(np.abs(matrix).max(axis=0), 1e-12)
    limits = np.concatenate([np.ones(2 * rows), -np.ones(rows)])
    bounds = [(low, None) for low in scale * (*least, 0.0)]
    solved = linprog(np.eye(len(scale))[-1], A_ub=matrix / scale, b_ub=limits, bounds=bounds, method="highs")
    found: Floats = np.asarray(solved.x) / scale
    return found


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from error


def _decoded(path: Path, data: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(data, type=dict[str, Any])
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: holds no coefficients: {error}") from error
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path}: is not JSON: {error}") from error


def _part(path: Path, content: dict[str, Any], *keys: str) -> Any:
    part: Any = content
    for depth, key in enumerate(keys):
        if not isinstance(part, dict) or key not in part:
            there = ", ".join(part) if isinstance(part, dict) else repr(part)
            where = ".".join(keys[:depth]) or "the file"
            raise ConfigError(f"{path}: {'.'.join(keys[: depth + 1])} is missing; {where} has: {there}")
        part = part[key]
    return part


def _converted(path: Path, field: str, value: Any, wanted: Any) -> Any:
    try:
        return msgspec.convert(value, wanted)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {field}: {error}") from error
