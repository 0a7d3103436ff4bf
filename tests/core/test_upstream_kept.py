"""A kept connection that ends under a request: sent once more where the peer cannot have had it, and never else."""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import trustme
from attrs import define, frozen
from yamls import CHAT, HELLO, config

from qlens import Deadlines, Reply, Target, Upstream, UpstreamUnreachable
from qlens.config import Tls
from qlens.testing import Scripted, running, upstream
from qlens.testing.upstreams import FakeUpstream

SECONDS = 10
PATIENT = Deadlines()
SMALL, LARGE = b"{}", b"x" * 3_000_000
HUGE = b"x" * (24 << 20)
"""More than the kernel keeps on both sides."""


@frozen
class Pieces:
    """A body that is sent piece by piece, each of which takes its time."""

    pieces: tuple[bytes, ...]
    seconds: float = 0

    def __len__(self) -> int:
        return sum(map(len, self.pieces))

    async def __aiter__(self) -> AsyncGenerator[bytes]:
        for piece in self.pieces:
            await asyncio.sleep(self.seconds)
            yield piece


# --- the peer's side, driven step by step ------------------------------------------------------


@define(eq=False)
class Wire:
    """One connection as the peer has it; what waits is for a thread."""

    sock: socket.socket

    def hear(self) -> bytes:
        """Read one request to its end; returns its body."""
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += self._some(1)
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0] or 0)
        body = bytearray()
        while len(body) < length:
            body += self._some(length - len(body))
        return bytes(body)

    def say(self, body: bytes) -> None:
        self.sock.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))

    def have(self, count: int) -> None:
        """Wait until so many bytes are here, which nobody reads."""
        while len(self.sock.recv(count, socket.MSG_PEEK)) < count:
            pass

    def close(self) -> None:
        self.sock.close()

    def take_leave(self) -> None:
        """Close as TLS wants it."""
        assert isinstance(self.sock, ssl.SSLSocket)
        self.sock.settimeout(0)
        with suppress(ssl.SSLWantReadError):
            self.sock.unwrap()
        self.sock.close()

    def reset(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def _some(self, most: int) -> bytes:
        data = self.sock.recv(most)
        assert data, "the client has left"
        return data


@define(eq=False)
class Peer:
    """Listens; each connection is in the hands of a test."""

    listener: socket.socket
    context: ssl.SSLContext | None
    tls: Tls | None

    @property
    def url(self) -> str:
        scheme = "http" if self.tls is None else "https"
        return f"{scheme}://localhost:{self.listener.getsockname()[1]}/"

    def wire(self) -> Wire:
        """Wait for a connection."""
        sock, _ = self.listener.accept()
        sock.settimeout(SECONDS)
        return Wire(sock if self.context is None else self.context.wrap_socket(sock, server_side=True))

    def serve(self) -> tuple[Wire, bytes]:
        """Wait for a connection and answer the first request there."""
        wire = self.wire()
        heard = wire.hear()
        wire.say(b"served")
        return wire, heard

    async def kept(self, http: Upstream) -> Wire:
        """A connection that has had one exchange."""
        serving = asyncio.create_task(asyncio.to_thread(self.serve))
        assert await fetch(http, self) == b"served"
        wire, _ = await serving
        return wire

    def is_left_alone(self) -> bool:
        """Whether nobody has opened another connection."""
        self.listener.settimeout(0.1)
        try:
            self.listener.accept()
        except TimeoutError:
            return True
        return False


@contextmanager
def listening(context: ssl.SSLContext | None = None, tls: Tls | None = None) -> Iterator[Peer]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(SECONDS)
        yield Peer(listener, context, tls)


@pytest.fixture
def plain() -> Iterator[Peer]:
    with listening() as peer:
        yield peer


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def secure(authority: trustme.CA, tmp_path: Path) -> Iterator[Peer]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    with listening(context, Tls(ca_file=tmp_path / "ca.pem")) as peer:
        yield peer


@pytest.fixture
def peer(request: pytest.FixtureRequest) -> Peer:
    """Of the kind that the test names."""
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Peer)
    return found


@pytest.fixture
async def http() -> AsyncIterator[Upstream]:
    http = Upstream()
    yield http
    await http.aclose()


async def fetch(http: Upstream, peer: Peer, body: bytes | Pieces = SMALL, method: str = "POST") -> bytes:
    answer = await http.open(method, peer.url, headers={}, body=body, deadlines=PATIENT, tls=peer.tls)
    return await answer.read()


End = Callable[[Wire], None]
WAYS = [
    pytest.param("plain", Wire.close, id="closes"),
    pytest.param("plain", Wire.reset, id="resets"),
    pytest.param("secure", Wire.close, id="closes under TLS"),
    pytest.param("secure", Wire.take_leave, id="takes leave under TLS"),
]


# --- what has not arrived ----------------------------------------------------------------------


@pytest.mark.parametrize("body", [SMALL, LARGE, Pieces((LARGE,) * 2)], ids=["small", "large", "upload"])
@pytest.mark.parametrize(("peer", "end"), WAYS, indirect=["peer"])
async def test_request_to_a_peer_that_has_just_gone_is_sent_again(
    http: Upstream, peer: Peer, end: End, body: bytes | Pieces
) -> None:
    wire = await peer.kept(http)
    serving = asyncio.create_task(asyncio.to_thread(peer.serve))
    end(wire)  # and the request is on its way before the event loop looks
    assert await fetch(http, peer, body) == b"served"
    again, heard = await serving
    assert heard == (body if isinstance(body, bytes) else b"".join(body.pieces))
    again.close()


