"""vLLM's scheduler, carrying out our plans: the only file that touches its internals (written against 0.32).

vLLM decides what fits (blocks, slots, transfers); the plan decides what is tried, in which order and how much
of it. A plan is made by the composer that `VllmEngine.step` leaves on the scheduler.
"""

from __future__ import annotations

import inspect
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.request_queue import FCFSRequestQueue
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager
from vllm.version import __version__ as vllm_version

from engine.base import UNPLANNED, BatchPlan, Composer, Seq, StepReport
from engine.errors import MissingHook
from engine.kept_blocks import KeptBlocks
from engine.vllm_kv_events import KvEvents


@dataclass(frozen=True, slots=True)
class Hook:
    """An internal of vLLM that we rely on. `parameters` it must accept; `uses` it must refer to."""

    owner: type
    name: str
    parameters: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()


_ENDED_WELL = (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)
_QUEUES = ("kv_holding_waiting", "waiting")
_REQUEST_FIELDS = (
    "status",
    "num_prompt_tokens",
    "num_computed_tokens",
    "num_output_placeholders",
    "spec_token_ids",
    "kv_transfer_params",
    "prefill_stats",
)
_SCHEDULER_FIELDS = (
    "requests",
    "running",
    "waiting",
    "kv_holding_waiting",
    "finished_recving_kv_req_ids",
    "max_num_running_reqs",
    "max_num_scheduled_tokens",
    "num_spec_tokens",
    "dynamic_sd_lookup",
    "kv_cache_manager",
    "kv_cache_config",
    "requires_kv_delivery",
    "structured_output_manager",
    "use_v2_model_runner",
)


def _hooks() -> tuple[Hook, ...]:
    called = ("_reserve_prefill_lookahead", "_preempt_request", "_update_after_schedule")
    read = ("max_num_scheduled_tokens", "dynamic_sd_lookup", "kv_holding_waiting")
    return (
        Hook(Scheduler, "__init__", uses=_SCHEDULER_FIELDS),
        Hook(Scheduler, "schedule", ("throttle_prefills",), (*called, *read)),
        Hook(
            Scheduler,
            "_reserve_prefill_lookahead",
            ("request", "num_computed_tokens", "num_new_tokens"),
        ),
        Hook(Scheduler, "_preempt_request", ("request", "timestamp", "drop_stale_output")),
        Hook(Scheduler, "_update_after_schedule", ("scheduler_output",)),
        Hook(Scheduler, "update_from_output", ("scheduler_output", "model_runner_output")),
        Hook(Scheduler, "_free_blocks", ("request",), ("requests",)),
        Hook(StructuredOutputManager, "accept_tokens", ("request", "new_token_ids")),
        Hook(Request, "append_output_token_ids", ("token_ids",)),
        Hook(Scheduler, "has_requests"),
        Hook(KVCacheManager, "allocate_slots", ("request", "num_new_tokens")),
        Hook(KVCacheManager, "get_blocks", ("request_id",)),
        Hook(BlockPool, "touch", ("blocks",)),
        Hook(BlockPool, "free_blocks", ("ordered_blocks",)),
        Hook(Scheduler, "get_request_counts"),
        Hook(AsyncScheduler, "_update_after_schedule", ("scheduler_output",), ("spec_token_ids",)),
        Hook(Request, "__init__", uses=_REQUEST_FIELDS),
        Hook(FCFSRequestQueue, "__iter__"),
        Hook(FCFSRequestQueue, "extend"),
        Hook(FCFSRequestQueue, "clear"),
    )


def check_hooks() -> None:
    """Raise MissingHook, naming it, if the installed vLLM lacks an internal that plans need."""
    for hook in _hooks():
        trouble = _trouble(hook)
        if trouble:
            raise MissingHook(
                f"vLLM {vllm_version} {trouble}, which slosserve's scheduler relies on. "
                f"Install vLLM 0.32.0, or adapt engine/vllm_scheduler.py to this version."
            )


