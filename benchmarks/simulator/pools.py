"""The systems to compare with: where a request goes is a rule, and nobody is turned away."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from benchmarks.simulator.world import World


class _Quiet:
    """No deferred requests and no upkeep."""

    tick_s: float | None = None

    def turn(self, world: World) -> None:
        """Never asked for."""

    def tick(self, world: World, replica: int) -> None:
        """Never asked for."""


class Colocated(_Quiet):
    """Every replica serves whole requests; a new one goes where the fewest are outstanding.

    `sticky`: to the replica that the hash of its chain says, so that it finds its history there.
    """

    def __init__(self, *, sticky: bool = False) -> None:
        self._sticky = sticky

    def arrive(self, world: World, request: int) -> None:
        """To the least loaded, or to its own."""
        if self._sticky:
            name = str(world.chain[request]).encode()
            world.submit(request, zlib.crc32(name) % len(world.specs))
        else:
            world.submit(request, int(np.argmin(world.outstanding)))

    def offered(self, world: World, request: int, replica: int) -> None:
        """Nobody offers."""
        raise AssertionError("a whole request does not offer its KV")

    def ended(self, world: World, request: int, replica: int) -> None:
        """Nothing to learn."""


class Disaggregated(_Quiet):
    """DistServe: the least loaded prefill node, whose batch gives the first token; then the least loaded decode
    node, to which the KV moves."""

    def __init__(self, prefill: Sequence[int], decode: Sequence[int]) -> None:
        self._prefill = np.array(prefill)
        self._decode = np.array(decode)

    def arrive(self, world: World, request: int) -> None:
        """To the prefill pool."""
        world.submit(request, _least(world, self._prefill), offers=True)

    def offered(self, world: World, request: int, replica: int) -> None:
        """The first token is made; the rest is decoded elsewhere."""
        world.say_first(request)
        if world.rows[request]["end_tokens"] == 1:
            world.end_offered(request, replica)
        else:
            world.hand_over(request, _least(world, self._decode))

    def ended(self, world: World, request: int, replica: int) -> None:
        """Nothing to learn."""


def _least(world: World, pool: np.ndarray) -> int:
    return int(pool[np.argmin(world.outstanding[pool])])
