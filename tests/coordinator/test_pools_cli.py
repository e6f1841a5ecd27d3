"""`slosserve rebalance` waits for what there is to wait for, and for nothing else."""

from __future__ import annotations

from typing import Any, cast

import pytest

from coordinator.cli import pools
from coordinator.cli.client import ClusterClient
from engine.errors import NoCapacity

ANSWER = {"flips": [{"node": "a"}], "changes": [{"node": "a", "requests": 1}]}


class Told:
    """A cluster that tells these states of node `a`, and then the last one for ever."""

    def __init__(self, *states: dict[str, Any]) -> None:
        self.left = list(states)

    def cluster(self) -> dict[str, Any]:
        state = self.left.pop(0) if len(self.left) > 1 else self.left[0]
        return {"nodes": [{"name": "a", **state}]}


def settled(told: Told, drained_within_s: float | None) -> Any:
    return pools._settled(cast("ClusterClient", told), ANSWER, drained_within_s)["nodes"][0]


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "PAUSE_TOLD_S", 0.02)
    monkeypatch.setattr(pools, "POLL_S", 0.01)


def test_the_pause_is_waited_for_until_it_is_told() -> None:
    told = Told({"role_pause_ms": None, "of_former_role": 2}, {"role_pause_ms": 4.0, "of_former_role": 2})
    assert settled(told, None)["role_pause_ms"] == 4.0


@pytest.mark.parametrize("drained_within_s", [None, 60.0])
def test_a_node_that_only_kept_kv_for_others_has_no_pause_to_tell_of(drained_within_s: float | None) -> None:
    assert (
        settled(Told({"role_pause_ms": None, "of_former_role": 0}), drained_within_s)["role_pause_ms"] is None
    )


def test_with_wait_the_former_role_is_over_or_what_is_left_of_it_is_told() -> None:
    busy, done = {"role_pause_ms": 4.0, "of_former_role": 2}, {"role_pause_ms": 4.0, "of_former_role": 0}
    assert settled(Told(busy, busy, done), 60.0)["of_former_role"] == 0
    with pytest.raises(NoCapacity, match=r"former role: \{'a': 2\}.*--timeout-s"):
        settled(Told(busy), 0.05)
