"""Starting and ending a cluster's processes: a real Ray, and quick stand-ins for coordinator and endpoint."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from coordinator.cluster_process import ClusterProcess
from coordinator.keeper import MOST_RESTARTS, Keeper
from coordinator.process_tree import processes_of
from coordinator.run_state import STATE_FILE, RunState, read_state
from engine.errors import ConfigError, EngineError, EngineStartError

pytestmark = pytest.mark.engines

READY = """
import json, sys, time
print("a greeting that is no JSON")
print(json.dumps({"event": "ready", "url": "http://127.0.0.1:1", "address": "tcp://127.0.0.1:1"}), flush=True)
time.sleep(600)
"""
FAILS = """
import json, time
print(json.dumps({"event": "failed", "error": "prefill-0 did not start: no such model"}), flush=True)
time.sleep(600)
"""
ENDS = """
import sys
sys.exit("its last words")
"""
SILENT = """
import time
time.sleep(600)
"""
# Has a child in a session of its own and ignores SIGTERM.
STUBBORN = """
import signal, subprocess
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen(["sleep", "600"], start_new_session=True)
"""


class Starter:
    """Starts clusters whose coordinator and endpoint run the given scripts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.states: list[RunState] = []

    def start(self, coordinator: str, endpoint: str = READY, **overrides: Any) -> ClusterProcess:
        (self.folder / "stand_in_coordinator.py").write_text(coordinator)
        (self.folder / "stand_in_endpoint.py").write_text(endpoint)
        settings = {"name": "stand-in", "endpoint.port": 0, "timeouts.stop_s": 1.0} | overrides
        return ClusterProcess.start(
            "laptop",
            settings,
            self._note,
            coordinator_module="stand_in_coordinator",
            endpoint_module="stand_in_endpoint",
        )

    def _note(self, event: dict[str, Any]) -> None:
        state = read_state(self.folder / "run/stand-in")
        if state is not None:
            self.states.append(state)

    def assert_nothing_left(self) -> None:
        state = self.states[-1]
        assert state.processes
        assert processes_of(state.run_id, state.processes.values()) == []
        assert state.ray_folder is not None
        assert not Path(state.ray_folder).exists()
        assert not (self.folder / "run/stand-in" / STATE_FILE).exists()


@pytest.fixture
def starter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Starter:
    monkeypatch.setenv("SLOSSERVE_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return Starter(tmp_path)


def test_stop_ends_what_ignores_it_and_what_has_left_its_session(starter: Starter) -> None:
    with starter.start(STUBBORN + READY) as cluster:
        assert set(cluster.pids) == {"ray", "coordinator", "endpoint-0"}
        assert cluster.ended() == {}
        assert cluster.base_url == "http://127.0.0.1:1"
    starter.assert_nothing_left()
    cluster.stop()


def test_coordinator_that_died_is_told_and_replaced_while_the_rest_runs_on(starter: Starter) -> None:
    with starter.start(READY) as cluster:
        first = cluster.pids
        _kill(cluster, "coordinator")
        assert set(cluster.ended()) == {"coordinator"}
        told: list[str] = []
        Keeper(cluster, told.append).look()
        assert "coordinator process ended on its own" in told[0]
        assert cluster.ended() == {}
        assert cluster.pids["coordinator"] != first["coordinator"]
        assert cluster.pids["ray"] == first["ray"]
        assert cluster.pids["endpoint-0"] == first["endpoint-0"]
    starter.assert_nothing_left()


def test_what_ends_again_and_again_is_not_started_for_ever_nor_without_ray(starter: Starter) -> None:
    with starter.start(READY) as cluster:
        keeper = Keeper(cluster, lambda text: None)
        for _ in range(MOST_RESTARTS):
            _kill(cluster, "endpoint-0")
            keeper.look()
            assert cluster.ended() == {}
        _kill(cluster, "endpoint-0")
        with pytest.raises(EngineError, match="not started again"):
            keeper.look()
        _kill(cluster, "ray")
        with pytest.raises(EngineError, match="ray process ended"):
            Keeper(cluster, lambda text: None).look()
    starter.assert_nothing_left()


def _kill(cluster: ClusterProcess, label: str) -> None:
    os.kill(cluster.pids[label], signal.SIGKILL)
    deadline_s = time.monotonic() + 5
    while label not in cluster.ended():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("coordinator", "endpoint", "words"),
    [
        (FAILS, READY, ["prefill-0 did not start: no such model"]),
        (READY, ENDS, ["endpoint-0", "its last words"]),
        (SILENT, READY, ["not ready within 6 s", "coordinator"]),
    ],
    ids=["says so", "ends", "says nothing"],
)
def test_start_that_fails_says_why_and_leaves_nothing(
    starter: Starter, coordinator: str, endpoint: str, words: list[str]
) -> None:
    with pytest.raises(EngineStartError) as caught:
        starter.start(coordinator, endpoint, **{"timeouts.ready_s": 6})
    assert all(word in str(caught.value) for word in words), caught.value
    starter.assert_nothing_left()


def test_second_cluster_of_the_same_name_is_refused_and_harms_nothing(starter: Starter) -> None:
    with starter.start(READY) as cluster:
        with pytest.raises(ConfigError, match="runs already"):
            starter.start(READY)
        assert cluster.ended() == {}


def test_port_in_use_is_refused_before_anything_starts(starter: Starter) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} on 127.0.0.1 is in use by .*pid {os.getpid()}"):
            starter.start(READY, **{"endpoint.port": port})
    assert starter.states == []
