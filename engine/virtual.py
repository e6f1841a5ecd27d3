"""A virtual engine: it has no model, and its steps take the time that a real one's would.

It carries out plans by the compiled core that simulations run (engine/virtual_kernel.py), keeps what it was
asked for beside the rows, and waits for what a batch costs: on the wall clock, or on any clock that a test
passes in. `step` is `begin`, the wait, and `finish`; a host of many engines calls the two itself and nobody
sleeps.

What differs from a model: tokens are hashes, so that stop strings, grammars, logprobs and sampling parameters
mean nothing to it, and an answer ends by its length. KV that running works could share is held twice.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.base import (
    UNPLANNED,
    BatchPlan,
    Composer,
    Engine,
    EngineInfo,
    Output,
    Seq,
    StepReport,
    StepResult,
    Usage,
    Work,
)
from engine.cost import StepCost
from engine.errors import EngineError, EngineStartError, ProtocolError, RequestError
from engine.prefix_log import PrefixLog
from engine.rows import NO_PULL, PULL_WAITS, PULLED, PULLING, ROW, CostArrays
from engine.virtual_config import VirtualEngineConfig, model_facts, process_fabric
from engine.virtual_kernel import (
    ACCEPTED,
    CONTEXT_TOKENS,
    DECODE_SEQS,
    DRAFTED,
    FREE_BLOCKS,
    KV_TOKENS,
    MAX_SEQS,
    NUM_BLOCKS,
    PREEMPTED,
    RUNNING,
    SEQS,
    TOKENS,
    Replica,
    batch_s,
    carry_out,
    enqueue,
    finish,
    preempt,
    pulled,
    recompute,
    remove,
    runnable,
    start_pulls,
)
from engine.virtual_prefixes import PrefixCache
from engine.virtual_tokens import Said, VirtualSampling
from kv_transfer.base import Handoff
from kv_transfer.virtual import VirtualFabric, VirtualPort

FIRST_ROWS = 32  # of an engine that has nothing to do: a process hosts a thousand of them
CATCH_UP_S = 2e-3  # a batch that is no later than this counts from the end of the one before it
PROFILE_PREFILL_TOKENS = (16, 64, 256, 1024)
PROFILE_DECODE_SEQS = (1, 4, 16)


@dataclass(slots=True)
class Going:
    """A work in the engine, and its row. `kept`: how many of its blocks it holds in the prefix cache."""

    work: Work
    row: int
    said: Said
    prompt_tokens: int
    ends_itself: bool
    running: bool = False
    kept: int = 0
    cached_tokens: int | None = None  # to be told with the first output
    output_tokens: int = 0


@dataclass(slots=True)
class Batch:
    """A batch in flight. Times on the engine's clock."""

    began_s: float
    seconds: float
    members: list[int]
    draft_tokens: int

    @property
    def ends_s(self) -> float:
        """When it is over."""
        return self.began_s + self.seconds


