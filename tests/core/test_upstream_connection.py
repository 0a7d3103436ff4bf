"""What a peer may send, cut anywhere, and what it may not: strict framing, back-pressure, early answers."""

from __future__ import annotations

import asyncio
import gzip
import socket
import struct
import threading
import tracemalloc
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import suppress
from itertools import pairwise
from typing import Any

import httptools
import pytest
from attrs import Factory, define, field, frozen
from hypothesis import given, settings
from hypothesis import strategies as st
from listeners import listening

from qlens import Deadlines, Upstream, UpstreamError, UpstreamInvalid, UpstreamTimedOut, UpstreamTruncated
from qlens.testing import Scripted
from qlens.testing.upstreams import FakeUpstream
from qlens.upstream_connection import READ_BYTES, Connection

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"transfer-encoding: chunked\r\n\r\n"
PATIENT = Deadlines()
SOON = 5.0


@pytest.fixture
async def http() -> AsyncIterator[Upstream]:
    http = Upstream()
    yield http
    await http.aclose()


async def fetch(http: Upstream, url: str, *, body: bytes | None = b"{}", deadlines: Deadlines = PATIENT) -> bytes:
    answer = await http.open("POST", url, headers={}, body=body, deadlines=deadlines)
    return await answer.read()


# --- every split of every answer ----------------------------------------------------------------


class Wire(asyncio.Transport):
    """A transport on which the test decides in which pieces bytes arrive."""

    closing = False

    def write(self, data: Any) -> None:
        pass

    def abort(self) -> None:
        self.closing = True

    def is_closing(self) -> bool:
        return self.closing

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


Outcome = tuple[int, dict[str, str], bytes, str, bool]
"""Status, headers, body, error, and whether the connection may be used again."""


async def received(pieces: Iterable[bytes], end: bool) -> Outcome:
    """What a connection makes of an answer that arrives in these pieces; `end` closes it after the last one."""
    connection = Connection(memoryview(bytearray(READ_BYTES)), lambda _: None)
    wire = Wire()
    connection.connection_made(wire)
    asking = asyncio.ensure_future(connection.ask(b"", b"", asyncio.get_running_loop().time() + SOON))
    await asyncio.sleep(0)
    for piece in pieces:
        for start in range(0, len(piece), READ_BYTES):
            part = piece[start : start + READ_BYTES]
            if not wire.closing:
                connection.get_buffer(-1)[: len(part)] = part
                connection.buffer_updated(len(part))
    if end or wire.closing:
        connection.connection_lost(None)
    body, error = b"", ""
    try:
        await asking
        while piece := connection.take() or b"":
            body += piece
    except UpstreamError as caught:
        error = f"{type(caught).__name__}: {caught}"
    again = connection.free()
    if not (end or wire.closing):
        connection.abort()
    connection._stop_watching()
    return connection.status, dict(connection.headers), body, error, again


def cut(raw: bytes, at: Iterable[int]) -> list[bytes]:
    """The bytes in pieces."""
    edges = [0, *sorted({position % (len(raw) + 1) for position in at}), len(raw)]
    return [raw[start:end] for start, end in pairwise(edges) if start < end]


def chunks(parts: Iterable[bytes], extension: bytes = b"", trailers: bytes = b"") -> bytes:
    """A chunked body."""
    coded = (b"%x%s\r\n%s\r\n" % (len(part), extension, part) for part in parts if part)
    return b"".join(coded) + b"0\r\n" + trailers + b"\r\n"


FIELD = st.tuples(
    st.from_regex(rb"[a-zA-Z][a-zA-Z0-9-]{0,12}", fullmatch=True).map(lambda name: b"x-" + name),
    st.from_regex(rb"[!-~]([ -~]{0,30}[!-~])?", fullmatch=True),
)


@frozen
class Good:
    """An answer that is as it should be."""

    raw: bytes
    status: int
    body: bytes
    ends_connection: bool
    """Whether the body ends with the connection."""
    reusable: bool


