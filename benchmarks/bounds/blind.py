"""The bound for schedulers that do not know output lengths: when to give a request up.

All that such a scheduler can do for a request of some class and prompt length is to choose (by chance, if it
likes) after how many tokens x to give it up. It then serves the share P(o <= x) and pays E[cost(min(o, x))].
Of each group of like requests only the lower convex hull of these points matters, and of all groups those hull
segments that serve most for their cost: that is the choice for one Lagrange multiplier. It is a bound of the
mean over lengths like those of the sample. Groups much finer would change the rate by 0.1 % (ChatBot, Coder) to
0.6 % (Summarizer), of which part is that lengths of a small sample are told by it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchmarks.bounds.work import Demand, Price, tightest
from benchmarks.workload import Floats, Ints
from engine.cost import StepCost

GROUP_REQUESTS = 50  # of like prompts, at least
MOST_GROUPS = 40  # of a class
TANGENTS = 4  # of a hull, where few segments have to do


@dataclass(frozen=True, slots=True, eq=False)
class Segments:
    """Hull segments [segments], a group's in order: share served in it and seconds for that, of one request.

    It ends at `tokens` of output at most.
    """

    group: Ints
    served: Floats
    work_s: Floats
    tokens: Ints

    @property
    def slope_s(self) -> Floats:
        """Seconds per request served."""
        return self.work_s / self.served


def blind_capacity(
    prompt_tokens: Ints,
    output_tokens: Ints,
    cost: StepCost,
    kv_tokens: int,
    *,
    share: float = 0.9,
    acceptance: float | None = None,
) -> float:
    """Requests per second and replica of a long steady run at most, of which `share` is served."""
    demand = Demand.alone(prompt_tokens, output_tokens)
    price = tightest(demand, cost, kv_tokens, acceptance=acceptance, share=share)
    group = groups(prompt_tokens, np.zeros_like(prompt_tokens))
    return 1 / least_s(segments(demand, price, group), np.bincount(group), share)


def least_s(found: Segments, sizes: Ints, share: float) -> float:
    """Seconds that a request takes in the mean where `share` of all is served. `sizes`: requests by group."""
    order = np.argsort(found.slope_s, kind="stable")
    weight = sizes[found.group[order]] / sizes.sum()
    served = found.served[order] * weight
    left = share - (np.cumsum(served) - served)
    return float(np.clip(left, 0, served) @ found.slope_s[order])


def groups(prompt_tokens: Ints, class_index: Ints) -> Ints:
    """[requests]: the group of each, by class and by rank of its prompt, from 0 without gaps."""
    found, first = np.zeros_like(class_index), 0
    for name in np.unique(class_index):
        rows = np.flatnonzero(class_index == name)
        count = int(np.clip(len(rows) // GROUP_REQUESTS, 1, MOST_GROUPS))
        ranked = rows[np.argsort(prompt_tokens[rows], kind="stable")]
        found[ranked] = first + np.arange(len(rows)) * count // len(rows)
        first += count
    return found


def segments(
    demand: Demand, price: Price, group: Ints, *, most: int | None = None, whole: bool = False
) -> Segments:
    """The hulls of all groups; `most`: so many segments of each at most, on or below its hull.

    `whole`: nobody is given up who was begun, as by one that keeps what it promises.
    """
    rows = []
    for index in range(int(group.max(initial=-1)) + 1):
        served, work_s, tokens = _hull(demand[group == index], price)
        if whole:
            served, work_s, tokens = served[[0, -1]], work_s[[0, -1]], tokens[[0, -1]]
        if most is not None and len(served) > most + 1:
            served, work_s, tokens = _tangents(served, work_s, tokens, most)
        steps = (np.full(len(served) - 1, index), np.diff(served), np.diff(work_s), tokens[1:])
        rows.append([step[np.diff(served) > 0] for step in steps])
    return Segments(*(np.concatenate(column) for column in zip(*rows, strict=True)))


def _hull(demand: Demand, price: Price) -> tuple[Floats, Floats, Ints]:
    """Vertices of a group's hull, from 0, 0, 0: share served, mean seconds, tokens at which to give up."""
    outputs = np.sort(demand.output_tokens)
    tokens = np.unique(outputs)
    total_s, held = price.decode_s.sum(axis=0), demand.held_tokens[:, None]
    made = np.minimum(demand.output_tokens[:, None], tokens)  # [requests, tokens]
    decode_s = (total_s[held + made - 1] - total_s[held]).mean(axis=0)
    work_s = np.concatenate([[0.0], price.prefill_s(demand).sum(axis=0).mean() + decode_s])
    served = np.concatenate([[0.0], np.searchsorted(outputs, tokens, side="right") / len(outputs)])
    kept: list[int] = []
    for at in range(len(served)):
        while len(kept) > 1 and _above(served, work_s, kept[-2], kept[-1], at):
            kept.pop()
        kept.append(at)
    return served[kept], work_s[kept], np.concatenate([[0], tokens])[kept]


def _above(x: Floats, y: Floats, left: int, middle: int, right: int) -> bool:
    """Whether the middle point is on or above the line through the others."""
    rise = (y[middle] - y[left]) * (x[right] - x[left])
    return bool(rise >= (y[right] - y[left]) * (x[middle] - x[left]))


def _tangents(served: Floats, work_s: Floats, tokens: Ints, most: int) -> tuple[Floats, Floats, Ints]:
    """A hull of at most `most` lines along segments of another, so below it; vertices as in `_hull`.

    Slopes are spread evenly by their logarithm. A segment may last as long as the hull's next vertex allows.
    """
    slope_s = np.diff(work_s) / np.diff(served)
    wanted = np.geomspace(slope_s[0], slope_s[-1], most)
    lines = np.unique(np.minimum(np.searchsorted(slope_s, wanted), len(slope_s) - 1))
    slope_s, offset_s = slope_s[lines], (work_s[:-1] - slope_s * served[:-1])[lines]
    crossings = -np.diff(offset_s) / np.diff(slope_s)
    at = np.concatenate([[0.0], crossings, served[-1:]])
    at_s = np.concatenate([offset_s[:1], offset_s + slope_s * at[1:]])
    return at, at_s, tokens[np.searchsorted(served, at - 1e-12)]
