"""Upper bounds on the requests of a workload that any scheduler serves in time, and on the rate it can hold.

*Clairvoyant*: lengths known, and the future. *Blind*: lengths unknown until a request ends, the rest known: the
one to compare a scheduler with. Both leave out whom they like. Sources: `work` (what a request takes),
`windows` (when), `blind` (when to give up), `paced` (TTFT and TPOT, for a run without speculation).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from benchmarks.bounds.blind import TANGENTS, groups, least_s, segments
from benchmarks.bounds.paced import most_paced
from benchmarks.bounds.windows import BUCKETS, Windows, faster, most_placed, runs
from benchmarks.bounds.work import PARTS, Demand, Price, cheapest_s, tightest
from benchmarks.workload import Ints, Workload
from engine.cost import StepCost

SHARE = 0.9
WARM_UP = 0.1  # of the duration: what arrives in it is not counted
PRECISION = 0.01  # of a capacity
GROWTH = 1.25
ROUNDING = 1e-6  # of a request
LEAST_PART = 0.005  # to be named
NO_LIMIT = 64.0  # so much faster than a steady run can be: all of the run fits into its last windows


@dataclass(frozen=True, slots=True)
class Bound:
    """Bounds of one workload; of the clairvoyant ones None if they were not asked for.

    `served_*`: of the `offered` requests that count. `capacity_*_per_s`: the highest rate of the same arrivals,
    all faster or slower, at which the asked share is served, in requests a second and replica; infinite for a
    run so short that all of it fits into the time after its last arrival. `steady_*_per_s`: the same for a run
    without end, where no such time is to be had, and bursts even out: usually the lower one for arrivals
    that are smooth, and the one to quote for them. `steady_kept_per_s`: lengths unknown, and nobody given up
    who was begun: the bound of those who keep what they promise. `everybody_per_s`: steady, nobody left out.
    `parts`: of what the work of everybody is made, as fractions: tokens, the floor of steps (shared by as many
    as KV memory holds), drafts, attention.
    """

    offered: int
    served_clairvoyant: float | None
    served_blind: float
    capacity_clairvoyant_per_s: float | None
    capacity_blind_per_s: float
    steady_clairvoyant_per_s: float
    steady_blind_per_s: float
    steady_kept_per_s: float
    everybody_per_s: float
    parts: Mapping[str, float]

    @property
    def limit(self) -> str:
        """What binds, the largest part first."""
        ordered = sorted(self.parts.items(), key=lambda part: -part[1])
        return ", ".join(f"{name} {fraction:.2f}" for name, fraction in ordered if fraction >= LEAST_PART)


def bound(
    workload: Workload,
    cost: StepCost,
    kv_tokens: int,
    replicas: int,
    *,
    share: float = SHARE,
    acceptance: float | None = None,
    clairvoyant_too: bool = True,
    ttft: bool = False,
) -> Bound:
    """All bounds of a workload. The options are those of `clairvoyant`; `ttft` holds for the blind ones too.

    Raises ValueError if no request counts.
    """
    case = _Case(cost, kv_tokens, replicas, share, acceptance, ttft, BUCKETS)
    counted = _counted(workload, cost)
    everybody, most = case.price(counted.demand, 1.0), case.price(counted.demand, share)
    parts_s = everybody.parts_s(counted.demand).sum(axis=1)
    group = groups(counted.demand.prompt_tokens, counted.class_index)
    blind_s, kept_s = (
        least_s(segments(counted.demand, most, group, whole=whole), np.bincount(group), share)
        for whole in (False, True)
    )
    served, capacity = (
        (case.served(workload, case.clairvoyant), case.capacity(workload, case.clairvoyant))
        if clairvoyant_too
        else (math.inf, math.inf)
    )
    return Bound(
        offered=len(counted.demand),
        served_clairvoyant=served if clairvoyant_too else None,
        served_blind=min(served, case.served(workload, case.blind)),
        capacity_clairvoyant_per_s=capacity if clairvoyant_too else None,
        capacity_blind_per_s=min(capacity, case.capacity(workload, case.blind)),
        steady_clairvoyant_per_s=1 / cheapest_s(most.work_s(counted.demand), share),
        steady_blind_per_s=1 / blind_s,
        steady_kept_per_s=1 / kept_s,
        everybody_per_s=1 / float(parts_s.sum() / len(counted.demand)),
        parts=dict(zip(PARTS, (parts_s / parts_s.sum()).tolist(), strict=True)),
    )


def clairvoyant(
    workload: Workload,
    cost: StepCost,
    kv_tokens: int,
    replicas: int,
    *,
    acceptance: float | None = None,
    ttft: bool = False,
    buckets: int = BUCKETS,
) -> float:
    """The most requests served in time, of those that arrive after the first tenth of the run.

    `acceptance`: the chance of each drafted token, None without speculation; with it the bound is one of the
    mean (see `work`). `ttft`: also by the program of `paced`, which is slow where outputs are long; calls of
    chains go free in it. Raises ValueError if no request counts, or for `ttft` with `acceptance`.
    """
    case = _Case(cost, kv_tokens, replicas, SHARE, acceptance, ttft, buckets)
    return case.served(workload, case.clairvoyant)


def clairvoyant_share(
    workload: Workload, cost: StepCost, kv_tokens: int, replicas: int, *, ttft: bool = False
) -> float:
    """The most of these very arrivals that anybody serves in time, as a share of those that count."""
    offered = len(_counted(workload, cost).demand)
    return clairvoyant(workload, cost, kv_tokens, replicas, ttft=ttft) / offered


def clairvoyant_capacity(
    workload: Workload,
    cost: StepCost,
    kv_tokens: int,
    replicas: int,
    *,
    share: float = SHARE,
    acceptance: float | None = None,
    ttft: bool = False,
    buckets: int = BUCKETS,
) -> float:
    """The highest rate, in requests a second and replica, at which `share` can be served in time.

    The arrivals are those of the workload, faster or slower; one drawn near its capacity keeps its length.
    """
    case = _Case(cost, kv_tokens, replicas, share, acceptance, ttft, buckets)
    return case.capacity(workload, case.clairvoyant)


@dataclass(frozen=True, slots=True, eq=False)
class _Counted:
    """The requests that count, in the order in which their windows begin."""

    demand: Demand
    windows: Windows
    class_index: Ints


def _counted(workload: Workload, cost: StepCost) -> _Counted:
    """Those that arrive, or whose chain begins, after the first tenth."""
    windows = Windows.of(workload, cost)
    rows = np.flatnonzero(workload.arrival_s >= WARM_UP * workload.duration_s)
    if not len(rows):
        raise ValueError(f"no request of {workload.name} counts: none comes after its first tenth")
    rows = rows[np.argsort(windows.begin_s[rows], kind="stable")]
    return _Counted(Demand.of(workload)[rows], windows[rows], workload.class_index[rows])


@dataclass(frozen=True, slots=True)
class _Case:
    """What stays the same over the rates."""

    cost: StepCost
    kv_tokens: int
    replicas: int
    share: float
    acceptance: float | None
    ttft: bool
    buckets: int

    def __post_init__(self) -> None:
        if self.ttft and self.acceptance is not None:
            raise ValueError("the bound by TTFT and TPOT is one without speculation: leave out one of them")

    def price(self, demand: Demand, share: float) -> Price:
        return tightest(demand, self.cost, self.kv_tokens, acceptance=self.acceptance, share=share)

    def served(self, workload: Workload, placed: Callable[[_Counted], float]) -> float:
        """The most that `clairvoyant` or `blind` serve, with the paced bound if that is asked for."""
        counted = _counted(workload, self.cost)
        return min(placed(counted), self.paced(counted) if self.ttft else math.inf)

    def clairvoyant(self, counted: _Counted) -> float:
        """Placed, whole requests."""
        work_s = self.price(counted.demand, self.share).work_s(counted.demand)
        begin_s, end_s = counted.windows.begin_s, counted.windows.end_s
        gain = np.ones(len(work_s))
        return float(most_placed(begin_s, end_s, work_s, gain, self.replicas, self.buckets).sum())

    def blind(self, counted: _Counted) -> float:
        """Placed, each request as the segments of its group's hull; each is due when its last token is."""
        group = groups(counted.demand.prompt_tokens, counted.class_index)
        found = segments(counted.demand, self.price(counted.demand, self.share), group, most=TANGENTS)
        of_group = np.bincount(found.group)
        request, segment = runs((np.cumsum(of_group) - of_group)[group], of_group[group])
        windows, gain = counted.windows[request], found.served[segment]
        end_s = windows.end_after_s(found.tokens[segment])
        work_s = found.work_s[segment]
        placed = most_placed(windows.begin_s, end_s, work_s, gain, self.replicas, self.buckets)
        return float(placed @ gain)

    def paced(self, counted: _Counted) -> float:
        """By TTFT and TPOT. Calls of chains may come at any time: they are counted as served."""
        rows = np.flatnonzero(~counted.windows.chained)
        rest = len(counted.demand) - len(rows)
        cost, demand, windows = self.cost, counted.demand[rows], counted.windows[rows]
        return rest + most_paced(demand, windows, cost, self.kv_tokens, self.replicas)

    def capacity(self, workload: Workload, placed: Callable[[_Counted], float]) -> float:
        """The least rate known to be too high, within PRECISION of one that is not."""
        demand = _counted(workload, self.cost).demand
        steady_per_s = self.replicas / cheapest_s(self.price(demand, self.share).work_s(demand), self.share)
        wanted = self.share * len(demand) - ROUNDING

        def enough(rate_per_s: float) -> bool:
            counted = _counted(faster(workload, rate_per_s / workload.rate_per_s), self.cost)
            return placed(counted) >= wanted and (not self.ttft or self.paced(counted) >= wanted)

        low = high = steady_per_s
        while enough(high):
            low, high = high, high * GROWTH
            if high > NO_LIMIT * steady_per_s:
                return math.inf
        while low == high or not enough(low):
            low, high = low / GROWTH, low
        while high > low * (1 + PRECISION):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if enough(middle) else (low, middle)
        return high / self.replicas
