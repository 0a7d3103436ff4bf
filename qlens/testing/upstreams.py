"""A real HTTP server that plays a provider: it answers as OpenAI does, or exactly as scripted."""

from __future__ import annotations

import asyncio
import socket
import struct
from base64 import b64encode
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlsplit

import orjson
from attrs import define, field, frozen
from multidict import CIMultiDict

from qlens import sse
from qlens.testing.other_answers import Part, parts_of, told

Event = dict[str, Any] | str | bytes
"""An event of a stream: JSON, the text after `data: `, or bytes that are written as they are."""


@frozen
class Scripted:
    """One answer. Without `body`, `events`, `raw` or `hang` it is an answer with an empty body."""

    status: int = 200
    headers: Mapping[str, str] = field(factory=dict)
    """Added to those that follow from the body; a name given here wins."""
    body: bytes | dict[str, Any] | None = None
    """Bytes as they are, or JSON."""
    events: Iterable[Event] | None = None
    """A stream of events, written one by one; `[DONE]` is not added. Empty bytes are only a pause of `gap` seconds."""
    cut_at: int | None = None
    """Close the connection after this many bytes of the body."""
    reset: bool = False
    """Cut with a TCP reset instead of an orderly end."""
    delay: float = 0
    """Seconds before the first byte."""
    gap: float = 0
    """Seconds between two events, or between two pieces."""
    split: int | None = None
    """Write the body in pieces of this many bytes."""
    raw: bytes | None = None
    """Write these bytes instead of any HTTP, and close; empty: close without an answer."""
    hang: bool = False
    """With events: never end the stream. Without: never answer. Either way until the client leaves."""


@define(eq=False)
class Recorded:
    """One request that arrived."""

    method: str
    path: str
    """Without the query."""
    query: Mapping[str, str]
    headers: Mapping[str, str]
    """Case-insensitive."""
    content: bytes = field(repr=False)
    connection: int
    """Which connection it came on, counted from 1."""
    closed: asyncio.Event = field(factory=asyncio.Event, repr=False)
    """Set when the client closed the connection before it had the whole answer."""
    answered: asyncio.Event = field(factory=asyncio.Event, repr=False)
    """Set when the answer was written to its end."""

    @property
    def body(self) -> Any:
        """The parsed JSON body; None without a body."""
        return orjson.loads(self.content) if self.content else None

    @property
    def form(self) -> list[Part]:
        """The parts of a form, in the order in which they came."""
        return parts_of(self.headers.get("content-type", ""), self.content)

    @property
    def fields(self) -> Mapping[str, Any]:
        """The fields of a form that are no files, or the JSON body."""
        if not self.headers.get("content-type", "").startswith("multipart/"):
            return self.body or {}
        return {part.name: part.text for part in self.form if part.filename is None}


@define(eq=False)
class FakeUpstream:
    """A running server; made by `upstream()`."""

    port: int = field(init=False, default=0)
    requests: list[Recorded] = field(factory=list)
    connections: int = 0
    """How many connections were opened so far."""
    open: int = 0
    """How many of them are open."""
    _answers: deque[Scripted] = field(factory=deque)
    _transports: set[asyncio.Transport] = field(factory=set)
    _arrived: asyncio.Condition = field(factory=asyncio.Condition)

    @property
    def url(self) -> str:
        """What goes into a provider's `base_url`; ends in /v1."""
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def root(self) -> str:
        """The address without a path: an Azure endpoint, say."""
        return f"http://127.0.0.1:{self.port}"

    def script(self, *answers: Scripted) -> None:
        """Queue answers for the next requests, whatever they ask; after them it answers by itself again."""
        self._answers.extend(answers)

    async def arrived(self, count: int, seconds: float = 5) -> list[Recorded]:
        """Wait for this many requests; TimeoutError when they do not come."""
        async with asyncio.timeout(seconds), self._arrived:
            await self._arrived.wait_for(lambda: len(self.requests) >= count)
        return self.requests

    def hang_up(self) -> None:
        """End all connections, as if they had idled for too long; a client learns of it when its loop next looks."""
        for transport in self._transports:
            transport.get_extra_info("socket").shutdown(socket.SHUT_RDWR)

    async def _record(self, request: Recorded) -> Scripted:
        async with self._arrived:
            self.requests.append(request)
            self._arrived.notify_all()
        return self._answer(request)

    def _answer(self, request: Recorded) -> Scripted:
        """The next scripted answer, or else the usual one."""
        return self._answers.popleft() if self._answers else self._usual(request)

    def _usual(self, request: Recorded) -> Scripted:
        """The answer to a request for which none is scripted."""
        return usual_answer(request)


