"""vLLM's own OpenAI server as a child process: the same engine, asked without a cluster in between.

The engine has the arguments of a node and its KV connector, so that what differs is who asks and who schedules.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil

from coordinator.config import ClusterConfig
from coordinator.endpoint.serve import front_arguments
from coordinator.listeners import free_ports
from coordinator.process_events import tail
from coordinator.process_tree import ProcessId, end, is_alive, spawn
from engine.errors import EngineStartError
from engine.models import lacks_weights, resolve_model
from kv_transfer.params import kv_transfer_config

# The vllm console script of the CPU build looks for a distribution named vllm and fails.
MODULE = "vllm.entrypoints.launchers.api_server.entry"
POLL_S = 0.2


@contextmanager
def own_server(config: ClusterConfig, log: Path, env: Mapping[str, str] | None = None) -> Iterator[str]:
    """The base URL of vLLM's server with the engine arguments of a node of `config`; it ends with the block.

    Raises EngineStartError with the last lines of its log.
    """
    port = free_ports(1)
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    command = [sys.executable, "-m", MODULE, *arguments(config, port)]
    environment = {**_environment(config), **(env or {})}
    process = spawn(command, environment=environment, output=log, errors=log, die_with_parent=True)
    try:
        base_url = f"http://{config.endpoint.host}:{port}"
        _wait_ready(process, base_url, config.timeouts.node_start_s, log)
        yield base_url
    finally:
        if is_alive(process):
            end([psutil.Process(process.pid)], config.timeouts.stop_s)


def arguments(config: ClusterConfig, port: int) -> list[str]:
    """Of vLLM's server, with the engine of a node of `config`."""
    engine, model = config.engine, resolve_model(config.model)
    on_gpu = engine.num_gpus > 0
    asked = [
        *front_arguments(config, model, port),
        f"--block-size={engine.block_size}",
        "--distributed-executor-backend=uni",
        # On a GPU as vLLM comes: with graphs, and the next step scheduled while one runs.
        *([] if on_gpu else ["--enforce-eager", "--no-async-scheduling"]),
        *(["--load-format=dummy"] if lacks_weights(model) else []),
        "--enable-prefix-caching" if engine.enable_prefix_caching else "--no-enable-prefix-caching",
    ]
    transfer = config.transfer
    device = "cuda" if on_gpu else "cpu"
    connector = kv_transfer_config(
        transfer.lease_s, transfer.pull_deadline_s, "own-server", device, transfer.checksum
    )
    asked.append(f"--kv-transfer-config={json.dumps(connector)}")
    if engine.speculative is not None:
        asked.append(f"--speculative-config={json.dumps(engine.speculative)}")
    if engine.kv_cache_gib is not None:
        asked.append(f"--kv-cache-memory-bytes={int(engine.kv_cache_gib * 2**30)}")
    return asked


def _environment(config: ClusterConfig) -> dict[str, str]:
    # Without the last one the CPU platform gives the one worker a process of its own.
    side_channel = {"VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_ports(1))}
    fixed = {
        **side_channel,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    return {**os.environ, **config.engine.env, **fixed}


def _wait_ready(process: ProcessId, base_url: str, timeout_s: float, log: Path) -> None:
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        if not is_alive(process):
            raise EngineStartError(f"vLLM's own server ended while starting. Its log ({log}):\n{tail(log, 20)}")
        try:
            if httpx.get(f"{base_url}/health", timeout=1.0).status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass
        time.sleep(POLL_S)
    raise EngineStartError(f"vLLM's own server was not up within {timeout_s:.0f} s. Its log: {log}")
