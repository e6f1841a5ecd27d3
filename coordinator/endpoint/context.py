"""What the endpoint knows of a request that vLLM's front does not pass on, and the response it will get.

An ASGI middleware reads headers and the `slo` of the body, keeps them in a context variable for
`ClusterEngine.generate`, and holds back the start of the response until the request has been placed. So a
refusal has its status and Retry-After even when the client asked for a stream.
"""

from __future__ import annotations

import asyncio
import contextvars
import hmac
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coordinator.config import SloClass
from coordinator.endpoint.loops import ToolCallSeen
from coordinator.endpoint.slo import HEADER_FIELDS, XARGS_FIELDS, Asked, read_asked
from engine.errors import NoCapacity, SlosserveError, Unauthorized

GENERATE_PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/invocations",
    "/generative_scoring",
)
SESSION_HEADERS = (b"x-session-id", b"session-id", b"x-session-affinity", b"x-claude-code-session-id")
MOST_SESSION_ID = 256  # characters; what is longer is cut
# Of the requests that may be in flight: best effort takes no more, and keeps out nobody who asks for a promise.
BEST_EFFORT_SHARE = 0.75
NO_KEY = "this endpoint serves those who give its key: Authorization: Bearer KEY (endpoint.api_key)"
MAX_PEEK_BYTES = 64 * 1024 * 1024
PEEKED = (  # names of what is looked for in a body
    b'"slo',
    b'"session_id"',
    b'"previous_response_id"',
    b'"background"',
)
ERROR_TYPES = {  # as OpenAI calls them
    400: "invalid_request_error",
    401: "authentication_error",
    429: "rate_limit_error",
    503: "service_unavailable",
}

_current: contextvars.ContextVar[RequestContext | None] = contextvars.ContextVar("request", default=None)


@dataclass(slots=True)
class RequestContext:
    """One HTTP request. `arrived_s` is this process's clock; `headers` go out with the response."""

    arrived_s: float
    asked: Asked
    session_id: str | None = None
    previous_response_id: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    error: SlosserveError | None = None
    decided: asyncio.Event = field(default_factory=asyncio.Event)
    on_end: list[Callable[[], None]] = field(default_factory=list)
    answer: ToolCallSeen | None = None  # where it matters whether the answer calls a tool
    in_background: bool = False  # the response says only that it was taken; the work goes on after it

    def decide(self, error: SlosserveError | None = None) -> None:
        """The request was placed, or refused with `error`: the response may start. The first error stands."""
        self.error = self.error or error
        self.decided.set()

    def end(self) -> None:
        """The response is over, or the client is gone: what still runs for it is dropped.

        A generator that was never started is not told that it is closed, so this is the only sure place.
        """
        drops, self.on_end = self.on_end, []
        for drop in drops:
            drop()


def current() -> RequestContext:
    """The context of the request being handled; one without an SLO outside of any request."""
    return _current.get() or RequestContext(time.monotonic(), Asked())


class RequestContextMiddleware:
    """Makes the context, and puts refusals and headers into the response.

    Where there is an `api_key`, a request without it gets a 401 on every path that generates: vLLM's front asks
    for it below /v1 alone. One that comes while `most_open` are being answered is turned away before anybody
    looks into its body: under a flood that alone would hold up the tokens of those. The last of that room is
    for requests that ask for a promise, or belong to a session that may have one. `turned_away` is told of who
    does not get in.
    """

    def __init__(
        self,
        app: ASGIApp,
        classes: Mapping[str, SloClass],
        api_key: str | None = None,
        most_open: int | None = None,
        turned_away: Callable[[RequestContext], None] = lambda context: None,
    ) -> None:
        self._app = app
        self._classes = classes
        self._most_open = most_open
        self._turned_away = turned_away
        self._open = 0
        self._api_key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        generates = scope["type"] == "http" and scope["path"].startswith(GENERATE_PATHS)
        if not generates or scope["method"] == "OPTIONS":
            await self._app(scope, receive, send)
            return
        arrived_s = time.monotonic()
        if not self._admits(scope):
            await _skip_body(receive)
            await send_refusal(Unauthorized(NO_KEY), RequestContext(arrived_s, Asked()), send)
            return
        if self._most_open is not None and self._open >= self._most_open:
            await _skip_body(receive)
            full = f"{self._open} requests are in flight here, of {self._most_open} (endpoint.max_waiting)"
            await self._turn_away(full, RequestContext(arrived_s, self._asked(scope, {})), send)
            return
        self._open += 1
        try:
            await self._answer(arrived_s, scope, receive, send)
        finally:
            self._open -= 1

    async def _turn_away(self, why: str, context: RequestContext, send: Send) -> None:
        self._turned_away(context)
        await send_refusal(NoCapacity(why, reason="endpoint_full", retry_after_s=1.0), context, send)

    async def _answer(self, arrived_s: float, scope: Scope, receive: Receive, send: Send) -> None:
        messages, body = await _read_body(receive)
        said = _peek(body)
        session_id = _session_id(scope) or _text(said, "session_id") or _text(_xargs(said), "session_id")
        previous = _text(said, "previous_response_id")
        context = RequestContext(arrived_s, self._asked(scope, said), session_id, previous)
        context.in_background = scope["path"].startswith("/v1/responses") and said.get("background") is True
        if scope["method"] != "POST":
            context.decide()  # it asks for what was said before, and has nothing placed
        if context.asked.malformed:
            context.headers["x-slosserve-slo"] = f"malformed, served best effort: {context.asked.malformed}"
        if context.asked.empty and session_id is None and previous is None and self._spare_room_is_full:
            full = (
                f"{self._open} requests are in flight here, and the last of {self._most_open} "
                "(endpoint.max_waiting) are for those that ask for an SLO: ask for one, or try again later"
            )
            await self._turn_away(full, context, send)
            return
        token = _current.set(context)
        try:
            await self._app(scope, _replay(messages, receive), _Response(context, send))
        finally:
            _current.reset(token)
            if not context.in_background:
                context.end()

    @property
    def _spare_room_is_full(self) -> bool:
        return self._most_open is not None and self._open > math.ceil(BEST_EFFORT_SHARE * self._most_open)

    def _admits(self, scope: Scope) -> bool:
        scheme, _, key = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        is_right = self._api_key is not None and hmac.compare_digest(key, self._api_key)
        return self._api_key is None or (scheme.lower() == b"bearer" and is_right)

    def _asked(self, scope: Scope, said: Mapping[str, Any]) -> Asked:
        """What headers, the `slo` of the body and its `vllm_xargs` ask for together; the former go first."""
        slo = said.get("slo")
        if slo is not None and not isinstance(slo, dict):
            return Asked(malformed=f"slo must be an object, not {type(slo).__name__}")
        xargs = _xargs(said).items()
        fields = {XARGS_FIELDS.get(name, name): value for name, value in xargs if name.startswith("slo_")}
        fields.update(slo or {})
        for name, value in scope["headers"]:
            if name in HEADER_FIELDS:
                fields[HEADER_FIELDS[name]] = value.decode("latin-1")
        return read_asked(fields, self._classes)