@st.composite
def answers(draw: st.DrawFn) -> Good:
    """Good answers with every kind of framing."""
    status = draw(st.sampled_from([200, 201, 204, 304, 400, 429, 500, 599]))
    minor = draw(st.sampled_from([0, 1]))
    interim = draw(st.lists(st.sampled_from([b"HTTP/1.1 100 Continue\r\n", b"HTTP/1.1 103 Hints\r\nlink: x\r\n"])))
    fields = b"".join(b"%s:%s\r\n" % pair for pair in draw(st.lists(FIELD, max_size=8)))
    reason = draw(st.sampled_from([b"", b"OK", b"Not So"]))
    head = b"".join(part + b"\r\n" for part in interim) + b"HTTP/1.%d %d %s\r\n%s" % (minor, status, reason, fields)
    if status in {204, 304}:
        return Good(head + b"\r\n", status, b"", ends_connection=False, reusable=minor == 1)
    body = draw(st.binary(max_size=1000))
    pack = draw(st.sampled_from([None, gzip.compress, zlib.compress])) if body else None
    coded = pack(body) if pack else body
    head += b"Content-Encoding: gzip\r\n" if pack else b""
    framing = draw(st.sampled_from(["length", "end", "chunks"] if minor else ["length", "end"]))
    if framing == "end":
        return Good(head + b"\r\n" + coded, status, body, ends_connection=True, reusable=False)
    if framing == "length":
        head += b"Content-Length: %d\r\n\r\n" % len(coded)
        return Good(head + coded, status, body, ends_connection=False, reusable=minor == 1)
    parts = cut(coded, draw(st.lists(st.integers(0, 1000), max_size=5)))
    tail = chunks(parts, draw(st.sampled_from([b"", b";a=b"])), draw(st.sampled_from([b"", b"x-sum: 1\r\n"])))
    return Good(head + b"Transfer-Encoding: Chunked\r\n\r\n" + tail, status, body, ends_connection=False, reusable=True)


CUTS = st.lists(st.integers(0, 5000), max_size=12)


@settings(max_examples=300, deadline=None)
@given(answers(), CUTS, st.booleans())
def test_a_good_answer_is_the_same_wherever_it_is_cut(answer: Good, at: list[int], byte_by_byte: bool) -> None:
    whole = asyncio.run(received([answer.raw], answer.ends_connection))
    pieces = cut(answer.raw, range(len(answer.raw)) if byte_by_byte else at)
    assert asyncio.run(received(pieces, answer.ends_connection)) == whole
    status, _, body, error, reusable = whole
    assert (status, body, error, reusable) == (answer.status, answer.body, "", answer.reusable)


@settings(max_examples=200, deadline=None)
@given(answers(), CUTS, st.integers(1, 5000))
def test_an_answer_that_stops_early_is_the_same_error_wherever_it_is_cut(
    answer: Good, at: list[int], kept: int
) -> None:
    raw = answer.raw[: kept % len(answer.raw)]
    whole = asyncio.run(received([raw], end=True))
    assert asyncio.run(received(cut(raw, at), end=True)) == whole
    assert answer.body.startswith(whole[2])
    assert not whole[4]


@settings(max_examples=200, deadline=None)
@given(answers(), st.binary(min_size=1, max_size=8), st.integers(0, 5000), CUTS)
def test_garbage_within_an_answer_is_nothing_worse_than_an_error_of_ours(
    answer: Good, garbage: bytes, position: int, at: list[int]
) -> None:
    start = position % len(answer.raw)
    raw = answer.raw[:start] + garbage + answer.raw[start + len(garbage) :]
    *_, error, _ = asyncio.run(received(cut(raw, at), end=True))
    assert not error or error.startswith("Upstream")


@define(eq=False)
class Told:
    """The headers of the last head in some bytes, as the parser tells them field by field."""

    parser: httptools.HttpResponseParser = field(
        init=False, default=Factory(httptools.HttpResponseParser, takes_self=True)
    )
    fields: list[tuple[bytes, bytes]] = field(init=False, factory=list)
    headers: dict[str, str] = field(init=False, factory=dict)

    def on_header(self, name: bytes, value: bytes) -> None:
        self.fields.append((name, value))

    def on_headers_complete(self) -> None:
        if self.parser.get_status_code() >= 200:
            for name, value in self.fields:
                self.headers.setdefault(name.decode().lower(), value.decode("utf-8", "surrogateescape").rstrip(" \t"))
        self.fields.clear()


LINE_ENDS = (b"\r", b"\n", b"\r\n", b"\r\n\r\n")
ODD = st.sampled_from([*LINE_ENDS, b" ", b"\t", b":", b"\0", b"\x0b", b"\x85", b"\xc3\xa4", b"HTTP/"])


