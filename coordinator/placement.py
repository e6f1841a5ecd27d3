"""Placement: for one request, which replica or which prefill/decode pair, or best effort, or a refusal.

Every candidate is put to the planner. Of those that can keep the promise without breaking an earlier one, the
one that loses least takes the request; of those that lose about the same, the least loaded; of those one
where no KV has to move.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from coordinator.mirror import NodeMirror
from coordinator.planner.admission import Plan, solve
from coordinator.planner.instance import Instance
from coordinator.planner.lengths import Lengths
from coordinator.planner.loss import loss_s
from coordinator.planner.replica import Asking, expected_residence_s, to_instance
from coordinator.prefixes import PrefixDirectory
from engine.messages import NodeAddress, Place, Placed, WorkState
from engine.request import RoleName, WorkKind
from kv_transfer.base import Link

RETRY_AFTER_S = 1.0
MOST_CANDIDATES = 8  # put to the planner; a summary of the nodes picks them
SAME_LOSS = 1.25  # losses within this ratio are taken for the same


@dataclass(frozen=True, slots=True)
class Decision:
    """One replica's part in a candidate: what was asked of the planner, and its answer."""

    node: str
    instance: Instance
    plan: Plan


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to serve a request: `prefill` is None when one node does both. `reason`: why not, if not."""

    prefill: NodeMirror | None
    decode: NodeMirror
    reason: str = ""
    loss_s: float = math.inf
    decisions: tuple[Decision, ...] = ()

    @property
    def feasible(self) -> bool:
        """Whether the promise can be made here."""
        return not self.reason

    @property
    def name(self) -> str:
        """How people read it."""
        return self.decode.name if self.prefill is None else f"{self.prefill.name}>{self.decode.name}"

    @property
    def load(self) -> int:
        """Requests on its nodes, for ties."""
        nodes = [self.decode] if self.prefill is None else [self.prefill, self.decode]
        return sum(node.requests for node in nodes)

    @property
    def words(self) -> str:
        """The verdict for people."""
        return self.reason or f"fits, and takes {self.loss_s:.3f} s of the replica"


@dataclass(frozen=True, slots=True)
class Knowledge:
    """What placement knows beside the nodes' own accounts."""

    lengths: Lengths
    links: Mapping[tuple[str, str], Link]
    prefixes: PrefixDirectory = field(default_factory=PrefixDirectory)


def place(
    request: Place, nodes: Iterable[NodeMirror], knowledge: Knowledge, now_s: float
) -> tuple[Placed, list[Candidate]]:
    """Choose where `request` goes, and say what became of each candidate.

    The mirrors of the chosen nodes count it from now on. Nodes to be avoided are asked again only when there
    is nobody else.
    """
    serving = [node for node in nodes if node.serving]
    willing = [node for node in serving if node.name not in request.avoid]
    ways = _ways(request, willing, knowledge) or _ways(request, serving, knowledge)
    if not ways:
        return _no_capacity(request), []
    if request.class_name is None:
        fallback = min((Candidate(*way) for way in ways), key=lambda candidate: candidate.load)
        return _accept(request, fallback, "best_effort", {}, now_s), []
    candidates = [
        judge(request, prefill, decode, knowledge, now_s) for prefill, decode in _shortlist(request, ways)
    ]
    judged = {candidate.name: candidate.words for candidate in candidates}
    feasible = [candidate for candidate in candidates if candidate.feasible]
    if feasible:
        return _accept(request, min(feasible, key=_preference), "admitted", judged, now_s), candidates
    fallback = min(candidates, key=lambda candidate: candidate.load)
    if not request.may_defer:
        refused = Placed(
            request.request_id,
            request.attempt,
            "refused",
            reason=f"the promise cannot be kept: {fallback.name}: {fallback.reason}",
            retry_after_s=RETRY_AFTER_S,
            candidates=judged,
        )
        return refused, candidates
    return _accept(request, fallback, "best_effort", judged, now_s), candidates


def _preference(candidate: Candidate) -> tuple[int, int, bool]:
    """The least loss, then the least load, then no KV to move."""
    loss = math.ceil(math.log(max(candidate.loss_s, 1e-6), SAME_LOSS))
    return loss, candidate.load, candidate.prefill is not None


def _no_capacity(request: Place) -> Placed:
    return Placed(
        request.request_id,
        request.attempt,
        "no_capacity",
        reason="no node is ready that could serve this request",
        retry_after_s=RETRY_AFTER_S,
    )


def _ways(
    request: Place, nodes: list[NodeMirror], knowledge: Knowledge
) -> list[tuple[NodeMirror | None, NodeMirror]]:
    """All candidates: every node that does both, and every pair across the pools.

    A decode node also serves alone what must stay on one node, everything once nobody prefills, and a follow-up
    call of which it has most of the KV: it prefills the few tokens that are new.
    """
    prefillers = [node for node in nodes if node.role is RoleName.PREFILL]
    decoders = [node for node in nodes if node.role is RoleName.DECODE]
    ways: list[tuple[NodeMirror | None, NodeMirror]] = [
        (None, node) for node in nodes if node.role is RoleName.MIXED
    ]
    if not request.one_node:
        ways += [(prefill, decode) for prefill in prefillers for decode in decoders]
    alone = request.one_node or not prefillers
    ways += [(None, node) for node in decoders if alone or _has_most(node, request, knowledge)]
    return ways


