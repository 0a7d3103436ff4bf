"""The middle of a stream goes from the provider's connection straight to the client's: no byte is lost on the way."""

from __future__ import annotations

import asyncio
import gzip
import json
import random
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import repeat

import orjson
import pytest
import trustme
from attrs import define, field, frozen
from hypothesis import example, given, settings
from hypothesis import strategies as st
from listeners import listening
from yamls import CHAT, STREAM, config, targets

from qlens.testing import Running, running

DONE = b"data: [DONE]\n\n"
MESSAGES = "/v1/messages"
ASKED = {CHAT: STREAM, MESSAGES: {**STREAM, "max_tokens": 100}}
"""A stream's request, by the path it goes to: the dialects are metered in two ways."""
SMALL_BUFFER = 4096
_HEAD = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "gpt-4o-mini"}


def chunk(delta: dict[str, str], finish: str | None = None) -> bytes:
    """An event of a chat's stream."""
    return b"data: " + orjson.dumps(
        {**_HEAD, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}
    ) + b"\n\n"  # fmt: skip


def chat(texts: list[str]) -> bytes:
    """A whole chat in these pieces."""
    middle = b"".join(chunk({"content": text}) for text in texts)
    return chunk({"role": "assistant"}) + middle + chunk({}, "stop") + DONE


def _typed(kind: str, **fields: object) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), orjson.dumps({"type": kind, **fields}))


