"""ClusterEngine: to vLLM's OpenAI front, the cluster is one engine.

The front renders, tokenises and parses; `generate` takes token ids, has them placed at once, and returns the
generator that follows the tokens. Tokens come back from nodes one message per step and are detokenised here, by
vLLM's own output processor.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import asdict, replace
from http import HTTPStatus
from typing import Any

from vllm import SamplingParams, envs
from vllm.config import VllmConfig
from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.outputs import RequestOutput
from vllm.renderers import renderer_from_config
from vllm.v1.engine import EngineCoreEvent, EngineCoreEventType, EngineCoreOutput, EngineCoreRequest
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.engine.parallel_sampling import ParentRequest
from vllm.v1.metrics.loggers import StatLoggerManager
from vllm.v1.metrics.stats import IterationStats

from coordinator.best_effort import place_best_effort
from coordinator.config import ClusterConfig
from coordinator.endpoint.context import RequestContext, current
from coordinator.endpoint.delivery import Delivery
from coordinator.endpoint.explain import record_of
from coordinator.endpoint.features import ServedBy, served_by
from coordinator.endpoint.flight import Flight, Passenger
from coordinator.endpoint.landing import finished_of, turned_away
from coordinator.endpoint.links import CoordinatorLink, NodeLinks
from coordinator.endpoint.loops import Loops, Share, ToolCallSeen
from coordinator.endpoint.metrics import EndpointMetrics
from coordinator.endpoint.responses import ResponseSessions
from coordinator.endpoint.slo import Asked, to_slo
from coordinator.endpoint.text_client import TextEngineClient
from coordinator.endpoint.thinking import Thinking
from engine.base import Output
from engine.cost import StepCost
from engine.errors import NoCapacity, RequestError, SlosserveError
from engine.messages import Declined, Delta, Finished, LoopEnded, NodeAddress, Place, Placed, Promoted
from engine.request import Slo
from engine.vllm import decode_output, encode_sampling

logger = logging.getLogger(__name__)

REMEMBERED_REQUESTS = 2048
RETRY_PAUSE_S = 0.05
RESUME_PAUSE_S = 0.5


class Journey:
    """A request: its flights (one per sequence) and where their tokens are collected.

    `share`: what it has of its tool loop, if that has a deadline; `finished`: what became of its first flight;
    `came_s`: when the first of the tokens came that the client has not been sent yet.
    """

    def __init__(
        self, context: RequestContext, collector: RequestOutputCollector, slo: Slo | None, share: Share | None
    ) -> None:
        self.context = context
        self.collector = collector
        self.slo = slo
        self.share = share
        self.flights: list[Flight] = []
        self.finished: Finished | None = None
        self.came_s: float | None = None


class ClusterEngine(TextEngineClient):
    """vLLM's EngineClient over the cluster. Everything runs in the endpoint's event loop."""

    def __init__(self, config: ClusterConfig, vllm_config: VllmConfig, coordinator: CoordinatorLink) -> None:
        self.vllm_config = vllm_config
        self.model_config = vllm_config.model_config
        self.renderer = renderer_from_config(vllm_config)
        self.input_processor = InputProcessor(vllm_config, self.renderer)
        self.timelines: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self.metrics = EndpointMetrics([*config.slo_classes, "custom", "none"])
        self._config = config
        self._coordinator = coordinator
        coordinator.on_promoted = self._on_promoted
        self._links: NodeLinks | None = None
        self._processor = OutputProcessor(self.renderer.tokenizer, log_stats=True)
        self._loggers = StatLoggerManager(vllm_config, enable_default_loggers=False)
        self._flights: dict[str, Flight] = {}
        self._journeys: dict[str, Journey] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._idle_cost = StepCost.line(0.0, 1e-9)
        self._loops = Loops()
        # Where vLLM stores no responses nobody can go on from one.
        self._responses = ResponseSessions() if envs.VLLM_ENABLE_RESPONSES_API_STORE else None
        self._max_batch_tokens = config.engine.max_batch_tokens
        self._delivery = Delivery()
        self._thinking = Thinking(self.renderer.tokenizer, config.endpoint.reasoning_parser)

    def connect(self, links: NodeLinks, idle_cost: StepCost) -> None:
        """Give it its links, and the step-time model of an idle replica, from which T0 comes."""
        self._links = links
        self._idle_cost = idle_cost

    # ---- generate ----------------------------------------------------------------------------------------

    def generate(
        self,
        prompt: Any,
        sampling_params: SamplingParams,
        request_id: str,
        *,
        prompt_text: str | None = None,
        lora_request: Any = None,
        tokenization_kwargs: dict[str, Any] | None = None,
        trace_headers: Mapping[str, str] | None = None,
        priority: int = 0,
        data_parallel_rank: int | None = None,
        session_id: str | None = None,
        kv_hints: Any = None,
        reasoning_ended: bool | None = None,
        reasoning_parser_kwargs: dict[str, Any] | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Have a request placed, and return the generator of its outputs.

        Raises VLLMValidationError (400) for what cannot be served, GracefulHTTPError (503) when too many wait.
        Whether it is admitted is known soon after: the start of the response waits for it.
        """
        context = current()
        context.session_id = context.session_id or session_id
        if self._responses is not None:
            before = context.previous_response_id
            context.session_id = self._responses.session_of(request_id, before, context.session_id)
        try:
            pairs, virtual = self._config.planner.pairs, self._config.engines == "virtual"
            way = served_by(sampling_params, pairs=pairs, virtual=virtual)
            self._check_room(sampling_params.n)
        except RequestError as error:
            raise VLLMValidationError(str(error)) from error
        except SlosserveError as error:
            context.decide(error)
            self.turned_away_at_door(context)
            raise _http_error(error) from error
        request = self.input_processor.process_inputs(
            request_id,
            prompt,
            sampling_params,
            supported_tasks=("generate",),
            lora_request=lora_request,
            tokenization_kwargs=tokenization_kwargs,
            priority=priority,
        )
        if reasoning_ended is not None:
            request.reasoning_ended = reasoning_ended
        if reasoning_parser_kwargs is not None:
            request.reasoning_parser_kwargs = reasoning_parser_kwargs
        self.input_processor.assign_request_id(request)
        journey = self._embark(context, request, prompt_text, way)
        return self._follow(journey)

    async def _follow(self, journey: Journey) -> AsyncGenerator[RequestOutput, None]:
        collector = journey.collector
        try:
            finished = False
            while not finished:
                output = collector.get_nowait() or await collector.get()
                assert isinstance(output, RequestOutput)
                finished = output.finished
                came_s, journey.came_s = journey.came_s, None
                yield output
                # Whoever streams this asks for more once it was written; what is sent whole waited for its end.
                if came_s is not None and not finished:
                    self._delivery.note(time.monotonic() - came_s)
        except SlosserveError as error:
            raise _http_error(error) from error
        finally:
            self._abandon(journey)
            collector.close()
            if journey.context.in_background:
                journey.context.end()

    def _check_room(self, sequences: int) -> None:
        bound = self._config.endpoint.max_waiting
        if len(self._flights) + sequences > bound:
            raise NoCapacity(
                f"{len(self._flights)} requests are in flight here, of {bound} at most (endpoint.max_waiting)",
                reason="endpoint_full",
                retry_after_s=1.0,
            )

    def _embark(
        self, context: RequestContext, request: EngineCoreRequest, prompt_text: str | None, way: ServedBy
    ) -> Journey:
        params = request.sampling_params
        assert params is not None
        collector = RequestOutputCollector(params.output_kind, request.request_id)
        journey = Journey(context, collector, *self._slo(context, params, request.prompt_token_ids))
        context.headers["x-slosserve-request-id"] = request.external_req_id or request.request_id
        context.on_end.append(lambda: self._abandon(journey))
        if journey.share is not None:
            context.answer = ToolCallSeen()
            context.on_end.append(lambda: self._end_call(journey))
        if params.n == 1:
            self._add_flight(journey, request, prompt_text, None, 0, way)
        else:
            parent = ParentRequest(request)
            for index in range(params.n):
                part = copy(request)
                part.request_id, part.sampling_params = parent.get_child_info(index)
                self._add_flight(journey, part, prompt_text, parent, index, way)
        self._take_off(journey)
        return journey

    def _add_flight(
        self,
        journey: Journey,
        request: EngineCoreRequest,
        prompt_text: str | None,
        parent: ParentRequest | None,
        index: int,
        way: ServedBy,
    ) -> None:
        params = request.sampling_params
        assert params is not None
        assert params.max_tokens is not None
        prompt_token_ids = request.prompt_token_ids
        if prompt_token_ids is None:
            raise VLLMValidationError("prompt embeddings are not served: send text or token ids")
        self._processor.add_request(request, prompt_text, parent, index, journey.collector)
        passenger = Passenger(
            request_id=request.request_id,
            prompt_token_ids=prompt_token_ids,
            sampling=encode_sampling(params, _reasoning_of(request)),
            max_tokens=params.max_tokens,
            slo=journey.slo,
            one_node=way is ServedBy.ONE_NODE,
            cache_salt=request.cache_salt,
            arrived_s=journey.context.arrived_s,
            session=journey.context.session_id if index == 0 else None,  # one of several goes on
            delivery_s=self._delivery.seconds,
        )
        assert self._links is not None
        flight = Flight(passenger, self._links.send, self._config.transfer.pull_deadline_s, self._fail)
        flight.on_retry = self._retry
        flight.think_end_id = self._thinking.end_id
        journey.flights.append(flight)
        self._flights[request.request_id] = flight
        self._journeys[request.request_id] = journey

    def _slo(
        self, context: RequestContext, params: SamplingParams, prompt_token_ids: Sequence[int] | None
    ) -> tuple[Slo | None, Share | None]:
        """What is asked for this call, and its part of a loop that has a deadline."""
        asked = context.asked = self._asked(context)
        classes = self._config.slo_classes
        prompt_tokens = len(prompt_token_ids or ())
        slo = to_slo(asked, classes, prompt_tokens, self._idle_cost, self._max_batch_tokens)
        if slo is not None and self._thinking.is_over(prompt_token_ids or ()):
            slo = replace(slo, thinking_tpot_s=None)
        session = context.session_id
        if slo is None or session is None:
            return slo, None
        share = self._loops.begin_call(
            session,
            slo.class_name,
            None if asked.loop_ms is None else asked.loop_ms / 1e3,
            asked.loop_calls,
            context.arrived_s,
            last=asked.last,
        )
        return slo if share is None else self._loops.within(slo, share, params.max_tokens or 1), share

    def _asked(self, context: RequestContext) -> Asked:
        """What is asked for, now that the session is known: a call that says nothing is one of its loop."""
        asked, wrong = context.asked, None
        loop_class = self._loops.class_of(context.session_id, context.arrived_s)
        if asked.loop_ms is not None and context.session_id is None:
            wrong = "loop_ms is of the calls of a session: send x-session-id with each of them"
        elif asked.empty and asked.malformed is None and loop_class is not None:
            asked = replace(asked, class_name=loop_class)
        elif asked.empty and asked.refuse:
            wrong = "on_miss is of an SLO, and none is asked for: give a class, ttft_ms, tpot_ms or loop_ms"
        if wrong is not None:
            context.headers["x-slosserve-slo"] = f"malformed, served best effort: {wrong}"
            asked = Asked(malformed=wrong)
        return asked

    def _end_call(self, journey: Journey) -> None:
        """The response is over: was that the last call of its loop, and was the loop in time?"""
        context, finished = journey.context, journey.finished
        if context.session_id is None or context.answer is None:
            return
        end = self._loops.end_call(
            context.session_id,
            time.monotonic(),
            0 if finished is None else finished.output_tokens,
            last=not context.answer.seen if context.asked.call is None else context.asked.last,
            told=context.asked.call is not None,
            completed=finished is not None and finished.outcome == "completed",
        )
        if end is not None:
            self.metrics.count_loop(end)
            self._coordinator.send(LoopEnded(end.class_name, end.calls, end.seconds, end.met))
            record = self.timelines.get(_public_id(journey, journey.flights[0]))
            if record is not None:
                record["loop"] |= {**asdict(end), "met": end.met}

    # ---- placing -----------------------------------------------------------------------------------------

    def _take_off(self, journey: Journey) -> None:
        """Place all sequences of a request together.

        A promise is the coordinator's to make, and it knows where the history of a session is. All else is
        placed from its last view of the nodes: a node declines what it cannot take, and then it is asked.
        """
        flights = journey.flights
        questions = [flight.question() for flight in flights]
        siblings = [other.request_id for other in questions[1:]]
        question = replace(questions[0], sequences=len(flights), siblings=siblings)
        alone = question.class_name is None and question.session is None
        view = self._coordinator.fresh_view() if alone else None
        way = None if view is None else place_best_effort(view.nodes, one_node=question.one_node)
        if way is None:
            self._spawn(self._ask_and_depart(journey, question))
            return
        prefill, decode = way
        for node in (prefill, decode):
            if node is not None:
                self._coordinator.count(node, len(flights))
        placed = Placed(
            question.request_id,
            question.attempt,
            "best_effort",
            prefill=None if prefill is None else NodeAddress(prefill.node, prefill.address),
            decode=NodeAddress(decode.node, decode.address),
            reason="it carries no SLO",
        )
        self._depart(journey, placed)

    async def _ask_and_depart(self, journey: Journey, question: Place) -> None:
        try:
            self._depart(journey, await self._coordinator.place(question))
        except SlosserveError as error:
            journey.context.decide(error)
            for flight in journey.flights:
                self._fail(flight, error)
        finally:
            journey.context.decide()

    def _depart(self, journey: Journey, placed: Placed) -> None:
        for flight in journey.flights:
            if not flight.over:
                flight.depart(placed)
        self._tell_placement(journey, placed)
        journey.context.decide()

    def _tell_placement(self, journey: Journey, placed: Placed) -> None:
        names = [node.node for node in (placed.prefill, placed.decode) if node is not None]
        journey.context.headers["x-slosserve-placement"] = ">".join(names)
        journey.context.headers["x-slosserve-verdict"] = placed.verdict

    def _retry(self, flight: Flight) -> None:
        self.metrics.retries.inc()
        self._spawn(self._place_again(flight))

    async def _place_again(self, flight: Flight) -> None:
        began_s = time.monotonic()
        await asyncio.sleep(0.0 if flight.resumed else RETRY_PAUSE_S * flight.attempt)
        while not flight.over:
            try:
                placed = await self._coordinator.place(flight.question())
                if not flight.over:
                    flight.depart(placed)
                    self._tell_placement(self._journeys[flight.passenger.request_id], placed)
                return
            except NoCapacity as error:
                # A new request is told so at once; a client in the middle of an answer would rather wait.
                waited_s = time.monotonic() - began_s
                if not flight.resumed or waited_s > self._config.timeouts.resume_s:
                    self._fail(flight, error)
                    return
                await asyncio.sleep(RESUME_PAUSE_S)
            except SlosserveError as error:
                self._fail(flight, error)
                return

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ---- what nodes say (NodeEvents) ---------------------------------------------------------------------

    def on_deltas(self, node: str, items: list[Delta]) -> None:
        """One step's tokens of one node, for all requests of this endpoint."""
        now_s = time.monotonic()
        outputs: list[EngineCoreOutput] = []
        landed: list[Flight] = []
        for delta in items:
            flight = self._flights.get(delta.request_id)
            said = None if flight is None else self._take(flight, delta)
            if flight is None or said is None:
                continue
            outputs.append(_core_output(said, flight, now_s))
            journey = self._journeys[delta.request_id]
            journey.came_s = now_s if journey.came_s is None else journey.came_s
            if said.finish_reason is not None:
                landed.append(flight)
        if not outputs:
            return
        stats = IterationStats()
        processed = self._processor.process_outputs(outputs, now_s, stats)
        self._loggers.record(None, stats)
        for request_id in processed.reqs_to_abort:  # a stop string: the node does not know of it
            stopped = self._flights.get(request_id)
            if stopped is not None:
                stopped.ended_itself = True
                stopped.abort(ended=True)
                landed.append(stopped)
        for flight in landed:
            self._land(flight, "completed")

    def _take(self, flight: Flight, delta: Delta) -> Delta | None:
        try:
            return flight.take(delta)
        except Exception as error:
            logger.exception("a delta of %s", delta.request_id)
            self._fail(flight, SlosserveError(f"the endpoint failed on an output: {error}"))
            return None

    def on_declined(self, node: str, declined: Declined) -> None:
        """A node will not do it."""
        flight = self._flights.get(declined.request_id)
        if flight is not None:
            flight.declined(node, declined)

    def on_lost(self, node: NodeAddress) -> None:
        """A node fell silent, or began anew."""
        logger.warning("%s stopped answering", node.node)
        for flight in list(self._flights.values()):
            flight.lost(node)

    def _on_promoted(self, promoted: Promoted) -> None:
        """The coordinator promises a deferred request after all."""
        flight = self._flights.get(promoted.request_id)
        if flight is not None:
            flight.promoted(promoted.attempt)
            headers = self._journeys[promoted.request_id].context.headers
            headers["x-slosserve-verdict"] = flight.timeline.verdict

    # ---- endings -----------------------------------------------------------------------------------------

    def _fail(self, flight: Flight, error: SlosserveError) -> None:
        if flight.over and flight.passenger.request_id not in self._flights:
            return
        flight.timeline.events.append(f"failed: {error}")
        flight.abort()
        journey = self._journeys.get(flight.passenger.request_id)
        self._land(flight, "refused" if error.http_status == HTTPStatus.TOO_MANY_REQUESTS else "failed")
        if journey is not None:
            if not flight.token_times_s:
                journey.context.decide(error)  # nothing was said yet: the error has a status of its own
            self._processor.abort_requests([flight.passenger.request_id], internal=True)
            journey.collector.put(error)

    def _abandon(self, journey: Journey) -> None:
        """The response is over. Whatever still runs for it is freed on every node."""
        for flight in journey.flights:
            if flight.passenger.request_id in self._flights:
                flight.abort()
                self._land(flight, "cancelled")
                self._processor.abort_requests([flight.passenger.request_id], internal=True)
        self._processor.abort_requests([journey.collector.request_id], internal=True)  # the parent of several

    def _land(self, flight: Flight, outcome: str) -> None:
        """A flight is over, for whatever reason: score it, count it, tell the coordinator. Once per flight."""
        if self._flights.pop(flight.passenger.request_id, None) is None:
            return
        journey = self._journeys.pop(flight.passenger.request_id)
        finished = finished_of(flight, outcome)
        if flight is journey.flights[0]:
            journey.finished = finished
        self._coordinator.send(finished)
        self.metrics.count(finished, finished.verdict)
        for gap_s in flight.gaps_s:
            self.metrics.gaps.observe(gap_s)
        self._remember(journey, flight, finished)

    def turned_away_at_door(self, context: RequestContext) -> None:
        """Count a request that was refused before it became one."""
        finished = turned_away(context.asked)
        self._coordinator.send(finished)
        self.metrics.count(finished, finished.verdict)

    def _remember(self, journey: Journey, flight: Flight, finished: Finished) -> None:
        public_id = _public_id(journey, flight)
        session_id = journey.context.session_id
        self.timelines[public_id] = record_of(public_id, session_id, flight, finished, journey.share)
        while len(self.timelines) > REMEMBERED_REQUESTS:
            self.timelines.popitem(last=False)

    def record(self, public_id: str) -> dict[str, Any] | None:
        """What is known of a request by the id that its client was told, running or over."""
        for journey in self._journeys.values():
            if journey.context.headers.get("x-slosserve-request-id") == public_id:
                return record_of(public_id, journey.context.session_id, journey.flights[0], None, journey.share)
        return self.timelines.get(public_id)

    # ---- the rest of vLLM's contract ---------------------------------------------------------------------

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """Abort by the id that the client knows."""
        wanted = {request_id} if isinstance(request_id, str) else set(request_id)
        for journey in list(self._journeys.values()):
            if journey.context.headers.get("x-slosserve-request-id") in wanted:
                self._abandon(journey)

    def check_admission(self, n: int = 1, request_id: str | None = None) -> None:
        """Too many in flight here? Raises GracefulHTTPError (503)."""
        try:
            self._check_room(n)
        except SlosserveError as error:
            current().decide(error)
            self.turned_away_at_door(current())
            raise _http_error(error) from error

    def close_session(self, session: str) -> None:
        """Its loop, if it has one, is given up: it is neither kept nor missed."""
        self._loops.close(session)

    def shutdown(self, timeout: float | None = None) -> None:
        """Let go of the nodes; they drop what this endpoint had asked for."""
        if self._links is not None:
            self._links.close()