@settings(max_examples=500, deadline=None)
@given(answers(), st.lists(st.tuples(ODD, st.integers(0, 5000)), max_size=3), CUTS)
def test_the_headers_are_those_that_the_parser_finds(answer: Good, odd: list[tuple[bytes, int]], at: list[int]) -> None:
    raw, room = answer.raw, len(answer.raw) - len(answer.body)
    for garbage, position in odd:
        raw = raw[: position % room] + garbage + raw[position % room :]
    status, headers, *_ = asyncio.run(received(cut(raw, at), end=True))
    told = Told()
    with suppress(httptools.HttpParserError, httptools.HttpParserUpgrade):
        told.parser.feed_data(raw)
    assert not status or headers == told.headers


async def test_what_follows_an_answer_in_several_reads_is_no_part_of_it() -> None:
    pieces = [OK + b"content-length: 5\r\n\r\nhelloHTTP", b"/1.1 200 OK\r\n\r\n", b"x"]
    assert await received(pieces, end=True) == (200, {"content-length": "5"}, b"hello", "", False)


# --- lies ---------------------------------------------------------------------------------------

BOMB = gzip.compress(b"x" * 50_000_000)
LIES = {
    "length with a sign": OK + b"content-length: +5\r\n\r\nhello",
    "negative length": OK + b"content-length: -5\r\n\r\nhello",
    "empty length": OK + b"content-length: \r\n\r\nhello",
    "length in hex": OK + b"content-length: 0x5\r\n\r\nhello",
    "length too large to count": OK + b"content-length: 99999999999999999999\r\n\r\nhello",
    "the same length twice": OK + b"content-length: 5\r\ncontent-length: 5\r\n\r\nhello",
    "two lengths in one": OK + b"content-length: 5, 5\r\n\r\nhello",
    "chunks and length": OK + b"transfer-encoding: chunked\r\ncontent-length: 5\r\n\r\n0\r\n\r\n",
    "length in other letters": OK + b"Content-Length: 5\r\ncontent-LENGTH: 6\r\n\r\nhello!",
    "length in a trailer": CHUNKED + b"5\r\nhello\r\n0\r\ncontent-length: 5\r\n\r\n",
    "space before the colon": OK + b"content-length : 5\r\n\r\nhello",
    "unknown transfer coding": OK + b"transfer-encoding: xchunked\r\n\r\n0\r\n\r\n",
    "two transfer codings": OK + b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "chunked not last": OK + b"transfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "chunked twice": OK + b"transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunks in HTTP/1.0": b"HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "bare line feeds": b"HTTP/1.1 200 OK\ncontent-length: 5\n\nhello",
    "one bare line feed": OK + b"a: b\ncontent-length: 5\r\n\r\nhello",
    "bare carriage return": OK + b"a: b\rc: d\r\ncontent-length: 5\r\n\r\nhello",
    "folded header": OK + b"a: b\r\n c\r\ncontent-length: 5\r\n\r\nhello",
    "NUL in a header": OK + b"a: b\0\r\ncontent-length: 5\r\n\r\nhello",
    "header without a name": OK + b": b\r\ncontent-length: 5\r\n\r\nhello",
    "status 099": b"HTTP/1.1 099 X\r\ncontent-length: 0\r\n\r\n",
    "status 600": b"HTTP/1.1 600 X\r\ncontent-length: 0\r\n\r\n",
    "status 2000": b"HTTP/1.1 2000 X\r\ncontent-length: 0\r\n\r\n",
    "status 20": b"HTTP/1.1 20 X\r\ncontent-length: 0\r\n\r\n",
    "status with letters": b"HTTP/1.1 2OO OK\r\ncontent-length: 0\r\n\r\n",
    "HTTP/0.9 by name": b"HTTP/0.9 200 OK\r\ncontent-length: 0\r\n\r\n",
    "HTTP/2 by name": b"HTTP/2.0 200 OK\r\ncontent-length: 0\r\n\r\n",
    "HTTP/1.2": b"HTTP/1.2 200 OK\r\ncontent-length: 0\r\n\r\n",
    "another protocol": b"HTTPS/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
    "a protocol of media": b"RTSP/1.0 200 OK\r\ncontent-length: 0\r\n\r\n",
    "a protocol of media with an answer in its body": b"RTSP/1.0 200 OK\r\ncontent-length: 25\r\n\r\n"
    + OK
    + b"a: b\r\n\r\n",
    "another protocol behind an interim answer": b"HTTP/1.1 100 X\r\n\r\nICE/1.0 200 OK\r\ncontent-length: 0\r\n\r\n",
    "change of protocol": b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\nhello",
    "change of protocol to nothing": b"HTTP/1.1 101 Switching Protocols\r\n\r\nhello",
    "304 with a body": b"HTTP/1.1 304 Not Modified\r\n\r\nbody",
    "body after an interim answer": b"HTTP/1.1 103 Early Hints\r\ncontent-length: 2\r\n\r\nok" + OK + b"\r\n",
    "endless interim answers": b"HTTP/1.1 100 Continue\r\n\r\n" * 20_000,
    "endless status line": b"HTTP/1.1 200 " + b"x" * 300_000,
    "endless header name": OK + b"x" * 300_000,
    "endless header": OK + b"a: " + b"x" * 300_000,
    "headers of 70 kB": OK + b"".join(b"a%d: %s\r\n" % (n, b"x" * 7000) for n in range(10)) + b"\r\n",
    "129 headers": OK + b"a: b\r\n" * 129 + b"\r\n",
    "endless trailers": CHUNKED + b"5\r\nhello\r\n0\r\n" + b"a: b\r\n" * 50_000,
    "endless chunk extension": CHUNKED + b"5;" + b"x" * 300_000,
    "endless chunk size": CHUNKED + b"0" * 300_000,
    "chunk size too large to count": CHUNKED + b"fffffffffffffffff\r\nhello\r\n0\r\n\r\n",
    "negative chunk size": CHUNKED + b"-5\r\nhello\r\n0\r\n\r\n",
    "chunk size with 0x": CHUNKED + b"0x5\r\nhello\r\n0\r\n\r\n",
    "chunk longer than it says": CHUNKED + b"4\r\nhello\r\n0\r\n\r\n",
    "chunk size with a line feed": CHUNKED + b"5\nhello\r\n0\r\n\r\n",
    "chunk without a size": CHUNKED + b"\r\nhello\r\n0\r\n\r\n",
    "compressed in an unknown way": OK + b"content-encoding: br\r\ncontent-length: 5\r\n\r\nhello",
    "compressed twice": OK + b"content-encoding: gzip, gzip\r\ncontent-length: 5\r\n\r\nhello",
    "two compressions": OK + b"content-encoding: gzip\r\ncontent-encoding: br\r\ncontent-length: 5\r\n\r\nhello",
    "compressed body cut short": OK
    + b"content-encoding: gzip\r\ncontent-length: 12\r\n\r\n"
    + gzip.compress(b"hello")[:12],
    "more after the compressed body": OK + b"content-encoding: gzip\r\n\r\n" + gzip.compress(b"hello") + b"more",
    "gzip bomb": OK + b"content-encoding: gzip\r\ncontent-length: %d\r\n\r\n%s" % (len(BOMB), BOMB),
}


