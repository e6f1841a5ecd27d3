"""Everything of a vLLM engine that moves KV, without a model: scheduler, connector, NIXL, real memory.

The "model" writes a number into every place of the KV cache that depends on the prompt and the position, and
"samples" a token that depends on all the numbers it finds. So KV that is not what the prompt gives shows, in
the bytes and in the token.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kv_transfer.base import Handoff, Lease, Link, PeerAddress, Pull

BLOCK_TOKENS = 32
NUM_BLOCKS = 257  # vLLM keeps block 0 for itself
LAYERS = 4
HEADS = 4
HEAD_SIZE = 128


@dataclass(frozen=True, slots=True)
class PagedConfig:
    """One engine without a model."""

    engine_id: str
    port: int
    lease_s: float
    pull_deadline_s: float = 5.0
    ucx_tls: str = "tcp,self"  # reads then need the peer's help: a stopped peer stalls them


class PagedEngine:
    """One engine, stepped by hand."""

    def __init__(self, config: PagedConfig) -> None:
        os.environ.update(
            VLLM_NIXL_SIDE_CHANNEL_HOST="127.0.0.1",
            VLLM_NIXL_SIDE_CHANNEL_PORT=str(config.port),
            VLLM_CPU_KVCACHE_SPACE="1",
            VLLM_NO_USAGE_STATS="1",
            HF_HUB_OFFLINE="1",
            UCX_TLS=config.ucx_tls,
        )
        from kv_transfer.nixl import nixl_port

        self._engine_id = config.engine_id
        self._vllm_config = _vllm_config(config)
        self._kv_config = _kv_cache_config()
        self._caches = _kv_caches()
        self._finished: dict[str, dict[str, Any] | None] = {}
        self._prompts: dict[str, list[int]] = {}
        self._tokens: dict[str, list[int]] = {}
        _start_parallel_state(self._vllm_config)
        self._make_connectors()
        self.port = nixl_port(config.engine_id)

    def _make_connectors(self) -> None:
        from vllm.config import set_current_vllm_config
        from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
        from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.structured_output import StructuredOutputManager

        with set_current_vllm_config(self._vllm_config):
            self._worker = KVConnectorFactory.create_connector(
                self._vllm_config, KVConnectorRole.WORKER, self._kv_config
            )
            self._worker.register_kv_caches(self._caches)
            self._scheduler = Scheduler(
                self._vllm_config,
                self._kv_config,
                StructuredOutputManager(self._vllm_config),
                block_size=BLOCK_TOKENS,
            )
        handshake = self._worker.get_handshake_metadata()
        self._scheduler.connector.set_xfer_handshake_metadata_pp_aware({(0, 0): handshake})

    # What a node does.

    def submit(self, request_id: str, prompt: list[int], kv_transfer_params: dict[str, Any] | None) -> None:
        """Queue a request: one token for a prefill, two for what goes on after it."""
        from vllm import SamplingParams
        from vllm.v1.request import Request

        self._prompts[request_id] = prompt
        extra = {"kv_transfer_params": kv_transfer_params} if kv_transfer_params else None
        offers = bool(kv_transfer_params and kv_transfer_params["do_remote_decode"])
        params = SamplingParams(temperature=0, max_tokens=1 if offers else 2, extra_args=extra)
        params.update_from_generation_config({}, eos_token_id=None)
        self._scheduler.add_request(Request(request_id, prompt, params, None))

    def offer(self, request_id: str, prompt: list[int]) -> Handoff:
        """Prefill and offer."""
        from kv_transfer.nixl import handoff_from_params, params_for_prefill

        self.submit(request_id, prompt, params_for_prefill())
        while request_id not in self._finished:
            self.step()
        return handoff_from_params(request_id, self._finished[request_id])

    def submit_pull(self, request_id: str, prompt: list[int], handoff: Handoff, deadline_s: float) -> None:
        """Queue a request that pulls."""
        from kv_transfer.nixl import params_for_decode

        self.submit(request_id, prompt, params_for_decode(handoff, deadline_s))

    def abort(self, request_id: str) -> None:
        """Drop a request."""
        from vllm.v1.request import RequestStatus

        self._scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)

    def step(self, look: bool = True) -> None:
        """One step of the engine; without `look` the worker does not see what has become of its transfers."""
        from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

        plan = self._scheduler.schedule()
        self._worker.bind_connector_metadata(plan.kv_connector_metadata)
        tokens = [
            [token]
            for token in (self._run(request_id, n) for request_id, n in plan.num_scheduled_tokens.items())
        ]
        self._worker.start_load_kv(None)
        connector_output = KVConnectorOutput()
        if look:
            results = self._worker.get_transfer_results(plan.finished_req_ids)
            connector_output.finished_sending = results.finished_sending
            connector_output.finished_recving = results.finished_recving
            connector_output.failed_recving = results.failed_recving
            connector_output.invalid_block_ids = self._worker.get_block_ids_with_load_errors()
        ids = list(plan.num_scheduled_tokens)
        output = ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={request_id: index for index, request_id in enumerate(ids)},
            sampled_token_ids=tokens,
            kv_connector_output=None if connector_output.is_empty() else connector_output,
        )
        for outputs in self._scheduler.update_from_output(plan, output).values():
            for one in outputs.outputs:
                self._tokens.setdefault(one.request_id, []).extend(one.new_token_ids)
                if one.finish_reason is not None:
                    self._finished[one.request_id] = one.kv_transfer_params

    def has_work(self) -> bool:
        """Whether stepping can change anything."""
        return bool(self._scheduler.has_requests())

    def tokens(self, request_id: str) -> list[int]:
        """The tokens of a request so far."""
        return self._tokens.get(request_id, [])

    def prompt(self, request_id: str) -> list[int]:
        """The prompt of a request."""
        return self._prompts[request_id]

    def used_blocks(self) -> int:
        """Blocks that anything holds."""
        return NUM_BLOCKS - 1 - int(self._scheduler.kv_cache_manager.block_pool.get_num_free_blocks())

    def overwrite_free_blocks(self) -> None:
        """What the next requests would do: compute something else into every block that is free."""
        pool = self._scheduler.kv_cache_manager.block_pool
        free = [block.block_id for block in pool.free_block_queue.get_all_free_blocks()]
        for cache in self._caches.values():
            cache[free] = -1.0

    # What may go wrong.

    def flip_a_bit(self, block: int) -> None:
        """In one word of one layer."""
        import torch

        self._caches["layers.2"][block].view(torch.int16)[1, 5, 7] ^= 1

    def shorten_reads(self, short: bool) -> None:
        """Let the last piece of every read be left out, or not any more."""
        from kv_transfer.nixl_exchange import find_exchange

        agent = find_exchange(self._engine_id).worker.nixl_wrapper
        agent.__dict__.pop("make_prepped_xfer", None)
        if short:
            whole = agent.make_prepped_xfer

            def shortened(operation: str, here: Any, ours: Any, there: Any, theirs: Any, **more: Any) -> Any:
                return whole(operation, here, ours[:-1], there, theirs[:-1], **more)

            agent.make_prepped_xfer = shortened

    # What a node asks its port.

    def take_pulls(self) -> list[Pull]:
        return self.port.take_pulls()

    def release(self, request_id: str) -> bool:
        return self.port.release(request_id)

    def leases(self) -> list[Lease]:
        return self.port.leases()

    def held_blocks(self) -> int:
        return self.port.held_blocks()

    def address(self) -> PeerAddress:
        return self.port.address()

    def probe(self, peer: PeerAddress) -> Link:
        return self.port.probe(peer)

    # The "model".

    def _run(self, request_id: str, num_new: int) -> int:
        request = self._scheduler.requests[request_id]
        blocks = self._scheduler.kv_cache_manager.get_block_ids(request_id)[0]
        end = request.num_computed_tokens
        for position in range(end - num_new, end):
            value = expected_value(request.all_token_ids, position)
            for cache in self._caches.values():
                cache[blocks[position // BLOCK_TOKENS], :, position % BLOCK_TOKENS, :] = value
        total = 0.0
        for position in range(end):
            block = blocks[position // BLOCK_TOKENS]
            for cache in self._caches.values():
                total += float(cache[block, :, position % BLOCK_TOKENS, :].float().mean())
        return int(total) % 30000


def expected_value(token_ids: Sequence[int], position: int) -> float:
    """What the KV of a position holds: exact in bfloat16."""
    return float((token_ids[position] * 7 + position) % 251)


def expected_tokens(prompt: list[int]) -> list[int]:
    """The two tokens of a prompt whose KV is right."""
    token_ids = list(prompt)
    for _ in range(2):
        total = sum(expected_value(token_ids, position) for position in range(len(token_ids)))
        token_ids.append(int(total * LAYERS) % 30000)
    return token_ids[-2:]


def _vllm_config(config: PagedConfig) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    from kv_transfer.nixl import kv_transfer_config

    shape = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HEADS * HEAD_SIZE,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "vocab_size": 30000,
        "max_position_embeddings": 4096,
    }
    folder = Path(tempfile.mkdtemp(prefix="paged-"))
    (folder / "config.json").write_text(json.dumps(shape))
    args = EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        dtype="bfloat16",
        block_size=BLOCK_TOKENS,
        max_model_len=4096,
        max_num_batched_tokens=4096,
        enable_prefix_caching=False,
        async_scheduling=False,
        enforce_eager=True,
        kv_transfer_config=kv_transfer_config(config.lease_s, config.pull_deadline_s, config.engine_id),
    )
    made = args.create_engine_config()
    made.cache_config.kv_cache_layout = "LBHNC"
    made.cache_config.num_gpu_blocks = NUM_BLOCKS
    # Every engine makes its own folder; the model must still count as the same one.
    made.model_config.model = "paged"
    return made


def _kv_cache_config() -> Any:
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

    spec = FullAttentionSpec(
        block_size=BLOCK_TOKENS, num_kv_heads=HEADS, head_size=HEAD_SIZE, dtype=torch.bfloat16
    )
    layers = [f"layers.{layer}" for layer in range(LAYERS)]
    return KVCacheConfig(NUM_BLOCKS, [], [KVCacheGroupSpec(layers, spec)], kv_cache_layout="LBHNC")


def _kv_caches() -> dict[str, Any]:
    import torch

    shape = (NUM_BLOCKS, HEADS, BLOCK_TOKENS, 2 * HEAD_SIZE)
    return {f"layers.{layer}": torch.zeros(shape, dtype=torch.bfloat16) for layer in range(LAYERS)}


def _start_parallel_state(vllm_config: Any) -> None:
    from vllm.config import set_current_vllm_config
    from vllm.distributed.parallel_state import init_distributed_environment, initialize_model_parallel

    with set_current_vllm_config(vllm_config), tempfile.NamedTemporaryFile() as store:
        init_distributed_environment(1, 0, f"file://{store.name}", 0, "gloo")
        initialize_model_parallel(1, 1)
