"""The KV transfer over NIXL: vLLM loads `SlosNixlConnector` from here, the node takes its `NixlPort`."""

from __future__ import annotations

from kv_transfer.base import KvPort
from kv_transfer.params import handoff_from_params, kv_transfer_config, params_for_decode, params_for_prefill

__all__ = [
    "handoff_from_params",
    "kv_transfer_config",
    "nixl_port",
    "params_for_decode",
    "params_for_prefill",
]


def nixl_port(engine_id: str) -> KvPort:
    """The port of an engine that runs in this process. Raises KeyError if there is none."""
    raise KeyError(engine_id)