async def test_request_of_which_a_part_was_read_is_sent_again(http: Upstream, plain: Peer) -> None:
    wire = await plain.kept(http)
    serving = asyncio.create_task(asyncio.to_thread(plain.serve))
    asking = asyncio.create_task(fetch(http, plain, HUGE))
    await asyncio.to_thread(wire.sock.recv, 1000)
    wire.close()
    assert await asking == b"served"
    again, heard = await serving
    assert heard == HUGE
    again.close()


async def test_idle_time_does_not_run_out_while_an_upload_is_read(
    http: Upstream, plain: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlens.upstream_connection._IDLE_SECONDS", 0.1)
    wire = await plain.kept(http)
    asking = asyncio.create_task(fetch(http, plain, Pieces((b"a", b"b", b"c"), seconds=0.1)))
    assert await asyncio.to_thread(wire.hear) == b"abc"
    wire.say(b"one")
    assert await asking == b"one"
    wire.close()


# --- what may have arrived ---------------------------------------------------------------------


@pytest.mark.parametrize("body", [SMALL, LARGE, Pieces((LARGE,) * 2)], ids=["small", "large", "upload"])
@pytest.mark.parametrize(("peer", "end"), WAYS, indirect=["peer"])
async def test_request_that_was_read_is_not_sent_again(
    http: Upstream, peer: Peer, end: End, body: bytes | Pieces
) -> None:
    wire = await peer.kept(http)
    asking = asyncio.create_task(fetch(http, peer, body))
    await asyncio.to_thread(wire.hear)
    end(wire)
    with pytest.raises(UpstreamUnreachable, match="closed the connection before it answered"):
        await asking
    assert peer.is_left_alone()


async def test_request_that_nobody_may_have_read_is_not_sent_again(http: Upstream, plain: Peer) -> None:
    wire = await plain.kept(http)
    asking = asyncio.create_task(fetch(http, plain, b"x" * 1000))
    await asyncio.to_thread(wire.have, 1000)
    wire.close()
    with pytest.raises(UpstreamUnreachable):
        await asking
    assert plain.is_left_alone()


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
@pytest.mark.parametrize(("peer", "end"), WAYS, indirect=["peer"])
async def test_request_that_may_be_made_twice_is_sent_again(http: Upstream, peer: Peer, end: End, method: str) -> None:
    wire = await peer.kept(http)
    asking = asyncio.create_task(fetch(http, peer, method=method))
    await asyncio.to_thread(wire.hear)
    serving = asyncio.create_task(asyncio.to_thread(peer.serve))
    end(wire)
    assert await asking == b"served"
    again, _ = await serving
    again.close()


async def test_request_is_sent_again_once(http: Upstream, plain: Peer) -> None:
    wire = await plain.kept(http)
    waiting = asyncio.create_task(asyncio.to_thread(plain.wire))
    wire.close()
    asking = asyncio.create_task(fetch(http, plain, method="GET"))
    again = await waiting
    await asyncio.to_thread(again.hear)
    again.close()
    with pytest.raises(UpstreamUnreachable):
        await asking
    assert plain.is_left_alone()


# --- through the gateway -----------------------------------------------------------------------


def _yaml(up: FakeUpstream, *route: dict[str, object]) -> str:
    models = {"gpt-4o-mini": {"targets": [{"provider": "up", "model": "gpt-4o-mini"}]}}
    return config({"route": list(route)}, {"up": {"plugin": "openai", "base_url": up.url}}, models)


async def test_receipt_has_one_attempt_where_the_provider_was_gone() -> None:
    async with upstream() as up, running(_yaml(up, {"plugin": "puppets:Puppet", "name": "puppet"})) as gateway:
        assert (await gateway.post(CHAT, HELLO)).status == 200

        def too_late(target: Target, proceed: Callable[[Target], Awaitable[Reply]]) -> Awaitable[Reply]:
            up.hang_up()
            return proceed(target)

        gateway.plugin("route", "puppet").does["wrap_send"] = too_late
        assert (await gateway.post(CHAT, HELLO)).status == 200
        receipts = await gateway.settled(2)
        assert [(attempt.error, attempt.billed) for attempt in receipts[1].attempts] == [(None, True)]
        assert [request.connection for request in up.requests] == [1, 2]


async def test_receipt_has_two_attempts_where_the_provider_may_have_billed_the_first() -> None:
    retry = {"plugin": "retry", "backoff_seconds": 0}
    async with upstream() as up, running(_yaml(up, retry)) as gateway:
        assert (await gateway.post(CHAT, HELLO)).status == 200
        up.script(Scripted(raw=b""))
        assert (await gateway.post(CHAT, HELLO)).status == 200
        receipts = await gateway.settled(2)
        attempts = [(attempt.error, attempt.billed) for attempt in receipts[1].attempts]
        assert attempts == [("upstream_unreachable", False), (None, True)]
        assert [request.connection for request in up.requests] == [1, 1, 2]


async def test_provider_is_asked_once_where_nothing_is_to_be_tried_again() -> None:
    async with upstream() as up, running(_yaml(up)) as gateway:
        assert (await gateway.post(CHAT, HELLO)).status == 200
        up.script(Scripted(raw=b""))
        answer = await gateway.post(CHAT, HELLO)
        assert (answer.status, answer.json()["error"]["code"]) == (502, "upstream_unreachable")
        receipts = await gateway.settled(2)
        assert [attempt.error for attempt in receipts[1].attempts] == ["upstream_unreachable"]
        assert len(up.requests) == 2