def _public_id(journey: Journey, flight: Flight) -> str:
    return journey.context.headers.get("x-slosserve-request-id", flight.passenger.request_id)


def _core_output(delta: Delta, flight: Flight, now_s: float) -> EngineCoreOutput:
    if delta.finish_reason is None and delta.payload is None and delta.timing is None:
        return EngineCoreOutput(delta.request_id, delta.token_ids)  # one per token: the hot path
    output = decode_output(
        Output(
            work_id=delta.request_id,
            token_ids=delta.token_ids,
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
            payload=delta.payload,
            cached_tokens=delta.cached_tokens if delta.index == 0 else None,
        ),
        delta.request_id,
    )
    if output.prefill_stats is not None:  # vLLM counts prompt tokens by it
        prompt_tokens = len(flight.passenger.prompt_token_ids)
        output.prefill_stats.set(prompt_tokens, min(output.prefill_stats.num_cached_tokens, prompt_tokens), 0)
    if delta.timing is not None and delta.index == 0:
        # vLLM's queue and prefill metrics read these events; all on this process's clock.
        batched_s = now_s - (delta.timing.first_token_s - delta.timing.queued_s)
        output.events = [
            EngineCoreEvent(EngineCoreEventType.QUEUED, flight.passenger.arrived_s),
            EngineCoreEvent(EngineCoreEventType.SCHEDULED, batched_s),
        ]
    return output


def _http_error(error: SlosserveError) -> GracefulHTTPError:
    return GracefulHTTPError(str(error), HTTPStatus(error.http_status))


def _reasoning_of(request: EngineCoreRequest) -> dict[str, Any]:
    """What vLLM's front knows of the thinking of a request, where it knows anything."""
    names = ("reasoning_ended", "reasoning_parser_kwargs")
    return {name: value for name in names if (value := getattr(request, name)) is not None}
