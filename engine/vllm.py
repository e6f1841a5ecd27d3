"""The real engine: vLLM's EngineCore in this process, stepped by the caller.

vLLM reads its environment when it is imported, so it is imported in `start`, after we have set it.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from engine.base import (
    BatchPlan,
    Composer,
    Engine,
    EngineInfo,
    Output,
    StepReport,
    StepResult,
    Usage,
    Work,
)
from engine.dtype import dtype_here
from engine.errors import EngineError, EngineStartError, MissingHook, RequestError
from engine.models import lacks_weights
from engine.ports import interface_of
from engine.prefix_log import PrefixLog
from engine.vllm_codec import (
    decode_output,
    decode_sampling,
    encode_payload,
    encode_sampling,
)
from engine.vllm_runner import go_on_after, keep_seeds
from kv_transfer.base import KvPort, TransferError

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.engine.core import EngineCore

    from engine.vllm_scheduler import PlannedScheduler

__all__ = [
    "VllmEngine",
    "VllmEngineConfig",
    "decode_output",
    "decode_sampling",
    "encode_payload",
    "encode_sampling",
]

logger = logging.getLogger(__name__)

PROFILE_PREFILL_TOKENS = (16, 64, 256, 1024)
PROFILE_DECODE_SEQS = (1, 4, 16)
PROFILE_REPEATS = 3
PROFILE_BUDGET_S = 1.5  # after this every batch is measured once only
# Set on a CPU unless the environment says otherwise. Binding threads fails where a sandbox hides the cores.
CPU_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "UCX_TLS": "shm,tcp,self",
    # vLLM compiles a kernel at the first request for logprobs: more than a minute in which nothing else runs.
    "TORCH_COMPILE_DISABLE": "1",
}
# What a failed start says, and what helps.
REMEDIES = (
    (("address already in use", "address in use"), "Give it another side_channel_port"),
    (("memory", "kv cache"), "Lower kv_cache_bytes, num_blocks or max_model_len, or free memory"),
    (
        ("not a local folder", "repo id", "does not exist", "no such file", "config.json"),
        "Check the name or path of the model (`slosserve model make` makes a small one)",
    ),
)


@dataclass(frozen=True, slots=True)
class VllmEngineConfig:
    """How an engine is started.

    `kv_cache_bytes` and `num_blocks` size the KV cache (the second wins; vLLM decides if both are None).
    `checksum`: KV that is pulled is compared with what was offered; the same on all engines.
    `side_channel_host` and `side_channel_port` are where peers ask for this engine's NIXL metadata.
    `reasoning_parser`: vLLM's name of who knows where thinking ends; a grammar holds from there on.
    `enforce_eager` None: eager on a CPU, graphs on a GPU. `extra_args` go to vLLM's EngineArgs as they
    are, and win; `env` goes to the environment.
    """

    model: str
    engine_id: str
    dtype: str = "auto"
    max_model_len: int | None = None
    block_size: int | None = 32
    kv_cache_bytes: int | None = None
    num_blocks: int | None = None
    max_num_seqs: int = 64
    max_batch_tokens: int = 1024
    enable_prefix_caching: bool = True
    speculative: dict[str, Any] | None = None
    lease_s: float = 30.0
    pull_deadline_s: float = 10.0
    checksum: bool = True
    side_channel_host: str = "127.0.0.1"
    side_channel_port: int = 5600
    structured_outputs_backend: str = "xgrammar"
    reasoning_parser: str | None = None
    enforce_eager: bool | None = None
    async_scheduling: bool = False
    seed: int = 0
    extra_args: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)

    def environment(self) -> dict[str, str]:
        """What vLLM and NIXL must find in the environment. Those of `env` win."""
        return {
            "VLLM_HOST_IP": self.side_channel_host,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # else vLLM's scheduler is out of our reach
            "VLLM_NIXL_SIDE_CHANNEL_HOST": self.side_channel_host,
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(self.side_channel_port),
            "VLLM_NO_USAGE_STATS": "1",
            **self.env,
        }


class VllmEngine(Engine):
    """One vLLM replica behind the engine contract. One per process: vLLM keeps global state."""

    def __init__(self, config: VllmEngineConfig) -> None:
        self._config = config
        self._core: EngineCore | None = None
        self._scheduler: PlannedScheduler | None = None
        self._port: KvPort | None = None
        self._works: dict[str, Work] = {}
        self._vocab_size = 0
        self._max_model_len = 0

    def start(self) -> EngineInfo:
        """Load the model and warm up. Raises EngineStartError with the cause and what to do about it."""
        os.environ.update(self._config.environment())
        if _is_cpu_build():
            for name, value in (CPU_ENVIRONMENT | _net_devices(self._config.side_channel_host)).items():
                os.environ.setdefault(name, value)
            if self._config.kv_cache_bytes is not None:
                # vLLM 0.32 lets it win over the argument, and it counts whole GiB.
                del os.environ["VLLM_CPU_KVCACHE_SPACE"]
        try:
            self._core = _build_core(self._config)
            keep_seeds(self._core)
            go_on_after(self._core, self._core.scheduler.said)
        except MissingHook:
            raise
        except Exception as error:
            advice = f"{_cause(error)} {_remedy(error, self._config)}"
            raise EngineStartError(f"engine {self._config.engine_id} did not start: {advice}") from error
        self._scheduler = self._core.scheduler
        model_config = self._core.vllm_config.model_config
        self._vocab_size = model_config.get_vocab_size()
        self._max_model_len = model_config.max_model_len
        return self.describe()

    def describe(self) -> EngineInfo:
        """What this engine is. Raises EngineError unless it runs."""
        core, scheduler = self._running()
        config = core.vllm_config
        return EngineInfo(
            engine=_engine_name(),
            model=self._config.model,
            engine_id=self._config.engine_id,
            block_size=scheduler.block_size,
            num_blocks=scheduler.num_blocks,
            max_model_len=self._max_model_len,
            max_num_seqs=config.scheduler_config.max_num_seqs,
            max_batch_tokens=scheduler.max_num_scheduled_tokens,
            kv_bytes_per_token=scheduler.kv_bytes_per_token,
            transport=_transport(),
            max_draft_tokens=scheduler.num_spec_tokens,
        )

    def submit(self, work: Work) -> None:
        """Queue a work. Raises RequestError if its id is taken or the engine could never run it."""
        from vllm.v1.engine import EngineCoreRequest

        core, _ = self._running()
        self._check(work)
        sampling, reasoning = self._sampling(work)
        request = EngineCoreRequest(
            request_id=work.work_id,
            prompt_token_ids=list(work.prompt_token_ids),
            mm_features=None,
            sampling_params=sampling,
            pooling_params=None,
            arrival_time=time.time(),
            lora_request=None,
            cache_salt=work.cache_salt,
            data_parallel_rank=None,
            **reasoning,
        )
        try:
            prepared, wave = core.preprocess_add_request(request)
        except (ValueError, TypeError) as error:
            raise RequestError(f"vLLM does not take work {work.work_id}: {error}") from error
        if work.said_token_ids:
            self._running()[1].go_on(prepared, work.said_token_ids)
        core.add_request(prepared, wave)
        self._works[work.work_id] = work
        if work.session is not None:
            self._running()[1].sessions[work.work_id] = work.session

    def _check(self, work: Work) -> None:
        _, scheduler = self._running()
        length = len(work.prompt_token_ids) + len(work.said_token_ids)
        if work.work_id in scheduler.requests:
            raise RequestError(f"there is a work {work.work_id} already")
        if not work.prompt_token_ids:
            raise RequestError("the prompt is empty")
        if length >= self._max_model_len:
            raise RequestError(
                f"the prompt has {length} tokens, and the context of {self._config.model} holds "
                f"{self._max_model_len} with the answer: shorten the prompt",
                reason="context_length",
            )
        if length > scheduler.num_blocks * scheduler.block_size:
            raise RequestError(f"the KV cache does not hold the {length} tokens of the prompt")
        if work.said_token_ids and (work.offer_kv or len(work.said_token_ids) >= work.max_tokens):
            raise RequestError("nothing is left to be said after what was said")
        if min(work.prompt_token_ids) < 0 or max(work.prompt_token_ids) >= self._vocab_size:
            raise RequestError(f"a token id is outside the vocabulary of {self._vocab_size}")

    def _sampling(self, work: Work) -> tuple[SamplingParams, dict[str, Any]]:
        """For vLLM, and what its request is told of the thinking."""
        from vllm.sampling_params import SamplingParams

        from kv_transfer.nixl import params_for_decode, params_for_prefill

        if work.offer_kv and not work.sampling:
            # Neutral: a grammar, min_tokens or a stop token could end the prefill without an offer.
            neutral = SamplingParams(
                temperature=0.0,
                max_tokens=1,
                ignore_eos=True,
                detokenize=False,
                extra_args={"kv_transfer_params": params_for_prefill()},
            )
            return neutral, {}
        params, reasoning = decode_sampling(work.sampling)
        if work.offer_kv:
            params.max_tokens = 1
            params.min_tokens = min(params.min_tokens, 1)
            params.extra_args = {**(params.extra_args or {}), "kv_transfer_params": params_for_prefill()}
            return params, reasoning
        if work.said_token_ids and params.prompt_logprobs is not None:
            params.prompt_logprobs = None  # told already, before the first of what was said
        if work.handoff is not None:
            transfer = params_for_decode(work.handoff, work.pull_deadline_s)
            params.extra_args = {**(params.extra_args or {}), "kv_transfer_params": transfer}
        return params, reasoning

    def cancel(self, work_ids: Sequence[str], *, ended: bool = False) -> None:
        """Drop works and free their blocks: queued, running, pulling, or offered under a lease."""
        core, scheduler = self._running()
        known = [key for key in work_ids if key in scheduler.requests]
        if ended:
            scheduler.end(known)
        else:
            core.abort_requests(known)
        for key in known:
            self._works.pop(key, None)
            if key in scheduler.requests:
                # Offered: the lease ends here. (Or its pull is in flight: its blocks come free after it.)
                self.kv.release(key)

    def step(self, compose: Composer) -> StepResult:
        """Run one batch under the plan of `compose`. Returns at once, with no report, if nothing can run."""
        core, scheduler = self._running()
        scheduler.composer = compose
        outputs, executed = core.step_fn()
        core.post_step(executed)
        results = [
            result
            for per_client in (outputs or {}).values()
            for output in per_client.outputs
            if (result := self._result(output)) is not None
        ]
        report, batched = scheduler.take_report()
        return StepResult(results, report, batched, begun=executed and self.overlaps)

    def _result(self, output: EngineCoreOutput) -> Output | None:
        work = self._works.get(output.request_id)
        if work is None:
            return None
        if output.finish_reason is not None:
            del self._works[output.request_id]
        reason = None if output.finish_reason is None else str(output.finish_reason)
        stats = output.prefill_stats
        result = Output(
            work_id=output.request_id,
            token_ids=output.new_token_ids,
            finish_reason=reason,
            stop_reason=output.stop_reason,
            payload=encode_payload(output),
            cached_tokens=None if stats is None else stats.num_cached_tokens,
            error="vLLM gave up on it; its log says why" if reason == "error" else None,
        )
        return _offered(result, output) if work.offer_kv and reason == "length" else result

    @property
    def overlaps(self) -> bool:
        """Asynchronous scheduling: two batches are under way at a time."""
        return bool(self._running()[1].scheduler_config.async_scheduling)

    def has_work(self) -> bool:
        """Whether vLLM has anything to run, to collect or to free."""
        return bool(self._running()[1].has_requests())

    def usage(self) -> Usage:
        """KV blocks and queues now."""
        _, scheduler = self._running()
        running, waiting = scheduler.get_request_counts()
        return Usage(scheduler.used_blocks(), scheduler.num_blocks, running, waiting)

    def kept(self) -> dict[str, int]:
        """Tokens of KV that are kept for each session."""
        _, scheduler = self._running()
        counts: dict[str, int] = scheduler.kept.counts()
        return {session: blocks * int(scheduler.block_size) for session, blocks in counts.items()}

    def kept_tokens(self) -> int:
        """Tokens of KV that are kept for sessions in all."""
        _, scheduler = self._running()
        return int(scheduler.kept.held_blocks * scheduler.block_size)

    def give_up(self, sessions: Sequence[str]) -> None:
        """Keep nothing for these any more."""
        for session in sessions:
            self._running()[1].kept.give_up(session)

    @property
    def kv(self) -> KvPort:
        """This engine's end of NIXL. Raises KeyError before `start`."""
        if self._port is None:
            from kv_transfer.nixl import nixl_port

            self._port = nixl_port(self._config.engine_id)
        return self._port

    @property
    def prefixes(self) -> PrefixLog:
        """What vLLM's prefix cache holds, from its KV events."""
        log: PrefixLog = self._running()[1].kv_events.log
        return log

    def reset_prefix_cache(self) -> bool:
        """Forget cached prefixes; only what is kept, and False, while a block is in use (as vLLM 0.32)."""
        self.give_up(list(self.kept()))
        scheduler = self._running()[1]
        done = bool(scheduler.reset_prefix_cache())
        if done:
            scheduler.kv_events.clear()
        return done

    def stop(self) -> None:
        """Free everything. The engine cannot be started again."""
        if self._core is None:
            return
        core, self._core, self._scheduler, self._port = self._core, None, None, None
        self._works.clear()
        core.shutdown()

    def profile_step_times(self) -> list[StepReport]:
        """Measure some prefills and decodes, about a second on a small model.

        Leaves no block and no cached prefix behind. Raises EngineError if there is work.
        """
        _, scheduler = self._running()
        if self.has_work():
            raise EngineError("step times can only be measured on an idle engine")
        longest = min(scheduler.max_num_scheduled_tokens, self._max_model_len - 1)
        sizes = sorted({min(tokens, longest) for tokens in PROFILE_PREFILL_TOKENS})
        batches = sorted({min(seqs, scheduler.max_num_running_reqs) for seqs in PROFILE_DECODE_SEQS})
        profile = _Profile(self, self._vocab_size)
        profile.run([longest], 1)  # the first large batch pays for its buffers
        reports = [profile.usual([size], 1, size) for size in sizes]
        reports += [profile.usual([2] * seqs, 3, seqs) for seqs in batches]
        self.reset_prefix_cache()
        return reports

    def _running(self) -> tuple[EngineCore, PlannedScheduler]:
        if self._core is None or self._scheduler is None:
            raise EngineError(f"engine {self._config.engine_id} is not running")
        return self._core, self._scheduler


