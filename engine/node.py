"""A node: one engine, its promises, and the socket through which it is asked to keep them.

The state of a promise lives here, where the work is. Peers are endpoints (which submit and cancel, and get
tokens) and coordinators (which set roles and get reports). An endpoint that falls silent takes its work with
it; a coordinator that falls silent takes nothing.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import replace

from engine.base import UNPLANNED, BatchPlan, Engine, EngineInfo, Output, Seq, StepResult
from engine.batch import Memory, Moment
from engine.cost import StepCost
from engine.drafting import Drafting
from engine.errors import RequestError
from engine.messages import (
    TELL_EVERY_S,
    Cancel,
    CloseSession,
    Credit,
    Declined,
    Delta,
    Deltas,
    ListPrefixes,
    ListSessions,
    Message,
    PrefixesListed,
    ProbeLinks,
    Promote,
    Release,
    Report,
    RoleSet,
    SessionsListed,
    SetRole,
    Submit,
)
from engine.outbox import Outbox, attempt_key
from engine.probing import Probing
from engine.promise import Promise, note_batched
from engine.request import RoleName, WorkKind
from engine.role import Role
from engine.sessions import KV_SHARE, TTL_S, Sessions
from engine.socket import Heard, Line
from engine.speed import Speed
from engine.tally import Tally
from engine.under_way import UnderWay
from kv_transfer.base import Pull, PullOutcome

logger = logging.getLogger(__name__)

IDLE_WAIT_S = 0.05
PULL_WAIT_S = 0.001  # something waits for what the next step may find
LEASE_WAIT_S = 0.005  # nobody waits: only leases, and bytes of pulls that were given up
REPORT_EVERY_S = 0.1
FORGET_PEER_S = 60.0  # after its work was dropped
RECENT_PULLS = 64
ROLE_GRACE_S = 10.0  # for what was placed here before a change of role, and comes after it
KV_BOUND_SHARE = 0.9  # of the blocks in use: from there on memory is what binds
NO_CREDIT = "no credit granted: reconnect"  # an endpoint knows this reason, and does


class Node:
    """Runs an engine in a role. Everything but the socket happens in the thread that calls `run`.

    A host of many nodes calls no `run`: it hears, composes, takes results and keeps up for each in turn.
    """

    def __init__(
        self,
        name: str,
        engine: Engine,
        info: EngineInfo,
        roles: Mapping[RoleName, Role],
        role: RoleName,
        cost: StepCost,
        socket: Line,
        *,
        clock: Callable[[], float] = time.monotonic,
        max_waiting: int = 256,
        peer_silent_s: float = 3.0,
        session_ttl_s: float = TTL_S,
        session_kv_share: float = KV_SHARE,
    ) -> None:
        self.name = name
        self.boot_id = uuid.uuid4().hex[:12]
        self._engine = engine
        self._info = info
        self._roles = roles
        self._role = self._former = roles[role]
        self._former_until_s = -math.inf
        self._role_pause_s: float | None = None
        self._pauses_since_s: float | None = None  # a change of role, the end of the batch before it
        self._speed = Speed(cost, clock())
        self._drafting = Drafting(info.max_draft_tokens)
        self._under_way = UnderWay()
        self._socket = socket
        self._clock = clock
        self._max_waiting = max_waiting
        self._peer_silent_s = peer_silent_s
        self._promises: dict[str, Promise] = {}
        self._probing = Probing(engine.kv, clock)
        self._sessions = Sessions(session_ttl_s, int(session_kv_share * info.num_blocks * info.block_size))
        self._outboxes: dict[bytes, Outbox] = {}
        self._recent_pulls: deque[Pull] = deque(maxlen=RECENT_PULLS)
        self._tally = Tally()
        self._local_prefills = 0
        self._corrupt_pulls = 0
        self._promises_preempted = 0
        self._promises_starved = 0
        self._ended_s: float | None = None  # the last step, if this turn followed it at once
        self._next_upkeep_s = 0.0
        self._told_s = -math.inf
        self._promised_s = -math.inf  # when a promise was here last
        self._stopping = threading.Event()

    @property
    def role(self) -> RoleName:
        """The role that the node has now."""
        return self._role.name

    def stop(self) -> None:
        """Ask `run` to return after the present step."""
        self._stopping.set()

    def run(self) -> None:
        """Serve until `stop`. Raises what the engine raises, after handing its work back to be placed again."""
        self._publish_report()
        self._socket.start()
        try:
            while not self._stopping.is_set():
                self._turn()
        except Exception:
            self._hand_back("the engine failed")
            raise
        finally:
            self._socket.stop()

    def _turn(self) -> None:
        wait_s = 0.0
        if self._engine.has_work():
            if not self._step():
                usage = self._engine.usage()
                wait_s = PULL_WAIT_S if usage.running or usage.waiting else LEASE_WAIT_S
        else:
            wait_s = PULL_WAIT_S if self._probing.busy else IDLE_WAIT_S
            self._tell_that_nothing_is_left()
        if wait_s > 0:
            self._ended_s = None
        self.hear(wait_s)
        now_s = self._clock()
        if now_s >= self._next_upkeep_s:
            self._next_upkeep_s = now_s + REPORT_EVERY_S
            self.keep_up()

    def _tell_that_nothing_is_left(self) -> None:
        """At once: what comes next begins as it comes, and who places something beside it counts on that."""
        if not self._promises and self._socket.report is not None and self._socket.report.works:
            self._publish_report()
            self._socket.tell()

    def hear(self, wait_s: float = 0.0) -> None:
        """Do what peers have asked for since the last call, waiting up to `wait_s` for the first."""
        for heard in self._socket.drain(wait_s):
            self._handle(heard)
        for asker, probed in self._probing.go_on():
            self._socket.send(asker, probed)

    def keep_up(self) -> None:
        """What is due now and then: peers and offers that are gone, what drafts are worth, a report."""
        now_s = self._clock()
        self._drop_silent_peers(now_s)
        self._drop_ended_offers()
        if not self._engine.has_work():
            self._speed.rest(now_s)
        self._plan_depths(now_s)
        kept, kept_tokens = self._engine.kept(), self._engine.kept_tokens()
        self._engine.give_up(self._sessions.review(kept, now_s, kept_tokens))
        self._publish_report()

    @property
    def busy(self) -> bool:
        """Whether anything is promised or going on here."""
        return bool(self._promises) or self._engine.has_work()

    # ---- what peers ask ----------------------------------------------------------------------------------

    def _handle(self, heard: Heard) -> None:
        """Do what a message asks. One that cannot be done costs its sender an answer, and others nothing."""
        peer, message = heard.peer, heard.message
        try:
            self._do(peer, message, heard.at_s)
        except Exception as error:
            logger.exception("%s: handling %s of %r", self.name, type(message).__name__, peer)
            self._answer_failed(peer, message, f"{self.name} failed to take it: {error}")

    def _do(self, peer: bytes, message: Message, came_s: float) -> None:
        match message:
            case Submit():
                self._submit(peer, message, came_s)
            case Cancel() | Release():
                if peer in self._outboxes:
                    self._outboxes[peer].forget(attempt_key(message))
                self._drop([attempt_key(message)], ended=isinstance(message, Cancel) and message.ended)
            case Promote():
                self._promote(message, came_s)
            case Credit(messages):
                outbox = self._outboxes.setdefault(peer, Outbox())
                outbox.credit += messages
                self._flush(peer, outbox)
            case SetRole(call_id, role):
                self._change_role(role)
                self._socket.send(peer, RoleSet(call_id, self._role.name))
            case ProbeLinks():
                self._probing.begin(peer, message)
            case ListSessions(call_id):
                listed = SessionsListed(call_id, self._sessions.version, dict(self._sessions.kept))
                self._socket.send(peer, listed)
            case ListPrefixes(call_id, since):
                self._socket.send(peer, PrefixesListed(call_id, self._engine.prefixes.since(since)))
            case CloseSession(session):
                self._engine.give_up([session])
                self._sessions.close(session)
            case _:
                logger.warning("%s: a node does not take %s", self.name, type(message).__name__)

    def _answer_failed(self, peer: bytes, message: Message, reason: str) -> None:
        match message:
            case Submit():
                promise = self._promises.get(attempt_key(message))
                if promise is not None and promise.submit is message:
                    self._drop([attempt_key(message)])
                self._socket.send(peer, Declined(message.request_id, message.attempt, reason))
            case _:
                pass

    def _submit(self, peer: bytes, submit: Submit, came_s: float) -> None:
        reason = self._declines(peer, submit)
        if reason is not None:
            self._socket.send(peer, Declined(submit.request_id, submit.attempt, reason))
            return
        promise = Promise.of(submit, peer, came_s, self._drafting)
        work = promise.work()
        self._promises[work.work_id] = promise
        if promise.session is not None:
            self._sessions.called(promise.session, self._clock())
        try:
            self._engine.submit(work)
        except RequestError as error:
            self._forget(work.work_id)
            failed = Delta(
                submit.request_id,
                submit.attempt,
                index=len(submit.said_token_ids),
                token_ids=[],
                finish_reason="error",
                error=str(error),
                error_status=error.http_status,
            )
            self._queue(peer, [failed])

    def _change_role(self, role: RoleName) -> None:
        """From now on, whatever is going on: batches are composed alike in every role."""
        if role is not self._role.name:
            self._former, self._former_until_s = self._role, self._clock() + ROLE_GRACE_S
            self._role_pause_s, self._pauses_since_s = None, self._ended_s
        self._role = self._roles[role]
        self._publish_report()

    def _promote(self, message: Promote, came_s: float) -> None:
        promise = self._promises.get(attempt_key(message))
        if promise is not None and promise.duty.best_effort:
            promise.promote(message.pace, came_s)

    def _declines(self, peer: bytes, submit: Submit) -> str | None:
        """Why this work is not taken; None if it is."""
        if peer not in self._outboxes:
            return NO_CREDIT  # it was forgotten while it slept: what it grants comes with a new link
        reason = self._role.declines(submit.kind)
        if submit.kind is WorkKind.PREFILL and submit.session in self._sessions.kept:
            reason = None  # the history is here: it is handed over from here, whatever the role
        if reason is not None and self._clock() < self._former_until_s:
            reason = self._former.declines(submit.kind)
        if reason is not None:
            return reason
        # What is promised has its place in the plan, however much waits.
        if submit.pace.best_effort and self._engine.usage().waiting >= self._max_waiting:
            return f"{self._max_waiting} requests wait here already"
        return "this attempt is here already" if attempt_key(submit) in self._promises else None

    def _drop(self, keys: Sequence[str], *, ended: bool = False) -> None:
        known = [key for key in keys if key in self._promises]
        self._engine.cancel(known, ended=ended)
        for key in known:
            self._engine.kv.release(key)
            self._forget(key)

    def _forget(self, key: str) -> None:
        """It is over here, however it ended."""
        promise = self._promises.pop(key)
        if promise.session is not None:
            self._sessions.answered(promise.session, self._clock())

    # ---- one step ----------------------------------------------------------------------------------------

    def _step(self) -> bool:
        self._socket.step_began_s = time.monotonic()
        try:
            result = self._engine.step(self.compose)
        finally:
            self._socket.step_began_s = None
        return self.take(self._whole(result))

    def _whole(self, result: StepResult) -> StepResult:
        """With all that a batch took of this node's time, where one followed on another: what is done between
        two steps delays the next token as much as the step does.
        """
        before_s, self._ended_s = self._ended_s, None if result.report is None else self._clock()
        if result.report is None or before_s is None or self._ended_s is None:
            return result
        seconds = max(result.report.seconds, self._ended_s - before_s)
        return replace(result, report=replace(result.report, seconds=seconds))

    def take(self, result: StepResult) -> bool:
        """Tell peers what a step gave, and learn from it. Whether a batch ran, or runs now."""
        for pull in self._engine.kv.take_pulls():
            self._note_pull(pull)
        self._under_way.step(result)
        if result.report is not None:
            for work_id, one in self._promises.items():
                one.count(batched=work_id in result.batched)
        by_peer: dict[bytes, list[Delta]] = {}
        for output in result.outputs:
            promise = self._promises.get(output.work_id)
            if promise is not None:
                by_peer.setdefault(promise.peer, []).append(self._delta(promise, output))
        for peer, deltas in by_peer.items():
            self._queue(peer, deltas)
        if result.report is not None:
            self._tally.batch(result.report, self._speed.learn(result.report, self._clock()))
        elif not result.begun and self._socket.report is not None and self._socket.report.in_flight_s > 0:
            self._publish_report()  # what was told of did not begin
        return result.report is not None or result.begun

    def compose(self, seqs: Sequence[Seq]) -> BatchPlan:
        """The next batch, by the rules of the present role. It begins when those under way are over."""
        now_s = self._clock()
        begins_s = max(self._under_way.ends_s, now_s)
        if self._pauses_since_s is not None:
            self._role_pause_s, self._pauses_since_s = now_s - self._pauses_since_s, None
        here = [(seq, self._promises[seq.work_id]) for seq in seqs if seq.work_id in self._promises]
        self._promises_preempted += sum(promise.seen(seq) for seq, promise in here)
        if any(not promise.duty.best_effort for _, promise in here):
            self._promised_s = now_s
        alone = len(seqs) == 1 and seqs[0].running and not seqs[0].blocked
        if alone and not self._drafting.on:  # what drafts were worth is learned from planned batches
            plan = UNPLANNED  # alone, it gets the whole batch under any plan
        else:
            overlaps = self._engine.overlaps
            duties = {seq.work_id: promise.ahead(seq) if overlaps else promise.duty for seq, promise in here}
            moment = Moment(
                begins_s,
                self._speed.cost,
                self._info.max_batch_tokens,
                self._memory(),
                self._coming_due_s(seqs),
                self._speed.batch_margin,
                self._promised_s,
            )
            plan = self._role.compose(seqs, duties, moment)
        note_batched(plan, here, begins_s)
        self._tally.plan(plan, seqs)
        stalled = self._under_way.stalled
        self._under_way.compose(plan, begins_s)
        due = now_s - self._told_s >= TELL_EVERY_S or plan.expected_s >= TELL_EVERY_S
        if due and not stalled:
            self._told_s = now_s
            self._publish_report(plan, begins_s)
            self._socket.tell()
        return plan

    def _coming_due_s(self, seqs: Sequence[Seq]) -> float:
        """When the first token is due, at the earliest, of a promise whose KV is on its way here."""
        waiting = {seq.work_id for seq in seqs if seq.pull_waits}
        coming = (
            promise.duty.due_s
            for work_id, promise in self._promises.items()
            if promise.pull_is_due and work_id not in waiting and not promise.duty.best_effort
        )
        return min(coming, default=math.inf)

    def _memory(self) -> Memory:
        usage, info = self._engine.usage(), self._info
        return Memory(
            usage.num_blocks * info.block_size,
            (usage.num_blocks - usage.used_blocks) * info.block_size,
            info.max_num_seqs - usage.running,
        )

    def _note_pull(self, pull: Pull) -> None:
        self._recent_pulls.append(pull)
        promise = self._promises.get(pull.request_id)
        if promise is None:
            return  # cancelled, and its pull with it
        promise.pull = pull
        if pull.outcome not in (PullOutcome.PULLED, PullOutcome.CACHED):
            self._local_prefills += 1
            self._corrupt_pulls += pull.outcome is PullOutcome.CORRUPT
            logger.warning(
                "%s: KV of %s not used (%s): %s", self.name, pull.request_id, pull.outcome, pull.detail
            )

    def _delta(self, promise: Promise, output: Output) -> Delta:
        if self._drafting.on and output.token_ids:
            drafts, drafted = self._under_way.depths.get(output.work_id, 0), promise.drafted
            new = len(output.token_ids)
            drafted.estimate = self._drafting.verified(drafted.class_name, drafted.estimate, drafts, new)
            promise.account.drafted_tokens += drafts
            promise.account.accepted_tokens += min(new - 1, drafts)
        delta, starved = promise.say(output, self._clock())
        self._promises_starved += starved
        if output.handoff is None and output.finish_reason is not None:
            self._forget(output.work_id)
        return delta

    def _queue(self, peer: bytes, deltas: Sequence[Delta]) -> None:
        outbox = self._outboxes[peer]
        for delta in deltas:
            outbox.add(delta)
        self._flush(peer, outbox)

    def _flush(self, peer: bytes, outbox: Outbox) -> None:
        if outbox.deltas and outbox.credit > 0:
            outbox.credit -= 1
            self._socket.send(peer, Deltas(self.name, outbox.deltas))
            outbox.deltas = []

    # ---- upkeep ------------------------------------------------------------------------------------------

    def _drop_silent_peers(self, now_s: float) -> None:
        for peer, heard_s in self._socket.heard():
            silent_s = now_s - heard_s
            if silent_s > self._peer_silent_s:
                self._drop_work_of(peer)
            if silent_s > self._peer_silent_s + FORGET_PEER_S:
                self._outboxes.pop(peer, None)
                self._socket.forget(peer, heard_s)

    def _drop_work_of(self, peer: bytes) -> None:
        """Drop the work of a peer that sleeps. Its credit stays, and it is told: it goes on if it wakes."""
        mine = {key: promise for key, promise in self._promises.items() if promise.peer == peer}
        outbox = self._outboxes.get(peer, Outbox())
        unsent = {attempt_key(delta): (delta.request_id, delta.attempt) for delta in outbox.deltas}
        if not mine and not unsent:
            return
        logger.warning("%s: %r fell silent, dropping its %d requests", self.name, peer, len(mine))
        self._drop(list(mine))
        outbox.deltas = []
        untold = unsent | {
            key: (promise.submit.request_id, promise.submit.attempt)
            for key, promise in mine.items()
            if not promise.offered  # it has been told of these: the stream is elsewhere
        }
        for request_id, attempt in untold.values():
            declined = Declined(request_id, attempt, f"{self.name} dropped it: the endpoint had been silent")
            self._socket.send(peer, declined)

    def _drop_ended_offers(self) -> None:
        """Forget offers whose lease is over: pulled, or run out."""
        offered = [key for key, promise in self._promises.items() if promise.offered]
        if offered:
            leased = {lease.request_id for lease in self._engine.kv.leases()}
            for key in offered:
                if key not in leased:
                    self._forget(key)

    def _hand_back(self, reason: str) -> None:
        for promise in self._promises.values():
            if promise.offered:
                continue  # the stream is elsewhere, and goes on without this KV
            declined = Declined(promise.submit.request_id, promise.submit.attempt, f"{self.name}: {reason}")
            self._socket.send(promise.peer, declined)

    def _plan_depths(self, now_s: float) -> None:
        """How deep drafts go from now on. Memory binds when the engine is nearly full of promises."""
        if not self._drafting.on:
            return
        decoding = []
        for promise in self._promises.values():
            due_s = promise.duty.next_token_due_s
            if due_s is not None and not promise.duty.best_effort:
                promise.drafted.context_tokens = promise.prompt_tokens + promise.tokens
                promise.drafted.slack_s = due_s - now_s
                decoding.append(promise.drafted)
        usage = self._engine.usage()
        kv_bound = usage.used_blocks > KV_BOUND_SHARE * usage.num_blocks
        self._drafting.plan(decoding, self._speed.cost, self._info.max_batch_tokens, kv_bound=kv_bound)

    def _publish_report(self, begins: BatchPlan | None = None, begins_s: float = -math.inf) -> None:
        """Leave an account of this node for those who ask; of how it will be after a batch that begins now, or
        then."""
        now_s = self._clock()
        end_s = now_s if begins is None else max(begins_s, now_s) + begins.expected_s
        in_flight_s = end_s - now_s
        chunks = {} if begins is None else begins.chunk_tokens
        self._speed.refresh()
        self._socket.reported_s = time.monotonic()
        self._socket.report = Report(
            node=self.name,
            boot_id=self.boot_id,
            role=self._role.name,
            info=self._info,
            kv=self._engine.kv.address(),
            usage=self._engine.usage(),
            works=[promise.state(end_s, chunks.get(key, 0)) for key, promise in self._promises.items()],
            leases=self._engine.kv.leases(),
            pulls=list(self._recent_pulls),
            cost=self._speed.cost,
            idle_cost=self._speed.idle_cost,
            promises_preempted=self._promises_preempted,
            promises_starved=self._promises_starved,
            cost_margin=self._speed.plan_margin,
            steps=self._speed.steps,
            step_s=self._speed.usual_s,
            stuck_s=0.0,
            local_prefills=self._local_prefills,
            corrupt_pulls=self._corrupt_pulls,
            pid=os.getpid(),
            in_flight_s=in_flight_s,
            tally=copy(self._tally),
            role_pause_s=self._role_pause_s,
            sessions=len(self._sessions.kept),
            session_tokens=sum(self._sessions.kept.values()),
            sessions_version=self._sessions.version,
            prefixes_version=self._engine.prefixes.version,
        )
