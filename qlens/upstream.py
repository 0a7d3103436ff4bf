"""The client side: pooled connections to providers, with deadlines, and their failures as our own errors."""

from __future__ import annotations

import asyncio
import io
import os
import re
from collections.abc import AsyncIterator, Mapping
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from aiohttp import http_exceptions
from attrs import define, field, frozen
from yarl import URL

from qlens import __version__
from qlens.config import Secret
from qlens.errors import UpstreamError, UpstreamInvalid, UpstreamTimedOut, UpstreamTruncated, UpstreamUnreachable

__all__ = ["Answer", "Deadlines", "Upstream", "header_value", "http_url"]

MAX_BODY_BYTES = 32 * 1024 * 1024

# Shorter than what servers and load balancers in front of models usually grant an idle connection.
_KEEP_ALIVE_SECONDS = 15
# aiohttp warns when a larger body is handed over as bytes, and would write it in one go.
_LARGE_BODY_BYTES = 1024 * 1024
_LINE_BREAKS = re.compile(r"[\r\n\0]")


@frozen
class Deadlines:
    """How long a provider may take for each step; the time for the call as a whole is the core's own."""

    connect_seconds: float = 5.0
    """For name resolution, the TCP connection and the TLS handshake together."""
    first_byte_seconds: float = 120.0
    """From the connection to the first byte of the answer's body."""
    idle_seconds: float = 60.0
    """Between two pieces of the body."""


def http_url(_config: object, _attribute: object, value: str) -> None:
    """Check, as an attrs validator, that a setting is an http or https URL to which a path can be added."""
    parts = urlsplit(value)
    if parts.scheme not in {"http", "https"} or not parts.hostname or parts.port == 0:
        raise ValueError("must be a URL that begins with https:// or http:// and a host")
    if parts.username is not None or parts.query or parts.fragment:
        raise ValueError("must be a URL without user, query and fragment")
    if not value.isascii() or not value.isprintable() or " " in value:
        raise ValueError("must be a URL without blanks and with other than ASCII characters escaped")


def header_value(_config: object, _attribute: object, value: Any) -> None:
    """Check, as an attrs validator, that a text or Secret can be sent as the value of a header; never shows it."""
    text = value.reveal() if isinstance(value, Secret) else value
    if text is None:
        return
    if not text or text != text.strip() or not text.isascii() or not text.isprintable():
        raise ValueError("must be printable ASCII without blanks at its ends; look for a line break at the end")


@define(eq=False)
class Upstream:
    """Sends requests to providers; make it inside a running event loop and close it with `aclose`.

    Redirects are not followed, cookies and the environment's proxies are ignored.
    """

    _pool: aiohttp.ClientSession = field(init=False, factory=lambda: _session(reuse=True), repr=False)
    _fresh: aiohttp.ClientSession = field(init=False, factory=lambda: _session(reuse=False), repr=False)

    async def open(
        self, method: str, url: str, *, headers: Mapping[str, str], body: bytes | None, deadlines: Deadlines
    ) -> Answer:
        """Send a request and wait for the head of its answer, of whatever status; whoever gets an Answer closes it.

        Raises UpstreamUnreachable, UpstreamTimedOut or UpstreamInvalid; reading the body also UpstreamTruncated.
        """
        _refuse_line_breaks(headers)
        request = _Request(method, url, headers, body, deadlines)
        try:
            try:
                return await request.send(self._pool)
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
                if not request.reused_connection:
                    raise
            # The peer had closed the idle connection before the request arrived there: nobody has read it.
            return await request.send(self._fresh)
        except TimeoutError as error:
            raise _located(_timed_out(error, deadlines), url) from None
        except (aiohttp.ClientError, http_exceptions.HttpProcessingError) as error:
            raise _located(_not_answered(error), url) from None

    async def aclose(self) -> None:
        """Close all connections."""
        await self._pool.close()
        await self._fresh.close()


@define(eq=False)
class Answer:
    """The answer to one request: its head at once, its body as it arrives.

    A connection is used again only when the body was read to its end; else closing the answer closes the
    connection, so that a provider stops generating.
    """

    status: int
    headers: Mapping[str, str] = field(repr=False)
    """Case-insensitive."""
    _response: aiohttp.ClientResponse = field(repr=False)
    _deadlines: Deadlines = field(repr=False)
    _first_byte_at: float = field(repr=False)
    _begun: bool = field(init=False, default=False, repr=False)
    _loop: asyncio.AbstractEventLoop = field(init=False, factory=asyncio.get_running_loop, repr=False)

    async def read(self, limit: int = MAX_BODY_BYTES) -> bytes:
        """Read the whole body and close; raises UpstreamInvalid when it is larger than `limit` bytes."""
        parts: list[bytes] = []
        size = 0
        try:
            async for chunk in self.chunks():
                size += len(chunk)
                if size > limit:
                    raise UpstreamInvalid(f"The provider sent a body of more than {limit} bytes.")
                parts.append(chunk)
        finally:
            await self.close()
        return b"".join(parts)

    def chunks(self) -> AsyncIterator[bytes]:
        """Iterate over the body in the pieces in which it arrives."""
        return _Chunks(self)

    async def close(self) -> None:
        """Let the connection go; may be called more than once."""
        self._response.close()

    async def _next(self) -> bytes:
        """The next piece of the body, b"" at its end."""
        content = self._response.content
        try:
            # Most pieces are there already: only waiting needs a timer.
            chunk = content.read_nowait()
            if not chunk:
                idle_at = self._loop.time() + self._deadlines.idle_seconds
                async with asyncio.timeout_at(max(self._first_byte_at, idle_at)):
                    chunk = await content.readany()
        except TimeoutError as error:
            await self.close()
            raise (_paused(self._deadlines) if self._begun else _timed_out(error, self._deadlines)) from None
        except (aiohttp.ClientError, http_exceptions.HttpProcessingError) as error:
            await self.close()
            raise _cut(error) from None
        self._first_byte_at, self._begun = 0.0, True
        return chunk


