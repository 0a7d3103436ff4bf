"""WebSockets on both sides: a client's connection after its upgrade, and connections to providers."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping, Sequence
from contextlib import suppress
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import aiohttp
import orjson

# Its home is private, but the parser takes no other queue.
from aiohttp._websocket.reader import WebSocketDataQueue
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http import WSCloseCode, WSMsgType
from aiohttp.http_websocket import WebSocketError, WebSocketReader, WebSocketWriter
from aiohttp.streams import EofStream
from attrs import define, field

from qlens import __version__
from qlens.answers import ERROR_BODY_BYTES, retry_after
from qlens.errors import CallError, UpstreamInvalid, UpstreamTimedOut, UpstreamUnreachable
from qlens.provider_errors import error_from
from qlens.session import LOST, UNSAID, Frame, SessionClosed

FRAME_BYTES = 16 * 1024 * 1024
"""The longest message; OpenAI takes pieces of audio of up to 15 MiB."""
QUEUE_BYTES = 64 * 1024
"""How much may wait on a connection to be passed on before it is not read any more."""
CLOSE_SECONDS = 2
"""How long the other side may take to answer a closing frame."""

_REASON_BYTES = 123
_OPCODES = {"text": WSMsgType.TEXT, "bytes": WSMsgType.BINARY, "ping": WSMsgType.PING, "pong": WSMsgType.PONG}
_UNSENDABLE = {1004, UNSAID, LOST, 1015}


def _sendable(code: int, reason: str) -> tuple[int, bytes]:
    """A code and a reason as a closing frame may have them."""
    known = (1000 <= code <= 1014 and code not in _UNSENDABLE) or 3000 <= code <= 4999
    return code if known else 1000, reason.encode()[:_REASON_BYTES].decode(errors="ignore").encode()


def _frame(message: Any) -> Frame:
    """A message as aiohttp reads it; raises SessionClosed when it is the last one."""
    if message.type is WSMsgType.TEXT:
        return Frame("text", message.data)
    if message.type is WSMsgType.BINARY:
        return Frame("bytes", message.data)
    if message.type is WSMsgType.PING:
        return Frame("ping", bytes(message.data))
    if message.type is WSMsgType.PONG:
        return Frame("pong", bytes(message.data))
    if message.type is WSMsgType.CLOSE:
        raise SessionClosed(message.data or UNSAID, message.extra or "", clean=True)
    if message.type is WSMsgType.ERROR and isinstance(message.data, WebSocketError):
        raise SessionClosed(message.data.code, str(message.data))
    raise SessionClosed


@define(eq=False)
class _Masked:
    """Looks at the heads of a client's frames on their way to aiohttp's reader, which takes unmasked ones as well.

    A server must not (RFC 6455, section 5.1): a page could make what lies between believe that it is HTTP.
    """

    queue: WebSocketDataQueue
    reader: WebSocketReader
    _skip: int = field(default=0, init=False)
    """How many bytes come before the next head."""
    _head: bytes = field(default=b"", init=False)
    """The beginning of a head."""
    _broken: bool = field(default=False, init=False)

    def feed_data(self, data: bytes) -> tuple[bool, bytes]:
        """Take what has arrived; whether nothing more can be read."""
        size = len(data)
        if size <= self._skip:
            self._skip -= size
        elif self._broken:
            return True, b""
        elif (unmasked := self._look(data)) is not None:
            self._broken = True
            self.reader.feed_data(data[:unmasked])
            self.queue.set_exception(WebSocketError(WSCloseCode.PROTOCOL_ERROR, "A client's frames must be masked"))
            return True, b""
        return self.reader.feed_data(data)

    def feed_eof(self) -> None:
        """Nothing more will arrive."""
        self.reader.feed_eof()

    def _look(self, data: bytes) -> int | None:
        """Go from head to head; where a frame begins that is not masked."""
        before, place = len(self._head), self._skip
        seen = self._head + data if before else data
        while place + 1 < len(seen):
            length = seen[place + 1] - 128
            if length < 0:
                return max(0, place - before)
            more = 0 if length < 126 else 2 if length == 126 else 8
            if place + 2 + more > len(seen):
                break
            if more:
                length = int.from_bytes(seen[place + 2 : place + 2 + more], "big")
            place += 6 + more + length
        self._head, self._skip = seen[place:], max(0, place - len(seen))
        return None


@define(eq=False)
class ClientSocket:
    """A client's connection that has left HTTP."""

    protocol: BaseProtocol
    _queue: WebSocketDataQueue = field(init=False, repr=False)
    _parser: _Masked = field(init=False, repr=False)
    """Kept: while the client waits to be read, nobody else holds it."""
    _writer: WebSocketWriter = field(init=False, repr=False)
    _closed: SessionClosed | None = field(init=False, default=None)
    _closing: bool = field(init=False, default=False)

    def __attrs_post_init__(self) -> None:
        loop, transport = asyncio.get_running_loop(), self.protocol.transport
        if transport is None:
            raise SessionClosed
        self._queue = WebSocketDataQueue(self.protocol, QUEUE_BYTES, loop=loop)
        # Compression is not offered: audio hardly gets smaller, and a small frame cannot become a large one.
        reader = WebSocketReader(self._queue, FRAME_BYTES, compress=False, decode_text=False)
        self._parser = _Masked(self._queue, reader)
        self._writer = WebSocketWriter(self.protocol, transport)

    @property
    def parser(self) -> Any:
        """What the connection's bytes are for from now on."""
        return self._parser

    async def send(self, frame: Frame) -> None:
        """Send one frame; waits while the client does not read."""
        try:
            await self._writer.send_frame(frame.data, _OPCODES[frame.kind])
        except ConnectionError:
            raise SessionClosed from None

    async def receive(self) -> Frame:
        """The client's next frame."""
        if self._closed is not None:
            raise self._closed
        try:
            frame = _frame(await self._queue.read())
            if frame.kind == "text" and not frame.data.isascii():
                frame.data.decode()
            return frame
        except UnicodeDecodeError:
            self._closed = SessionClosed(WSCloseCode.INVALID_TEXT, "Invalid UTF-8 text message")
        except SessionClosed as closed:
            self._closed = closed
        except WebSocketError as error:
            self._closed = SessionClosed(error.code, str(error))
        except (EofStream, OSError):
            self._closed = SessionClosed()
        raise self._closed

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """Send a closing frame and wait for the client's own; whoever runs the connection closes it then."""
        if self._closing:
            return
        self._closing = True
        with suppress(ConnectionError, TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._writer.close(*_sendable(code, reason))
                await self._take_leave()

    async def _take_leave(self) -> None:
        """Read until the client has closed; else the connection would be reset, and the closing frame lost with it."""
        while self._closed is None:
            with suppress(SessionClosed):
                await self.receive()
        if not self._closed.clean and self._closed.code != LOST:
            # What it sends cannot be read any more. It leaves when it is told so, and that cancels this.
            await asyncio.sleep(CLOSE_SECONDS)


@define(eq=False)
class ProviderSocket:
    """A connection to a provider."""

    _socket: aiohttp.ClientWebSocketResponse[Any]
    _closing: bool = field(init=False, default=False)

    async def send(self, frame: Frame) -> None:
        """Send one frame; waits while the provider does not read."""
        try:
            await self._socket.send_frame(frame.data, _OPCODES[frame.kind])
        except (ConnectionError, aiohttp.ClientError):
            raise SessionClosed from None

    async def receive(self) -> Frame:
        """The provider's next frame."""
        return _frame(await self._socket.receive())

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """Send a closing frame, and close when the provider has answered it."""
        if not self._closing:
            self._closing = True
            known, said = _sendable(code, reason)
            await self._socket.close(code=known, message=said)


@define(eq=False)
class Client:
    """Opens WebSockets to providers; redirects are not followed, cookies and the environment's proxies are ignored."""

    proxy: str | None = field(default=None, repr=False)
    _http: aiohttp.ClientSession = field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),
            middlewares=(_only_upgrades,),
        )

    async def open(
        self,
        url: str,
        *,
        headers: Mapping[str, str],
        protocols: Sequence[str],
        context: ssl.SSLContext | None,
        server_name: str | None,
        seconds: float,
    ) -> ProviderSocket:
        """Open one within some seconds; raises an UpstreamError, or UpstreamRejected."""
        parts = urlsplit(url)
        place = urlunsplit(parts._replace(scheme={"ws": "http", "wss": "https"}.get(parts.scheme, parts.scheme)))
        try:
            async with asyncio.timeout(seconds):
                socket = await self._http.ws_connect(
                    place,
                    headers={"user-agent": f"qlens/{__version__}", **headers},
                    protocols=protocols,
                    timeout=aiohttp.ClientWSTimeout(ws_close=CLOSE_SECONDS),
                    autoclose=False,
                    autoping=False,
                    max_msg_size=FRAME_BYTES,
                    decode_text=False,
                    proxy=self.proxy,
                    ssl=context or True,
                    server_hostname=server_name if parts.scheme in {"https", "wss"} else None,
                )
        except TimeoutError:
            raise UpstreamTimedOut(f"The provider opened no session within {seconds:g} s.") from None
        except _Refused as refused:
            raise refused.error from None
        except aiohttp.WSServerHandshakeError:
            raise UpstreamInvalid("The provider opened a session in a way that is no WebSocket's.") from None
        except aiohttp.InvalidURL:
            raise UpstreamUnreachable("No connection to the provider: its configured URL is not valid.") from None
        except aiohttp.ClientConnectorCertificateError:
            raise UpstreamUnreachable(
                "No connection to the provider: its certificate is not trusted.", code="upstream_tls"
            ) from None
        except (aiohttp.ClientError, OSError):
            raise UpstreamUnreachable("No connection to the provider.") from None
        return ProviderSocket(socket)

    async def aclose(self) -> None:
        """Close all connections."""
        await self._http.close()


class _Refused(Exception):
    def __init__(self, error: CallError) -> None:
        super().__init__()
        self.error = error


async def _only_upgrades(request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
    """Raise what any other answer means; it also keeps aiohttp from taking the key along to where a redirect leads."""
    answer = await handler(request)
    if answer.status == HTTPStatus.SWITCHING_PROTOCOLS:
        return answer
    try:
        raise _Refused(await _refusal(answer))
    finally:
        answer.close()


async def _refusal(answer: aiohttp.ClientResponse) -> CallError:
    if answer.status < 400:
        return UpstreamInvalid(f"The provider answered with status {answer.status}, which opens no session.")
    try:
        said = orjson.loads(await _beginning(answer.content))
    except (orjson.JSONDecodeError, aiohttp.ClientError):
        said = {}  # the status says enough
    return error_from(said if isinstance(said, dict) else {}, answer.status, retry_after(answer.headers))


async def _beginning(body: aiohttp.StreamReader) -> bytes:
    """A body up to its end, or the most that an error may have: it may come in pieces."""
    said = b""
    while len(said) < ERROR_BODY_BYTES and (piece := await body.read(ERROR_BODY_BYTES - len(said))):
        said += piece
    return said
