"""The aiohttp side: sockets in, answers out; errors become OpenAI's JSON; streams are relayed as they come."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import resource
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType

from aiohttp import web_server
from aiohttp.http import HttpVersion11
from aiohttp.web_request import BaseRequest
from aiohttp.web_response import StreamResponse
from attrs import define, field

from qlens import config, realtime
from qlens.access_log import Access, AccessLog
from qlens.account import ClientLeft
from qlens.call import Call
from qlens.connection import Connection, Exchange, Refused
from qlens.errors import CallError, CallTimedOut, InvalidRequest, StartupError, Unavailable, WrongMethod, frames
from qlens.gateway import Gateway, Generation
from qlens.operations import Operation, Paths
from qlens.paths import Served
from qlens.pipeline import Relay
from qlens.registry import Endpoint, register
from qlens.wire_errors import mistake

log = logging.getLogger("qlens")

STALL_SECONDS = 60
"""How long a client may take nothing of what was written to it, or be gone without a word."""
LAST_SECONDS = 0.25
"""How long connections without a call may bring one that is on its way when the gateway stops."""
CUT_SECONDS = 5
"""How long a call that was cut off at the end of draining may take to settle."""
_LOOK_SECONDS = 0.01
_TURNS = 4
"""Of the event loop: after so many, a connection that asyncio took just now is handed over."""

_NOTHING: Mapping[str, str] = MappingProxyType({})


def bind(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """Take an address without listening yet; raises StartupError when it cannot be had.

    A shared one can be taken again by whoever shares it too, and the kernel spreads connections over all of them.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        with ExitStack() as undo:
            taken = undo.enter_context(socket.socket(family, kind, protocol))
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if shared:
                taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                # Connections inherit it: the kernel watches writes that stall, so that no timer of ours has to.
                taken.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(STALL_SECONDS * 1000))
            taken.bind(address)
            undo.pop_all()
    except OSError as error:
        raise StartupError(f"cannot listen on {host}:{port}: {error.strerror or error}; choose another port") from error
    return taken


def _accepted(listener: socket.socket) -> Iterator[socket.socket]:
    """The connections that wait to be taken."""
    with contextlib.suppress(OSError):  # there is none left
        while True:
            connection, _ = listener.accept()
            connection.setblocking(False)
            yield connection


def may_open_all() -> None:
    """Let the process have as many files open as it may: each client takes one, and each call another.

    What a shell allows, 1,024, is for programs that wait with `select`, which cannot wait for more.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # a system may allow less than it says
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def url_of(taken: socket.socket) -> str:
    """The base URL of a bound socket, for somebody on this machine."""
    host, port = taken.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - said, not bound
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def spare_the_collector() -> None:
    """Look for reference cycles less often.

    A call leaves none behind (tests/core/test_account.py), so the collector finds nothing, though at its defaults it
    walks over everything that is alive a few times in a thousand calls: a tenth of the CPU time of a call. Not never:
    a connection that is closed leaves seven objects of asyncio's own, a transport with a method of itself. 20,000 of
    them take some 4 MB, 5,000 one.
    """
    gc.collect()
    gc.freeze()  # what is there now stays
    gc.set_threshold(5_000, 20, 20)


@asynccontextmanager
async def served(
    gateway: Gateway, found: config.Draft, sockets: tuple[socket.socket, socket.socket] | None = None
) -> AsyncIterator[Server]:
    """Take the addresses, unless their sockets are given, and open a configuration; nothing listens yet.

    Leaving drains and closes it all.
    """
    try:
        registration = register(found)
        settings = registration.config.server
        if sockets is None:
            server = Server.bound(gateway, settings.host, settings.port, settings.admin.host, settings.admin.port)
        else:
            server = Server(gateway, *sockets)
            gateway.url = url_of(server.client_socket)
        try:
            server.log_access(settings.access_log)
            await gateway.start(registration)
            del registration  # after a reload nobody but this frame would keep its plugins, and what a cache holds
            yield server
        finally:
            try:
                await server.stop(settings.drain_seconds, settings.accept_seconds)
            finally:
                await gateway.stop()
    finally:
        await gateway.http.aclose()


class _Http(web_server.Server):
    """aiohttp's low-level server, with our connections."""

    def __init__(
        self, serve: Callable[[Exchange], Awaitable[None]], refused: Refused, settings: Callable[[], config.Server]
    ) -> None:
        # Handler cancellation is off by default: the upstream would run on after the client left.
        super().__init__(_never, handler_cancellation=True)
        self._serve, self._refused, self._settings = serve, refused, settings

    def __call__(self) -> Connection:
        idle = self._settings().keepalive_seconds
        return Connection(self, self._serve, self._refused, loop=self._loop, access_log=None, keepalive_timeout=idle)

    def running(self) -> list[asyncio.Task[None]]:
        """The requests that run."""
        tasks = [connection.running for connection in self.connections if isinstance(connection, Connection)]
        return [task for task in tasks if task is not None]

    async def finish(self, seconds: float) -> None:
        """Let each connection bring one more request, which may be on its way, within some seconds."""
        for connection in self.connections:
            if isinstance(connection, Connection):
                connection.finish()
        for _ in range(round(seconds / _LOOK_SECONDS)):
            if len(self.connections) <= len(self.running()):
                return
            await asyncio.sleep(_LOOK_SECONDS)


