"""From a node's own account to an admission problem: what it has promised, and who asks to be let in."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from coordinator.planner.instance import Decode, Instance, Newcomer, Prefill, Tier
from coordinator.planner.lengths import ALWAYS, Lengths
from coordinator.planner.memory import OVERFLOW_Z, Cohort, Outlook
from engine.cost import StepCost
from engine.messages import WorkState
from engine.request import WorkKind

MOST_TIERS = 8  # paces beyond are rounded down to the next one of these many
# Of the time that accepted tokens give on average. A batch ends by the first due token of all its decodes: the
# one with the worst luck binds, and one that has just begun has no slack. With the 0.7 that one decode alone
# could keep, 3 to 6 % of what was admitted was late (tool, coder, mixed at capacity); with this under 1 %.
THETA = 0.3
TOLERANCE = 0.05  # of the decode time so far: later than that a promise is broken (the scoring rule)
HORIZON_S = 60.0  # deadlines beyond are taken for this: a plan counts every token that is due before them


@dataclass(frozen=True, slots=True)
class Replica:
    """What a node can do, and what it has taken on.

    `age_s`: since the moment that it told of; below 0 while the batch is in flight at whose end it will be so.
    `step_s`: of a usual batch. `margin`: for model error,
    a share of what steps take. `max_depth`: most tokens of a verify; 1 where nothing is drafted.
    `overflow_z`: standard deviations of the KV need that are kept free.
    """

    cost: StepCost
    max_batch_tokens: int
    kv_tokens: int
    block_tokens: int
    max_seqs: int
    works: Sequence[WorkState] = ()
    age_s: float = 0.0
    step_s: float = 0.0
    margin: float = 0.0
    max_depth: int = 1
    overflow_z: float = OVERFLOW_Z


@dataclass(frozen=True, slots=True)
class Asking:
    """Who asks: `tokens` of its prompt are to be computed here within `left_s`, `cached_tokens` have KV here.

    `tpot_s` is None where it decodes elsewhere. `sequences` of the same are let in together or not at all.
    """

    id: str
    tokens: int
    cached_tokens: int
    left_s: float
    tpot_s: float | None
    max_tokens: int
    class_name: str
    sequences: int = 1


def to_instance(replica: Replica, asking: Asking, lengths: Lengths) -> Instance:
    """The admission problem of `asking` on `replica`. What is broken already is no promise any more."""
    cost = replica.cost
    if replica.margin:
        cost = replace(cost, drift=cost.drift * (1 + replica.margin))
    start_s = _in_flight_s(replica)
    shift_s = replica.age_s + start_s
    promised = [work for work in replica.works if not work.best_effort]
    decoding = [
        work for work in promised if work.prefill_left_tokens == 0 and work.kind is not WorkKind.PREFILL
    ]
    # Of one that is handed on only the KV is still here, under a lease.
    handed_on = sum(map(_is_lease, promised))
    names = _tiers([*(work.tpot_s for work in promised), *([] if asking.tpot_s is None else [asking.tpot_s])])
    chances = _acceptance(decoding, names)
    decodes, late = _decodes(decoding, names, cost, shift_s)
    leased = [work for work in replica.works if work.best_effort and _is_lease(work)]
    view = _outlook(replica, [*promised, *leased], asking, lengths, shift_s)
    newcomer = Newcomer(
        id=asking.id,
        tokens=max(asking.tokens, 1),
        deadline_s=min(max(asking.left_s - start_s, 0.0), HORIZON_S),
        tier=None if asking.tpot_s is None else names[asking.tpot_s],
        kv_tokens=view.charges[0],
        cached_tokens=asking.cached_tokens,
    )
    asked = [_numbered(newcomer, index) for index in range(asking.sequences)]
    return Instance(
        cost=cost,
        max_batch_tokens=replica.max_batch_tokens,
        tiers=tuple(Tier(name, tpot_s, chances.get(name)) for tpot_s, name in _distinct(names)),
        decodes=decodes,
        prefills=_prefills(promised, names, replica, cost, shift_s),
        newcomers=tuple(asked),
        free_kv=view.free,
        free_seqs=max(replica.max_seqs - len(promised) + handed_on, 0),
        late_seqs=late,
        max_depth=replica.max_depth,
        theta=THETA,
    )


def _is_lease(work: WorkState) -> bool:
    """Whether only its KV is here, to be pulled. Nobody takes it back for a promise, best effort or not."""
    return work.kind is WorkKind.PREFILL and work.prefill_left_tokens == 0


def _in_flight_s(replica: Replica) -> float:
    """Until the batch in flight ends, where a plan begins: as announced; after that, some other batch is half
    done on average."""
    if replica.age_s < 0:
        return -replica.age_s
    return replica.step_s / 2 if replica.works else 0.0


def expected_residence_s(asking: Asking, lengths: Lengths) -> float:
    """How long it is likely to decode; 0 where it decodes elsewhere."""
    if asking.tpot_s is None:
        return 0.0
    known = lengths.lengths(asking.class_name, asking.tokens + asking.cached_tokens, asking.max_tokens)
    return known.mean_remaining() * asking.tpot_s


def _decodes(
    works: Sequence[WorkState], names: dict[float, str], cost: StepCost, shift_s: float
) -> tuple[tuple[Decode, ...], int]:
    """What the decodes still owe, and how many are so late that they owe nothing."""
    context = [work.prompt_tokens + work.output_tokens for work in works]
    floor_s = cost.predict(len(works) + 1, seqs=len(works), context_tokens=sum(context))
    decodes, late = [], 0
    for work, context_tokens in zip(works, context, strict=True):
        left_s, tpot_s = _due_left_s(work), work.tpot_s
        # Whether it is late is for the report to say: since then it has made tokens that we do not know of.
        if left_s < -tpot_s and left_s < -TOLERANCE * work.output_tokens * tpot_s:
            late += 1
        else:
            decodes.append(Decode(_name(work), names[tpot_s], max(left_s - shift_s, floor_s), context_tokens))
    return tuple(decodes), late


def _prefills(
    works: Sequence[WorkState], names: dict[float, str], replica: Replica, cost: StepCost, shift_s: float
) -> tuple[Prefill, ...]:
    """What is left of the prompts, but for those that are late whatever is done."""
    prefills = []
    for work in works:
        if work.prefill_left_tokens <= 0:
            continue
        left_s = _due_left_s(work)
        tokens = work.prefill_left_tokens + 1
        known = work.prompt_tokens + work.output_tokens
        cached = max(known - tokens, 0)
        alone_s = cost.prefill_alone_s(known, replica.max_batch_tokens, cached)
        if left_s >= alone_s:
            left_s = min(max(left_s - shift_s, alone_s), HORIZON_S)
            tier = None if work.kind is WorkKind.PREFILL else names[work.tpot_s]
            prefills.append(Prefill(_name(work), tokens, left_s, tier, cached))
    return tuple(prefills)


def _outlook(
    replica: Replica, promised: Sequence[WorkState], asking: Asking, lengths: Lengths, shift_s: float
) -> Outlook:
    """The memory that is left, and what the one who asks would take. What decodes elsewhere makes one token."""
    cohort = Cohort()
    for work in promised:
        made, prompt_tokens = work.output_tokens, work.prompt_tokens
        starts_s = max(work.first_token_left_s - shift_s, 0.0) if made == 0 else 0.0
        if work.kind is WorkKind.PREFILL:
            cohort.add(prompt_tokens, 0, 1.0, starts_s, ALWAYS, 1)
        else:
            survival = lengths.survival(work.class_name, prompt_tokens)
            cohort.add(prompt_tokens, made, work.tpot_s, starts_s, survival, work.max_tokens)
    prompt_tokens, starts_s = asking.tokens + asking.cached_tokens, max(asking.left_s, 0.0)
    if asking.tpot_s is None:
        cohort.add(prompt_tokens, 0, 1.0, starts_s, ALWAYS, 1)
    else:
        survival = lengths.survival(asking.class_name, prompt_tokens)
        cohort.add(prompt_tokens, 0, asking.tpot_s, starts_s, survival, asking.max_tokens)
    return cohort.outlook(len(promised), replica.kv_tokens, replica.block_tokens, replica.overflow_z)


def _numbered(newcomer: Newcomer, index: int) -> Newcomer:
    if index == 0:
        return newcomer
    return Newcomer(
        f"{newcomer.id}/{index}",
        newcomer.tokens,
        newcomer.deadline_s,
        newcomer.tier,
        newcomer.kv_tokens,
        newcomer.value,
        newcomer.cached_tokens,
    )


def _tiers(paces_s: Iterable[float]) -> dict[float, str]:
    """A tier for each pace. Too many are rounded down, to steps of equal ratio: a promise gets no looser."""
    distinct = sorted(set(paces_s))
    if len(distinct) <= MOST_TIERS:
        return {pace_s: f"{pace_s * 1e3:g} ms" for pace_s in distinct}
    ratio = (distinct[-1] / distinct[0]) ** (1 / MOST_TIERS)
    names = {}
    for pace_s in distinct:
        step = min(int(math.log(pace_s / distinct[0]) / math.log(ratio) + 1e-9), MOST_TIERS - 1)
        names[pace_s] = f"{distinct[0] * ratio**step * 1e3:g} ms"
    return names


def _acceptance(works: Sequence[WorkState], names: dict[float, str]) -> dict[str, float]:
    """Mean chance that a drafted token is right, by tier."""
    seen: dict[str, list[float]] = {}
    for work in works:
        if work.acceptance is not None:
            seen.setdefault(names[work.tpot_s], []).append(work.acceptance)
    return {name: sum(chances) / len(chances) for name, chances in seen.items()}


def _distinct(names: dict[float, str]) -> list[tuple[float, str]]:
    """(pace, name) of each tier, the pace of a rounded one being the tightest it stands for."""
    paces: dict[str, float] = {}
    for pace_s, name in names.items():
        paces[name] = min(paces.get(name, math.inf), pace_s)
    return [(pace_s, name) for name, pace_s in paces.items()]


def _name(work: WorkState) -> str:
    return f"{work.request_id}#{work.attempt}"


def _due_left_s(work: WorkState) -> float:
    return work.first_token_left_s if work.next_due_left_s is None else work.next_due_left_s
