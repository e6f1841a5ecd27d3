"""Who is promised what, over time: placement with its memory of lengths and prefixes, soft admission, reasons.

`placement` decides one request at one moment. This keeps what outlives the moment: what outputs were long,
which node holds which prefix, who was deferred and may be promised yet, and why each decision was taken.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from coordinator.deferred import Deferred, DeferredQueue
from coordinator.mirror import NodeMirror
from coordinator.pairs import taken_up
from coordinator.placement import RETRY_AFTER_S, Candidate, Knowledge, judge, place
from coordinator.planner.document import answer, to_document
from coordinator.planner.lengths import LearnedLengths
from coordinator.planner.price import RoomPrice
from coordinator.prefixes import PrefixDirectory
from coordinator.sessions import SessionDirectory
from engine.messages import Finished, Place, Placed, Promote
from engine.prefix import PREFIX_BLOCK_TOKENS
from engine.request import Pace, RoleName, WorkKind
from kv_transfer.base import Link

ASKED_AGAIN_A_TURN = 4  # deferred requests: each takes milliseconds, and placements wait for them
BEST_EFFORT_CLASS = "none"


@dataclass(frozen=True, slots=True)
class Explained:
    """Why a request was placed where it was: each candidate with what the planner was asked and answered."""

    request: Place
    placed: Placed
    candidates: Sequence[Candidate]


@dataclass(frozen=True, slots=True)
class Promotion:
    """A deferred request that is promised after all: who is to be told, and what."""

    deferred: Deferred
    node: str
    promote: Promote


class Decider:
    """Decides for the coordinator, which gives it its mirrors and the time. Does no I/O.

    `remembered`: decisions that can be explained. `why`: also look for what a declined request lacked.
    """

    def __init__(
        self, max_deferred: int, remembered: int, *, prefix_caching: bool = True, why: bool = True
    ) -> None:
        self._caching = prefix_caching
        self._why = why
        self.deferred = DeferredQueue(max_deferred)
        self._lengths = LearnedLengths()
        self.prefixes = PrefixDirectory()
        self.sessions = SessionDirectory()
        self._price = RoomPrice()
        self._explained: OrderedDict[str, Explained] = OrderedDict()
        self._remembered = remembered
        self.lacked: Counter[RoleName] = Counter()  # requests that could not be promised for want of that pool

    def place(
        self,
        request: Place,
        endpoint: bytes,
        mirrors: Mapping[str, NodeMirror],
        links: Mapping[tuple[str, str], Link],
        now_s: float,
    ) -> Placed:
        """Where a request goes. One with a promise to hope for waits for it, while there is room to wait."""
        waited = request.request_id in self.deferred
        self.deferred.forget(request.request_id)
        if request.attempt > 1:
            for mirror in mirrors.values():
                mirror.forget(request.request_id, request.attempt - 1)
        placed, candidates = place(request, mirrors.values(), self._knowledge(links), now_s)
        if request.class_name is None:
            return placed
        if placed.verdict != "admitted":
            self.lacked.update(_lacking(candidates))
        if placed.verdict == "best_effort" and request.sequences == 1:
            self.deferred.purge(now_s)
            if self.deferred.full and not waited:
                _take_back(placed, mirrors)
                placed = Placed(
                    request.request_id,
                    request.attempt,
                    "no_capacity",
                    reason=f"{self.deferred.bound} deferred requests wait already (planner.max_deferred)",
                    retry_after_s=RETRY_AFTER_S,
                    candidates=placed.candidates,
                )
            else:
                until_s = now_s + request.first_token_left_s
                self.deferred.add(Deferred(request, placed, endpoint, until_s))
        self._remember(Explained(request, placed, candidates))
        return placed

    def ask_again(
        self, mirrors: Mapping[str, NodeMirror], links: Mapping[tuple[str, str], Link], now_s: float
    ) -> list[Promotion]:
        """Deferred requests that can be promised now, where they are. Their mirrors count them from now on."""
        knowledge = self._knowledge(links)
        promotions = []
        for deferred in self.deferred.next(now_s, ASKED_AGAIN_A_TURN):
            promotion = self._ask_again(deferred, mirrors, knowledge, now_s)
            if promotion is not None:
                promotions.append(promotion)
        return promotions

    def _ask_again(
        self, deferred: Deferred, mirrors: Mapping[str, NodeMirror], knowledge: Knowledge, now_s: float
    ) -> Promotion | None:
        placed = deferred.placed
        assert placed.decode is not None
        first = placed.decode if placed.prefill is None else placed.prefill
        at, target = mirrors.get(first.node), mirrors.get(placed.decode.node)
        if at is None or target is None or not at.serving or not target.serving:
            return None
        state = at.state_of(deferred.request.request_id, deferred.request.attempt)
        if state is None:
            return None  # on its way there, or handed on: the next report tells
        handed_on = state.kind is WorkKind.PREFILL and state.prefill_left_tokens == 0
        if state.output_tokens > 0 or handed_on:
            self.deferred.forget(deferred.request.request_id)
            return None
        left_s = deferred.until_s - now_s
        request = replace(deferred.request, first_token_left_s=left_s)
        computed = max(state.prompt_tokens - state.prefill_left_tokens - 1, 0)
        prefill = None if placed.prefill is None else at
        candidate = judge(request, prefill, target, knowledge, now_s, computed_tokens=computed)
        if not candidate.feasible:
            return None
        self.deferred.forget(request.request_id)
        first_left_s = left_s - candidate.handoff_s
        promised = replace(state, best_effort=False, first_token_left_s=left_s)
        at.place(replace(promised, first_token_left_s=first_left_s), now_s)
        if prefill is not None:
            target.place(taken_up(promised, request.said_tokens), now_s)
        admitted = replace(placed, verdict="admitted", reason=f"deferred at first: {placed.reason}")
        self._remember(Explained(request, admitted, [candidate]))
        pace = Pace(first_left_s, request.tpot_s)
        return Promotion(deferred, at.name, Promote(request.request_id, request.attempt, pace))

    def finished(self, finished: Finished, mirrors: Mapping[str, NodeMirror], now_s: float = 0.0) -> str | None:
        """Learn from a request that is over, and stop counting it. Returns the node that its session left."""
        self.deferred.forget(finished.request_id)
        for mirror in mirrors.values():
            mirror.forget(finished.request_id, finished.attempt)
        if finished.output_tokens > 0:
            name = finished.class_name or BEST_EFFORT_CLASS
            observe = self._lengths.observe if finished.ended_itself else self._lengths.observe_at_least
            observe(name, finished.prompt_tokens, finished.output_tokens)
        for node in finished.nodes if self._caching and finished.output_tokens > 0 else ():
            report = None if node not in mirrors else mirrors[node].report
            if report is not None:
                kv_tokens = report.info.num_blocks * report.info.block_size
                here = finished.prefix_hashes
                if node != finished.nodes[-1]:  # it prefilled: the output was never there
                    here = here[: finished.prompt_tokens // PREFIX_BLOCK_TOKENS]
                self.prefixes.add(node, here, kv_tokens, now_s)
        if self._caching and finished.session is not None and finished.outcome == "completed":
            return self.sessions.answered(
                finished.session, finished.nodes[-1], finished.prefix_hashes, finished.prompt_tokens, now_s
            )
        return None

    def forget_node(self, node: str) -> None:
        """A node began anew: the KV that it held is gone."""
        self.prefixes.forget(node)
        self.sessions.forget(node)

    def explain(self, request_id: str) -> dict[str, Any] | None:
        """The last decision on a request, with the problem put to the planner at each candidate."""
        found = self._explained.get(request_id)
        if found is None:
            return None
        return {
            "request_id": request_id,
            "attempt": found.request.attempt,
            "verdict": found.placed.verdict,
            "reason": found.placed.reason,
            "class": found.request.class_name,
            "first_token_left_s": found.request.first_token_left_s,
            "tpot_s": found.request.tpot_s,
            "placed": [one.node for one in (found.placed.prefill, found.placed.decode) if one is not None],
            "candidates": [_candidate(candidate) for candidate in found.candidates],
        }

    def _knowledge(self, links: Mapping[tuple[str, str], Link]) -> Knowledge:
        return Knowledge(self._lengths, links, self.prefixes, self._price, self._why, self.sessions)

    def _remember(self, explained: Explained) -> None:
        if not self._remembered:
            return
        chosen = [one.node for one in (explained.placed.prefill, explained.placed.decode) if one is not None]
        kept = [
            # Whole problems are kept of the candidate that was taken; of the others, what became of them.
            one if one.name == ">".join(chosen) else replace(one, decisions=())
            for one in explained.candidates
        ]
        for request_id in (explained.request.request_id, *explained.request.siblings):
            self._explained[request_id] = replace(explained, candidates=kept)
            self._explained.move_to_end(request_id)
        while len(self._explained) > self._remembered:
            self._explained.popitem(last=False)


def _candidate(candidate: Candidate) -> dict[str, Any]:
    return {
        "name": candidate.name,
        "feasible": candidate.feasible,
        "reason": candidate.reason,
        "loss_s": candidate.loss_s if candidate.feasible else None,
        "decisions": [
            {
                "node": decision.node,
                "instance": to_document(decision.instance),
                "answer": answer(decision.plan, None),
            }
            for decision in candidate.decisions
        ],
    }


def _take_back(placed: Placed, mirrors: Mapping[str, NodeMirror]) -> None:
    for node in (placed.prefill, placed.decode):
        if node is not None:
            mirrors[node.node].forget(placed.request_id, placed.attempt)


def _lacking(candidates: Sequence[Candidate]) -> set[RoleName]:
    """The pools for want of which no pair could keep a promise: where one node could prefill, not those."""
    lacks = {candidate.lacks for candidate in candidates if candidate.lacks is not None}
    return {RoleName.DECODE} if RoleName.DECODE in lacks else lacks
