"""A small door for clients of chat and of messages in front of a provider that may speak the other: what the gateway
does with a bridge, without the rest of the gateway.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import orjson
from aiohttp import web
from attrs import define, field

from qlens import CallError, Deadlines, Outgoing, Reply, Upstream, post_messages, post_openai, sse
from qlens.bridges import Bridge, Translation, between
from qlens.call import Call, Cost
from qlens.dialects import Body, named, typed
from qlens.metering import Meter
from qlens.metering_typed import TypedMeter
from qlens.operations import Operation
from qlens.testing.anthropic import KEY

DEADLINES = Deadlines(connect_seconds=2, first_byte_seconds=5, idle_seconds=5)
PATHS = {"chat": "/v1/chat/completions", "messages": "/v1/messages"}
OPERATIONS = {
    name: Operation(name, "POST", path, "full", name, "json", True, ("tokens",)) for name, path in PATHS.items()
}
_ANTHROPIC = {400: "invalid_request_error", 404: "not_found_error", 429: "rate_limit_error", 503: "overloaded_error"}


def call_of(body: Body, dialect: str, *, keep: int = 0) -> Call:
    """A call with this body."""

    async def reader() -> bytes:
        return orjson.dumps(body)

    call = Call(
        id="1", operation=OPERATIONS[dialect], path="", path_params={}, query={}, headers={}, peer=None,
        credential=None, started=0, wall_ns=0, deadline=0, reader=reader, stream=bool(body.get("stream")), keep=keep,
        wants_usage=bool((body.get("stream_options") or {}).get("include_usage")),
    )  # fmt: skip
    call.body, call.estimated_input = body, 11
    return call


async def translated(chunks: AsyncIterator[bytes], translation: Translation) -> AsyncIterator[bytes]:
    """A provider's stream in the client's dialect."""
    async for event in sse.split(chunks):
        if passing := translation.feed(event):
            yield passing
    if ending := translation.end():
        yield ending


@define(eq=False)
class Door:
    """A running door; made by `door()`."""

    provider: str
    """The dialect of the provider."""
    upstream: str
    http: Upstream = field(factory=Upstream)
    url: str = field(init=False, default="")
    meters: list[Meter | TypedMeter] = field(factory=list)
    model: str | None = None
    """What the provider calls the model; None: as the client does."""

    async def serve(self, request: web.Request) -> web.StreamResponse:
        client = next(name for name, path in PATHS.items() if path == request.path)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        try:
            body: Body = orjson.loads(await request.read())
            named(client).validate(body)
            bridge = between(client, self.provider) if client != self.provider else None
            reply = await self._send(body, client, bridge)
            if reply.chunks is None:
                return web.json_response(_answer(reply, bridge, body))
            await response.prepare(request)
            async for chunk in self._watched(reply, body, client, bridge):
                await response.write(chunk)
        except CallError as error:
            if not response.prepared:
                return web.json_response(_error(error, client), status=error.status)
            told = _error(error, client)
            await response.write(typed.write(told) if client == "messages" else sse.write(told))
        return response

    async def _send(self, body: Body, client: str, bridge: Bridge | None) -> Reply:
        asked = {**body, "model": self.model or body["model"]}
        stream = bool(body.get("stream"))
        outgoing = Outgoing(OPERATIONS[client], self.provider, bridge.request(asked) if bridge else asked, stream)
        if self.provider == "messages":
            headers = {"x-api-key": KEY, "anthropic-version": "2023-06-01"}
            url = f"{self.upstream}/v1/messages"
            return await post_messages(self.http, url, headers=headers, outgoing=outgoing, deadlines=DEADLINES)
        url = f"{self.upstream}/chat/completions"
        return await post_openai(self.http, url, headers={}, outgoing=outgoing, deadlines=DEADLINES)

    def _watched(self, reply: Reply, body: Body, client: str, bridge: Bridge | None) -> AsyncIterator[bytes]:
        assert reply.chunks is not None
        chunks = translated(reply.chunks, bridge.stream(body)) if bridge else reply.chunks
        reply.dialect = client
        kind = TypedMeter if client in typed.NAMES else Meter
        meter = kind(call_of(body, client), reply, lambda usage: Cost(usage.total), _ended, lambda _: CallError("x"))
        self.meters.append(meter)
        return meter.watch(chunks)


async def _ended(body: bytes) -> None:
    """Nothing is kept."""


def _answer(reply: Reply, bridge: Bridge | None, asked: Body) -> Body:
    body: Body = orjson.loads(reply.body or b"")
    return bridge.answer(body, asked) if bridge else body


def _error(error: CallError, client: str) -> dict[str, Any]:
    if client != "messages":
        return error.body()
    kind = _ANTHROPIC.get(error.status, "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


@asynccontextmanager
async def door(provider: str, upstream: str, *, model: str | None = None) -> AsyncIterator[Door]:
    """Serve on a free loopback port until the block is left."""
    found = Door(provider, upstream, model=model)
    app = web.Application(client_max_size=1 << 26)
    for path in PATHS.values():
        app.router.add_post(path, found.serve)
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    found.url = str(site.name).rsplit(":", 1)[0] + ":" + str(runner.addresses[0][1])
    try:
        yield found
    finally:
        await runner.cleanup()
        await found.http.aclose()


def plain(body: Mapping[str, Any]) -> dict[str, Any]:
    """An answer, or an event of one, without what is different each time."""
    return {name: value for name, value in body.items() if name not in {"id", "created"}}
