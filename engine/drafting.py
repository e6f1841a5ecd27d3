"""Speculation on a node: what drafts were worth so far, and how deep the next ones go, request by request."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from engine.cost import StepCost
from engine.paces import grouped
from engine.speculation import (
    MAX_DEPTH,
    AcceptanceEstimate,
    Depths,
    TierLoad,
    choose_depths,
    depth_for_request,
    theta_for,
)

LIKELY_TOKENS = 256  # of an output still to come, where nothing is known


@dataclass(slots=True)
class Drafted:
    """A promised decode as drafting sees it. `slack_s`: until its next token is due."""

    class_name: str
    tpot_s: float
    context_tokens: int
    slack_s: float
    estimate: AcceptanceEstimate
    depth: int = 1


class Drafting:
    """Depth per pace for everybody, then less for those who accept little. Used in the step thread."""

    def __init__(self, max_draft_tokens: int) -> None:
        self.max_depth = min(max_draft_tokens + 1, MAX_DEPTH)
        self._classes: defaultdict[str, AcceptanceEstimate] = defaultdict(AcceptanceEstimate)
        self._last: dict[float, int] = {}

    @property
    def on(self) -> bool:
        """Whether the engine drafts at all."""
        return self.max_depth > 1

    def estimate(self, class_name: str) -> AcceptanceEstimate:
        """What a new request of a class begins with."""
        return self._classes[class_name].for_request()

    def verified(
        self, class_name: str, estimate: AcceptanceEstimate, drafted: int, new: int
    ) -> AcceptanceEstimate:
        """Learn from a verify of `drafted` drafts that gave `new` tokens. Returns the request's estimate."""
        accepted = min(max(new - 1, 0), drafted)
        if drafted > 0:
            self._classes[class_name] = self._classes[class_name].verified(drafted, accepted)
        return estimate.verified(drafted, accepted)

    def plan(
        self, decodes: Iterable[Drafted], cost: StepCost, max_batch_tokens: int, *, kv_bound: bool
    ) -> None:
        """Set the depth of each decode: the best for its pace, or less if it accepts too little to pay."""
        decodes = list(decodes)
        groups = grouped(decode.tpot_s for decode in decodes)
        tiers: defaultdict[float, list[Drafted]] = defaultdict(list)
        for decode in decodes:
            tiers[groups[decode.tpot_s]].append(decode)
        if not tiers:
            return
        paces = sorted(tiers)
        chosen = self._choose(paces, tiers, cost, max_batch_tokens, kv_bound)
        self._last = dict(zip(paces, chosen.depths, strict=True))
        for pace_s, depth, price in zip(paces, chosen.depths, chosen.token_prices, strict=True):
            for decode in tiers[pace_s]:
                decode.depth = depth_for_request(depth, decode.estimate.acceptance, price)

    def _choose(
        self,
        paces: list[float],
        tiers: dict[float, list[Drafted]],
        cost: StepCost,
        max_batch_tokens: int,
        kv_bound: bool,
    ) -> Depths:
        loads, theta = [], 1.0
        for pace_s in paces:
            members = tiers[pace_s]
            acceptance = sum(one.estimate.acceptance for one in members) / len(members)
            context = sum(one.context_tokens for one in members)
            loads.append(TierLoad(pace_s, acceptance, len(members), context))
            slack_tokens = max(min(one.slack_s for one in members) / pace_s, 0.0)
            depth = self._last.get(pace_s, self.max_depth)
            theta = min(theta, theta_for(depth, acceptance, LIKELY_TOKENS, int(slack_tokens)))
        return choose_depths(
            cost,
            loads,
            max_batch_tokens=max_batch_tokens,
            theta=theta,
            max_depth=self.max_depth,
            kv_bound=kv_bound,
        )
