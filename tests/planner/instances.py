"""Small admission problems in whole ticks, for the judges of the planner: a value type and where to draw them.

Every number is a whole number of ticks (1/256 s, so that seconds are exact in binary) or of tokens. So no
judge has to round, and no tie hangs on the last bit of a float.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hypothesis import strategies as st

from coordinator.planner.instance import Decode, FreeKv, Instance, Newcomer, Prefill, Tier
from engine.cost import StepCost

TICK_S = 1 / 256
AMPLE_KV = 1 << 40
TPOTS = (10, 20, 30, 14, 17, 25)  # ticks; the first three are multiples, the rest spoil every grid

Draw = Callable[[int, int], int]  # a whole number between two bounds, both included


@dataclass(frozen=True, slots=True)
class Runner:
    """A running decode: its next token is due at tick `due`, then one every TPOT of its tier."""

    id: str
    tier: str
    due: int


@dataclass(frozen=True, slots=True)
class Job:
    """A prefill of `tokens` by tick `deadline`: promised, or a newcomer with a value and KV by interval."""

    id: str
    tokens: int
    deadline: int
    tier: str | None = None
    value: int = 1
    kv: tuple[int, ...] = (0,)


@dataclass(frozen=True, slots=True)
class Case:
    """An admission problem in ticks. A batch of x tokens takes `base + x / rate` ticks."""

    base: int
    rate: int
    max_batch_tokens: int
    tpots: tuple[tuple[str, int], ...]
    runners: tuple[Runner, ...] = ()
    promised: tuple[Job, ...] = ()
    newcomers: tuple[Job, ...] = ()
    free_kv: tuple[tuple[int, int], ...] = ((0, AMPLE_KV),)  # (from tick, tokens)
    free_seqs: int = 1 << 30

    def cap(self, ticks: int) -> int:
        """Most tokens of a batch that takes `ticks`."""
        return max(0, min((ticks - self.base) * self.rate, self.max_batch_tokens))

    @property
    def longest(self) -> int:
        """Ticks of the largest batch; `max_batch_tokens` is a multiple of `rate`."""
        return self.base + self.max_batch_tokens // self.rate

    def instance(self) -> Instance:
        """The same problem as the planner takes it, in seconds."""
        return Instance(
            cost=StepCost.line(self.base * TICK_S, TICK_S / self.rate),
            max_batch_tokens=self.max_batch_tokens,
            tiers=tuple(Tier(name, tpot * TICK_S) for name, tpot in self.tpots),
            decodes=tuple(Decode(each.id, each.tier, each.due * TICK_S) for each in self.runners),
            prefills=tuple(
                Prefill(job.id, job.tokens, job.deadline * TICK_S, job.tier) for job in self.promised
            ),
            newcomers=tuple(
                Newcomer(job.id, job.tokens, job.deadline * TICK_S, job.tier, job.kv, float(job.value))
                for job in self.newcomers
            ),
            free_kv=tuple(FreeKv(at * TICK_S, tokens) for at, tokens in self.free_kv),
            free_seqs=self.free_seqs,
        )


def seeded_case(seed: int) -> Case:
    """The random small problem of this seed: overloaded, mostly; the running and promised mostly fit."""
    return draw_case(random.Random(seed).randint)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """The same problems for Hypothesis, which shrinks them."""
    return draw_case(lambda low, high: draw(st.integers(low, high)))


def draw_case(draw: Draw) -> Case:
    """One problem: 1 to 3 tiers, up to 6 running, up to 3 promised, up to 8 newcomers, tight KV in half."""
    base = draw(2, 6)
    rate = (4, 8, 16)[draw(0, 2)]
    tpots = _tpots(draw, base)
    longest = (18, 24, 40, 60)[draw(0, 3)]
    runners = _runners(draw, tpots)
    return Case(
        base=base,
        rate=rate,
        max_batch_tokens=(longest - base) * rate,
        tpots=tpots,
        runners=runners,
        promised=_promised(draw, tpots, rate),
        free_seqs=draw(1, 6) if draw(0, 9) == 0 else 1 << 30,
        **_newcomers_and_memory(draw, tpots, rate),
    )


def seeded_saturated_case(seed: int) -> Case:
    """Of this seed, a problem whose running decodes alone take most of every batch."""
    return draw_saturated_case(random.Random(seed).randint)


def draw_saturated_case(draw: Draw) -> Case:
    """Few tokens a batch, many running decodes that come due in bunches, up to 4 newcomers, ample memory."""
    base, rate = draw(2, 8), (1, 2, 4, 8)[draw(0, 3)]
    tpots = _tpots(draw, base)
    aligned = draw(0, 1)
    runners = []
    for i in range(draw(1, 6)):
        name, tpot = tpots[draw(0, len(tpots) - 1)]
        slack = draw(1, 2 * tpot) if draw(0, 3) == 0 else 0
        runners.append(Runner(f"d{i}", name, (tpot if aligned else draw(base + 1, tpot)) + slack))
    jobs = [Job(f"n{i}", draw(1, 5 * rate), draw(base + 1, 60), _tier(draw, tpots)) for i in range(draw(1, 4))]
    longest = (12, 18, 24, 40, 60)[draw(0, 4)]
    return Case(base, rate, (longest - base) * rate, tpots, tuple(runners), (), tuple(jobs))


def at_the_edge(case: Case, accepts: Callable[[Case], bool]) -> Case:
    """The case with each newcomer in turn as long as it may be for all to be accepted, as all are at first."""
    for i, job in enumerate(case.newcomers):
        fits, too_long = job.tokens, job.tokens + 100 * case.rate
        while too_long - fits > 1:
            middle = (fits + too_long) // 2
            jobs = (*case.newcomers[:i], replace(job, tokens=middle), *case.newcomers[i + 1 :])
            fits, too_long = (middle, too_long) if accepts(replace(case, newcomers=jobs)) else (fits, middle)
        longest = replace(job, tokens=fits)
        case = replace(case, newcomers=(*case.newcomers[:i], longest, *case.newcomers[i + 1 :]))
    return case


def seeded_grid_case(seed: int) -> Case:
    return draw_grid_case(random.Random(seed).randint)


@st.composite
def grid_cases(draw: st.DrawFn) -> Case:
    return draw_grid_case(lambda low, high: draw(st.integers(low, high)))


def draw_grid_case(draw: Draw) -> Case:
    """What Moore-Hodgson solves: one tier, deadlines on the grid of its TPOT, equal values, ample memory."""
    base, rate = draw(2, 6), draw(4, 8)
    tpot = draw(base + 4, 30)
    room = (tpot - base) * rate
    others = [Runner(f"d{i}", "only", tpot + draw(0, tpot)) for i in range(1, draw(1, 4))]
    promised = [Job(f"p{i}", draw(1, room // 3), tpot * draw(1, 6), "only") for i in range(max(0, draw(-1, 2)))]
    newcomers = [
        Job(f"n{i}", draw(1, 2 * room if draw(0, 1) else room), tpot * draw(1, 6), "only")
        for i in range(draw(1, 8))
    ]
    return Case(
        base=base,
        rate=rate,
        max_batch_tokens=room + rate * draw(0, 20),
        tpots=(("only", tpot),),
        runners=(Runner("d0", "only", tpot), *others),
        promised=tuple(promised),
        newcomers=tuple(newcomers),
    )


def _tpots(draw: Draw, base: int) -> tuple[tuple[str, int], ...]:
    left = [tpot for tpot in TPOTS if tpot > base + 2]
    return tuple((f"tier{i}", left.pop(draw(0, len(left) - 1))) for i in range(draw(1, 3)))


def _runners(draw: Draw, tpots: Sequence[tuple[str, int]]) -> tuple[Runner, ...]:
    found = []
    for i in range(draw(0, 6)):
        name, tpot = tpots[draw(0, len(tpots) - 1)]
        low = (tpot + 1) // 2 if draw(0, 3) else 6
        slack = draw(1, 2 * tpot) if draw(0, 3) == 0 else 0
        found.append(Runner(f"d{i}", name, draw(min(low, tpot), tpot) + slack))
    return tuple(found)


def _promised(draw: Draw, tpots: Sequence[tuple[str, int]], rate: int) -> tuple[Job, ...]:
    return tuple(
        Job(f"p{i}", draw(1, 6 * rate), draw(12, 80), _tier(draw, tpots)) for i in range(max(0, draw(-2, 3)))
    )


def _tier(draw: Draw, tpots: Sequence[tuple[str, int]]) -> str | None:
    return tpots[draw(0, len(tpots) - 1)][0] if draw(0, 4) else None


def _newcomers_and_memory(draw: Draw, tpots: Sequence[tuple[str, int]], rate: int) -> dict[str, Any]:
    starts = [0]
    tight = draw(0, 1)
    if tight:
        starts += sorted({draw(1, 60) for _ in range(draw(0, 2))})
    varied = draw(0, 1)
    jobs = []
    for i in range(draw(1, 8)):
        tokens = draw(1, 24 * rate) if draw(0, 2) else draw(1, 6 * rate)
        grows = tuple(tokens + 4 * k for k in range(len(starts)))
        value = draw(1, 12) if varied else 1
        jobs.append(Job(f"n{i}", tokens, draw(6, 80), _tier(draw, tpots), value, grows))
    free = AMPLE_KV
    free_kv = []
    for start in starts:
        asked = sum(job.tokens for job in jobs)
        free = draw(0, asked) + (0 if free == AMPLE_KV else free) if tight else AMPLE_KV
        free_kv.append((start, free))
    return {"newcomers": tuple(jobs), "free_kv": tuple(free_kv)}
