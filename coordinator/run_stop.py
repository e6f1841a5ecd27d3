"""Ending a run for certain: from the process that started it, or from any other."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from coordinator import spread
from coordinator.cluster import connect, disconnect, kill_node, list_nodes
from coordinator.config import ClusterConfig
from coordinator.process_tree import end, end_one, is_alive, processes_of, wait_gone
from coordinator.ray_process import RayHandle, stop_ray
from coordinator.run_state import (
    COORDINATOR,
    ENDPOINT,
    KEEPER,
    RAY,
    STATE_FILE,
    RunState,
    read_state,
    run_directory,
)
from engine.errors import SlosserveError

ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def stop_run(state: RunState, run_dir: Path, config: ClusterConfig) -> None:
    """End what a run has started, from whatever process, and remove its state file."""
    grace_s = config.timeouts.stop_s
    endpoints = [label for label in state.processes if label.startswith(ENDPOINT)]
    labels = [KEEPER, *endpoints, COORDINATOR]  # the one that starts the others again goes first
    # Found before the first is ended: a child whose parent is gone is harder to tell.
    everyone = processes_of(state.run_id, state.processes.values())
    for label in labels:
        if label in state.processes:
            end_one(state.processes[label], grace_s)
    if state.ray_folder is None and state.ray_address is not None:
        _kill_nodes_in_joined_ray(config, state.ray_address)
    else:
        folder = Path(state.ray_folder) if state.ray_folder else None
        stop_ray(RayHandle(state.ray_address or "", state.processes.get(RAY), folder), grace_s)
    end(everyone, grace_s)
    end(processes_of(state.run_id), grace_s)
    (run_dir / STATE_FILE).unlink(missing_ok=True)


def stop_from_outside(state: RunState) -> list[str]:
    """End a run that another process started: ask a foreground owner first, then make sure of it.

    Returns what still runs, by label; nothing, normally.
    """
    run_dir = run_directory(state.name)
    config = ClusterConfig.read(run_dir)
    if state.owner is not None and is_alive(state.owner):
        os.kill(state.owner.pid, signal.SIGTERM)
        wait_gone(state.owner, 4 * config.timeouts.stop_s)
    state = read_state(run_dir) or state
    stop_run(state, run_dir, config)
    return [label for label, process in state.processes.items() if is_alive(process)]


@contextmanager
def deaf_to_interrupts() -> Iterator[None]:
    """A second ctrl-C must not cut the clean-up short."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kept = {number: signal.signal(number, signal.SIG_IGN) for number in ENDINGS}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def _kill_nodes_in_joined_ray(config: ClusterConfig, address: str) -> None:
    joined = config.model_copy(update={"ray": config.ray.model_copy(update={"address": address})})
    try:
        connect(joined)
        try:
            for node in list_nodes(joined):
                kill_node(node)
            spread.remove()
        finally:
            disconnect()
    except SlosserveError as error:
        print(f"nodes could not be ended: {error}. `ray stop` on every host ends them.", file=sys.stderr)