@define(eq=False)
class _Chunks:
    # Not a generator: one that is left in the middle would be closed by a task of the event loop, later.
    _answer: Answer

    def __aiter__(self) -> _Chunks:
        return self

    async def __anext__(self) -> bytes:
        if chunk := await self._answer._next():
            return chunk
        raise StopAsyncIteration


@define(eq=False)
class _Request:
    # aiohttp tells it, through the session's traces, when it has a connection.
    method: str
    url: str
    headers: Mapping[str, str]
    body: bytes | None
    deadlines: Deadlines
    reused_connection: bool = field(init=False, default=False)
    _timer: asyncio.Timeout = field(init=False)
    _first_byte_at: float = field(init=False)

    async def send(self, session: aiohttp.ClientSession) -> Answer:
        self._timer = asyncio.timeout(None)
        async with self._timer:
            response = await session.request(
                self.method,
                # Left as it is written: yarl would decode %3A, and a signed or quoted path would no longer be the same.
                URL(self.url, encoded=True),
                headers=self.headers,
                data=io.BytesIO(self.body) if self.body and len(self.body) > _LARGE_BODY_BYTES else self.body,
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=None, connect=self.deadlines.connect_seconds, sock_connect=None),
                trace_request_ctx=self,
            )
        return Answer(response.status, response.headers, response, self.deadlines, self._first_byte_at)

    def connected(self, reused: bool) -> None:
        self.reused_connection = reused
        self._first_byte_at = asyncio.get_running_loop().time() + self.deadlines.first_byte_seconds
        self._timer.reschedule(self._first_byte_at)


def _session(reuse: bool) -> aiohttp.ClientSession:
    # aiohttp allows 100 connections by default and lets the next stream wait for one without a word.
    connector = (
        aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_SECONDS)
        if reuse
        else aiohttp.TCPConnector(limit=0, force_close=True)
    )
    trace = aiohttp.TraceConfig()
    trace.on_connection_create_end.append(_connection_created)
    trace.on_connection_reuseconn.append(_connection_reused)
    return aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"user-agent": f"qlens/{__version__}", "accept-encoding": "identity"},
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),
        trace_configs=[trace],
        trust_env=False,
    )


async def _connection_created(_session: aiohttp.ClientSession, context: SimpleNamespace, _params: Any) -> None:
    context.trace_request_ctx.connected(reused=False)


async def _connection_reused(_session: aiohttp.ClientSession, context: SimpleNamespace, _params: Any) -> None:
    context.trace_request_ctx.connected(reused=True)


def _refuse_line_breaks(headers: Mapping[str, str]) -> None:
    for name, value in headers.items():
        if _LINE_BREAKS.search(name) or _LINE_BREAKS.search(value):
            raise ValueError(f"the value of header {name!r} has a line break or a NUL in it: remove it")


def _located(error: UpstreamError, url: str) -> UpstreamError:
    # For logs only: the message goes to clients, whom the provider's address does not concern.
    error.add_note(f"host: {URL(url, encoded=True).host}")
    return error


def _timed_out(error: TimeoutError, deadlines: Deadlines) -> UpstreamTimedOut:
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return UpstreamTimedOut(f"No connection to the provider within {deadlines.connect_seconds:g} s.")
    return UpstreamTimedOut(f"The provider did not answer within {deadlines.first_byte_seconds:g} s.")


def _paused(deadlines: Deadlines) -> UpstreamTimedOut:
    return UpstreamTimedOut(f"The provider paused for {deadlines.idle_seconds:g} s in the middle of its answer.")


def _not_answered(error: Exception) -> UpstreamError:
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return UpstreamUnreachable("No connection to the provider: its host name has no address.")
    if isinstance(error, (aiohttp.ClientSSLError, aiohttp.ServerFingerprintMismatch)):
        return _no_tls(error)
    if isinstance(error, aiohttp.ClientConnectorError):
        reason = f": {os.strerror(error.errno).lower()}" if error.errno else ""
        return UpstreamUnreachable(f"No connection to the provider{reason}.")
    if isinstance(error, aiohttp.InvalidURL):
        return UpstreamUnreachable("No connection to the provider: its configured URL is not valid.")
    if isinstance(error, (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError)):
        return UpstreamUnreachable("The provider closed the connection before it answered.")
    return UpstreamInvalid("The provider's answer is not valid HTTP.")


def _no_tls(error: Exception) -> UpstreamUnreachable:
    untrusted = isinstance(error, (aiohttp.ClientConnectorCertificateError, aiohttp.ServerFingerprintMismatch))
    reason = "its certificate is not trusted" if untrusted else "the TLS handshake failed"
    refused = UpstreamUnreachable(f"No connection to the provider: {reason}.", code="upstream_tls")
    refused.again = False
    return refused


def _cut(error: Exception) -> UpstreamError:
    # aiohttp wraps whatever is wrong with a body into one class; only the cause tells a cut body from a broken one.
    cause = error.__cause__ or error
    if isinstance(cause, http_exceptions.ContentEncodingError):
        return UpstreamInvalid("The provider's answer is compressed in a way that cannot be read.")
    if isinstance(cause, http_exceptions.BadHttpMessage) and not isinstance(
        cause, (http_exceptions.ContentLengthError, http_exceptions.TransferEncodingError)
    ):
        return UpstreamInvalid("The framing of the provider's answer is broken.")
    return UpstreamTruncated("The provider closed the connection in the middle of its answer.")
