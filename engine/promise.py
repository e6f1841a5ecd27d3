"""One attempt at a request on a node: what was promised, how far it is, and what the node tells of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

from engine.base import BatchPlan, Output, Seq, Work
from engine.batch import Duty
from engine.drafting import Drafted, Drafting
from engine.messages import Account, Delta, Submit, Timing, WorkState
from engine.outbox import attempt_key
from engine.request import Pace, WorkKind
from engine.score import TOLERANCE
from kv_transfer.base import Pull, PullOutcome


@dataclass(slots=True)
class Promise:
    """Times are on the clock of its node. `drafts`: whether the engine drafts for it.

    `batched_s`: when the batch began in which it ran first. `lacks_memory`: it was preempted or found none, and
    has made no token since; `starved`: and was late after it. `thinking_tokens`: up to the end of
    thinking, once that has come.
    """

    submit: Submit
    peer: bytes
    received_s: float
    duty: Duty
    prefill_left: int
    drafted: Drafted
    drafts: bool
    batched_s: float | None = None
    running: bool = False
    lacks_memory: bool = False
    starved: bool = False
    first_token_s: float | None = None
    tokens: int = 0
    offered: bool = False
    pull: Pull | None = None
    thinking_tokens: int | None = None
    thinking_tpot_s: float = 0.0
    account: Account = field(default_factory=Account)

    @classmethod
    def of(cls, submit: Submit, peer: bytes, now_s: float, drafting: Drafting) -> Self:
        """What a peer asked for at `now_s`, when its message came."""
        pace, said_tokens = submit.pace, len(submit.said_token_ids)
        prompt_tokens = len(submit.prompt_token_ids) + said_tokens
        duty = Duty(
            attempt_key(submit),
            now_s + pace.first_token_left_s,
            pace.tpot_s,
            best_effort=pace.best_effort,
            cached_tokens=submit.cached_tokens,
            offers=submit.kind is WorkKind.PREFILL,
            grace_s=_grace_s(pace),
        )
        # As Seq counts.
        prefill_left = prompt_tokens - submit.cached_tokens - 1
        if submit.handoff is not None:
            prefill_left = max(said_tokens - 1, 0)
        estimate = drafting.estimate(submit.class_name)
        drafted = Drafted(submit.class_name, pace.tpot_s, prompt_tokens, 0.0, estimate)
        return cls(submit, peer, now_s, duty, prefill_left, drafted, drafting.on)

    @property
    def prompt_tokens(self) -> int:
        """Tokens that were there before it said one: to a plan, what was said elsewhere is prompt as well."""
        return len(self.submit.prompt_token_ids) + len(self.submit.said_token_ids)

    @property
    def pull_is_due(self) -> bool:
        """Whether KV of it is still to come from another node."""
        return self.submit.handoff is not None and self.pull is None

    @property
    def session(self) -> str | None:
        """The session that it leaves its KV to: where it decodes, as the next call goes on from there."""
        return None if self.duty.offers else self.submit.session

    def work(self) -> Work:
        """For the engine."""
        submit = self.submit
        return Work(
            work_id=self.duty.work_id,
            prompt_token_ids=submit.prompt_token_ids,
            sampling=submit.sampling,
            max_tokens=submit.max_tokens,
            cache_salt=submit.cache_salt,
            offer_kv=self.duty.offers,
            handoff=submit.handoff,
            pull_deadline_s=submit.pull_deadline_s,
            session=self.session,
            said_token_ids=submit.said_token_ids,
        )

    def promote(self, pace: Pace, now_s: float) -> None:
        """It was best effort and is promised now, also if its first token has just been said."""
        due_s = now_s + pace.first_token_left_s
        self.duty = replace(
            self.duty,
            first_token_due_s=due_s,
            tpot_s=pace.tpot_s,
            best_effort=False,
            grace_s=_grace_s(pace),
        )
        self.drafted.tpot_s = pace.tpot_s
        if self.first_token_s is not None:
            self._set_next_due()

    def seen(self, seq: Seq) -> bool:
        """What the engine says of it before a batch. Whether a promise has lost its slot and memory since."""
        lost = self.running and not seq.running
        if lost:
            self.running = False
            self.account.preempted += 1
        preempted = lost and not self.duty.best_effort
        self.lacks_memory |= preempted
        self.lacks_memory |= seq.blocked
        if not self.pull_is_due:
            cached = 0 if seq.running else self.duty.cached_tokens
            self.prefill_left = max(seq.prefill_left - cached, 0)
        return preempted

    def ahead(self, seq: Seq) -> Duty:
        """Its duty once the tokens are said that the batch under way makes for it."""
        made = seq.output_tokens - len(self.submit.said_token_ids) - self.tokens
        if made <= 0 or self.duty.best_effort:
            return self.duty
        return replace(self.duty, next_token_due_s=self.duty.due_s + made * self.duty.tpot_s)

    def say(self, output: Output, now_s: float) -> tuple[Delta, bool]:
        """Tokens, an offer or an end that a batch gave: what its peer is told, and whether a promise was late
        for want of memory."""
        timing = None
        if self.first_token_s is None:
            self.first_token_s = now_s
            timing = self._timing(now_s)
        starved = bool(output.token_ids) and self._starves(now_s)
        before = self.tokens
        self.tokens += len(output.token_ids)
        self._note_thought(before, output.token_ids)
        self._set_next_due()
        self.offered |= output.handoff is not None
        ends = output.finish_reason is not None
        delta = Delta(
            request_id=self.submit.request_id,
            attempt=self.submit.attempt,
            index=len(self.submit.said_token_ids) + before,
            token_ids=list(output.token_ids),
            finish_reason=output.finish_reason,
            stop_reason=output.stop_reason,
            payload=output.payload,
            cached_tokens=output.cached_tokens,
            handoff=output.handoff,
            error=output.error,
            timing=timing,
            account=self.account if ends else None,
        )
        return delta, starved

    def state(self, at_s: float, chunk_tokens: int) -> WorkState:
        """As it will be at `at_s`, when a batch has ended in which it has a chunk (0: in which it is not)."""
        submit, duty = self.submit, self.duty
        prefill_left = 0 if self.offered else self.prefill_left
        says_one = chunk_tokens > prefill_left
        tokens, next_due_s = self.tokens + says_one, duty.next_token_due_s
        if says_one:
            next_due_s = (max(duty.first_token_due_s, at_s) if next_due_s is None else next_due_s) + duty.tpot_s
        return WorkState(
            request_id=submit.request_id,
            attempt=submit.attempt,
            kind=submit.kind,
            prompt_tokens=self.prompt_tokens,
            prefill_left_tokens=max(prefill_left - chunk_tokens, 0),
            output_tokens=tokens,
            max_tokens=submit.max_tokens - len(submit.said_token_ids),
            first_token_left_s=duty.first_token_due_s - at_s,
            tpot_s=duty.tpot_s,
            best_effort=duty.best_effort,
            class_name=submit.class_name,
            next_due_left_s=None if next_due_s is None else next_due_s - at_s,
            acceptance=self.drafted.estimate.acceptance if self.drafts else None,
        )

    def count(self, *, batched: bool) -> None:
        """A batch has ended, and it had tokens in it or not; before what that gave is said."""
        if batched:
            self.account.batches += 1
            self.account.chunks += self.tokens == 0 and not self.pulled
        elif self.running:
            self.account.held += 1

    @property
    def pulled(self) -> bool:
        """Whether its prompt's KV came from another node."""
        return self.pull is not None and self.pull.outcome in (PullOutcome.PULLED, PullOutcome.CACHED)

    def _starves(self, now_s: float) -> bool:
        """It makes a token again. Had it no memory before, and broke its promise for it, the first time?"""
        if not self.lacks_memory:
            return False
        self.lacks_memory = False
        due_s, origin_s = self.duty.due_s, self._origin_s
        late = not self.duty.best_effort and now_s > due_s + TOLERANCE * max(due_s - origin_s, 0.0)
        first = late and not self.starved
        self.starved |= late
        return first

    def _set_next_due(self) -> None:
        """Token n is due at max(first deadline, first token) + (n - 1) * TPOT, piecewise where it has thought
        first (the scoring rule)."""
        duty, origin_s = self.duty, self._origin_s
        thought = 0 if self.thinking_tokens is None else self.thinking_tokens - 1
        next_due_s = origin_s + thought * self.thinking_tpot_s + (self.tokens - thought) * duty.tpot_s
        self.duty = replace(
            duty, next_token_due_s=next_due_s, depth=self.drafted.depth if self.drafts else None
        )

    @property
    def _origin_s(self) -> float:
        """From when on its tokens are paced."""
        due_s = self.duty.first_token_due_s
        if self.first_token_s is None or self.submit.pace.begun:
            return due_s
        return max(due_s, self.first_token_s)

    def _note_thought(self, before: int, token_ids: Sequence[int]) -> None:
        """From the end of thinking on, the pace is that of the answer."""
        answer_tpot_s, end_id = self.submit.pace.answer_tpot_s, self.submit.think_end_id
        if answer_tpot_s is None or end_id is None or self.thinking_tokens is not None:
            return
        if end_id not in token_ids:
            return
        self.thinking_tokens = before + list(token_ids).index(end_id) + 1
        self.thinking_tpot_s = self.duty.tpot_s
        self.duty = replace(self.duty, tpot_s=answer_tpot_s)
        self.drafted.tpot_s = answer_tpot_s

    def _timing(self, now_s: float) -> Timing:
        batched_s = self.batched_s if self.batched_s is not None else now_s
        pull = self.pull
        return Timing(
            queued_s=batched_s - self.received_s,
            first_token_s=now_s - self.received_s,
            pull_s=None if pull is None else pull.seconds,
            pull_outcome=None if pull is None else pull.outcome,
            pulled_bytes=0 if pull is None else pull.kv_bytes,
        )


def note_batched(plan: BatchPlan, here: Sequence[tuple[Seq, Promise]], now_s: float) -> None:
    """Note who enters a first batch. One that was planned and is still waiting next time did not get in."""
    new = [(seq, promise) for seq, promise in here if not promise.running]
    if not new:
        return
    planned = {*(plan.order or (seq.work_id for seq, _ in new))} - plan.skip
    for seq, promise in new:
        promise.running = seq.running
        if seq.work_id in planned and (promise.batched_s is None or not seq.running):
            promise.batched_s = now_s


def _grace_s(pace: Pace) -> float:
    """By how much the first token may be late and is not missed, at the least: what is forgiven of all the time
    that it had is more."""
    return TOLERANCE * max(pace.first_token_left_s, 0.0)
