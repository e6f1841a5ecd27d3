"""A flight: one sequence on its way through the cluster, over as many attempts as it takes.

The endpoint that took a request drives it: ask the coordinator where it goes, submit the prefill, take its
first token, carry the handoff to the decode node, follow the tokens. Each try is an attempt with a number;
what an older attempt says is discarded. A node that declines, fails or falls silent is left out of the next
attempt, which goes on after the tokens that the client has.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from msgspec.structs import replace as replace_struct

from engine.errors import NoCapacity, NodeLost, Refused, RequestError, SlosserveError
from engine.messages import (
    Account,
    Cancel,
    Declined,
    Delta,
    NodeAddress,
    Place,
    Placed,
    Release,
    Submit,
    Timing,
)
from engine.prefix import prefix_hashes
from engine.request import BEST_EFFORT, Pace, Slo, WorkKind

MAX_ATTEMPTS = 5  # without a token in between
MAX_RESUMES = 20  # attempts that went on after tokens: a request that kills nodes must not go round for ever


@dataclass(frozen=True, slots=True)
class Passenger:
    """What is carried: one sequence of a request. Its sampling parameters are encoded for the engine.

    `delivery_s`: how long its tokens are expected to take from the endpoint to the client.
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    sampling: bytes
    max_tokens: int
    slo: Slo | None
    one_node: bool
    cache_salt: str | None
    arrived_s: float
    session: str | None = None
    delivery_s: float = 0.0


@dataclass(slots=True)
class Timeline:
    """When things happened, in seconds since the request arrived, for people who ask why; of the last attempt,
    but for the first token of all, and `resumed_s`: that of the last attempt, where it went on after tokens.
    `taken_up_s`: the first token of the decode node of a pair.

    `cached_tokens` of the prompt had their KV where it was prefilled. What a node says of an attempt at its end
    is in the accounts; one that was stopped from here says nothing.
    """

    asked_s: float | None = None
    placed_s: float | None = None
    verdict: str = ""
    reason: str = ""  # of the verdict
    prefill_node: str | None = None
    decode_node: str | None = None
    candidates: dict[str, str] = field(default_factory=dict)
    handed_off_s: float | None = None
    taken_up_s: float | None = None
    prefill: Timing | None = None
    decode: Timing | None = None
    prefill_account: Account | None = None
    decode_account: Account | None = None
    cached_tokens: int | None = None
    first_token_s: float | None = None
    resumed_s: float | None = None
    ended_s: float | None = None
    events: list[str] = field(default_factory=list)

    @property
    def placement(self) -> str:
        """pair, one_node, or none while it has not been placed."""
        if self.decode_node is None:
            return "none"
        return "one_node" if self.prefill_node is None else "pair"


