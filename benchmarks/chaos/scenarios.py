"""What goes wrong, when, and what may come of it: as data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Action = Literal[
    "kill",
    "stop",
    "slow",
    "hang up",
    "kill coordinator",
    "kill endpoint",
    "kill ray head",
    "flood",
    "rebalance",
    "cut",
    "corrupt",
]
Moment = Literal["any", "prefilling", "offering", "decoding"]


@dataclass(frozen=True, slots=True)
class Load:
    """Clients that each ask again as soon as they have an answer, at temperature 0."""

    clients: int = 6
    prompt_tokens: int = 64
    output_tokens: int = 160


LONG_PROMPTS = Load(prompt_tokens=3000, output_tokens=32)


@dataclass(frozen=True, slots=True)
class Scenario:
    """One fault. `contract`: the line of the failure contract that it is of.

    `action` on a node of the pool `role`, at a `moment` of its work, for `seconds` where it is over by itself.
    `allowed`: HTTP statuses that clients may see, with Retry-After. `detected`: a node is to be found lost.
    `kv_refused`: KV is to be found wrong and not used.
    `hosts`: so many are needed; a cut takes the last of them from the others.
    """

    name: str
    contract: str
    action: Action
    role: str = ""
    moment: Moment = "any"
    seconds: float = 0.0
    load: Load = Load()
    allowed: tuple[int, ...] = ()
    detected: bool = False
    kv_refused: bool = False
    hosts: int = 1


SCENARIOS = (
    Scenario(
        "prefill-dies",
        "prefill node dies before the handoff",
        "kill",
        "prefill",
        "prefilling",
        load=LONG_PROMPTS,
        detected=True,
    ),
    Scenario(
        "prefill-dies-offering",
        "prefill node dies during the pull",
        "kill",
        "prefill",
        "offering",
        load=LONG_PROMPTS,
        detected=True,
    ),
    Scenario(
        "prefill-hangs-offering",
        "a transfer is late: its source hangs",
        "stop",
        "prefill",
        "offering",
        seconds=6.0,
        load=LONG_PROMPTS,
        detected=True,
    ),
    Scenario("decode-dies", "decode node dies mid-stream", "kill", "decode", "decoding", detected=True),
    Scenario(
        "decode-hangs",
        "a node hangs, its lease ends, and it wakes up",
        "stop",
        "decode",
        "decoding",
        seconds=6.0,
        detected=True,
    ),
    Scenario("decode-slows", "a node is slow", "slow", "decode", "decoding", seconds=6.0),
    Scenario(
        "transfers-corrupt",
        "a transfer is corrupt",
        "corrupt",
        seconds=6.0,
        load=LONG_PROMPTS,
        kv_refused=True,
    ),
    Scenario("clients-leave", "clients go away in every phase", "hang up", seconds=6.0),
    Scenario("coordinator-dies", "the coordinator dies, and another takes over", "kill coordinator"),
    Scenario("full", "everything is full", "flood", allowed=(429, 503)),
    Scenario("roles-change", "pools change while they serve", "rebalance", seconds=6.0),
    Scenario(
        "link-cut",
        "the link between two hosts is cut during transfers, and mended",
        "cut",
        "prefill",
        "offering",
        seconds=5.0,
        load=replace(LONG_PROMPTS, clients=4),
        detected=True,
        hosts=2,
    ),
    Scenario("endpoint-dies", "an endpoint process dies", "kill endpoint"),
    # Last: from then on no node is started again.
    Scenario("ray-head-dies", "the head of Ray is lost, and all serve on", "kill ray head", hosts=2),
)


def scenario(name: str) -> Scenario | None:
    """By name."""
    return next((one for one in SCENARIOS if one.name == name), None)
