"""Placement: for one request, which replica or which prefill/decode pair, or best effort, or a refusal.

Every candidate is put to the planner. While everybody fits, of those that can keep the promise without breaking
an earlier one the one takes the request that has its history, or is the least loaded. Once room is short it is
the one that loses least; of those that lose about the same, the least loaded; of those one where no KV has to
move.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from heapq import nsmallest
from itertools import islice, zip_longest
from operator import attrgetter

from coordinator.mirror import NodeMirror
from coordinator.pairs import lead_s, taken_up, transfer_s
from coordinator.planner.admission import Plan, Problem, solve_problem
from coordinator.planner.instance import Instance
from coordinator.planner.lengths import Lengths
from coordinator.planner.loss import loss_s
from coordinator.planner.price import RoomPrice, work_s
from coordinator.planner.replica import Asking, expected_residence_s, to_instance
from coordinator.prefixes import PrefixDirectory
from coordinator.sessions import SessionDirectory
from engine.messages import NodeAddress, Place, Placed, WorkState
from engine.prefix import PREFIX_BLOCK_TOKENS
from engine.request import RoleName, WorkKind
from kv_transfer.base import Link

RETRY_AFTER_S = 1.0
MOST_CANDIDATES = 8  # put to the planner; a summary of the nodes picks them
ENOUGH = 4  # of a shortlist: the rest is much like them, and each takes a third of a millisecond
TOO_DEAR = "it fits perhaps, but room is short, and cheaper requests are preferred"
HOME_LOAD = 16  # requests more than elsewhere: from there on a history is computed again where there is room
HOME_WORTH = 2.0  # of losses: a history that stays where it is serves the calls after this one as well
MOST_MOVES = 2  # nodes that a history may be moved to: the least loaded
SAME_LOSS = 1.25  # losses within this ratio are taken for the same


@dataclass(frozen=True, slots=True)
class Decision:
    """One replica's part in a candidate: what was asked of the planner, and its answer."""

    node: str
    instance: Instance
    plan: Plan


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to serve a request: `prefill` is None when one node does both. `reason`: why not, if not, and of
    a pair, for want of which pool: it `lacks` that. `handoff_s`: what the handoff takes of its deadline."""

    prefill: NodeMirror | None
    decode: NodeMirror
    reason: str = ""
    loss_s: float = math.inf
    decisions: tuple[Decision, ...] = ()
    handoff_s: float = 0.0
    cached_tokens: int = 0
    lacks: RoleName | None = None

    @property
    def feasible(self) -> bool:
        """Whether the promise can be made here."""
        return not self.reason

    @property
    def name(self) -> str:
        """How people read it."""
        return self.decode.name if self.prefill is None else f"{self.prefill.name}>{self.decode.name}"

    @property
    def first(self) -> NodeMirror:
        """The node that computes the prompt."""
        return self.decode if self.prefill is None else self.prefill

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
    """What placement knows beside the nodes' own accounts. `why`: it is to say what a request lacked."""

    lengths: Lengths
    links: Mapping[tuple[str, str], Link]
    prefixes: PrefixDirectory = field(default_factory=PrefixDirectory)
    price: RoomPrice | None = None
    why: bool = True
    sessions: SessionDirectory = field(default_factory=SessionDirectory)
    asked: dict[tuple[str, Asking], tuple[Decision, Problem, str]] = field(default_factory=dict)  # in this call

    def cached_tokens(self, node: str, request: Place) -> int:
        """Tokens of its prompt whose KV a node is believed to hold."""
        hashes = request.prefix_hashes
        kept = self.sessions.cached_tokens(node, request.session, hashes)
        return max(kept, self.prefixes.cached_tokens(node, hashes))