@asynccontextmanager
async def upstream() -> AsyncIterator[FakeUpstream]:
    """Serve on a free loopback port until the block is left.

    Unscripted, it answers chat, completions and embeddings as OpenAI does: small, always the same, JSON or a stream.
    """
    async with serving(FakeUpstream()) as fake:
        yield fake


F = TypeVar("F", bound=FakeUpstream)


@asynccontextmanager
async def serving(fake: F) -> AsyncIterator[F]:
    """Serve as this provider on a free loopback port until the block is left."""
    server = await asyncio.get_running_loop().create_server(lambda: _Connection(fake), "127.0.0.1", 0)
    fake.port = server.sockets[0].getsockname()[1]
    try:
        yield fake
    finally:
        server.close()
        for transport in list(fake._transports):
            transport.abort()
        await server.wait_closed()
        await asyncio.sleep(0)  # the lost connections cancel what still answers


# --- the server --------------------------------------------------------------------------------


@define(eq=False)
class _Connection(asyncio.Protocol):
    # Not asyncio's streams: those notice that the client has left only when they write.
    fake: FakeUpstream
    number: int = field(init=False, default=0)
    _transport: asyncio.Transport = field(init=False)
    _received: bytes = field(init=False, default=b"")
    _request: Recorded | None = field(init=False, default=None)
    _task: asyncio.Task[None] | None = field(init=False, default=None)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.fake.connections += 1
        self.fake.open += 1
        self.number = self.fake.connections
        self.fake._transports.add(transport)

    def data_received(self, data: bytes) -> None:
        self._received += data
        if self._task is None or self._task.done():
            self._next_request()

    def connection_lost(self, exc: Exception | None) -> None:
        self.fake.open -= 1
        self.fake._transports.discard(self._transport)
        if self._request is not None and not self._request.answered.is_set():
            self._request.closed.set()
        if self._task is not None:
            self._task.cancel()

    def _next_request(self) -> None:
        found = _parsed(self._received, self.number)
        if found is not None:
            self._request, self._received = found
            self._task = asyncio.get_running_loop().create_task(self._run(self._request))

    async def _run(self, request: Recorded) -> None:
        try:
            await self._answer(request)
        except Exception:
            self._transport.abort()  # a script that fails must not leave the client waiting
            raise

    async def _answer(self, request: Recorded) -> None:
        scripted = await self.fake._record(request)
        await asyncio.sleep(scripted.delay)
        if scripted.hang and scripted.events is None:
            await asyncio.Event().wait()
        elif scripted.raw is not None:
            request.answered.set()
            self._transport.write(scripted.raw)
            self._transport.close()
        else:
            await self._write(scripted, request)

    async def _write(self, scripted: Scripted, request: Recorded) -> None:
        self._transport.write(_head(scripted))
        left = scripted.cut_at
        for piece in _pieces(scripted):
            sent = piece if left is None else piece[:left]
            if sent:
                self._transport.write(sent if scripted.events is None else b"%x\r\n%s\r\n" % (len(sent), sent))
            # One turn of the loop at least, so that pieces arrive as pieces.
            await asyncio.sleep(scripted.gap)
            if left is not None and (left := left - len(sent)) <= 0:
                request.answered.set()
                self._cut(scripted.reset)
                return
        if scripted.hang:
            await asyncio.Event().wait()
        request.answered.set()
        if scripted.events is not None:
            self._transport.write(b"0\r\n\r\n")
        self._task = None
        self._next_request()

    def _cut(self, reset: bool) -> None:
        if not reset:
            self._transport.close()
            return
        self._transport.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
        )
        self._transport.abort()


def _parsed(received: bytes, connection: int) -> tuple[Recorded, bytes] | None:
    """The first whole request and the bytes after it; None while one is not whole."""
    head, end, rest = received.partition(b"\r\n\r\n")
    if not end:
        return None
    first, *lines = head.decode("latin-1").split("\r\n")
    method, target, _ = first.split(" ", 2)
    headers = CIMultiDict((name, value.strip()) for name, _, value in (line.partition(":") for line in lines))
    length = int(headers.get("content-length", 0))
    if len(rest) < length:
        return None
    url = urlsplit(target)
    recorded = Recorded(method, url.path, dict(parse_qsl(url.query)), headers, rest[:length], connection)
    return recorded, rest[length:]


