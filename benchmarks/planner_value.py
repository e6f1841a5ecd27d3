"""What the dynamic program wins: value of its choice against simpler ones, where a burst asks for too much."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from benchmarks.mixes import SCENARIOS, Mix, overload
from coordinator.planner.admission import Plan, Problem, solve
from coordinator.planner.instance import Instance

BURST = (4, 16)
EVERY_SUBSET_OF = 8  # newcomers at most, where all 2^n choices are tried
DRAWS_PER_INSTANCE = 50

ORDERS: Mapping[str, Callable[[Problem], list[int]]] = {
    "arrival order": lambda problem: _sorted(problem, problem.position),
    "EDF order": lambda problem: _sorted(problem, problem.deadlines_s),
    "shortest first": lambda problem: _sorted(problem, problem.tokens),
    "density": Problem.by_density,
}


@dataclass(frozen=True, slots=True)
class Case:
    """A row of the comparison. `by_tokens`: a newcomer is worth its tokens; otherwise each is worth 1."""

    scenario: str
    by_tokens: bool
    ample_kv: bool


CASES = tuple(
    Case(scenario, by_tokens, ample_kv)
    for scenario in SCENARIOS
    for by_tokens in (False, True)
    for ample_kv in (False, True)
)


@dataclass(frozen=True, slots=True)
class Overloads:
    """Overloaded instances: the promised fit, not everyone does. `drawn`: instances looked at to find them."""

    instances: tuple[Instance, ...]
    plans: tuple[Plan, ...]
    drawn: int


def compare(mix: Mix, case: Case, count: int, exhaustive: int, seed: int) -> dict[str, Any]:
    """A row: value that each order loses against the DP over `count` instances, in %, and the time of each.

    `exhaustive` instances of few newcomers are solved by trying every subset too.
    """
    found = draw_overloads(mix, case, count, BURST, seed)
    values: dict[str, list[float]] = {name: [] for name in ("DP", *ORDERS)}
    spent_ms: dict[str, list[float]] = {name: [] for name in values}
    for instance in found.instances:
        for name, value, ms in _each(instance):
            values[name].append(value)
            spent_ms[name].append(ms)
    return {
        "scenario": case.scenario,
        "value": "tokens" if case.by_tokens else "uniform",
        "kv": "ample" if case.ample_kv else "40,000",
        "instances": len(found.instances),
        "overloaded_share": len(found.instances) / max(found.drawn, 1),
        "memory_tight_share": _mean([Problem(instance).tight for instance in found.instances]),
        "newcomers_mean": _mean([len(instance.newcomers) for instance in found.instances]),
        "admitted_mean": _mean([len(plan.admitted) for plan in found.plans]),
        "exact_share": _mean([plan.exact for plan in found.plans]),
        "orders": {name: _against(values["DP"], values[name], spent_ms[name]) for name in ORDERS},
        "dp": _times(spent_ms["DP"]),
        "exhaustive": _exhaustive(mix, case, exhaustive, seed),
    }


def draw_overloads(mix: Mix, case: Case, count: int, newcomers: tuple[int, int], seed: int) -> Overloads:
    """`count` overloaded instances, or as many as are found in DRAWS_PER_INSTANCE draws for each."""
    rng = np.random.default_rng([seed, list(SCENARIOS).index(case.scenario), case.by_tokens, case.ample_kv])
    instances: list[Instance] = []
    plans: list[Plan] = []
    drawn = 0
    while len(instances) < count and drawn < DRAWS_PER_INSTANCE * count:
        drawn += 1
        instance = overload(mix, rng, newcomers=newcomers, by_tokens=case.by_tokens, ample_kv=case.ample_kv)
        plan = solve(instance, why=False)
        if plan.kept and plan.deferred:
            instances.append(instance)
            plans.append(plan)
    return Overloads(tuple(instances), tuple(plans), drawn)


def in_order(instance: Instance, name: str) -> float:
    """Value of taking newcomers in an order of ORDERS, each if it fits beside those taken; 0 if none may be."""
    problem = Problem(instance)
    promised = problem.feasible(())
    if promised is None:
        return 0.0
    return max(problem.take_in_order(ORDERS[name](problem), promised).value, 0.0)


def best_subset(instance: Instance) -> float:
    """Most value over all subsets of the newcomers for which a plan is found: 2^n checks. 0 if none may be."""
    problem = Problem(instance)
    items = problem.newcomers.tolist()
    subsets = [subset for size in range(len(items) + 1) for subset in combinations(items, size)]
    worth = {subset: float(problem.values[list(subset)].sum()) for subset in subsets}
    for subset in sorted(subsets, key=lambda one: -worth[one]):
        if problem.feasible(subset) is not None:
            return worth[subset]
    return 0.0


def _each(instance: Instance) -> Iterator[tuple[str, float, float]]:
    start = time.perf_counter()
    value = solve(instance, why=False).value
    yield "DP", value, (time.perf_counter() - start) * 1e3
    for name in ORDERS:
        start = time.perf_counter()
        value = in_order(instance, name)
        yield name, value, (time.perf_counter() - start) * 1e3


def _exhaustive(mix: Mix, case: Case, count: int, seed: int) -> dict[str, Any]:
    found = draw_overloads(mix, case, count, (BURST[0], EVERY_SUBSET_OF), seed + 1)
    best = [best_subset(instance) for instance in found.instances]
    lost = [of - plan.value for of, plan in zip(best, found.plans, strict=True)]
    return {
        "instances": len(best),
        "most_newcomers": EVERY_SUBSET_OF,
        "dp_value_lost_percent": 100 * sum(lost) / sum(best) if sum(best) else 0.0,
        "dp_below_best": sum(gap > 1e-6 for gap in lost),
    }


def _against(best: list[float], other: list[float], spent_ms: list[float]) -> dict[str, float]:
    lost = [(of - value) / of for of, value in zip(best, other, strict=True) if of > 0]
    return {
        "value_lost_percent": 100 * (1 - sum(other) / sum(best)) if sum(best) else 0.0,
        "worst_lost_percent": 100 * max(lost, default=0.0),
        "loses_in_share": _mean([gap > 1e-9 for gap in lost]),
        **_times(spent_ms),
    }


def _times(spent_ms: list[float]) -> dict[str, float]:
    p50_ms, p99_ms = np.percentile(spent_ms, (50, 99)).tolist() if spent_ms else (0.0, 0.0)
    return {"p50_ms": p50_ms, "p99_ms": p99_ms}


def _mean(values: list[Any]) -> float:
    return float(np.mean(values)) if values else 0.0


def _sorted(problem: Problem, key: np.ndarray) -> list[int]:
    return [int(item) for item in problem.newcomers[np.argsort(key[problem.newcomers], kind="stable")]]