def _trouble(hook: Hook) -> str | None:
    label = f"{hook.owner.__name__}.{hook.name}"
    function = getattr(hook.owner, hook.name, None)
    if function is None or getattr(function, "__isabstractmethod__", False):
        return f"has no {label}"
    if hook.parameters:
        accepted = inspect.signature(function).parameters
        lacking = [name for name in hook.parameters if name not in accepted]
        if lacking:
            return f"has a {label} without the parameter {', '.join(lacking)}"
    if hook.uses:
        lacking = [name for name in hook.uses if name not in function.__code__.co_names]
        if lacking:
            return f"has a {label} that does not use {', '.join(lacking)}"
    return None


@dataclass(slots=True)
class _Step:
    """A scheduled batch that is not reported yet. Counts as in StepReport."""

    started_s: float
    batched: Collection[str] = ()
    tokens: int = 0
    seqs: int = 0
    decode_seqs: int = 0
    decode_context_tokens: int = 0
    prefill_work: float = 0.0
    prefill_kv_tokens: int = 0
    drafted_tokens: int = 0
    preempted: int = 0
    planning_s: float = 0.0

    def add(self, computed_tokens: int, new_tokens: int, drafts: int) -> None:
        """Count a sequence of the batch. A decode is one token (and its drafts) over KV that is there."""
        self.tokens += new_tokens
        self.seqs += 1
        self.drafted_tokens += drafts
        if computed_tokens > 0 and new_tokens - drafts == 1:
            self.decode_seqs += 1
            self.decode_context_tokens += computed_tokens
        else:
            self.prefill_work += new_tokens * (computed_tokens + new_tokens / 2)
            self.prefill_kv_tokens += computed_tokens

    def report(self, seconds: float, accepted_tokens: int) -> StepReport:
        """The finished step."""
        return StepReport(
            seconds=seconds,
            tokens=self.tokens,
            seqs=self.seqs,
            decode_seqs=self.decode_seqs,
            decode_context_tokens=self.decode_context_tokens,
            prefill_work=self.prefill_work,
            drafted_tokens=self.drafted_tokens,
            accepted_tokens=accepted_tokens,
            preempted=self.preempted,
            prefill_kv_tokens=self.prefill_kv_tokens,
            planning_s=self.planning_s,
        )


