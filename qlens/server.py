"""The aiohttp side: sockets in, answers out; errors become OpenAI's JSON; streams are relayed as they come."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import re
import socket
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack, asynccontextmanager
from typing import Any

import orjson
from aiohttp import ClientPayloadError, StreamReader, web
from aiohttp.http import HttpProcessingError, HttpVersion11
from aiohttp.http_exceptions import ContentEncodingError
from attrs import define, field
from multidict import CIMultiDict

from qlens import config
from qlens.account import Account, ClientLeft
from qlens.call import Call, Limit, Reply
from qlens.errors import (
    BodyTimedOut,
    BodyTooLarge,
    CallError,
    CallTimedOut,
    Forbidden,
    InvalidRequest,
    StartupError,
    Unavailable,
    UnsupportedMedia,
    frames,
)
from qlens.gateway import Gateway, Generation
from qlens.metering import cost_text
from qlens.operations import Operation, Paths
from qlens.paths import Served, has_role
from qlens.registry import Endpoint, register

log = logging.getLogger("qlens")

KEEPALIVE_SECONDS = 15  # aiohttp also cuts a connection whose headers take this long
LINGER_SECONDS = 3
BODY_GRACE_SECONDS = 10
BODY_BYTES_PER_SECOND = 1024
STALL_SECONDS = 60
"""How long a client may take nothing of what was written to it, or be gone without a word."""
CUT_SECONDS = 5
"""How long a call that was cut off at the end of draining may take to settle."""

_STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}
_LONG = 10.0**9
"""Seconds that are as good as for ever."""
_FRAMING = frozenset({"connection", "content-length", "keep-alive", "trailer", "transfer-encoding", "upgrade"})
_UNSENDABLE = re.compile("[\x00-\x08\x0a-\x1f\x7f\ud800-\udfff]")


def new_id() -> str:
    """A UUIDv7: unique, and in the order of time (RFC 9562)."""
    value = (time.time_ns() // 1_000_000 << 80) | int.from_bytes(os.urandom(10))
    value = value & ~(0xF << 76) | 0x7 << 76
    digits = f"{value & ~(0x3 << 62) | 0x2 << 62:032x}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def bind(host: str, port: int) -> socket.socket:
    """Take an address without listening yet; raises StartupError when it cannot be had."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        with ExitStack() as undo:
            taken = undo.enter_context(socket.socket(family, kind, protocol))
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                # Connections inherit it: the kernel watches writes that stall, so that no timer of ours has to.
                taken.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(STALL_SECONDS * 1000))
            taken.bind(address)
            undo.pop_all()
    except OSError as error:
        raise StartupError(f"cannot listen on {host}:{port}: {error.strerror or error}; choose another port") from error
    return taken


def url_of(taken: socket.socket) -> str:
    """The base URL of a bound socket, for somebody on this machine."""
    host, port = taken.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - said, not bound
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@asynccontextmanager
async def served(gateway: Gateway, found: config.Draft) -> AsyncIterator[Server]:
    """Take the addresses and open a configuration; nothing listens yet. Leaving drains and closes it all."""
    try:
        registration = register(found)
        settings = registration.config.server
        server = Server.bound(gateway, settings.host, settings.port, settings.admin.host, settings.admin.port)
        try:
            await gateway.start(registration)
            yield server
        finally:
            try:
                await server.stop(settings.drain_seconds)
            finally:
                await gateway.stop()
    finally:
        await gateway.http.aclose()


class _Protocol(web.RequestHandler):
    """aiohttp's connection handler, with our words for requests that are not HTTP."""

    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        # aiohttp's own answer is plain text that echoes the input, with a traceback in the log for each.
        error: CallError = InvalidRequest("The HTTP request is malformed.")
        if isinstance(exc, ContentEncodingError):
            error = unsupported_encoding()
        elif status >= 500:
            log.error("a request failed: %s", frames(exc) if exc is not None else status)
            error = _mistake()
        else:
            log.debug("malformed request: %s", type(exc).__name__)
        response = web.Response(status=error.status, body=orjson.dumps(error.body()), content_type="application/json")
        response.headers["x-request-id"] = new_id()
        response.headers["server"] = "qlens"
        response.force_close()
        return response


class _Http(web.Server):
    def __call__(self) -> web.RequestHandler:
        return _Protocol(self, loop=self._loop, **self._kwargs)