@pytest.mark.parametrize("lie", LIES, ids=str)
async def test_a_lie_about_the_answer_is_invalid_and_its_connection_is_not_used_again(
    http: Upstream, up: FakeUpstream, lie: str
) -> None:
    up.script(Scripted(raw=LIES[lie]), Scripted(body=b"fine"))
    with pytest.raises(UpstreamInvalid):
        await fetch(http, up.url)
    assert await fetch(http, up.url) == b"fine"
    assert [request.connection for request in up.requests] == [1, 2]


async def test_status_of_an_answer_that_cannot_be_unpacked_is_known(http: Upstream, up: FakeUpstream) -> None:
    up.script(Scripted(status=429, headers={"content-encoding": "br", "retry-after": "7"}, body=b"squeezed"))
    answer = await http.open("POST", up.url, headers={}, body=b"{}", deadlines=PATIENT)
    assert (answer.status, answer.headers["Retry-After"]) == (429, "7")
    with pytest.raises(UpstreamInvalid, match="compressed"):
        await answer.read()


async def test_headers_are_found_in_any_case_and_the_first_of_a_name_counts(http: Upstream, up: FakeUpstream) -> None:
    fields = b"X-A: \t One \r\nx-a: two\r\nB:\r\nx-ab: x-c: no\r\nCaf: \xc3\xa9\r\ncontent-length: 0\r\n"
    up.script(Scripted(raw=b"HTTP/1.1 103 Hints\r\nx-c: no\r\n\r\n" + OK + fields + b"\r\n"))
    headers = (await http.open("POST", up.url, headers={}, body=b"{}", deadlines=PATIENT)).headers
    assert dict(headers) == {"x-a": "One", "b": "", "x-ab": "x-c: no", "caf": "\u00e9", "content-length": "0"}
    assert len(headers) == 5
    assert headers["X-a"] == headers.get("x-A") == "One"
    assert headers.found(("X-C", "CAF", "x-a")) == {"x-a": "One", "caf": "\u00e9"}
    for absent in ("x-c", "one", "", "x-a: one\r\nx-a", "http/1.1 200 ok"):
        assert absent not in headers
        assert headers.get(absent) is None
        assert not headers.found((absent,))
        with pytest.raises(KeyError):
            headers[absent]


