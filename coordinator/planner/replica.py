"""From a node's own account to an admission problem: what it has promised, and who asks to be let in."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from coordinator.planner.instance import Decodes, Instance, Newcomer, Prefill, Tier
from coordinator.planner.lengths import ALWAYS, Lengths
from coordinator.planner.memory import OVERFLOW_Z, Outlook, outlook_of_rows
from coordinator.planner.outlook_kernel import BASE, CURVE, MAX_TOKENS, PACE_S, REQUEST_FIELDS, STARTS_S
from coordinator.planner.works import NOTHING, Works
from engine.cost import StepCost
from engine.paces import grouped
from engine.request import WorkKind

# Of the time that accepted tokens give on average. A batch ends by the first due token of all its decodes: the
# one with the worst luck binds, and one that has just begun has no slack. With the 0.7 that one decode alone
# could keep, 3 to 6 % of what was admitted was late (tool, coder, mixed at capacity); with this under 1 %.
THETA = 0.3
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
    works: Works = NOTHING
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
    works = replica.works
    names = _tiers([*works.paces_s, *([] if asking.tpot_s is None else [asking.tpot_s])])
    chances = _acceptance(works, names)
    decodes, late = _decodes(works, names, cost, shift_s)
    view = _outlook(replica, asking, lengths, shift_s)
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
        prefills=_prefills(names, replica, cost, shift_s),
        newcomers=tuple(asked),
        free_kv=view.free,
        free_seqs=max(replica.max_seqs - works.promised + works.handed_on, 0),
        late_seqs=late,
        max_depth=replica.max_depth,
        theta=THETA,
    )


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


def _decodes(works: Works, names: dict[float, str], cost: StepCost, shift_s: float) -> tuple[Decodes, int]:
    """What the decodes still owe, and how many are so late that they owe nothing."""
    running, context = len(works.decoding), works.context_tokens[works.decoding]
    floor_s = cost.predict(running + 1, seqs=running, context_tokens=int(context.sum()))
    on_time = ~works.late[works.decoding]
    owing = works.decoding[on_time]
    decodes = Decodes(
        ids=[works.names[at] for at in owing.tolist()],
        tier_names=[names[pace_s] for pace_s in works.paces_s],
        tier=works.pace[owing],
        due_s=np.maximum(works.due_left_s[owing] - shift_s, floor_s),
        context_tokens=context[on_time],
    )
    return decodes, running - len(owing)


def _prefills(names: dict[float, str], replica: Replica, cost: StepCost, shift_s: float) -> tuple[Prefill, ...]:
    """What is left of the prompts, but for those that are late whatever is done."""
    works = replica.works
    prefills = []
    for at in works.prefilling.tolist():
        work, left_s = works.holding[at], float(works.due_left_s[at])
        tokens = work.prefill_left_tokens + 1
        known = work.prompt_tokens + work.output_tokens
        cached = max(known - tokens, 0)
        alone_s = cost.prefill_alone_s(known, replica.max_batch_tokens, cached)
        if left_s >= alone_s:
            left_s = min(max(left_s - shift_s, alone_s), HORIZON_S)
            tier = None if work.kind is WorkKind.PREFILL else names[work.tpot_s]
            prefills.append(Prefill(works.names[at], tokens, left_s, tier, cached))
    return tuple(prefills)


def _outlook(replica: Replica, asking: Asking, lengths: Lengths, shift_s: float) -> Outlook:
    """The memory that is left, and what the one who asks would take. What decodes elsewhere makes one token."""
    requests, curves = replica.works.requests(lengths, shift_s)
    prompt_tokens, elsewhere = asking.tokens + asking.cached_tokens, asking.tpot_s is None
    asked = np.zeros((1, REQUEST_FIELDS))
    asked[0, [BASE, PACE_S, STARTS_S, CURVE, MAX_TOKENS]] = (
        prompt_tokens,
        1.0 if asking.tpot_s is None else asking.tpot_s,
        max(asking.left_s, 0.0),
        len(curves),
        1 if elsewhere else asking.max_tokens,
    )
    curves.append(ALWAYS if elsewhere else lengths.survival(asking.class_name, prompt_tokens))
    return outlook_of_rows(
        np.concatenate([requests, asked]),
        curves,
        len(requests),
        replica.kv_tokens,
        replica.block_tokens,
        replica.overflow_z,
    )


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
    """The name of the tier of each pace."""
    return {pace_s: f"{tier_s * 1e3:g} ms" for pace_s, tier_s in grouped(paces_s).items()}


def _acceptance(works: Works, names: dict[float, str]) -> dict[str, float]:
    """Mean chance that a drafted token is right, by tier."""
    known = works.decoding[~np.isnan(works.acceptance[works.decoding])]
    if not len(known):
        return {}
    tiers = [names[pace_s] for pace_s in works.paces_s]
    count = np.bincount(works.pace[known], minlength=len(tiers))
    total = np.bincount(works.pace[known], works.acceptance[known], len(tiers))
    by_tier: dict[str, tuple[int, float]] = {}
    for name, more, chances in zip(tiers, count.tolist(), total.tolist(), strict=True):
        seen, so_far = by_tier.get(name, (0, 0.0))
        by_tier[name] = seen + more, so_far + chances
    return {name: chances / seen for name, (seen, chances) in by_tier.items() if seen}


def _distinct(names: dict[float, str]) -> list[tuple[float, str]]:
    """(pace, name) of each tier, the pace of a rounded one being the tightest it stands for."""
    paces: dict[str, float] = {}
    for pace_s, name in names.items():
        paces[name] = min(paces.get(name, math.inf), pace_s)
    return [(pace_s, name) for name, pace_s in paces.items()]
