"""The six scenarios of SLOs-Serve as distributions, and the state of a replica that serves one of them.

Lengths are log-normal with the paper's mean and standard deviation, clipped. A request whose pace changes on
its way (it thinks, then answers) makes several stays, one a pace; an agent's calls are requests of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from coordinator.planner.instance import Decode, FreeKv, Instance, Newcomer, Prefill, Tier
from coordinator.planner.lengths import KnownLengths
from coordinator.planner.memory import Outlook, Resident, outlook
from engine.cost import StepCost

PAPER_COST = StepCost.line(base_s=24.8e-3, per_token_s=6.88e-5)  # OPT-7B on an A100-40G
PAPER_KV_TOKENS = 40_000
MAX_BATCH_TOKENS = 2048
TIGHT, LOOSE = 3.0, 5.0  # TTFT, as a multiple of a prefill alone on an idle replica
TIGHT_TPOT_S, LOOSE_TPOT_S = 0.05, 0.1
POOL_REQUESTS = 2000
LEAD = (0.8, 1.0)  # of the tightest pace: by when the first tokens of the running are due
KV_FILL = (0.5, 0.95)  # of the KV memory: what the running hold when a burst comes
UNBOUND_KV_TOKENS = 1 << 40
PROMISED, MANY_RUNNING = 3, 64  # most prefills promised before a call; beside more decodes than this, one


@dataclass(frozen=True, slots=True)
class Spread:
    """Log-normal lengths with this mean and standard deviation before they are clipped, in tokens."""

    mean: float
    std: float
    most: int = 2048

    def draw(self, rng: np.random.Generator) -> int:
        """One length, from 1 to `most`."""
        variance = math.log1p((self.std / self.mean) ** 2)
        length = rng.lognormal(math.log(self.mean) - variance / 2, math.sqrt(variance))
        return round(min(max(length, 1.0), self.most))


@dataclass(frozen=True, slots=True)
class Application:
    """`stages`: output lengths, and the seconds per token at which each is promised."""

    ttft_multiple: float
    prompt: Spread
    stages: tuple[tuple[Spread, float], ...]


@dataclass(frozen=True, slots=True)
class Stay:
    """A request from a stage of its output on: `stage_tokens` at this pace, `output_tokens` until it ends."""

    prompt_tokens: int
    output_tokens: int
    stage_tokens: int
    tpot_s: float
    ttft_s: float

    @property
    def seconds(self) -> float:
        """How long the stage lasts at its pace."""
        return self.stage_tokens * self.tpot_s


_CHATBOT = Application(LOOSE, Spread(763, 424), ((Spread(266, 160), LOOSE_TPOT_S),))
_CODER = Application(LOOSE, Spread(847, 617), ((Spread(26, 47), TIGHT_TPOT_S),))
_SUMMARIZER = Application(TIGHT, Spread(1333, 444), ((Spread(202, 234), LOOSE_TPOT_S),))
_TOOL_LOOP = Application(TIGHT, Spread(690, 356), ((Spread(116, 66), TIGHT_TPOT_S),))
_TOOL_LAST = Application(TIGHT, Spread(690, 356), ((Spread(116, 66), LOOSE_TPOT_S),))
# The paper gives means alone for the outputs of Reasoning: half of the mean is taken for their deviation.
_REASONING = Application(
    TIGHT,
    Spread(127, 83),
    ((Spread(4693, 2346, 14336), TIGHT_TPOT_S), (Spread(803, 402), LOOSE_TPOT_S)),
)
SCENARIOS: Mapping[str, tuple[Application, ...]] = {  # equal shares of what is listed
    "ChatBot": (_CHATBOT,),
    "Coder": (_CODER,),
    "Summarizer": (_SUMMARIZER,),
    "Mixed": (_CHATBOT, _CODER, _SUMMARIZER),
    "ToolLLM": (_TOOL_LOOP, _TOOL_LOOP, _TOOL_LOOP, _TOOL_LAST),  # chains of 2 to 6 calls
    "Reasoning": (_REASONING,),
}


@dataclass(frozen=True, slots=True)
class Mix:
    """Requests of a scenario to draw from: `asking` as they arrive, `staying` as they are met while they run.

    `weights`: of each of `staying`, the share of all residence. `running_mean`: how many run at the rate that
    the replica can just serve, `1 / E[k (p + o) + b o (p + o / 2) / M]` on the paper's profile.
    """

    asking: tuple[Stay, ...]
    staying: tuple[Stay, ...]
    weights: np.ndarray
    running_mean: float

    @classmethod
    def of(cls, scenario: str, seed: int) -> Mix:
        """The mix of a scenario of SCENARIOS."""
        rng = np.random.default_rng([seed, list(SCENARIOS).index(scenario)])
        applications = SCENARIOS[scenario]
        requests = [
            _stays(applications[int(rng.integers(len(applications)))], rng) for _ in range(POOL_REQUESTS)
        ]
        asking = tuple(stays[0] for stays in requests)
        staying = tuple(stay for stays in requests for stay in stays)
        seconds = np.array([stay.seconds for stay in staying])
        served_per_s = len(asking) / sum(_cost_s(stay) for stay in asking)
        return cls(asking, staying, seconds / seconds.sum(), served_per_s * seconds.sum() / len(asking))

    def ask(self, rng: np.random.Generator, count: int) -> list[Stay]:
        """`count` requests as they arrive."""
        return [self.asking[at] for at in rng.integers(len(self.asking), size=count)]

    def stay(self, rng: np.random.Generator, count: int) -> list[tuple[Stay, int]]:
        """`count` requests as a look at a replica in steady state finds them, with the tokens made so far."""
        found = [self.staying[at] for at in rng.choice(len(self.staying), size=count, p=self.weights)]
        return [(one, int(age * one.stage_tokens)) for one, age in zip(found, rng.random(count), strict=True)]


def overload(
    mix: Mix, rng: np.random.Generator, *, newcomers: tuple[int, int], by_tokens: bool, ample_kv: bool
) -> Instance:
    """A burst of newcomers at a replica that runs the same mix in steady state.

    newcomers: least and most. by_tokens: a newcomer's value is its tokens, not 1. ample_kv: memory never binds.
    """
    running = mix.stay(rng, int(rng.poisson(mix.running_mean)))
    room = int(rng.uniform(*KV_FILL) * PAPER_KV_TOKENS)
    held = np.cumsum([one.prompt_tokens + made for one, made in running])
    running = running[: int(np.searchsorted(held, room, side="right"))]
    asking = mix.ask(rng, int(rng.integers(newcomers[0], newcomers[1] + 1)))
    kv = _outlook(running, asking, UNBOUND_KV_TOKENS if ample_kv else PAPER_KV_TOKENS)
    values = [float(one.prompt_tokens + one.output_tokens) if by_tokens else 1.0 for one in asking]
    return _instance(rng, running, [], asking, kv, values)


def call(
    mix: Mix, rng: np.random.Generator, *, running: int, newcomers: int, tpots_s: Sequence[float], tight: bool
) -> Instance:
    """An instance of a given size, for timing: lengths from the mix, paces drawn from `tpots_s`.

    Some prefills were promised before. tight: KV is free for a fifth to three fifths of what is asked, or for
    about the largest that asks.
    """
    most = PROMISED if running <= MANY_RUNNING else 1
    stays = [(replace(one, tpot_s=_pick(rng, tpots_s)), made) for one, made in mix.stay(rng, running)]
    asking = [replace(one, tpot_s=_pick(rng, tpots_s)) for one in mix.ask(rng, newcomers)]
    promised = [replace(one, tpot_s=_pick(rng, tpots_s)) for one in mix.ask(rng, int(rng.integers(most + 1)))]
    kv = _outlook(stays, asking, UNBOUND_KV_TOKENS)
    if tight:
        charges = [charge[0] for charge in kv.charges]
        wanted = max(rng.uniform(0.2, 0.6) * sum(charges), rng.uniform(0.5, 1.5) * max(charges))
        above = kv.free[0].tokens - int(wanted)
        kv = replace(kv, free=tuple(FreeKv(one.at_s, max(one.tokens - above, 0)) for one in kv.free))
    values = rng.uniform(0.5, 2.0, newcomers).tolist()
    return _instance(rng, stays, promised, asking, kv, values, tpots_s)


def _stays(application: Application, rng: np.random.Generator) -> tuple[Stay, ...]:
    held = application.prompt.draw(rng)
    ttft_s = application.ttft_multiple * PAPER_COST.prefill_alone_s(held, MAX_BATCH_TOKENS)
    lengths = [spread.draw(rng) for spread, _ in application.stages]
    stays = []
    for stage, (_, tpot_s) in enumerate(application.stages):
        stays.append(Stay(held, sum(lengths[stage:]), lengths[stage], tpot_s, ttft_s))
        held += lengths[stage]
    return tuple(stays)


def _cost_s(stay: Stay) -> float:
    """Seconds of a replica that a request takes where KV binds: tokens, and steps by the KV that it holds."""
    prompt, output, piece = stay.prompt_tokens, stay.output_tokens, PAPER_COST.pieces[0]
    steps_s = piece.base_s * output * (prompt + output / 2) / PAPER_KV_TOKENS
    return piece.per_token_s * (prompt + output) + steps_s


def _outlook(running: Iterable[tuple[Stay, int]], asking: Iterable[Stay], kv_tokens: int) -> Outlook:
    known = KnownLengths()

    def resident(one: Stay, made: int, starts_s: float) -> Resident:
        lengths = known.lengths("", one.prompt_tokens, one.output_tokens)
        return Resident(one.prompt_tokens, made, one.tpot_s, lengths, starts_s=starts_s)

    return outlook(
        [resident(one, made, 0.0) for one, made in running],
        [resident(one, 0, one.ttft_s) for one in asking],
        kv_tokens,
        z=0.0,
    )


def _instance(
    rng: np.random.Generator,
    running: Sequence[tuple[Stay, int]],
    promised: Sequence[Stay],
    asking: Sequence[Stay],
    kv: Outlook,
    values: Sequence[float],
    tpots_s: Sequence[float] = (TIGHT_TPOT_S, LOOSE_TPOT_S),
) -> Instance:
    """Phases are random, as a batch leaves them: what was due before the next one may end is made."""
    pace_s = min((one.tpot_s for one, _ in running), default=0.0)
    first_s = rng.uniform(*LEAD) * pace_s
    in_flight_s = min(tpots_s)
    return Instance(
        cost=PAPER_COST,
        max_batch_tokens=MAX_BATCH_TOKENS,
        tiers=tuple(Tier(_tier(tpot_s), tpot_s) for tpot_s in tpots_s),
        decodes=tuple(
            Decode(f"r{at}", _tier(one.tpot_s), first_s + rng.random() * one.tpot_s, one.prompt_tokens + made)
            for at, (one, made) in enumerate(running)
        ),
        prefills=tuple(
            Prefill(
                f"p{at}",
                math.ceil(rng.random() * one.prompt_tokens),
                rng.uniform(0.5, 1.0) * one.ttft_s,
                _tier(one.tpot_s),
            )
            for at, one in enumerate(promised)
        ),
        newcomers=tuple(
            Newcomer(
                f"n{at}",
                one.prompt_tokens,
                max(one.ttft_s - rng.random() * in_flight_s, 0.0),
                _tier(one.tpot_s),
                charge,
                value,
            )
            for at, (one, charge, value) in enumerate(zip(asking, kv.charges, values, strict=True))
        ),
        free_kv=kv.free,
    )


def _pick(rng: np.random.Generator, tpots_s: Sequence[float]) -> float:
    return tpots_s[int(rng.integers(len(tpots_s)))]


def _tier(tpot_s: float) -> str:
    return f"{tpot_s * 1e3:g} ms"
