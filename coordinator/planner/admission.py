"""Admission (Algorithm 1 of SLOs-Serve): which newcomers may be promised, without breaking a promise made.

The dynamic program counts in whole batches, so that a plan can be carried out as it stands. It is exact within
that family of plans; `search.py` has the search. Where there are too many newcomers for it, the densest go
through the search and the rest are taken greedily, and the answer says so.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from coordinator.planner import memory
from coordinator.planner.budget import Cost, Dues, Tiers, capacity
from coordinator.planner.dues import dues, running_by_tier
from coordinator.planner.given import (
    ACTIVATE,
    DROPPED,
    MANDATORY,
    MEMORY,
    NEWCOMER,
    OPTIONAL,
    PREFILL,
    Bounds,
    Given,
    Items,
    Memory,
)
from coordinator.planner.instance import Decodes, Instance, Newcomer, Prefill, Tier
from coordinator.planner.labels import SHORT
from coordinator.planner.search import BEAM, search
from engine.cost import StepCost
from engine.speculation import TierLoad, allowed_s, choose_depths, expected_tokens

SEARCHED_NEWCOMERS = 16  # what is beyond goes greedily
LOOKED_AT_NEWCOMERS = 512  # of one call; the rest is deferred unseen, so that any call ends
SEARCH_LABELS = 1 << 14
SEARCH_LABELS_OF_MANY = 3 << 10  # above 16 newcomers: keeps a call below 10 ms, for less than 1 % of the value
CHECK_LABELS = 1 << 11
EXPLAINED_NEWCOMERS = 64  # deferred ones into which it is looked why; each takes a few checks

MODE_OF = {  # of an item, by kind: what was promised is mandatory, newcomers are dropped unless named
    ACTIVATE: MANDATORY,
    PREFILL: MANDATORY,
    NEWCOMER: DROPPED,
    MEMORY: OPTIONAL,
}
DEFERRED_UNSEEN = f"more than {LOOKED_AT_NEWCOMERS} newcomers in one call: not looked at"


@dataclass(frozen=True, slots=True)
class Stretch:
    """Batches between two decisions of a plan: `count` of `length_s` each, then one that ends at `until_s`.

    `short` tells whether that last one is there. Times from the start of the plan.
    """

    from_s: float
    until_s: float
    length_s: float
    count: int
    short: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """The answer. `kept`: the promises made earlier can all be kept (if not, every newcomer is deferred).

    `deferred`: why, by id. `exact`: no better choice exists in the family of plans. `starts`: the memory
    interval from which each admitted newcomer holds its KV. `depths`: tokens per verify and tier (1: plain
    decoding). `budget_left`: tokens that the plan's batches could still take, at its last deadline.
    """

    kept: bool
    admitted: tuple[str, ...]
    deferred: dict[str, str]
    value: float
    exact: bool
    method: str
    labels: int
    budget_left: float = 0.0
    stretches: tuple[Stretch, ...] = ()
    starts: dict[str, int] = field(default_factory=dict)
    depths: dict[str, int] = field(default_factory=dict)


class Problem:
    """An instance as the flat arrays that the search reads. Items are in order of deadline."""

    def __init__(self, instance: Instance, depths: Sequence[int] | None = None) -> None:
        self.instance = instance
        self.trimmed = False  # a plan was not found, and not all were looked at
        cost = instance.cost
        depths = [1] * len(instance.tiers) if depths is None else list(depths)
        self.depths = depths
        self.tier_of: dict[str | None, int] = {tier.name: at for at, tier in enumerate(instance.tiers)}
        self.tier_of[None] = -1
        self._tiers(cost, depths)
        self._items(cost)

    def _tiers(self, cost: StepCost, depths: Sequence[int]) -> None:
        instance = self.instance
        count = len(instance.tiers)
        draft_steps = max(depths, default=1) - 1
        line = []
        for piece in cost.pieces:
            base_s = (piece.base_s + piece.per_draft_step_s * draft_steps) * cost.drift
            line.append(
                (base_s + instance.draft_step_s * draft_steps, max(piece.per_token_s * cost.drift, 1e-12))
            )
        self.line = np.array(line)
        self.steepest_s = max(per_token_s for _, per_token_s in line)
        full = max(base_s + per_token_s * instance.max_batch_tokens for base_s, per_token_s in line)
        self.full_s = full
        self.period_s = np.array([step_period_s(instance, at, depths[at]) for at in range(count)])
        self.slots = np.array(depths, dtype=float)
        self.load = np.array([instance.max_batch_tokens, instance.late_seqs], dtype=float)
        decodes = Decodes.of(instance.decodes)
        tiers = np.array([self.tier_of[name] for name in decodes.tier_names], dtype=np.int64)[decodes.tier]
        due_s, context = decodes.due_s, decodes.context_tokens.astype(np.float64)
        self.running, tokens, self.active_s = running_by_tier(tiers, due_s, context, self.period_s)
        self.tier_s = tokens * (cost.per_context_token_s * cost.drift)
        self.tier_s += self.running * (cost.per_seq_s * cost.drift)
        nobody = np.zeros(count)
        length_s = float(min([full, *self.period_s[self.running > 0]]))
        held = capacity(length_s, length_s, self.line, self.load, self.period_s, nobody, self.tier_s, nobody)
        self.chunk_tokens = max(held, 1.0)
        horizon_s = max((one.deadline_s for one in self._prompts()), default=0.0)
        self.horizon_s = float(horizon_s + (2 * max([full, *self.period_s]) if count else full))
        until_s = self.horizon_s + full  # the last batch there must cover what is due before its successor ends
        self.due_s, self.due_slots = dues(tiers, due_s, self.period_s, self.slots, until_s)

    def _items(self, cost: StepCost) -> None:
        instance = self.instance
        tier_of, free_kv, newcomers = self.tier_of, instance.free_kv, instance.newcomers
        rows: list[tuple[float, int, int, int, float, float, Sequence[int]]] = []
        none = (0,) * len(free_kv)
        for at, active_s in enumerate(self.active_s.tolist()):
            if 0 < active_s < np.inf:
                rows.append((active_s, ACTIVATE, at, at, 0.0, 0.0, none))
        for at, prefill in enumerate(instance.prefills):
            tokens = self.work_tokens(cost, prefill)
            rows.append((prefill.deadline_s, PREFILL, at, tier_of[prefill.tier], tokens, 0.0, none))
        for at, one in enumerate(newcomers):
            tokens = self.work_tokens(cost, one)
            rows.append((one.deadline_s, NEWCOMER, at, tier_of[one.tier], tokens, one.value, one.kv_tokens))
        asked = [sum(one.kv_tokens[k] for one in newcomers) for k in range(len(free_kv))]
        self.tight = any(wanted > free.tokens for wanted, free in zip(asked, free_kv, strict=True))
        if self.tight:
            rows += [(free.at_s, MEMORY, at, -1, 0.0, 0.0, none) for at, free in enumerate(free_kv) if at > 0]
        rows.sort(key=itemgetter(0, 1, 2))
        self.rows = rows
        self.kv_free = np.array([free.tokens for free in free_kv], dtype=float)
        self.kv_from_s = np.array([free.at_s for free in free_kv], dtype=float)
        self.deadlines_s = np.array([row[0] for row in rows], dtype=float)
        self.kinds = np.array([row[1] for row in rows], dtype=np.int64)
        self.position = np.array([row[2] for row in rows], dtype=np.int64)
        self.tiers = np.array([row[3] for row in rows], dtype=np.int64)
        self.tokens = np.array([row[4] for row in rows], dtype=float)
        self.values = np.array([row[5] for row in rows], dtype=float)
        self.kv = np.array([row[6] for row in rows], dtype=float).reshape(len(rows), len(free_kv))
        self.newcomers = np.flatnonzero(self.kinds == NEWCOMER)
        self._modes = np.array([MODE_OF[row[1]] for row in rows], dtype=np.int64)
        self.joined_s = self._joined_s(cost)
        bound_k = self._bound_interval(asked)
        self._given = Given(
            Cost(self.line, self.load, self.full_s),
            Tiers(self.period_s, self.slots, self.running, self.active_s, self.tier_s, self.joined_s),
            Dues(self.due_s, self.due_slots, self.horizon_s),
            Items(self.kinds, self.deadlines_s, self.tokens, self.tiers, self.values, self.kv),
            Memory(self.kv_from_s, self.kv_free, self.tight, instance.free_seqs),
            Bounds(
                _by_weight(self.newcomers, self.values / np.maximum(self.tokens, 1e-9)),
                _by_weight(self.newcomers, self.values / np.maximum(self.kv[:, bound_k], 1e-9)),
                bound_k,
            ),
        ).flat()
        self.check_labels = max(CHECK_LABELS, 2 * BEAM * len(rows))

    def _joined_s(self, cost: StepCost) -> np.ndarray[Any, Any]:
        """[T] seconds that a step costs beyond its tokens for one of the prompts, once it decodes."""
        joined, context = [0] * len(self.period_s), [0] * len(self.period_s)
        for prompt in self._prompts():
            tier = self.tier_of[prompt.tier]
            if tier >= 0:
                joined[tier] += 1
                context[tier] += prompt.tokens + prompt.cached_tokens
        return np.array(
            [
                cost.drift * (cost.per_seq_s + cost.per_context_token_s * tokens / max(count, 1))
                for count, tokens in zip(joined, context, strict=True)
            ]
        )

    def _bound_interval(self, asked: Sequence[int]) -> int:
        """The interval where most is asked for what is free, of those that no start of a newcomer can miss."""
        free_kv = self.instance.free_kv
        last_s = max((one.deadline_s for one in self.instance.newcomers), default=0.0)
        certain = [k for k in range(len(asked) - 1) if free_kv[k + 1].at_s >= last_s]
        return max([*certain, len(asked) - 1], key=lambda k: asked[k] / max(free_kv[k].tokens, 1))

    def _prompts(self) -> list[Prefill | Newcomer]:
        return [*self.instance.prefills, *self.instance.newcomers]

    def work_tokens(self, cost: StepCost, prompt: Prefill | Newcomer) -> float:
        """Tokens of a prompt, attention counted as tokens: the sum of chunk * (kv + chunk / 2) telescopes."""
        work = prompt.tokens * (prompt.cached_tokens + prompt.tokens / 2)
        attention_s = cost.per_prefill_work_s * cost.drift * work
        attention_s += cost.per_prefill_kv_token_s * cost.drift * self._read_tokens(prompt)
        return float(prompt.tokens + math.ceil(attention_s / self.steepest_s))

    def _read_tokens(self, prompt: Prefill | Newcomer) -> float:
        """KV tokens that its chunks read: each reads what is there before it. Chunks as the paces now allow."""
        later = math.ceil(prompt.tokens / self.chunk_tokens) - 1
        return float(prompt.cached_tokens * (later + 1) + self.chunk_tokens * later * (later + 1) / 2)

    def search(
        self,
        modes: np.ndarray[Any, Any],
        lower: float = -1.0,
        limit: int = SEARCH_LABELS,
        then: Sequence[int] = (),
    ) -> Found:
        """Run the search with each item dropped, mandatory or optional, and `then` take what fits beside it."""
        return Found(*search(modes, lower, np.array(then, dtype=np.int64), limit, *self._given))

    def take_in_order(self, order: Sequence[int], begun: Found) -> Found:
        """Take newcomers in this order, each if it fits beside those taken."""
        newcomers = set(self.newcomers.tolist())
        modes = self.modes(mandatory=[item for item in begun.items() if item in newcomers])
        found = self.search(modes, limit=self.check_labels, then=order)
        return found if found.value >= begun.value else begun

    def modes(self, mandatory: Iterable[int] = (), optional: Iterable[int] = ()) -> np.ndarray[Any, Any]:
        """What the search may do: what was promised is mandatory, newcomers are dropped unless named."""
        modes = self._modes.copy()
        for item in mandatory:
            modes[item] = MANDATORY
        for item in optional:
            modes[item] = OPTIONAL
        return modes

    def feasible(self, items: Iterable[int]) -> Found | None:
        """The plan that takes exactly these newcomers; None if there is none."""
        found = self.search(self.modes(mandatory=items), limit=self.check_labels)
        self.trimmed = self.trimmed or (found.value < 0 and found.overflow)
        return found if found.value >= 0 else None

    def by_density(self) -> list[int]:
        """Newcomers, most value first for what they take of the budget and of the memory (p/P + m/M)."""
        if not len(self.newcomers):
            return []
        horizon_s = float(self.deadlines_s[self.newcomers].max())
        budget = max(horizon_s / self.full_s * self.load[0], 1.0)
        share = self.tokens / budget
        if self.tight:
            share = share + (self.kv / np.maximum(self.kv_free, 1.0)).max(axis=1)
        density = self.values / np.maximum(share, 1e-12)
        return [int(item) for item in _by_weight(self.newcomers, density)]


class Found(NamedTuple):
    """What a search found: its value (-1: nothing fits) and a row per item taken, as `search` has it."""

    value: float
    budget_left: float
    made: int
    overflow: bool
    rows: np.ndarray[Any, Any]

    def items(self) -> list[int]:
        """Items taken, in order."""
        return [int(item) for item in self.rows[:, 0]]


def solve(instance: Instance, *, why: bool = True) -> Plan:
    """Whom to admit. `why`: also say of each deferred one what it lacks (a few more checks each).

    Never drops what was promised: where even that cannot be kept, every newcomer is deferred.
    """
    return solve_problem(Problem(instance), why=why)


def solve_problem(problem: Problem, *, why: bool = True) -> Plan:
    """`solve` of a problem that was set up already, with plain decoding: depths are chosen here."""
    instance = problem.instance
    if instance.max_depth > 1:
        depths = tier_depths(instance, kv_bound=problem.tight)
        problem = problem if depths == problem.depths else Problem(instance, depths)
    promised = problem.feasible(())
    if promised is None:
        reason = "what was promised earlier cannot all be kept"
        none = {one.id: reason for one in instance.newcomers}
        return Plan(False, (), none, 0.0, not problem.trimmed, "none", 0)
    found, method, exact = _choose(problem, promised)
    return _plan(problem, found, method, exact, why=why)


def warm_up() -> None:
    """Compile the search and the outlook, or load them from the cache, before the first request asks."""
    memory.warm_up()
    asking = [Newcomer(f"warm-up-{at}", 100, 0.03, "pace", (100,)) for at in range(2)]  # only one of them fits
    solve(Instance(StepCost.line(0.01, 1e-4), 512, (Tier("pace", 0.05),), newcomers=tuple(asking)))


def _choose(problem: Problem, promised: Found) -> tuple[Found, str, bool]:
    newcomers = [int(item) for item in problem.newcomers]
    if not newcomers:
        return promised, "nobody asks", True
    if len(newcomers) <= LOOKED_AT_NEWCOMERS:
        everyone = problem.feasible(newcomers)
        if everyone is not None:
            return everyone, "all fit", True
    if len(newcomers) == 1:
        return promised, "search", not problem.trimmed
    dense = problem.by_density()[:LOOKED_AT_NEWCOMERS]
    searched = dense[:SEARCHED_NEWCOMERS]
    greedy = problem.take_in_order(searched, promised)
    optional = problem.modes(optional=searched)
    found = problem.search(optional, greedy.value, CHECK_LABELS)
    if found.overflow:
        many = len(newcomers) > SEARCHED_NEWCOMERS
        found = problem.search(optional, greedy.value, SEARCH_LABELS_OF_MANY if many else SEARCH_LABELS)
    best = found if found.value > greedy.value else greedy._replace(made=found.made)
    if len(searched) == len(newcomers):
        return best, "search", not found.overflow
    rest = problem.take_in_order(dense[len(searched) :], best)
    return rest._replace(made=found.made), "search and greedy", False


def _plan(problem: Problem, found: Found, method: str, exact: bool, *, why: bool) -> Plan:
    instance = problem.instance
    starts = {}
    left_out = set(problem.newcomers.tolist())
    for item, start in zip(found.items(), found.rows[:, 2].tolist(), strict=True):
        if item in left_out:
            left_out.discard(item)
            starts[instance.newcomers[problem.position[item]].id] = int(start)
    deferred: dict[str, str] = {}
    many = len(problem.newcomers) > LOOKED_AT_NEWCOMERS
    unseen = set(problem.by_density()[LOOKED_AT_NEWCOMERS:] if many else ())
    for at in sorted(left_out):
        newcomer = instance.newcomers[problem.position[at]]
        looked_into = why and len(deferred) < EXPLAINED_NEWCOMERS
        reason = _why(problem, at) if looked_into else "it does not fit beside those admitted"
        deferred[newcomer.id] = DEFERRED_UNSEEN if at in unseen else reason
    return Plan(
        kept=True,
        admitted=tuple(starts),
        deferred=deferred,
        value=found.value,
        exact=exact,
        method=method,
        labels=found.made,
        budget_left=found.budget_left,
        stretches=_stretches(found),
        starts=starts,
        depths={tier.name: depth for tier, depth in zip(instance.tiers, problem.depths, strict=True)},
    )


def _why(problem: Problem, item: int) -> str:
    """What a deferred newcomer lacks, found by asking what it would take for it alone to fit."""
    if problem.instance.free_seqs < 1:
        return "no free sequence slot"
    if problem.feasible([item]) is not None:
        return "it fits alone, but not beside those admitted"
    newcomer = problem.instance.newcomers[problem.position[item]]
    kv = problem.kv[item].copy()
    problem.kv[item] = 0.0
    fits_without_kv = problem.feasible([item]) is not None
    problem.kv[item] = kv
    if fits_without_kv:
        return f"KV for {max(newcomer.kv_tokens)} tokens does not fit in {int(problem.kv_free.min())} free"
    tier, problem.tiers[item] = int(problem.tiers[item]), -1
    fits_without_decode = problem.feasible([item]) is not None
    problem.tiers[item] = tier
    if fits_without_decode:
        pace_ms = problem.instance.tiers[tier].tpot_s * 1e3
        return (
            f"its decode at {pace_ms:g} ms a token cannot be kept beside {int(problem.running.sum())} running"
        )
    return (
        f"its prefill of {newcomer.tokens} tokens cannot end within {newcomer.deadline_s:.3f} s "
        f"beside {len(problem.instance.prefills)} promised prefills and {int(problem.running.sum())} decodes"
    )


def _stretches(found: Found) -> tuple[Stretch, ...]:
    """Batches of the plan, in order. What is before the first decision is a short batch of its own."""
    stretches: list[Stretch] = []
    for _, ending, _, from_s, until_s, length_s, count in found.rows.tolist():
        if not stretches and from_s > 0:
            stretches.append(Stretch(0.0, from_s, from_s, 0, short=True))
        if until_s > from_s:
            stretches.append(Stretch(from_s, until_s, length_s, int(count), short=ending == SHORT))
    return tuple(stretches)


def step_period_s(instance: Instance, tier: int, depth: int) -> float:
    """Seconds from one step of a decode to its next: its TPOT, times what a verify of `depth` gives."""
    one = instance.tiers[tier]
    if depth == 1 or one.acceptance is None:
        return one.tpot_s
    return allowed_s(one.tpot_s, expected_tokens(depth, one.acceptance), instance.theta)


def tier_depths(instance: Instance, *, kv_bound: bool) -> list[int]:
    """Tokens per verify and tier, with all in who run or ask. Plain decoding where nothing is drafted."""
    if instance.max_depth <= 1 or all(tier.acceptance is None for tier in instance.tiers):
        return [1] * len(instance.tiers)
    prompts: list[Prefill | Newcomer] = [*instance.prefills, *instance.newcomers]
    decodes = Counter([*(one.tier for one in instance.decodes), *(one.tier for one in prompts)])
    context = Counter[str | None]()
    for decode in instance.decodes:
        context[decode.tier] += decode.context_tokens
    for prompt in prompts:
        context[prompt.tier] += prompt.tokens + prompt.cached_tokens
    loads = [
        TierLoad(tier.tpot_s, tier.acceptance, decodes[tier.name], context[tier.name])
        for tier in instance.tiers
    ]
    chosen = choose_depths(
        instance.cost,
        loads,
        max_batch_tokens=instance.max_batch_tokens,
        theta=instance.theta,
        max_depth=instance.max_depth,
        draft_step_s=instance.draft_step_s,
        kv_bound=kv_bound,
    )
    return list(chosen.depths)


def _by_weight(items: np.ndarray[Any, Any], weight: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return items[np.argsort(-weight[items], kind="stable")] if len(items) > 1 else items
