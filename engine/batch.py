"""Algorithm 2: composes the next batch from deadlines, pace and the time that a batch may take.

Tokens of promised decodes go first, earliest due first. The batch takes no longer than the tightest pace
among them; what it can hold within that time goes to prefills, earliest deadline first, in chunks, then to
drafts; best effort comes last. The pace caps the time of a batch and is never a target: a promised decode is
left out only when the batch cannot hold it. Best effort gives up slot and memory, last in first out, to a
promise that lacks them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engine.base import BatchPlan, Seq
from engine.cost import StepCost

MIN_CHUNK_TOKENS = 16  # smaller chunks cost more in attention to what is computed than they bring
CATCH_UP = 0.5  # a batch shrinks to this part of the pace, no further, when a token is late


@dataclass(frozen=True, slots=True)
class Duty:
    """What was promised for a work, on the clock of the composer (absolute seconds).

    `next_token_due_s` is None until the first token. Best effort owes nothing: its times are not read.
    """

    work_id: str
    first_token_due_s: float
    tpot_s: float
    next_token_due_s: float | None = None
    best_effort: bool = False

    @property
    def due_s(self) -> float:
        """When its next token is due; never, for best effort."""
        if self.best_effort:
            return math.inf
        return self.first_token_due_s if self.next_token_due_s is None else self.next_token_due_s


class _Pour:
    """A batch that is being filled: sequences are offered room, first come first served."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.order: list[str] = []
        self.chunk: dict[str, int] = {}
        self.depth: dict[str, int] = {}

    def decode(self, seq: Seq) -> None:
        """Its next token, without drafts, if there is room."""
        if self.room > 0:
            self._take(seq, 1)
            self.depth[seq.work_id] = 0

    def verify(self, seq: Seq) -> None:
        """What room is left for the drafts of a decode that is in."""
        if seq.work_id in self.depth:
            depth = min(seq.drafts, self.room)
            self.depth[seq.work_id] = depth
            self.chunk[seq.work_id] += depth
            self.room -= depth

    def prefill(self, seq: Seq) -> None:
        """A chunk of what it still needs. A crumb only if that ends the prompt, or the batch were empty."""
        needed = seq.prefill_left + 1
        chunk = min(needed, self.room)
        crumb = chunk < min(needed, MIN_CHUNK_TOKENS)
        if chunk > 0 and not (crumb and self.order):
            self._take(seq, chunk)
            if seq.blocked:
                self.room += chunk  # so far it has used none: others are in the batch as if it were not

    def _take(self, seq: Seq, tokens: int) -> None:
        self.order.append(seq.work_id)
        self.chunk[seq.work_id] = tokens
        self.room -= tokens

    def plan(self, ranked: Sequence[Seq], preempt: Sequence[str], max_batch_tokens: int) -> BatchPlan:
        """What got room is in; the rest is held, last of `ranked` last, where memory is taken from first."""
        inside = set(self.order)
        held = [seq.work_id for seq in ranked if seq.work_id not in inside]
        return BatchPlan(
            order=(*self.order, *held),
            chunk_tokens=self.chunk,
            skip=frozenset(held),
            depth=self.depth,
            max_tokens=max_batch_tokens,
            preempt=preempt,
        )


def compose_decode(
    seqs: Sequence[Seq], duties: Mapping[str, Duty], now_s: float, cost: StepCost, max_batch_tokens: int
) -> BatchPlan:
    """The batch of a replica that decodes and may prefill as well. A work without a duty is best effort."""
    promised, spare = _by_promise(seqs, duties)
    decodes, prefills = _by_stage(promised)
    pour = _Pour(max_batch_tokens)
    for seq in decodes:
        pour.decode(seq)
    allowed = _allowed_tokens([duties[seq.work_id] for seq in decodes], now_s, cost, max_batch_tokens)
    pour.room = max(min(pour.room, allowed - len(pour.order)), 0)
    for seq in prefills:
        pour.prefill(seq)
    for seq in decodes:
        pour.verify(seq)
    _pour_spare(pour, spare)
    return pour.plan([*decodes, *prefills, *spare], _give_way(promised, spare), max_batch_tokens)


def compose_prefill(
    seqs: Sequence[Seq], duties: Mapping[str, Duty], now_s: float, cost: StepCost, max_batch_tokens: int
) -> BatchPlan:
    """The batch of a replica that keeps no pace: earliest deadline first, the whole budget."""
    promised, spare = _by_promise(seqs, duties)
    pour = _Pour(max_batch_tokens)
    for seq in promised:
        if seq.prefill_left == 0:
            pour.decode(seq)
        else:
            pour.prefill(seq)
    _pour_spare(pour, spare)
    return pour.plan([*promised, *spare], _give_way(promised, spare), max_batch_tokens)


def _pour_spare(pour: _Pour, spare: Sequence[Seq]) -> None:
    """Best effort: tokens of those that decode, then prompts, both in the order in which they came."""
    decodes, prefills = _by_stage(spare)
    for seq in decodes:
        pour.decode(seq)
    for seq in prefills:
        pour.prefill(seq)
    for seq in decodes:
        pour.verify(seq)


def _give_way(promised: Sequence[Seq], spare: Sequence[Seq]) -> tuple[str, ...]:
    """The best-effort sequence that came last, if a promise lacks the slot or the memory that it holds."""
    if not any(seq.blocked for seq in promised):
        return ()
    return tuple(seq.work_id for seq in spare if seq.running)[-1:]


def _by_promise(seqs: Sequence[Seq], duties: Mapping[str, Duty]) -> tuple[list[Seq], list[Seq]]:
    """The promised, earliest due first, and best effort as it came."""
    due_s = {key: duty.due_s for key, duty in duties.items() if not duty.best_effort}
    promised = sorted((s for s in seqs if s.work_id in due_s), key=lambda s: due_s[s.work_id])
    return promised, [seq for seq in seqs if seq.work_id not in due_s]


def _by_stage(seqs: Sequence[Seq]) -> tuple[list[Seq], list[Seq]]:
    """Those one token away from their next output (a pulled prompt too), and those with more to compute."""
    decodes = [seq for seq in seqs if seq.prefill_left == 0]
    return decodes, [seq for seq in seqs if seq.prefill_left > 0]


def _allowed_tokens(duties: Sequence[Duty], now_s: float, cost: StepCost, max_batch_tokens: int) -> int:
    """Tokens of a batch that keeps the pace of these decodes, all of which are in it.

    A pace that the decodes alone would break binds nobody: holding prefills back could not save it. One that
    has fallen behind shrinks the batch, by half at most, so that prefills go on and it catches up.
    """
    alone_s = cost.predict(len(duties))
    kept = [duty for duty in duties if duty.tpot_s > alone_s]
    if not kept:
        return max_batch_tokens
    pace_s = min(duty.tpot_s for duty in kept)
    gap_s = min(duty.due_s for duty in kept) - now_s
    return cost.tokens_in(min(pace_s, max(gap_s, CATCH_UP * pace_s)))