@define(eq=False)
class Server:
    """Two listeners, for clients and for operators, in front of a gateway."""

    gateway: Gateway
    client_socket: socket.socket
    admin_socket: socket.socket
    _tasks: set[asyncio.Task[Any]] = field(factory=set, init=False)
    _listening: list[asyncio.Server] = field(factory=list, init=False)
    _http: list[_Http] = field(factory=list, init=False)

    @classmethod
    def bound(cls, gateway: Gateway, host: str, port: int, admin_host: str, admin_port: int) -> Server:
        """A server that has its addresses and does not listen yet."""
        client = bind(host, port)
        try:
            admin = bind(admin_host, admin_port)
        except StartupError:
            client.close()
            raise
        gateway.url = url_of(client)
        return cls(gateway, client, admin)

    @property
    def admin_url(self) -> str:
        """Where operators reach it."""
        return url_of(self.admin_socket)

    async def start(self) -> None:
        """Listen."""
        loop = asyncio.get_running_loop()
        for taken, handler in ((self.client_socket, self._client), (self.admin_socket, self._admin)):
            http = _Http(
                handler,
                handler_cancellation=True,  # off by default: the upstream would run on after the client left
                keepalive_timeout=KEEPALIVE_SECONDS,
                lingering_time=LINGER_SECONDS,
                access_log=None,
            )
            self._http.append(http)
            self._listening.append(await loop.create_server(http, sock=taken, backlog=1024))

    async def stop(self, drain_seconds: float) -> None:
        """Stop taking calls, let running ones end, cut off those that take longer than `drain_seconds`."""
        self.gateway.draining = True
        if self._listening:
            self._listening[0].close()
            self._http[0].pre_shutdown()
        try:
            await asyncio.wait_for(self.gateway.settled(), drain_seconds)
        except TimeoutError:
            self.gateway.expired = True
            log.warning("%d calls still ran after %s s of draining and are cut off", len(self._tasks), drain_seconds)
            for task in self._tasks:
                task.cancel()
            if self._tasks:
                await asyncio.wait(set(self._tasks), timeout=CUT_SECONDS)
        for listener in self._listening or (self.client_socket, self.admin_socket):
            listener.close()
        for http in self._http:
            await http.shutdown(1)

    # --- one request ---------------------------------------------------------------------------

    async def _client(self, request: web.BaseRequest) -> web.StreamResponse:
        with self.gateway.serving() as generation:
            return await self._handle(request, generation, generation.client)

    async def _admin(self, request: web.BaseRequest) -> web.StreamResponse:
        with self.gateway.serving() as generation:
            return await self._handle(request, generation, generation.admin)

    async def _handle(
        self, request: web.BaseRequest, generation: Generation, paths: Paths[Served]
    ) -> web.StreamResponse:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        outlet = _Outlet(request, new_id(), self.gateway)
        try:
            await self._serve(request, generation, paths, outlet)
        except CallError as error:
            await self._fail(outlet, error)
        except ClientLeft:
            pass
        except asyncio.CancelledError:
            if not self.gateway.expired:
                raise
            await self._fail(outlet, Unavailable("The gateway is shutting down.", code="shutting_down"))
        except Exception as error:
            log.error("call %s failed: %s", outlet.id, frames(error))
            await self._fail(outlet, _mistake())
        finally:
            self._tasks.discard(task)
        return outlet.response or web.Response(status=499)  # nobody is there to read it

    async def _serve(
        self, request: web.BaseRequest, generation: Generation, paths: Paths[Served], outlet: _Outlet
    ) -> None:
        if request.version < HttpVersion11 and "transfer-encoding" in request.headers:
            raise InvalidRequest("Transfer-Encoding needs HTTP/1.1.")
        path = request._message.path.partition("?")[0]
        if not path.isprintable():
            raise InvalidRequest("The path of the request is not valid UTF-8.")
        if not path.startswith("/"):
            # The absolute form of a request target (RFC 9112, 3.2.2); its host is as good as any Host header: unused.
            path = "/" + path.partition("://")[2].partition("/")[2]
        what, params = paths.find(request.method, path)
        operation = what if isinstance(what, Operation) else Operation(what.path, what.method, what.path, "local")
        limits = generation.registration.config.server
        call = outlet.call = _call(request, outlet.id, (operation, path, params), limits)
        if isinstance(what, Endpoint):
            await self._endpoint(what, call, generation, outlet)
        else:
            await generation.pipeline.run(call, outlet.relay)

    async def _endpoint(self, endpoint: Endpoint, call: Call, generation: Generation, outlet: _Outlet) -> None:
        try:
            async with asyncio.timeout_at(call.deadline) as timer:
                if endpoint.role is not None:
                    call.caller = await generation.pipeline.authenticate(call)
                    if not has_role(call.caller.roles, endpoint.role):
                        raise Forbidden(f"{call.path} needs the role {endpoint.role}.")
                reply = await endpoint.handler(call)
                try:
                    await outlet.plain(reply)
                finally:
                    await reply.aclose()
        except TimeoutError:
            if not timer.expired():
                raise
            raise CallTimedOut(f"{call.path} took longer than this gateway allows.") from None

    async def _fail(self, outlet: _Outlet, error: CallError) -> None:
        if outlet.call is None or outlet.call.caller is None:
            self.gateway.calls.refused.labels(str(error.status)).inc()
        with contextlib.suppress(ClientLeft):
            await outlet.fail(error)


