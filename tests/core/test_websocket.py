"""WebSockets to providers: over TLS, and every way in which one cannot be opened or breaks."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trustme
from aiohttp import WSMsgType, web
from listeners import listening

from qlens import CallError, Deadlines, Frame, Session, SessionClosed, Upstream
from qlens.config import Tls
from qlens.websocket import FRAME_BYTES

QUICK = Deadlines(connect_seconds=1, first_byte_seconds=1, idle_seconds=1)


@asynccontextmanager
async def mirror(context: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """A server that says what it is told, on a loopback port."""

    async def handle(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(max_msg_size=0, timeout=1)
        await socket.prepare(request)
        async for message in socket:
            if message.type is WSMsgType.TEXT and message.data == "large":
                await socket.send_str("x" * (FRAME_BYTES + 1))
            elif message.type is WSMsgType.TEXT:
                await socket.send_str(message.data)
        return socket

    application = web.Application()
    application.router.add_get("/socket", handle)
    runner = web.AppRunner(application, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


@pytest.fixture
async def http() -> AsyncIterator[Upstream]:
    upstream = Upstream()
    yield upstream
    await upstream.aclose()


async def opened(http: Upstream, url: str, tls: Tls | None = None) -> Session:
    return await http.connect(url, headers={"x-team": "search"}, deadlines=QUICK, tls=tls)


async def refused(http: Upstream, url: str, tls: Tls | None = None) -> str | None:
    with pytest.raises(CallError) as raised:
        await opened(http, url, tls)
    assert "127.0.0.1" not in raised.value.message
    return raised.value.code


async def test_certificates_are_verified_as_for_other_calls(http: Upstream, tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("provider.example").configure_cert(context)
    async with mirror(context) as port:
        url = f"https://127.0.0.1:{port}/socket"
        trusting = Tls(ca_file=tmp_path / "ca.pem", server_name="provider.example")
        session = await opened(http, url, trusting)
        await session.send(Frame("text", b"hello"))
        assert await session.receive() == Frame("text", b"hello")
        await session.close()
        assert await refused(http, url, Tls(server_name="provider.example")) == "upstream_tls"
        assert await refused(http, url, Tls(ca_file=tmp_path / "ca.pem")) == "upstream_tls"


async def test_nobody_there_is_unreachable(http: Upstream) -> None:
    async with mirror() as port:
        pass
    assert await refused(http, f"http://127.0.0.1:{port}/socket") == "upstream_unreachable"
    assert await refused(http, "http://nobody.invalid/socket") == "upstream_unreachable"


async def test_what_is_not_an_upgrade_is_invalid_and_silence_is_a_timeout(http: Upstream) -> None:
    answers = [
        (b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n", "invalid_response"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", "invalid_response"),
        (b"nonsense\r\n\r\n", "unreachable"),
        (b"", "timeout"),
    ]
    for answer, code in answers:

        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answer: bytes = answer) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            await reader.read()

        async with listening(talk) as port:
            assert await refused(http, f"http://127.0.0.1:{port}/socket") == f"upstream_{code}"


async def test_a_refusal_that_comes_in_pieces_is_read_to_its_end(http: Upstream) -> None:
    body = b'{"error": {"message": "no", "code": "insufficient_quota"}}'

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: %d\r\n\r\n" % len(body) + body[:20])
        await writer.drain()
        await asyncio.sleep(0.1)
        writer.write(body[20:])
        await reader.read()

    async with listening(talk) as port:
        assert await refused(http, f"http://127.0.0.1:{port}/socket") == "insufficient_quota"


async def test_a_gateway_that_stops_opens_nothing_more() -> None:
    http = Upstream()
    await http.aclose()
    assert await refused(http, "http://127.0.0.1:9/socket") == "upstream_unreachable"


async def test_a_message_that_is_too_long_is_a_session_that_broke(http: Upstream) -> None:
    async with mirror() as port:
        session = await opened(http, f"http://127.0.0.1:{port}/socket")
        await session.send(Frame("text", b"large"))
        with pytest.raises(SessionClosed) as closed:
            await session.receive()
        assert (closed.value.code, closed.value.clean) == (1009, False)
        await session.close()


async def test_a_closed_session_takes_and_gives_nothing_and_may_be_closed_again(http: Upstream) -> None:
    async with mirror() as port:
        session = await opened(http, f"http://127.0.0.1:{port}/socket")
        await session.close(4000, "é" * 100)  # a reason has 123 bytes at most
        await session.close()
        with pytest.raises(SessionClosed):
            await session.send(Frame("text", b"hello"))
        with pytest.raises(SessionClosed):
            await session.receive()
