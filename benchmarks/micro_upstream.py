"""Measures what one exchange with a provider costs: qlens.Upstream beside aiohttp's ClientSession, in turns.

`small` and `chunk` are the clients alone; `post` and `event` are post_openai, a stream with the meter behind it.

Both ask the same server, which runs in a process of its own; CPU time is that of this process alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

import aiohttp
from attrs import frozen

from qlens import Call, CallError, Cost, Deadlines, Outgoing, Upstream, post_openai
from qlens.metering import Meter
from qlens.operations import OPERATIONS

ANSWER = json.dumps(
    {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "model": "gpt-4o-mini",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "x" * 800}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 120, "completion_tokens": 33, "total_tokens": 153},
    }
).encode()
REQUEST = json.dumps({"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "x" * 850}]}).encode()
FIELDS = b"content-type: application/json\r\nx-request-id: req-1\r\n" + b"".join(
    b"X-Ratelimit-Number-%d: 1000\r\n" % number for number in range(12)
)
EVENT = (
    b'data: {"id":"chatcmpl-1234567890","object":"chat.completion.chunk","created":1700000000,"model":"gpt-4o-mini",'
    b'"choices":[{"index":0,"delta":{"content":" hello"},"logprobs":null,"finish_reason":null}],"usage":null}\n\n'
)
END = b"data: [DONE]\n\n"
EVENTS = 100
HEADERS = {"content-type": "application/json", "authorization": "Bearer sk-example-bench", "accept": "application/json"}
DEADLINES = Deadlines()

Exchange = Callable[[str], Awaitable[int]]
"""Does one exchange with a URL; the pieces in which the body came."""


@frozen
class Row:
    """What one side costs in one case."""

    side: str
    case: str
    microseconds: list[float]

    def __str__(self) -> str:
        return f"{self.case:8} {self.side:14} {min(self.microseconds):8.1f} {statistics.median(self.microseconds):8.1f}"


# --- the server --------------------------------------------------------------------------------


class Server(asyncio.Protocol):
    """Answers each request as fast as it can; requests are not pipelined, so one read ends with one."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.received = b""

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, end, body = self.received.partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0] or 0)
        if not end or len(body) < length:
            return
        self.received = b""
        if b"/stream" in head[:40]:
            asyncio.get_running_loop().create_task(self.stream())
        else:
            self.transport.write(b"HTTP/1.1 200 OK\r\n%scontent-length: %d\r\n\r\n%s" % (FIELDS, len(ANSWER), ANSWER))

    async def stream(self) -> None:
        """A stream whose events are written one by one."""
        self.transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        for _ in range(EVENTS):
            if self.transport.is_closing():
                return
            self.transport.write(b"%x\r\n%s\r\n" % (len(EVENT), EVENT))
            await asyncio.sleep(0.002)
        self.transport.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(END), END))


def serve(ready: Connection, core: int | None) -> None:
    """Run the server until the process is ended."""

    async def run() -> None:
        server = await asyncio.get_running_loop().create_server(Server, "127.0.0.1", 0)
        ready.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    if core is not None:
        os.sched_setaffinity(0, {core})
    asyncio.run(run())


@contextmanager
def server() -> Iterator[str]:
    """A server on another core, where there is one."""
    cores = sorted(os.sched_getaffinity(0))
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=serve, args=(there, cores[1] if len(cores) > 1 else None), daemon=True
    )
    process.start()
    os.sched_setaffinity(0, {cores[0]})
    try:
        yield f"http://127.0.0.1:{here.recv()}"
    finally:
        os.sched_setaffinity(0, set(cores))
        process.terminate()
        process.join()


# --- the two sides -----------------------------------------------------------------------------


def ours(http: Upstream) -> Exchange:
    """With qlens.Upstream."""

    async def exchange(url: str) -> int:
        answer = await http.open("POST", url, headers=HEADERS, body=REQUEST, deadlines=DEADLINES)
        pieces = 0
        async for _ in answer.chunks():
            pieces += 1
        return pieces

    return exchange


def theirs(session: aiohttp.ClientSession) -> Exchange:
    """With aiohttp's ClientSession."""

    async def exchange(url: str) -> int:
        async with session.post(url, data=REQUEST, headers=HEADERS, allow_redirects=False) as response:
            pieces = 0
            async for _ in response.content.iter_any():
                pieces += 1
            return pieces

    return exchange


def posted(http: Upstream) -> Exchange:
    """With post_openai, whose stream passes the meter."""
    (chat,) = (operation for operation in OPERATIONS if operation.name == "chat")
    body = json.loads(REQUEST)

    async def never() -> bytes:
        raise AssertionError("the body is given, so nothing reads it")

    async def exchange(url: str) -> int:
        stream = url.endswith("/stream")
        outgoing = Outgoing(chat, "chat", body, stream)
        reply = await post_openai(http, url, headers=HEADERS, outgoing=outgoing, deadlines=DEADLINES)
        if reply.chunks is None:
            return 1
        call = Call("1", chat, "", {}, {}, {}, None, None, 0, 0, 0, never)
        meter = Meter(call, reply, price=lambda _: Cost(0), ended=lambda _: asyncio.sleep(0), failed=_failed)
        pieces = 0
        async for _ in meter.watch(reply.chunks):
            pieces += 1
        await reply.aclose()
        return pieces

    return exchange


def _failed(error: BaseException) -> CallError:
    raise error


async def cost(exchange: Exchange, url: str, count: int, at_once: int) -> tuple[float, int]:
    """The CPU microseconds of this process for each exchange, and all the pieces that came."""
    numbers = iter(range(count))
    pieces = 0

    async def client() -> None:
        nonlocal pieces
        for _ in numbers:
            pieces += await exchange(url)

    before = time.process_time()
    await asyncio.gather(*(client() for _ in range(at_once)))
    return (time.process_time() - before) / count * 1e6, pieces


async def measure(url: str, rounds: int, count: int, at_once: int) -> list[Row]:
    """All sides in turns, in each case; microseconds for an exchange, or for a chunk of a stream."""
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=60)
    connector = aiohttp.TCPConnector(limit=0)
    session = aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar(), timeout=timeout)
    http = Upstream()
    sides = [
        ("qlens", ours(http), "small", "chunk"),
        ("ClientSession", theirs(session), "small", "chunk"),
        ("post_openai", posted(http), "post", "event"),
    ]
    rows = {(side, case): Row(side, case, []) for side, _, *cases in sides for case in cases}
    try:
        for _ in range(rounds + 1):
            for side, exchange, whole, part in sides:
                small, _ = await cost(exchange, f"{url}/v1", count, at_once)
                stream, _ = await cost(exchange, f"{url}/stream", count // EVENTS, at_once // 2)
                rows[side, whole].microseconds.append(small)
                rows[side, part].microseconds.append(stream / EVENTS)
    finally:
        await session.close()
        await http.aclose()
    for row in rows.values():
        del row.microseconds[0]  # the warm-up
    return list(rows.values())


def main() -> None:
    """Print a table: the least and the median microseconds of CPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--exchanges", type=int, default=10_000)
    parser.add_argument("--at-once", type=int, default=64)
    given = parser.parse_args()
    with server() as url:
        rows = asyncio.run(measure(url, given.rounds, given.exchanges, given.at_once))
    print("case     side                min   median")
    print("\n".join(map(str, rows)))


if __name__ == "__main__":
    main()
