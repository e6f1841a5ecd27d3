"""What a request takes of a replica's time at the least, whoever schedules it.

A step takes `base + per_token * tokens` and more, and holds at most `kv_tokens` of KV. Split its base over the
requests in it by the KV that they hold (the shares sum to 1 at most), and what is charged to a request, summed
over its steps, is never more than what the steps took. A prompt of p tokens and an output of o take p + o - 1
tokens (the first token comes with the prefill, the last is never fed back), and hold p, p + 1, ... p + o - 1:
so a request is charged, for one line,

    per_token * (p + o - 1) + base * o * (p + (o - 1) / 2) / kv_tokens.

It does not matter where prefill and decode run, nor how they are batched. Of several pieces any mix lies below
their maximum, so each mix gives a bound of its own; the best one is searched for. Attention adds what it must:
decodes read their context, prefills work (p^2 - cached^2) / 2, a request is a sequence of at least o batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy.optimize import minimize_scalar

from benchmarks.workload import Floats, Ints, Workload
from engine.cost import PIECE_TERMS, Piece, StepCost
from engine.speculation import MAX_DEPTH, expected_tokens

PARTS = ("tokens", "floor", "drafts", "attention")
MIX_PRECISION = 1e-3


@dataclass(frozen=True, slots=True, eq=False)
class Demand:
    """Lengths of requests, columns of shape [requests], in tokens.

    `cached_tokens` of a prompt may be found computed. `shared_tokens` of it may at the same time be the KV of
    another request, and are not counted as held.
    """

    prompt_tokens: Ints
    output_tokens: Ints
    cached_tokens: Ints
    shared_tokens: Ints

    @classmethod
    def alone(cls, prompt_tokens: Ints, output_tokens: Ints) -> Demand:
        """Requests that have nothing in common."""
        nothing = np.zeros_like(prompt_tokens)
        return cls(prompt_tokens, output_tokens, nothing, nothing)

    @classmethod
    def of(cls, workload: Workload) -> Demand:
        """A prefix is held twice at a time only if its call has two successors, or an earlier one had."""
        parent = workload.parent
        successors = np.bincount(parent[parent >= 0], minlength=len(workload))
        branched = np.zeros(len(workload), dtype=bool)
        for call in np.flatnonzero(parent >= 0).tolist():
            branched[call] = branched[parent[call]] or successors[parent[call]] > 1
        prefix = workload.prefix_tokens
        return cls(workload.prompt_tokens, workload.output_tokens, prefix, np.where(branched, prefix, 0))

    def __len__(self) -> int:
        return len(self.prompt_tokens)

    def __getitem__(self, rows: Ints | np.ndarray) -> Demand:
        return Demand(*(getattr(self, name)[rows] for name in self.__slots__))

    @property
    def held_tokens(self) -> Ints:
        """KV of the prompt that is the request's own."""
        return self.prompt_tokens - self.shared_tokens


@dataclass(frozen=True, slots=True, eq=False)
class Price:
    """What prompts and tokens take at the least. `decode_s` [PARTS, most KV + 1]: sums up to that much KV."""

    cost: StepCost
    piece: Piece
    kv_tokens: int
    decode_s: Floats

    @classmethod
    def of(
        cls, cost: StepCost, piece: Piece, kv_tokens: int, most_tokens: int, acceptance: float | None
    ) -> Price:
        """Prices by `piece`, a mix of those of `cost`, for requests of at most `most_tokens`."""
        token_s = _token_s(cost, piece, kv_tokens, most_tokens, acceptance)
        return cls(cost, piece, kv_tokens, np.cumsum(token_s, axis=1))

    def prefill_s(self, demand: Demand) -> Floats:
        """[PARTS, requests], seconds. A cached prefix is read or computed again, whichever takes less.

        The whole prompt is held in the step that ends it. Part of the prefix is never better than all or none
        of it: what it saves is convex in its length.
        """
        cost, prompt = self.cost, demand.prompt_tokens.astype(float)
        cached = demand.cached_tokens.astype(float)
        again_s = self.piece.per_token_s * cached + cost.per_prefill_work_s * cached**2 / 2
        cached = np.where(again_s > cost.per_prefill_kv_token_s * cached, cached, 0.0)
        attention_s = (
            cost.per_prefill_work_s * (prompt**2 - cached**2) / 2
            + cost.per_prefill_kv_token_s * cached
            + cost.per_seq_s
        )
        floor_s = self.piece.base_s * demand.held_tokens / self.kv_tokens
        parts = (self.piece.per_token_s * (prompt - cached), floor_s, np.zeros(len(demand)), attention_s)
        return np.stack(parts) * cost.drift

    def parts_s(self, demand: Demand) -> Floats:
        """[PARTS, requests], seconds, of whole requests."""
        held = demand.held_tokens
        decode_s = self.decode_s[:, held + demand.output_tokens - 1] - self.decode_s[:, held]
        return self.prefill_s(demand) + decode_s

    def work_s(self, demand: Demand) -> Floats:
        """[requests], seconds of one replica that each request takes at the least."""
        return np.asarray(self.parts_s(demand).sum(axis=0))