def _peek(body: bytes) -> Mapping[str, Any]:
    """The body as JSON, if anything in it may matter here. Of what is no JSON the front says so itself."""
    if not any(name in body for name in PEEKED):
        return {}
    try:
        said = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}


def _xargs(said: Mapping[str, Any]) -> Mapping[str, Any]:
    xargs = said.get("vllm_xargs")
    return xargs if isinstance(xargs, dict) else {}


def _text(said: Mapping[str, Any], name: str) -> str | None:
    value = said.get(name)
    return value[:MOST_SESSION_ID] if isinstance(value, str) and value else None


def _session_id(scope: Scope) -> str | None:
    for name, value in scope["headers"]:
        if name in SESSION_HEADERS:
            return str(value.decode("latin-1"))[:MOST_SESSION_ID]
    return None


async def _read_body(receive: Receive) -> tuple[list[Message], bytes]:
    messages: list[Message] = []
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        messages.append(message)
        part = message.get("body", b"")
        size += len(part)
        parts.append(part)
        if message["type"] != "http.request" or not message.get("more_body") or size > MAX_PEEK_BYTES:
            return messages, b"".join(parts)


async def _skip_body(receive: Receive) -> None:
    """To its end: a client that is answered while it still sends may see no answer but a broken connection."""
    while True:
        message = await receive()
        if message["type"] != "http.request" or not message.get("more_body"):
            return


def _replay(messages: list[Message], receive: Receive) -> Receive:
    left = list(messages)

    async def replayed() -> Message:
        return left.pop(0) if left else await receive()

    return replayed


class _Response:
    """Keeps a streamed response back until the request is decided, then adds headers, or becomes the refusal.

    Messages are kept, never waited for: some of vLLM's routes ask for generation only once their own first
    event is out, so a response that waited here for the decision would wait for ever.
    """

    def __init__(self, context: RequestContext, send: Send) -> None:
        self._context = context
        self._send = send
        self._kept: list[Message] = []
        self._started = False
        self._refused = False

    async def __call__(self, message: Message) -> None:
        if self._refused:
            return
        if self._started:
            await self._pass_on(message)
            return
        self._kept.append(message)
        start = self._kept[0]
        is_last = message["type"] == "http.response.body" and not message.get("more_body")
        undecided = start["status"] == 200 and _is_stream(start) and not self._context.decided.is_set()
        if undecided and not is_last:
            return
        if message is start and self._context.error is None and _is_stream(start):
            return  # decided, but the first token may still fail: its error has a status of its own
        if self._context.error is not None:
            self._refused = True
            await send_refusal(self._context.error, self._context, self._send)
            return
        self._started = True
        start["headers"] = [*start.get("headers", ()), *_extra_headers(self._context)]
        for kept in self._kept:
            await self._pass_on(kept)

    async def _pass_on(self, message: Message) -> None:
        if self._context.answer is not None:
            self._context.answer.read(message.get("body", b""))
        await self._send(message)


def _extra_headers(context: RequestContext) -> list[tuple[bytes, bytes]]:
    return [
        (name.encode("latin-1"), value.encode("latin-1", "replace")) for name, value in context.headers.items()
    ]


async def send_refusal(error: SlosserveError, context: RequestContext, send: Send) -> None:
    """An error as a whole response: its status, its reason, and when to come back."""
    body = json.dumps(error_body(error)).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"x-slosserve-reason", error.reason.encode()),
        *_extra_headers(context),
    ]
    if error.retry_after_s is not None:
        headers.append((b"retry-after", str(max(1, round(error.retry_after_s))).encode()))
    await send({"type": "http.response.start", "status": error.http_status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _is_stream(message: Message) -> bool:
    return any(
        name.lower() == b"content-type" and value.startswith(b"text/event-stream")
        for name, value in message.get("headers", ())
    )


def error_body(error: SlosserveError) -> dict[str, Any]:
    """An error as OpenAI's clients expect it."""
    kind = ERROR_TYPES.get(error.http_status, "server_error")
    return {"error": {"message": str(error), "type": kind, "code": error.reason, "param": None}}
