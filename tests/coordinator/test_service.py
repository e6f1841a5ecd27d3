"""A coordinator that takes over: a node that does not answer then is brought back once it can be."""

from __future__ import annotations

import asyncio
import contextlib
import time

from coordinator.decider import Decider
from coordinator.links import GivenLinks
from coordinator.service import Coordinator
from engine.request import RoleName
from tests.engine.hosted import hosting

MIXED = {"m0": RoleName.MIXED}


async def test_a_node_that_was_down_when_a_coordinator_took_over_serves_when_it_is_back() -> None:
    tries: list[str] = []
    with hosting(MIXED) as hosted:

        async def revive(name: str) -> str | None:
            tries.append(name)
            return hosted.node(name) if len(tries) > 1 else None  # first its host is not back

        coordinator = Coordinator(
            "tiny",
            "tcp://127.0.0.1",
            node_silent_s=1.0,
            stuck_step_s=30.0,
            place_s=5.0,
            revive=revive,
            decider=Decider(16, 16),
            links=GivenLinks(1e-4, 1e9),
        )
        coordinator.expect(MIXED)
        coordinator.lose_node("m0")
        serving = asyncio.create_task(coordinator.run())
        deadline_s = time.monotonic() + 10.0
        while not coordinator.ready and time.monotonic() < deadline_s:
            await asyncio.sleep(0.02)
        assert coordinator.ready
        assert tries == ["m0", "m0"]
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving
        coordinator.close()
