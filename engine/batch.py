"""Algorithm 2: composes the next batch from deadlines, pace and the time that a batch may take.

Due tokens go first. A batch ends before the next token of any promise that is not in it, and takes no longer
than the tightest pace of those decoding now; what it can hold within that time goes to prefills, earliest
deadline first, in chunks; best effort comes last. The pace caps a batch's time and is never a target: a decode
is held back only when there is no room for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from engine.base import BatchPlan, Seq
from engine.cost import StepCost

MIN_CHUNK_TOKENS = 16  # below this a chunk costs a prefill more in attention to its past than it brings


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
    """A batch that is being filled: tokens go to sequences in the order in which they are offered room."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.order: list[str] = []
        self.chunk: dict[str, int] = {}
        self.depth: dict[str, int] = {}

    def decode(self, seq: Seq, drafts: int) -> None:
        """Room for one token and as many drafts as fit; nothing if there is no room at all."""
        if self.room < 1:
            return
        depth = min(drafts, self.room - 1)
        self.order.append(seq.work_id)
        self.depth[seq.work_id] = depth
        self.room -= 1 + depth

    def verify(self, seq: Seq) -> None:
        """Room left over for the drafts of a decode that is already in."""
        more = min(seq.drafts - self.depth[seq.work_id], self.room)
        if more > 0:
            self.depth[seq.work_id] += more
            self.room -= more

    def prefill(self, seq: Seq, *, whole_batch: int) -> None:
        """A chunk of what a prompt still needs; a crumb only if it ends the prompt or nothing else is in."""
        needed = seq.prefill_left + 1
        chunk = min(needed, self.room)
        if chunk < min(needed, MIN_CHUNK_TOKENS, whole_batch) and self.order:
            return
        if chunk > 0:
            self.order.append(seq.work_id)
            self.chunk[seq.work_id] = chunk
            self.room -= chunk

    def plan(self, seqs: Iterable[Seq], max_batch_tokens: int) -> BatchPlan:
        """The plan: what got no room is left out."""
        held = frozenset(seq.work_id for seq in seqs).difference(self.order)
        return BatchPlan(
            order=tuple(self.order),
            chunk_tokens=self.chunk,
            skip=held,
            depth=self.depth,
            max_tokens=max_batch_tokens,
        )


def compose_decode(
    seqs: Sequence[Seq], duties: Mapping[str, Duty], now_s: float, cost: StepCost, max_batch_tokens: int
) -> BatchPlan:
    """The batch of a replica that decodes and may prefill as well. A work without a duty is best effort."""
    promised, spare = _by_promise(seqs, duties)
    decodes = sorted((s for s in promised if s.decoding), key=lambda s: duties[s.work_id].due_s)
    prefills = sorted((s for s in promised if not s.decoding), key=lambda s: duties[s.work_id].due_s)
    pour = _Pour(max_batch_tokens)
    for seq in decodes:
        pour.decode(seq, drafts=0)
    for seq in (s for s in spare if s.decoding):
        # One token each: no prefill gains by leaving a resident's KV idle.
        pour.decode(seq, drafts=0)
    allowed = _allowance(decodes, duties, cost, max_batch_tokens)
    taken = max_batch_tokens - pour.room
    pour.room = min(pour.room, max(allowed - taken, 0))
    for seq in decodes:
        pour.verify(seq)
    for seq in prefills:
        pour.prefill(seq, whole_batch=max_batch_tokens)
    for seq in (s for s in spare if not s.decoding):
        pour.prefill(seq, whole_batch=max_batch_tokens)
    return pour.plan(seqs, max_batch_tokens)