def _has_most(node: NodeMirror, request: Place, knowledge: Knowledge) -> bool:
    cached = knowledge.prefixes.cached_tokens(node.name, request.prefix_hashes)
    return 2 * cached > request.prompt_tokens


def _shortlist(
    request: Place, ways: Sequence[tuple[NodeMirror | None, NodeMirror]]
) -> Sequence[tuple[NodeMirror | None, NodeMirror]]:
    """At most so many candidates: where the pace is served already first, then the least loaded."""
    if len(ways) <= MOST_CANDIDATES:
        return ways

    def rank(way: tuple[NodeMirror | None, NodeMirror]) -> tuple[bool, int]:
        prefill, decode = way
        tightens = not decode.serves_pace(request.tpot_s)
        return tightens, decode.requests + (0 if prefill is None else prefill.requests)

    return sorted(ways, key=rank)[:MOST_CANDIDATES]


def judge(
    request: Place,
    prefill: NodeMirror | None,
    decode: NodeMirror,
    knowledge: Knowledge,
    now_s: float,
    *,
    computed_tokens: int = 0,
) -> Candidate:
    """Put one candidate to the planner. `computed_tokens` of the prompt were computed there as best effort."""
    first = decode if prefill is None else prefill
    cached = knowledge.prefixes.cached_tokens(first.name, request.prefix_hashes)
    cached = min(max(cached, computed_tokens), request.prompt_tokens - 1)
    whole = Asking(
        id=request.request_id,
        tokens=request.prompt_tokens - cached,
        cached_tokens=cached,
        left_s=request.first_token_left_s,
        tpot_s=request.tpot_s,
        max_tokens=request.max_tokens,
        class_name=request.class_name or "",
        sequences=request.sequences,
    )
    if prefill is None:
        decision, reason = _ask(decode, whole, knowledge, now_s)
        if reason:
            return Candidate(None, decode, reason, decisions=(decision,))
        loss = loss_s(decision.instance, expected_residence_s(whole, knowledge.lengths))
        return Candidate(None, decode, "", loss, (decision,))
    return _judge_pair(request, whole, prefill, decode, knowledge, now_s)


def _judge_pair(
    request: Place,
    whole: Asking,
    prefill: NodeMirror,
    decode: NodeMirror,
    knowledge: Knowledge,
    now_s: float,
) -> Candidate:
    """Prefill on one node, by what a transfer and a decode step leave of the deadline; decode on the other."""
    link = knowledge.links.get((prefill.name, decode.name))
    if link is None:
        return Candidate(prefill, decode, "the link between them is not measured")
    assert prefill.report is not None
    assert decode.report is not None
    transfer_s = link.transfer_s(request.prompt_tokens * prefill.report.info.kv_bytes_per_token)
    decode_step_s = decode.report.cost.predict(len(decode.report.works) + 1)
    left_s = request.first_token_left_s - transfer_s - decode_step_s
    prefilling = replace(whole, left_s=left_s, tpot_s=None)
    at_prefill, reason = _ask(prefill, prefilling, knowledge, now_s)
    if reason:
        return Candidate(prefill, decode, f"{prefill.name}: {reason}", decisions=(at_prefill,))
    decoding = replace(whole, tokens=1, cached_tokens=max(request.prompt_tokens - 1, 0))
    at_decode, reason = _ask(decode, decoding, knowledge, now_s)
    decisions = (at_prefill, at_decode)
    if reason:
        return Candidate(prefill, decode, f"{decode.name}: {reason}", decisions=decisions)
    loss = transfer_s + loss_s(at_prefill.instance, 0.0)
    loss += loss_s(at_decode.instance, expected_residence_s(decoding, knowledge.lengths))
    return Candidate(prefill, decode, "", loss, decisions)


def _ask(node: NodeMirror, asking: Asking, knowledge: Knowledge, now_s: float) -> tuple[Decision, str]:
    instance = to_instance(node.replica(now_s), asking, knowledge.lengths)
    plan = solve(instance)
    left_out = plan.deferred.get(asking.id) or next(iter(plan.deferred.values()), "")
    return Decision(node.name, instance, plan), left_out


def _accept(request: Place, chosen: Candidate, verdict: str, judged: dict[str, str], now_s: float) -> Placed:
    state = WorkState(
        request_id=request.request_id,
        attempt=request.attempt,
        kind=WorkKind.WHOLE,
        prompt_tokens=request.prompt_tokens,
        prefill_left_tokens=request.prompt_tokens,
        output_tokens=0,
        max_tokens=request.max_tokens,
        first_token_left_s=request.first_token_left_s,
        tpot_s=request.tpot_s,
        best_effort=verdict == "best_effort",
        class_name=request.class_name or "",
    )
    prefill = chosen.prefill
    if prefill is None:
        chosen.decode.place(state, now_s)
    else:
        prefill.place(replace(state, kind=WorkKind.PREFILL), now_s)
        chosen.decode.place(replace(state, kind=WorkKind.DECODE, prefill_left_tokens=0), now_s)
    return Placed(
        request.request_id,
        request.attempt,
        verdict,
        prefill=None if prefill is None else NodeAddress(prefill.name, prefill.address),
        decode=NodeAddress(chosen.decode.name, chosen.decode.address),
        reason=chosen.reason,
        candidates=judged,
    )
