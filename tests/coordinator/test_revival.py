"""A lost node is brought back at once, and one that is lost again and again costs less and less."""

from __future__ import annotations

import asyncio

import pytest

from coordinator import revival
from coordinator.revival import AT_ONCE, MOST_WAIT_S, Revival, wait_s


def test_the_first_tries_wait_for_nothing_and_later_ones_longer_up_to_a_bound() -> None:
    waits = [wait_s(tries) for tries in range(20)]
    assert waits[:AT_ONCE] == [0.0] * AT_ONCE
    assert waits[AT_ONCE] > 0
    assert waits == sorted(waits)
    assert waits[-1] == MOST_WAIT_S


async def test_one_try_goes_on_at_a_time_and_one_that_fails_is_not_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(revival, "PAUSE_S", 0.01)
    going, most, tries = 0, 0, 0
    back: list[tuple[str, str]] = []

    async def revive(name: str) -> str | None:
        nonlocal going, most, tries
        going, tries = going + 1, tries + 1
        most = max(most, going)
        await asyncio.sleep(0.01)
        going -= 1
        if tries == 1:
            raise RuntimeError("it is still dying")
        return None if tries == 2 else "tcp://n0"

    reviving = Revival(revive, lambda name, address: back.append((name, address)))
    while not back:
        reviving.lost("n0")
        await asyncio.sleep(0.002)
    assert back == [("n0", "tcp://n0")]
    assert (most, tries) == (1, 3)
    await asyncio.sleep(0.05)
