"""What two engines tell each other before the first transfer, in vLLM's own handshake message.

Ours rides along as one more field of the agent's metadata, which vLLM's decoder skips.
"""

from __future__ import annotations

import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import zmq
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import GET_META_MSG, NixlHandshakePayload
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.utils import zmq_ctx
from vllm.utils.network_utils import make_zmq_path

from kv_transfer.base import PeerAddress, TransferError
from kv_transfer.nixl_memory import PeerMemory

_FIELD = "slosserve"


def with_memory(payload: NixlHandshakePayload, memory: PeerMemory) -> NixlHandshakePayload:
    """The handshake message of this engine, with the place of its lease words and probe area."""
    metadata = msgspec.msgpack.decode(payload.agent_metadata_bytes)
    metadata[_FIELD] = asdict(memory)
    return NixlHandshakePayload(
        compatibility_hash=payload.compatibility_hash,
        agent_metadata_bytes=msgspec.msgpack.encode(metadata),
    )


def ask_peer(peer: PeerAddress, compat_hash: str, timeout_s: float) -> PeerMemory:
    """Ask a peer for its memory. Returns or raises TransferError within `timeout_s`, also if it hangs."""
    metadata = _metadata(_query(peer, timeout_s), peer, compat_hash)
    if metadata.get("engine_id") != peer.engine_id:
        raise TransferError(
            f"{peer.host}:{peer.port} is now engine {metadata.get('engine_id')}, not {peer.engine_id}: "
            "the engine that made the offer is gone"
        )
    if _FIELD not in metadata:
        raise TransferError(f"engine {peer.engine_id} does not run our connector: it has no lease words")
    return PeerMemory(**metadata[_FIELD])


def whereabouts(thread_name: str) -> str:
    """What the threads whose names begin so are doing, for the message about a handshake that does not end."""
    stacks = sys._current_frames()
    innermost = [
        f"{frame.f_code.co_name}, line {frame.f_lineno} of {Path(frame.f_code.co_filename).name}"
        for thread in threading.enumerate()
        if thread.name.startswith(thread_name) and (frame := stacks.get(thread.ident or 0)) is not None
    ]
    return "; ".join(innermost) or "no thread is at it"


def _query(peer: PeerAddress, timeout_s: float) -> bytes:
    timeout_ms = max(int(timeout_s * 1000), 1)
    with zmq_ctx(zmq.REQ, make_zmq_path("tcp", peer.host, peer.port)) as socket:
        socket.setsockopt(zmq.RCVTIMEO, timeout_ms)
        socket.setsockopt(zmq.SNDTIMEO, timeout_ms)
        try:
            socket.send(msgspec.msgpack.encode((GET_META_MSG, 0, 0)))
            parts: list[bytes] = socket.recv_multipart()
        except zmq.Again as error:
            where = f"engine {peer.engine_id} at {peer.host}:{peer.port}"
            raise TransferError(f"{where} did not answer within {timeout_s:g} s: dead or stopped") from error
    return parts[0]


def _metadata(message: bytes, peer: PeerAddress, compat_hash: str) -> dict[str, Any]:
    try:
        payload = msgspec.msgpack.decode(message, type=NixlHandshakePayload)
        metadata: dict[str, Any] = msgspec.msgpack.decode(payload.agent_metadata_bytes)
    except msgspec.MsgspecError as error:
        raise TransferError(f"engine {peer.engine_id} speaks another handshake: {error}") from error
    if payload.compatibility_hash != compat_hash:
        raise TransferError(
            f"engine {peer.engine_id} does not match: version, model, dtype, cache dtype and attention "
            "backend must be the same on both sides"
        )
    return metadata