@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress], ids=["gzip", "deflate"])
async def test_body_that_is_compressed_unasked_is_read(http: Upstream, up: FakeUpstream, pack: Any) -> None:
    text = b"".join(b"%d " % number for number in range(50_000))
    up.script(Scripted(headers={"Content-Encoding": "GZip"}, body=pack(text), split=1000), Scripted(body=b"next"))
    assert await fetch(http, up.url) == text
    assert await fetch(http, up.url) == b"next"
    assert up.connections == 1


@pytest.mark.parametrize(
    ("raw", "reset"),
    [
        pytest.param(OK + b"\r\nhel", True, id="reset"),
        pytest.param(OK + b"content-encoding: gzip\r\n\r\n" + gzip.compress(b"hello")[:12], False, id="half a gzip"),
    ],
)
async def test_body_without_a_length_is_truncated_unless_it_ends_in_order(
    http: Upstream, raw: bytes, reset: bool
) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n{}")
        writer.write(raw)
        await asyncio.sleep(0.05)
        if reset:
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()

    async with listening(talk) as port:
        with pytest.raises(UpstreamTruncated):
            await fetch(http, f"http://127.0.0.1:{port}/")


async def test_what_came_before_the_framing_broke_is_read_first(http: Upstream, up: FakeUpstream) -> None:
    up.script(Scripted(raw=CHUNKED + b"5\r\nhello\r\nZZ\r\n"))
    answer = await http.open("POST", up.url, headers={}, body=b"{}", deadlines=PATIENT)
    pieces = answer.chunks()
    assert await anext(pieces) == b"hello"
    with pytest.raises(UpstreamInvalid, match="framing"):
        await anext(pieces)
    with pytest.raises(UpstreamTruncated):
        await anext(pieces)


@pytest.mark.parametrize("status", [204, 304])
async def test_answer_without_a_body_leaves_the_connection_for_the_next(
    http: Upstream, up: FakeUpstream, status: int
) -> None:
    up.script(Scripted(status=status, headers={"content-length": "0"}), Scripted(body=b"next"))
    assert await fetch(http, up.url) == b""
    assert await fetch(http, up.url) == b"next"
    assert up.connections == 1


async def test_answer_to_head_has_no_body_whatever_length_it_names(http: Upstream, up: FakeUpstream) -> None:
    up.script(Scripted(headers={"content-length": "500"}), Scripted(body=b"next"))
    answer = await http.open("HEAD", up.url, headers={}, body=None, deadlines=PATIENT)
    assert answer.headers["content-length"] == "500"
    assert await answer.read() == b""
    assert await fetch(http, up.url) == b"next"


async def test_connection_that_is_to_be_closed_is_not_used_again(http: Upstream, up: FakeUpstream) -> None:
    up.script(Scripted(headers={"Connection": "close"}, body=b"one"), Scripted(body=b"two"))
    assert await fetch(http, up.url) == b"one"
    assert await fetch(http, up.url) == b"two"
    assert [request.connection for request in up.requests] == [1, 2]