def request_work_s(
    demand: Demand, cost: StepCost, kv_tokens: int, *, acceptance: float | None = None, share: float = 1.0
) -> Floats:
    """[requests], seconds of one replica each takes at the least, at the mix best for the cheapest `share`.

    `acceptance`: the chance of each drafted token, None without speculation. With it the bound holds for the
    mean over what is accepted, for schedulers that do not give up requests whose drafts had no luck.
    """
    return tightest(demand, cost, kv_tokens, acceptance=acceptance, share=share).work_s(demand)


def tightest(
    demand: Demand, cost: StepCost, kv_tokens: int, *, acceptance: float | None = None, share: float = 1.0
) -> Price:
    """The price at the mix of pieces that makes the cheapest `share` of the requests dearest.

    That sum is concave in the mix (a minimum of sums of minima of what is linear), and of lines over tokens the
    best mix is one of two that cross.
    """
    most = int((demand.prompt_tokens + demand.output_tokens).max(initial=1))

    def price(piece: Piece) -> Price:
        return Price.of(cost, piece, kv_tokens, most, acceptance)

    def worth(piece: Piece) -> float:
        return cheapest_s(price(piece).work_s(demand), share)

    mixes = [_best_mix(one, other, worth) for one, other in combinations(cost.pieces, 2)]
    return price(max([*cost.pieces, *mixes], key=worth))


def cheapest_s(work_s: Floats, share: float) -> float:
    """Seconds that one request takes in the mean if the dearest are left out; `share` is served.

    Its inverse is the highest rate per replica of a long steady run that serves `share`.
    """
    ordered = np.sort(work_s)
    counted = np.clip(share * len(ordered) - np.arange(len(ordered)), 0, 1)
    return float(ordered @ counted) / len(ordered)


def _token_s(
    cost: StepCost, piece: Piece, kv_tokens: int, most_tokens: int, acceptance: float | None
) -> Floats:
    """[PARTS, most_tokens + 1]: seconds of an output token for which v tokens of KV are held, plain decoding.

    A verify of depth s takes s tokens and s - 1 draft steps and gives Acc(s) tokens in the mean. Of each of
    them, the KV before the verify is at least v - s (its own context, if all before it came with it), one more
    with the token that is fed. The depth is the one that takes least at each v.
    """
    held = np.arange(most_tokens + 1, dtype=float)
    depths = [1] if acceptance is None else range(1, MAX_DEPTH + 1)
    parts = np.empty((len(depths), len(PARTS), len(held)))
    for row, depth in enumerate(depths):
        share = np.maximum(held - depth + 1, 0) / kv_tokens
        context_s = cost.per_context_token_s * np.maximum(held - depth, 0)
        parts[row, 0] = piece.per_token_s * depth
        parts[row, 1] = piece.base_s * share
        parts[row, 2] = piece.per_draft_step_s * (depth - 1) * share
        parts[row, 3] = context_s + cost.per_seq_s
        parts[row] *= cost.drift / expected_tokens(depth, acceptance or 0.0)
    best = parts.sum(axis=1).argmin(axis=0)
    return np.asarray(parts[best, :, np.arange(len(held))].T)


def _best_mix(one: Piece, other: Piece, worth: Callable[[Piece], float]) -> Piece:
    def mix(weight: float) -> Piece:
        terms = (weight * getattr(one, name) + (1 - weight) * getattr(other, name) for name in PIECE_TERMS)
        return Piece(*terms)

    found = minimize_scalar(
        lambda weight: -worth(mix(weight)), bounds=(0, 1), method="bounded", options={"xatol": MIX_PRECISION}
    )
    return mix(float(found.x))
