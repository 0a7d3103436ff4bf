"""One connection to a peer: a request goes out, its answer is parsed as it arrives, under strict framing."""

from __future__ import annotations

import asyncio
import fcntl
import math
import os
import re
import sys
import termios
import zlib
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import aclosing, suppress
from functools import lru_cache
from typing import Any, Protocol, cast, overload

import httptools
from attrs import Factory, define, field

from qlens.errors import UpstreamError, UpstreamInvalid, UpstreamTruncated, UpstreamUnreachable
from qlens.unsent import marked

__all__ = ["READ_BYTES", "Connection", "Headers", "Upload"]

READ_BYTES = 64 * 1024
"""The size of the buffer that all connections of one event loop read into."""

# Pieces that nobody has taken: over this, the transport stops reading, and TCP makes the peer wait.
_MAX_WAITING_BYTES = 64 * 1024
# A head with its interim answers, a chunk's line or the trailers: what a peer may send without a byte of a body.
_MAX_FRAMING_BYTES = 64 * 1024
_MAX_FIELD_BYTES = 8190
_MAX_FIELDS = 128
_MAX_SURE_BYTES = 4 * _MAX_FIELDS  # a head up to this size is within those bounds: a field has at least four bytes
# How far a compressed body may grow, beside what every body may.
_MAX_RATIO = 100
# A request up to this size is one write; a larger one waits for the transport to drain.
_WRITE_BYTES = 64 * 1024
_IDLE_SECONDS = 15.0
_NEVER = math.inf
_FRAMING = re.compile(rb"\r\n(content-length|transfer-encoding|content-encoding):")
_PLAIN = [b"content-length"]
_CHUNKED = b"\r\ntransfer-encoding: chunked\r\n"
_END = b"\r\n\r\n"
_NAME = re.compile(r"[!#-'*+.^-z|~0-9-]+")
_CODINGS = frozenset({"gzip", "x-gzip", "deflate"})
_NO_BODY = frozenset({204, 304})
_UNANSWERED = "The provider closed the connection before it answered."
_NOT_HTTP = "The provider's answer is not valid HTTP."
_COMPRESSED = "The provider's answer is compressed in a way that cannot be read."
_BROKEN = "The framing of the provider's answer is broken."
_TOO_MANY = "The provider's answer has too many headers."


@define(eq=False)
class Headers(Mapping[str, str]):
    """The headers of an answer by lower-cased name, found in any case; of a name that came twice, the first."""

    # Of the many headers of an answer few are read: they are looked for then. Every line ends with a line end.
    _head: bytes = field(default=b"\r\n", repr=False)
    _lowered: bytes = field(default=b"\r\n", repr=False)

    def __getitem__(self, name: str) -> str:
        if (value := self.get(name)) is None:
            raise KeyError(name)
        return value

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and _beginning(name) in self._lowered

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(name.decode() for name, _ in _fields(self._lowered)))

    def __len__(self) -> int:
        return len({name for name, _ in _fields(self._lowered)})

    @overload  # type: ignore[override]
    def get(self, name: str) -> str | None: ...
    @overload
    def get(self, name: str, default: str) -> str: ...
    def get(self, name: str, default: str | None = None) -> str | None:
        """The value of a header, or the default."""
        beginning = _beginning(name)
        found = self._lowered.find(beginning)
        if found < 0:
            return default
        start = found + len(beginning)
        return _text(self._head[start : self._head.index(b"\r\n", start)])

    def found(self, names: tuple[str, ...]) -> dict[str, str]:
        """Those of these headers that are among them, by lower-cased name."""
        there = _any_of(names).findall(self._lowered)
        return {name: self.get(name, "") for name in map(bytes.decode, there)} if there else {}


class Upload(Protocol):
    """A request's body that is sent piece by piece; iterated anew, it starts at its beginning."""

    def __len__(self) -> int:
        """Its bytes, all pieces together."""

    def __aiter__(self) -> AsyncGenerator[bytes]: ...


