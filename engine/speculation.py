"""Speculation: how many tokens a verify may hold, per tier and per request, and how well drafts do.

Depth s counts the verified token: 1 is plain decoding, s needs s - 1 draft steps (in vLLM, s - 1 speculative
tokens). Source: SLOs-Serve, arXiv 2504.08784, with two corrections. A batch takes only a share theta of the
time that its expected tokens are due in, or requests walk into lateness by chance. And where KV memory binds,
batches are not stretched to the pace: the depth is the one that makes most tokens a second at full speed.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import accumulate

import numpy as np

from engine.cost import StepCost

MAX_DEPTH = 10
START_THETA = 0.7
GRID_VECTORS = 4096  # depth vectors weighed at most where KV binds: about 0.15 ms; 8 deep with 4 tiers

# What the score forgives (5 %, checked at each 10th token), in tokens of slack. In benchmarks/speculation.py a
# share of 0.9 is kept in all 120 cases with 1.5 (0.95 and 0.99 in most, 0.92 at worst), in 96 with 2.0.
GRACE_TOKENS = 1.5
WALK_RATES = tuple([0.02 * 1.3**step for step in range(24)])  # 0.02 to 8.4 per token: exponents of the bound

DRAFT_WORTH = 0.5  # a request drafts while its chance is at least this part of its tier's at the tier's depth

ACCEPTANCE_BEFORE = 0.7  # of a class of which nothing was seen yet
PRIOR_TOKENS = 8.0  # what is believed beforehand counts as this many draft tokens
REQUEST_MEMORY_TOKENS = 64.0
CLASS_MEMORY_TOKENS = 2048.0


def expected_tokens(depth: int, acceptance: float) -> float:
    """Acc(s): tokens that a verify of `depth` gives on average, `sum_{j<s} a^j`. From 1 (a = 0) to s (a = 1).

    Raises ValueError for a depth below 1 or an acceptance outside [0, 1].
    """
    if depth < 1 or not 0 <= acceptance <= 1:
        raise ValueError(f"no verify has depth {depth} and acceptance {acceptance}")
    return _expected(depth, acceptance)[-1]


def allowed_s(tpot_s: float, expected: float, theta: float) -> float:
    """Seconds that a batch may take for a decode of which it makes `expected` tokens on average.

    `theta * tpot_s * expected`, yet never less than `tpot_s`: one token a verify is certain.
    """
    return tpot_s * max(1.0, theta * expected)


@dataclass(frozen=True, slots=True)
class TierLoad:
    """Decodes of one pace: how many, their KV in sum, the acceptance of their drafts (None: never drafted)."""

    tpot_s: float
    acceptance: float | None
    decodes: int
    context_tokens: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.tpot_s < math.inf or self.decodes < 0 or self.context_tokens < 0:
            raise ValueError(f"no tier has {self.decodes} decodes at {self.tpot_s} s a token")
        if self.acceptance is not None and not 0 <= self.acceptance <= 1:
            raise ValueError(f"acceptance {self.acceptance} is not in [0, 1]")


@dataclass(frozen=True, slots=True)
class Depths:
    """Depth per tier, in the order asked; a tier without decodes has 1.

    `batch_s`: the time of a batch. `prefill_tokens_per_s`: what is left for prompts; negative if the decodes
    alone take more than there is. `output_tokens_per_s`: expected of all decodes. `keeps_pace`: every tier
    gets its tokens in time. `token_prices`, per tier: tokens that one more verified token has to bring.
    """

    depths: tuple[int, ...]
    batch_s: float
    prefill_tokens_per_s: float
    output_tokens_per_s: float
    keeps_pace: bool
    token_prices: tuple[float, ...]


def choose_depths(
    cost: StepCost,
    tiers: Sequence[TierLoad],
    *,
    max_batch_tokens: int,
    theta: float = START_THETA,
    max_depth: int = MAX_DEPTH,
    draft_step_s: float = 0.0,
    kv_bound: bool = False,
    prefill_per_output: float = 0.0,
) -> Depths:
    """The depth of every tier, at most `max_depth` (1..10).

    Where KV does not bind, batches last as long as the paces allow, so that most is left for prompts. Where it
    binds (`kv_bound`), every decode is in every batch, with `prefill_per_output` prompt tokens for each output
    token (steady state: mean prompt over mean output), and the most output is made per second.
    `draft_step_s`: seconds of a draft step on top of what `cost` charges. Raises ValueError outside ranges.
    """
    if not 1 <= max_depth <= MAX_DEPTH or not 0 < theta <= 1:
        raise ValueError(f"max_depth {max_depth} must be in 1..{MAX_DEPTH}, theta {theta} in (0, 1]")
    if max_batch_tokens < 1 or draft_step_s < 0 or prefill_per_output < 0:
        raise ValueError("max_batch_tokens must be at least 1, draft_step_s and prefill_per_output at least 0")
    busy = [index for index, tier in enumerate(tiers) if tier.decodes > 0]
    if kv_bound and busy:
        widest = sum(tiers[index].acceptance is not None for index in busy)
        max_depth = min(max_depth, _grid_depth(widest))
    loads = [_Load.of(tiers[index], max_depth, theta) for index in busy]
    shop = _Shop(cost, loads, max_batch_tokens, draft_step_s)
    chosen = shop.fullest_output(prefill_per_output) if kv_bound and busy else shop.most_prefill()
    depths, prices = [1] * len(tiers), [1.0] * len(tiers)
    for index, depth, price in zip(busy, chosen.depths, chosen.token_prices, strict=True):
        depths[index], prices[index] = depth, price
    return replace(chosen, depths=tuple(depths), token_prices=tuple(prices))


@dataclass(frozen=True, slots=True)
class _Load:
    """A tier with decodes; the sequences are by depth, from 1."""

    tier: TierLoad
    acceptance: float
    expected: tuple[float, ...]
    allowed_s: tuple[float, ...]  # never falls
    charged_per_s: tuple[float, ...]  # tokens verified to keep the pace, skipping batches where it may

    @classmethod
    def of(cls, tier: TierLoad, max_depth: int, theta: float) -> _Load:
        a = tier.acceptance if tier.acceptance is not None else 0.0
        expected = _expected(max_depth if tier.acceptance is not None else 1, a)
        allowed = tuple([allowed_s(tier.tpot_s, tokens, theta) for tokens in expected])
        charged = tuple([tier.decodes * depth / time_s for depth, time_s in enumerate(allowed, 1)])
        return cls(tier, a, expected, allowed, charged)


@dataclass(frozen=True, slots=True)
class _Shop:
    """What depths are chosen on."""

    cost: StepCost
    loads: Sequence[_Load]
    max_batch_tokens: int
    draft_step_s: float

    def most_prefill(self) -> Depths:
        """The binding tier and its depth, tried out one by one; the others take the least that does not bind.

        With T the time of a batch and tier l verified in a share T / allowed_l of them, prefill per second is
        Time2BS(T) / T - sum_l n_l s_l / allowed_l. At given depths the first term grows with T and the second
        does not know it, so the longest T is best (up to the largest batch, which ends when it is done); at
        a given T the least depths charge and draft least, since Acc is concave. All contexts are charged to
        every batch.
        """
        if not self.loads:
            batch_s = self.cost.predict(self.max_batch_tokens)
            return Depths((), batch_s, self.max_batch_tokens / batch_s, 0.0, True, ())
        best_rate, best_s, best = -math.inf, 0.0, [1] * len(self.loads)
        seqs, context_tokens = self._held()
        for binding in self.loads:
            for time_s in binding.allowed_s:
                depths = [bisect_left(load.allowed_s, time_s) + 1 for load in self.loads]
                if any(depth > len(load.allowed_s) for depth, load in zip(depths, self.loads, strict=True)):
                    break  # another tier cannot keep up with so long a batch, nor with a longer one
                tokens, batch_s = self._room(time_s, max(depths) - 1, seqs, context_tokens)
                rate = tokens / batch_s
                for load, depth in zip(self.loads, depths, strict=True):
                    rate -= load.charged_per_s[depth - 1]
                if rate > best_rate + 1e-9:
                    best_rate, best_s, best = rate, batch_s, depths
        chosen = list(zip(self.loads, best, strict=True))
        output = sum(load.tier.decodes * load.expected[s - 1] / load.allowed_s[s - 1] for load, s in chosen)
        prices = tuple([DRAFT_WORTH * load.acceptance ** (depth - 1) for load, depth in chosen])
        return Depths(tuple(best), best_s, best_rate, output, best_rate >= 0, prices)

    def fullest_output(self, prefill_per_output: float) -> Depths:
        """Every vector of depths, weighed: most output per second of those that keep every pace.

        If none does, the one whose worst tier is the least behind. For one tier both are the least t / Acc.
        """
        cost, loads = self.cost, self.loads
        steps = [np.arange(1.0, len(load.expected) + 1) for load in loads]
        verified = _each([load.tier.decodes * s for load, s in zip(loads, steps, strict=True)])
        output = _each([load.tier.decodes * np.array(load.expected) for load in loads])
        tokens = verified + prefill_per_output * output
        drafts = reduce(np.maximum.outer, steps) - 1
        seqs, context_tokens = self._held()
        lines = [p.base_s + p.per_token_s * tokens + p.per_draft_step_s * drafts for p in cost.pieces]
        beside_s = cost.predict(1, seqs=seqs, context_tokens=context_tokens) - cost.predict(1)
        batch_s = reduce(np.maximum, lines) * cost.drift + beside_s + self.draft_step_s * drafts
        fits = tokens <= max(self.max_batch_tokens, tokens.flat[0])
        kept = fits & (batch_s <= reduce(np.minimum.outer, [np.array(load.allowed_s) for load in loads]))
        keeps_pace = bool(kept.any())
        if keeps_pace:
            best = int(np.where(kept, output / batch_s, -1.0).argmax())
        else:
            due_s = reduce(np.minimum.outer, [load.tier.tpot_s * np.array(load.expected) for load in loads])
            best = int(np.where(fits, due_s / batch_s, -1.0).argmax())
        depths = tuple([int(index) + 1 for index in np.unravel_index(best, tokens.shape)])
        rate, total = float((output / batch_s).flat[best]), float(tokens.flat[best])
        held = {"seqs": seqs, "context_tokens": context_tokens, "draft_steps": max(depths) - 1}
        token_s = cost.predict(math.ceil(total) + 1, **held) - cost.predict(math.ceil(total), **held)
        # One token more costs `token_s`, and what it brings asks for prefill too; the batch makes `rate`.
        price = rate * token_s / max(1 - rate * token_s * prefill_per_output, 1e-9)
        return Depths(
            depths,
            float(batch_s.flat[best]),
            prefill_per_output * rate,
            rate,
            keeps_pace,
            (min(price, 1.0),) * len(loads),
        )

    def _room(self, time_s: float, drafts: int, seqs: int, context_tokens: int) -> tuple[int, float]:
        """Tokens of the largest batch within `time_s`, and how long it takes."""
        draft_s = drafts * self.draft_step_s
        held = {"seqs": seqs, "context_tokens": context_tokens, "draft_steps": drafts}
        tokens = self.cost.tokens_in(time_s - draft_s, **held)
        if tokens <= self.max_batch_tokens:
            return tokens, time_s
        return self.max_batch_tokens, min(self.cost.predict(self.max_batch_tokens, **held) + draft_s, time_s)

    def _held(self) -> tuple[int, int]:
        tiers = [load.tier for load in self.loads]
        return sum(tier.decodes for tier in tiers), sum(tier.context_tokens for tier in tiers)


def _expected(max_depth: int, acceptance: float) -> tuple[float, ...]:
    """Acc of every depth up to `max_depth`, by summation: no division by 1 - a."""
    return tuple(accumulate([acceptance**drafts for drafts in range(max_depth)]))


def _each(by_depth: Sequence[np.ndarray]) -> np.ndarray:
    """The sum of one entry per tier, for every vector of depths: an axis per tier."""
    return reduce(np.add.outer, by_depth)


def _grid_depth(drafted_tiers: int) -> int:
    """The largest depth of which a grid over so many tiers holds no more than GRID_VECTORS vectors."""
    depth = MAX_DEPTH
    while depth > 1 and depth**drafted_tiers > GRID_VECTORS:
        depth -= 1
    return depth


def theta_for(
    depth: int,
    acceptance: float,
    remaining_tokens: int,
    slack_tokens: float,
    share: float = 0.9,
    *,
    grace_tokens: float = GRACE_TOKENS,
) -> float:
    """Share of `TPOT * Acc(depth)` that a batch may take, so that `share` of the requests are never late.

    `slack_tokens`: how many tokens the request is ahead of its pace. `grace_tokens`: what the score forgives on
    top; the bound holds for every token without it (0), and for the score with it up to a share of 0.9.
    From a bound on the walk of accepted tokens: X tokens a verify, a batch T = theta * Acc in units of TPOT.
    Batch m is in time if `1 + slack + X_1 + .. + X_{m-1} - m T >= 0`; by Doob's inequality for
    `exp(-r (sum X - m T))` one of M batches fails with a chance of at most
    `exp(-r (1 + slack - T) + M max(0, r T + ln E exp(-r X)))`, for every r > 0. The largest theta of any r is
    taken, in [1 / Acc, 1]: a verify always gives a token.
    """
    expected = expected_tokens(depth, acceptance)
    if remaining_tokens <= 0 or depth == 1:
        return 1.0
    if not 0 < share < 1:
        raise ValueError(f"share {share} must be in (0, 1)")
    batches = math.ceil(remaining_tokens / expected)
    ahead, chance = 1 + slack_tokens + grace_tokens, -math.log(1 - share)
    longest = 0.0
    for rate in WALK_RATES:
        gain = -_log_decay(depth, acceptance, rate) / rate
        at_once = ahead - chance / rate
        longest = max(longest, min(at_once, (at_once + batches * gain) / (batches + 1)))
    return min(max(longest, 1.0) / expected, 1.0)


def _log_decay(depth: int, acceptance: float, rate: float) -> float:
    """`ln E exp(-rate * X)` of the tokens X of one verify: geometric, cut off at `depth`."""
    rejected = sum(
        acceptance ** (tokens - 1) * (1 - acceptance) * math.exp(-rate * tokens) for tokens in range(1, depth)
    )
    return math.log(rejected + acceptance ** (depth - 1) * math.exp(-rate * depth))


@dataclass(frozen=True, slots=True)
class AcceptanceEstimate:
    """The chance that a draft token is right, as seen so far: a Beta prior and counts with a bounded memory.

    Only draft tokens up to the first rejected one say anything, so a verify counts what it accepted and at most
    one rejection, which makes `accepted / (accepted + rejected)` the most likely chance.
    """

    prior: float = ACCEPTANCE_BEFORE
    memory_tokens: float = CLASS_MEMORY_TOKENS
    accepted: float = 0.0
    rejected: float = 0.0

    @property
    def acceptance(self) -> float:
        """The mean of the posterior."""
        trials = PRIOR_TOKENS + self.accepted + self.rejected
        return (PRIOR_TOKENS * self.prior + self.accepted) / trials

    def verified(self, drafted: int, accepted: int) -> AcceptanceEstimate:
        """After a verify of `drafted` draft tokens. Raises ValueError if it accepted more than those.

        A plain decode (`drafted` 0) forgets as much as one token does: a request that is no longer drafted for
        drifts back to its prior and is tried again.
        """
        if not 0 <= accepted <= drafted:
            raise ValueError(f"a verify of {drafted} drafts cannot accept {accepted}")
        rejected = int(accepted < drafted)
        kept = (1 - 1 / self.memory_tokens) ** max(accepted + rejected, 1)
        return AcceptanceEstimate(
            self.prior, self.memory_tokens, self.accepted * kept + accepted, self.rejected * kept + rejected
        )

    def for_request(self) -> AcceptanceEstimate:
        """The estimate that a new request of this class begins with."""
        return AcceptanceEstimate(self.acceptance, REQUEST_MEMORY_TOKENS)


def depth_for_request(tier_depth: int, acceptance: float, token_price: float) -> int:
    """The depth of one request in its tier's batch: the most at which its last token still pays, at least 1.

    A draft token in place j is right with chance a^j, and pays if that is at least `token_price` (of
    `Depths.token_prices`). Its draft steps cost nothing more: the batch drafts for others as deep.
    """
    depth, chance = 1, acceptance
    while depth < tier_depth and chance > 0 and chance >= token_price:
        depth, chance = depth + 1, chance * acceptance
    return depth