def messages(texts: list[str]) -> bytes:
    """The same in Anthropic's events."""
    message = {"id": "msg_1", "type": "message", "role": "assistant", "model": "gpt-4o-mini", "content": []}
    begin = _typed("message_start", message={**message, "usage": {"input_tokens": 3, "output_tokens": 1}})
    begin += _typed("content_block_start", index=0, content_block={"type": "text", "text": ""})
    middle = b"".join(
        _typed("content_block_delta", index=0, delta={"type": "text_delta", "text": text}) for text in texts
    )
    end = _typed("content_block_stop", index=0)
    end += _typed("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 9})
    return begin + middle + end + _typed("message_stop")


SPOKEN = {CHAT: chat, MESSAGES: messages}


@define(eq=False)
class Speaker:
    """A provider that writes a stream in the pieces that a test wants."""

    pieces: Iterable[bytes] = ()
    head: bytes = b""
    end: bytes = b""
    then: Callable[[asyncio.StreamReader], Awaitable[object]] | None = None
    """What it does in front of the end."""
    seconds: float = 0
    """Between two pieces."""
    left: asyncio.Event = field(factory=asyncio.Event)
    """Whether the gateway has closed the connection."""

    def says(self, stream: bytes, ends: list[int], framing: str = "chunked", *, compressed: bool = False) -> None:
        """Speak this stream, with writes that end at these places."""
        self.head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
        if compressed:
            stream = gzip.compress(stream)
            self.head += b"content-encoding: gzip\r\n"
        places = sorted({end % len(stream) for end in ends} - {0})
        pieces = [stream[a:b] for a, b in zip([0, *places], [*places, len(stream)], strict=True)]
        self.end = b""
        if framing == "chunked":
            self.head += b"transfer-encoding: chunked\r\n"
            pieces, self.end = [b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces], b"0\r\n\r\n"
        elif framing == "length":
            self.head += b"content-length: %d\r\n" % len(stream)
        else:
            self.head += b"connection: close\r\n"
        self.pieces = pieces

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request, and close."""
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        await reader.readexactly(int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0]))
        writer.write(self.head + b"\r\n")
        try:
            for piece in self.pieces:
                writer.write(piece)
                await writer.drain()
                for _ in range(3):
                    await asyncio.sleep(self.seconds / 3)  # so that it arrives by itself
            if self.then is not None:
                await self.then(reader)
            writer.write(self.end)
            await writer.drain()
        finally:
            self.left.set()


@asynccontextmanager
async def speaking(context: ssl.SSLContext | None = None, **more: object) -> AsyncIterator[tuple[Speaker, Running]]:
    """A provider of both dialects, and a gateway in front of it whose kernel keeps little for slow clients."""
    speaker = Speaker()
    async with listening(speaker.talk, context) as port:
        own = more.pop("own", {})
        assert isinstance(own, dict)
        url = f"http{'s' if context else ''}://localhost:{port}"
        providers = {
            "chat": {"plugin": "openai", "base_url": f"{url}/v1", "api_key": "sk-example-up", **own},
            "messages": {"plugin": "anthropic", "base_url": url, "api_key": "sk-example-up", **own},
        }
        models = {
            "gpt-4o-mini": {"max_output_tokens": 10_000_000, "targets": targets("chat")},
            "claude": {"max_output_tokens": 10_000_000, "targets": targets("messages")},
        }
        async with running(config(None, providers, models, **more)) as gateway:
            gateway.server.client_socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL_BUFFER)
            yield speaker, gateway


@frozen
class Got:
    """What a client received."""

    head: bytes
    body: bytes

    @property
    def events(self) -> list[bytes]:
        return self.body.split(b"\n\n")[:-1]


def _plain(raw: bytes) -> bytes:
    """A body in chunks, as it was."""
    body = b""
    while raw:
        size, _, rest = raw.partition(b"\r\n")
        length = int(size, 16)
        assert rest[length : length + 2] == b"\r\n"
        if not length:
            assert rest == b"\r\n"
            return body
        body, raw = body + rest[:length], rest[length + 2 :]
    raise AssertionError("the body has no end")


def asking(gateway: Running, path: str = CHAT, version: str = "1.1", *, slow: bool = False) -> socket.socket:
    """A connection on which a stream was asked for."""
    client = socket.socket()
    if slow:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)
    host, port = gateway.url.removeprefix("http://").split(":")
    client.connect((host, int(port)))
    client.setblocking(False)
    body = orjson.dumps({**ASKED[path], "model": "claude" if path == MESSAGES else "gpt-4o-mini"})
    head = f"POST {path} HTTP/{version}\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(body)}\r\n"
    client.send(head.encode() + b"content-type: application/json\r\n\r\n" + body)
    return client


async def received(client: socket.socket, *, slow: bool = False) -> Got:
    """All that comes on a connection; a slow one is read in small pieces, with time between them."""
    loop, raw = asyncio.get_running_loop(), bytearray()
    with client:
        async with asyncio.timeout(60):
            while piece := await loop.sock_recv(client, 8192 if slow else 1 << 20):
                raw += piece
                if slow:
                    for _ in range(10):
                        await asyncio.sleep(0)
    head, _, body = bytes(raw).partition(b"\r\n\r\n")
    return Got(head, _plain(body) if b"transfer-encoding: chunked" in head else body)


TEXTS = st.lists(st.text(max_size=20) | st.integers(1, 40_000).map("y".__mul__), max_size=12)
ENDS = st.lists(st.integers(0, 300_000), max_size=40)


def test_any_stream_in_any_pieces_comes_out_as_it_went_in() -> None:
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        speaker, gateway = runner.run(stack.enter_async_context(speaking()))
        calls = 0

        @settings(max_examples=80)
        @example(CHAT, ["y" * 30_000] * 12, list(range(0, 300_000, 7_000)), "chunked", False, True, "1.1")
        @example(CHAT, ["hello"] * 12, list(range(3_000)), "length", False, False, "1.1")
        @example(MESSAGES, ["hello"] * 12, list(range(3_000)), "close", True, False, "1.0")
        @given(
            st.sampled_from([CHAT, MESSAGES]),
            TEXTS,
            ENDS,
            st.sampled_from(["chunked", "length", "close"]),
            st.booleans(),
            st.booleans(),
            st.sampled_from(["1.1", "1.0"]),
        )
        def passes(
            path: str, texts: list[str], ends: list[int], framing: str, compressed: bool, slow: bool, version: str
        ) -> None:
            nonlocal calls
            stream = SPOKEN[path](texts)
            compressed = compressed and len(gzip.compress(stream)) * 50 > len(stream)  # a bomb would be refused
            speaker.says(stream, ends, framing, compressed=compressed)
            got = runner.run(received(asking(gateway, path, version, slow=slow), slow=slow))
            assert got.body == stream
            calls += 1
            receipt = runner.run(gateway.settled(calls))[-1]
            assert (receipt.outcome, receipt.bytes_out) == ("complete", len(stream))
            assert receipt.ttft_us is not None

        try:
            passes()
        finally:
            runner.run(stack.aclose())


async def test_a_client_may_pause_and_go_on_many_times() -> None:
    async with speaking() as (speaker, gateway):
        stream = chat([f"{number:06}" + "y" * 8_000 for number in range(200)])
        speaker.says(stream, list(range(0, len(stream), 11_000)))
        loop, raw = asyncio.get_running_loop(), bytearray()
        with asking(gateway, slow=True) as client:
            async with asyncio.timeout(60):
                while piece := await loop.sock_recv(client, 64 * 1024):
                    raw += piece
                    await asyncio.sleep(0.002)
        assert _plain(bytes(raw).partition(b"\r\n\r\n")[2]) == stream


@pytest.mark.parametrize("slow", [False, True], ids=["fast", "slow"])
async def test_a_compressed_stream_may_grow_beyond_what_waits(slow: bool) -> None:
    async with speaking() as (speaker, gateway):
        drawn = random.Random(1)
        stream = chat([drawn.randbytes(1_000).hex() + "y" * 30_000 for _ in range(40)])
        size = len(gzip.compress(stream))
        speaker.says(stream, list(range(0, size, 6_000)), "length", compressed=True)
        assert (await received(asking(gateway, slow=slow), slow=slow)).body == stream


async def test_a_fast_stream_over_tls_comes_out_as_it_went_in() -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    with authority.cert_pem.tempfile() as ca_file:
        async with speaking(context, network={"tls": {"ca_file": ca_file}}) as (speaker, gateway):
            stream = chat([f"{number:06}" + "y" * 90_000 for number in range(60)])
            for slow in (False, True):
                speaker.says(stream, list(range(0, len(stream), 400_000)))
                assert (await received(asking(gateway, slow=slow), slow=slow)).body == stream


async def _forever(reader: asyncio.StreamReader) -> None:
    await reader.read()


def _error(got: Got) -> tuple[str, str]:
    """The type and code of the error that ends a stream."""
    error = json.loads(got.events[-1].partition(b"data: ")[2])["error"]
    return error["type"], error["code"]


async def test_a_provider_that_pauses_in_the_middle_is_cut_off() -> None:
    async with speaking(own={"idle_seconds": 0.2}) as (speaker, gateway):
        stream = chat(["hello"] * 50)
        speaker.says(stream, list(range(0, len(stream), 150)))
        speaker.pieces, speaker.then = [*speaker.pieces][:30], _forever
        got = await received(asking(gateway))
        assert stream.startswith(got.body.rpartition(b"data: ")[0])
        assert _error(got)[1] == "upstream_timeout"
        async with asyncio.timeout(5):
            await speaker.left.wait()
        (receipt,) = await gateway.settled(1)
        assert receipt.outcome == "failed"


async def test_a_stream_may_take_longer_than_a_pause_in_it() -> None:
    async with speaking(own={"idle_seconds": 1.0}) as (speaker, gateway):
        stream = chat(["hello"] * 20)
        speaker.says(stream, list(range(0, len(stream), 200)))
        speaker.seconds = 1.6 / len([*speaker.pieces])
        assert (await received(asking(gateway))).body == stream


async def test_a_client_that_pauses_is_not_taken_for_a_provider_that_does() -> None:
    async with speaking(own={"idle_seconds": 0.2}) as (speaker, gateway):
        stream = chat([f"{number:06}" + "y" * 30_000 for number in range(60)])
        speaker.says(stream, list(range(0, len(stream), 20_000)))
        client = asking(gateway, slow=True)
        await asyncio.sleep(0.8)
        assert (await received(client)).body == stream


def endless() -> Iterator[bytes]:
    """A chat that does not end, as a body without a length."""
    yield chunk({"role": "assistant"})
    yield from repeat(chunk({"content": "y" * 1_000}))


async def test_a_call_that_takes_too_long_is_cut_off_in_the_middle() -> None:
    async with speaking(call_seconds=0.5) as (speaker, gateway):
        speaker.says(DONE, [], "close")
        speaker.pieces = endless()
        assert _error(await received(asking(gateway)))[1] == "call_timeout"
        async with asyncio.timeout(5):
            await speaker.left.wait()
        (receipt,) = await gateway.settled(1)
        assert receipt.outcome == "failed"


async def test_a_stream_is_cut_off_at_the_end_of_draining() -> None:
    async with speaking() as (speaker, gateway):
        speaker.says(DONE, [], "close")
        speaker.pieces = endless()
        receiving = asyncio.create_task(received(asking(gateway)))
        await asyncio.sleep(0.2)
        await gateway.server.stop(0.1)
        assert _error(await receiving)[1] == "shutting_down"
        async with asyncio.timeout(5):
            await speaker.left.wait()
        assert len(gateway.receipts) == 1


@pytest.mark.parametrize("reading", [True, False], ids=["reading", "not reading"])
async def test_a_client_that_leaves_in_the_middle_settles_once_and_ends_the_provider_s_stream(reading: bool) -> None:
    async with speaking() as (speaker, gateway):
        speaker.says(DONE, [], "close")
        speaker.pieces = endless()
        client, loop = asking(gateway, slow=not reading), asyncio.get_running_loop()
        with client:
            for _ in range(50 * reading):
                await loop.sock_recv(client, 1 << 16)
            await asyncio.sleep(0.2 * (not reading))
        async with asyncio.timeout(5):
            await speaker.left.wait()
        (receipt,) = await gateway.settled(1)
        assert receipt.outcome == "abandoned"
        assert receipt.bytes_out > 0
        await asyncio.sleep(0.05)
        assert len(gateway.receipts) == 1


@pytest.mark.parametrize("together", [True, False], ids=["in one piece", "by itself"])
@pytest.mark.parametrize("path", [CHAT, MESSAGES])
async def test_an_error_in_the_middle_follows_what_was_said_before_it(path: str, together: bool) -> None:
    async with speaking() as (speaker, gateway):
        whole = SPOKEN[path](["hello"] * 20)
        stream = whole[: whole.rindex(b"hello") + 5]
        stream = stream[: stream.rindex(b"\n\n") + 2]
        error = b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error","message":"Oh."}}\n\n'
        speaker.says(stream + error, [*range(0, len(stream) // 2, 60), *([] if together else [len(stream)])])
        got = await received(asking(gateway, path))
        assert got.body.startswith(stream)
        assert len(got.events) == stream.count(b"\n\n") + 1
        assert "error" in json.loads(got.events[-1].partition(b"data: ")[2])
        (receipt,) = await gateway.settled(1)
        assert receipt.outcome == "failed"


async def test_a_stream_is_over_with_its_end_mark() -> None:
    async with speaking(own={"idle_seconds": 2}) as (speaker, gateway):
        stream = chat(["hello"] * 20)
        speaker.says(stream, [*range(0, len(stream), 100), len(stream) - len(DONE)])
        speaker.then = _forever
        assert (await received(asking(gateway))).body == stream
        async with asyncio.timeout(5):
            await speaker.left.wait()
        (receipt,) = await gateway.settled(1)
        assert receipt.outcome == "complete"


async def test_a_provider_that_breaks_off_in_the_middle_is_no_success() -> None:
    async with speaking() as (speaker, gateway):
        stream = chat(["hello"] * 20)
        for framing in ("chunked", "length", "close"):
            speaker.says(stream, list(range(0, len(stream), 100)), framing)
            speaker.pieces, speaker.end = [*speaker.pieces][:-3], b""
            got = await received(asking(gateway))
            assert DONE not in got.body
            assert _error(got)[1] == "upstream_truncated"
