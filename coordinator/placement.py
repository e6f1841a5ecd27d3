"""Placement: for one request, which replica or which prefill/decode pair, or best effort, or a refusal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from coordinator.mirror import NodeMirror
from coordinator.planner.admission import Prefill, Verdict, admit_decode, admit_prefill
from engine.messages import NodeAddress, NodeLoad, Place, Placed, WorkState
from engine.request import RoleName, WorkKind
from kv_transfer.base import Link

RETRY_AFTER_S = 1.0


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to serve a request: `prefill` is None when one node does both."""

    prefill: NodeMirror | None
    decode: NodeMirror
    verdict: Verdict

    @property
    def name(self) -> str:
        """How people read it."""
        return self.decode.name if self.prefill is None else f"{self.prefill.name}>{self.decode.name}"

    @property
    def load(self) -> int:
        """Requests on its nodes, for ties."""
        nodes = [self.decode] if self.prefill is None else [self.prefill, self.decode]
        return sum(node.requests for node in nodes)


def place(
    request: Place,
    nodes: Iterable[NodeMirror],
    links: dict[tuple[str, str], Link],
    now_s: float,
) -> Placed:
    """Choose where `request` goes. The mirrors of the chosen nodes count it from now on.

    Nodes to be avoided are asked again only when there is nobody else.
    """
    serving = [node for node in nodes if node.serving]
    ways = _ways(request, [node for node in serving if node.name not in request.avoid])
    candidates = [
        _judge(request, prefill, decode, links, now_s) for prefill, decode in ways or _ways(request, serving)
    ]
    if not candidates:
        return Placed(
            request.request_id,
            request.attempt,
            "no_capacity",
            reason="no node is ready that could serve this request",
            retry_after_s=RETRY_AFTER_S,
        )
    judged = {candidate.name: _words(candidate.verdict) for candidate in candidates}
    feasible = [candidate for candidate in candidates if candidate.verdict.feasible]
    if request.class_name is not None and feasible:
        best = min(feasible, key=lambda candidate: (candidate.load, -candidate.verdict.slack_s))
        return _accept(request, best, "admitted", judged, now_s)
    fallback = min(candidates, key=lambda candidate: (candidate.load, -candidate.verdict.slack_s))
    if request.class_name is not None and not request.may_defer:
        reason = f"the promise cannot be kept: {fallback.name}: {fallback.verdict.reason}"
        return Placed(
            request.request_id,
            request.attempt,
            "refused",
            reason=reason,
            retry_after_s=max(RETRY_AFTER_S, min(-fallback.verdict.slack_s, 30.0)),
            candidates=judged,
        )
    return _accept(request, fallback, "best_effort", judged, now_s)


def _ways(request: Place, nodes: list[NodeMirror]) -> list[tuple[NodeMirror | None, NodeMirror]]:
    """All candidates: every node that does both, and every pair across the pools.

    A decode node also serves alone what must stay on one node, and everything once nobody prefills.
    """
    prefillers = [node for node in nodes if node.role is RoleName.PREFILL]
    decoders = [node for node in nodes if node.role is RoleName.DECODE]
    ways: list[tuple[NodeMirror | None, NodeMirror]] = [
        (None, node) for node in nodes if node.role is RoleName.MIXED
    ]
    if not request.one_node:
        ways += [(prefill, decode) for prefill in prefillers for decode in decoders]
    if request.one_node or not prefillers:
        ways += [(None, node) for node in decoders]
    return ways


def _judge(
    request: Place,
    prefill: NodeMirror | None,
    decode: NodeMirror,
    links: dict[tuple[str, str], Link],
    now_s: float,
) -> Candidate:
    kv_tokens = (request.prompt_tokens + request.max_tokens) * request.sequences
    at_decode = decode.replica(now_s)
    steady = admit_decode(at_decode, kv_tokens, request.tpot_s, request.sequences)
    if not steady.feasible:
        return Candidate(prefill, decode, steady)
    new = Prefill(request.prompt_tokens, request.first_token_left_s, request.tpot_s)
    if prefill is None:
        return Candidate(None, decode, admit_prefill(at_decode, new))
    at_prefill = prefill.replica(now_s)
    if request.prompt_tokens > at_prefill.free_kv_tokens:
        return Candidate(prefill, decode, Verdict(False, -1.0, "the prompt's KV does not fit at prefill"))
    assert prefill.report is not None
    link = links.get((prefill.name, decode.name))
    kv_bytes = request.prompt_tokens * prefill.report.info.kv_bytes_per_token
    if link is None:
        return Candidate(prefill, decode, Verdict(False, -1.0, "the link between them is not measured"))
    transfer_s = link.transfer_s(kv_bytes)
    decode_step_s = at_decode.cost.predict(len(at_decode.decode_tpots_s) + 1)
    earlier = replace(new, left_s=new.left_s - transfer_s - decode_step_s, tpot_s=None)
    return Candidate(prefill, decode, admit_prefill(at_prefill, earlier))


def place_best_effort(nodes: Sequence[NodeLoad], *, one_node: bool) -> tuple[NodeLoad | None, NodeLoad] | None:
    """Where a request without a promise goes: the least loaded pair, or node. None if nobody can serve it."""
    by_role = {
        role: min((node for node in nodes if node.role is role), key=lambda node: node.requests, default=None)
        for role in RoleName
    }
    mixed, prefill, decode = by_role[RoleName.MIXED], by_role[RoleName.PREFILL], by_role[RoleName.DECODE]
    if decode is None:
        return None if mixed is None else (None, mixed)
    paired = prefill if not one_node else None
    busiest = max(decode.requests, 0 if paired is None else paired.requests)
    if mixed is not None and mixed.requests <= busiest:
        return None, mixed
    return paired, decode


def _accept(request: Place, chosen: Candidate, verdict: str, judged: dict[str, str], now_s: float) -> Placed:
    best_effort = verdict == "best_effort"
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
        best_effort=best_effort,
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
        reason=chosen.verdict.reason,
        candidates=judged,
    )


def _words(verdict: Verdict) -> str:
    return f"fits with {verdict.slack_s:.3f} s to spare" if verdict.feasible else verdict.reason
