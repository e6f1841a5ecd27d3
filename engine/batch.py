"""Algorithm 2: composes the next batch from deadlines, pace and the time that a batch may take.

A batch ends by the earliest due token of a promised decode. Tokens that are due before the next batch could
end go first; then prefills, earliest deadline first, in chunks; then tokens that are not due yet, which
builds slack, and drafts; then prefills whose deadline is lost; best effort comes last. The pace caps the time
of a batch and is never a target: a token is held back only while a queued prefill needs its slot, and never
while KV memory is what binds. Best effort gives up slot and memory, last in first out, to a promise that
lacks them.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import itemgetter

from engine.base import BatchPlan, Seq
from engine.cost import StepCost

MIN_CHUNK_TOKENS = 16  # smaller chunks cost more in attention to what is computed than they bring
ROUNDING_S = 1e-9
CATCH_UP = 0.5  # a batch shrinks to this part of the pace, no further, when a token is late

_due = itemgetter(0)


@dataclass(frozen=True, slots=True)
class Duty:
    """What was promised for a work, on the clock of the composer (absolute seconds).

    `next_token_due_s` is None until the first token. Best effort owes nothing: its times are not read.
    `depth`: tokens of a verify that were planned for it (1: none are drafted); None: what room is left.
    `cached_tokens` of its prompt are believed to have their KV, which shows when it gets its slot.
    """

    work_id: str
    first_token_due_s: float
    tpot_s: float
    next_token_due_s: float | None = None
    best_effort: bool = False
    depth: int | None = None
    cached_tokens: int = 0

    @property
    def due_s(self) -> float:
        """When its next token is due; never, for best effort."""
        if self.best_effort:
            return math.inf
        return self.first_token_due_s if self.next_token_due_s is None else self.next_token_due_s


@dataclass(frozen=True, slots=True)
class Moment:
    """When and on what a batch is composed."""

    now_s: float
    cost: StepCost
    max_batch_tokens: int


class _Pour:
    """A batch that is being filled, within `limit_s`: sequences are offered room, first come first served."""

    def __init__(self, moment: Moment) -> None:
        self.cost = moment.cost
        self.room = moment.max_batch_tokens
        self.limit_s = math.inf
        self.draft_steps = 0  # of the deepest verify that is planned
        self.order: list[str] = []
        self.chunk: dict[str, int] = {}
        self.depth: dict[str, int] = {}
        self.tokens = 0
        self.context_tokens = 0
        self.prefill_work = 0.0
        self.prefill_kv_tokens = 0

    def spare_tokens(self) -> int:
        """Tokens of decodes that still fit."""
        if self.limit_s == math.inf:
            return self.room
        within = self.cost.tokens_in(
            self.limit_s,
            seqs=len(self.order),
            context_tokens=self.context_tokens,
            prefill_work=self.prefill_work,
            prefill_kv_tokens=self.prefill_kv_tokens,
            draft_steps=self.draft_steps,
        )
        return min(self.room, within - self.tokens)

    def fitting(self, seqs: Sequence[Seq]) -> int:
        """How many of these decodes, from the first, end in time when they join what is there."""
        most = min(len(seqs), max(self.room, 0))
        if self.limit_s == math.inf or not most:
            return most
        contexts = list(accumulate([seq.computed_tokens for seq in seqs[:most]]))

        def seconds(count: int) -> float:
            return self.cost.predict(
                self.tokens + count,
                seqs=len(self.order) + count,
                context_tokens=self.context_tokens + contexts[count - 1],
                prefill_work=self.prefill_work,
                prefill_kv_tokens=self.prefill_kv_tokens,
                draft_steps=self.draft_steps,
            )

        if seconds(most) <= self.limit_s + ROUNDING_S:
            return most
        return bisect_right(range(1, most), self.limit_s + ROUNDING_S, key=seconds)

    def decode_all(self, seqs: Sequence[Seq]) -> None:
        """The next token of each, without drafts, while there is room."""
        inside = [seq.work_id for seq in seqs[: self.room]]
        self.order += inside
        self.chunk.update(dict.fromkeys(inside, 1))
        self.depth.update(dict.fromkeys(inside, 0))
        self.tokens += len(inside)
        self.room -= len(inside)
        self.context_tokens += sum([seq.computed_tokens for seq in seqs[: len(inside)]])

    def decode(self, seq: Seq, depth: int | None) -> None:
        """Its next token, if the batch has room, and the drafts that were planned for it."""
        if self.room > 0:
            drafts = 0 if depth is None else min(seq.drafts, depth - 1, self.room - 1)
            self._take(seq, 1 + drafts)
            self.depth[seq.work_id] = drafts
            self.context_tokens += seq.computed_tokens

    def verify(self, seq: Seq, spare: int) -> int:
        """Drafts of a decode that is in, as many as fit in `spare` tokens. Returns how many."""
        if seq.work_id not in self.depth:
            return 0
        drafts = min(seq.drafts, spare)
        self.depth[seq.work_id] = drafts
        self.chunk[seq.work_id] += drafts
        self.tokens += drafts
        self.room -= drafts
        return drafts

    def prefill(self, seq: Seq, left_s: float = math.inf) -> bool:
        """A chunk of what it still needs. A crumb only if that ends the prompt, or the batch were empty.

        Where it ends in this batch, the batch ends within `left_s` if it can. Returns whether it got all.
        """
        needed = seq.prefill_left + 1
        chunk = min(needed, self.room)
        if self.limit_s < math.inf:
            chunk = min(chunk, self._chunk_in(self.limit_s, seq))
        if chunk == needed and left_s < self.limit_s and self._chunk_in(left_s, seq) >= needed:
            self.limit_s = left_s
        crumb = chunk < min(needed, MIN_CHUNK_TOKENS)
        if chunk > 0 and not (crumb and self.order):
            before = (self.tokens, self.room, self.prefill_work, self.prefill_kv_tokens)
            self._take(seq, chunk)
            self.prefill_work += chunk * (seq.computed_tokens + chunk / 2)
            self.prefill_kv_tokens += seq.computed_tokens
            if seq.blocked:  # so far it has used none: others are in the batch as if it were not
                self.tokens, self.room, self.prefill_work, self.prefill_kv_tokens = before
                return True
        return chunk == needed

    def _chunk_in(self, seconds: float, seq: Seq) -> int:
        return self.cost.chunk_in(
            seconds,
            seq.computed_tokens,
            tokens=self.tokens,
            seqs=len(self.order),
            context_tokens=self.context_tokens,
            prefill_work=self.prefill_work,
            prefill_kv_tokens=self.prefill_kv_tokens,
            draft_steps=self.draft_steps,
        )

    def _take(self, seq: Seq, tokens: int) -> None:
        self.order.append(seq.work_id)
        self.chunk[seq.work_id] = tokens
        self.tokens += tokens
        self.room -= tokens

    def plan(
        self, ranked: Sequence[Seq], preempt: Sequence[str], max_batch_tokens: int, draft_tokens: int | None
    ) -> BatchPlan:
        """What got room is in; the rest is held, last of `ranked` last, where memory is taken from first."""
        inside = self.chunk
        held = [seq.work_id for seq in ranked if seq.work_id not in inside]
        return BatchPlan(
            order=(*self.order, *held),
            chunk_tokens=self.chunk,
            skip=frozenset(held),
            depth=self.depth,
            max_tokens=max_batch_tokens,
            preempt=preempt,
            draft_tokens=draft_tokens,
        )


def compose(seqs: Sequence[Seq], duties: Mapping[str, Duty], moment: Moment) -> BatchPlan:
    """The next batch of a replica, in whatever role. A work without a duty is best effort.

    A replica that only prefills has no decodes, so that no pace binds it: its batches are as large as they go.
    """
    now_s = moment.now_s
    decodes: list[tuple[float, Seq, Duty]] = []
    prefills: list[tuple[float, Seq, Duty]] = []
    spare: list[Seq] = []
    planned = drafted = blocked = promise_blocked = False
    for seq in seqs:
        duty = duties.get(seq.work_id)
        blocked = blocked or seq.blocked
        if duty is None or duty.best_effort:
            spare.append(seq)
            continue
        promise_blocked = promise_blocked or seq.blocked
        due_s = duty.next_token_due_s
        if due_s is None:
            due_s = duty.first_token_due_s
        if seq.prompt_tokens + seq.output_tokens - seq.computed_tokens <= 1:
            decodes.append((due_s, seq, duty))
            planned = planned or duty.depth is not None
            drafted = drafted or seq.drafts > 0
        else:
            prefills.append((due_s, seq, duty))
    decodes.sort(key=_due)
    prefills.sort(key=_due)

    pour = _Pour(moment)
    draft_tokens = _draft_tokens(decodes) if planned else None
    pour.draft_steps = draft_tokens or 0
    pour.limit_s, next_s = _bounds(decodes, moment)
    due = len(decodes)
    if prefills and not blocked:
        due = _due_decodes(decodes, now_s + pour.limit_s, next_s, moment)
    must = bisect_right(decodes, now_s + pour.limit_s + ROUNDING_S, key=_due)
    due = min(due, max(must, pour.fitting([seq for _, seq, _ in decodes])))
    _pour_decodes(pour, decodes[:due], drafted=drafted)
    kept, lost = _pour_prefills(pour, prefills, moment)
    if due < len(decodes):
        ahead = pour.fitting([seq for _, seq, _ in decodes[due:]])
        _pour_decodes(pour, decodes[due : due + ahead], drafted=drafted)
    if drafted:
        _verify(pour, [seq for _, seq, duty in decodes if duty.depth is None])
    for seq in lost:
        pour.prefill(seq)
    _pour_spare(pour, spare)

    ranked = [*[seq for _, seq, _ in decodes], *kept, *lost, *spare]
    give_way = _give_way(spare) if promise_blocked else ()
    return pour.plan(ranked, give_way, moment.max_batch_tokens, draft_tokens)


def _pour_decodes(pour: _Pour, decodes: Sequence[tuple[float, Seq, Duty]], *, drafted: bool) -> None:
    if not drafted:
        pour.decode_all([seq for _, seq, _ in decodes])
        return
    for _, seq, duty in decodes:
        pour.decode(seq, duty.depth)


def _pour_prefills(
    pour: _Pour, prefills: Sequence[tuple[float, Seq, Duty]], moment: Moment
) -> tuple[list[Seq], list[Seq]]:
    """Promised prompts, earliest deadline first, until one does not get all that it needs.

    Returns them without, and then those whose deadline could not be met even alone: they wait for the others.
    """
    kept: list[Seq] = []
    lost: list[Seq] = []
    full = False
    for due_s, seq, duty in prefills:
        if full:
            kept.append(seq)
            continue
        left_s = due_s - moment.now_s
        known = seq.prompt_tokens + seq.output_tokens
        computed = seq.computed_tokens if seq.running else max(seq.computed_tokens, duty.cached_tokens)
        if left_s < moment.cost.prefill_alone_s(known, moment.max_batch_tokens, computed):
            lost.append(seq)
            continue
        kept.append(seq)
        full = not pour.prefill(seq, left_s)
    return kept, lost


def _draft_tokens(decodes: Sequence[tuple[float, Seq, Duty]]) -> int | None:
    """How many to draft for the next batch: as the deepest verify needs, if a depth is planned for all."""
    depths = [duty.depth for _, _, duty in decodes]
    return None if None in depths else max(depth for depth in depths if depth is not None) - 1


def _verify(pour: _Pour, decodes: Sequence[Seq]) -> None:
    if any(seq.drafts for seq in decodes):
        room = pour.spare_tokens()
        for seq in decodes:
            if room <= 0:
                break
            room -= pour.verify(seq, room)


def _pour_spare(pour: _Pour, spare: Sequence[Seq]) -> None:
    """Best effort: tokens of those that decode, then prompts, both in the order in which they came."""
    if not spare:
        return
    decodes = [seq for seq in spare if seq.prefill_left == 0]
    pour.decode_all(decodes[: pour.fitting(decodes)])
    for seq in spare:
        if seq.prefill_left > 0:
            pour.prefill(seq)
    _verify(pour, decodes)


def _give_way(spare: Sequence[Seq]) -> tuple[str, ...]:
    """The best-effort sequence that came last, for a promise that lacks what it holds."""
    return tuple(seq.work_id for seq in spare if seq.running)[-1:]


def _bounds(decodes: Sequence[tuple[float, Seq, Duty]], moment: Moment) -> tuple[float, float]:
    """Seconds that this batch may take, and the next one, to keep the pace of these decodes.

    A pace that the decodes alone would break binds nobody: holding prefills back could not save it. One that
    has fallen behind shrinks the batch, by half at most, so that prefills go on and it catches up.
    """
    if not decodes:
        return math.inf, math.inf
    context = sum([seq.computed_tokens for _, seq, _ in decodes])
    alone_s = moment.cost.predict(len(decodes), seqs=len(decodes), context_tokens=context)
    least_s = moment.cost.predict(1, seqs=1, context_tokens=decodes[0][1].computed_tokens)
    limit_s = pace_s = math.inf
    for due_s, _, duty in decodes:
        if duty.tpot_s > alone_s:
            pace_s = min(pace_s, duty.tpot_s)
            left_s = due_s - moment.now_s
            limit_s = min(limit_s, left_s if left_s >= least_s - ROUNDING_S else CATCH_UP * duty.tpot_s)
    return limit_s, pace_s


def _due_decodes(
    decodes: Sequence[tuple[float, Seq, Duty]], end_s: float, next_s: float, moment: Moment
) -> int:
    """How many, from the first, must be in this batch: their token is due before the next one could end.

    And as many more as the next batch could not hold with those that are due before the one after it.
    """
    if next_s == math.inf:
        return len(decodes)
    due = bisect_left(decodes, end_s + next_s, key=_due)
    after = bisect_left(decodes, end_s + 2 * next_s, key=_due) - due
    return due + max(after - moment.cost.tokens_in(next_s), 0) if after else due