# The stages of a connection. Numbers and no enum: they are compared several times for every piece that arrives.
_IDLE = 0  # no request is out: whatever arrives now is not asked for
_HEAD = 1
_BODY = 2
_OVER = 3  # the whole answer is here, and may be still to be taken
_LOST = 4

_UNFINISHED = (_HEAD, _BODY)
_UNASKED = (_IDLE, _LOST)


class _Malformed(Exception):
    """What a callback of the parser raises; the message goes to the client."""


@define(eq=False)
class _Inflater:
    # For the peers that compress although they were asked not to.
    _coding: str
    _stream: Any = field(init=False, factory=lambda: zlib.decompressobj(zlib.MAX_WBITS | 32))  # gzip or zlib
    _fed: int = field(init=False, default=0)
    _given: int = field(init=False, default=0)

    def feed(self, data: bytes) -> bytes:
        self._fed += len(data)
        room = self._fed * _MAX_RATIO - self._given
        if self._coding.lower() not in _CODINGS:
            raise _Malformed(_COMPRESSED)
        try:
            inflated: bytes = self._stream.decompress(data, room)
        except zlib.error:
            raise _Malformed(_COMPRESSED) from None
        if self._stream.unconsumed_tail or self._stream.unused_data:
            raise _Malformed(_COMPRESSED)
        self._given += len(inflated)
        return inflated

    def is_at_end(self) -> bool:
        return self._stream.eof or not self._fed


