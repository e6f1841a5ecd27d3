"""An engine that does as a test says: it carries out plans over the fake port's blocks; its "model" adds."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from engine.base import (
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
from engine.errors import RequestError
from engine.prefix_log import PrefixLog
from kv_transfer.base import Link, PeerAddress, Pull
from kv_transfer.fake import FakeFabric, FakePort

BLOCK_TOKENS = 16
NUM_BLOCKS = 64
MAX_BATCH_TOKENS = 64
MAX_MODEL_LEN = 100_000
STEP_S = 0.002
COST = StepCost.line(base_s=1e-3, per_token_s=1e-5)
PATIENCE_S = 5.0


class Port(FakePort):
    """A port that tells its engine, too, which pulls have ended."""

    def __init__(self, fabric: FakeFabric, engine_id: str) -> None:
        super().__init__(fabric, engine_id, NUM_BLOCKS, BLOCK_TOKENS, 4096, 30.0)
        self.ended: list[Pull] = []
        self.probe_fails: Exception | None = None

    def new_pulls(self) -> list[Pull]:
        """Those that ended since the engine last asked."""
        new = super().take_pulls()
        self.ended.extend(new)
        return new

    def take_pulls(self) -> list[Pull]:
        taken, self.ended = self.ended, []
        return taken

    def probe(self, peer: PeerAddress) -> Link:
        if self.probe_fails is not None:
            raise self.probe_fails
        return super().probe(peer)


@dataclass(slots=True)
class Going:
    """A work in the engine."""

    work: Work
    computed: int = 0
    given: int = 0
    running: bool = False
    pulling: bool = False

    @property
    def seq(self) -> Seq:
        prompt = len(self.work.prompt_token_ids)
        return Seq(self.work.work_id, prompt, self.computed, self.given, self.running)


def token(work: Work, position: int) -> int:
    """The token that the engine gives: it follows from the prompt alone."""
    return (sum(work.prompt_token_ids) + position) % 30_000


class ScriptedEngine(Engine):
    """Carries out plans over real blocks of the fake port; its "model" adds numbers.

    What a test may set: `slots`; `step_s`, that a step takes, and `reported_s`, that it says it took; `gate`,
    which a step waits for; `fails`, which the next step raises; `refuses`, which the next submit raises;
    `payload_every`, the n-th tokens of a work that carry a payload.
    """

    def __init__(self, fabric: FakeFabric, engine_id: str = "engine") -> None:
        self.port = Port(fabric, engine_id)
        self.slots = 8
        self.step_s = STEP_S
        self.reported_s: float | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.fails: Exception | None = None
        self.refuses: Exception | None = None
        self.payload_every: int | None = None
        self.steps = 0
        self.stopped = False
        self._works: dict[str, Going] = {}
        self._kept: dict[str, int] = {}
        self._prefixes = PrefixLog()

    def start(self) -> EngineInfo:
        return EngineInfo(
            engine="scripted 1",
            model="none",
            engine_id=self.port.engine_id,
            block_size=BLOCK_TOKENS,
            num_blocks=NUM_BLOCKS,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=self.slots,
            max_batch_tokens=MAX_BATCH_TOKENS,
            kv_bytes_per_token=4096,
            transport="fake",
        )

    def submit(self, work: Work) -> None:
        if self.refuses is not None:
            error, self.refuses = self.refuses, None
            if not isinstance(error, RequestError):
                self._works[work.work_id] = Going(work)  # it breaks when it has half taken it
            raise error
        going = Going(work, given=len(work.said_token_ids))
        if work.handoff is not None:
            going.pulling = self.port.start_pull(work.work_id, work.handoff, work.pull_deadline_s)
        self._works[work.work_id] = going

    def cancel(self, work_ids: Sequence[str], *, ended: bool = False) -> None:
        for work_id in work_ids:
            going = self._works.pop(work_id, None)
            if going is not None:
                self.port.free(work_id)
                if ended and going.work.session is not None:
                    self._kept[going.work.session] = going.computed

    def step(self, compose: Composer) -> StepResult:
        self.steps += 1
        self.gate.wait(PATIENCE_S)
        if self.fails is not None:
            raise self.fails
        self.port.step()
        for pull in self.port.new_pulls():
            if (going := self._works.get(pull.request_id)) is not None:
                self._pulled(going, pull)
        ready = {key: going for key, going in self._works.items() if not going.pulling}
        if not ready:
            return StepResult([], None)
        plan = compose([going.seq for going in ready.values()])
        time.sleep(self.step_s)
        outputs: list[Output] = []
        order = [*plan.order, *(key for key in ready if key not in plan.order)]
        made = {key: self._run(ready[key], plan, outputs) for key in order if key not in plan.skip}
        tokens = sum(made.values())
        report = StepReport(self.reported_s or self.step_s, tokens, len(order), 0, 0, 0.0)
        return StepResult(outputs, report if tokens else None, {key for key, chunk in made.items() if chunk})

    def _pulled(self, going: Going, pull: Pull) -> None:
        going.pulling = False
        if pull.outcome == "pulled":
            going.computed = len(going.work.prompt_token_ids) - 1

    def _run(self, going: Going, plan: BatchPlan, outputs: list[Output]) -> int:
        """Give a work its chunk; the tokens that were computed."""
        if not going.running and not self._admit(going):
            return 0
        work = going.work
        left = len(work.prompt_token_ids) + going.given - going.computed
        chunk = min(left, plan.chunk_tokens.get(work.work_id, MAX_BATCH_TOKENS))
        going.computed += chunk
        if chunk == left:
            outputs.append(self._output(going))
        return chunk

    def _admit(self, going: Going) -> bool:
        if sum(other.running for other in self._works.values()) >= self.slots:
            return False
        if going.computed == 0:
            blocks = math.ceil(len(going.work.prompt_token_ids) / BLOCK_TOKENS)
            self.port.compute(going.work.work_id, [b"kv"] * blocks)
        going.running = True
        return True

    def _output(self, going: Going) -> Output:
        work = going.work
        if work.offer_kv:
            del self._works[work.work_id]
            return Output(work.work_id, [token(work, 0)], "length", handoff=self.port.offer(work.work_id))
        given, going.given = going.given, going.given + 1
        reason = None
        if going.given == work.max_tokens:
            reason = "length"
            if work.session is not None:
                self._kept[work.session] = going.computed
            del self._works[work.work_id]
            self.port.free(work.work_id)
        marked = self.payload_every is not None and given % self.payload_every == 0
        return Output(work.work_id, [token(work, given)], reason, payload=b"logprobs" if marked else None)

    def has_work(self) -> bool:
        return bool(self._works) or self.port.used_blocks > 0

    def usage(self) -> Usage:
        running = sum(going.running for going in self._works.values())
        return Usage(self.port.used_blocks, NUM_BLOCKS, running, len(self._works) - running)

    def kept(self) -> dict[str, int]:
        return dict(self._kept)

    def kept_tokens(self) -> int:
        return sum(self._kept.values())

    def give_up(self, sessions: Sequence[str]) -> None:
        for session in sessions:
            self._kept.pop(session, None)

    @property
    def kv(self) -> Port:
        return self.port

    @property
    def prefixes(self) -> PrefixLog:
        return self._prefixes

    def reset_prefix_cache(self) -> bool:
        return True

    def profile_step_times(self) -> list[StepReport]:
        return [StepReport(COST.predict(tokens), tokens, 1, 0, 0, 0.0) for tokens in (1, 64)]

    def stop(self) -> None:
        self.stopped = True
