"""A cluster that cannot start says which engine, why, and the last lines of its log; and leaves nothing."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from coordinator.cluster_process import ClusterProcess
from coordinator.run_state import run_directory
from engine.errors import ConfigError, EngineStartError


def test_an_engine_that_fails_to_start_is_named_with_the_last_lines_of_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "no_endpoint.py").write_text("import time; time.sleep(600)")  # only the node is looked at
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    settings = {"name": "test-bad-engine", "endpoint.port": 0, "engine.block_size": 7}
    with pytest.raises(EngineStartError) as failure:
        ClusterProcess.start("colocated", settings, endpoint_module="no_endpoint")
    words = str(failure.value)
    assert "mixed-0" in words
    assert "block size" in words
    assert "last lines of its log" in words
    mark = str(run_directory("test-bad-engine"))
    left = [
        process
        for process in psutil.process_iter(["cmdline"])
        if mark in " ".join(process.info["cmdline"] or [])
    ]
    assert not left


def test_a_model_that_does_not_exist_is_refused_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match="no-such-model"):
        ClusterProcess.start("colocated", {"name": "test-no-model", "model": "./no-such-model"})
