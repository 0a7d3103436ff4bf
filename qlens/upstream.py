"""The client side: pooled connections to providers, with deadlines, and their failures as our own errors."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from attrs import define, field, frozen

from qlens import __version__
from qlens.config import Network, Secret, Tls
from qlens.errors import (
    StartupError,
    UpstreamError,
    UpstreamInvalid,
    UpstreamTimedOut,
    UpstreamTooLarge,
    UpstreamTruncated,
    UpstreamUnavailable,
    UpstreamUnreachable,
)
from qlens.unsent import Unsent
from qlens.upstream_connection import Connection, Headers, Upload
from qlens.upstream_dialer import Dialer, Origin, Resolve, invalid_url

if TYPE_CHECKING:
    from qlens.session import Session
    from qlens.websocket import Client

__all__ = ["Answer", "Deadlines", "Upload", "Upstream", "extra_headers", "header_value", "http_url"]

_END_SECONDS = 1.0
"""How long the end of a body may take whose last event was read."""
_FREE_SECONDS = 1.0
"""When to come back while all connections are in use."""

# A request is framed here alone: a second opinion in a header is how two requests are made out of one.
_FRAMING = frozenset({"connection", "content-length", "expect", "te", "trailer", "transfer-encoding", "upgrade"})
_OURS = _FRAMING | {"accept", "accept-encoding", "content-encoding", "content-type", "host", "keep-alive"}
_HEADER_NAME = re.compile(r"[A-Za-z0-9-]+")
_WITHOUT_BODY = frozenset({"GET", "HEAD", "DELETE", "OPTIONS"})
_IDEMPOTENT = _WITHOUT_BODY | {"PUT", "TRACE"}
"""To be asked twice is no more to a peer than to be asked once. (RFC 9110, 9.2.2)"""
# Requests by method, URL and headers: those of a configuration are few, those that change with the call may be many.
_MAX_KNOWN = 256
_DEFAULTS = (("user-agent", f"qlens/{__version__}"), ("accept", "*/*"), ("accept-encoding", "identity"))


@frozen
class Deadlines:
    """How long a provider may take for each step; the time for the call as a whole is the core's own."""

    connect_seconds: float = 5.0
    """For name resolution, the TCP connection and the TLS handshake together."""
    first_byte_seconds: float = 120.0
    """From the connection to the first byte of the answer's body."""
    idle_seconds: float = 60.0
    """Between two pieces of the body."""


@define(eq=False)
class Bounds:
    """What holds for all connections of a gateway, and changes with its configuration."""

    answer_bytes: int = 128 * 1024 * 1024
    """The largest answer that is read as a whole, `server.max_answer_bytes`."""


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


def extra_headers(*own: str) -> Callable[[object, object, Mapping[str, Secret]], None]:
    """An attrs validator for more headers that a plugin lets the operator send; `own` are those it sets itself."""
    taken = _OURS.union(own)

    def check(_config: object, attribute: object, value: Mapping[str, Secret]) -> None:
        for name, secret in value.items():
            if not _HEADER_NAME.fullmatch(name):
                raise ValueError(f"{name!r} is not the name of a header: letters, digits and hyphens")
            if name.lower() in taken:
                raise ValueError(f"{name!r} is set by the gateway itself: remove it")
            header_value(None, attribute, secret)

    return check