@define(eq=False)
class Connection(asyncio.BufferedProtocol):
    """A transport with at most one exchange on it; who has it asks, then takes the body, then frees or aborts it.

    Nothing is raised into the event loop: whatever goes wrong is kept as `fault` and met by the one who waits.
    """

    _buffer: memoryview = field(repr=False)
    _on_lost: Callable[[Connection], None] = field(repr=False)
    reused: bool = field(init=False, default=False)
    """Whether the exchange is not the first one here."""
    unheard: bool = field(init=False, default=False)
    """Whether it broke before the peer can have had the whole request."""
    status: int = field(init=False, default=0)
    headers: Headers = field(init=False, factory=Headers, repr=False)
    fault: tuple[type[UpstreamError], str] | None = field(init=False, default=None)
    """What broke it. The error is made when it is met: one that is kept has a traceback that keeps this in turn."""
    _loop: asyncio.AbstractEventLoop = field(init=False, factory=asyncio.get_running_loop, repr=False)
    _transport: asyncio.Transport = field(init=False, repr=False)
    _found: list[bytes] = field(init=False, factory=list, repr=False)  # where the parser puts what it finds of a body
    _parser: httptools.HttpResponseParser = field(
        init=False, default=Factory(httptools.HttpResponseParser, takes_self=True), repr=False
    )
    _stage: int = field(init=False, default=_IDLE)
    _waiter: asyncio.Future[None] | None = field(init=False, default=None, repr=False)
    _sink: Callable[[bytes], bool] | None = field(init=False, default=None, repr=False)
    _idle_seconds: float = field(init=False, default=_NEVER)  # how long the sink waits for a piece
    _until: float = field(init=False, default=_NEVER, repr=False)
    _timer: asyncio.TimerHandle | None = field(init=False, default=None, repr=False)
    _due: float = field(init=False, default=_NEVER, repr=False)  # when the timer calls
    _pieces: list[bytes] = field(init=False, default=Factory(lambda self: self._found, takes_self=True), repr=False)
    """What is to be taken: mostly what was found, as it is."""
    _waiting: int = field(init=False, default=0)  # bytes in those pieces, with the framing around them
    _begun: bytes = field(init=False, default=b"", repr=False)  # what came while the head was not whole
    _interim: int = field(init=False, default=0)  # answers before the one that counts
    _silent: int = field(init=False, default=0)  # bytes since the last one of a body
    _bare: bool = field(init=False, default=False)  # the answer has a head only, whatever it says
    _to_the_end: bool = field(init=False, default=False)  # the body ends with the connection
    _reusable: bool = field(init=False, default=True)  # what ends that ends it for good
    _undrained: bool = field(init=False, default=False)
    _inflater: _Inflater | None = field(init=False, default=None, repr=False)

    # --- for the one who has it ----------------------------------------------------------------

    @property
    def answered(self) -> bool:
        """Whether a byte of the answer has arrived."""
        return self._silent > 0 or self.status != 0

    @property
    def is_over(self) -> bool:
        """Whether the whole answer is here: what is left of it is one more `take`."""
        return self._stage == _OVER

    def is_ending(self) -> bool:
        """Whether nothing of the body waits to be taken, and more of it, or its end, may still come."""
        return self._stage == _BODY and not self._pieces

    async def ask(self, head: bytes, body: bytes | Upload, until: float, *, bare: bool = False) -> None:
        """Send a request and wait for the head of its answer; TimeoutError at `until`, by the loop's clock.

        `bare` says that the answer to this request has no body: HEAD, CONNECT.
        """
        if self._stage != _IDLE:
            raise self._broken() if self.fault else UpstreamUnreachable(_UNANSWERED)
        self.status = self._silent = 0
        self._stage, self._bare = _HEAD, bare
        if bare:
            self._reusable = False  # after a head without the body that it announces, the parser would wait for one
        if not isinstance(body, bytes):
            self._write(head)
            with marked():
                await self._write_pieces(body, until)
        elif len(body) <= _WRITE_BYTES:
            self._write(head + body)
        else:
            self._write(head)
            with marked():
                await self._write_in_parts(body, until)
        while self._stage == _HEAD:
            await self.wait(until)
        if self.fault is not None and not self.status:
            raise self._broken()

    def take(self) -> bytes | None:
        """What has arrived of the body, b"" at its end, None when one must `wait`; raises what broke it after that."""
        if pieces := self._pieces:
            if len(pieces) == 1:
                piece = pieces.pop()
            else:
                piece = b"".join(pieces)
                pieces.clear()
            if self._waiting > _MAX_WAITING_BYTES:
                self._transport.resume_reading()
            self._waiting = 0
            return piece
        if self.fault is not None:
            raise self._broken()
        return b"" if self._stage == _OVER else None

    def whole(self) -> bytes | None:
        """What is left of the body if all of it is here, else None."""
        return self.take() if self._stage == _OVER else None

    def wait(self, until: float) -> asyncio.Future[None]:
        """What to await until something has happened; TimeoutError at `until`."""
        self._until = until
        if until < self._due:
            self._set_timer(until)
        waiter: asyncio.Future[None] = asyncio.Future(loop=self._loop)
        self._waiter = waiter
        return waiter

    async def pour(self, sink: Callable[[bytes], bool], idle_seconds: float) -> None:
        """Give what arrives of the body to a function at once, until that returns False or the rest is for `take`.

        What the function raises is raised here; TimeoutError when nothing has arrived for so many seconds.
        """
        if self._pieces or self._stage != _BODY:
            return
        self._sink, self._idle_seconds = sink, idle_seconds
        try:
            await self.wait(self._loop.time() + idle_seconds)
        finally:
            self._sink = None

    def free(self) -> bool:
        """End the exchange; False when the connection cannot be used for another one and was closed."""
        if self._stage != _OVER or not self._reusable or self._pieces or self._transport.get_write_buffer_size():
            self.abort()
            return False
        self._stage, self._waiter, self.reused, self._pieces = _IDLE, None, True, self._found
        self._until = until = self._loop.time() + _IDLE_SECONDS
        if until < self._due:
            self._set_timer(until)
        return True

    def abort(self) -> None:
        """Close at once: a peer that is still generating must learn of it."""
        self._transport.abort()

    def is_open(self) -> bool:
        """Whether a request can be sent."""
        return self._stage == _IDLE and not self._transport.is_closing()

    def detach(self) -> asyncio.Transport:
        """Give the transport away, for TLS through a tunnel."""
        self._stage = _LOST
        self._stop_watching()
        del self._parser
        return self._transport

    # --- asyncio's side ------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Asyncio's callback."""
        self._transport = cast(asyncio.Transport, transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Asyncio's callback; the parser copies what it keeps before any other connection reads."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Asyncio's callback."""
        stage = self._stage
        if stage in _UNASKED:
            self.abort()
            return
        self._silent += nbytes
        read = self._buffer[:nbytes]
        if stage == _HEAD:
            self._begun += read
        try:
            self._parser.feed_data(read)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._break(error)
        if self._found:
            self._silent = 0
            if self._found is not self._pieces:
                self._unpack()
            elif self._sink is None or self._stage != _BODY:
                self._waiting += nbytes
            else:
                self._pour(self._sink)
                return
        if self._silent > _MAX_FRAMING_BYTES and self._stage in _UNFINISHED:
            self._fail(_BROKEN)
        elif self._waiting > _MAX_WAITING_BYTES and self._stage == _BODY:
            self._transport.pause_reading()
        if self._sink is None:
            self._wake()
        else:
            self._pour(self._sink)

    def pause_writing(self) -> None:
        """Asyncio's callback."""
        self._undrained = True

    def resume_writing(self) -> None:
        """Asyncio's callback."""
        self._undrained = False
        self._wake()

    def eof_received(self) -> None:
        """Asyncio's callback, before the transport closes; with TLS, before that says goodbye in turn."""
        if self._stage == _HEAD:
            self.unheard = bool(self._transport.get_write_buffer_size() or _unacknowledged(self._transport))
            self._lose()
            self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        """Asyncio's callback; also at the end of a body without a length."""
        if self._stage == _HEAD and isinstance(exc, BrokenPipeError):
            self.unheard = True  # as in `_write`: TLS does not tell there
        if exc is not None and self._stage in _UNFINISHED:
            self._read_what_came()
        self._stop_watching()
        self._reusable = False
        if self._stage == _BODY and self._to_the_end and exc is None and self._is_unpacked():
            self._stage = _OVER
        elif self._stage != _OVER:
            self._lose()
        del self._parser  # which refers back to this object
        self._wake()
        self._on_lost(self)

    # --- the parser's side ---------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """The parser's callback."""
        if self._stage != _HEAD:
            raise _Malformed(_BROKEN)

    def on_headers_complete(self) -> None:
        """The parser's callback, for interim answers as well."""
        status = self._parser.get_status_code()
        if not 200 <= status <= 599:
            self._take_interim(status)
            return
        # The parser has seen to it that every field is well-formed; to be told of each by it would cost more than all
        # the rest of an answer.
        came, self._begun = self._begun, b""
        is_first = came.startswith(b"HTTP/1.1") and not self._interim
        head = came[: came.index(_END) + 2] if is_first else self._last_head(came)
        if len(head) > _MAX_SURE_BYTES:
            _check_size(head)
        lowered = head.lower()
        framing = _FRAMING.findall(lowered)
        is_plain = is_first and framing == _PLAIN and not self._bare and status not in _NO_BODY
        headers = Headers(head, lowered)
        self._stage = _BODY if is_plain else self._framed(status, headers, lowered, framing)
        if not self._parser.should_keep_alive():
            self._reusable = False
        self.status, self.headers = status, headers
        self._silent = 0

    @property
    def on_body(self) -> Callable[[bytes], None]:
        """The parser's callback: a stream has a piece for every event, and none of them needs a look."""
        return self._found.append

    def on_message_complete(self) -> None:
        """The parser's callback, for interim answers as well."""
        if self._stage == _BODY:
            if self._inflater is not None:
                self._inflate(self._inflater)
                if not self._inflater.is_at_end():
                    raise _Malformed(_BROKEN)
                self._inflater = None
            self._stage = _OVER

    # --- inside --------------------------------------------------------------------------------

    def _take_interim(self, status: int) -> None:
        if not 100 <= status <= 199 or self._parser.get_http_version() not in {"1.1", "1.0"}:
            raise _Malformed(_NOT_HTTP)
        self._interim += 1

    def _framed(self, status: int, headers: Headers, lowered: bytes, framing: list[bytes]) -> int:
        """Find out where the body of an answer ends and how it is packed; the stage that follows its head.

        `framing` are the names of the fields that say so, in lower case.
        """
        if len(framing) > 1 and len(set(framing)) < len(framing):
            raise _Malformed(_BROKEN)
        has_length, is_chunked = b"content-length" in framing, b"transfer-encoding" in framing
        if is_chunked and (has_length or lowered.startswith(b"http/1.0") or not _says_chunked(headers, lowered)):
            raise _Malformed(_BROKEN)
        self._bare = self._bare or status in _NO_BODY
        if self._bare:
            self._pieces = []
            return _OVER
        self._to_the_end = not has_length and not is_chunked
        if b"content-encoding" in framing and (coding := headers["content-encoding"]) not in ("", "identity"):
            self._inflater, self._pieces = _Inflater(coding), []
        return _BODY

    def _unpack(self) -> None:
        """Take what was found of a body that is compressed, or should not be there."""
        if self._inflater is None:
            self._found.clear()
            self._reusable = False
            self._fail(_BROKEN)
            return
        try:
            self._inflate(self._inflater)
        except _Malformed as error:
            self._reusable = False
            self._fail(str(error))

    def _inflate(self, inflater: _Inflater) -> None:
        found = self._found[:]
        self._found.clear()
        for piece in found:
            if data := inflater.feed(piece):
                self._pieces.append(data)
                self._waiting += len(data)

    def _last_head(self, came: bytes) -> bytes:
        """The head of an older version, or behind interim ones or line ends; it keeps one line end at its end."""
        came = came.lstrip(b"\r\n")
        while self._interim:
            came = came[came.index(_END) + len(_END) :].lstrip(b"\r\n")
            self._interim -= 1
        # The parser would take other protocols, too.
        if not came.startswith((b"HTTP/1.1", b"HTTP/1.0")):
            raise _Malformed(_NOT_HTTP)
        return came[: came.index(_END) + 2]

    def _write(self, data: bytes | memoryview) -> None:
        self._transport.write(data)
        if self._transport.is_closing():
            self.unheard = True  # the kernel has not taken it

    async def _write_in_parts(self, body: bytes, until: float) -> None:
        view = memoryview(body)
        for start in range(0, len(body), _WRITE_BYTES):
            if not await self._takes_more(until):
                return
            self._write(view[start : start + _WRITE_BYTES])

    async def _write_pieces(self, body: Upload, until: float) -> None:
        self._until = _NEVER  # a kept connection is not idle any more, though a piece may be waited for first
        async with aclosing(body.__aiter__()) as pieces:
            async for piece in pieces:
                if not await self._takes_more(until):
                    return
                self._write(piece)

    async def _takes_more(self, until: float) -> bool:
        """Wait until the peer has read what was written; whether it wants the rest of the request."""
        while self._undrained and self._is_unanswered():
            await self.wait(until)
        if self._is_unanswered():
            return True
        # Answered, or gone, before it has read the request.
        self._reusable, self.unheard = False, not self.answered
        return False

    def _read_what_came(self) -> None:
        """Read what came before a write failed: asyncio closes without it, though a peer may answer early.

        (RFC 9112, 9.5.) With TLS, what has not been read yet can be read by nobody else.
        """
        if self._transport.get_extra_info("ssl_object") is not None:
            return
        descriptor = self._transport.get_extra_info("socket").fileno()
        with suppress(OSError):  # all has been read, or the other side has taken it back
            while self._stage in _UNFINISHED and (size := os.readv(descriptor, [self._buffer])):
                self.buffer_updated(size)

    def _break(self, error: Exception) -> None:
        cause = error.__context__
        # Without a cause it is an error of before, which the parser says again.
        if isinstance(error, httptools.HttpParserCallbackError) and not isinstance(cause, _Malformed | None):
            raise error  # a mistake of ours
        self._reusable = False
        if self._stage == _OVER and not self._bare:
            return  # what follows an answer is not a part of it
        if isinstance(cause, _Malformed):
            self._fail(str(cause))
        else:
            self._fail(_NOT_HTTP if self._stage == _HEAD else _BROKEN)

    def _fail(self, message: str) -> None:
        self.fault = UpstreamInvalid, message
        self._stage = _LOST
        self.abort()

    def _lose(self) -> None:
        if self._stage == _HEAD:
            self.fault = UpstreamUnreachable, _UNANSWERED
        elif self._stage == _BODY:
            self.fault = UpstreamTruncated, "The provider closed the connection in the middle of its answer."
        self._stage = _LOST

    def _broken(self) -> UpstreamError:
        assert self.fault is not None
        kind, message = self.fault
        return kind(message)

    def _is_unanswered(self) -> bool:
        return self._stage == _HEAD

    def _is_unpacked(self) -> bool:
        return self._inflater is None or self._inflater.is_at_end()

    def _pour(self, sink: Callable[[bytes], bool]) -> None:
        """Spare the one who waits a turn of the event loop for every piece; the end of the body is left for him."""
        waiter, pieces = self._waiter, self._pieces
        if self._stage == _BODY and waiter is not None and not waiter.done():
            if len(pieces) == 1 and not self._waiting:
                piece = pieces.pop()  # what `take` does, for what nearly always arrives
            elif (taken := self.take()) is None:
                return
            else:
                piece = taken
            try:
                goes_on = sink(piece)
            except BaseException as error:  # noqa: BLE001 - not the event loop's
                self._wake(error)
                return
            if goes_on:
                self._until = self._loop.time() + self._idle_seconds
                return
        self._wake()

    def _wake(self, error: BaseException | None = None) -> None:
        self._sink = None
        if (waiter := self._waiter) is None:
            return
        # The timer stays: it costs less to find nothing to do than to be made anew for every piece.
        self._waiter, self._until = None, _NEVER
        if waiter.done():
            return  # cancelled
        if error is None:
            waiter.set_result(None)
        else:
            waiter.set_exception(error)

    def _set_timer(self, due: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._due = self._loop.call_at(due, self._on_time), due

    def _on_time(self) -> None:
        self._timer, self._due = None, _NEVER
        if self._loop.time() < self._until:
            if self._until < _NEVER:
                self._set_timer(self._until)
        elif self._waiter is None:
            self.abort()  # idle for long enough
        else:
            self._wake(TimeoutError())

    def _stop_watching(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer, self._due = None, _NEVER


def _unacknowledged(transport: asyncio.Transport) -> int:
    """How many bytes were sent that the peer has not acknowledged; 0 where the system does not say.

    The segment that closes a connection acknowledges all that had arrived when the peer closed it.
    """
    try:
        found = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
    except OSError:
        return 0
    return int.from_bytes(found, sys.byteorder)


# The names that are asked for are few.
@lru_cache(maxsize=256)
def _beginning(name: str) -> bytes:
    """How the line of this header begins in a head that is lower-cased; what cannot be a name is found in none."""
    lowered = name.lower()
    return b"\r\n%b:" % lowered.encode() if _NAME.fullmatch(lowered) else _END


@lru_cache(maxsize=256)
def _any_of(names: tuple[str, ...]) -> re.Pattern[bytes]:
    """What finds these headers in a head that is lower-cased."""
    return re.compile(rb"\r\n(%b):" % b"|".join(re.escape(name.lower()).encode() for name in names))


def _text(value: bytes) -> str:
    return value.decode("utf-8", "surrogateescape").strip(" \t")


def _says_chunked(headers: Headers, lowered: bytes) -> bool:
    # As it is nearly always written, it need not be cut out.
    return _CHUNKED in lowered or headers["transfer-encoding"].lower() == "chunked"


def _fields(head: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The names and values of a head, as they are written there."""
    for line in head.split(b"\r\n")[1:-1]:
        name, _, value = line.partition(b":")
        yield name, value.lstrip(b" \t")


def _check_size(head: bytes) -> None:
    if head.count(b"\n") > _MAX_FIELDS + 1:
        raise _Malformed(_TOO_MANY)
    if len(head) <= _MAX_FIELD_BYTES:
        return
    sizes = [len(name) + len(value) for name, value in _fields(head)]
    if sum(sizes) > _MAX_FRAMING_BYTES:
        raise _Malformed(_TOO_MANY)
    if max(sizes, default=0) > _MAX_FIELD_BYTES:
        raise _Malformed("The provider's answer has a header that is too long.")