async def _never(request: BaseRequest) -> StreamResponse:
    raise AssertionError("connections run their requests themselves")


@define(eq=False)
class Server:
    """Two listeners, for clients and for operators, in front of a gateway."""

    gateway: Gateway
    client_socket: socket.socket
    admin_socket: socket.socket
    _access: AccessLog | None = field(default=None, init=False)
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

    def log_access(self, place: Path | None) -> None:
        """Write an access log, if one is wanted; raises StartupError when it cannot be written."""
        if place is not None:
            lost = self.gateway.metrics.counter("qlens_access_log_lost_total", "Lines of the access log that are lost.")
            access = AccessLog(place, lost.inc)
            access.open()
            self._access = access

    async def start(self) -> None:
        """Listen."""
        loop = asyncio.get_running_loop()
        for taken, handler in ((self.client_socket, self._client), (self.admin_socket, self._admin)):
            http = _Http(handler, self._malformed, lambda: self.gateway.config.server)
            self._http.append(http)
            self._listening.append(await loop.create_server(http, sock=taken, backlog=1024))

    async def stop(self, drain_seconds: float, accept_seconds: float = 0) -> None:
        """Stop taking calls after `accept_seconds`, let running ones end, cut off what takes `drain_seconds` more."""
        try:
            await self._stop(drain_seconds, accept_seconds)
        finally:
            if self._access is not None:
                await asyncio.to_thread(self._access.close)

    async def _stop(self, drain_seconds: float, accept_seconds: float) -> None:
        self.gateway.draining = True
        if self._listening and self._listening[0].is_serving():
            await asyncio.sleep(accept_seconds)
            await self._close_to_clients()
            await self._http[0].finish(min(LAST_SECONDS, drain_seconds))
            self._http[0].pre_shutdown()
        try:
            await asyncio.wait_for(self.gateway.settled(), drain_seconds)
        except TimeoutError:
            self.gateway.expired = True
            running = self.running()
            log.warning("%d calls still ran after %s s of draining and are cut off", len(running), drain_seconds)
            for task in running:
                task.cancel()
            if running:
                await asyncio.wait(running, timeout=CUT_SECONDS)
        for listener in self._listening or (self.client_socket, self.admin_socket):
            listener.close()
        for http in self._http:
            await http.shutdown(1)

    async def _close_to_clients(self) -> None:
        """Stop listening, and take the connections that are made already: the kernel would reset them."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(self.client_socket)
        for _ in range(_TURNS):
            await asyncio.sleep(0)  # asyncio drops what it has taken and not yet handed over when a server closes
        with self.client_socket.dup() as waiting:
            self._listening[0].close()
            taken = list(_accepted(waiting))
        for each in taken:
            with contextlib.suppress(OSError):  # it has left
                await loop.connect_accepted_socket(self._http[0], each)

    def running(self) -> set[asyncio.Task[None]]:
        """The requests that run, those without their client among them."""
        return {task for http in self._http for task in http.running()} | self.gateway.drains.running()

    # --- one request ---------------------------------------------------------------------------

    def _client(self, exchange: Exchange) -> Awaitable[None]:
        generation = self.gateway.current
        return self._handle(exchange, generation, generation.client)

    def _admin(self, exchange: Exchange) -> Awaitable[None]:
        generation = self.gateway.current
        return self._handle(exchange, generation, generation.admin)

    def _malformed(self, id_: str, peer: str | None, status: int) -> None:
        """Note what was refused because it is not HTTP."""
        self.gateway.calls.refused.labels(str(status)).inc()
        if self._access is not None:
            self._access.note(Access(time.time_ns(), id_, peer, None, None, status, 0.0, None, None, None))

    async def _handle(self, exchange: Exchange, generation: Generation, paths: Paths[Served]) -> None:
        generation.enter()
        call: Call | None = None
        try:
            call, what = self._call(exchange, generation, paths)
            if isinstance(what, Operation):
                exchange.connection.on_leaving = generation.pipeline.left, call
                await generation.pipeline.run(
                    call, exchange.relay if what.runs != "session" else _joined(exchange, generation)
                )
            else:
                await self._endpoint(what, call, generation, exchange)
        except CallError as error:
            await self._fail(exchange, call, error)
        except ClientLeft:
            exchange.keep_alive = False
        except asyncio.CancelledError:
            if not self.gateway.expired:
                raise
            await self._fail(exchange, call, Unavailable("The gateway is shutting down.", code="shutting_down"))
        except Exception as error:
            log.error("call %s failed: %s", exchange.id, frames(error))
            await self._fail(exchange, call, mistake())
        finally:
            generation.leave()
            if self._access is not None:
                self._access.note(_access(exchange, call))

    @staticmethod
    def _call(exchange: Exchange, generation: Generation, paths: Paths[Served]) -> tuple[Call, Served]:
        """A call from the head of a request, and what serves it; raises UnknownPath, WrongMethod or InvalidRequest."""
        message, limits = exchange.message, generation.registration.config.server
        headers = message.headers
        if message.version is not HttpVersion11 and message.version < HttpVersion11 and "transfer-encoding" in headers:
            raise InvalidRequest("Transfer-Encoding needs HTTP/1.1.")
        path, params, query = message.path, _NOTHING, _NOTHING
        what = paths.exactly(message.method, path)
        if what is None:
            if "?" in path:
                query = message.url.query
            path = _path(path)
            # What operators ask passes through the supervisor of several workers, who asks for answers with a body.
            find = partial(_found, paths) if paths is generation.client else paths.find
            what, params = find(message.method, path)
        exchange.most_bytes = limits.max_body_bytes
        now = time.monotonic()
        call = Call(
            id=exchange.id,
            operation=what if isinstance(what, Operation) else Operation(what.path, what.method, what.path, "local"),
            path=path,
            path_params=params,
            query=query,
            headers=headers,
            peer=exchange.peer,
            credential=_credential(headers),
            started=now,
            wall_ns=time.time_ns(),
            deadline=now + limits.call_seconds,
            reader=exchange.read,
            arriving=exchange.pieces,
        )
        return call, what

    async def _endpoint(self, endpoint: Endpoint, call: Call, generation: Generation, exchange: Exchange) -> None:
        async def let_in() -> None:
            call.caller = await generation.pipeline.authenticate(call)
            call.scope = generation.roles.scope(call.caller, endpoint)

        async def read() -> bytes:
            body = await exchange.read()
            await let_in()  # a body may take its time, and its sender's key may have been revoked meanwhile
            return body

        try:
            async with asyncio.timeout_at(call.deadline) as timer:
                if endpoint.role is not None:
                    await let_in()
                    call.reader = read
                reply = await endpoint.handler(call)
                try:
                    if exchange.message.method == "HEAD" and reply.chunks is not None:
                        raise WrongMethod("What is at this path is known only as it is read: GET it.")
                    await exchange.plain(reply)
                finally:
                    await reply.aclose()
        except TimeoutError:
            if not timer.expired():
                raise
            raise CallTimedOut(f"{call.path} took longer than this gateway allows.") from None

    async def _fail(self, exchange: Exchange, call: Call | None, error: CallError) -> None:
        if call is None or call.caller is None:
            self.gateway.calls.refused.labels(str(error.status)).inc()
        with contextlib.suppress(ClientLeft):
            await exchange.fail(error, call)


def _access(exchange: Exchange, call: Call | None) -> Access:
    """What the access log says of a request."""
    caller = None if call is None else call.caller
    now = time.monotonic()
    return Access(
        wall_ns=time.time_ns() if call is None else call.wall_ns,
        id=exchange.id,
        client=exchange.peer,
        method=exchange.message.method,
        path=_origin_form(exchange.message.path),
        status=exchange.status,
        seconds=0.0 if call is None else now - call.started,
        tenant=None if caller is None else caller.tenant,
        key_id=None if caller is None else caller.key_id,
        model=None if call is None or call.model is None else call.model.name,
    )


def _joined(exchange: Exchange, generation: Generation) -> Relay:
    """What joins a client that changes to WebSocket with its session."""
    return partial(realtime.relay, exchange.switch, generation.registration.config.server)


def _found(paths: Paths[Served], method: str, path: str) -> tuple[Served, Mapping[str, str]]:
    """What is served at a path; HEAD is told what the gateway itself tells GET, without its body. (RFC 9110, 9.1)"""
    try:
        return paths.find(method, path)
    except WrongMethod:
        if method != "HEAD":
            raise
        with contextlib.suppress(WrongMethod):
            what, params = paths.find("GET", path)
            if not isinstance(what, Operation) or what.runs == "local":
                return what, params
        raise


def _path(target: str) -> str:
    """The path of a request target; raises InvalidRequest."""
    path = _origin_form(target)
    if not path.isprintable():
        raise InvalidRequest("The path of the request is not valid UTF-8.")
    return path


def _origin_form(target: str) -> str:
    """The path of a request target, whatever is in it."""
    path = target.partition("?")[0]
    if path.startswith("/"):
        return path
    # The absolute form (RFC 9112, 3.2.2); its host is as good as any Host header: unused.
    return "/" + path.partition("://")[2].partition("/")[2]


def _credential(headers: Mapping[str, str]) -> str | None:
    """The bearer token, the api-key of Azure's clients, the x-api-key of Anthropic's, or the key of a web page."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if (scheme == "Bearer" or scheme.lower() == "bearer") and (token := token.strip()):
        return token
    return headers.get("api-key") or headers.get("x-api-key") or realtime.key_of_page(headers)