@define(eq=False)
class Upstream:
    """Sends requests to providers; make it inside a running event loop and close it with `aclose`.

    Redirects are not followed, cookies and the environment's proxies are ignored.
    """

    max_connections: int | None = None
    """How many connections one origin may have; calls beyond it wait, up to their deadline for a connection."""
    proxy: str | None = field(default=None, repr=False)
    """`http://[user:password@]host:port` of a proxy that every connection goes through."""
    tls: Tls | None = None
    """For requests that say nothing else."""
    resolve: Resolve | None = field(default=None, repr=False)
    """What gives the addresses of hosts for `open`; None: the system's resolver."""
    unsent: Unsent = field(factory=Unsent, repr=False)
    """Who waits for a connection."""
    bounds: Bounds = field(factory=Bounds, repr=False)
    """Shared by the connections of one gateway."""
    _dialer: Dialer = field(init=False, repr=False)
    _peers: dict[Origin, _Peer] = field(init=False, factory=dict, repr=False)
    _known: dict[tuple[object, ...], _Known] = field(init=False, factory=dict, repr=False)
    _closed: bool = field(init=False, default=False)
    _sockets: Client | None = field(init=False, default=None, repr=False)

    def __attrs_post_init__(self) -> None:
        self._dialer = Dialer(self.proxy, self.resolve)

    @classmethod
    async def through(cls, network: Network, unsent: Unsent, bounds: Bounds) -> Upstream:
        """Connections that are made so; raises StartupError when the files of its `tls` cannot be used."""
        http = cls(network.max_connections, network.proxy, network.tls, unsent=unsent, bounds=bounds)
        if network.tls is not None:
            try:
                await http._dialer.context(network.tls)
            except UpstreamError as error:
                raise StartupError(f"network: {'; '.join(error.__notes__)}") from None
        return http

    async def open(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str],
        authorization: str | None = None,
        body: bytes | Upload | None,
        deadlines: Deadlines,
        tls: Tls | None = None,
    ) -> Answer:
        """Send a request and wait for the head of its answer, of whatever status; whoever gets an Answer closes it.

        `authorization` is for a header of this name that no other request has, as a signature: it is one more than
        `headers`, which most requests have in common and of which the head is kept.
        What a kept connection loses is sent once more if it cannot have arrived whole, or its method may be repeated.
        An Upload is read as fast as the provider takes it, and from its beginning again if it must be sent again.
        Raises UpstreamUnreachable, UpstreamTimedOut or UpstreamInvalid; reading the body also UpstreamTruncated.
        """
        known = self._known_request(method, url, headers, tls)
        head = known.head
        if authorization is not None:
            head += _authorizing(authorization)
        if body is None and method in _WITHOUT_BODY:
            head += b"\r\n"
        else:
            head = b"%bcontent-length: %d\r\n\r\n" % (head, len(body or b""))
        try:
            peer = known.peer or self._peer(known)
            return await peer.send(method, head, body or b"", deadlines)
        except UpstreamError as error:
            # For logs only: the message goes to clients, whom the provider's address does not concern.
            error.add_note(f"host: {known.origin.host}")
            raise

    async def connect(
        self,
        url: str,
        *,
        headers: Mapping[str, str],
        deadlines: Deadlines,
        protocols: Sequence[str] = (),
        tls: Tls | None = None,
    ) -> Session:
        """Open a WebSocket at an http or https URL; its messages are bounded, its pings are passed on and not answered.

        Raises UpstreamUnreachable, UpstreamTimedOut or UpstreamInvalid, or what the provider's refusal means.
        """
        if self._closed:
            raise _stopping()
        tls = tls or self.tls
        context = await self._dialer.context(tls) if url.startswith("https:") else None
        if self._sockets is None:
            from qlens.websocket import Client  # it needs this module's errors, and most gateways never need it

            self._sockets = Client(self.proxy)
        return await self._sockets.open(
            url,
            headers=headers,
            protocols=protocols,
            context=context,
            server_name=tls.server_name if tls is not None else None,
            seconds=deadlines.connect_seconds + deadlines.first_byte_seconds,
        )

    async def aclose(self) -> None:
        """Close all connections."""
        self._closed = True
        if self._sockets is not None:
            await self._sockets.aclose()
        for peer in self._peers.values():
            await peer.aclose()

    def _known_request(self, method: str, url: str, headers: Mapping[str, str], tls: Tls | None) -> _Known:
        """What all requests with these have in common, worked out once."""
        key = method, url, tls, *headers, *headers.values()
        if (known := self._known.get(key)) is None:
            origin, path = _split(url, tls or self.tls)
            if self.proxy is not None and origin.scheme == "http":
                path = f"http://{origin.authority}{path}"
                headers = {**headers, **self._dialer.proxy_headers}
            known = _Known(origin, _head(method, path, origin.authority, headers))
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
            self._known[key] = known
        return known

    def _peer(self, known: _Known) -> _Peer:
        origin = known.origin
        if (peer := self._peers.get(origin)) is None:
            if self._closed:
                raise _stopping()
            used = {origin: peer for origin, peer in self._peers.items() if not peer.is_unused()}
            if len(used) < len(self._peers):
                self._peers = used
                self._known.clear()  # they know those that are left out
            peer = self._peers[origin] = _Peer(origin, self._dialer, self.max_connections, self.unsent, self.bounds)
        known.peer = peer
        return peer


