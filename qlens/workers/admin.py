"""The admin listener of several workers: one answer for all of them, or that of one of them, passed on."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import orjson
from aiohttp import (
    ClientConnectorError,
    ClientError,
    ClientResponse,
    ClientSession,
    ClientTimeout,
    DummyCookieJar,
    UnixConnector,
    web_server,
)
from aiohttp.web_request import BaseRequest
from aiohttp.web_response import StreamResponse
from attrs import define, field
from multidict import CIMultiDict
from yarl import URL

from qlens.account import ClientLeft
from qlens.call import Reply
from qlens.connection import PEER, Connection, Exchange
from qlens.errors import CallError, CallTimedOut, InvalidRequest, Unavailable
from qlens.workers.child import Child
from qlens.workers.crew import Crew

GRACE_SECONDS = 5
"""How much longer than a call's own bound a worker's answer is waited for."""
WHOLE_BYTES = 64 * 1024
"""Up to this length an answer is read before it is passed on; a longer one passes piece by piece."""

_OF_ONE_HOP = frozenset(
    {
        "connection", "expect", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te",
        "trailer", "transfer-encoding", "upgrade",
    }
)  # fmt: skip
_OWN = frozenset({"date", "server", "x-request-id"})
"""Headers that every answer gets anew."""
_ADDED_BY_CLIENTS = ("accept", "accept-encoding", "content-type", "user-agent")
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@define(eq=False)
class Admin:
    """Serves operators: merges metrics and health, and leaves everything else, roles included, to a worker."""

    crew: Crew
    socket: socket.socket
    _http: _Http = field(init=False)
    _listening: asyncio.Server | None = field(default=None, init=False)

    def __attrs_post_init__(self) -> None:
        self._http = _Http(self)

    async def start(self) -> None:
        """Listen."""
        self._listening = await asyncio.get_running_loop().create_server(self._http, sock=self.socket)

    async def stop(self) -> None:
        """Close the listener and its connections."""
        if self._listening is not None:
            self._listening.close()
        await self._http.shutdown(1)

    async def serve(self, exchange: Exchange) -> None:
        """Answer one request."""
        try:
            await self._answer(exchange)
        except CallError as error:
            with contextlib.suppress(ClientLeft):
                await exchange.fail(error, None)
        except ClientLeft:
            exchange.keep_alive = False

    async def _answer(self, exchange: Exchange) -> None:
        message = exchange.message
        path = message.path.partition("?")[0]
        if message.method in {"GET", "HEAD"} and path in {"/healthz", "/readyz"}:
            await exchange.plain(self._alive() if path == "/healthz" else self._ready())
            return
        async with self._asked(exchange) as answer:
            # A worker knows who may see them; what it says itself is of one worker, and is asked of all then.
            may = message.method == "GET" and answer.status == 200
            if not may or path not in {"/metrics", "/admin/health"}:
                await exchange.plain(await _passed(answer))
                return
        if path == "/metrics":
            reply = Reply(headers={"content-type": _METRICS_TYPE}, body=await self.crew.metrics())
        else:
            reply = _json(await self.crew.health())
        await exchange.plain(reply)

    def _alive(self) -> Reply:
        return _json({"status": "ok"})

    def _ready(self) -> Reply:
        status = "draining" if self.crew.stopping else "ready" if self.crew.all_ready() else "starting"
        workers = {"ready": self.crew.well(), "wanted": self.crew.wanted}
        return _json({"status": status, "workers": workers}, 200 if status == "ready" else 503)

    @contextlib.asynccontextmanager
    async def _asked(self, exchange: Exchange) -> AsyncIterator[ClientResponse]:
        """A ready worker's answer to a request, whose body is read no faster than the worker takes it."""
        target = _target(exchange)
        for child in self.crew.ready():
            if await child.learn("ping") is None:
                continue  # it hangs, or has ended just now
            async with self._session(child) as session:
                try:
                    answer = await session.request(
                        exchange.message.method,
                        target,
                        headers=_passed_on(exchange),
                        data=_body(exchange),
                        expect100="expect" in exchange.message.headers,
                        allow_redirects=False,
                    )
                except ClientConnectorError:
                    continue
                except TimeoutError:
                    raise CallTimedOut(f"{target.path} took longer than this gateway allows.") from None
                except ClientError:
                    raise Unavailable("The worker that was asked ended before it answered.") from None
                async with answer:
                    exchange.id = answer.headers.get("x-request-id", exchange.id)
                    yield answer
                    return
        raise Unavailable("No worker is ready.")

    def _session(self, child: Child) -> ClientSession:
        return ClientSession(
            connector=UnixConnector(str(child.admin), force_close=True),
            timeout=ClientTimeout(total=self.crew.settings.call_seconds + GRACE_SECONDS),
            cookie_jar=DummyCookieJar(),
            auto_decompress=False,
            skip_auto_headers=_ADDED_BY_CLIENTS,
        )


def _target(exchange: Exchange) -> URL:
    """The request's target as the client wrote it, at a worker."""
    path = exchange.message.path
    if not path.startswith("/"):
        path = "/" + path.partition("://")[2].partition("/")[2]
    if not path.isascii() or not path.isprintable():
        raise InvalidRequest("The path of the request must be percent-encoded.")
    return URL(f"http://worker{path}", encoded=True)


def _passed_on(exchange: Exchange) -> CIMultiDict[str]:
    headers = exchange.message.headers
    passed = CIMultiDict((name, value) for name, value in headers.items() if name.lower() not in _OF_ONE_HOP)
    passed.popall(PEER, None)  # whatever a client says about itself
    if exchange.peer is not None:
        passed[PEER] = exchange.peer
    return passed


def _body(exchange: Exchange) -> AsyncIterator[bytes] | None:
    headers = exchange.message.headers
    if "transfer-encoding" not in headers and headers.get("content-length", "0") == "0":
        return None
    return _read(exchange)


async def _read(exchange: Exchange) -> AsyncIterator[bytes]:
    if "expect" in exchange.message.headers:
        await exchange.connection.send(b"HTTP/1.1 100 Continue\r\n\r\n")
    while piece := await exchange.payload.readany():
        yield piece


async def _passed(answer: ClientResponse) -> Reply:
    headers = {name: value for name, value in answer.headers.items() if name.lower() not in _OWN}
    if answer.content_length is not None and answer.content_length <= WHOLE_BYTES:
        return Reply(status=answer.status, headers=headers, body=await answer.read())
    return Reply(status=answer.status, headers=headers, chunks=_pieces(answer))


async def _pieces(answer: ClientResponse) -> AsyncIterator[bytes]:
    try:
        async for piece in answer.content.iter_any():
            yield piece
    except (ClientError, TimeoutError):
        raise Unavailable("The worker that answered ended before its answer did.") from None


def _json(body: object, status: int = 200) -> Reply:
    return Reply(status=status, headers={"content-type": "application/json"}, body=orjson.dumps(body))


class _Http(web_server.Server):
    """aiohttp's low-level server, with our connections; bodies pass as they are, compressed ones too."""

    def __init__(self, admin: Admin) -> None:
        super().__init__(_never, handler_cancellation=True)
        self._admin = admin

    def __call__(self) -> Connection:
        return Connection(self, self._admin.serve, loop=self._loop, access_log=None, auto_decompress=False)


async def _never(request: BaseRequest) -> StreamResponse:
    raise AssertionError("connections run their requests themselves")
