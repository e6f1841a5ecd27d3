"""Measures chosen batches on a real engine, through the engine contract alone.

Decodes of many contexts stay resident, and each batch names those that it wants and leaves the rest out. What
a chunk needs computed before it is a prefix of the longest resident prompt, so the prefix cache has it.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from engine.base import BatchPlan, Composer, Engine, EngineInfo, Output, Seq, StepReport, Work
from engine.batch_shapes import Limits, Shape
from engine.errors import EngineError
from engine.step_table import StepRow

MAX_RESIDENTS = 64
SHORTER = 0.9  # contexts that do not fit in the KV cache are tried again with the longest so much shorter
MIN_CONTEXT_TOKENS = 16
SPARE_SEQS = 4  # for chunks beside the resident decodes
MAX_TRIES = 50  # steps of the start-up that give nothing
VOCABULARY = 1000  # of the model's token ids, those that prompts are made of


@dataclass(frozen=True, slots=True)
class Measured:
    """One step of a shape: its row, or None if the engine ran another batch than was asked for.

    `waited_s`: how long other processes had the core during the step; the row is without it.
    """

    shape: Shape
    row: StepRow | None
    waited_s: float = 0.0


class StepMeter:
    """An idle engine with resident decodes. `sampling` encodes "greedy, N tokens, no stop" for this engine.

    `steps`: how many will be measured from one `prepare` to the next, at most. `waited_s`: how long this thread
    has waited for a core since it started.
    """

    def __init__(
        self,
        engine: Engine,
        info: EngineInfo,
        sampling: Callable[[int], bytes],
        *,
        steps: int,
        seed: int,
        waited_s: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._engine = engine
        self._sampling = sampling
        self._random = random.Random(seed)
        self._waited_s = waited_s
        self._composed_s = 0.0
        self._seqs: dict[str, Seq] = {}
        self._made = 0
        # Every step makes the contexts one token longer at most.
        longest = info.max_model_len - steps - 2
        if longest < MIN_CONTEXT_TOKENS:
            raise EngineError(f"{steps} steps do not fit in a context of {info.max_model_len} tokens")
        count = min(MAX_RESIDENTS, info.max_num_seqs - SPARE_SEQS)
        # Room stays for a batch of chunks, and for what decodes grow by: each is in half of the steps at most.
        grown = count * (steps // 2 + info.block_size)
        room = info.num_blocks * info.block_size - info.max_batch_tokens - grown
        while longest > MIN_CONTEXT_TOKENS and sum(_contexts(count, longest)) + longest > room:
            longest = max(int(longest * SHORTER), MIN_CONTEXT_TOKENS)
        contexts = _contexts(count, longest)
        self._residents = {f"resident-{i}": self._tokens(context) for i, context in enumerate(contexts)}
        self._steps = steps
        self._prefix = [*self._residents.values()][-1]
        block = info.block_size
        room = info.max_model_len - info.max_batch_tokens - 2
        kv_tokens = max(min(len(self._prefix) - 1, room), 0) // block * block
        self.limits = Limits(len(self._residents), info.max_batch_tokens, kv_tokens, block)

    def prepare(self) -> Iterator[float]:
        """Prefill the residents; yields the share that is done. Raises EngineError if they do not all fit.

        Called again, it gives them the contexts that they had at first: the prefix cache has most of it.
        """
        self._engine.cancel(list(self._residents))
        for name, prompt in self._residents.items():
            self._engine.submit(Work(name, prompt, self._sampling(self._steps + 2), self._steps + 2))
        tries = 0
        while True:
            report, _ = self._step(_hold_decodes)
            decoding = sum(seq.decoding for seq in self._seqs.values())
            if decoding == len(self._residents):
                return
            tries = 0 if report is not None else tries + 1
            if tries > MAX_TRIES or self._engine.usage().running == 0:
                raise EngineError(f"only {decoding} of {len(self._residents)} decodes fit in the KV cache")
            yield decoding / len(self._residents)

    def measure(self, shape: Shape) -> Measured:
        """Run one batch of this shape, and leave nothing of its chunks behind."""
        decodes = self._choose(shape)
        chunks = {self._submit(chunk, kv): chunk for chunk, kv in shape.chunks}
        held = frozenset(self._residents) - set(decodes)
        plan = BatchPlan(
            order=(*decodes, *chunks),
            chunk_tokens={**dict.fromkeys(decodes, 1), **chunks},
            skip=held,
            max_tokens=shape.tokens,
        )
        report, outputs = self._step(lambda _: plan)
        waited_s = self._waited_s() - self._composed_s
        self._engine.cancel(list(chunks))
        ended = {output.work_id for output in outputs if output.finish_reason is not None}
        if ended & set(self._residents):
            raise EngineError("a resident decode ended: fewer steps were announced than are run")
        return Measured(shape, _row(shape, report, waited_s), waited_s)

    def close(self) -> None:
        """Drop the residents and what they left in the prefix cache."""
        self._engine.cancel(list(self._residents))
        self._engine.reset_prefix_cache()

    def _step(self, compose: Composer) -> tuple[StepReport | None, Sequence[Output]]:
        def look(seqs: Sequence[Seq]) -> BatchPlan:
            self._seqs = {seq.work_id: seq for seq in seqs}
            self._composed_s = self._waited_s()
            return compose(seqs)

        result = self._engine.step(look)
        return result.report, result.outputs

    def _choose(self, shape: Shape) -> list[str]:
        by_context = list(self._residents)
        if shape.contexts == "any":
            return self._random.sample(by_context, shape.decodes)
        return by_context[: shape.decodes] if shape.contexts == "short" else by_context[::-1][: shape.decodes]

    def _submit(self, chunk: int, kv_tokens: int) -> str:
        self._made += 1
        name = f"chunk-{self._made}"
        prompt = [*self._prefix[:kv_tokens], *self._tokens(chunk)]
        self._engine.submit(Work(name, prompt, self._sampling(1), 1))
        return name

    def _tokens(self, count: int) -> list[int]:
        return [self._random.randrange(VOCABULARY) for _ in range(count)]


def median_rows(rounds: Sequence[Sequence[Measured]]) -> list[StepRow]:
    """The median step of every shape; shapes that never ran as asked are left out.

    The row is that of one step, not a mean: the contexts differ a little from round to round.
    """
    rows = []
    for of_shape in zip(*rounds, strict=True):
        ran = sorted((m.row for m in of_shape if m.row is not None), key=lambda row: row.step_ms)
        if ran:
            middle = statistics.median_low([row.step_ms for row in ran])
            rows.append(next(row for row in ran if row.step_ms == middle))
    return rows


def _hold_decodes(seqs: Sequence[Seq]) -> BatchPlan:
    return BatchPlan(skip=frozenset(seq.work_id for seq in seqs if seq.decoding))


def _contexts(count: int, longest: int) -> list[int]:
    """Prompt lengths of the residents, shortest first, evenly spread on a log scale."""
    ratio = longest / MIN_CONTEXT_TOKENS
    return [round(MIN_CONTEXT_TOKENS * ratio ** (index / max(count - 1, 1))) for index in range(count)]


def _row(shape: Shape, report: StepReport | None, waited_s: float) -> StepRow | None:
    work = sum(chunk * (kv + chunk / 2) for chunk, kv in shape.chunks)
    as_asked = report is not None and (
        report.tokens == shape.tokens
        and report.decode_seqs == shape.decodes
        and abs(report.prefill_work - work) < 0.5
    )
    if report is None or not as_asked or waited_s >= report.seconds:
        return None
    return StepRow(
        tokens=report.tokens,
        seqs=report.seqs,
        decode_seqs=report.decode_seqs,
        decode_context_tokens=report.decode_context_tokens,
        prefill_chunks=shape.chunks,
        prefill_work=work,
        step_ms=(report.seconds - waited_s) * 1e3,
    )