@define(eq=False)
class Answer:
    """The answer to one request: its head at once, its body as it arrives.

    A connection is used again only when the body was received to its end; else closing the answer closes the
    connection, so that a provider stops generating.
    """

    status: int
    headers: Headers = field(repr=False)
    _connection: Connection | None = field(repr=False)
    _peer: _Peer = field(repr=False)
    _deadlines: Deadlines = field(repr=False)
    _first_byte_at: float = field(repr=False)
    _next: bytes = field(default=b"", repr=False)  # the next piece, if there is one that comes from no connection
    _ended: bool = field(default=False, repr=False)
    _begun: bool = field(init=False, default=False, repr=False)

    async def read(self, limit: int | None = None) -> bytes:
        """Read the whole body and close; raises UpstreamTooLarge when it is larger than `limit` bytes.

        Without a limit that of the gateway holds, `server.max_answer_bytes`. An error of a good answer says whether it
        had `answered`: what has begun to come was made as a whole.
        """
        if limit is None:
            limit = self._peer.bounds.answer_bytes
        if self._ended and len(self._next) <= limit:
            whole, self._next, self._begun = self._next, b"", True
            return whole  # as with most answers, it was here with the head
        pieces: list[bytes] = []
        size = 0
        try:
            async for piece in self:
                size += len(piece)
                if size > limit:
                    raise UpstreamTooLarge(f"The provider sent a body of more than {limit} bytes.")
                if self._ended and not pieces:
                    return piece
                pieces.append(piece)
        except (UpstreamInvalid, UpstreamTruncated) as error:
            error.answered = self._begun and 200 <= self.status < 300
            raise
        finally:
            self._release()
        return b"".join(pieces)

    @property
    def is_closed(self) -> bool:
        """Whether the connection was let go: at the end of the body, or before."""
        return self._connection is None

    def chunks(self) -> AsyncIterator[bytes]:
        """Iterate over the body in the pieces in which it arrives."""
        return self

    def put_back(self, piece: bytes) -> None:
        """Let what was taken come once more, as the next piece."""
        self._next = piece

    async def close(self) -> None:
        """Let the connection go; may be called more than once."""
        self._release()
        if self._ended and not self._begun:
            self._ended, self._next = False, b""  # nobody has had it

    def leave(self) -> None:
        """Let the connection go, where the body lacks nothing but its end: if that comes soon, it is used again."""
        if (connection := self._connection) is not None:
            self._connection = None
            self._peer.give_back_at_end(connection)

    # Not a generator: one that is left in the middle would be closed by a task of the event loop, later.
    def __aiter__(self) -> Answer:
        return self

    async def __anext__(self) -> bytes:
        if self._next:
            piece, self._next, self._begun = self._next, b"", True
            return piece
        connection = self._connection
        if connection is None:
            if self._ended:
                raise StopAsyncIteration
            raise UpstreamTruncated("The provider's answer was closed before its end.")
        try:
            if (taken := connection.take()) is None:
                until = self._wait_until()
                while (taken := connection.take()) is None:
                    await connection.wait(until)
        except TimeoutError:
            self._release()
            raise (_paused(self._deadlines) if self._begun else _unanswered(self._deadlines)) from None
        except UpstreamError:
            self._release()
            raise
        self._begun = True
        if connection.is_over:
            self._ended = True
            self._release()
        if not taken:
            raise StopAsyncIteration
        return taken

    async def pour(self, sink: Callable[[bytes], bool]) -> None:
        """Give pieces to a function at once, as they arrive, until it returns False or the next one must be iterated.

        What it raises is raised here. For the middle of a body: its first and its last piece are not among them.
        """
        if self._connection is None or self._next or not self._begun:
            return
        try:
            await self._connection.pour(sink, self._deadlines.idle_seconds)
        except TimeoutError:
            self._release()
            raise _paused(self._deadlines) from None

    def _wait_until(self) -> float:
        # Time runs only while somebody waits: a client that reads slowly is not a provider that pauses.
        until = asyncio.get_running_loop().time() + self._deadlines.idle_seconds
        return until if self._begun else max(until, self._first_byte_at)

    def _release(self) -> None:
        if (connection := self._connection) is not None:
            self._connection = None
            self._peer.give_back(connection)