class PlannedScheduler(Scheduler):  # type: ignore[misc]
    """vLLM's scheduler with a composer. Without one, or with an empty plan, it is vLLM's own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.composer: Composer | None = None
        publisher: Any = self.kv_event_publisher
        self.kv_events: KvEvents = KvEvents(publisher)
        self.kv_event_publisher: Any = self.kv_events
        one_group = len(self.kv_cache_config.kv_cache_groups) == 1
        self.kept = KeptBlocks(self.kv_cache_manager.block_pool, chains=one_group)
        self.sessions: dict[str, str] = {}  # of works whose blocks are kept when they have ended
        self.said: dict[str, Sequence[int]] = {}  # of works that go on from elsewhere, until the runner knows
        self._grammars_behind: dict[str, list[int]] = {}  # of those, what their grammars have not heard yet
        self._allocate = self.kv_cache_manager.allocate_slots
        self.kv_cache_manager.allocate_slots = self._allocate_or_give_up
        self._plan = BatchPlan()
        self._held: frozenset[str] = frozenset()
        self._pulls: set[str] = set()  # that the present plan lets begin
        self._blocked: str | None = None
        self._step: _Step | None = None
        self._unreported: deque[_Step] = deque()
        self._reports: deque[tuple[StepReport, Collection[str]]] = deque()
        self._last_end_s = 0.0
        if self.num_spec_tokens > 0 and self.dynamic_sd_lookup is None:
            # vLLM 0.32 pads a waiting request with one token left (every pulled one) to 1 + num_spec_tokens,
            # whatever the plan says, and asserts on it when clipped. With a table by batch size it does not.
            self.dynamic_sd_lookup: list[int] | None = [self.num_spec_tokens] * (self.max_num_running_reqs + 1)

    def schedule(self, throttle_prefills: bool = False) -> Any:
        """Compose a plan, carry it out, and leave the queues in the order in which they were."""
        self._step = _Step(time.monotonic())
        plan = self.composer(self.seqs()) if self.composer is not None else UNPLANNED
        if plan is UNPLANNED:
            return self._unplanned(throttle_prefills)
        held = plan.skip.union(key for key, tokens in plan.chunk_tokens.items() if tokens < 1)
        self._plan, self._held = plan, held
        self._pulls = {r.request_id for r in self.waiting if _starts_pull(r) and r.request_id not in held}
        carried_out = _CarriedOut(self, plan, held)
        vllms = _Timed(partial(super().schedule, throttle_prefills))
        output = carried_out.run(vllms)
        self._blocked = carried_out.blocked
        self._step.planning_s = time.monotonic() - self._step.started_s - vllms.seconds
        self._step.preempted = len(output.preempted_req_ids or ())
        self._unreported.append(self._step)
        return output

    def _unplanned(self, throttle_prefills: bool) -> Any:
        """Nothing was planned: vLLM's own batch, without laying anything over its queues."""
        assert self._step is not None
        self._plan, self._held, self._pulls, self._blocked = UNPLANNED, frozenset(), set(), None
        self._step.planning_s = time.monotonic() - self._step.started_s
        output = super().schedule(throttle_prefills)
        self._step.preempted = len(output.preempted_req_ids or ())
        self._unreported.append(self._step)
        return output

    def seqs(self) -> list[Seq]:
        """What a plan can be about: running and waiting, without those whose KV or grammar is on its way."""
        waiting = [*self.kv_holding_waiting, *self.waiting]
        seqs = [_seq(request) for request in self.running]
        for request in waiting:
            blocked = request.request_id == self._blocked
            if blocked or self.can_run(request):
                seqs.append(_seq(request, running=False, blocked=blocked))
        return seqs

    def can_run(self, request: Request) -> bool:
        """Whether a waiting request has its KV and its grammar, if it waited for any."""
        if request.status == RequestStatus.WAITING_FOR_REMOTE_KVS:
            return request.request_id in self.finished_recving_kv_req_ids
        if request.status == RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR:
            structured = request.structured_output_request
            return structured is not None and structured.grammar is not None
        return True

    def _reserve_prefill_lookahead(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        tokens: int = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        if request.request_id in self._held:
            return 0  # vLLM goes on with the next running request; waiting ones that are held are not asked
        planned = self._plan.chunk_tokens.get(request.request_id)
        if planned is None and request.request_id in self._pulls and not _starts_pull(request):
            return 0  # its pull was given up a moment ago, for being late: the next plan has it as a prompt
        if self._pulls and tokens > 1 and num_computed_tokens + tokens < request.num_tokens:
            tokens -= 1  # vLLM starts pulls only while a token of the batch is left
        return tokens if planned is None else min(tokens, planned)

    def _update_after_schedule(self, scheduler_output: Any) -> None:
        if self._plan.draft_tokens is not None:
            # Set here and not after schedule(): the asynchronous scheduler reads it in this call.
            scheduler_output.num_spec_tokens_to_schedule = min(self._plan.draft_tokens, self.num_spec_tokens)
        drafts = scheduler_output.scheduled_spec_decode_tokens
        assert self._step is not None
        self._step.batched = scheduler_output.num_scheduled_tokens.keys()
        for request_id in self._grammars_behind.keys() & scheduler_output.num_scheduled_tokens.keys():
            # Its grammar is there now, and has not been asked yet.
            said_token_ids = self._grammars_behind.pop(request_id)
            self.structured_output_manager.accept_tokens(self.requests[request_id], said_token_ids)
        for request_id, new_tokens in scheduler_output.num_scheduled_tokens.items():
            computed = self.requests[request_id].num_computed_tokens
            self._step.add(computed, new_tokens, len(drafts.get(request_id, ())))
        super()._update_after_schedule(scheduler_output)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """vLLM's own, and a report of the batch. Batches end in the order in which they were scheduled."""
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        step = self._unreported.popleft()
        end_s = time.monotonic()
        # With batches in flight one begins on the device when the one before it ends.
        started_s = max(step.started_s, self._last_end_s)
        self._last_end_s = end_s
        if step.tokens > 0:
            accepted = _accepted_tokens(scheduler_output, model_runner_output)
            self._reports.append((step.report(end_s - started_s, accepted), step.batched))
        return outputs

    def go_on(self, request: Request, said_token_ids: Sequence[int]) -> None:
        """Let a request that is about to be added go on after what was said of it elsewhere."""
        request.append_output_token_ids(list(said_token_ids))
        request.prefill_stats = None  # for these vLLM asserts that nothing is cached beyond the prompt
        self.said[request.request_id] = said_token_ids
        if request.use_structured_output:
            self._grammars_behind[request.request_id] = list(said_token_ids)

    def end(self, request_ids: Sequence[str]) -> None:
        """These have said all that is wanted of them: they end as by a stop of their own."""
        self.finish_requests(request_ids, RequestStatus.FINISHED_STOPPED)

    def _free_blocks(self, request: Request) -> None:
        self.said.pop(request.request_id, None)
        self._grammars_behind.pop(request.request_id, None)
        session = self.sessions.pop(request.request_id, None)
        if session is not None and request.status in _ENDED_WELL:
            groups = self.kv_cache_manager.get_blocks(request.request_id).blocks
            full = [block for group in groups for block in group if block.block_hash is not None]
            self.kept.keep(session, full)
        super()._free_blocks(request)

    def _allocate_or_give_up(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's own; where memory is short, sessions that are idle give up theirs."""
        blocks = self._allocate(*args, **kwargs)
        while blocks is None and self.kept.give_up_oldest():
            blocks = self._allocate(*args, **kwargs)
        return blocks

    def take_report(self) -> tuple[StepReport | None, Collection[str]]:
        """The report of the batch that ended in this step, if one did, and who was in it."""
        return self._reports.popleft() if self._reports else (None, ())

    def used_blocks(self) -> int:
        """Blocks that works and leases hold. A cached prefix is free, and so is what is kept for sessions."""
        pool = self.kv_cache_manager.block_pool
        return self.num_blocks - int(pool.get_num_free_blocks()) - self.kept.idle()

    @property
    def num_blocks(self) -> int:
        """Blocks that can be used: vLLM keeps block 0 for itself."""
        return int(self.kv_cache_manager.block_pool.num_gpu_blocks) - 1

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of KV that a token takes on this engine, all layers."""
        config = self.kv_cache_config
        total = sum(tensor.size for tensor in config.kv_cache_tensors)
        return int(total // (config.num_blocks * self.block_size))


class PlannedAsyncScheduler(PlannedScheduler, AsyncScheduler):  # type: ignore[misc]
    """The same over vLLM's asynchronous scheduler, which composes a batch while the one before it runs."""


class _Timed:
    """A call, and how long it took."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self.seconds = 0.0

    def __call__(self) -> Any:
        began_s = time.monotonic()
        try:
            return self._call()
        finally:
            self.seconds = time.monotonic() - began_s


class _CarriedOut:
    """One plan laid over the scheduler's queues for one `schedule()`, and taken off again."""

    def __init__(self, scheduler: PlannedScheduler, plan: BatchPlan, held: frozenset[str]) -> None:
        self._scheduler = scheduler
        self._plan = plan
        self._rank = {work_id: rank for rank, work_id in reversed(list(enumerate(plan.order)))}
        self._held = held
        self.blocked: str | None = None

    def run(self, schedule: Callable[[], Any]) -> Any:
        """`schedule()` under the plan. The queues keep their order outside it: no plan leaves a trace."""
        scheduler = self._scheduler
        preempted = self._preempt()
        running = list(scheduler.running)
        queues = {name: list(getattr(scheduler, name)) for name in _QUEUES}
        out = {r for queue in queues.values() for r in queue if r.request_id in self._held} | preempted
        self._cut_drafts(running)
        limit = scheduler.max_num_scheduled_tokens
        try:
            # Held ones stay among the running, where vLLM counts their slots (with the count too low it would
            # admit into them and die of it), and last, where it looks for a victim when memory is short.
            scheduler.running = sorted(running, key=self._place)
            for name, queue in queues.items():
                # Left in the queue, one that must wait would block all behind it.
                _refill(getattr(scheduler, name), sorted((r for r in queue if r not in out), key=self._place))
            if self._plan.max_tokens is not None:
                scheduler.max_num_scheduled_tokens = min(max(self._plan.max_tokens, 0), limit)
            output = schedule()
            self.blocked = self._left_at_the_door(output.total_num_scheduled_tokens)
            return output
        finally:
            scheduler.max_num_scheduled_tokens = limit
            scheduler.running = _merged(running, scheduler.running)
            for name, queue in queues.items():
                now = getattr(scheduler, name)
                _refill(now, _merged(queue, [*now, *(r for r in queue if r in out)]))

    def _left_at_the_door(self, tokens: int) -> str | None:
        """Whom vLLM did not admit though the batch had room: no slot or no blocks. It stops at the first."""
        scheduler = self._scheduler
        if tokens >= scheduler.max_num_scheduled_tokens:
            return None
        waiting = (request for name in _QUEUES for request in getattr(scheduler, name))
        return next((request.request_id for request in waiting if scheduler.can_run(request)), None)

    def _place(self, request: Request) -> tuple[int, int]:
        """First pulls to be started (they take no tokens), then what is named, the rest, what is held."""
        kind = -1 if _starts_pull(request) else int(request.request_id in self._held)
        return kind, self._rank.get(request.request_id, len(self._rank))

    def _preempt(self) -> set[Request]:
        scheduler = self._scheduler
        named = set(self._plan.preempt)
        victims = [r for r in scheduler.running if r.request_id in named] if named else []
        for request in victims:
            scheduler.running.remove(request)
            # vLLM puts it at the front of the queue and would take it back in this very batch.
            scheduler._preempt_request(request, time.monotonic(), scheduler.requires_kv_delivery)
        return set(victims)

    def _cut_drafts(self, running: Sequence[Request]) -> None:
        asynchronous = self._scheduler.scheduler_config.async_scheduling
        for request in running:
            depth = self._plan.depth.get(request.request_id)
            if asynchronous and request.request_id in self._held:
                # They stand for drafts of the batch before, which the worker forgets when it is held out.
                depth = 0
            if depth is not None and depth < len(request.spec_token_ids):
                # A new list: the asynchronous scheduler shares one between requests.
                request.spec_token_ids = request.spec_token_ids[: max(depth, 0)]


def _starts_pull(request: Request) -> bool:
    """Whether its KV is still to be fetched: vLLM's connectors clear the mark when they begin."""
    params = request.kv_transfer_params
    return request.status == RequestStatus.WAITING and bool(params) and bool(params.get("do_remote_prefill"))


def _seq(request: Request, *, running: bool = True, blocked: bool = False) -> Seq:
    output_tokens = request.num_output_tokens + request.num_output_placeholders
    return Seq(
        work_id=request.request_id,
        prompt_tokens=request.num_prompt_tokens,
        computed_tokens=request.num_computed_tokens,
        output_tokens=output_tokens,
        running=running,
        drafts=len(request.spec_token_ids),
        blocked=blocked,
        pull_waits=_starts_pull(request),
    )


def _refill(queue: FCFSRequestQueue, requests: Iterable[Request]) -> None:
    requests = list(requests)
    queue.clear()
    queue.extend(requests)


def _merged(before: Sequence[Request], after: Sequence[Request]) -> list[Request]:
    """`after`, with those of `before` in their old order.

    Newcomers go behind them, but for those that vLLM has just preempted: it wants them in front.
    """
    place = {request: index for index, request in enumerate(before)}
    last = len(before)

    def key(request: Request) -> int:
        newcomer = -1 if request.status == RequestStatus.PREEMPTED else last
        return place.get(request, newcomer)

    return sorted(after, key=key)


def _accepted_tokens(scheduler_output: Any, model_runner_output: Any) -> int:
    sampled = model_runner_output.sampled_token_ids
    index = model_runner_output.req_id_to_index
    drafted = scheduler_output.scheduled_spec_decode_tokens
    return sum(max(len(sampled[index[key]]) - 1, 0) for key in drafted if key in index and sampled)
