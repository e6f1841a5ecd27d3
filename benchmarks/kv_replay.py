"""One replica on which KV memory alone binds: who is let in, who ends, who is preempted for want of memory.

Time goes in ticks. A request that is let in is prefilled in T0(p), then makes a token every one or two ticks.
If the KV held passes the capacity, the last one let in is preempted, and here that ends it. One that is not let
in by the latest tick that keeps its first token in time is turned away.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from coordinator.planner.lengths import KnownLengths, LearnedLengths, Lengths
from coordinator.planner.memory import BLOCK_TOKENS, Resident, next_z, outlook

CAPACITY_TOKENS = 40_000
TICK_S = 0.05
CLASS = "all"
MOST_ASKED = 16  # newcomers in one question; the rest wait for the next


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a replay; times in ticks. `latest`: the last tick at which it may be let in."""

    at: int
    prompt_tokens: int
    output_tokens: int
    max_tokens: int
    token_ticks: int
    prefill_ticks: int
    latest: int
    measured: bool = True


@dataclass(frozen=True, slots=True)
class Running:
    """A request that was let in at the start of tick `since`."""

    request: Request
    since: int

    @property
    def ends(self) -> int:
        return self.since + self.request.prefill_ticks + self.request.output_tokens * self.request.token_ticks

    def made(self, tick: int) -> int:
        return max(tick - self.since - self.request.prefill_ticks, 0) // self.request.token_ticks


@dataclass(slots=True)
class Tally:
    """What became of the requests measured."""

    offered: int = 0
    admitted: int = 0
    overflowed: int = 0
    kept: int = 0
    kept_tokens: int = 0
    held_share: list[float] = field(default_factory=list)


class Admission:
    """A way to let requests in. `learn` is told of every output that ended, or was cut."""

    def admit(self, tick: int, running: Sequence[Running], asking: Sequence[Request]) -> list[bool]:
        """Which of `asking`, in this order, are let in now."""
        raise NotImplementedError

    def learn(self, request: Request, made: int, cut: bool) -> None:
        """An output is over after `made` tokens."""


class ByReserve(Admission):
    """Each request takes a fixed number of tokens for as long as it runs."""

    def __init__(self, reserve: Callable[[Request], int]) -> None:
        self._reserve = reserve

    def admit(self, tick: int, running: Sequence[Running], asking: Sequence[Request]) -> list[bool]:
        free = CAPACITY_TOKENS - sum(blocks(self._reserve(run.request)) for run in running)
        answers = []
        for request in asking:
            charge = blocks(self._reserve(request))
            answers.append(charge <= free)
            free -= charge * answers[-1]
        return answers


class ByPrompt(Admission):
    """What an engine does by itself: let in whatever prompt fits beside the KV held now."""

    def admit(self, tick: int, running: Sequence[Running], asking: Sequence[Request]) -> list[bool]:
        free = CAPACITY_TOKENS - sum(blocks(run.request.prompt_tokens + run.made(tick)) for run in running)
        answers = []
        for request in asking:
            charge = blocks(request.prompt_tokens)
            answers.append(charge <= free)
            free -= charge * answers[-1]
        return answers


