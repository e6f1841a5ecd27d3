"""The middleware: a refusal keeps its status though the client asked for a stream, and no order of events
makes a response wait for ever."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from coordinator.config import SloClass
from coordinator.endpoint.context import GENERATE_PATHS, RequestContext, RequestContextMiddleware, current
from engine.errors import Refused

CLASSES = {"chatbot": SloClass()}
POST = {"type": "http", "method": "POST", "path": "/v1/completions"}
START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"text/event-stream; charset=utf-8")],
}


def _body(text: bytes, *, more: bool) -> dict[str, Any]:
    return {"type": "http.response.body", "body": text, "more_body": more}


async def _serve(
    app: Any,
    body: bytes = b"{}",
    headers: list[tuple[bytes, bytes]] | None = None,
    api_key: str | None = None,
    path: str = "/v1/completions",
    front: RequestContextMiddleware | None = None,
) -> list[Any]:
    sent: list[Any] = []
    asked = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        return asked.pop(0) if asked else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = POST | {"path": path, "headers": headers or []}
    await (front or RequestContextMiddleware(app, CLASSES, api_key))(scope, receive, send)
    return sent


async def test_a_stream_gets_the_headers_of_its_placement() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(START | {"headers": list(START["headers"])})
        current().headers["x-slosserve-placement"] = "p>d"
        current().decide()
        await send(_body(b"data: 1\n\n", more=True))
        await send(_body(b"", more=False))

    start, first, last = await _serve(app)
    assert (b"x-slosserve-placement", b"p>d") in start["headers"]
    assert first["body"] == b"data: 1\n\n"
    assert not last["more_body"]


async def test_a_refused_stream_becomes_a_429_with_retry_after() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(START | {"headers": list(START["headers"])})
        current().decide(Refused("late by 1 s", retry_after_s=3.4))
        await send(_body(b'data: {"error": 1}\n\n', more=True))
        await send(_body(b"", more=False))

    start, body = await _serve(app)
    assert start["status"] == 429
    assert (b"retry-after", b"3") in start["headers"]
    assert json.loads(body["body"])["error"]["code"] == "slo_unattainable"


async def test_best_effort_leaves_room_for_those_who_ask_for_a_promise() -> None:
    going, inside = asyncio.Event(), []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        inside.append(current().asked.empty)
        await going.wait()
        current().decide()
        await send(START | {"headers": []})
        await send(_body(b"{}", more=False))

    front = RequestContextMiddleware(app, CLASSES, None, 4)

    async def request(body: bytes = b"{}", headers: tuple[tuple[bytes, bytes], ...] = ()) -> list[Any]:
        sent: list[Any] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        await front(POST | {"headers": list(headers)}, receive, send)
        return sent

    first = [asyncio.create_task(request()) for _ in range(3)]
    await asyncio.sleep(0)
    start, body = await request()
    assert start["status"] == 503
    assert "for those that ask for an SLO" in json.loads(body["body"])["error"]["message"]
    promised = asyncio.create_task(request(b'{"slo": {"ttft_ms": 500}}'))
    await asyncio.sleep(0)
    assert inside == [True, True, True, False]
    going.set()
    assert [(await one)[0]["status"] for one in [*first, promised]] == [200] * 4
    assert (await request(headers=((b"x-session-id", b"s"),)))[0]["status"] == 200


@pytest.mark.parametrize(
    "body",
    [
        b'{"session_id": "s"}',
        b'{"vllm_xargs": {"session_id": "s"}}',
        b'{"previous_response_id": "resp_1"}',
        b'{"vllm_xargs": {"slo_tpot_ms": 50}}',
    ],
)
async def test_a_session_or_an_slo_keeps_its_room_wherever_it_is_said(body: bytes) -> None:
    going = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await going.wait()
        current().decide()
        await send(START | {"headers": []})
        await send(_body(b"{}", more=False))

    front = RequestContextMiddleware(app, CLASSES, None, 4)
    alone = [asyncio.create_task(_serve(app, front=front)) for _ in range(3)]
    await asyncio.sleep(0)
    asked = asyncio.create_task(_serve(app, body, front=front))
    await asyncio.sleep(0)
    going.set()
    assert [(await one)[0]["status"] for one in [*alone, asked]] == [200] * 4


async def test_a_flood_is_turned_away_unread_and_counted_by_what_its_headers_ask() -> None:
    going, away = asyncio.Event(), []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await going.wait()
        await send(START | {"headers": []})
        await send(_body(b"{}", more=False))

    front = RequestContextMiddleware(app, CLASSES, None, 2, away.append)

    async def request(headers: list[tuple[bytes, bytes]]) -> list[Any]:
        sent: list[Any] = []
        parts = [b'{"slo": ', b'{"ttft_ms": 5}}']

        async def receive() -> Any:
            assert not sent, "answered while the client still sent"
            body = parts.pop(0)
            return {"type": "http.request", "body": body, "more_body": bool(parts)}

        async def send(message: Any) -> None:
            sent.append(message)

        await front(POST | {"headers": headers}, receive, send)
        return sent

    first = [asyncio.create_task(request([])) for _ in range(2)]
    await asyncio.sleep(0)
    start, body = await request([(b"x-llm-d-slo-ttft-ms", b"100")])
    assert start["status"] == 503
    assert (b"retry-after", b"1") in start["headers"]
    assert json.loads(body["body"])["error"]["code"] == "endpoint_full"
    assert [context.asked.empty for context in away] == [False]
    going.set()
    assert [(await one)[0]["status"] for one in first] == [200, 200]
    assert (await request([]))[0]["status"] == 200, "those that are over make room"


async def test_a_route_that_speaks_before_it_asks_is_not_waited_for() -> None:
    """vLLM's /v1/responses sends its first event before it calls generate()."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(START | {"headers": list(START["headers"])})
        await send(_body(b"event: created\n\n", more=True))
        current().decide()
        await send(_body(b"event: delta\n\n", more=True))
        await send(_body(b"", more=False))

    sent = await _serve(app)
    assert [message["body"] for message in sent[1:]] == [b"event: created\n\n", b"event: delta\n\n", b""]


