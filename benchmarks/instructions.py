"""What each stage costs in Python instructions: the same on every machine and at every load, so it may be compared."""

from __future__ import annotations

import asyncio
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import orjson
from attrs import define, field

from benchmarks.gateways import MODEL, as_yaml, provider
from benchmarks.rig import ROOT, Fault
from benchmarks.stages import NO_OP, Step, redis, steps
from qlens.testing import Running, running

CALLS = 20
WARM_UP = 30
MOST_SHOWN = 40
PATH = "/v1/chat/completions"

_LENGTH = re.compile(rb"content-length: (\d+)", re.IGNORECASE)
_PLACES = (str(ROOT / "qlens"), str(ROOT / "plugins"), "aiohttp", "yarl", "multidict", "prometheus_client", "attr")
"""Whose instructions count: the event loop's own are left out, because how often it turns depends on the load."""


@define(eq=False)
class Counted:
    """Instructions by function."""

    functions: Counter[str] = field(factory=Counter)
    _names: dict[CodeType, str | None] = field(factory=dict)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what runs in here."""
        sys.settrace(self._called)
        try:
            yield
        finally:
            sys.settrace(None)

    def _called(self, frame: FrameType, _event: str, _argument: object) -> Any:
        name = self._name(frame.f_code)
        if name is None:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False

        def traced(_frame: FrameType, event: str, _argument: object) -> Any:
            if event == "opcode":
                self.functions[name] += 1
            return traced

        return traced

    def _name(self, code: CodeType) -> str | None:
        if code not in self._names:
            file = code.co_filename
            ours = file.startswith("<attrs generated") or any(place in file for place in _PLACES)
            ours = ours and "/qlens/testing/" not in file
            where = file if file.startswith("<") else "/".join(Path(file).parts[-2:])
            self._names[code] = f"{code.co_qualname} ({where})" if ours else None
        return self._names[code]


class CannedUpstream(asyncio.Protocol):
    """Answers every request with the same answer."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer
        self._got = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._got += data
        head, _, body = self._got.partition(b"\r\n\r\n")
        # Found from behind, and not by a pattern: a signed request has a long head, which is not what is measured.
        length = int(head[head.rfind(b"content-length: ") + 16 :].partition(b"\r")[0])
        if len(body) >= length:
            self._got = b""
            self._transport.write(self._answer)


def canned(chunks: int) -> bytes:
    """A chat's answer: whole, or a stream of so many events."""
    if not chunks:
        message = {"index": 0, "message": {"role": "assistant", "content": "y" * 700}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150}
        card = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "gpt-4o-mini"}
        body = orjson.dumps({**card, "choices": [message], "usage": usage})
        return framed(b"application/json", body)
    card = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "gpt-4o-mini"}
    delta = {"index": 0, "delta": {"content": "y" * 60}, "finish_reason": None}
    events = [{**card, "choices": [delta]}] * chunks
    events += [{**card, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}]
    text = b"".join(b"data: " + orjson.dumps(event) + b"\n\n" for event in events) + b"data: [DONE]\n\n"
    return framed(b"text/event-stream", text)


def framed(media: bytes, body: bytes, more: bytes = b"") -> bytes:
    """A body as an HTTP answer, with more lines of its head."""
    return b"HTTP/1.1 200 OK\r\n%bcontent-type: %b\r\ncontent-length: %d\r\n\r\n%b" % (more, media, len(body), body)


@define(eq=False)
class Client:
    """Sends calls on one connection, no two alike."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    key: str
    stream: bool
    number: int = 0

    async def call(self) -> None:
        """Make a call and read its answer."""
        self.number += 1
        messages = [
            {"role": "system", "content": "You are a helpful assistant. " * 6},
            {"role": "user", "content": f"{self.number:06} " + "x" * 500},
        ]
        body = orjson.dumps(
            {"model": "gpt-4o-mini", "messages": messages, "temperature": 0.7, "max_tokens": 100, "stream": self.stream}
        )
        head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {self.key}\r\ncontent-type: application/json"
        self.writer.write(f"{head}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
        answer = await self.reader.readuntil(b"\r\n\r\n")
        if not answer.startswith(b"HTTP/1.1 200"):
            raise Fault(f"the gateway answered {answer[:200]!r}")
        if length := _LENGTH.search(answer):
            await self.reader.readexactly(int(length[1]))
        else:
            await self.reader.readuntil(b"\r\n0\r\n\r\n")


async def _count(step: Step, chunks: int) -> Counter[str]:
    answer = canned(chunks)
    upstream = await asyncio.get_running_loop().create_server(lambda: CannedUpstream(answer), "127.0.0.1", 0)
    config = as_yaml(
        {
            "pipeline": step.pipeline,
            "providers": {"bench": provider(upstream.sockets[0].getsockname()[1])},
            "models": {"gpt-4o-mini": MODEL},
        }
    )
    async with upstream, running(config, files={"no_op.py": NO_OP}) as gateway:
        client = await connected(gateway, stream=bool(chunks), key=step.key)
        for _ in range(WARM_UP):
            await client.call()
        await gateway.settled(WARM_UP)
        counted = Counted()
        with counted.counting():
            for _ in range(CALLS):
                await client.call()
        await gateway.settled(WARM_UP + CALLS)
        client.writer.close()
    return counted.functions


async def connected(gateway: Running, *, stream: bool, key: str | None = None) -> Client:
    """A client of a gateway, with its demo key if it has one and nothing else is given."""
    host, port = gateway.url.removeprefix("http://").split(":")
    demo = gateway.folder / "demo.key"
    key = key or (demo.read_text().strip() if demo.exists() else "sk-example-none")
    return Client(*await asyncio.open_connection(host, int(port)), key, stream)


def measure(chunks: int) -> str:
    """Count a call at each step; then where a call with every stage spends its instructions."""
    counts: dict[str, Counter[str]] = {}
    lines = ["| with | instructions per call | more than before |", "|---|---|---|"]
    with redis() as redis_url:
        ladder: Sequence[Step] = steps(redis_url)
        for step in ladder:
            counts[step.name] = asyncio.run(_count(step, chunks))
            total = counts[step.name].total() / CALLS
            more = "" if step.after is None else f"{total - counts[step.after].total() / CALLS:+.0f}"
            lines.append(f"| {step.name} | {total:.0f} | {more} |")
    every = counts[ladder[-2].name]
    lines += ["", f"{ladder[-2].name}, and all before it:", "", "| function | instructions per call |", "|---|---|"]
    lines += [f"| {name} | {count / CALLS:.0f} |" for name, count in every.most_common(MOST_SHOWN)]
    return "\n".join(lines)