def place(
    request: Place, nodes: Iterable[NodeMirror], knowledge: Knowledge, now_s: float
) -> tuple[Placed, list[Candidate]]:
    """Choose where `request` goes, and say what became of each candidate.

    The mirrors of the chosen nodes count it from now on. Nodes to be avoided are asked again only when there
    is nobody else.
    """
    serving = [node for node in nodes if node.serving]
    willing = [node for node in serving if node.name not in request.avoid] if request.avoid else serving
    ways = _ways(request, willing, knowledge) or _ways(request, serving, knowledge)
    if not ways:
        return _no_capacity(request), []
    if request.class_name is None:
        fallback = _fallback(map(_candidate, ways), request, knowledge)
        return _accept(request, fallback, "best_effort", {}, now_s), []
    cost_s = expected_work_s(request, willing or serving, knowledge)
    # What an idle node could not do either says nothing of how short room is, and raises no price for others.
    price = knowledge.price if _within_reach(request, willing or serving, knowledge) else None
    if price is not None and price.too_dear(cost_s, now_s):
        price.note(cost_s, now_s, fitted=True, dear=True)
        fallback = replace(_fallback(map(_candidate, ways), request, knowledge), reason=TOO_DEAR)
        return _turn_away(request, fallback, {}, now_s), []
    enough = ENOUGH if len(serving) > MOST_CANDIDATES else len(ways)
    home = knowledge.sessions.home(request.session)
    candidates = _judged(request, _shortlist(ways, home), knowledge, now_s, enough)
    judged = {candidate.name: candidate.words for candidate in candidates}
    feasible = [candidate for candidate in candidates if candidate.feasible]
    further: list[Candidate] = []
    if not feasible and not request.one_node:
        asked = {candidate.name for candidate in candidates}
        others = [Candidate(*way) for way in (*_decoders_alone(willing), *_mixed_pairs(willing))]
        ways = [(other.prefill, other.decode) for other in others if other.name not in asked]
        further = _judged(request, ways, knowledge, now_s, len(ways))
        judged |= {candidate.name: candidate.words for candidate in further}
        feasible = [candidate for candidate in further if candidate.feasible]
    if price is not None:
        price.note(cost_s, now_s, fitted=bool(feasible), dear=False)
    if feasible:
        short = knowledge.price is None or knowledge.price.short(now_s)
        chosen = (
            _best_by_loss(feasible, request, knowledge) if short else _fastest(feasible, request, knowledge)
        )
        return _accept(request, chosen, "admitted", judged, now_s), [*candidates, *further]
    fallback = _fallback(candidates, request, knowledge)
    return _turn_away(request, fallback, judged, now_s), [*candidates, *further]


def _candidate(way: tuple[NodeMirror | None, NodeMirror]) -> Candidate:
    return Candidate(*way)


def _fallback(candidates: Iterable[Candidate], request: Place, knowledge: Knowledge) -> Candidate:
    """Where it goes without a promise: where most of its prompt has been read, if that is not much busier than
    others; else to its home, by the same rule; else to the least loaded. It may be promised there later: what
    its node believes to hold of it is said now."""
    known = list(candidates)
    home = knowledge.sessions.home(request.session)
    bound = min(candidate.load for candidate in known) + HOME_LOAD
    knowing = _knowing(known, request, knowledge)

    def preference(candidate: Candidate) -> tuple[bool, bool, int]:
        stays = candidate.decode.name == home and candidate.load <= bound
        return id(candidate) not in knowing, not stays, candidate.load

    chosen = min(known, key=preference)
    cached_tokens = min(knowledge.cached_tokens(chosen.first.name, request), request.prompt_tokens - 1)
    return replace(chosen, cached_tokens=max(cached_tokens, 0))


def _judged(
    request: Place,
    ways: Sequence[tuple[NodeMirror | None, NodeMirror]],
    knowledge: Knowledge,
    now_s: float,
    enough: int,
) -> list[Candidate]:
    """What becomes of each candidate, until `enough` of them can keep the promise."""
    candidates: list[Candidate] = []
    for prefill, decode in ways:
        candidates.append(judge(request, prefill, decode, knowledge, now_s))
        enough -= candidates[-1].feasible
        if enough <= 0:
            break
    return candidates


def _turn_away(request: Place, fallback: Candidate, judged: dict[str, str], now_s: float) -> Placed:
    """No promise: best effort at `fallback`, or a refusal if the client wants that."""
    if not request.may_defer:
        return Placed(
            request.request_id,
            request.attempt,
            "refused",
            reason=f"the promise cannot be kept: {fallback.name}: {fallback.reason}",
            retry_after_s=RETRY_AFTER_S,
            candidates=judged,
        )
    return _accept(request, fallback, "best_effort", judged, now_s)


def expected_work_s(request: Place, nodes: Sequence[NodeMirror], knowledge: Knowledge) -> float:
    """What a request is likely to take of a replica, by the steps and the memory of the first of `nodes`."""
    report = nodes[0].report
    assert report is not None
    most = max(request.max_tokens, 1)
    known = knowledge.lengths.lengths(request.class_name or "", request.prompt_tokens, most)
    kv_tokens = report.info.num_blocks * report.info.block_size
    output_tokens = known.mean_remaining() * request.sequences
    least_s, per_token_s = report.cost.predict(1), report.cost.per_token_s
    return work_s(least_s, per_token_s, kv_tokens, request.prompt_tokens, output_tokens)