# --- requests ----------------------------------------------------------------------------------


@define(eq=False)
class _Known:
    """Where a request goes, and its head but for the length of its body."""

    origin: Origin
    head: bytes
    peer: _Peer | None = None
    """The connections for it, once it has been sent."""


def _head(method: str, path: str, authority: str, headers: Mapping[str, str]) -> bytes:
    # A signed request has another date every second: no step of Python for each header.
    fields = dict(zip(map(str.lower, headers), headers.values(), strict=True))
    if not _FRAMING.isdisjoint(fields):
        raise ValueError(f"header {min(_FRAMING & fields.keys())!r} follows from the body: leave it out")
    fields.setdefault("host", authority)
    for name, value in _DEFAULTS:
        fields.setdefault(name, value)
    try:
        text = "\r\n".join(map(": ".join, fields.items())) + "\r\n"
    except TypeError:
        name, value = next((name, value) for name, value in fields.items() if not isinstance(value, str))
        raise TypeError(f"the value of header {name!r} is of type {type(value).__name__}: give it as text") from None
    if text.count("\n") != len(fields) or text.count("\r") != len(fields) or "\0" in text:
        raise _broken_header(fields)
    return f"{method} {path} HTTP/1.1\r\n{text}".encode("utf-8", "surrogateescape")


def _authorizing(value: str) -> bytes:
    if "\n" in value or "\r" in value or "\0" in value:
        raise _broken_header({"authorization": value})
    return b"authorization: %b\r\n" % value.encode("utf-8", "surrogateescape")


def _broken_header(fields: Mapping[str, str]) -> ValueError:
    broken = next(name for name, value in fields.items() if not {*"\r\n\0"}.isdisjoint(name + value))
    return ValueError(f"the value of header {broken!r} has a line break or a NUL in it: remove it")


# The URLs of a configuration are few; those with an identifier in them may be many.
@lru_cache(maxsize=1024)
def _split(url: str, tls: Tls | None) -> tuple[Origin, str]:
    try:
        parts = urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    except (ValueError, KeyError):
        raise invalid_url() from None
    if not parts.hostname or parts.username is not None or not url.isascii() or not url.isprintable() or " " in url:
        raise invalid_url()
    # As it is written: to decode %3A would make another path of a signed or quoted one.
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Origin(parts.scheme, parts.hostname, port, tls if parts.scheme == "https" else None), path


# --- connections -------------------------------------------------------------------------------


