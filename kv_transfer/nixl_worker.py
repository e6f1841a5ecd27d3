"""The worker's half: reads KV with a deadline, checks the lease word and the bytes, then tells the source.

Order of a pull: read the KV, without a notification; when all of it is in, read the lease word; only if it
holds the number of the offer, and the blocks have the checksums that they had there, is the pull complete and
the source notified.
"""

from __future__ import annotations

import os
import time
from typing import Any

from vllm.distributed import nixl_utils
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker import NixlPullConnectorWorker

from kv_transfer import faults
from kv_transfer.base import PeerAddress, PullOutcome, TransferError
from kv_transfer.checksum import BlockSums, Plane, plane
from kv_transfer.nixl_agent import WatchedAgent, is_under_way, resting_progress
from kv_transfer.nixl_checks import Verdict, WordChecks
from kv_transfer.nixl_exchange import Exchange, HeldPull
from kv_transfer.nixl_greeting import ask_peer, whereabouts, with_memory
from kv_transfer.nixl_memory import PeerMemory
from kv_transfer.params import DEFAULT_LEASE_S
from kv_transfer.pulls import difference

HANDSHAKE_TIMEOUT_S = 2.0
_OUTCOMES = {
    Verdict.STANDS: PullOutcome.PULLED,
    Verdict.LOST: PullOutcome.LEASE_LOST,
    Verdict.FAILED: PullOutcome.FAILED,
}