def _within_reach(request: Place, nodes: Sequence[NodeMirror], knowledge: Knowledge) -> bool:
    """Whether the first of `nodes` could end the prefill in time and keep the pace if it did nothing else."""
    report = nodes[0].report
    assert report is not None
    cost, most = report.cost, report.info.max_draft_tokens + 1
    if cost.predict(1) > request.tpot_s * most:
        return False
    if cost.predict(request.prompt_tokens) <= request.first_token_left_s:
        return True
    cached = max(knowledge.cached_tokens(node.name, request) for node in nodes)
    return cost.predict(max(request.prompt_tokens - cached, 1)) <= request.first_token_left_s


def _best_by_loss(feasible: Sequence[Candidate], request: Place, knowledge: Knowledge) -> Candidate:
    """The least loss, then the least load, then no KV to move: what others may want is kept for them."""
    home = knowledge.sessions.home(request.session)

    def preference(candidate: Candidate) -> tuple[int, int, bool]:
        stays = candidate.prefill is None and candidate.decode.name == home
        loss_s = candidate.loss_s / HOME_WORTH if stays else candidate.loss_s
        loss = math.ceil(math.log(max(loss_s, 1e-6), SAME_LOSS))
        return loss, candidate.load, candidate.prefill is not None

    return min(feasible, key=preference)


def _fastest(feasible: Sequence[Candidate], request: Place, knowledge: Knowledge) -> Candidate:
    """While there is room for everybody: where its history is, if that is not much busier than others; else the
    least load, so that its steps are short and those of others stay so; then the least loss."""
    knowing = _knowing(feasible, request, knowledge)

    def preference(candidate: Candidate) -> tuple[bool, int, float]:
        return id(candidate) not in knowing, candidate.load, candidate.loss_s

    return min(feasible, key=preference)