def _head(scripted: Scripted) -> bytes:
    headers: CIMultiDict[str] = CIMultiDict()
    if scripted.events is not None:
        headers.update({"content-type": "text/event-stream; charset=utf-8", "transfer-encoding": "chunked"})
    else:
        headers["content-length"] = str(len(_content(scripted)))
    if isinstance(scripted.body, dict):
        headers["content-type"] = "application/json"
    for name, value in scripted.headers.items():
        headers[name] = value
    reason = HTTPStatus(scripted.status).phrase if scripted.status in set(HTTPStatus) else ""
    lines = [f"HTTP/1.1 {scripted.status} {reason}", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode()


def _content(scripted: Scripted) -> bytes:
    return orjson.dumps(scripted.body) if isinstance(scripted.body, dict) else scripted.body or b""


def _pieces(scripted: Scripted) -> Iterator[bytes]:
    whole = (_event(event) for event in scripted.events) if scripted.events is not None else [_content(scripted)]
    for part in whole:
        size = scripted.split or len(part) or 1
        yield from (part[start : start + size] for start in range(0, len(part) or 1, size))


def _event(event: Event) -> bytes:
    if isinstance(event, bytes):
        return event
    return sse.write(event) if isinstance(event, dict) else f"data: {event}\n\n".encode()


# --- what it says by itself --------------------------------------------------------------------

TEXT = "Hello from upstream."
USAGE = {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13}


def usual_answer(request: Recorded) -> Scripted:
    """What OpenAI would answer: a text, its tokens in a stream, a vector, or an error for what it does not serve."""
    if request.path.endswith("/chat/completions"):
        return _chat(request.body)
    if request.path.endswith("/completions"):
        return _completion(request.body)
    if request.path.endswith("/embeddings"):
        return _embedding(request.body)
    if (other := told(request.path, lambda: request.fields)) is not None:
        headers = {"content-type": other.content_type} if other.content_type else {}
        return Scripted(headers=headers, body=other.body, events=other.events)
    return error(404, f"Unknown request URL: {request.method} {request.path}", code="unknown_url")


def error(status: int, message: str, **fields: Any) -> Scripted:
    """An answer with OpenAI's error object; `fields` are its type, param and code."""
    body = {"message": message, "type": "invalid_request_error", "param": None, "code": None, **fields}
    return Scripted(status, body={"error": body})


def chat_events(text: str = TEXT, *, usage: Mapping[str, Any] | None = None, finish: str = "stop") -> list[Event]:
    """The events of a chat stream: role, a word each, finish reason, usage if given, end mark."""
    head = {"id": "chatcmpl-upstream", "object": "chat.completion.chunk", "created": 1700000000, "model": "upstream"}
    words = [word + " " for word in text.split(" ")]
    words[-1] = words[-1][:-1]
    deltas: list[tuple[dict[str, str], str | None]] = [({"role": "assistant", "content": ""}, None)]
    deltas += [({"content": word}, None) for word in words]
    deltas += [({}, finish)]
    events: list[Event] = [
        {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]} for delta, reason in deltas
    ]
    if usage is not None:
        events.append({**head, "choices": [], "usage": dict(usage)})
    return [*events, "[DONE]"]


def _chat(body: Any) -> Scripted:
    if body.get("stream"):
        asked = (body.get("stream_options") or {}).get("include_usage")
        return Scripted(events=chat_events(usage=USAGE if asked else None))
    choice = {"index": 0, "message": {"role": "assistant", "content": TEXT}, "finish_reason": "stop"}
    head = {"id": "chatcmpl-upstream", "object": "chat.completion", "created": 1700000000, "model": "upstream"}
    return Scripted(body={**head, "choices": [choice], "usage": USAGE}, headers={"x-request-id": "req-upstream"})


def _completion(body: Any) -> Scripted:
    head = {"id": "cmpl-upstream", "object": "text_completion", "created": 1700000000, "model": "upstream"}
    choice = {"index": 0, "text": TEXT, "finish_reason": "stop", "logprobs": None}
    if not body.get("stream"):
        return Scripted(body={**head, "choices": [choice], "usage": USAGE})
    events: list[Event] = [{**head, "choices": [choice]}]
    if (body.get("stream_options") or {}).get("include_usage"):
        events.append({**head, "choices": [], "usage": USAGE})
    return Scripted(events=[*events, "[DONE]"])


def _embedding(body: Any) -> Scripted:
    given = body["input"]
    inputs = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else given
    numbers = (0.6, 0.0, -0.8)
    packed = body.get("encoding_format") == "base64"
    vector: Any = b64encode(struct.pack("<3f", *numbers)).decode() if packed else list(numbers)
    data = [{"object": "embedding", "index": index, "embedding": vector} for index in range(len(inputs))]
    usage = {"prompt_tokens": len(inputs), "total_tokens": len(inputs)}
    return Scripted(body={"object": "list", "data": data, "model": "upstream", "usage": usage})