class SlosPullWorker(NixlPullConnectorWorker):  # type: ignore[misc]
    """vLLM's worker half of the pull connector, with lease words, deadlines and outcomes."""

    def __init__(self, vllm_config: Any, engine_id: str, kv_cache_config: Any, exchange: Exchange) -> None:
        if vllm_config.parallel_config.world_size != 1:
            raise NotImplementedError(
                "leases are checked by one worker in the process of the scheduler: TP=PP=1"
            )
        cores = os.sched_getaffinity(0)
        with resting_progress(nixl_utils.NixlWrapper):
            super().__init__(vllm_config, engine_id, kv_cache_config)
        # On CPUs vLLM 0.32 leaves this thread, which runs the model too, on the last core of the machine:
        # two engines on one machine would share it.
        os.sched_setaffinity(0, cores)
        lease_s = float(self.kv_transfer_config.get_from_extra_config("kv_lease_duration", DEFAULT_LEASE_S))
        # vLLM 0.32 divides whole seconds; a lease of 1 s would be extended by 0.
        self._lease_extension = lease_s * 2 / 3
        self._exchange = exchange
        self.nixl_wrapper: Any = WatchedAgent(self.nixl_wrapper, exchange.pulls.moved)
        self._checks = WordChecks(exchange.memory, self.nixl_wrapper)
        self.xfer_handshake_metadata: Any = None
        self._peers: dict[str, PeerMemory] = {}
        self._greeting: dict[str, Any] = {}  # handshakes that `reaches` has begun
        self._why: dict[str, tuple[PullOutcome, str]] = {}
        self._sums: BlockSums | None = None

    # Start-up and handshake.

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Register lease words and probe area first, so that the handshake metadata cover them."""
        self._registered_descs.append(self._exchange.memory.register(self.nixl_wrapper, self.nixl_backends))
        super().register_kv_caches(kv_caches)
        if self._exchange.checksum:
            self._sums = BlockSums(self._planes())
            self._sums.of([[0]])  # compiles it, which is not for the first handoff to wait for
        self.xfer_handshake_metadata = with_memory(
            self.xfer_handshake_metadata, self._exchange.memory.as_peer()
        )

    def kv_bytes(self, block_ids: Any) -> int:
        """Bytes of KV in these blocks (one list of ids per cache group)."""
        per_logical = self._physical_blocks_per_logical_kv_block
        total = 0
        for region, group in enumerate(self.region_group_ids):
            blocks = block_ids[group] if group >= 0 else [block for ids in block_ids for block in ids]
            total += len(blocks) * per_logical * self.block_len_per_layer[region]
        return total

    def checksums(self, block_ids: Any) -> list[list[int]]:
        """The checksums of these blocks, by cache group."""
        assert self._sums is not None
        return self._sums.of(block_ids)

    def _planes(self) -> list[Plane]:
        """Where the words of a block lie, in the order of vLLM's regions, which is that of the layers."""
        if self._has_mamba:
            raise NotImplementedError(
                "checksums cover attention only, and this model has state-space layers: "
                "set transfer.checksum to false"
            )
        caches = self.host_xfer_buffers or self.device_kv_caches
        per_logical = self._physical_blocks_per_logical_kv_block
        planes = []
        for region, address in enumerate(self.kv_caches_base_addr[self.engine_id][self.tp_rank]):
            block, stride = self.block_len_per_layer[region], self.block_stride_per_layer[region]
            # A block of the scheduler may be several of the kernel's: each has its own place in the sum.
            planes += [
                plane(
                    caches[self.region_names[region]],
                    address + part * stride,
                    self.region_num_blocks[region] // per_logical,
                    block,
                    stride * per_logical,
                    self.region_group_ids[region],
                )
                for part in range(per_logical)
            ]
        return planes

    def _nixl_handshake(
        self, host: str, port: int, remote_tp_size: int, expected_engine_id: str, *rest: Any
    ) -> Any:
        """As vLLM's, after a question of our own, which takes a bounded time with a peer that hangs.

        Runs on the one thread that all handshakes of this engine share.
        """
        peer = PeerAddress(expected_engine_id, host, port, remote_tp_size)
        memory = ask_peer(peer, self.compat_hash, HANDSHAKE_TIMEOUT_S)
        greeted = super()._nixl_handshake(host, port, remote_tp_size, expected_engine_id, *rest)
        self._peers[expected_engine_id] = memory
        return greeted

    def _cleanup_remote_engine(self, engine_id: str, *, log_eviction: bool = True) -> None:
        super()._cleanup_remote_engine(engine_id, log_eviction=log_eviction)
        self._peers.pop(engine_id, None)

    def reaches(self, peer: PeerAddress) -> bool:
        """Whether a peer has been greeted. Begins to, without waiting. Raises TransferError if that failed."""
        key = peer.engine_id
        handshake = self._greeting.get(key)
        if handshake is None:
            handshake = self._ensure_handshake(key, peer.host, peer.port, peer.tp_size)
            if handshake is None:
                return True
            self._greeting[key] = handshake
        if not handshake.done():
            return False
        error = handshake.exception()
        if error is None and key not in self._remote_agents:
            return False  # the future is done before its callback has entered the agent
        del self._greeting[key]
        if error is not None:
            raise TransferError(f"no link to engine {key}: {error}") from error
        return True

    def reach(self, peer: PeerAddress, timeout_s: float) -> tuple[str, PeerMemory]:
        """The agent's name and the memory of a peer, greeting it if need be. Raises TransferError."""
        give_up_s = time.monotonic() + timeout_s
        handshake = self._ensure_handshake(peer.engine_id, peer.host, peer.port, peer.tp_size)
        if handshake is not None:
            try:
                handshake.result(timeout=timeout_s)
            except Exception as error:
                raise TransferError(f"no link to engine {peer.engine_id}: {error or 'timed out'}") from error
        # The future is done before its callback has entered the agent.
        while peer.engine_id not in self._remote_agents:
            if time.monotonic() > give_up_s:
                raise TransferError(f"no link to engine {peer.engine_id}: the handshake took {timeout_s:g} s")
            time.sleep(0.001)
        return self._remote_agents[peer.engine_id][0, 0], self._peers[peer.engine_id]

    # A pull, from start to outcome.

    def start_load_kv(self, metadata: Any) -> None:
        """Start the pulls of this step; those that need no bytes are over at once."""
        now_s = time.monotonic()
        for key in metadata.reqs_to_recv:
            self._exchange.pulls.started(key, now_s)
        super().start_load_kv(metadata)
        for key, meta in metadata.reqs_to_recv.items():
            if not meta.awaiting_kvs:
                self._exchange.pulls.end(key, PullOutcome.CACHED, time.monotonic())

    def _read_blocks_for_req(self, req_id: str, meta: Any) -> None:
        awaited = meta.awaiting_kvs or any(meta.local_block_ids)
        if awaited and self._recving_metadata.get(req_id) is not meta:
            return  # it failed while it waited for the handshake; its blocks are another's by now
        super()._read_blocks_for_req(req_id, meta)

    def _read_blocks(self, **read: Any) -> bool:
        key = read["request_id"]
        self.nixl_wrapper.watch(key)
        try:
            posted: bool = super()._read_blocks(**read)
        finally:
            held_back = self.nixl_wrapper.stop_watching()
        agent = self._remote_agents[read["dst_engine_id"]][0, read["read_spec"].remote_rank]
        self._pending_recv_notifs.setdefault(key, []).extend((agent, notif) for notif in held_back)
        return posted

    def _pop_done_transfers(self, transfers: dict[str, list[Any]]) -> tuple[set[str], set[str]]:
        """Pulls that are over: read, checked, or failed. vLLM asks once per step."""
        done, failed = super()._pop_done_transfers(transfers)
        for key in [key for key in done if key not in failed and key not in self._recv_failures]:
            if self._pending_recv_notifs.get(key):
                done.discard(key)
                if not self._start_check(key):
                    done.add(key)
                    failed.add(key)
        for key, (verdict, detail) in self._checks.poll().items():
            done.add(key)
            outcome = _OUTCOMES[verdict]
            if verdict is Verdict.STANDS and (detail := self._differs(key)):
                outcome = PullOutcome.CORRUPT
            if outcome is not PullOutcome.PULLED:
                self._why[key] = outcome, detail
                failed.add(key)
        self._give_up_late(transfers, done)
        return done, failed

    def _start_check(self, key: str) -> bool:
        pull = self._exchange.pulls.get(key)
        if pull is None:
            self._why[key] = PullOutcome.FAILED, "vLLM read for a request that never began a pull"
            return False
        try:
            address = self._peers[pull.source].word_address(pull.lease_slot)
            self._checks.start(key, self._remote_agents[pull.source][0, 0], address, pull.lease_nonce)
        except Exception as error:  # noqa: BLE001 - NIXL has one exception class per status
            self._why[key] = PullOutcome.FAILED, f"the lease word could not be read: {error}"
            return False
        return True

    def _differs(self, key: str) -> str:
        """What is wrong with the bytes that a pull has brought; empty if nothing is."""
        pull, blocks = self._exchange.pulls.get(key), self._recving_metadata[key].local_block_ids
        if pull is None:
            return "nobody waits for it"
        if pull.kv_bytes < (wanted := self.kv_bytes(blocks)):
            return f"{pull.kv_bytes} of {wanted} bytes came"
        if self._sums is not None and faults.asked_for(faults.CORRUPT):
            faults.flip_a_bit(self._sums, blocks)
        return "" if pull.checksums is None else difference(pull.checksums, self.checksums(blocks))

    def _give_up_late(self, transfers: dict[str, list[Any]], done: set[str]) -> None:
        """Fail what is past its deadline. Reads under way cannot be recalled: their blocks are set aside.

        NIXL 1.5 lets go of a handle in progress, but the bytes still come when a stopped peer wakes up.
        """
        for key in self._exchange.pulls.late(time.monotonic()):
            if key not in self._recving_metadata or key in done:
                continue
            handles = transfers.pop(key, None)
            if handles:
                self._exchange.held[key] = HeldPull(handles)
            if handles:
                what = "bytes were under way"
            elif key in self._checks:
                what = "the check was under way"
            else:
                what = f"the handshake was under way ({whereabouts('vllm-nixl-handshake-initiator')})"
            self._checks.abandon(key)
            # What failed before, and could not let go of its blocks, keeps its own reason.
            self._why.setdefault(key, (PullOutcome.LATE, f"the deadline passed while {what}"))
            self._recv_failures.add(key)

    def _log_failure(self, failure_type: str, req_id: str | None, *args: Any, **kwargs: Any) -> None:
        if req_id is not None and self._exchange.pulls.get(req_id) is not None:
            error = kwargs.get("error")
            self._why.setdefault(req_id, (PullOutcome.FAILED, f"{failure_type}: {error or 'see the log'}"))
        super()._log_failure(failure_type, req_id, *args, **kwargs)

    # The end of a step.

    def get_transfer_results(self) -> Any:
        """What ended in this step. No block leaves here as free while its lease word stands."""
        self._let_go_of_held()
        results = super().get_transfer_results()
        self._end_withdrawn(results.finished_sending)
        for key in results.finished_sending:
            self._exchange.offers.close(key)
        for key in results.finished_recving:
            self._end_pull(key, failed=key in results.failed_recving)
        return results

    def _end_pull(self, key: str, *, failed: bool) -> None:
        pull = self._exchange.pulls.get(key)
        outcome, detail = self._why.pop(key, (PullOutcome.FAILED, "the transfer failed"))
        if not failed:
            moved = pull is not None and pull.kv_bytes > 0
            outcome, detail = (PullOutcome.PULLED if moved else PullOutcome.CACHED), ""
        self._exchange.pulls.end(key, outcome, time.monotonic(), detail)

    def _end_withdrawn(self, finished_sending: set[str]) -> None:
        for key in list(self._exchange.offers.withdrawn):
            # On the step that made the offer the worker has not heard of the lease yet: then on the next one.
            if self._reqs_to_send.pop(key, None) is not None:
                self._reqs_to_process.discard(key)
                self.consumer_notification_counts_by_req.pop(key, None)
                self.expected_consumer_notifications_by_req.pop(key, None)
                finished_sending.add(key)

    def _let_go_of_held(self) -> None:
        for held in self._exchange.held.values():
            held.handles = [handle for handle in held.handles if not self._is_over(handle)]

    def _is_over(self, handle: Any) -> bool:
        """Whether a read that was given up can bring no more bytes."""
        if is_under_way(self.nixl_wrapper, handle):
            return False
        return bool(self._try_release_xfer_handle("", handle))

    def lease_ends(self) -> dict[str, float]:
        """Leases, and when they end (time.perf_counter)."""
        ends: dict[str, float] = self._reqs_to_send
        return ends

    def shutdown(self) -> None:
        """Let go of reads that were given up too; the process, and with it their memory, is about to end."""
        if hasattr(self, "_exchange"):
            for held in self._exchange.held.values():
                held.handles = [
                    handle for handle in held.handles if not self._try_release_xfer_handle("", handle)
                ]
        super().shutdown()

    def _engines_with_inflight_transfers(self) -> set[str]:
        busy: set[str] = super()._engines_with_inflight_transfers()
        checked = (self._recving_metadata[key].remote for key in self._recving_metadata if key in self._checks)
        return busy | {remote.engine_id for remote in checked if remote is not None}
