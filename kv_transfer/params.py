"""Between our `Handoff` and vLLM's `kv_transfer_params`: pure functions, no vLLM needed.

What `SlosNixlConnector` adds to the params of vLLM's own connector: `kv_bytes`, `lease_s` (time left, set by
the source when it offers), `lease_slot` and `lease_nonce` (which lease word to check, and what it must hold),
`checksums` (of every block, by cache group, where they are computed), and on the way in `pull_deadline_s` and
`lease_left_s`.
"""

from __future__ import annotations

from typing import Any

from kv_transfer.base import Handoff, TransferError

CONNECTOR = "SlosNixlConnector"
DEFAULT_PULL_DEADLINE_S = 10.0
DEFAULT_LEASE_S = 30.0

_NEEDED = (
    "remote_block_ids",
    "remote_engine_id",
    "remote_request_id",
    "remote_host",
    "remote_port",
    "remote_num_tokens",
    "tp_size",
    "kv_bytes",
    "lease_s",
    "lease_slot",
    "lease_nonce",
)


def kv_transfer_config(
    lease_s: float,
    pull_deadline_s: float,
    engine_id: str,
    buffer_device: str = "cpu",
    checksum: bool = True,
) -> dict[str, Any]:
    """The value of vLLM's `kv_transfer_config` for an engine that offers and pulls through us.

    `lease_s` may be a fraction of a second. `buffer_device` is where the KV cache lies ("cpu" or "cuda").
    `checksum`: blocks are compared with what was offered; the same on all engines that pull from each other.
    """
    if lease_s <= 0 or pull_deadline_s <= 0:
        raise ValueError(f"lease_s and pull_deadline_s must be positive, not {lease_s} and {pull_deadline_s}")
    return {
        "kv_connector": CONNECTOR,
        "kv_connector_module_path": "kv_transfer.nixl",
        "kv_role": "kv_both",
        "kv_buffer_device": buffer_device,
        "kv_load_failure_policy": "recompute",
        "engine_id": engine_id,
        "kv_connector_extra_config": {
            "kv_lease_duration": lease_s,
            "pull_deadline_s": pull_deadline_s,
            "checksum": checksum,
        },
    }


def params_for_prefill() -> dict[str, Any]:
    """`kv_transfer_params` of a request that stops after its prefill and offers its KV."""
    return {"do_remote_decode": True, "do_remote_prefill": False}


def params_for_decode(handoff: Handoff, pull_deadline_s: float = DEFAULT_PULL_DEADLINE_S) -> dict[str, Any]:
    """`kv_transfer_params` of a request that pulls `handoff` first, within `pull_deadline_s` from now."""
    return {
        **handoff.params,
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "pull_deadline_s": pull_deadline_s,
        "lease_left_s": handoff.lease_s,
    }


def handoff_from_params(
    request_id: str, params: dict[str, Any] | None, lease_s: float | None = None
) -> Handoff:
    """The handoff in the final output of a prefill.

    `request_id` is the id by which the source's `KvPort.release` will know it; `lease_s` is the time left if
    some of it has passed since the output was made. Raises TransferError when nothing was offered.
    """
    if not params:
        raise TransferError(f"prefill {request_id} ended without an offer: no lease was free, or it has no KV")
    missing = [key for key in _NEEDED if params.get(key) is None]
    if missing:
        raise TransferError(
            f"the offer of {request_id} lacks {', '.join(missing)}: was it made by {CONNECTOR}?"
        )
    return Handoff(
        request_id=request_id,
        source=params["remote_engine_id"],
        num_tokens=params["remote_num_tokens"],
        kv_bytes=params["kv_bytes"],
        lease_s=params["lease_s"] if lease_s is None else lease_s,
        params=dict(params),
    )