@define(eq=False)
class _Outlet:
    """The answer's side of one request."""

    request: web.BaseRequest
    id: str
    gateway: Gateway
    call: Call | None = None
    response: web.StreamResponse | None = None
    _events: bool = False
    """Whether what is written is a stream of events, in which an error can still be said."""
    _over: bool = False
    """Whether the last byte was handed over."""

    async def relay(self, account: Account, reply: Reply) -> None:
        """Write a reply to the client as it comes; nothing is sent before the first good byte is in hand."""
        if reply.chunks is None:
            body = reply.body or b""
            headers = _sendable(reply.headers)
            headers.update(_told(account))
            if account.call.operation.runs == "full" and (cost := cost_text(account.cost())) is not None:
                headers["x-qlens-cost-usd"] = cost
            account.first_byte = time.monotonic()
            await self.whole(reply.status, headers, body)
            account.bytes_out, account.delivered = len(body), True
            return
        self._events = True
        async for chunk in reply.chunks:
            if self.response is None:
                account.first_byte = time.monotonic()
                headers = _sendable(reply.headers)
                headers.update(_told(account))
                headers.update(_STREAM_HEADERS)
                await self._begin(web.StreamResponse(headers=headers))
            await self._write(chunk)
            account.bytes_out += len(chunk)
        account.delivered = True
        await self._end()

    async def plain(self, reply: Reply) -> None:
        """Write the reply of an endpoint as it is."""
        headers = _sendable(reply.headers)
        if reply.chunks is None:
            await self.whole(reply.status, headers, reply.body or b"")
            return
        await self._begin(web.StreamResponse(status=reply.status, headers=headers))
        async for chunk in reply.chunks:
            await self._write(chunk)
        await self._end()

    async def whole(self, status: int, headers: CIMultiDict[str], body: bytes) -> None:
        """Write a complete answer."""
        headers.setdefault("content-type", "application/json")
        await self._begin(web.Response(status=status, headers=headers, body=body))
        await self._end()

    async def fail(self, error: CallError) -> None:
        """Write an error: as an answer, or, once a stream has begun, as its last event, without [DONE]."""
        if self.response is None:
            await self._refuse(error)
        elif self._events and not self._over:
            await self._write(b"data: " + _written(error) + b"\n\n")
            await self._end()
        elif not self.response._eof_sent and self.request.transport is not None:
            # A part of an answer is out, in which nothing can be said: the client must not take it for the whole.
            self.request.transport.abort()

    async def _refuse(self, error: CallError) -> None:
        headers = _sendable(error.headers)
        headers["content-type"] = "application/json"
        if self.call is not None:
            headers.update(_limits(self.call.limits))
        if error.retry_after is not None and -_LONG < error.retry_after < _LONG:
            headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
            headers["retry-after-ms"] = str(max(1, math.ceil(error.retry_after * 1000)))
        if error.status == 401:
            headers["www-authenticate"] = "Bearer"
        if self.call is not None and self.call.attempts:
            headers["x-qlens-attempts"] = str(len(self.call.attempts))
        await self.whole(error.status, headers, _written(error))

    async def _begin(self, response: web.StreamResponse) -> None:
        self.response = response
        response.headers["x-request-id"] = self.id
        response.headers["server"] = "qlens"  # not which Python and aiohttp, as aiohttp would say
        if self.gateway.draining or (self.request.version < HttpVersion11 and response.content_length is None):
            response.force_close()
        try:
            await response.prepare(self.request)
        except OSError as error:
            raise ClientLeft from error

    async def _write(self, chunk: bytes) -> None:
        assert self.response is not None
        try:
            await self.response.write(chunk)
        except OSError as error:
            raise ClientLeft from error

    async def _end(self) -> None:
        assert self.response is not None
        self._over = True
        try:
            await self.response.write_eof()
        except OSError as error:
            raise ClientLeft from error


def _call(
    request: web.BaseRequest,
    call_id: str,
    what: tuple[Operation, str, Mapping[str, str]],
    limits: config.Server,
) -> Call:
    """A call from the head of a request."""
    operation, path, params = what
    peer = request.transport.get_extra_info("peername") if request.transport else None
    now = asyncio.get_running_loop().time()
    return Call(
        id=call_id,
        operation=operation,
        path=path,
        path_params=params,
        query=request.query,
        headers=request.headers,
        peer=peer[0] if peer else None,
        credential=_credential(request.headers),
        started=now,
        wall_ns=time.time_ns(),
        deadline=now + limits.call_seconds,
        reader=lambda: _read(request, limits.max_body_bytes),
    )


