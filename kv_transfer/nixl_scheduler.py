"""The scheduler's half: opens offers, begins pulls, sets blocks aside that may still be written."""

from __future__ import annotations

import time
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_scheduler import NixlPullConnectorScheduler
from vllm.v1.request import RequestStatus

from kv_transfer.base import PullOutcome
from kv_transfer.nixl_exchange import Exchange
from kv_transfer.params import DEFAULT_LEASE_S, DEFAULT_PULL_DEADLINE_S
from kv_transfer.pulls import OpenPull


class SlosPullScheduler(NixlPullConnectorScheduler):  # type: ignore[misc]
    """vLLM's scheduler half of the pull connector, with lease words, deadlines and outcomes."""

    def __init__(self, vllm_config: Any, engine_id: str, kv_cache_config: Any, exchange: Exchange) -> None:
        super().__init__(vllm_config, engine_id, kv_cache_config)
        extra = vllm_config.kv_transfer_config.get_from_extra_config
        self._exchange = exchange
        self._lease_s = float(extra("kv_lease_duration", DEFAULT_LEASE_S))
        self._pull_deadline_s = float(extra("pull_deadline_s", DEFAULT_PULL_DEADLINE_S))
        # vLLM 0.32 divides whole seconds; a lease under 6 s would give a heartbeat on every step.
        self._heartbeat_interval = self._lease_s / 6
        self._kv_cache_manager: Any = None
        self._requests: dict[str, Any] = {}

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        """The scheduler's cache manager, to set blocks aside with."""
        self._kv_cache_manager = kv_cache_manager

    # Pulls: the target.

    def on_new_request(self, request: Any) -> None:
        """Begin the pull of a request that carries a handoff: its time left becomes a time of this host."""
        params = request.kv_transfer_params
        if params and params.get("do_remote_prefill"):
            now_s = time.monotonic()
            key = request.request_id
            deadline_s = now_s + float(params.get("pull_deadline_s", self._pull_deadline_s))
            pull = OpenPull(
                key,
                source=str(params.get("remote_engine_id")),
                begun_s=now_s,
                deadline_s=deadline_s,
                lease_slot=params.get("lease_slot", 0),
                lease_nonce=params.get("lease_nonce", 0),
                checksums=params.get("checksums") if self._exchange.checksum else None,
            )
            self._exchange.pulls.begin(pull)
            self._requests[key] = request
            if params.get("lease_left_s", 1.0) <= 0:
                self._drop_pull(request, PullOutcome.LEASE_LOST, "the lease had ended before the pull began")
            elif not pull.lease_nonce:
                self._drop_pull(request, PullOutcome.FAILED, "the handoff has no lease word to check")
            elif self._exchange.checksum and pull.checksums is None:
                detail = "the handoff has no checksums: set transfer.checksum alike on all nodes"
                self._drop_pull(request, PullOutcome.FAILED, detail)
            elif short := self._lacks(request, params):
                self._drop_pull(request, PullOutcome.CORRUPT, short)
        super().on_new_request(request)

    def _lacks(self, request: Any, params: dict[str, Any]) -> str:
        """What an offer lacks of the prompt; empty if nothing. (vLLM 0.32 takes it on trust, and asserts.)"""
        tokens = self._get_remote_prefill_token_count(request.num_prompt_tokens)
        if (offered := params["remote_num_tokens"]) < tokens:
            return f"{offered} tokens are on offer, and {tokens} are needed"
        blocks, needed = len(params["remote_block_ids"][0]), -(-tokens // self.block_size)
        if self._exchange.checksum and not self._is_hma_required and blocks < needed:
            return f"{blocks} blocks are on offer, and {needed} are needed"
        return ""

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """Tokens to pull: none when the request waited here for longer than its pull may take."""
        params = request.kv_transfer_params
        if params and params.get("do_remote_prefill"):
            pull = self._exchange.pulls.get(request.request_id)
            if pull is not None and pull.deadline_s <= time.monotonic():
                self._drop_late(request)
        matched: tuple[int, bool] = super().get_num_new_matched_tokens(request, num_computed_tokens)
        return matched

    def _drop_late(self, request: Any) -> None:
        self._drop_pull(request, PullOutcome.LATE, "the deadline passed while the request waited")
        # As vLLM does for a request that is dropped before its pull: tell the source, read nothing.
        self._reqs_need_recv[request.request_id] = (request, [], (), False)
        self._stop_heartbeat(request.request_id)

    def _drop_pull(self, request: Any, outcome: PullOutcome, detail: str) -> None:
        request.kv_transfer_params["do_remote_prefill"] = False
        self._exchange.pulls.end(request.request_id, outcome, time.monotonic(), detail)

    # Offers: the source.

    def request_finished(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        """Offer the KV of a finished prefill; end the pull of a request that was dropped before it."""
        key = request.request_id
        params = request.kv_transfer_params
        if params and params.get("do_remote_prefill"):
            detail = "the request was cancelled before its pull began"
            self._exchange.pulls.end(key, PullOutcome.FAILED, time.monotonic(), detail)
        if self._exchange.pulls.get(key) is None and key not in self._exchange.held:
            self._requests.pop(key, None)
        hold, offered = super().request_finished(request, block_ids)
        if not hold or offered is None:
            return hold, offered
        if request.status is RequestStatus.FINISHED_STOPPED:
            return self._offer_nothing(key)  # the first token was the last: nobody will come for it
        return self._offer(key, offered)

    def _offer(self, key: str, params: dict[str, Any]) -> tuple[bool, dict[str, Any] | None]:
        block_ids = params["remote_block_ids"]
        offer = self._exchange.offers.open(key, sum(len(group) for group in block_ids))
        if offer is None:
            return self._offer_nothing(key)  # without a word the pull could not be checked
        params["kv_bytes"] = self._exchange.worker.kv_bytes(block_ids)
        if self._exchange.checksum:
            params["checksums"] = self._exchange.worker.checksums(block_ids)
        params["lease_s"] = self._lease_s
        params["lease_slot"] = offer.slot
        params["lease_nonce"] = offer.nonce
        return True, params

    def _offer_nothing(self, key: str) -> tuple[bool, None]:
        del self._reqs_need_send[key]
        self._reqs_not_processed.add(key)
        return False, None

    def lease_ends(self) -> dict[str, float]:
        """Offers that the worker has not heard of yet, and when their leases end (time.perf_counter)."""
        ends: dict[str, float] = self._reqs_need_send
        return ends

    # Blocks of pulls that failed with bytes under way.

    def update_connector_output(self, connector_output: Any) -> None:
        """Set aside the blocks of pulls that the worker gave up.

        Called before the scheduler acts on the failed pull, so the request finds itself without blocks and
        is given others to recompute into.
        """
        super().update_connector_output(connector_output)
        for key, held in self._exchange.held.items():
            if held.blocks is None:
                held.blocks = self._kv_cache_manager.pop_blocks_for_free(self._requests[key])
        for key in connector_output.finished_recving or ():
            self._requests.pop(key, None)

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        """Called on every step: free what was set aside and can no longer be written, and let the source have
        its KV back where a request has waited here for too long: its heartbeats would hold that for ever."""
        for key in self._exchange.pulls.late(time.monotonic()):
            request = self._requests.get(key)
            if request is not None and request.kv_transfer_params.get("do_remote_prefill"):
                self._drop_late(request)
        for key, held in list(self._exchange.held.items()):
            if held.blocks is not None and not held.handles:
                self._kv_cache_manager.block_pool.free_blocks(reversed(held.blocks))
                del self._exchange.held[key]
        return super().build_connector_meta(scheduler_output)
