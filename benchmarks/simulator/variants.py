"""Ours without one of its parts, and told what nobody can know: by name, for the ablation.

The serving code is the same in all of them; what differs is what it is asked, or what it is told.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from coordinator.decider import Decider
from coordinator.mirror import NodeMirror
from coordinator.placement import Knowledge
from coordinator.planner.lengths import KnownLengths
from engine.errors import ConfigError
from engine.messages import Place, Placed
from kv_transfer.base import Link


class PromisesAll(Decider):
    """No admission: everybody goes to the least loaded node and is promised. Nodes do what they can of it."""

    def place(
        self,
        request: Place,
        endpoint: bytes,
        mirrors: Mapping[str, NodeMirror],
        links: Mapping[tuple[str, str], Link],
        now_s: float,
    ) -> Placed:
        """As a request without a class is placed, but with the promise."""
        placed = super().place(replace(request, class_name=None), endpoint, mirrors, links, now_s)
        return placed if placed.decode is None else replace(placed, verdict="admitted")


class AtNoPrice(Decider):
    """Whoever fits is admitted, however dear and however short room is."""

    def _knowledge(self, links: Mapping[tuple[str, str], Link]) -> Knowledge:
        return replace(super()._knowledge(links), price=None)


class Oracle(Decider):
    """It takes `max_tokens` for the length of every output."""

    def _knowledge(self, links: Mapping[tuple[str, str], Link]) -> Knowledge:
        return replace(super()._knowledge(links), lengths=KnownLengths())


@dataclass(frozen=True, slots=True)
class Variant:
    """What is other than usual.

    `by_turns`: a request is offered to one node alone, the next in turn. `defers`: one that does not fit may
    wait as best effort. `plans`: what is promised has room, so that no node declines it. `tells_lengths`:
    clients ask for exactly the tokens that they will get.
    """

    decider: type[Decider] = Decider
    by_turns: bool = False
    defers: bool = True
    plans: bool = True
    tells_lengths: bool = False


NO_ROUTING, NO_BURSTS, NO_ADMISSION, NO_PRICE, KNOWN_LENGTHS = (
    "no routing",
    "no burst handling",
    "no admission",
    "no price",
    "known lengths (oracle)",
)
FULL = Variant()
VARIANTS: Mapping[str, Variant] = {
    "": FULL,
    NO_ROUTING: Variant(by_turns=True),
    NO_BURSTS: Variant(defers=False),
    NO_ADMISSION: Variant(PromisesAll, plans=False),
    NO_PRICE: Variant(AtNoPrice),
    KNOWN_LENGTHS: Variant(Oracle, tells_lengths=True),
}


def variant(name: str) -> Variant:
    """A variant by name; "" is ours in full. Raises ConfigError that lists them."""
    try:
        return VARIANTS[name]
    except KeyError:
        raise ConfigError(f"no variant {name!r}; there are {', '.join(filter(None, VARIANTS))}") from None
