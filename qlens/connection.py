"""One client connection: requests come in, one call at a time, and the bytes of its answer go out."""

from __future__ import annotations

import asyncio
import logging
import random
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

import orjson
from aiohttp import EMPTY_PAYLOAD, ClientPayloadError, StreamReader
from aiohttp.http import HttpProcessingError, HttpVersion11, RawRequestMessage
from aiohttp.http_exceptions import ContentEncodingError, LineTooLong

# `aiohttp.web` itself would load routes, applications and files, and read the system's table of file types.
from aiohttp.web_protocol import RequestHandler, RequestPayloadError
from aiohttp.web_server import Server
from attrs import define, field

from qlens.account import CLIENT_CLOSED, Account, ClientLeft
from qlens.call import Call, Reply
from qlens.errors import (
    BodyTimedOut,
    BodyTooLarge,
    CallError,
    HeaderTooLarge,
    InvalidRequest,
    UnsupportedMedia,
    UpgradeRequired,
    frames,
)
from qlens.heads import head, of_body, of_error, of_stream, sendable
from qlens.watching import Watcher
from qlens.websocket import ClientSocket
from qlens.wire_errors import error_body, error_event, mistake

T = TypeVar("T")

log = logging.getLogger("qlens")

KEEPALIVE_SECONDS = 15
"""How long a connection may idle, or take for the head of a request, where nobody says otherwise."""
HEADER_BYTES = 8190
"""How long the request line may be, and each header with its name."""
READ_BYTES = 64 * 1024
"""The most that is read at once."""
LINGER_SECONDS = 3
"""How long the rest of a body is read that nobody wants, so that the client can read the answer."""
BODY_GRACE_SECONDS = 10
PEER = "x-qlens-peer"
"""In what the supervisor passes on to a worker: the client's address."""
BODY_BYTES_PER_SECOND = 1024
AT_ONCE_BYTES = 128 * 1024
"""The largest body that is read in one go: less than aiohttp takes before it makes a client wait."""
_BARE = frozenset({204, 304})
"""The statuses of answers that have no body."""
_EVENT_ENDS = (b"\n\n", b"\r\n\r\n", b"\r\r")

Leaving = Callable[[Call, asyncio.Task[None]], bool]
"""Called with a call and its task when the client is gone; whether it goes on all the same, and is not cancelled."""

Refused = Callable[[str, str | None, int], object]
"""Called with the id, the client's address and the status of what was refused because it is not HTTP."""

# What makes the task of a request; where it can, it runs at once up to its first wait.
if sys.version_info >= (3, 12):
    _started = partial(asyncio.Task, eager_start=True)
else:
    _started = asyncio.Task

# Identifiers are unique, not secret.
_random_bits = random.Random(random.SystemRandom().getrandbits(256)).getrandbits  # noqa: S311
_RANDOM, _VERSION_AND_VARIANT = 0x0FFF_3FFF, 0x7000_8000