class Flight:
    """The state of one sequence. Methods are called in the endpoint's event loop and never block."""

    def __init__(
        self,
        passenger: Passenger,
        send: Callable[[NodeAddress, Any], None],
        pull_deadline_s: float,
        fail: Callable[[Flight, SlosserveError], None],
    ) -> None:
        self.passenger = passenger
        self.attempt = 0
        self.placed: Placed | None = None
        self.token_times_s: list[float] = []
        self.timeline = Timeline()
        self.avoid: list[str] = []
        self.over = False
        self._send = send
        self._pull_deadline_s = pull_deadline_s
        self._fail = fail
        self._prefilling = False
        self.on_retry: Callable[[Flight], None] | None = None
        self.think_end_id: int | None = None
        self.output_token_ids: list[int] = []
        self.ended_itself = False
        self.gaps_s: list[float] = []  # in the answer, where it went on elsewhere
        self._thinking_tokens: int | None = None
        self._fruitless = 0  # attempts since the last token
        self._resumes = 0
        self._interrupted_s: float | None = None

    @property
    def resumed(self) -> bool:
        """Whether this attempt goes on after tokens of one before it."""
        return self._resumes > 0

    @property
    def thinking_tokens(self) -> int:
        """Tokens up to the end of thinking, that token included; all of them while it has not come."""
        return len(self.token_times_s) if self._thinking_tokens is None else self._thinking_tokens

    @property
    def nodes(self) -> list[str]:
        """Those that have worked on this attempt: of a pair the prefill node alone until it has handed over."""
        prefill, decode = self.timeline.prefill_node, self.timeline.decode_node
        return [node for node in (prefill, None if self._prefilling else decode) if node is not None]

    @property
    def prefilling(self) -> bool:
        """Whether the prefill node of a pair has it, and has not handed it over."""
        return self._prefilling

    def since_arrival_s(self) -> float:
        """Seconds since the request arrived."""
        return time.monotonic() - self.passenger.arrived_s

    def question(self) -> Place:
        """What to ask the coordinator for the next attempt."""
        self.attempt += 1
        # What an attempt before this one did is in the events.
        before = self.timeline
        self.timeline = Timeline(
            asked_s=self.since_arrival_s(),
            verdict=before.verdict,
            events=before.events,
            first_token_s=before.first_token_s,
        )
        passenger = self.passenger
        slo, said_tokens = passenger.slo, len(self.output_token_ids)
        return Place(
            request_id=passenger.request_id,
            attempt=self.attempt,
            prompt_tokens=len(passenger.prompt_token_ids) + said_tokens,
            max_tokens=passenger.max_tokens - said_tokens,
            class_name=None if slo is None else slo.class_name,
            first_token_left_s=self._pace().first_token_left_s,
            tpot_s=self._pace().tpot_s,
            one_node=passenger.one_node,
            may_defer=slo is None or not slo.refuse or said_tokens > 0,  # no 429 in the middle of an answer
            avoid=list(self.avoid),
            prefix_hashes=[] if slo is None and passenger.session is None else self.prefix_hashes(),
            session=passenger.session,
            said_tokens=said_tokens,
        )

    def prefix_hashes(self) -> list[int]:
        """Names of the prefixes of what is known of it: its prompt, and what was said."""
        known = [*self.passenger.prompt_token_ids, *self.output_token_ids]
        return prefix_hashes(known, self.passenger.cache_salt)

    def depart(self, placed: Placed) -> None:
        """Submit to where the coordinator says. Raises Refused or NoCapacity when it says no."""
        self.timeline.verdict, self.timeline.reason = placed.verdict, placed.reason
        self.timeline.candidates = placed.candidates
        if placed.verdict == "refused":
            raise Refused(placed.reason, retry_after_s=placed.retry_after_s)
        if placed.decode is None:
            raise NoCapacity(placed.reason, retry_after_s=placed.retry_after_s)
        self.placed = placed
        self._fruitless += 1
        self.timeline.placed_s = self.since_arrival_s()
        self.timeline.prefill_node = placed.prefill.node if placed.prefill else None
        self.timeline.decode_node = placed.decode.node
        if placed.prefill is None:
            self._submit(placed.decode, WorkKind.WHOLE)
        else:
            self._prefilling = True
            self._submit(placed.prefill, WorkKind.PREFILL)

    def take(self, delta: Delta) -> Delta | None:
        """Take a delta of this request. What of it is for the client."""
        if self.over or delta.attempt != self.attempt or self.placed is None:
            return None
        if delta.error is not None:
            self._take_error(delta.error, delta.error_status)
            return None
        if self._prefilling:
            return self._take_prefilled(delta)
        if delta.index < len(self.token_times_s):
            return None  # said before: an attempt never repeats a token
        if delta.index > len(self.token_times_s):
            self._retry(self._decode_node, "tokens were lost on the way")
            return None
        now_s = self._say(delta)
        if delta.timing is not None:
            self._note_pull(delta.timing)
            if self.pair:
                self.timeline.taken_up_s = now_s
        if delta.cached_tokens is not None and not self.pair:
            self.timeline.cached_tokens = delta.cached_tokens
        if delta.finish_reason is not None:
            self.timeline.decode_account = delta.account
            self.ended_itself = delta.finish_reason == "stop"
            self.end()
        return delta

    def promoted(self, attempt: int) -> None:
        """The coordinator promises this attempt after all: too late where the prefill was handed on already."""
        handed_on = self.pair and not self._prefilling
        if self.over or handed_on or attempt != self.attempt:
            return
        if self.timeline.verdict == "best_effort":
            self.timeline.verdict = "admitted"
            self.timeline.reason = f"deferred at first: {self.timeline.reason}"
            self.timeline.events.append(f"attempt {attempt}: deferred, then admitted")

    def declined(self, node: str, declined: Declined) -> None:
        """A node will not do it: try elsewhere."""
        awaited = self._awaited_node
        current = declined.attempt == self.attempt and awaited is not None and awaited.node == node
        if not self.over and current:
            self._retry(node, declined.reason)

    def lost(self, node: NodeAddress) -> None:
        """The node at this address fell silent. If it had this request, the attempt is over."""
        if not self.over and node == self._awaited_node:
            self._retry(node.node, f"{node.node} stopped answering")

    def end(self) -> None:
        """Nothing more will come, or is wanted."""
        self.over = True
        self.timeline.ended_s = self.since_arrival_s()

    def abort(self, *, ended: bool = False) -> None:
        """The client wants no more of it, or has all it wanted (`ended`): free it on every node."""
        if not self.over:
            self._cancel_everywhere(ended=ended)
            self.end()

    @property
    def pair(self) -> bool:
        """Placed on a prefill/decode pair."""
        return self.placed is not None and self.placed.prefill is not None

    # ----------------------------------------------------------------------------------------------------------

    def _pace(self) -> Pace:
        slo = self.passenger.slo
        if slo is None:
            return BEST_EFFORT
        since_arrival_s = self.since_arrival_s()
        ttft_s = max(slo.ttft_s - self.passenger.delivery_s, 0.0)  # the client is to have it by then
        left_s = ttft_s - since_arrival_s
        best_effort = self.timeline.verdict == "best_effort"
        answer_tpot_s = None if slo.thinking_tpot_s is None else slo.tpot_s
        if not self.token_times_s:
            return Pace(left_s, slo.first_pace_s, best_effort, answer_tpot_s)
        begun = self._interrupted_s is None
        if begun:  # handed over after its first token
            left_s = max(ttft_s, self.token_times_s[0]) + self._paced_s(slo) - since_arrival_s
        else:
            # The gap is what it is, and the next token is due as a first one would be, or when it was.
            left_s = max(left_s + self._paced_s(slo), ttft_s)
        if self._thinking_tokens is None:
            return Pace(left_s, slo.first_pace_s, best_effort, answer_tpot_s, begun)
        return Pace(left_s, slo.tpot_s, best_effort, begun=begun)

    def _paced_s(self, slo: Slo) -> float:
        """Seconds between the first token and the next one, at the promised paces."""
        said = len(self.token_times_s)
        thought = said if self._thinking_tokens is None else self._thinking_tokens - 1
        return thought * slo.first_pace_s + (said - thought) * slo.tpot_s

    def _submit(self, node: NodeAddress, kind: WorkKind, delta: Delta | None = None) -> None:
        passenger = self.passenger
        assert self.placed is not None
        pace = self._pace()
        if kind is WorkKind.PREFILL:
            pace = replace(pace, first_token_left_s=pace.first_token_left_s - self.placed.handoff_s)
        submit = Submit(
            request_id=passenger.request_id,
            attempt=self.attempt,
            kind=kind,
            prompt_token_ids=list(passenger.prompt_token_ids),
            # What would follow on the prompt alone is no token of an answer that has begun.
            sampling=b"" if kind is WorkKind.PREFILL and self.output_token_ids else passenger.sampling,
            max_tokens=passenger.max_tokens,
            pace=pace,
            class_name="" if passenger.slo is None else passenger.slo.class_name,
            cached_tokens=0 if kind is WorkKind.DECODE else self.placed.cached_tokens,
            cache_salt=passenger.cache_salt,
            handoff=None if delta is None else delta.handoff,
            pull_deadline_s=self._pull_deadline_s,
            think_end_id=self.think_end_id,
            session=passenger.session,
            said_token_ids=[] if kind is WorkKind.PREFILL else list(self.output_token_ids),
        )
        self._send(node, submit)

    def _take_prefilled(self, delta: Delta) -> Delta | None:
        """The prefill is over: its token, if it is the first, and on to the decode node if that is not all."""
        assert self.placed is not None
        assert self.placed.decode is not None
        self.timeline.prefill = delta.timing
        self.timeline.prefill_account = delta.account
        self.timeline.cached_tokens = delta.cached_tokens
        first = bool(delta.token_ids) and not self.output_token_ids
        stops = delta.finish_reason == "stop"
        if delta.handoff is None and not (first and stops):
            node = self.timeline.prefill_node or ""
            self._retry(node, f"{node} ended the prefill without a handoff ({delta.finish_reason})")
            return None
        self.timeline.handed_off_s = self._say(delta) if first else self.since_arrival_s()
        if first and (stops or self.passenger.max_tokens == 1):
            self.ended_itself = stops
            self._cancel_everywhere(ended=True)  # nobody comes for its KV
            self.end()
            return replace_struct(delta, handoff=None)
        self._prefilling = False
        self._submit(self.placed.decode, WorkKind.DECODE, delta)
        return replace_struct(delta, handoff=None, finish_reason=None) if first else None

    def _say(self, delta: Delta) -> float:
        """Its tokens are said to the client, now."""
        now_s = self.since_arrival_s()
        if delta.token_ids:
            self._note_first(now_s)
        first_end = self._thinking_tokens is None and self.think_end_id is not None
        if first_end and self.think_end_id in delta.token_ids:
            self._thinking_tokens = delta.index + delta.token_ids.index(self.think_end_id) + 1
        self.token_times_s.extend([now_s] * len(delta.token_ids))
        self.output_token_ids.extend(delta.token_ids)
        return now_s

    def _take_error(self, error: str, status: int) -> None:
        if status == RequestError.http_status:
            self._fail(self, RequestError(error))
        else:
            node = self.timeline.prefill_node if self._prefilling else self._decode_node
            self._retry(node or "", error)

    @property
    def _decode_node(self) -> str:
        return self.timeline.decode_node or ""

    def _note_pull(self, timing: Timing) -> None:
        self.timeline.decode = timing
        if self.pair and timing.pull_outcome not in ("pulled", "cached", None):
            self.timeline.events.append(f"KV not used ({timing.pull_outcome}), prompt recomputed")
            assert self.placed is not None
            assert self.placed.prefill is not None
            self._send(self.placed.prefill, Release(self.passenger.request_id, self.attempt))

    @property
    def _awaited_node(self) -> NodeAddress | None:
        """The node whose loss ends this attempt: of a pair the one whose turn it is. The other one has been
        asked for nothing yet, or has done its part."""
        if self.placed is None:
            return None
        return self.placed.prefill if self._prefilling else self.placed.decode

    def _retry(self, node: str, reason: str) -> None:
        self.timeline.events.append(f"attempt {self.attempt}: {reason}")
        self._cancel_everywhere()
        self._prefilling = False
        self.placed = None
        said = len(self.token_times_s)
        if said and self._interrupted_s is None:
            self._interrupted_s = self.since_arrival_s()
            self._resumes += 1
        if self._fruitless >= MAX_ATTEMPTS or self._resumes > MAX_RESUMES:
            tried = f"{self.attempt} attempts failed; the last: {reason}"
            lost = NodeLost(f"{tried} after {said} tokens") if said else NoCapacity(tried, retry_after_s=1.0)
            self._fail(self, lost)
        else:
            self.avoid.append(node)
            assert self.on_retry is not None
            self.on_retry(self)

    def _note_first(self, now_s: float) -> None:
        """Tokens have come: the first ones of all, or of an attempt that went on after others."""
        self._fruitless = 0
        if not self.token_times_s:
            self.timeline.first_token_s = now_s
        if self._interrupted_s is not None:
            gap_s, self._interrupted_s = now_s - self.token_times_s[-1], None
            self.timeline.resumed_s = now_s
            went_on = f"went on after {len(self.token_times_s)} tokens, {gap_s:.2f} s later"
            self.timeline.events.append(f"attempt {self.attempt}: {went_on}")
            self.gaps_s.append(gap_s)

    def _cancel_everywhere(self, *, ended: bool = False) -> None:
        if self.placed is None:
            return
        for node in (self.placed.prefill, self.placed.decode):
            if node is not None:
                self._send(node, Cancel(self.passenger.request_id, self.attempt, ended))
