"""A stream's last event and the end of its body are often two packets: the connection is kept for the next call."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from yamls import CHAT, STREAM, config

from qlens.testing import running

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
EVENTS = (
    b'data: {"id":"1","object":"chat.completion.chunk","created":1,"model":"m",'
    b'"choices":[{"index":0,"delta":{"role":"assistant","content":"hello"},"finish_reason":"stop"}]}\n\n'
    b"data: [DONE]\n\n"
)
END = b"0\r\n\r\n"
Rest = Callable[[asyncio.StreamWriter], Awaitable[None]]
"""What a provider does after the last event."""


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


@asynccontextmanager
async def provider(rest: Rest) -> AsyncIterator[tuple[str, list[asyncio.StreamReader]]]:
    """A provider of streams, its address, and the connections it was given."""
    taken: list[asyncio.StreamReader] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        taken.append(reader)
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
                await reader.readexactly(length)
                writer.write(HEAD + chunk(EVENTS))
                await writer.drain()
                await rest(writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", taken


def gateway_of(url: str, **settings: object) -> str:
    return config(providers={"talker": {"plugin": "openai", "base_url": url, "api_key": "sk-example-1", **settings}})


async def test_the_end_may_come_a_moment_after_the_last_event() -> None:
    async def rest(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.05)
        writer.write(END[:2])
        await asyncio.sleep(0.05)
        writer.write(END[2:])

    async with provider(rest) as (url, taken), running(gateway_of(url)) as gateway:
        for _ in range(3):
            answer = await gateway.post(CHAT, STREAM)
            assert answer.body.endswith(b"data: [DONE]\n\n")
            await asyncio.sleep(0.2)
        assert len(taken) == 1
        assert [each.outcome for each in await gateway.settled(3)] == ["complete"] * 3


@pytest.mark.parametrize("what", ["more", "nothing", "lies"])
async def test_a_connection_on_which_anything_else_comes_is_closed(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlens.upstream._END_SECONDS", 0.2)

    async def rest(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.05)
        writer.write({"more": chunk(b"data: {}\n\n") + END, "nothing": b"", "lies": b"zz\r\n"}[what])

    async with provider(rest) as (url, taken), running(gateway_of(url)) as gateway:
        for number in (1, 2):
            answer = await gateway.post(CHAT, STREAM)
            assert answer.body.endswith(b"data: [DONE]\n\n")
            async with asyncio.timeout(5):
                assert await taken[number - 1].read() == b""  # closed
        assert len(taken) == 2
        assert [each.outcome for each in await gateway.settled(2)] == ["complete"] * 2


async def test_nobody_waits_for_a_connection_that_waits_for_its_end() -> None:
    async def rest(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(60)

    async with provider(rest) as (url, taken), running(gateway_of(url, network={"max_connections": 1})) as gateway:
        for _ in range(2):
            assert (await gateway.post(CHAT, STREAM)).status == 200
        assert len(taken) == 2


async def test_a_gateway_that_stops_does_not_wait_for_the_end() -> None:
    async def rest(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(60)

    async with provider(rest) as (url, taken):
        async with running(gateway_of(url)) as gateway:
            assert (await gateway.post(CHAT, STREAM)).status == 200
        assert await taken[0].read() == b""