def _knowing(candidates: Sequence[Candidate], request: Place, knowledge: Knowledge) -> set[int]:
    """Those (by id) that hold most of the prompt, and, but for less than a block of prefixes, as much of it as
    any that is not much busier than others: a shared beginning is no reason to leave a whole history."""
    bound = min(candidate.load for candidate in candidates) + HOME_LOAD
    near = [candidate for candidate in candidates if candidate.load <= bound]
    firsts = {candidate.first.name for candidate in near}  # pairs share nodes
    cached = {name: knowledge.cached_tokens(name, request) for name in firsts}
    least = max(max(cached.values()) - PREFIX_BLOCK_TOKENS, request.prompt_tokens // 2)
    return {id(candidate) for candidate in near if cached[candidate.first.name] > least}


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
    """The candidates: nodes that do both, and pairs across the pools, of the likeliest nodes of each pool.

    A decode node also serves alone what must stay on one node, everything once nobody prefills, and a follow-up
    call of which it has most of the KV: it prefills the few tokens that are new.
    """
    pools: dict[RoleName, list[NodeMirror]] = {role: [] for role in RoleName}
    for node in nodes:
        pools[node.role].append(node)
    prefillers = _likeliest(request, pools[RoleName.PREFILL], knowledge)
    decoders = _likeliest(request, pools[RoleName.DECODE], knowledge)
    mixed = _likeliest(request, pools[RoleName.MIXED], knowledge)
    alone = request.one_node or not prefillers
    ways: list[tuple[NodeMirror | None, NodeMirror]] = [
        (None, node) for node in decoders if alone or _has_most(node, request, knowledge)
    ]
    ways += [(None, node) for node in mixed]
    if not request.one_node:
        ways += [(prefill, decode) for prefill in prefillers for decode in decoders]
        ways += _moves(request, nodes, knowledge)
    return ways


def _moves(
    request: Place, nodes: Sequence[NodeMirror], knowledge: Knowledge
) -> Iterator[tuple[NodeMirror | None, NodeMirror]]:
    """The history of a session goes along: its home computes what is new and hands over, another decodes."""
    name = knowledge.sessions.home(request.session)
    home = next((node for node in nodes if node.name == name and node.role is not RoleName.PREFILL), None)
    if home is None or not _has_most(home, request, knowledge):
        return
    others = [node for node in nodes if node is not home and node.role is not RoleName.PREFILL]
    for node in nsmallest(MOST_MOVES, others, key=attrgetter("requests")):
        yield home, node


def _decoders_alone(nodes: Sequence[NodeMirror]) -> list[tuple[None, NodeMirror]]:
    """Decode nodes, the least loaded first. They are asked about where no pair can keep the promise: there is
    no time for a handoff, or the prefill nodes are full and these have budget left."""
    decoders = sorted((node for node in nodes if node.role is RoleName.DECODE), key=attrgetter("requests"))
    return [(None, node) for node in decoders[: MOST_CANDIDATES // 2]]


def _mixed_pairs(nodes: Sequence[NodeMirror]) -> list[tuple[NodeMirror, NodeMirror]]:
    """Pairs of which a node does both, the least loaded first: one may have budget for the prompt, another
    memory for the decode. They are asked about where no node alone and no pair of pools can keep the promise.
    """
    by_load = sorted(nodes, key=lambda node: node.requests)
    prefillers = [node for node in by_load if node.role is not RoleName.DECODE][:MOST_CANDIDATES]
    decoders = [node for node in by_load if node.role is not RoleName.PREFILL][:MOST_CANDIDATES]
    pairs = [
        (prefill, decode)
        for prefill in prefillers
        for decode in decoders
        if prefill is not decode and RoleName.MIXED in (prefill.role, decode.role)
    ]
    return sorted(pairs, key=lambda pair: pair[0].requests + pair[1].requests)[: MOST_CANDIDATES // 2]


def _likeliest(request: Place, nodes: list[NodeMirror], knowledge: Knowledge) -> list[NodeMirror]:
    """Where most of the KV is; then some that keep such a pace already or keep none; then the least loaded."""
    if len(nodes) <= MOST_CANDIDATES:
        return nodes
    by_load = sorted(nodes, key=attrgetter("requests"))
    home = knowledge.sessions.home(request.session)
    known = knowledge.prefixes.holders(request.prefix_hashes)
    holders = (node for node in by_load if node.name in known and _has_most(node, request, knowledge))
    gathered = (node for node in by_load if node.welcomes_pace(request.tpot_s))
    likely = (
        *(node for node in by_load if node.name == home and _has_most(node, request, knowledge)),
        *islice(holders, 2),
        *islice(gathered, MOST_CANDIDATES // 2),
        *by_load[:MOST_CANDIDATES],
    )
    return list({id(node): node for node in likely}.values())[:MOST_CANDIDATES]


def _has_most(node: NodeMirror, request: Place, knowledge: Knowledge) -> bool:
    return 2 * knowledge.cached_tokens(node.name, request) > request.prompt_tokens


def _shortlist(
    ways: Sequence[tuple[NodeMirror | None, NodeMirror]], home: str | None
) -> Sequence[tuple[NodeMirror | None, NodeMirror]]:
    """At most so many candidates: one node and two by turns, `home` first, then the least loaded."""
    if len(ways) <= MOST_CANDIDATES:
        return ways

    def rank(way: tuple[NodeMirror | None, NodeMirror]) -> tuple[bool, int]:
        prefill, decode = way
        stays = prefill is None and decode.name == home
        return not stays, decode.requests + (0 if prefill is None else prefill.requests)

    pairs = sorted((way for way in ways if way[0] is not None), key=rank)[:MOST_CANDIDATES]
    singles = sorted((way for way in ways if way[0] is None), key=rank)
    if not pairs or not singles:
        return (singles or pairs)[:MOST_CANDIDATES]
    both = zip_longest(singles[: MOST_CANDIDATES // 2], pairs)
    return [way for ranked in both for way in ranked if way is not None][:MOST_CANDIDATES]


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
    cached = knowledge.cached_tokens(first.name, request)
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
        decision, problem, reason = _ask(decode, whole, knowledge, now_s)
        if reason:
            return Candidate(None, decode, reason, decisions=(decision,))
        loss = loss_s(problem, _residence_s(decode, whole, knowledge))
        return Candidate(None, decode, "", loss, (decision,), cached_tokens=cached)
    return _judge_pair(request, whole, prefill, decode, knowledge, now_s)


def _judge_pair(
    request: Place,
    whole: Asking,
    prefill: NodeMirror,
    decode: NodeMirror,
    knowledge: Knowledge,
    now_s: float,
) -> Candidate:
    """Prefill on one node, by what the handoff leaves of the deadline; decode on the other."""
    link = knowledge.links.get((prefill.name, decode.name))
    if link is None:
        return Candidate(prefill, decode, "the link between them is not measured")
    said_tokens = request.said_tokens  # are computed where it decodes, behind the KV of the prompt
    moved_tokens = request.prompt_tokens - said_tokens
    lead = lead_s(request, whole, prefill, decode, link, knowledge.lengths)
    # Rounded down to a millisecond: nodes that are about as quick then ask their partner the same.
    prefill_left_s = math.floor((request.first_token_left_s - lead) * 1e3) / 1e3
    prefilling = replace(whole, tokens=max(whole.tokens - said_tokens, 1), left_s=prefill_left_s, tpot_s=None)
    at_prefill, prefills, reason = _ask(prefill, prefilling, knowledge, now_s)
    if reason:
        why = f"{prefill.name}: {reason}"
        return Candidate(prefill, decode, why, decisions=(at_prefill,), lacks=RoleName.PREFILL)
    first_pace_s = 0.0 if said_tokens else request.tpot_s  # the first token is said before
    decoding = replace(
        whole,
        tokens=said_tokens + 1,
        cached_tokens=max(moved_tokens - 1, 0),
        left_s=request.first_token_left_s + first_pace_s,
    )
    at_decode, decodes, reason = _ask(decode, decoding, knowledge, now_s)
    decisions = (at_prefill, at_decode)
    if reason:
        why = f"{decode.name}: {reason}"
        return Candidate(prefill, decode, why, decisions=decisions, lacks=RoleName.DECODE)
    loss = transfer_s(request, prefill, link) + loss_s(prefills, 0.0)
    if decode.role is not RoleName.DECODE:
        loss += loss_s(decodes, _residence_s(decode, decoding, knowledge))
    return Candidate(prefill, decode, "", loss, decisions, lead, whole.cached_tokens)


def _residence_s(decode: NodeMirror, asking: Asking, knowledge: Knowledge) -> float:
    """How long its decode takes budget from prompts there: a decode node has none to compute but its own."""
    return 0.0 if decode.role is RoleName.DECODE else expected_residence_s(asking, knowledge.lengths)


def _ask(node: NodeMirror, asking: Asking, knowledge: Knowledge, now_s: float) -> tuple[Decision, Problem, str]:
    """Put a request to the planner: what it says, of which problem, and what is lacking if anything is.

    Pairs share nodes: what one was asked already is not asked again.
    """
    key = node.name, asking
    if key not in knowledge.asked:
        instance = to_instance(node.replica(now_s), asking, knowledge.lengths)
        problem = Problem(instance)
        plan = solve_problem(problem, why=knowledge.why)
        left_out = plan.deferred.get(asking.id) or next(iter(plan.deferred.values()), "")
        knowledge.asked[key] = Decision(node.name, instance, plan), problem, left_out
    return knowledge.asked[key]


def _accept(request: Place, chosen: Candidate, verdict: str, judged: dict[str, str], now_s: float) -> Placed:
    state = WorkState(
        request_id=request.request_id,
        attempt=request.attempt,
        kind=WorkKind.WHOLE,
        prompt_tokens=request.prompt_tokens,
        prefill_left_tokens=max(request.prompt_tokens - chosen.cached_tokens - 1, 0),
        output_tokens=0,
        max_tokens=request.max_tokens,
        first_token_left_s=request.first_token_left_s,
        tpot_s=request.tpot_s,
        best_effort=verdict == "best_effort",
        class_name=request.class_name or "",
    )
    prefill = chosen.prefill
    for request_id in (request.request_id, *request.siblings):
        mine = replace(state, request_id=request_id)
        if prefill is None:
            chosen.decode.place(mine, now_s)
        else:
            offered = replace(
                mine,
                kind=WorkKind.PREFILL,
                prompt_tokens=mine.prompt_tokens - request.said_tokens,
                prefill_left_tokens=max(mine.prefill_left_tokens - request.said_tokens, 0),
                first_token_left_s=mine.first_token_left_s - chosen.handoff_s,
            )
            prefill.place(offered, now_s)
            chosen.decode.place(taken_up(mine, request.said_tokens), now_s)
    return Placed(
        request.request_id,
        request.attempt,
        verdict,
        prefill=None if prefill is None else NodeAddress(prefill.name, prefill.address),
        decode=NodeAddress(chosen.decode.name, chosen.decode.address),
        reason=chosen.reason,
        candidates=judged,
        handoff_s=chosen.handoff_s,
        cached_tokens=chosen.cached_tokens,
    )
