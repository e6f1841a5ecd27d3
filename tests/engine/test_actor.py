"""What an actor does around a node: one start, told clearly when it fails."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from coordinator.config_layers import find_profile
from engine import actor
from engine.errors import EngineStartError
from engine.node import Node
from engine.profile import StepProfile
from kv_transfer.fake import FakeFabric
from tests.engine.scripted_engine import ScriptedEngine


@pytest.fixture
def spec(tmp_path: Path) -> dict[str, Any]:
    roles = {"prefill": "prefill_node.role:PrefillRole", "mixed": "decode_node.role:MixedRole"}
    return {
        "name": "node-0",
        "role": "mixed",
        "host": "127.0.0.1",
        "log": str(tmp_path / "node.log"),
        "engine": {"kind": "scripted"},
        "roles": roles,
        "max_waiting": 8,
        "peer_silent_s": 3.0,
        "session_ttl_s": 300.0,
        "session_kv_share": 0.5,
    }


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ScriptedEngine]]:
    """Engines that actors built. What an actor does to its process is left out: this one is shared."""
    engines: list[ScriptedEngine] = []

    def build(settings: dict[str, Any]) -> ScriptedEngine:
        time.sleep(0.1)
        engines.append(ScriptedEngine(FakeFabric(time.monotonic), settings["engine_id"]))
        return engines[-1]

    monkeypatch.setattr(actor, "build_engine", build)
    monkeypatch.setattr(actor, "_redirect_output", lambda log: None)
    interval_s = sys.getswitchinterval()
    yield engines
    sys.setswitchinterval(interval_s)
    gc.unfreeze()


def test_starts_at_the_same_time_are_one_start(spec: dict[str, Any], built: list[ScriptedEngine]) -> None:
    node = actor.NodeActor(spec)
    with ThreadPoolExecutor(4) as pool:
        described = list(pool.map(lambda _: node.start(), range(4)))
    assert len(built) == 1
    assert described == [node.start()] * 4
    assert described[0]["role"] == "mixed"
    node.stop()


def test_a_start_that_failed_frees_the_engine_and_can_be_repeated(
    spec: dict[str, Any], built: list[ScriptedEngine]
) -> None:
    node = actor.NodeActor({**spec, "roles": {"mixed": "decode_node.role:NoSuchRole"}})
    with pytest.raises(EngineStartError, match=r"node-0 did not start on 127.0.0.1: .*NoSuchRole"):
        node.start()
    assert built[0].stopped
    node._spec["roles"] = spec["roles"]
    assert node.start()["name"] == "node-0"
    assert [engine.stopped for engine in built] == [True, False]
    node.stop()


def test_steps_are_held_to_the_profile_when_that_is_asked_for(
    spec: dict[str, Any], built: list[ScriptedEngine]
) -> None:
    profile = find_profile("scale", "").read_text("utf-8")
    node = actor.NodeActor({**spec, "step_profile": profile, "hold_steps": True})
    node.start()
    assert isinstance(node._node, Node)
    assert node._node._speed.idle_cost.predict(64) == pytest.approx(
        StepProfile.parse(profile.encode()).cost.predict(64)
    )
    assert built[0].profile_step_times()[1].seconds < node._node._speed.idle_cost.predict(64)
    node.stop()