def new_id() -> str:
    """A UUIDv7: unique, and in the order of time (RFC 9562)."""
    # In three parts, each no larger than a machine's word: one number of 128 bits takes half as long again.
    when = (time.time_ns() // 1_000_000).to_bytes(6, "big").hex("-", -4)
    marked = (_random_bits(32) & _RANDOM | _VERSION_AND_VARIANT).to_bytes(4, "big").hex("-", 2)
    return f"{when}-{marked}-{_random_bits(48).to_bytes(6, 'big').hex()}"


class Connection(RequestHandler):
    """aiohttp's connection: its parser, framing checks and flow control, with our own way of running a request.

    aiohttp keeps a task for every connection and makes another one, a Request and a Response for every request. Here
    a request is one task, so that the context of one call is no part of the next one's, and its answer one write.
    """

    __slots__ = ("_last", "_refused", "_serve", "on_leaving")

    def __init__(
        self,
        manager: Server,
        serve: Callable[[Exchange], Awaitable[None]],
        refused: Refused | None = None,
        **options: Any,
    ) -> None:
        options |= {"max_line_size": HEADER_BYTES, "max_field_size": HEADER_BYTES}
        super().__init__(manager, **{"keepalive_timeout": KEEPALIVE_SECONDS, **options})
        self._serve, self._refused = serve, refused
        self._last = False
        self.on_leaving: tuple[Leaving, Call] | None = None
        """Who is told, and of what call, when the client is gone while its request runs."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        super().connection_made(transport)
        # asyncio takes a fresh buffer of 256 KiB for every read, which the allocator gets from the kernel and gives
        # back at once: that costs more than the read.
        if hasattr(transport, "max_size"):
            transport.max_size = READ_BYTES

    @property
    def is_closing(self) -> bool:
        """Whether this answer is the last one."""
        return self._last or self._close or self._force_close

    @property
    def running(self) -> asyncio.Task[None] | None:
        """The request that runs."""
        return self._task_handler if self._request_in_progress else None

    async def start(self) -> None:
        """Nothing waits between requests: their arrival starts them."""

    def data_received(self, data: bytes) -> None:
        """Let the parser have them, and start a request whose head is whole now.

        What aiohttp does for HTTP, without what its own task needs; what comes after HTTP is left to it.
        """
        if self._force_close or self._close:
            return
        if self._upgraded or self._payload_parser is not None:
            super().data_received(data)
            return
        assert self._parser is not None
        messages: Any
        try:
            messages, self._upgraded, self._message_tail = self._parser.feed_data(data)
        except HttpProcessingError as error:
            messages = ((error.with_traceback(None), EMPTY_PAYLOAD),)
        if messages:
            self._messages.extend(messages)
            if len(self._messages) >= self._max_msg_queue_size and not self._buffer_paused:
                self._pause_reading_for_buffer()
        if not self._request_in_progress:
            self._next()

    def connection_lost(self, exc: BaseException | None) -> None:
        """End the request that runs, because its client is gone; or let it go on, if it is to be read to its end."""
        task = self._task_handler
        if task is not None and self.on_leaving is not None:
            goes_on, call = self.on_leaving
            if goes_on(call, task):
                self._task_handler = None
        super().connection_lost(exc)

    def resume_reading(self, resume_parser: bool = True) -> None:
        """Read on; aiohttp asks for it with every body, though hardly one was large enough to make it pause."""
        if self._reading_paused:
            super().resume_reading(resume_parser)

    def finish(self) -> None:
        """Take one more request, if it is on its way: its answer is the last one."""
        self._last = True

    def close(self) -> None:
        """Take no further request."""
        if self._request_in_progress:
            self._last = True  # its body may still be on its way, and what is closed is not read any more
            return
        super().close()
        if self.transport is not None:
            self.transport.close()

    def _next(self) -> None:
        if self._request_in_progress or not self._messages or self._parser is None:
            return
        self._request_in_progress = True  # first of all: to read on may bring the next request
        message, payload = self._messages.popleft()
        self._parser.message_consumed()
        if self._buffer_paused and len(self._messages) <= self._msg_queue_resume_size:
            self._resume_reading_if_drained()
        task = _started(self._run(message, payload), loop=self._loop)
        # aiohttp cancels it when the client is gone.
        self._task_handler = task if self._request_in_progress else None

    async def _run(self, message: Any, payload: StreamReader) -> None:
        keep_alive = False
        try:
            if isinstance(message, HttpProcessingError):
                self._refuse(message)
                return
            exchange = Exchange(self, message, payload)
            del payload  # a stream lets go of it
            try:
                await self._serve(exchange)
            except (Exception, GeneratorExit, SystemExit) as error:  # noqa: BLE001 - whatever it is, there is to be an answer
                log.error("request %s failed: %s", exchange.id, frames(error))
                await exchange.fail(mistake(), None)
            keep_alive = exchange.keep_alive
            if exchange.payload is not EMPTY_PAYLOAD and not exchange.payload.is_eof():
                keep_alive = await self._linger(exchange.payload) and keep_alive
        except ClientLeft:
            pass
        finally:
            # Also when it was cancelled: the client is gone, or the gateway stops.
            self._ended(keep_alive)

    async def _linger(self, payload: StreamReader) -> bool:
        """Read what is left of a body; whether it came to its end."""
        try:
            async with asyncio.timeout(LINGER_SECONDS):
                while not payload.is_eof():
                    await payload.readany()
        except (TimeoutError, HttpProcessingError, ClientPayloadError, RequestPayloadError):
            return False
        return True

    def _refuse(self, error: BaseException) -> None:
        """Answer what is not HTTP; aiohttp's own answer would echo it, with a traceback in the log for each."""
        log.debug("malformed request: %s", type(error).__name__)
        refusal = _refusal(error)
        body = orjson.dumps(refusal.body())
        id_ = new_id()
        lines = f"{of_error(refusal, None)}x-request-id: {id_}\r\ncontent-length: {len(body)}\r\n"
        if self._refused is not None:
            self._refused(id_, self.peername[0] if self.peername else None, refusal.status)
        if self.transport is not None:
            self.transport.write(head(refusal.status, f"{lines}connection: close\r\n") + body)

    def _ended(self, keep_alive: bool) -> None:
        self._request_in_progress = False
        self._task_handler = self.on_leaving = None
        if self._handler_waiter is not None and not self._handler_waiter.done():
            self._handler_waiter.set_result(None)
        if not keep_alive or self._last or self._force_close or self._close:
            self._close = True
            if self.transport is not None:
                self.transport.close()
            return
        self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
        if self._keepalive_handle is None:
            self._keepalive_handle = self._loop.call_at(self._next_keepalive_close_time, self._process_keepalive)
        if self._messages:
            self._loop.call_soon(self._next)

    def _process_keepalive(self) -> None:
        self._keepalive_handle = None
        if self._force_close or self._request_in_progress:
            return  # the end of the request looks again
        if self._loop.time() < self._next_keepalive_close_time:
            self._keepalive_handle = self._loop.call_at(self._next_keepalive_close_time, self._process_keepalive)
            return
        self.force_close()

    async def send(self, data: bytes) -> None:
        """Write; waits while the client does not read. Raises ClientLeft."""
        if not self.push(data):
            await self.drain()

    def push(self, data: bytes) -> bool:
        """Write; whether more may be written without a `drain`."""
        if self.transport is None:
            return False
        self.transport.write(data)
        return not self._paused

    @property
    def is_held(self) -> bool:
        """Whether there is a reason to `drain` before more is written."""
        return self._paused or self.transport is None

    async def drain(self) -> None:
        """Wait while the client does not read; raises ClientLeft."""
        try:
            await self._drain_helper()
        except OSError as error:
            raise ClientLeft from error


@define(eq=False, init=False)
class Exchange:
    """One request with its answer."""

    connection: Connection
    message: RawRequestMessage
    payload: StreamReader
    id: str
    most_bytes: int
    """How large the body may be; set before it is read."""
    keep_alive: bool
    """Whether the connection may take another request after this one."""
    begun: bool
    """Whether something of the answer was written."""
    status: int
    """Of the answer; what it is while there is none, stands for a client that left before one."""
    _events: bool
    """Whether what is written is a stream of events, in which an error can still be said."""
    _passed: bytes = field(repr=False)
    """The last piece of a stream that passed; set before anything of it is written."""
    _over: bool
    """Whether the last byte was handed over."""
    _chunked: bool

    # Written out: one that attrs makes looks up each of these values in a table, for every request.
    def __init__(self, connection: Connection, message: RawRequestMessage, payload: StreamReader) -> None:
        self.connection, self.message, self.payload = connection, message, payload
        self.id, self.status = new_id(), CLIENT_CLOSED
        self.keep_alive = not (message.should_close or message.upgrade)
        self.begun = self._events = self._over = self._chunked = False

    # --- the request ---------------------------------------------------------------------------

    @property
    def peer(self) -> str | None:
        """The client's address."""
        peer = self.connection.peername
        if peer == "":
            # A Unix socket, at which the supervisor passes on what came to the admin listener: it says from where.
            return self.message.headers.get(PEER)
        return peer[0] if peer else None

    async def read(self) -> bytes:
        """The body, bounded in size and slowness. Called after authentication: only then is 100-continue answered."""
        payload = self.payload
        if payload is EMPTY_PAYLOAD:
            body = b""
        else:
            if not payload.is_eof() or payload.exception() is not None:
                self._refuse_by_head()
                if payload.exception() is not None or not self._comes_at_once():
                    return b"".join([piece async for piece in self._arriving()])
                await self._whole_arrival()
            # The stream is not needed any more.
            buffered = payload._buffer  # `read_nowait` would count what is taken, for a flow that is over
            body = buffered[0] if len(buffered) == 1 else payload.read_nowait()
            self.payload = EMPTY_PAYLOAD
        if "content-encoding" in self.message.headers:
            self._refuse_by_head()
        if len(body) > self.most_bytes:
            raise _too_large(self.most_bytes)
        return body

    def pieces(self) -> AsyncGenerator[bytes]:
        """The body as it arrives, bounded as by `read`; what is not taken waits at the client."""
        self._refuse_by_head()
        return self._arriving()

    def _refuse_by_head(self) -> None:
        """Refuse a body that cannot be read or is too large, as its headers say."""
        headers = self.message.headers
        encoding = headers.get("content-encoding")
        if encoding is not None and encoding.strip().lower() not in {"identity", "gzip"}:
            raise unsupported_encoding()
        # The parser has refused what is no number.
        if int(headers.get("content-length", 0)) > self.most_bytes:
            raise _too_large(self.most_bytes)

    def _comes_at_once(self) -> bool:
        """Whether a body that is on its way is so small that it is waited for once, and not for each of its pieces."""
        headers = self.message.headers
        return "content-encoding" not in headers and 0 < int(headers.get("content-length", 0)) <= AT_ONCE_BYTES

    async def _whole_arrival(self) -> None:
        """Wait until the whole body is here; it may come as slowly as one that is taken piece by piece."""
        await self._invite()
        payload, loop = self.payload, asyncio.get_running_loop()
        began = loop.time()
        due = began + BODY_GRACE_SECONDS
        while not payload.is_eof():
            try:
                await _by(due, payload.wait_eof())
            except BodyTimedOut:
                due = began + BODY_GRACE_SECONDS + payload.total_bytes / BODY_BYTES_PER_SECOND
                if due <= loop.time():
                    raise

    async def _arriving(self) -> AsyncGenerator[bytes]:
        await self._invite()
        size, began = 0, asyncio.get_running_loop().time()
        due = began + BODY_GRACE_SECONDS
        while piece := await _by(due, self.payload.readany()):
            size += len(piece)
            if size > self.most_bytes:
                raise _too_large(self.most_bytes)
            yield piece
            due = began + BODY_GRACE_SECONDS + size / BODY_BYTES_PER_SECOND

    async def _invite(self) -> None:
        """Ask for a body whose client waits to be asked."""
        expected = self.message.headers.get("expect", "").lower()
        if expected == "100-continue" and self.message.version >= HttpVersion11:
            await self.connection.send(b"HTTP/1.1 100 Continue\r\n\r\n")

    # --- the answer ----------------------------------------------------------------------------

    async def relay(self, account: Account, reply: Reply) -> None:
        """Write a reply to the client as it comes; nothing is sent before the first good byte is in hand."""
        if account.call.left is not None:
            raise ClientLeft
        if reply.chunks is not None:
            await self._relay_stream(account, reply, reply.chunks)
            return
        body = reply.body or b""
        account.first_byte = time.monotonic()
        if not self._push_whole(reply.status, of_body(account, reply), body):
            await self.connection.drain()
        self._over = True
        account.bytes_out, account.delivered = len(body), True

    async def _relay_stream(self, account: Account, reply: Reply, chunks: AsyncIterator[bytes]) -> None:
        connection = self.connection
        self._events, self._passed = not reply.raw, b""

        def push(chunk: bytes) -> bool:
            """Write at once; whether more may be written without a `drain`."""
            size = len(chunk)
            self._passed = chunk
            account.bytes_out += size
            if (transport := connection.transport) is None:
                return False
            transport.write(b"%x\r\n%b\r\n" % (size, chunk) if self._chunked else chunk)
            return not connection._paused

        watcher = chunks if isinstance(chunks, Watcher) else None
        async for chunk in chunks:
            self._passed = chunk
            self._over = watcher is not None and watcher.is_over
            if self.begun:
                await self._write(chunk)
            else:
                account.first_byte = time.monotonic()
                await self._begin(reply.status, of_stream(account, reply), chunk)
                if self.payload.at_eof():
                    self.payload = EMPTY_PAYLOAD  # an open stream needs no buffer of what was read
            account.bytes_out += len(chunk)
            if watcher is not None and not self._over:
                await watcher.pour(push)
                if connection.is_held:
                    await connection.drain()
        if not self.begun:
            await self._begin(reply.status, of_stream(account, reply), b"")
        account.delivered = True
        if not self._over:
            await self._end()

    async def switch(self, lines: str) -> ClientSocket:
        """Leave HTTP for WebSocket; raises ClientLeft, or UpgradeRequired where HTTP is too old for it."""
        if not self.message.upgrade or self.message.version < HttpVersion11:
            raise UpgradeRequired("This path is served by WebSocket alone, which needs HTTP/1.1.")
        self.begun, self.status = True, 101
        self._over = True
        await self.connection.send(head(101, f"{lines}x-request-id: {self.id}\r\n"))
        socket = ClientSocket(self.connection)
        self.connection.set_parser(socket.parser)
        return socket

    async def plain(self, reply: Reply) -> None:
        """Write the reply of an endpoint as it is."""
        lines = sendable(reply.headers)
        if "content-type: " not in lines and reply.chunks is None:
            lines += "content-type: application/json\r\n"
        if reply.chunks is None:
            await self.whole(reply.status, lines, reply.body or b"")
            return
        async for chunk in reply.chunks:
            if self.begun:
                await self._write(chunk)
            else:
                await self._begin(reply.status, lines, chunk)
        if not self.begun:
            await self._begin(reply.status, lines, b"")
        await self._end()

    async def whole(self, status: int, lines: str, body: bytes) -> None:
        """Write a complete answer, all at once."""
        if not self._push_whole(status, lines, body):
            await self.connection.drain()
        self._over = True

    def _push_whole(self, status: int, lines: str, body: bytes) -> bool:
        if status in _BARE or self.message.method == "HEAD":
            lines = lines if status == 204 else f"{lines}content-length: {len(body)}\r\n"
            return self.connection.push(self._head(status, lines))
        return self.connection.push(self._head(status, f"{lines}content-length: {len(body)}\r\n") + body)

    async def fail(self, error: CallError, call: Call | None) -> None:
        """Write an error: as an answer, or, once a stream has begun, as its last event, without [DONE]."""
        if self.connection.transport is None:
            raise ClientLeft
        if call is not None:
            dialect = call.operation.dialect
        else:
            dialect = "messages" if self.message.path.startswith("/v1/messages") else ""
        if not self.begun:
            await self.whole(error.status, of_error(error, call), error_body(error, dialect, self.id))
        elif self._events and not self._over:
            if not self._passed.endswith(_EVENT_ENDS):
                # It broke inside an event: SDKs fail at half of one, and at what would be glued to it. Where an end
                # came in two pieces, more blank lines mean nothing.
                await self._write(b"\n\n")
            await self._write(error_event(error, dialect, self.id))
            await self._end()
        elif not self._over and self.connection.transport is not None:
            # A part of an answer is out, in which nothing can be said: the client must not take it for the whole.
            self.connection.transport.abort()

    def _head(self, status: int, lines: str) -> bytes:
        self.begun, self.status = True, status
        message, connection = self.message, self.connection
        lines = f"{lines}x-request-id: {self.id}\r\n"
        if message.path.startswith("/v1/messages"):
            lines += f"request-id: {self.id}\r\n"  # where Anthropic's clients look for it
        if not self.keep_alive or connection.is_closing:
            self.keep_alive = False
            lines += "connection: close\r\n"
        if message.version is HttpVersion11 or message.version >= HttpVersion11:
            return head(status, lines)
        if self.keep_alive:
            lines += "connection: keep-alive\r\n"
        return head(status, lines).replace(b"HTTP/1.1", b"HTTP/1.0", 1)

    async def _begin(self, status: int, lines: str, chunk: bytes) -> None:
        self._chunked = self.message.version >= HttpVersion11
        if self._chunked:
            lines += "transfer-encoding: chunked\r\n"
        else:
            self.keep_alive = False  # a client of HTTP/1.0 knows no chunks: its answer ends with the connection
        await self.connection.send(self._head(status, lines) + self._framed(chunk))

    def _write(self, chunk: bytes) -> Awaitable[None]:
        return self.connection.send(self._framed(chunk))

    def _framed(self, chunk: bytes) -> bytes:
        if not self._chunked:
            return chunk
        # An empty chunk ends the body.
        end = b"0\r\n\r\n" if self._over else b""
        return b"%x\r\n%b\r\n%b" % (len(chunk), chunk, end) if chunk else end

    async def _end(self) -> None:
        self._over = True
        if self._chunked:
            await self._write(b"")


async def _by(due: float, arriving: Awaitable[T]) -> T:
    """What arrives of a body, if it does in time and as its head says."""
    try:
        async with asyncio.timeout_at(due):
            return await arriving
    except TimeoutError:
        raise BodyTimedOut(f"The request body came slower than {BODY_BYTES_PER_SECOND} bytes a second.") from None
    except (HttpProcessingError, ClientPayloadError, RequestPayloadError):
        raise InvalidRequest("The request body does not arrive as its headers say.") from None


def _refusal(error: BaseException) -> CallError:
    if isinstance(error, ContentEncodingError):
        return unsupported_encoding()
    if isinstance(error, LineTooLong):
        return HeaderTooLarge(
            f"The request line or a header is longer than {HEADER_BYTES} bytes. If it is the token in Authorization, "
            "ask for one with fewer claims."
        )
    return InvalidRequest("The HTTP request is malformed.")


def unsupported_encoding() -> UnsupportedMedia:
    """The answer to a body in an encoding that is not read here."""
    return UnsupportedMedia("Unsupported content encoding. Send the body as it is, or with gzip.")


def _too_large(most: int) -> BodyTooLarge:
    return BodyTooLarge(f"The request body is larger than this gateway's limit of {most} bytes.")
