"""The KV transfer over NIXL: vLLM loads `SlosNixlConnector` from here, and the node takes its `NixlPort`.

from kv_transfer.nixl import kv_transfer_config, nixl_port
engine = LLMEngine(..., kv_transfer_config=kv_transfer_config(lease_s=30, pull_deadline_s=10, engine_id="n1"))
port = nixl_port("n1")
"""

from __future__ import annotations

import time
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector import NixlPullConnector

from kv_transfer.base import KvPort, Lease, Link, PeerAddress, Pull, TransferError
from kv_transfer.nixl_exchange import Exchange, exchange_of, find_exchange, forget_exchange
from kv_transfer.nixl_probe import probe_link
from kv_transfer.nixl_scheduler import SlosPullScheduler
from kv_transfer.nixl_worker import SlosPullWorker
from kv_transfer.params import handoff_from_params, kv_transfer_config, params_for_decode, params_for_prefill

__all__ = [
    "NixlPort",
    "SlosNixlConnector",
    "handoff_from_params",
    "kv_transfer_config",
    "nixl_port",
    "params_for_decode",
    "params_for_prefill",
]

PROBE_TIMEOUT_S = 10.0


class SlosNixlConnector(NixlPullConnector):  # type: ignore[misc]
    """vLLM's pull connector. Leases and bytes are checked after the read, and pulls have a deadline."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        # Not NixlPullConnector's own, which would make a second NIXL agent.
        super(NixlPullConnector, self).__init__(vllm_config, role, kv_cache_config)
        exchange = exchange_of(self.engine_id)
        exchange.checksum = bool(vllm_config.kv_transfer_config.get_from_extra_config("checksum", True))
        if role == KVConnectorRole.SCHEDULER:
            self.connector_scheduler = exchange.scheduler = SlosPullScheduler(
                vllm_config, self.engine_id, kv_cache_config, exchange
            )
        else:
            self.connector_worker = exchange.worker = SlosPullWorker(
                vllm_config, self.engine_id, kv_cache_config, exchange
            )
        self._exchange = exchange

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        """Called by the scheduler once it has its cache manager."""
        super().bind_kv_cache_manager(kv_cache_manager)
        self._exchange.scheduler.bind_kv_cache_manager(kv_cache_manager)

    def has_pending_push_work(self) -> bool:
        """Keeps the engine stepping while blocks are set aside for bytes that may still arrive."""
        return bool(self._exchange.held)

    def shutdown(self) -> None:
        """End both halves; the port is gone with them."""
        super().shutdown()
        forget_exchange(self.engine_id)


class NixlPort(KvPort):
    """The node's end of one engine's connector. Use it from the thread that steps the engine."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    def address(self) -> PeerAddress:
        """Where peers shake hands with this engine."""
        scheduler = self._exchange.scheduler
        host, port = scheduler.side_channel_host, scheduler.side_channel_port
        return PeerAddress(self._exchange.engine_id, host, port, scheduler.transfer_tp_size)

    def leases(self) -> list[Lease]:
        """Leases that stand, the shortest first."""
        now_s = time.perf_counter()
        ends = {**self._exchange.scheduler.lease_ends(), **self._exchange.worker.lease_ends()}
        leases = [
            Lease(key, offer.num_blocks, max(ends[key] - now_s, 0.0))
            for key in ends
            if (offer := self._exchange.offers.get(key)) is not None
        ]
        return sorted(leases, key=lambda lease: lease.left_s)

    def release(self, request_id: str) -> bool:
        """End a lease, by the id that vLLM's scheduler has (`remote_request_id` in the handoff)."""
        return self._exchange.offers.withdraw(request_id)

    def take_pulls(self) -> list[Pull]:
        """Pulls that ended since the last call."""
        return self._exchange.pulls.take()

    def held_blocks(self) -> int:
        """Blocks set aside for late bytes."""
        return sum(len(held.blocks or ()) for held in self._exchange.held.values())

    def reaches(self, peer: PeerAddress) -> bool:
        """Whether the handshake with a peer is over; it goes on in a thread of vLLM's. Never blocks."""
        return bool(self._exchange.worker.reaches(peer))

    def probe(self, peer: PeerAddress) -> Link:
        """Read small and large buffers from the peer. Ends within 10 s."""
        if peer.engine_id == self._exchange.engine_id:
            raise TransferError(f"engine {peer.engine_id} has no link to itself")
        return probe_link(self._exchange.worker, self._exchange.memory.as_peer(), peer, PROBE_TIMEOUT_S)


def nixl_port(engine_id: str) -> NixlPort:
    """The port of an engine of this process. Raises TransferError if no engine here has that id."""
    exchange = find_exchange(engine_id)
    if exchange is None or exchange.scheduler is None or exchange.worker is None:
        raise TransferError(f"no engine {engine_id} runs in this process with the connector {__name__}")
    return NixlPort(exchange)
