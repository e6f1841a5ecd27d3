"""An engine without a model: it carries out plans, has a prefix cache, and steps take what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.base import Composer, Engine, EngineInfo, Output, Seq, StepReport, StepResult, Usage, Work
from engine.cost import StepCost
from engine.prefix_log import PrefixLog
from kv_transfer.base import KvPort

BLOCK_TOKENS = 16


@dataclass(slots=True)
class Going:
    """A work in the engine. `computed` is None until it has been in a batch."""

    work: Work
    computed: int | None = None
    given: int = 0

    @property
    def seq(self) -> Seq:
        prompt = len(self.work.prompt_token_ids)
        return Seq(self.work.work_id, prompt, self.computed or 0, self.given, self.computed is not None)


class TimedEngine(Engine):
    """`kv_tokens`: how many prompt tokens it has room for; works beyond it wait."""

    def __init__(self, cost: StepCost, max_batch_tokens: int = 256, kv_tokens: int = 1 << 30) -> None:
        self._cost = cost
        self._kv_tokens = kv_tokens
        self._max_batch_tokens = max_batch_tokens
        self._works: dict[str, Going] = {}
        self._cached: set[tuple[int, ...]] = set()
        self._prefixes = PrefixLog()

    def start(self) -> EngineInfo:
        return EngineInfo(
            engine="timed 1",
            model="none",
            engine_id="timed",
            block_size=BLOCK_TOKENS,
            num_blocks=self._kv_tokens // BLOCK_TOKENS,
            max_model_len=1024,
            max_num_seqs=24,
            max_batch_tokens=self._max_batch_tokens,
            kv_bytes_per_token=1,
            transport="none",
        )

    def submit(self, work: Work) -> None:
        self._works[work.work_id] = Going(work)

    def cancel(self, work_ids: Sequence[str], *, ended: bool = False) -> None:
        del ended
        for work_id in work_ids:
            self._works.pop(work_id, None)

    def step(self, compose: Composer) -> StepResult:
        plan = compose([going.seq for going in self._works.values()])
        room = min(plan.max_tokens or self._max_batch_tokens, self._max_batch_tokens)
        order = [*plan.order, *(key for key in self._works if key not in plan.order)]
        outputs: list[Output] = []
        tokens = seqs = decodes = context = kv = 0
        work_done = 0.0
        for going in [self._works[key] for key in order if key not in plan.skip]:
            if room == 0 or not self._admit(going):
                continue
            computed = going.computed or 0
            left = len(going.work.prompt_token_ids) + going.given - computed
            chunk = min(left, room, plan.chunk_tokens.get(going.work.work_id, left))
            room, tokens, seqs = room - chunk, tokens + chunk, seqs + 1
            if computed > 0 and chunk == 1:
                decodes, context = decodes + 1, context + computed
            else:
                work_done += chunk * (computed + chunk / 2)
                kv += computed
            self._compute(going, chunk)
            if chunk == left:
                outputs.append(self._give(going))
        seconds = self._cost.predict(
            tokens, seqs=seqs, context_tokens=context, prefill_work=work_done, prefill_kv_tokens=kv
        )
        report = StepReport(seconds, tokens, seqs, decodes, context, work_done)
        return StepResult(outputs, report if tokens else None)

    def _admit(self, going: Going) -> bool:
        if going.computed is None:
            held = sum(len(g.work.prompt_token_ids) for g in self._works.values() if g.computed is not None)
            prompt = tuple(going.work.prompt_token_ids)
            if held + len(prompt) > self._kv_tokens:
                return False
            going.computed = next(
                (end for end in range(_whole_blocks(len(prompt) - 1), 0, -BLOCK_TOKENS)
                 if prompt[:end] in self._cached),
                0,
            )  # fmt: skip
        return True

    def _compute(self, going: Going, chunk: int) -> None:
        going.computed = (going.computed or 0) + chunk
        prompt = tuple(going.work.prompt_token_ids)
        for end in range(BLOCK_TOKENS, _whole_blocks(min(going.computed, len(prompt))) + 1, BLOCK_TOKENS):
            self._cached.add(prompt[:end])

    def _give(self, going: Going) -> Output:
        going.given += 1
        ended = going.given == going.work.max_tokens
        if ended:
            del self._works[going.work.work_id]
        return Output(going.work.work_id, [0], "length" if ended else None)

    def has_work(self) -> bool:
        return bool(self._works)

    def usage(self) -> Usage:
        running = sum(going.computed is not None for going in self._works.values())
        return Usage(0, 0, running, len(self._works) - running)

    def kept(self) -> dict[str, int]:
        return {}

    def kept_tokens(self) -> int:
        return 0

    def give_up(self, sessions: Sequence[str]) -> None:
        del sessions

    @property
    def kv(self) -> KvPort:
        raise NotImplementedError

    @property
    def prefixes(self) -> PrefixLog:
        return self._prefixes

    def reset_prefix_cache(self) -> bool:
        if self._works:
            return False
        self._cached.clear()
        return True

    @property
    def remembers(self) -> bool:
        """Whether anything is in the prefix cache."""
        return bool(self._cached)

    def profile_step_times(self) -> list[StepReport]:
        return []

    def stop(self) -> None:
        self._works.clear()


def _whole_blocks(tokens: int) -> int:
    return tokens // BLOCK_TOKENS * BLOCK_TOKENS