@define(eq=False)
class _Peer:
    # The connections to one origin. The one used last is used next: the others grow old and close.
    _origin: Origin
    _dialer: Dialer
    _limit: int | None
    _unsent: Unsent
    bounds: Bounds
    _users: int = field(init=False, default=0)
    _connections: set[Connection] = field(init=False, factory=set)
    _idle: dict[Connection, None] = field(init=False, factory=dict)
    _slots: asyncio.Semaphore | None = field(init=False)
    _closed: bool = field(init=False, default=False)
    _all_lost: asyncio.Event = field(init=False, factory=asyncio.Event)
    _now: Callable[[], float] = field(init=False, factory=lambda: asyncio.get_running_loop().time)

    def __attrs_post_init__(self) -> None:
        self._slots = asyncio.Semaphore(self._limit) if self._limit is not None else None

    def is_unused(self) -> bool:
        return not self._users and not self._connections

    async def send(self, method: str, head: bytes, body: bytes | Upload, deadlines: Deadlines) -> Answer:
        bare = method == "HEAD"
        self._users += 1  # also while it waits: a peer that is waited for is not unused
        if self._slots is not None:
            await self._take_slot(self._slots, deadlines)
        connection: Connection | None = None
        try:
            while self._idle:
                connection, _ = self._idle.popitem()
                if connection.is_open():
                    break
            else:
                connection = await self._dial(deadlines)
            until = self._now() + deadlines.first_byte_seconds
            try:
                await connection.ask(head, body, until, bare=bare)
            except UpstreamUnreachable:
                if not connection.reused or connection.answered:
                    raise
                # A peer may close an idle connection at any moment. What has not reached it whole it has not begun,
                # and will not bill; whatever may have is an attempt of its own, which the receipt is to show.
                if not connection.unheard and method not in _IDEMPOTENT:
                    raise
                connection.abort()
                connection = await self._dial(deadlines)
                until = self._now() + deadlines.first_byte_seconds
                await connection.ask(head, body, until, bare=bare)
        except BaseException as error:
            if connection is not None:
                connection.abort()
            self._leave()
            if isinstance(error, TimeoutError):
                raise _unanswered(deadlines) from None
            raise
        status, headers, whole = connection.status, connection.headers, connection.whole()
        if whole is None:
            return Answer(status, headers, connection, self, deadlines, until)
        self.give_back(connection)
        return Answer(status, headers, None, self, deadlines, until, whole, True)

    def give_back(self, connection: Connection) -> None:
        if connection.free():
            self._idle[connection] = None
        self._leave()

    def give_back_at_end(self, connection: Connection) -> None:
        # A stream's last event and the chunk that ends its body are often two packets.
        until = self._now() + _END_SECONDS

        def look(waiter: asyncio.Future[None] | None) -> None:
            is_late = waiter is not None and (waiter.cancelled() or waiter.exception() is not None)
            is_needed = self._slots is not None and self._slots.locked()
            if is_late or is_needed or not connection.is_ending():
                self.give_back(connection)
            else:
                connection.wait(until).add_done_callback(look)

        look(None)

    async def aclose(self) -> None:
        self._closed = True
        for connection in tuple(self._connections):
            connection.abort()
        if self._connections:
            await self._all_lost.wait()

    async def _take_slot(self, slots: asyncio.Semaphore, deadlines: Deadlines) -> None:
        try:
            if not slots.locked():
                await slots.acquire()
                return
            with self._unsent.waiting():
                async with asyncio.timeout(deadlines.connect_seconds):
                    await slots.acquire()
        except BaseException as error:
            self._users -= 1
            if isinstance(error, TimeoutError):
                raise _all_taken(self._limit, deadlines) from None
            raise

    def _leave(self) -> None:
        self._users -= 1
        if self._slots is not None:
            self._slots.release()

    async def _dial(self, deadlines: Deadlines) -> Connection:
        until = self._now() + deadlines.connect_seconds
        try:
            with self._unsent.waiting():
                async with asyncio.timeout_at(until):
                    connection = await self._dialer.dial(self._origin, self._lost, until)
        except TimeoutError:
            raise _unconnected(deadlines) from None
        if self._closed:
            connection.abort()
            raise _stopping()
        if connection.is_open():
            self._connections.add(connection)
        return connection

    def _lost(self, connection: Connection) -> None:
        self._idle.pop(connection, None)
        self._connections.discard(connection)
        if self._closed and not self._connections:
            self._all_lost.set()


# --- errors ------------------------------------------------------------------------------------


def _unconnected(deadlines: Deadlines) -> UpstreamTimedOut:
    return UpstreamTimedOut(f"No connection to the provider within {deadlines.connect_seconds:g} s.")


def _all_taken(limit: int | None, deadlines: Deadlines) -> UpstreamUnavailable:
    taken = UpstreamUnavailable(
        f"No connection to the provider within {deadlines.connect_seconds:g} s: all {limit} that this gateway may have "
        "(`max_connections`) are in use. Please try again later.",
        code="upstream_connections",
        retry_after=_FREE_SECONDS,
    )
    taken.ours = True  # it was never asked
    return taken


def _unanswered(deadlines: Deadlines) -> UpstreamTimedOut:
    return UpstreamTimedOut(f"The provider did not answer within {deadlines.first_byte_seconds:g} s.")


def _paused(deadlines: Deadlines) -> UpstreamTimedOut:
    return UpstreamTimedOut(f"The provider paused for {deadlines.idle_seconds:g} s in the middle of its answer.")


def _stopping() -> UpstreamUnreachable:
    return UpstreamUnreachable("No connection to the provider: the gateway is stopping.")