def _credential(headers: Mapping[str, str]) -> str | None:
    """The bearer token, or Azure clients' api-key."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    return headers.get("api-key") or None


def unsupported_encoding() -> UnsupportedMedia:
    """The answer to a body in an encoding that is not read here."""
    return UnsupportedMedia("Unsupported content encoding. Send the body as it is, or with gzip.")


async def _read(request: web.BaseRequest, most: int) -> bytes:
    """The body, bounded in size and slowness. Called after authentication: only then is 100-continue answered."""
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in {"identity", "gzip"}:
        raise unsupported_encoding()
    if (request.content_length or 0) > most:
        raise _too_large(most)
    content = request.content
    if content.is_eof() and content.exception() is None:
        # It came with the head, as most do: nothing is waited for.
        body = content.read_nowait()
        if len(body) > most:
            raise _too_large(most)
        return body
    expected = request.headers.get("expect", "").lower()
    if expected == "100-continue" and request.version >= HttpVersion11 and request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    return await _read_slowly(content, most)


async def _read_slowly(content: StreamReader, most: int) -> bytes:
    parts, size = [], 0
    started = asyncio.get_running_loop().time()
    try:
        async with asyncio.timeout(BODY_GRACE_SECONDS) as timer:
            while part := await content.readany():
                parts.append(part)
                size += len(part)
                if size > most:
                    raise _too_large(most)
                timer.reschedule(started + BODY_GRACE_SECONDS + size / BODY_BYTES_PER_SECOND)
    except TimeoutError:
        raise BodyTimedOut(f"The request body came slower than {BODY_BYTES_PER_SECOND} bytes a second.") from None
    except (HttpProcessingError, ClientPayloadError, web.RequestPayloadError):
        raise InvalidRequest("The request body does not arrive as its headers say.") from None
    return b"".join(parts)


def _too_large(most: int) -> BodyTooLarge:
    return BodyTooLarge(f"The request body is larger than this gateway's limit of {most} bytes.")


def _told(account: Account) -> dict[str, str]:
    """The headers that tell how a call was answered."""
    call, source = account.call, account.source
    headers = _limits(call.limits)
    if call.operation.runs != "full":
        return headers
    if source is not None and source.target is not None:
        headers["x-qlens-provider"] = _header(source.target.provider)
    if call.model is not None:
        headers["x-qlens-model"] = _header(call.model.name)
    now = time.monotonic()
    headers["x-qlens-cache"] = call.cache
    headers["x-qlens-attempts"] = str(len(call.attempts))
    headers["x-qlens-overhead-ms"] = f"{max(0.0, now - call.started - account.waited(now)) * 1000:.3f}"
    return headers


def _mistake() -> CallError:
    return CallError("The gateway made a mistake.", code="internal_error")


def _written(error: CallError) -> bytes:
    try:
        return orjson.dumps(error.body())
    except TypeError:
        log.error("%s says something that is no text", type(error).__name__)
        return orjson.dumps(_mistake().body())


def _sendable(given: Mapping[str, str]) -> CIMultiDict[str]:
    """A plugin's headers, without those that would break or forge the message they stand in."""
    headers: CIMultiDict[str] = CIMultiDict()
    for name, value in given.items():
        texts = isinstance(name, str) and isinstance(value, str)
        if texts and name.lower() not in _FRAMING and not _UNSENDABLE.search(name + value):
            headers[name] = value
    return headers


def _header(text: str) -> str:
    """A configured name as a header value, which takes no control characters."""
    return text.encode("ascii", "replace").decode()


def _limits(limits: list[Limit]) -> dict[str, str]:
    """OpenAI's x-ratelimit headers, for the tightest limit of each kind."""
    headers = {}
    for kind in ("requests", "tokens"):
        tightest = min(
            (limit for limit in limits if limit.kind == kind), key=lambda limit: limit.remaining, default=None
        )
        if tightest is not None:
            headers[f"x-ratelimit-limit-{kind}"] = str(tightest.limit)
            headers[f"x-ratelimit-remaining-{kind}"] = str(max(0, tightest.remaining))
            headers[f"x-ratelimit-reset-{kind}"] = _duration(tightest.reset_seconds)
    return headers


def _duration(seconds: float) -> str:
    """A duration as OpenAI writes it: 12ms, 1.5s, 6m0s, 1h2m3s."""
    seconds = min(seconds, _LONG) if seconds >= 0 else 0  # what is no number is not more than 0 either
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    if seconds < 60:
        return f"{seconds:.3f}".rstrip("0").rstrip(".") + "s"
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{rest}s" if hours else f"{minutes}m{rest}s"
