"""Ours in the simulator: the coordinator's own decider over mirrors that are fed with reports of the replicas.

What nodes and endpoints do around it is here in short: reports as batches begin, works that a full node
declines, handoffs, drafting depths. No message takes time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat

import numpy as np

from benchmarks.simulator.steps import REPORTED_S, STEP_S, TOLD_OF_S, take_report
from benchmarks.simulator.variants import FULL, Variant
from benchmarks.simulator.world import World
from coordinator.decider import Decider
from coordinator.mirror import NodeMirror
from coordinator.node_lists import LIST_EVERY_S
from coordinator.pool_loads import PoolLoads
from coordinator.pool_policy import Move, PoolPolicy
from coordinator.pools import PoolNode, plan_flips
from engine.base import EngineInfo, Usage
from engine.drafting import Drafted, Drafting
from engine.messages import Finished, Place, Placed, Report, WorkState
from engine.prefix import PREFIX_BLOCK_TOKENS
from engine.request import RoleName, WorkKind
from engine.rows import PULL_WAITS, PULLING
from engine.virtual_kernel import FREE_BLOCKS, LIVE, NUM_BLOCKS, RUNNING
from kv_transfer.base import Link, PeerAddress

TURN_S = 0.1  # the coordinator asks again about deferred requests (coordinator/service.py)
TICK_S = 0.1  # a node plans how deep it drafts (engine/node.py)
MAX_WAITING = 256  # a node with so many declines what is promised nothing
MAX_ATTEMPTS = 5
KV_BOUND_SHARE = 0.9
ENDPOINT = b"endpoint"
KINDS = (
    WorkKind.WHOLE,
    WorkKind.PREFILL,
    WorkKind.DECODE,
)  # offers its KV: 1, takes up what another offered: 2


@dataclass(frozen=True, slots=True)
class Resize:
    """Pools of other sizes from a time on, as `slosserve rebalance` makes them."""

    at_s: float
    prefill: int
    decode: int
    mixed: int = 0


class Slosserve:
    """The cluster: a decider, and what it knows of each replica. `resizes` come in order of time; with
    `follows_load` the pools change as `slosserve rebalance --auto` has them change. With `sessions` each chain
    of calls says that it is one."""

    def __init__(
        self,
        roles: Sequence[RoleName],
        decider: Decider,
        max_draft_tokens: int = 0,
        *,
        one_node: bool = False,
        variant: Variant = FULL,
        resizes: Sequence[Resize] = (),
        follows_load: bool = False,
        sessions: bool = False,
    ) -> None:
        self._one_node = one_node
        self._variant = variant
        self._sessions = sessions
        self._listed_s = [-math.inf] * len(roles)
        self._resizes = list(resizes)
        self._policy = PoolPolicy() if follows_load else None
        self._loads: PoolLoads | None = None
        self.moves: list[tuple[float, Move]] = []
        self._turns = 0
        self._max_tokens: np.ndarray = np.zeros(0, dtype=np.int64)
        self._roles = list(roles)
        self._decider = decider
        self._max_draft_tokens = max_draft_tokens
        self.tick_s: float | None = TICK_S if max_draft_tokens else None
        self._mirrors: dict[str, NodeMirror] = {}
        self._links: Mapping[tuple[str, str], Link] = {}
        self._drafting = [Drafting(max_draft_tokens) for _ in roles]
        self._drafted: dict[int, Drafted] = {}
        self._seen_drafts: dict[int, tuple[int, int]] = {}
        self._placed: dict[int, Placed] = {}
        self._turn_is_set = False
        self._reported = [(-math.inf, -math.inf)] * len(roles)  # when, and of which moment
        self._is_pair: np.ndarray = np.zeros(0, dtype=np.bool_)
        self.admitted: np.ndarray = np.zeros(0, dtype=np.bool_)

    # ---- what the world says -----------------------------------------------------------------------------

    def arrive(self, world: World, request: int) -> None:
        """Ask the decider, and do what it says."""
        if not self._mirrors:
            self._meet(world)
        asked = self._mirrors
        if self._variant.by_turns:
            name = _node(self._turns % len(self._roles))
            asked = {name: self._mirrors[name]}
            self._turns += 1
        self._place(world, request, asked, avoid=[])

    def offered(self, world: World, request: int, replica: int) -> None:
        """The prefill has ended and said the first token: on to the decode node that was chosen."""
        placed = self._placed[request]
        assert placed.decode is not None
        row = world.rows[request]
        row["first_due_s"] = world.arrived_s[request] + world.slos[request].ttft_s
        world.say_first(request)
        if row["end_tokens"] == 1:
            world.end_offered(request, replica)
            self.ended(world, request, replica)
        else:
            world.hand_over(request, _index(placed.decode.node))

    def ended(self, world: World, request: int, replica: int) -> None:
        """The decider learns from it."""
        placed = self._placed[request]
        self._drafted.pop(request, None)
        nodes = [node.node for node in (placed.prefill, placed.decode) if node is not None]
        output = int(world.workload.output_tokens[request])
        prompt = int(world.workload.prompt_tokens[request])
        finished = Finished(
            request_id=_name(request),
            attempt=placed.attempt,
            class_name=world.slos[request].class_name,
            outcome="completed",
            verdict=placed.verdict,
            met=True,
            strict=True,
            goodput=True,
            stages={},
            placement="one_node" if placed.prefill is None else "pair",
            prompt_tokens=prompt,
            output_tokens=output,
            nodes=nodes,
            prefix_hashes=_hashes(int(world.chain[request]), prompt + output)
            if _in_chain(world, request)
            else [],
            ended_itself=output < int(self._max_tokens[request]),
            session=self._session(world, request),
        )
        left = self._decider.finished(finished, self._mirrors, world.now_s)
        if left is not None:
            world.prefixes[_index(left)].close(int(world.chain[request]))

    def turn(self, world: World) -> None:
        """Deferred requests are asked about again."""
        self._turn_is_set = False
        self._refresh(world)
        for promotion in self._decider.ask_again(self._mirrors, self._links, world.now_s):
            request = _request(promotion.deferred.request.request_id)
            row = world.rows[request]
            pace = promotion.promote.pace
            row["promised"] = True
            row["first_due_s"] = row["due_s"] = world.now_s + pace.first_token_left_s
            row["tpot_s"] = pace.tpot_s
            self.admitted[request] = True
            world.wake(_index(promotion.node))
        self._ask_again_later(world)

    def tick(self, world: World, replica: int) -> None:
        """Depths of drafts from now on, as a node plans them."""
        drafting = self._drafting[replica]
        station = world.stations[replica]
        deciding: list[Drafted] = []
        rows: list[int] = []
        for request in station.replica.live[: station.replica.counts[LIVE]].tolist():
            row = world.rows[request]
            if not row["promised"] or row["output_tokens"] == 0 or row["offers"]:
                continue
            drafted = self._drafted.get(request)
            if drafted is None:
                name = world.slos[request].class_name
                drafted = Drafted(name, float(row["tpot_s"]), 0, 0.0, drafting.estimate(name))
                self._drafted[request] = drafted
            self._learn(drafting, drafted, request, int(row["drafted"]), int(row["accepted"]))
            drafted.context_tokens = int(row["prompt_tokens"] + row["output_tokens"])
            drafted.slack_s = float(row["due_s"]) - world.now_s
            deciding.append(drafted)
            rows.append(request)
        counts = station.replica.counts
        used = counts[NUM_BLOCKS] - counts[FREE_BLOCKS]
        spec = world.specs[replica]
        drafting.plan(
            deciding,
            spec.cost,
            spec.max_batch_tokens,
            kv_bound=bool(used > KV_BOUND_SHARE * counts[NUM_BLOCKS]),
        )
        for request, drafted in zip(rows, deciding, strict=True):
            world.rows[request]["depth"] = drafted.depth

    # ---- placing -----------------------------------------------------------------------------------------

    def set_roles(self, roles: Sequence[RoleName]) -> None:
        """Other roles from now on: new work is placed by them, and what runs goes on where it is."""
        self._roles = list(roles)
        for mirror, role in zip(self._mirrors.values(), roles, strict=True):
            mirror.role = role

    def _resize(self, now_s: float) -> None:
        """Flip the least busy nodes of the pools that shrink. They may be busy: a role says what comes next."""
        while self._resizes and self._resizes[0].at_s <= now_s:
            wanted = self._resizes.pop(0)
            by_load = sorted(self._mirrors.values(), key=lambda mirror: mirror.requests)
            nodes = [PoolNode(mirror.name, mirror.role, requests=0) for mirror in by_load]
            sizes = (wanted.prefill, wanted.decode, wanted.mixed)
            roles = (RoleName.PREFILL, RoleName.DECODE, RoleName.MIXED)
            flips = plan_flips(nodes, dict(zip(roles, sizes, strict=True)))
            after = {flip.node: flip.after for flip in flips}
            self.set_roles([after.get(name, mirror.role) for name, mirror in self._mirrors.items()])

    def _follow_load(self, now_s: float) -> None:
        """As the coordinator does (coordinator/rebalance.py), at every arrival."""
        if self._policy is None:
            return
        if self._loads is None:
            self._loads = PoolLoads(self._mirrors, self._decider.lacked)
        move = self._loads.next_move(self._policy, now_s)
        if move is not None:
            flipped = self._loads.least_loaded(move.before)
            roles = [move.after if name == flipped else one.role for name, one in self._mirrors.items()]
            self.set_roles(roles)
            self.moves.append((now_s, move))

    def _place(self, world: World, request: int, asked: Mapping[str, NodeMirror], avoid: list[str]) -> None:
        """`asked`: the nodes that it may go to."""
        self._refresh(world)
        self._follow_load(world.now_s)
        slo = world.slos[request]
        left_s = float(world.arrived_s[request]) + slo.ttft_s - world.now_s
        question = Place(
            request_id=_name(request),
            attempt=len(avoid) + 1,
            prompt_tokens=int(world.workload.prompt_tokens[request]),
            max_tokens=int(self._max_tokens[request]),
            class_name=slo.class_name,
            first_token_left_s=left_s,
            tpot_s=slo.first_pace_s,
            one_node=self._one_node,
            may_defer=self._variant.defers and not slo.refuse,
            avoid=avoid,
            prefix_hashes=_hashes(int(world.chain[request]), int(world.workload.prefix_tokens[request])),
            session=self._session(world, request),
        )
        placed = self._decider.place(question, ENDPOINT, asked, self._links, world.now_s)
        self._ask_again_later(world)
        if placed.decode is None:
            self._decider.deferred.forget(_name(request))
            world.drop(request)
            return
        first = placed.decode if placed.prefill is None else placed.prefill
        replica = _index(first.node)
        counts = world.stations[replica].replica.counts
        may_decline = placed.verdict != "admitted" or not self._variant.plans
        if may_decline and counts[LIVE] - counts[RUNNING] >= MAX_WAITING:
            for mirror in self._mirrors.values():
                mirror.forget(_name(request), question.attempt)
            if len(avoid) + 1 >= MAX_ATTEMPTS:
                self._decider.deferred.forget(_name(request))
                world.drop(request)
            else:
                self._place(world, request, asked, [*avoid, first.node])
            return
        self._submit(world, request, placed, replica)

    def _submit(self, world: World, request: int, placed: Placed, replica: int) -> None:
        self._placed[request] = placed
        self._is_pair[request] = placed.prefill is not None
        row = world.rows[request]
        row["promised"] = self.admitted[request] = placed.verdict == "admitted"
        row["depth"] = 1 if self._max_draft_tokens else 0
        if placed.prefill is not None:
            row["first_due_s"] -= placed.handoff_s
            row["due_s"] = row["first_due_s"]
        world.submit(request, replica, offers=placed.prefill is not None)

    def _session(self, world: World, request: int) -> str | None:
        return str(world.chain[request]) if self._sessions else None

    def _ask_again_later(self, world: World) -> None:
        if not self._turn_is_set and len(self._decider.deferred):
            self._turn_is_set = True
            world.turn_at(world.now_s + TURN_S)

    def _learn(self, drafting: Drafting, drafted: Drafted, request: int, drafts: int, accepted: int) -> None:
        before, before_accepted = self._seen_drafts.get(request, (0, 0))
        new, new_accepted = drafts - before, accepted - before_accepted
        if new > 0:
            drafted.estimate = drafting.verified(drafted.class_name, drafted.estimate, new, new_accepted + 1)
            self._seen_drafts[request] = drafts, accepted

    # ---- reports -----------------------------------------------------------------------------------------

    def _meet(self, world: World) -> None:
        self.admitted = np.zeros(len(world.workload), dtype=np.bool_)
        self._is_pair = np.zeros(len(world.workload), dtype=np.bool_)
        load = world.workload
        self._max_tokens = load.output_tokens if self._variant.tells_lengths else load.max_tokens
        names = [_node(replica) for replica in range(len(self._roles))]
        self._mirrors = {
            name: NodeMirror(name, name, role) for name, role in zip(names, self._roles, strict=True)
        }
        self._links = {(a, b): world.links.between(a, b) for a in names for b in names if a != b}

    def _refresh(self, world: World) -> None:
        """Hand the mirrors what each replica last said of itself; one without a step reports now."""
        self._resize(world.now_s)
        for replica, station in enumerate(world.stations):
            if world.is_idle(replica):
                take_report(station, world.rows, world.now_s)
            reported_s, told_of_s = float(station.times[REPORTED_S]), float(station.times[TOLD_OF_S])
            # An idle one may tell, in the same instant, of a batch that begins.
            if (reported_s, told_of_s) > self._reported[replica]:
                self._reported[replica] = reported_s, told_of_s
                report = self._report(world, replica, reported_s, told_of_s)
                self._mirrors[_node(replica)].take_report(report, world.now_s)
            if self._sessions and world.now_s - self._listed_s[replica] >= LIST_EVERY_S:
                self._listed_s[replica] = world.now_s
                self._decider.sessions.listed(_node(replica), world.prefixes[replica].held, world.now_s)

    def _report(self, world: World, replica: int, made_s: float, at_s: float) -> Report:
        """The account that a replica made at `made_s` of how it will be at `at_s`."""
        station, spec = world.stations[replica], world.specs[replica]
        states = self._states(world, replica, at_s)
        states += [self._leased(world, request) for request in world.leases[replica]]
        counts = station.replica.counts
        return Report(
            node=_node(replica),
            boot_id="simulated",
            role=self._roles[replica],
            info=_info(spec.block_tokens, int(counts[NUM_BLOCKS]), spec, world, self._max_draft_tokens),
            kv=PeerAddress(_node(replica), "simulated", 0),
            usage=Usage(int(counts[NUM_BLOCKS] - counts[FREE_BLOCKS]), int(counts[NUM_BLOCKS]), 0, 0),
            works=states,
            leases=[],
            pulls=[],
            cost=spec.cost,
            idle_cost=spec.cost,
            promises_preempted=0,
            promises_starved=int(station.reported[1]),
            cost_margin=0.0,
            steps=0,
            step_s=float(station.times[STEP_S]),
            stuck_s=0.0,
            local_prefills=0,
            corrupt_pulls=0,
            pid=0,
            in_flight_s=at_s - made_s,
            age_s=world.now_s - made_s,
        )

    def _states(self, world: World, replica: int, at_s: float) -> list[WorkState]:
        """The rows of its last report as a node would tell of them. In columns: there is a row of each work."""
        station = world.stations[replica]
        count = int(station.reported[0])
        ids, rows = station.reported_ids[:count], station.report[:count]
        prompt, output, offers = rows["prompt_tokens"], rows["output_tokens"], rows["offers"]
        second_half = self._is_pair[ids] & ~offers
        pulls = second_half & ((rows["pull"] == PULL_WAITS) | (rows["pull"] == PULLING))
        cached = np.where(second_half | rows["running"], 0, rows["cached_tokens"])
        left = np.maximum(prompt + output - rows["computed_tokens"] - 1, 0)
        left = np.where(pulls, 0, np.maximum(left - cached, 0))
        prompt, output = prompt + second_half, output - second_half  # to the decode node the first is prompt
        first_due_s = np.where(second_half & (output == 0), rows["due_s"], rows["first_due_s"])
        requests = ids.tolist()
        next_due_left_s = [
            due_s if tokens else None
            for due_s, tokens in zip((rows["due_s"] - at_s).tolist(), output.tolist(), strict=True)
        ]
        return list(
            map(
                WorkState,
                map(_name, requests),
                [self._placed[request].attempt for request in requests],
                [KINDS[at] for at in (offers + 2 * second_half).tolist()],
                prompt.tolist(),
                left.tolist(),
                output.tolist(),
                (self._max_tokens[ids] - second_half).tolist(),
                (first_due_s - at_s).tolist(),
                rows["tpot_s"].tolist(),
                (~rows["promised"]).tolist(),
                [world.slos[request].class_name for request in requests],
                next_due_left_s,
                map(self._acceptance, requests) if self._max_draft_tokens else repeat(None),
            )
        )

    def _acceptance(self, request: int) -> float:
        drafted = self._drafted.get(request)
        estimate = self._drafting[0].estimate("") if drafted is None else drafted.estimate
        return estimate.acceptance

    def _leased(self, world: World, request: int) -> WorkState:
        """A prefill that is over, whose KV waits here to be pulled."""
        slo = world.slos[request]
        return WorkState(
            _name(request),
            self._placed[request].attempt,
            WorkKind.PREFILL,
            int(world.workload.prompt_tokens[request]),
            0,
            1,
            1,
            0.0,
            slo.first_pace_s,
            not self.admitted[request],
            slo.class_name,
        )


def _info(block_tokens: int, num_blocks: int, spec: object, world: World, max_draft_tokens: int) -> EngineInfo:
    first = world.specs[0]
    return EngineInfo(
        engine="virtual",
        model="simulated",
        engine_id="simulated",
        block_size=block_tokens,
        num_blocks=num_blocks,
        max_model_len=1 << 20,
        max_num_seqs=first.max_seqs,
        max_batch_tokens=first.max_batch_tokens,
        kv_bytes_per_token=world.kv_bytes_per_token,
        transport="simulated",
        max_draft_tokens=max_draft_tokens,
    )


def _node(replica: int) -> str:
    return f"n{replica}"


def _index(node: str) -> int:
    return int(node[1:])


def _name(request: int) -> str:
    return str(request)


def _request(request_id: str) -> int:
    return int(request_id)


def _in_chain(world: World, request: int) -> bool:
    return bool(world.workload.prefix_tokens.any())


def _hashes(chain: int, tokens: int) -> list[int]:
    """Made-up names of the blocks of a chain's history."""
    return [(chain << 24) + block for block in range(tokens // PREFIX_BLOCK_TOKENS)]