class _Profile:
    """Works of our own, to see what steps cost."""

    def __init__(self, engine: VllmEngine, vocab_size: int) -> None:
        self._engine = engine
        self._random = random.Random(0)
        self._vocab_size = vocab_size
        self._ends_s = time.monotonic() + PROFILE_BUDGET_S

    def usual(self, prompt_lengths: Sequence[int], max_tokens: int, tokens: int) -> StepReport:
        """The middle one of the steps of `tokens` in some runs.

        (Promises are made of it, and the quickest was 7 to 11 % short of what such steps took later.)
        """
        reports: list[StepReport] = []
        for _ in range(PROFILE_REPEATS):
            reports += [report for report in self.run(prompt_lengths, max_tokens) if report.tokens == tokens]
            if time.monotonic() > self._ends_s:
                break
        return sorted(reports, key=lambda report: report.seconds)[len(reports) // 2]

    def run(self, prompt_lengths: Sequence[int], max_tokens: int) -> list[StepReport]:
        """The steps in which prompts of these lengths are prefilled and decoded to the end."""
        from vllm.sampling_params import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        sampling = encode_sampling(params)
        for index, length in enumerate(prompt_lengths):
            prompt = [self._random.randrange(self._vocab_size) for _ in range(length)]
            self._engine.submit(Work(f"profile-{index}", prompt, sampling, max_tokens))
        reports = []
        while self._engine.has_work():
            report = self._engine.step(lambda _: BatchPlan()).report
            if report is not None:
                reports.append(report)
        return reports


def _build_core(config: VllmEngineConfig) -> EngineCore:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.executor import Executor

    from engine.vllm_scheduler import check_hooks

    check_hooks()
    vllm_config = EngineArgs(**_engine_args(config, current_platform)).create_engine_config()
    if current_platform.is_cpu():
        _prepare_torch(vllm_config.model_config.enforce_eager)
    return EngineCore(vllm_config, Executor.get_class(vllm_config), log_stats=False)


def _prepare_torch(eager: bool) -> None:
    """Settings that torch reads once, when it is imported, and it may have been imported before us."""
    import torch
    import torch._dynamo

    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdigit():
        torch.set_num_threads(int(threads))
    # Even an eager vLLM 0.32 compiles what ranks logprobs: the first request that asks for them would stop
    # the engine for seconds.
    torch._dynamo.config.disable = eager


def _engine_args(config: VllmEngineConfig, platform: Any) -> dict[str, Any]:
    from vllm.config.kv_events import KVEventsConfig

    from kv_transfer.nixl import kv_transfer_config

    on_cpu = platform.is_cpu()
    scheduler = "PlannedAsyncScheduler" if config.async_scheduling and not on_cpu else "PlannedScheduler"
    sized = {
        "max_model_len": config.max_model_len,
        "block_size": config.block_size,
        "kv_cache_memory_bytes": config.kv_cache_bytes,
        "num_gpu_blocks_override": config.num_blocks,
        "speculative_config": config.speculative,
        "load_format": "dummy" if lacks_weights(config.model) else None,
    }
    return {
        "model": config.model,
        "dtype": dtype_here(config.dtype, on_cpu=on_cpu),
        "seed": config.seed,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_batch_tokens,
        "enable_prefix_caching": config.enable_prefix_caching,
        "enable_chunked_prefill": True,
        "kv_events_config": KVEventsConfig(
            enable_kv_cache_events=config.enable_prefix_caching, publisher="null"
        ),
        "enforce_eager": on_cpu if config.enforce_eager is None else config.enforce_eager,
        "distributed_executor_backend": "uni",
        "async_scheduling": config.async_scheduling,
        "scheduler_cls": f"engine.vllm_scheduler.{scheduler}",
        "structured_outputs_config": {
            "backend": config.structured_outputs_backend,
            "disable_any_whitespace": True,
            "reasoning_parser": config.reasoning_parser or "",
        },
        "kv_transfer_config": kv_transfer_config(
            config.lease_s, config.pull_deadline_s, config.engine_id, platform.device_type, config.checksum
        ),
        **{name: value for name, value in sized.items() if value is not None},
        **config.extra_args,
    }


def _offered(result: Output, output: EngineCoreOutput) -> Output:
    """The end of a prefill whose KV is offered. Without an offer its token is not said: it starts anew."""
    from kv_transfer.nixl import handoff_from_params

    try:
        handoff = handoff_from_params(output.request_id, output.kv_transfer_params)
    except TransferError as error:
        return msgspec.structs.replace(
            result, token_ids=(), payload=None, finish_reason="error", error=str(error)
        )
    return msgspec.structs.replace(result, handoff=handoff)


def _net_devices(host: str) -> dict[str, str]:
    """UCX listens on every interface unless it is told on which. A machine with GPUs has others for KV."""
    interface = interface_of(host)
    return {} if interface is None else {"UCX_NET_DEVICES": interface}


def _is_cpu_build() -> bool:
    return _version_of("vllm-cpu") is not None


def _engine_name() -> str:
    return f"vllm-cpu {_version_of('vllm-cpu')}" if _is_cpu_build() else f"vllm {_version_of('vllm')}"


def _transport() -> str:
    return f"nixl {_version_of('nixl') or _version_of('nixl-cu12')}"


def _version_of(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _cause(error: BaseException) -> str:
    """The innermost error, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def _remedy(error: BaseException, config: VllmEngineConfig) -> str:
    text = f"{error} {_cause(error)}".lower()
    if config.model.startswith(("/", ".", "~")) and not Path(config.model).expanduser().is_dir():
        return f"There is no folder {config.model}; `slosserve model make` makes a small model"
    return next(
        (help_text for words, help_text in REMEDIES if any(word in text for word in words)),
        "The log above this line has vLLM's own account",
    )
