"""The coordinator: mirrors of the nodes, placement, pools, and what the cluster has kept of its promises.

It decides and watches; tokens and KV never pass through it. All that it knows of running work it has from the
nodes' own reports, so one that starts anew learns everything by asking them.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from coordinator.best_effort import place_best_effort
from coordinator.cluster_state import mode_of, node_state
from coordinator.decider import Decider, Promotion
from coordinator.links import KnownLinks, MeasuredLinks
from coordinator.mirror import NodeMirror
from coordinator.node_lists import Holdings
from coordinator.pools import sizes
from coordinator.ray_head import RayHead
from coordinator.rebalance import Rebalancer
from coordinator.revival import Revival
from coordinator.scaling import Fleet, Scaling
from coordinator.scorecard import Scorecard
from coordinator.trunk import Links, NodeLink
from engine.cost import StepCost
from engine.errors import ProtocolError, RequestError, SlosserveError
from engine.messages import (
    Alive,
    Answer,
    CloseSession,
    Finished,
    LinksProbed,
    LoopEnded,
    Message,
    NodeLoad,
    Place,
    Placed,
    PrefixesListed,
    ProbeLinks,
    Promoted,
    Query,
    Report,
    RoleSet,
    SessionsListed,
    SetRole,
    View,
    Watch,
    decode,
    encode,
)
from engine.request import RoleName

logger = logging.getLogger(__name__)

TURN_S = 0.1
LATE_S = 0.5  # of a turn: worth a line in the log
CALL_TIMEOUT_S = 10.0
RETRY_LINKS_EVERY_S = 30.0
ENDPOINT_FORGOTTEN_S = 5.0
NODES_TOLD_A_TURN = 256  # to endpoints: a larger cluster is told of less often
DRAIN_S = 600.0  # for what a leaving node serves
MOST_TURNS_UNTOLD = 5  # an endpoint takes a view for stale after a second


class Coordinator:
    """Runs in one event loop. `revive` brings a lost node back (by Ray) and returns its new address; `fleet`
    starts and ends nodes, None where there are as many as were configured for ever.
    """

    def __init__(
        self,
        model: str,
        bind: str,
        *,
        node_silent_s: float,
        stuck_step_s: float,
        place_s: float,
        revive: Callable[[str], Coroutine[Any, Any, str | None]],
        decider: Decider,
        links: KnownLinks | None = None,
        fleet: Fleet | None = None,
    ) -> None:
        self._model = model
        self._stuck_step_s = stuck_step_s
        self._place_s = place_s
        self._decider = decider
        self._context = zmq.asyncio.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._router.setsockopt(zmq.LINGER, 200)
        port = self._router.bind_to_random_port(bind)
        self.address = f"{bind}:{port}"
        self._identity = f"coordinator-{time.time_ns()}"
        self._mirrors: dict[str, NodeMirror] = {}
        self._peers: dict[str, NodeLink] = {}
        self._link_to = Links(self._context, reports=True, silent_s=node_silent_s)
        self._boot_ids: dict[str, str] = {}
        self._links: KnownLinks = MeasuredLinks() if links is None else links
        self._scorecard = Scorecard()
        self._idle_cost: StepCost | None = None
        self._calls = itertools.count()
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._revival = Revival(revive, self._back)
        self._holdings = Holdings(decider.sessions, decider.prefixes, self._call)
        self._rebalancer = Rebalancer(self._mirrors, self._set_role, self._tell_endpoints, decider.lacked)
        wanted = self._rebalancer.wanted
        self._scaling = fleet and Scaling(
            fleet, self, self._mirrors, wanted, self._spawn, self._tell_endpoints, self._rebalancer.changing
        )
        self._reviewing: asyncio.Task[None] | None = None
        self._endpoints: dict[bytes, float] = {}
        self._probing: asyncio.Task[None] | None = None
        self._retry_links_s = time.monotonic() + RETRY_LINKS_EVERY_S
        self._began = False  # everything was ready once: from then on it serves with what there is
        self._untold_turns = 0
        self._ray_head: RayHead | None = None

    # ---- nodes -------------------------------------------------------------------------------------------

    def expect(self, names: Mapping[str, RoleName]) -> None:
        """Nodes that are being started, so that `/cluster` shows them from the beginning."""
        for name, role in names.items():
            self._mirrors.setdefault(name, NodeMirror(name, "", role))
            self._rebalancer.wanted[name] = role

    def follow_load(self, on: bool) -> None:
        """Let pools follow the load, or not."""
        self._rebalancer.follow(on)

    def watch_ray(self, head: RayHead) -> None:
        """Tell of Ray's head in `/cluster` from now on."""
        self._ray_head = head
        self._spawn(head.watch())

    def add_node(self, name: str, address: str) -> None:
        """Link to a node that is up. Its role and promises come with its first report."""
        old = self._peers.pop(name, None)
        if old is not None:
            old.close()
        mirror = self._mirrors.setdefault(name, NodeMirror(name, address, RoleName.MIXED))
        mirror.address = address

        def on_message(message: Message) -> None:
            self._from_node(name, message)

        self._peers[name] = self._link_to.to(address, self._identity, on_message)

    def fail_node(self, name: str, reason: str) -> None:
        """A node that could not be started."""
        self._mirrors[name].state = f"failed: {reason}"

    def lose_node(self, name: str) -> None:
        """A node that was there and does not answer now: it is brought back like any that is lost."""
        self._mirrors[name].lose()

    def remove_node(self, name: str) -> None:
        """Forget a node: from now on its silence is no loss."""
        peer = self._peers.pop(name, None)
        if peer is not None:
            peer.close()
        self._boot_ids.pop(name, None)
        self._mirrors.pop(name, None)
        self._rebalancer.wanted.pop(name, None)
        self._decider.forget_node(name)
        self._holdings.forget(name)
        self._links.forget(name)
        self._revival.forget(name)
        self._tell_endpoints()

    def send_away(self, name: str) -> None:
        """A node that is there and is not wanted leaves, as an earlier coordinator had told it to."""
        if self._scaling:
            self._scaling.send_away(name, DRAIN_S)

    @property
    def ready(self) -> bool:
        """Every node that could be started serves, and every link between them is measured; or it was so once,
        and some serve: nodes that come later are none to wait for.
        """
        starting = any(mirror.state == "starting" for mirror in self._mirrors.values())
        self._began = self._began or (not starting and self._any_serving and not self._unprobed())
        return self._began and self._any_serving

    @property
    def _any_serving(self) -> bool:
        return any(mirror.serving for mirror in self._mirrors.values())

    def _from_node(self, name: str, message: Message) -> None:
        match message:
            case Report() if message.node != name:
                logger.warning("%s answers at the address of %s", message.node, name)
            case Report():
                self._take_report(name, message)
            case RoleSet() | LinksProbed() | SessionsListed() | PrefixesListed():
                future = self._answers.get(message.call_id)
                if future is not None and not future.done():
                    future.set_result(message)
            case Alive():
                pass
            case _:
                logger.warning("a coordinator does not take %s", type(message).__name__)

    def _take_report(self, name: str, report: Report) -> None:
        mirror = self._mirrors[name]
        mirror.take_report(report, time.monotonic(), self._stuck_step_s)
        if self._idle_cost is None:
            self._idle_cost = report.idle_cost
        if self._boot_ids.get(name) != report.boot_id:
            if name not in self._boot_ids:
                # One that was there before us has the role that it was given since it began.
                self._rebalancer.wanted[name] = report.role
            elif report.role is not self._rebalancer.wanted[name]:
                # Ray starts a node again in its first role: what a rebalance made of it since still holds.
                self._spawn(self._rebalancer.flip(name, self._rebalancer.wanted[name], "it began anew"))
            self._decider.forget_node(name)
            self._boot_ids[name] = report.boot_id
        self._holdings.heard(name, report)
        self._links.node_is(name, report.kv.engine_id)
        self._links.observe(name, report.pulls)

    async def _call(self, name: str, make: Callable[[int], Message]) -> Any:
        call_id = next(self._calls)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._answers[call_id] = future
        try:
            self._peers[name].send(make(call_id))
            return await asyncio.wait_for(future, CALL_TIMEOUT_S)
        except TimeoutError:
            raise SlosserveError(f"{name} did not answer within {CALL_TIMEOUT_S:g} s") from None
        finally:
            self._answers.pop(call_id, None)

    # ---- links -------------------------------------------------------------------------------------------

    def _unprobed(self) -> list[tuple[str, str]]:
        return self._links.unmeasured(name for name, mirror in self._mirrors.items() if mirror.serving)

    async def _probe_links(self) -> None:
        """Measure what is not measured yet, one target at a time; what failed is tried again now and then."""
        now_s = time.monotonic()
        if now_s > self._retry_links_s:
            self._retry_links_s = now_s + RETRY_LINKS_EVERY_S
            self._links.try_failed_again()
        pairs = self._unprobed()
        if not pairs:
            return
        target = pairs[0][1]
        reports = {source: self._mirrors[source].report for source, to in pairs if to == target}
        source_of = {report.kv.engine_id: source for source, report in reports.items() if report is not None}
        peers = [report.kv for report in reports.values() if report is not None]
        try:
            probed: LinksProbed = await self._call(target, lambda call_id: ProbeLinks(call_id, peers))
        except SlosserveError as error:
            self._links.failed(target, dict.fromkeys(source_of.values(), str(error)))
            return
        self._links.measured(probed.links)
        errors = {source_of[engine_id]: text for engine_id, text in probed.errors.items()}
        self._links.failed(target, errors)
        for source, text in errors.items():
            logger.warning("link %s > %s: %s", source, target, text)

    # ---- the loop ----------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve for ever."""
        self._spawn(self._upkeep())
        while True:
            peer, *frames = await self._router.recv_multipart()
            try:
                message = decode(frames)
            except ProtocolError:
                logger.exception("from %r", peer)
                continue
            try:
                self._from_endpoint(peer, message)
            except Exception:
                logger.exception("handling %s", type(message).__name__)

    def close(self) -> None:
        """Let go of everything. Nodes go on."""
        for peer in self._peers.values():
            peer.close()
        self._context.destroy(linger=0)

    def _spawn(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _upkeep(self) -> None:
        while True:
            slept_s = time.monotonic()
            await asyncio.sleep(TURN_S)
            late_s = time.monotonic() - slept_s - TURN_S
            if late_s > LATE_S:
                logger.warning("this process did not get to run for %.1f s: what it is asked waits", late_s)
            try:
                self._untold_turns += 1
                turns = min(len(self._mirrors) // NODES_TOLD_A_TURN + 1, MOST_TURNS_UNTOLD)
                if self._notice_losses() or self._untold_turns >= turns:
                    self._untold_turns = 0
                    self._tell_endpoints()
                for promotion in self._decider.ask_again(
                    self._mirrors, self._links.by_name(), time.monotonic()
                ):
                    self._promote(promotion)
                for fetching in self._holdings.due(self._mirrors, time.monotonic()):
                    self._spawn(fetching)
                if self._reviewing is None or self._reviewing.done():
                    self._reviewing = asyncio.create_task(self._review())
                if self._probing is None or self._probing.done():
                    self._probing = asyncio.create_task(self._probe_links())
            except Exception:
                logger.exception("upkeep")

    async def _review(self) -> None:
        try:
            await self._rebalancer.review(time.monotonic())
        except SlosserveError:
            logger.exception("following the load")

    def _notice_losses(self) -> bool:
        """Whether a node was lost since the last call; all that are lost are being brought back."""
        any_lost = False
        for name, mirror in list(self._mirrors.items()):
            peer = self._peers.get(name)
            stuck = mirror.report is not None and mirror.report.stuck_s > self._stuck_step_s
            if peer is not None and mirror.state == "ready" and (peer.lost or stuck):
                logger.warning("%s %s", name, "is stuck in a step" if stuck else "fell silent")
                mirror.lose()
                any_lost = True
                if peer.lost:
                    # It may have been the link: what is under way on it can come seconds after it is mended.
                    self.add_node(name, mirror.address)
            if mirror.state == "lost" and not mirror.leaving:
                self._revival.lost(name)
        return any_lost

    def _back(self, name: str, address: str) -> None:
        mirror = self._mirrors.get(name)
        if mirror is not None and mirror.state == "lost" and not mirror.leaving:
            self.add_node(name, address)  # a link that was cut is made anew, also to the same address

    # ---- endpoints ---------------------------------------------------------------------------------------

    def _from_endpoint(self, peer: bytes, message: Message) -> None:
        match message:
            case Place():
                if self._any_serving:
                    self._reply(peer, self._place(peer, message))
                else:
                    self._spawn(self._place_later(peer, message))
            case Finished():
                self._scorecard.count(message)
                self._finished(message)
            case LoopEnded():
                self._scorecard.count_loop(message)
            case Watch():
                # One that has asked before is told of the nodes in turn: the answer only says that we live.
                known = peer in self._endpoints
                self._endpoints[peer] = time.monotonic()
                self._reply(peer, Alive("coordinator", 0.0) if known else self._view())
            case Query():
                self._spawn(self._answer(peer, message))
            case _:
                logger.warning("a coordinator does not take %s from an endpoint", type(message).__name__)

    def _finished(self, finished: Finished) -> None:
        now_s = time.monotonic()
        left = self._decider.finished(finished, self._mirrors, now_s)
        if finished.session is not None and finished.nodes:
            self._holdings.answered(finished.nodes[-1], now_s)
            if left in self._peers:
                self._peers[left].send(CloseSession(finished.session))

    def _view(self) -> View:
        return View(
            [
                NodeLoad(mirror.name, mirror.address, mirror.role, mirror.requests)
                for mirror in self._mirrors.values()
                if mirror.serving
            ]
        )

    def _tell_endpoints(self) -> None:
        """Nodes and roles as they are now, to every endpoint that has asked lately."""
        now_s = time.monotonic()
        view = encode(self._view())
        for peer, asked_s in list(self._endpoints.items()):
            if now_s - asked_s > ENDPOINT_FORGOTTEN_S:
                del self._endpoints[peer]
            else:
                self._router.send_multipart([peer, *view])

    async def _place_later(self, peer: bytes, message: Place) -> None:
        """No node is known yet, as in a coordinator that has just begun: wait for one, up to a bound."""
        deadline_s = time.monotonic() + 0.8 * self._place_s
        while not self._any_serving and time.monotonic() < deadline_s:
            await asyncio.sleep(TURN_S / 2)
        self._reply(peer, self._place(peer, message))

    def _place(self, peer: bytes, message: Place) -> Placed:
        began_s, cpu_s = time.perf_counter(), time.thread_time()
        try:
            links = self._links.by_name()
            placed = self._decider.place(message, peer, self._mirrors, links, time.monotonic())
            if message.class_name is not None and placed.verdict != "admitted":
                logger.info(
                    "%s (%s) %s: %s", placed.request_id, message.class_name, placed.verdict, placed.reason
                )
            return placed
        except Exception:
            # An endpoint waits for this answer: an error of ours must not look like a coordinator that is gone.
            logger.exception("placing %s", message.request_id)
            reason = "the coordinator failed to place this request; its log says why"
            return Placed(message.request_id, message.attempt, "no_capacity", reason=reason, retry_after_s=1.0)
        finally:
            took_s = time.perf_counter() - began_s, time.thread_time() - cpu_s
            self._scorecard.placing_s.append(took_s)

    def _promote(self, promotion: Promotion) -> None:
        """Tell the node first: the endpoint scores as promised what the node serves as promised."""
        request = promotion.deferred.request
        self._peers[promotion.node].send(promotion.promote)
        self._reply(promotion.deferred.endpoint, Promoted(request.request_id, request.attempt))

    def _reply(self, peer: bytes, message: Message) -> None:
        self._router.send_multipart([peer, *encode(message)])

    async def _answer(self, peer: bytes, query: Query) -> None:
        answers: dict[str, Callable[..., Coroutine[Any, Any, dict[str, Any]]]] = {
            "cluster": self._cluster,
            "ready": self._ready,
            "idle_cost": self._idle,
            "set_pools": self._set_pools,
            "set_nodes": self._set_nodes,
            "explain": self._explain,
            "session": self._session,
            "close_session": self._close_session,
        }
        if query.what not in answers:
            self._reply(peer, Answer(query.call_id, {}, f"no such question: {query.what}", 404))
            return
        try:
            self._reply(peer, Answer(query.call_id, await answers[query.what](**query.args)))
        except SlosserveError as error:
            self._reply(peer, Answer(query.call_id, {}, str(error), error.http_status))
        except Exception:
            logger.exception("answering %s", query.what)
            self._reply(peer, Answer(query.call_id, {}, "the coordinator failed; its log says why", 500))

    async def _idle(self) -> dict[str, Any]:
        return {} if self._idle_cost is None or not self.ready else msgspec.to_builtins(self._idle_cost)

    async def _explain(self, request_id: str) -> dict[str, Any]:
        explained = self._decider.explain(request_id)
        if explained is None:
            raise UnknownDecision(f"no decision on request {request_id!r} is remembered here")
        return explained

    async def _session(self, session: str) -> dict[str, Any]:
        node = self._decider.sessions.home(session)
        if node is None:
            raise UnknownSession(f"nothing is kept for a session {session!r}")
        return {"session": session, "node": node, "kept_tokens": self._decider.sessions.kept_tokens(session)}

    async def _close_session(self, session: str) -> dict[str, Any]:
        """Closed for good where nothing is kept as well: closing twice is no error."""
        node = self._decider.sessions.close(session, time.monotonic())
        if node in self._peers:
            self._peers[node].send(CloseSession(session))
        return {"session": session, "closed": True, "node": node}

    async def _ready(self) -> dict[str, Any]:
        missing = {name: mirror.state for name, mirror in self._mirrors.items() if not mirror.serving}
        if place_best_effort(self._view().nodes, one_node=False) is None or not self.ready:
            waiting = ", ".join(f"{name} is {state}" for name, state in missing.items()) or "links are measured"
            raise NotReadyError(f"not ready: {waiting}", retry_after_s=1.0)
        return {"ready": True} | ({"missing": missing} if missing else {})

    async def _cluster(self) -> dict[str, Any]:
        now_s = time.monotonic()
        reports = [mirror.report for mirror in self._mirrors.values() if mirror.report is not None]
        first = reports[0].info if reports else None
        pools = sizes(self._rebalancer.nodes())
        return {
            "engine": None if first is None else first.engine,
            "transport": None if first is None else first.transport,
            "model": self._model,
            "mode": mode_of(pools),
            "pools": pools,
            "rebalancing": self._rebalancer.state(),
            "ray": None if self._ray_head is None else self._ray_head.state(),
            "nodes": [node_state(mirror, now_s) for mirror in self._mirrors.values()],
            "idle_cost": await self._idle(),
            "links": self._links.rows(),
            "handoffs": self._scorecard.handoff_summary(),
            "attainment": self._scorecard.attainment(),
            "loops": self._scorecard.loop_summary(),
            "placements": {
                name: self._scorecard.placements[name] for name in ("pair", "one_node", "best_effort")
            },
            "placing": self._scorecard.placing_summary(),
            "outcomes": dict(self._scorecard.outcomes),
            "deferred": len(self._decider.deferred),
            "local_prefills": sum(report.local_prefills for report in reports),
            "corrupt_pulls": sum(report.corrupt_pulls for report in reports),
        }

    # ---- pools -------------------------------------------------------------------------------------------

    async def _set_pools(
        self,
        prefill: int | None = None,
        decode: int | None = None,
        mixed: int = 0,
        dry_run: bool = False,
        auto: bool | None = None,
    ) -> dict[str, Any]:
        if auto is not None:
            self._rebalancer.follow(auto)
            return {"auto": auto, "pools": sizes(self._rebalancer.nodes()), **self._rebalancer.state()}
        want = {RoleName.PREFILL: prefill or 0, RoleName.DECODE: decode or 0, RoleName.MIXED: mixed}
        return await self._rebalancer.set_sizes(want, dry_run=dry_run)

    async def _set_nodes(
        self,
        nodes: int | None = None,
        role: str | None = None,
        remove: Sequence[str] = (),
        dry_run: bool = False,
        drain_s: float = DRAIN_S,
    ) -> dict[str, Any]:
        if not self._scaling:
            raise RequestError("virtual nodes are as many as the configuration says: change its pools")
        named = None if role is None else RoleName(role)
        return await self._scaling.set_nodes(nodes, role=named, remove=remove, dry_run=dry_run, drain_s=drain_s)

    async def _set_role(self, name: str, role: RoleName) -> RoleSet:
        answer: RoleSet = await self._call(name, lambda call_id: SetRole(call_id, role))
        return answer


class NotReadyError(SlosserveError):
    """The cluster cannot serve yet."""

    http_status = 503
    retryable = True
    reason = "not_ready"


class UnknownSession(SlosserveError):
    """No node keeps anything for it: it never was, it was idle for too long, or others needed the memory."""

    http_status = 404
    reason = "unknown_session"


class UnknownDecision(SlosserveError):
    """Nobody asked for this request to be placed, or it was too long ago."""

    http_status = 404
    reason = "unknown_request"