async def test_connection_on_which_something_arrives_unasked_is_not_used_again(http: Upstream) -> None:
    closed = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n{}")
        writer.write(OK + b"content-length: 2\r\n\r\nok")
        await asyncio.sleep(0.05)
        writer.write(b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\n\r\n")
        await reader.read()
        closed.set()

    async with listening(talk) as port:
        url = f"http://127.0.0.1:{port}/"
        assert await fetch(http, url) == b"ok"
        await asyncio.wait_for(closed.wait(), SOON)
        assert await fetch(http, url) == b"ok"


# --- back-pressure -------------------------------------------------------------------------------


async def test_client_that_does_not_read_stops_the_provider(http: Upstream) -> None:
    total, block = 64 * 1024 * 1024, b"x" * 65536
    sent = 0

    async def pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await reader.readuntil(b"\r\n\r\n")
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        writer.write(OK + b"content-length: %d\r\n\r\n" % total)
        while sent < total:
            writer.write(block)
            await writer.drain()
            sent += len(block)

    async with listening(pour) as port:
        url = f"http://127.0.0.1:{port}/"
        # A pause of the client is none of the provider's.
        deadlines = Deadlines(first_byte_seconds=0.3, idle_seconds=0.3)
        answer = await http.open("GET", url, headers={}, body=None, deadlines=deadlines)
        pieces = answer.chunks()
        received, largest = len(await anext(pieces)), 0
        before = -1
        while before != sent:
            before = sent
            await asyncio.sleep(0.25)
        assert sent < total / 4
        async for piece in pieces:
            largest = max(largest, len(piece))
            received += len(piece)
        assert received == total
        assert largest <= 2 * READ_BYTES


async def test_large_body_goes_out_as_fast_as_the_provider_reads_it(http: Upstream) -> None:
    body = b"x" * (24 * 1024 * 1024)
    size = 0

    async def sip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal size
        await reader.readuntil(b"\r\n\r\n")
        while size < len(body):
            size += len(await reader.read(1024 * 1024))
            await asyncio.sleep(0)
        writer.write(OK + b"content-length: 2\r\n\r\nok")
        await reader.read()

    async with listening(sip) as port:
        url = f"http://127.0.0.1:{port}/"
        assert await fetch(http, url, body=body) == b"ok"
    assert size == len(body)


async def test_body_that_the_provider_does_not_read_times_out(http: Upstream) -> None:
    closed = asyncio.Event()

    async def deaf(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            await reader.readuntil(b"\r\n\r\n")
            await asyncio.sleep(0.5)
            while await reader.read(1 << 20):
                pass
        closed.set()

    async with listening(deaf) as port:
        url = f"http://127.0.0.1:{port}/"
        body = b"x" * (24 << 20)
        tracemalloc.start()
        with pytest.raises(UpstreamTimedOut, match="did not answer"):
            await fetch(http, url, body=body, deadlines=Deadlines(first_byte_seconds=0.3))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < len(body) / 4
        await asyncio.wait_for(closed.wait(), SOON)


async def test_answer_that_comes_before_the_body_was_read_ends_the_sending(http: Upstream) -> None:
    connections = 0

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Too Large\r\ncontent-length: 3\r\n\r\nbig")
        with suppress(ConnectionError):
            await asyncio.sleep(0.2)
            while await reader.read(1 << 20):
                pass

    async with listening(refuse) as port:
        url = f"http://127.0.0.1:{port}/"
        for _ in range(2):
            answer = await http.open("POST", url, headers={}, body=b"x" * (24 << 20), deadlines=PATIENT)
            await asyncio.sleep(0.4)  # what was sent is read: nothing shows that there was to be more
            assert (answer.status, await answer.read()) == (413, b"big")
    assert connections == 2


class Blind:
    """A body whose sender looks at nothing until the peer has answered, and closed without having read it."""

    def __init__(self, closed: threading.Event) -> None:
        self.closed = closed

    def __len__(self) -> int:
        return 2 * READ_BYTES

    async def __aiter__(self) -> AsyncGenerator[bytes]:
        yield bytes(READ_BYTES)
        assert self.closed.wait(SOON)  # the event loop stands still
        yield bytes(READ_BYTES)


async def test_answer_that_came_before_a_write_failed_is_read(http: Upstream) -> None:
    closed = threading.Event()

    def talk(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        connection.recv(10)
        connection.sendall(b"HTTP/1.1 413 Too Large\r\ncontent-length: 3\r\nconnection: close\r\n\r\nbig")
        connection.close()  # with a reset: there is something that was not read
        closed.set()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        talking = threading.Thread(target=talk, args=(listener,), daemon=True)
        talking.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        answer = await http.open("POST", url, headers={}, body=Blind(closed), deadlines=PATIENT)
        assert (answer.status, await answer.read()) == (413, b"big")
        talking.join()
