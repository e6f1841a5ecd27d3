"""Routes beside vLLM's own: the cluster's state, pool sizes, readiness, and what happened to a request."""

from __future__ import annotations

import hmac
from typing import Annotated, Any

from fastapi import APIRouter, Body, FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator

from coordinator.endpoint.context import MOST_SESSION_ID, error_body
from coordinator.endpoint.engine import REMEMBERED_REQUESTS, ClusterEngine
from coordinator.endpoint.explain import explain as explained
from coordinator.endpoint.links import AnswerError, CoordinatorLink
from engine.errors import SlosserveError
from engine.request import RoleName

router = APIRouter()
MOST_NODES = 10_000
# Of vLLM's server, and nothing here serves them: they would answer with an error of the server's.
NOT_SERVED = {"/v1/systemone", "/scale_elastic_ep", "/is_scaling_elastic_ep", "/kv_event_sources"}


class PoolSizes(BaseModel):
    """Wanted pool sizes, which must add up to the nodes there are; or `auto`: whether they follow the load."""

    model_config = ConfigDict(extra="forbid")

    prefill: Annotated[int | None, Field(ge=0)] = None
    decode: Annotated[int | None, Field(ge=0)] = None
    mixed: Annotated[int, Field(ge=0)] = 0
    dry_run: bool = False
    auto: bool | None = None

    @model_validator(mode="after")
    def _sizes_or_auto(self) -> PoolSizes:
        given = self.prefill is not None and self.decode is not None
        if given == (self.auto is not None) or (self.auto is not None and (self.mixed or self.dry_run)):
            raise ValueError("give either prefill and decode (and mixed, dry_run), or auto alone")
        return self


class NodeCount(BaseModel):
    """How many nodes there are to be, or the names of those that leave. `role`: of those that come or leave,
    else pools keep their shares.

    `drain_s`: what a leaving node still serves after so long goes on elsewhere.
    """

    model_config = ConfigDict(extra="forbid")

    nodes: Annotated[int | None, Field(ge=1, le=MOST_NODES)] = None
    role: RoleName | None = None
    remove: list[str] = Field(default_factory=list)
    dry_run: bool = False
    drain_s: Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)] = 600.0

    @model_validator(mode="after")
    def _count_or_names(self) -> NodeCount:
        if (self.nodes is None) != bool(self.remove) or (self.remove and self.role is not None):
            raise ValueError("give either nodes (and role), or the names of those to remove")
        return self


def add_routes(
    app: FastAPI, engine: ClusterEngine, coordinator: CoordinatorLink, admin_key: str | None
) -> None:
    """Put the routes into vLLM's application, and take out those that no node here serves."""
    app.router.routes[:] = [one for one in app.router.routes if getattr(one, "path", "") not in NOT_SERVED]
    app.state.cluster_engine = engine
    app.state.coordinator = coordinator
    app.state.admin_key = admin_key
    app.include_router(router)


@router.get("/cluster")
async def cluster(request: Request) -> JSONResponse:
    """Nodes with the roles that they themselves report, links, load, promises kept."""
    return await _answer(request, "cluster")


@router.get("/health/ready")
async def ready(request: Request) -> JSONResponse:
    """200 when a request could be served now; else 503 with what is missing."""
    return await _answer(request, "ready")


@router.post("/cluster/pools")
async def set_pools(request: Request, pools: Annotated[PoolSizes, Body()]) -> JSONResponse:
    """Change pool sizes; roles are read back from the nodes. Needs the admin key where one is configured."""
    return _without_key(request) or await _answer(request, "set_pools", **pools.model_dump())


@router.post("/cluster/nodes")
async def set_nodes(request: Request, nodes: Annotated[NodeCount, Body()]) -> JSONResponse:
    """Add nodes, or let some leave once they have nothing left. Answers at once; `/cluster` shows the rest.

    Needs the admin key where one is configured.
    """
    return _without_key(request) or await _answer(request, "set_nodes", **nodes.model_dump(mode="json"))


@router.get("/requests/{request_id}")
async def timeline(request: Request, request_id: str) -> JSONResponse:
    """What happened to a request of this endpoint: when it was placed, where, and where its time went."""
    engine: ClusterEngine = request.app.state.cluster_engine
    found = engine.record(request_id)
    return _unknown(request_id) if found is None else JSONResponse(found)


@router.get("/explain/{request_id}")
async def explain_request(request: Request, request_id: str) -> JSONResponse:
    """Why a request was slow, or deferred, or placed where it was: in words, and with all that they rest on.

    Of every candidate there is the problem that the planner was given: an instance in it can be replayed, save
    it to a file and run `slosserve plan --instance FILE`. The coordinator forgets decisions before the endpoint
    forgets requests; `candidates` is empty then.
    """
    engine: ClusterEngine = request.app.state.cluster_engine
    record = engine.record(request_id)
    if record is None:
        return _unknown(request_id)
    coordinator: CoordinatorLink = request.app.state.coordinator
    try:
        decision = await coordinator.query("explain", request_id=record["internal_id"])
    except SlosserveError:
        decision = None  # it carried no SLO, or was decided on too long ago, or nobody is there to ask
    return JSONResponse(explained(record, decision))


@router.get("/v1/sessions/{session_id:path}")
async def session(request: Request, session_id: str) -> JSONResponse:
    """Which node keeps the history of a session, and how much of it. 404 where nothing is kept."""
    return await _answer(request, "session", session=session_id[:MOST_SESSION_ID])


@router.delete("/v1/sessions/{session_id:path}")
async def close_session(request: Request, session_id: str) -> JSONResponse:
    """Nobody will call again: the memory that is kept for the session goes to others."""
    engine: ClusterEngine = request.app.state.cluster_engine
    engine.close_session(session_id[:MOST_SESSION_ID])
    return await _answer(request, "close_session", session=session_id[:MOST_SESSION_ID])


def _without_key(request: Request) -> JSONResponse | None:
    """The refusal of a call that needs the admin key and has none; None if it may go on."""
    admin_key = request.app.state.admin_key
    given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
    if not admin_key or hmac.compare_digest(given.encode(), admin_key.encode()):
        return None
    message = "this call needs the admin key: Authorization: Bearer KEY"
    return JSONResponse({"error": {"message": message, "code": "admin_key"}}, status_code=401)


def _unknown(request_id: str) -> JSONResponse:
    message = (
        f"no request {request_id!r} is remembered here: the last {REMEMBERED_REQUESTS} that ended are. Take the"
        " id from the response header x-slosserve-request-id; of several endpoints ask the one that answered"
    )
    return JSONResponse({"error": {"message": message, "code": "unknown_request"}}, status_code=404)


async def _answer(request: Request, what: str, **args: Any) -> JSONResponse:
    coordinator: CoordinatorLink = request.app.state.coordinator
    try:
        return JSONResponse(await coordinator.query(what, **args))
    except AnswerError as error:
        return JSONResponse({"error": {"message": str(error), "code": "coordinator"}}, status_code=error.status)
    except SlosserveError as error:
        return JSONResponse(error_body(error), status_code=error.http_status)