async def test_a_plain_error_of_the_front_passes_as_it_is() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 400, "headers": []})
        await send(_body(b"no", more=False))

    start, body = await _serve(app)
    assert start["status"] == 400
    assert body["body"] == b"no"


async def test_what_runs_for_a_client_that_is_gone_is_dropped() -> None:
    dropped: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        current().on_end.append(lambda: dropped.append("yes"))
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        await _serve(app)
    assert dropped == ["yes"]


async def test_what_was_asked_for_in_the_background_goes_on_when_the_response_is_over() -> None:
    dropped: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        current().on_end.append(lambda: dropped.append("yes"))
        contexts.append(current())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send(_body(b'{"status": "queued"}', more=False))

    contexts: list[RequestContext] = []
    body = b'{"input": "hello", "background": true}'
    assert (await _serve(app, body, path="/v1/responses"))[0]["status"] == 200
    assert dropped == []
    for _ in range(2):
        contexts[0].end()
    assert dropped == ["yes"], "once, by who follows it"


async def test_a_stored_response_is_streamed_as_it_comes() -> None:
    seen: list[int] = []
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(START | {"headers": list(START["headers"])})
        await send(_body(b"event: delta\n\n", more=True))
        seen.append(len(sent))
        await send(_body(b"", more=False))

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = POST | {"method": "GET", "path": "/v1/responses/resp_1", "headers": []}
    await RequestContextMiddleware(app, CLASSES)(scope, receive, send)
    assert seen == [2], "the client has what was said so far"


async def test_the_first_error_stands() -> None:
    context = RequestContext(0.0, current().asked)
    context.decide(Refused("first"))
    context.decide()
    assert str(context.error) == "first"


@pytest.mark.parametrize(
    ("body", "headers", "class_name", "malformed"),
    [
        (b'{"slo": {"class": "chatbot"}}', [], "chatbot", None),
        (b'{"slo": {"class": "chatbot"}}', [(b"x-llm-d-slo-ttft-ms", b"50")], "chatbot", None),
        (b'{"slo": 5}', [], None, "slo must be an object"),
        (b'{"slo": null}', [], None, None),
        (b'{"vllm_xargs": {"slo_class": "chatbot"}}', [(b"x-slosserve-on-miss", b"refuse")], "chatbot", None),
        (b'{"slo": {"class": "chatbot"}, "vllm_xargs": {"slo_tpot_ms": 9, "k": 1}}', [], "chatbot", None),
        (b'{"vllm_xargs": {"slo_tpotms": 50}}', [], None, "unknown field 'slo_tpotms'"),
        (b'{"slo": ' + b"[" * 100_000, [], None, None),
        (b'not json "slo"', [], None, None),
        (b'{"slo": {"%s": 1}}' % (b"x" * 9000), [], None, "unknown field"),
    ],
)
async def test_slos_are_read_from_body_and_headers_and_nothing_breaks(
    body: bytes, headers: list[tuple[bytes, bytes]], class_name: str | None, malformed: str | None
) -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(current().asked)
        assert (await receive())["body"] == body
        current().decide()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send(_body(b"", more=False))

    start, _ = await _serve(app, body, headers)
    assert seen[0].class_name == class_name
    if malformed is None:
        assert seen[0].malformed is None
    else:
        assert malformed in seen[0].malformed
        told = dict(start["headers"])[b"x-slosserve-slo"]
        assert len(told) < 300


@pytest.mark.parametrize("path", GENERATE_PATHS)
@pytest.mark.parametrize("bearer", [b"Bearer wrong", b"Basic right", b"right", b""])
async def test_a_stranger_is_served_nowhere_and_told_what_is_missing(path: str, bearer: bytes) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("the front saw it")

    headers = [(b"authorization", bearer)] if bearer else []
    start, answer = await _serve(app, b"{}", headers, api_key="right", path=path)
    assert start["status"] == 401
    assert "endpoint.api_key" in json.loads(answer["body"])["error"]["message"]


async def test_what_is_said_in_several_places_counts_together() -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(current().asked)
        current().decide()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send(_body(b"", more=False))

    body = b'{"slo": {"tpot_ms": 70}, "vllm_xargs": {"slo_class": "chatbot", "slo_tpot_ms": 90}}'
    await _serve(app, body, [(b"x-slosserve-on-miss", b"refuse")])
    assert (seen[0].class_name, seen[0].tpot_ms, seen[0].refuse) == ("chatbot", 70.0, True)


@pytest.mark.parametrize("bearer", [b"Bearer right", b"bearer right"])
async def test_whoever_has_the_key_is_read_however_the_scheme_is_spelt(bearer: bytes) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert current().asked.class_name == "chatbot"
        current().decide()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send(_body(b"", more=False))

    body, headers = b'{"slo": {"class": "chatbot"}}', [(b"authorization", bearer)]
    start, _ = await _serve(app, body, headers, api_key="right")
    assert start["status"] == 200
