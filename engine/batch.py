"""Algorithm 2: composes the next batch from deadlines, pace and the time that a batch may take.

A batch ends by the earliest due token of a promised decode. Tokens that are due before the next batch could
end go first; then prefills, earliest deadline first, in chunks; then tokens that are not due yet, which
builds slack, and drafts; then prefills whose deadline is lost; best effort comes last. The pace caps the time
of a batch and is never a target: a token is held back only while a queued prefill needs its slot, and never
while KV memory is what binds. Best effort gives up slot and memory, last in first out, to a promise that
lacks them; its prompts are begun only while memory stays free, and make no long batches where promises are
made. KV that was handed over is pulled by the same rules: promises first, and best effort makes way for it.

The work is done by compiled code (`engine/batch_kernel.py`), which virtual engines call without this front.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from engine.base import BatchPlan, Seq
from engine.cost import StepCost
from engine.rows import NO_PULL, PULL_WAITS, ROW, CostArrays, Rows


@dataclass(frozen=True, slots=True)
class Duty:
    """What was promised for a work, on the clock of the composer (absolute seconds).

    `next_token_due_s` is None until the first token. Best effort owes nothing: its times are not read.
    `grace_s`: by which the first token may be late and is not missed yet.
    `depth`: tokens of a verify that were planned for it (1: none are drafted); None: what room is left.
    `cached_tokens` of its prompt are believed to have their KV, which shows when it gets its slot. `offers`: it
    ends with its prefill, and its KV stays until it is pulled.
    """

    work_id: str
    first_token_due_s: float
    tpot_s: float
    next_token_due_s: float | None = None
    best_effort: bool = False
    depth: int | None = None
    cached_tokens: int = 0
    offers: bool = False
    grace_s: float = 0.0

    @property
    def due_s(self) -> float:
        """When its next token is due; never, for best effort."""
        if self.best_effort:
            return math.inf
        return self.first_token_due_s if self.next_token_due_s is None else self.next_token_due_s


NO_DUTY = Duty("", math.inf, math.inf, best_effort=True)


@dataclass(frozen=True, slots=True)
class Memory:
    """Of a replica, now: KV tokens that it holds in all, those free, and free slots for sequences."""

    kv_tokens: int
    free_tokens: int
    free_slots: int


@dataclass(frozen=True, slots=True)
class Moment:
    """When and on what a batch is composed. `memory`: None where it is not known. `coming_due_s`: the earliest
    first token of a promise whose KV is on its way here. `margin`: share by which a batch may well take longer
    than `cost` says. `promised_s`: when a promise was here last.
    """

    now_s: float
    cost: StepCost
    max_batch_tokens: int
    memory: Memory | None = None
    coming_due_s: float = math.inf
    margin: float = 0.0
    promised_s: float = -math.inf


def compose(seqs: Sequence[Seq], duties: Mapping[str, Duty], moment: Moment) -> BatchPlan:
    """The next batch of a replica, in whatever role. A work without a duty is best effort.

    A replica that only prefills has no decodes, so that no pace binds it: its batches are as large as they go.
    """
    # numba is loaded here and not before: vLLM 0.32 on a CPU cannot start in a process that has loaded it.
    from engine.batch_kernel import POUR, compose_rows

    rows = _rows(seqs, duties)
    pour = np.zeros(1, dtype=POUR)
    memory = moment.memory or UNKNOWN
    pour["kv_tokens"], pour["free_tokens"], pour["free_slots"] = (
        memory.kv_tokens,
        memory.free_tokens,
        memory.free_slots,
    )
    pour["coming_due_s"], pour["margin"] = moment.coming_due_s, moment.margin
    pour["promised_s"] = moment.promised_s
    order = np.empty(len(rows), dtype=np.int64)
    compose_rows(
        rows, np.arange(len(rows)), moment.now_s, _arrays(moment.cost), moment.max_batch_tokens, pour[0], order
    )
    inside, pulls = int(pour[0]["seqs"]), int(pour[0]["pulls"])
    at = order.tolist()
    ids = [seqs[index].work_id for index in at]
    chunks = rows["chunk_tokens"][order].tolist()
    verify = rows["verify_tokens"][order].tolist()
    gives_way = np.flatnonzero(rows["gives_way"]).tolist()
    draft_tokens = int(pour[0]["draft_tokens"])
    return BatchPlan(
        order=tuple(ids),
        chunk_tokens=dict(zip(ids[:inside], chunks, strict=False)),
        skip=frozenset(ids[inside + pulls :]),
        depth={
            seqs[index].work_id: drafts
            for index, drafts in zip(at[:inside], verify, strict=False)
            if seqs[index].prefill_left == 0
        },
        max_tokens=moment.max_batch_tokens,
        preempt=tuple(seqs[index].work_id for index in gives_way),
        draft_tokens=None if draft_tokens < 0 else draft_tokens,
        expected_s=_expected_s(pour[0], moment.cost),
    )


UNKNOWN = Memory(-1, -1, -1)


def warm_up() -> None:
    """Compile the composer, or load it from the cache (seconds), before the first batch waits for it."""
    compose([Seq("warm-up", 8, 0, 0, running=False)], {}, Moment(0.0, StepCost.line(1e-3, 1e-6), 64))


def _rows(seqs: Sequence[Seq], duties: Mapping[str, Duty]) -> Rows:
    """A ROW for each sequence. Column by column: numpy takes twice as long for rows."""
    rows = np.zeros(len(seqs), dtype=ROW)
    rows["prompt_tokens"] = [seq.prompt_tokens for seq in seqs]
    rows["output_tokens"] = [seq.output_tokens for seq in seqs]
    rows["computed_tokens"] = [seq.computed_tokens for seq in seqs]
    rows["drafts"] = [seq.drafts for seq in seqs]
    rows["running"] = [seq.running for seq in seqs]
    rows["blocked"] = [seq.blocked for seq in seqs]
    rows["pull"] = [PULL_WAITS if seq.pull_waits else NO_PULL for seq in seqs]
    mine = [duties.get(seq.work_id, NO_DUTY) for seq in seqs]
    rows["promised"] = [not duty.best_effort for duty in mine]
    rows["due_s"] = [duty.due_s for duty in mine]
    rows["grace_s"] = [duty.grace_s for duty in mine]
    rows["tpot_s"] = [duty.tpot_s for duty in mine]
    rows["depth"] = [duty.depth or 0 for duty in mine]
    rows["offers"] = [duty.offers for duty in mine]
    rows["cached_tokens"] = [duty.cached_tokens for duty in mine]
    return rows


def _expected_s(pour: np.void, cost: StepCost) -> float:
    return cost.predict(
        int(pour["tokens"]),
        seqs=int(pour["seqs"]),
        context_tokens=int(pour["context_tokens"]),
        prefill_work=float(pour["prefill_work"]),
        draft_steps=int(pour["draft_steps"]),
        prefill_kv_tokens=int(pour["prefill_kv_tokens"]),
    )


@lru_cache(maxsize=8)
def _arrays(cost: StepCost) -> CostArrays:
    return CostArrays.of(cost)
