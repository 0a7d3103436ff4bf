"""A client that reads slowly makes the provider wait: the gateway keeps no stream in its memory."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import orjson
from attrs import define, field
from yamls import CHAT, STREAM, config, targets

from qlens.testing import running

MODELS = {"gpt-4o-mini": {"max_output_tokens": 100, "targets": targets("up")}}
EVENTS = 2_000
_HEAD = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "gpt-4o-mini"}
STALLED_SECONDS = 0.5
MOST_BUFFERED = 24 * 1024 * 1024
"""What the kernels keep for two connections is a part of it; without backpressure it would be all of the stream."""


def _event(number: int) -> bytes:
    delta = {"index": 0, "delta": {"content": f"{number:06}" + "y" * 32_000}, "finish_reason": None}
    return b"data: " + orjson.dumps({**_HEAD, "choices": [delta]}) + b"\n\n"


@define(eq=False)
class Fast:
    """A provider that sends as fast as it may."""

    sent: int = 0
    """Bytes that its socket took."""
    connections: list[asyncio.StreamWriter] = field(factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections.append(writer)
        with suppress(ConnectionError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
            for number in range(EVENTS):
                await self._send(writer, _event(number))
            stop = {**_HEAD, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
            await self._send(writer, b"data: " + orjson.dumps(stop) + b"\n\ndata: [DONE]\n\n")
            writer.write(b"0\r\n\r\n")
            await writer.drain()

    async def _send(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        writer.write(b"%x\r\n%b\r\n" % (len(data), data))
        await writer.drain()
        self.sent += len(data)

    async def stalled(self) -> int:
        """How much it had sent when nothing more was taken of it."""
        before = -1
        while self.sent != before:
            before = self.sent
            await asyncio.sleep(STALLED_SECONDS)
        return before


@asynccontextmanager
async def fast() -> AsyncIterator[tuple[Fast, str]]:
    """A fast provider and its base URL."""
    provider = Fast()
    server = await asyncio.start_server(provider.serve, "127.0.0.1", 0)
    try:
        yield provider, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    finally:
        server.close()
        for writer in provider.connections:
            writer.close()


def _asked(address: tuple[str, int]) -> socket.socket:
    """A stream that was asked for, on a socket that takes little."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(address)
    client.setblocking(False)
    body = orjson.dumps(STREAM)
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    client.send(head.encode() + body)
    return client


async def test_a_client_that_does_not_read_makes_the_provider_wait_and_then_gets_all_of_it() -> None:
    async with fast() as (provider, url):
        providers = {"up": {"plugin": "openai", "base_url": url, "api_key": "sk-example-up"}}
        async with running(config(None, providers, MODELS)) as gateway:
            host, port = gateway.url.removeprefix("http://").split(":")
            with _asked((host, int(port))) as client:
                assert 0 < await provider.stalled() < MOST_BUFFERED
                got = bytearray()
                async with asyncio.timeout(60):
                    while not got.endswith(b"0\r\n\r\n"):
                        got += await asyncio.get_running_loop().sock_recv(client, 1 << 20)
            (receipt,) = await gateway.settled(1)
            assert receipt.outcome == "complete"
            texts = [json.loads(line[6:])["choices"][0] for line in got.splitlines() if line.startswith(b"data: {")]
            numbers = [int(choice["delta"]["content"][:6]) for choice in texts[:-1]]
            assert numbers == list(range(EVENTS))
            assert texts[-1]["finish_reason"] == "stop"


async def test_a_client_that_leaves_without_reading_ends_the_provider_s_stream() -> None:
    async with fast() as (provider, url):
        providers = {"up": {"plugin": "openai", "base_url": url, "api_key": "sk-example-up"}}
        async with running(config(None, providers, MODELS)) as gateway:
            host, port = gateway.url.removeprefix("http://").split(":")
            with _asked((host, int(port))):
                await provider.stalled()
            (receipt,) = await gateway.settled(1)
            assert receipt.outcome == "abandoned"
            async with asyncio.timeout(5):
                with suppress(ConnectionError):
                    await provider.connections[0].wait_closed()