class VirtualEngine(Engine):
    """One replica without a model. `clock` and `sleep` are those of the wall unless given."""

    def __init__(
        self,
        config: VirtualEngineConfig,
        fabric: VirtualFabric | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._config = config
        self._fabric = fabric or process_fabric(config.link_latency_s, config.link_bytes_per_s)
        self._clock = self._fabric.clock
        self._sleep = sleep
        self._info: EngineInfo | None = None
        self._port: VirtualPort | None = None
        self._batch: Batch | None = None
        self._last_end_s = 0.0

    def start(self) -> EngineInfo:
        """Size the KV and join the fabric. Raises EngineStartError if the KV cannot hold one context."""
        config = self._config
        known = model_facts(config.model)
        num_blocks = config.kv_tokens // config.block_size
        max_model_len = config.max_model_len or min(known.max_model_len, num_blocks * config.block_size)
        if max_model_len > num_blocks * config.block_size:
            raise EngineStartError(
                f"engine {config.engine_id} did not start: {config.kv_tokens} tokens of KV do not hold a "
                f"context of {max_model_len}: raise kv_tokens or lower max_model_len"
            )
        self._vocab_size = config.vocab_size or known.vocab_size
        self._works: dict[str, Going] = {}
        # Blocks of a lease, what they hold, and for whom.
        self._offered: dict[str, tuple[int, list[int], Work]] = {}
        self._late: dict[str, int] = {}  # blocks that late bytes may still come into
        self._prefixes = PrefixCache(config.block_size)
        self._cost = CostArrays.of(config.cost)
        self._rows = np.zeros(FIRST_ROWS, dtype=ROW)
        self._replica = Replica.empty(
            FIRST_ROWS, num_blocks, config.block_size, config.max_num_seqs, config.max_batch_tokens
        )
        self._spare_rows = list(range(FIRST_ROWS))
        self._going_at: list[Going | None] = [None] * FIRST_ROWS
        self._port = self._fabric.port(
            config.engine_id, config.lease_s, config.side_channel_host, config.side_channel_port
        )
        self._info = EngineInfo(
            engine="virtual 1",
            model=config.model,
            engine_id=config.engine_id,
            block_size=config.block_size,
            num_blocks=num_blocks,
            max_model_len=max_model_len,
            max_num_seqs=config.max_num_seqs,
            max_batch_tokens=config.max_batch_tokens,
            kv_bytes_per_token=config.kv_bytes_per_token,
            transport="virtual",
            max_draft_tokens=config.max_draft_tokens,
        )
        return self._info

    def describe(self) -> EngineInfo:
        """What this engine is. Raises EngineError unless it runs."""
        if self._info is None:
            raise EngineError(f"engine {self._config.engine_id} is not running")
        return self._info

    def stop(self) -> None:
        """Leave the fabric. The engine cannot be started again."""
        if self._port is not None:
            self._fabric.remove(self._port)
        self._info = self._port = self._batch = None

    # ---- what is asked -----------------------------------------------------------------------------------

    def submit(self, work: Work) -> None:
        """Queue a work. Raises RequestError if its id is taken or the engine could never run it."""
        self._check(work)
        try:
            stop_after = VirtualSampling.decode(work.sampling).stop_after
        except ProtocolError as error:
            raise RequestError(str(error)) from error
        # What was said elsewhere is as good as prompt: tokens follow from all that went before.
        known = [*work.prompt_token_ids, *work.said_token_ids]
        prompt_tokens, said_tokens = len(known), len(work.said_token_ids)
        most = min(work.max_tokens - said_tokens, self.describe().max_model_len - prompt_tokens)
        left = None if stop_after is None else max(stop_after - said_tokens, 1)
        ends_itself = left is not None and left <= most
        said = Said(known, self._config.block_size, work.cache_salt)
        row = self._spare_rows.pop() if self._spare_rows else self._more_rows()
        self._rows[row] = np.zeros((), dtype=ROW)
        fields: dict[str, Any] = {
            "prompt_tokens": prompt_tokens,
            "end_tokens": left if ends_itself else most,
            "offers": work.offer_kv,
            "pull": NO_PULL if work.handoff is None else PULL_WAITS,
            "first_token_s": np.nan,
            "seed": said.number >> 1,
        }
        for name, value in fields.items():
            self._rows[name][row] = value
        going = Going(work, row, said, prompt_tokens, ends_itself)
        self._works[work.work_id] = going
        self._going_at[row] = going
        enqueue(self._replica, self._rows, row)
        if work.handoff is not None and not self.kv.ask(work.work_id, work.handoff, work.pull_deadline_s):
            recompute(self._replica, self._rows, row)

    def _check(self, work: Work) -> None:
        info, length = self.describe(), len(work.prompt_token_ids) + len(work.said_token_ids)
        if work.work_id in self._works or work.work_id in self._offered or work.work_id in self._late:
            raise RequestError(f"there is a work {work.work_id} already")
        if length == 0:
            raise RequestError("the prompt is empty")
        if length >= info.max_model_len:
            raise RequestError(
                f"the prompt has {length} tokens, and the context of {info.model} holds "
                f"{info.max_model_len} with the answer: shorten the prompt",
                reason="context_length",
            )
        if work.said_token_ids and (work.offer_kv or len(work.said_token_ids) >= work.max_tokens):
            raise RequestError("nothing is left to be said after what was said")
        if min(work.prompt_token_ids) < 0 or max(work.prompt_token_ids) >= self._vocab_size:
            raise RequestError(f"a token id is outside the vocabulary of {self._vocab_size}")

    def cancel(self, work_ids: Sequence[str], *, ended: bool = False) -> None:
        """Drop works and free their blocks. Called between batches, as everything but `finish`."""
        self.describe()
        for work_id in work_ids:
            going = self._works.get(work_id)
            if going is not None:
                if going.work.handoff is not None and self.kv.give_up(work_id):
                    self._set_apart(going)
                remove(self._replica, self._rows, going.row)
                if ended:
                    self._keep_for_session(going.work, going.said.blocks[: going.kept])
                self._forget(going)
            elif work_id in self._offered:
                self.kv.release(work_id)

    def has_work(self) -> bool:
        """Works, offers under a lease, and blocks that late bytes may come into."""
        self.describe()
        return bool(self._works or self._offered or self._late)

    def usage(self) -> Usage:
        """KV blocks and queues now."""
        self.describe()
        counts = self._replica.counts
        running, blocks = int(counts[RUNNING]), int(counts[NUM_BLOCKS])
        return Usage(blocks - int(counts[FREE_BLOCKS]), blocks, running, len(self._works) - running)

    def kept(self) -> dict[str, int]:
        """Tokens of KV that are kept for each session."""
        block_size = self._config.block_size
        return {session: blocks * block_size for session, blocks in self._prefixes.kept().items()}

    def kept_tokens(self) -> int:
        """Tokens of KV that are kept for sessions in all."""
        return self._prefixes.kept_blocks * self._config.block_size

    def give_up(self, sessions: Sequence[str]) -> None:
        """Keep nothing for these any more."""
        for session in sessions:
            self._prefixes.give_up(session)

    @property
    def kv(self) -> VirtualPort:
        """This engine's end of the fabric. Raises EngineError unless it runs."""
        if self._port is None:
            raise EngineError(f"engine {self._config.engine_id} is not running")
        return self._port

    @property
    def prefixes(self) -> PrefixLog:
        """What its prefix cache holds."""
        self.describe()
        return self._prefixes.log

    def reset_prefix_cache(self) -> bool:
        """Forget cached prefixes. False, and nothing is forgotten, while any block is in use (as vLLM 0.32)."""
        if self.usage().used_blocks > 0:
            return False
        self._prefixes.forget()
        return True

    def profile_step_times(self) -> list[StepReport]:
        """What a few prefills and decodes cost: known, not measured. Raises EngineError if there is work."""
        if self.has_work():
            raise EngineError("step times can only be measured on an idle engine")
        info, cost = self.describe(), self._config.cost
        longest = min(info.max_batch_tokens, info.max_model_len - 1)
        reports = []
        for tokens in sorted({min(tokens, longest) for tokens in PROFILE_PREFILL_TOKENS}):
            work = tokens * tokens / 2
            seconds = cost.predict(tokens, seqs=1, prefill_work=work)
            reports.append(StepReport(seconds, tokens, 1, 0, 0, work))
        for seqs in sorted({min(seqs, info.max_num_seqs) for seqs in PROFILE_DECODE_SEQS}):
            seconds = cost.predict(seqs, seqs=seqs, context_tokens=2 * seqs)
            reports.append(StepReport(seconds, seqs, seqs, seqs, 2 * seqs, 0.0))
        return reports

    # ---- one step ----------------------------------------------------------------------------------------

    def step(self, compose: Composer) -> StepResult:
        """Run one batch under the plan of `compose`. Returns at once, with no report, if nothing can run."""
        if self.begin(compose) is None:
            return StepResult([], None)
        assert self._batch is not None
        left_s = self._batch.ends_s - self._clock()
        if left_s > 0:
            self._sleep(left_s)
        return self.finish()

    def begin(self, compose: Composer) -> float | None:
        """Form a batch. When it will be over, on the engine's clock; None if nothing can run."""
        asked_s = self._clock()
        self._settle()
        active = np.empty(len(self._works), dtype=np.int64)
        count = runnable(self._replica, self._rows, active, True)
        if count == 0:
            return None
        active = active[:count]
        plan = compose(self._seqs(active))
        order = self._lay_out(plan, active)
        if self._start_pulls(order):
            return self.begin(compose)
        most = self._config.max_batch_tokens if plan.max_tokens is None else max(plan.max_tokens, 0)
        carry_out(self._replica, self._rows, order, most)
        self._note_moves(order)
        batch = self._replica.batch
        if batch[TOKENS] == 0:
            return None
        began_s = self._last_end_s if 0 <= asked_s - self._last_end_s < CATCH_UP_S else asked_s
        draft_tokens = self._config.max_draft_tokens
        if plan.draft_tokens is not None:
            draft_tokens = min(plan.draft_tokens, draft_tokens)
        members = self._replica.members[: batch[SEQS]].tolist()
        self._batch = Batch(began_s, float(batch_s(self._replica, self._cost, 0)), members, draft_tokens)
        return self._batch.ends_s

    def finish(self) -> StepResult:
        """End the batch that `begin` formed: what it made, and its report."""
        batch, self._batch = self._batch, None
        assert batch is not None, "no batch was begun"
        now_s = self._clock()
        finish(self._replica, self._rows, now_s, self._config.acceptance, batch.draft_tokens)
        self._last_end_s = batch.ends_s
        late_s = now_s - batch.ends_s
        seconds = batch.seconds if late_s < CATCH_UP_S else batch.seconds + late_s
        rows, at = self._rows, np.array(batch.members)
        batched = {going.work.work_id for row in batch.members if (going := self._going_at[row]) is not None}
        made = zip(
            batch.members,
            rows["new_tokens"][at].tolist(),
            rows["computed_tokens"][at].tolist(),
            rows["end_tokens"][at].tolist(),
            strict=True,
        )
        outputs = [
            output
            for row, new, computed, end in made
            if (output := self._made(row, new, computed, end)) is not None
        ]
        self._prefixes.fit(int(self._replica.counts[FREE_BLOCKS]))
        return StepResult(outputs, self._report(seconds), batched)

    def wake_s(self) -> float:
        """When something will change here by itself though no batch can run: a pull or a lease ends."""
        return self.kv.wake_s()

    def _made(self, row: int, new: int, computed: int, end_tokens: int) -> Output | None:
        """What a batch made of one of its rows."""
        going = self._going_at[row]
        assert going is not None
        work_id = going.work.work_id
        self._keep(going, computed)
        if new == 0:
            return None
        cached, going.cached_tokens = going.cached_tokens, None
        if going.work.offer_kv:
            return self._end_prefill(going, cached, ends=going.ends_itself and end_tokens == 1)
        tokens = []
        for _ in range(new):
            token = going.said.next(self._vocab_size)
            going.said.add(token)
            tokens.append(token)
        going.output_tokens += new
        reason = None
        if going.output_tokens >= end_tokens:
            reason = "stop" if going.ends_itself else "length"
            self._keep_for_session(going.work, going.said.blocks[: going.kept])
            self._forget(going)
        return Output(work_id, tokens, reason, cached_tokens=cached)

    def _end_prefill(self, going: Going, cached: int | None, *, ends: bool) -> Output:
        """Its first token, and its KV unless that `ends` the answer."""
        work_id, tokens = going.work.work_id, [going.said.next(self._vocab_size)]
        handoff = self._offer(going)
        if ends:
            self.kv.release(work_id)
            return Output(work_id, tokens, "stop", cached_tokens=cached)
        return Output(work_id, tokens, "length", handoff=handoff, cached_tokens=cached)

    def _offer(self, going: Going) -> Handoff:
        """Its KV is the lease's from now on."""
        tokens, blocks = going.prompt_tokens, int(self._rows["blocks"][going.row])
        self._offered[going.work.work_id] = blocks, going.said.blocks[: going.kept], going.work
        going.kept = 0
        self._forget(going)
        return self.kv.offer(going.work.work_id, blocks, tokens, tokens * self._config.kv_bytes_per_token)

    def _report(self, seconds: float) -> StepReport:
        batch = self._replica.batch.tolist()
        return StepReport(
            seconds=seconds,
            tokens=batch[TOKENS],
            seqs=batch[SEQS],
            decode_seqs=batch[DECODE_SEQS],
            decode_context_tokens=batch[CONTEXT_TOKENS],
            prefill_work=float(self._replica.work[0]),
            drafted_tokens=batch[DRAFTED],
            accepted_tokens=batch[ACCEPTED],
            preempted=batch[PREEMPTED],
            prefill_kv_tokens=batch[KV_TOKENS],
        )

    # ---- plans -------------------------------------------------------------------------------------------

    def _seqs(self, active: Any) -> list[Seq]:
        rows = self._rows
        names = ("computed_tokens", "output_tokens", "running", "drafts", "blocked")
        columns = [rows[name][active].tolist() for name in names]
        columns.append((rows["pull"][active] == PULL_WAITS).tolist())
        seqs = []
        for row, computed, output, running, drafts, blocked, waits in zip(
            active.tolist(), *columns, strict=True
        ):
            going = self._going_at[row]
            assert going is not None
            seqs.append(
                Seq(going.work.work_id, going.prompt_tokens, computed, output, running, drafts, blocked, waits)
            )
        return seqs

    def _lay_out(self, plan: BatchPlan, active: Any) -> Any:
        """What the plan lets each row have, and the order: who is named, who is not, who is held out.

        Among those that wait the ones whose KV was pulled come first, as in vLLM 0.32: they hold memory.
        """
        rows, works = self._rows, self._works
        rows["chunk_tokens"][active] = self._config.max_batch_tokens
        rows["verify_tokens"][active] = np.where(rows["running"][active], rows["drafts"][active], 0)
        rows["may_pull"][active] = True
        order = active
        if plan.order or plan.skip or plan.chunk_tokens:
            last = len(plan.order)
            rank = {works[key].row: at for at, key in enumerate(plan.order) if key in works}
            held = {works[key].row for key in plan.skip if key in works}
            for key, tokens in plan.chunk_tokens.items():
                if key in works:
                    rows["chunk_tokens"][works[key].row] = tokens
                    if tokens < 1:
                        held.add(works[key].row)
            for row in held:
                rows["chunk_tokens"][row] = rows["verify_tokens"][row] = 0
                rows["may_pull"][row] = False
            places = sorted(active.tolist(), key=lambda row: (row in held, rank.get(row, last)))
            order = np.array(places, dtype=np.int64)
        for key, depth in plan.depth.items():
            if key in works:
                row = works[key].row
                rows["verify_tokens"][row] = min(int(rows["verify_tokens"][row]), max(depth, 0))
        rows["chunk_tokens"][order[rows["pull"][order] == PULL_WAITS]] = 0
        waits_pulled = (rows["pull"][order] == PULLED) & ~rows["running"][order]
        if waits_pulled.any():
            order = np.concatenate([order[waits_pulled], order[~waits_pulled]])
        self._replica.batch[:] = 0
        for key in plan.preempt:
            if key in works and rows["running"][works[key].row]:
                preempt(self._replica, rows, works[key].row)
        self._find_prefixes(order)
        return order

    def _find_prefixes(self, order: Any) -> None:
        """What the cache has of those that wait, as far as there are slots for them."""
        rows, counts = self._rows, self._replica.counts
        slots = int(counts[MAX_SEQS] - counts[RUNNING])
        waiting = order[~rows["running"][order]][: max(slots, 0)]
        for row in waiting.tolist():
            going = self._going_at[row]
            assert going is not None
            if rows["pull"][row] == NO_PULL:
                known = self._prefixes.known(going.said.blocks) if self._config.enable_prefix_caching else 0
                # The last token is always computed: the next one comes from it. vLLM computes its block whole.
                most = (going.prompt_tokens + going.output_tokens - 1) // self._config.block_size
                rows["cached_tokens"][row] = min(known, most) * self._config.block_size

    def _note_moves(self, order: Any) -> None:
        """Who got a slot in this batch, and who lost one."""
        rows, moved = self._rows, False
        for row, running in zip(order.tolist(), rows["running"][order].tolist(), strict=True):
            going = self._going_at[row]
            assert going is not None
            if running == going.running:
                continue
            going.running, moved = running, True
            if not running:
                self._let_go(going)
                continue
            computed = int(rows["computed_tokens"][row])
            if going.output_tokens == 0:
                going.cached_tokens = computed
            self._keep(going, computed)
        if moved:
            self._prefixes.fit(int(self._replica.counts[FREE_BLOCKS]))

    # ---- memory ------------------------------------------------------------------------------------------

    def _keep(self, going: Going, computed: int) -> None:
        """Its computed full blocks can be found by others from now on."""
        full = computed // self._config.block_size
        if full > going.kept and self._config.enable_prefix_caching:
            full = min(full, len(going.said.blocks))
            self._prefixes.hold(going.said.blocks, going.kept, full)
            going.kept = full

    def _keep_for_session(self, work: Work, blocks: list[int]) -> None:
        if work.session is not None and self._config.enable_prefix_caching:
            self._prefixes.keep(work.session, blocks)

    def _let_go(self, going: Going) -> None:
        self._prefixes.let_go(going.said.blocks[: going.kept])
        going.kept = 0

    def _forget(self, going: Going) -> None:
        """A work is over here. Its blocks are somebody else's business."""
        self._let_go(going)
        del self._works[going.work.work_id]
        self._going_at[going.row] = None
        self._rows["pull"][going.row] = NO_PULL
        self._spare_rows.append(going.row)

    def _set_apart(self, going: Going) -> None:
        """Late bytes may still come into its blocks: they are nobody's until then."""
        self._late[going.work.work_id] = int(self._rows["blocks"][going.row])
        self._rows["blocks"][going.row] = 0

    def _settle(self) -> None:
        """Take note of pulls and leases that have ended."""
        settled, counts = self.kv.settle(), self._replica.counts
        for work_id in settled.over:
            blocks, held, work = self._offered.pop(work_id)
            counts[FREE_BLOCKS] += blocks
            self._keep_for_session(work, held)
            self._prefixes.let_go(held)
        for work_id in settled.drained:
            counts[FREE_BLOCKS] += self._late.pop(work_id)
        for work_id in settled.late:
            self._set_apart(self._works[work_id])
            recompute(self._replica, self._rows, self._works[work_id].row)
        for work_id in settled.failed:
            recompute(self._replica, self._rows, self._works[work_id].row)
        for work_id in settled.arrived:
            going = self._works[work_id]
            pulled(self._rows, going.row)
            if going.work.said_token_ids:  # what came is of the prompt alone
                self._rows["computed_tokens"][going.row] = len(going.work.prompt_token_ids)

    def _start_pulls(self, order: Any) -> bool:
        """Start those that may begin and fit. Whether any of them is here at once.

        What is cached here of a handed-over prompt does not have to come.
        """
        started = np.empty(len(order), dtype=np.int64)
        count = start_pulls(self._replica, self._rows, order, started)
        for row in started[:count].tolist():
            going = self._going_at[row]
            assert going is not None
            assert going.work.handoff is not None
            known = self._prefixes.known(going.said.blocks) if self._config.enable_prefix_caching else 0
            missing = max(len(going.work.prompt_token_ids) - known * self._config.block_size, 0)
            kv_bytes = missing * self._config.kv_bytes_per_token
            self.kv.read(going.work.work_id, int(self._rows["blocks"][row]), kv_bytes)
        if count:
            self._prefixes.fit(int(self._replica.counts[FREE_BLOCKS]))
            self._settle()
        return bool((self._rows["pull"][started[:count]] != PULLING).any())

    def _more_rows(self) -> int:
        """Twice as many rows. One of the new ones."""
        count = len(self._rows)
        rows = np.zeros(2 * count, dtype=ROW)
        rows[:count] = self._rows
        self._rows = rows
        replica = self._replica
        self._replica = replica._replace(
            live=np.concatenate([replica.live, np.empty(count, dtype=np.int64)]),
            members=np.concatenate([replica.members, np.empty(count, dtype=np.int64)]),
        )
        self._going_at += [None] * count
        self._spare_rows = list(range(count, 2 * count))
        return self._spare_rows.pop()


def warm_up() -> None:
    """Compile the core, or load it from the cache (seconds), before the first batch waits for it."""
    now_s = 0.0
    fabric = VirtualFabric(lambda: now_s, latency_s=0.0, bytes_per_s=math.inf)
    sizes: dict[str, Any] = {"kv_tokens": 64, "kv_bytes_per_token": 1, "max_model_len": 64, "max_num_seqs": 4}
    cost = StepCost.line(0.0, 1e-9)
    source, target = (
        VirtualEngine(VirtualEngineConfig("warm-up", name, cost, **sizes), fabric, sleep=lambda _: None)
        for name in ("source", "target")
    )
    source.start()
    target.start()
    source.submit(Work("offer", [1] * 20, b"", 4, offer_kv=True))
    (offered,) = source.step(lambda _: UNPLANNED).outputs
    target.submit(Work("pull", [1] * 20, b"", 4, handoff=offered.handoff))
    target.submit(Work("recompute", [1] * 20, b"", 4, handoff=Handoff("gone", "gone", 20, 20, 1.0)))
    target.step(lambda _: UNPLANNED)
    target.step(lambda _: BatchPlan(preempt=["pull"]))
    target.cancel(["recompute"])
    target.step(lambda _: UNPLANNED)