class ByOutlook(Admission):
    """The planner's way: free KV by interval, and a charge in each.

    `known`: with the true lengths. `aim`: z follows the share that overflowed towards it; None: z is fixed.
    """

    def __init__(self, z: float, known: bool = False, aim: float | None = None) -> None:
        self._z = z
        self._known = known
        self._aim = aim
        self._learned = LearnedLengths()
        self._lengths: Lengths = KnownLengths() if known else self._learned

    def admit(self, tick: int, running: Sequence[Running], asking: Sequence[Request]) -> list[bool]:
        residents = [self._resident(run, tick) for run in running]
        newcomers = [self._resident(Running(request, tick), tick) for request in asking]
        found = outlook(residents, newcomers, CAPACITY_TOKENS, z=self._z)
        free = np.array([interval.tokens for interval in found.free])
        answers = []
        for charge in np.array(found.charges):
            answers.append(bool((charge <= free).all()))
            if answers[-1]:
                free -= charge
        if self._aim is not None:
            self._z = next_z(self._z, sum(answers), 0, self._aim)
        return answers

    def learn(self, request: Request, made: int, cut: bool) -> None:
        if self._aim is not None and made < request.output_tokens:
            self._z = next_z(self._z, 0, 1, self._aim)
        observe = self._learned.observe_at_least if cut else self._learned.observe
        observe(CLASS, request.prompt_tokens, made)

    def _resident(self, run: Running, tick: int) -> Resident:
        request, since_decode = run.request, tick - run.since - run.request.prefill_ticks
        # A token is on its way: the next one comes sooner than a pace from now.
        ahead = since_decode % request.token_ticks if since_decode > 0 else since_decode
        longest = request.output_tokens if self._known else request.max_tokens
        return Resident(
            request.prompt_tokens,
            run.made(tick),
            request.token_ticks * TICK_S,
            self._lengths.lengths(CLASS, request.prompt_tokens, longest),
            starts_s=-ahead * TICK_S,
        )


def replay(requests: Sequence[Request], admission: Admission) -> Tally:
    """Offer `requests`, in order of `at`, to `admission`; what became of those measured."""
    tally, waiting, running = Tally(), list[Request](), list[Running]()
    tick, following, changed = 0, 0, False
    while following < len(requests) or running:
        if not running and not waiting:
            tick = max(tick, requests[following].at)
        over = [run for run in running if run.ends <= tick]
        if over:
            running = [run for run in running if run.ends > tick]
            for run in over:
                _finish(tally, admission, run)
        while following < len(requests) and requests[following].at <= tick:
            waiting.append(requests[following])
            tally.offered += requests[following].measured
            following, changed = following + 1, True
        waiting = [request for request in waiting if request.latest >= tick]
        if waiting and (changed or over):
            asking = waiting[:MOST_ASKED]
            answers = admission.admit(tick, running, asking)
            let_in = [request for request, yes in zip(asking, answers, strict=True) if yes]
            running = running + [Running(request, tick) for request in let_in]
            waiting = [r for r, yes in zip(asking, answers, strict=True) if not yes] + waiting[MOST_ASKED:]
            tally.admitted += sum(request.measured for request in let_in)
        running, changed = _preempt(tally, admission, running, tick)
        tick += 1
    return tally


def blocks(tokens: int) -> int:
    """KV tokens taken by `tokens`, in whole blocks."""
    return -(-tokens // BLOCK_TOKENS) * BLOCK_TOKENS


def prefill_ticks(prompt_tokens: int, base_s: float, per_token_s: float) -> int:
    """Ticks of a prefill alone: T0(p) of the paper's step time."""
    return math.ceil((base_s + per_token_s * prompt_tokens) / TICK_S)


def _finish(tally: Tally, admission: Admission, run: Running) -> None:
    request = run.request
    admission.learn(request, request.output_tokens, cut=request.output_tokens >= request.max_tokens)
    tally.kept += request.measured
    tally.kept_tokens += request.measured * (request.prompt_tokens + request.output_tokens)


def _preempt(
    tally: Tally, admission: Admission, running: list[Running], tick: int
) -> tuple[list[Running], bool]:
    """The requests that stay, and whether any had to go: last in, first out, until what is held fits."""
    held = sum(blocks(run.request.prompt_tokens + run.made(tick)) for run in running)
    count = len(running)
    while held > CAPACITY_TOKENS:
        last, running = running[-1], running[:-1]
        held -= blocks(last.request.prompt_tokens + last.made(tick))
        admission.learn(last.request, last.made(tick), cut=True)
        tally.overflowed += last.request.measured
    tally.held_share.append(held / CAPACITY_TOKENS)
    return running, len(running) < count
