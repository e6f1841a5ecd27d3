"""What a node is told when it is made, and the environment that its process gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coordinator.config import ClusterConfig
from engine.models import resolve_model

ROLES = {
    "prefill": "prefill_node.role:PrefillRole",
    "decode": "decode_node.role:DecodeRole",
    "mixed": "decode_node.role:MixedRole",
}


def node_spec(config: ClusterConfig, run_dir: Path, name: str, role: str, host: str | None) -> dict[str, Any]:
    """The spec of `engine.actor.NodeActor`, of plain values. `host` None: the node's own address in Ray."""
    return {
        "name": name,
        "role": role,
        "host": host,
        "log": str(run_dir / "logs" / f"{name}.log"),
        "engine": engine_settings(config),
        "roles": ROLES,
        "max_waiting": config.endpoint.max_waiting,
        "peer_silent_s": config.timeouts.peer_silent_s,
    }


def engine_settings(config: ClusterConfig) -> dict[str, Any]:
    """Settings of the engine, with its kind. Each process adds its own id and port."""
    engine = config.engine
    return {
        "kind": config.engines,
        "model": resolve_model(config.model),
        "dtype": config.dtype,
        "max_model_len": engine.max_model_len,
        "block_size": engine.block_size,
        "kv_cache_bytes": None if engine.kv_cache_gib is None else int(engine.kv_cache_gib * 2**30),
        "max_num_seqs": engine.max_num_seqs,
        "max_batch_tokens": engine.max_batch_tokens,
        "enable_prefix_caching": engine.enable_prefix_caching,
        "speculative": engine.speculative,
        "lease_s": config.transfer.lease_s,
        "pull_deadline_s": config.transfer.pull_deadline_s,
        "env": engine.env,
    }


def node_environment(config: ClusterConfig) -> dict[str, str]:
    """Variables of every process that imports vLLM; `engine.env` of the configuration has the last word."""
    fixed = {
        "VLLM_NO_USAGE_STATS": "1",
        # The step loop runs inside the node's process, next to its sockets.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    offline = {"HF_HUB_OFFLINE": "1"} if Path(resolve_model(config.model)).exists() else {}
    return {**fixed, **offline, **config.engine.env}
