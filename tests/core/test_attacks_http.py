"""Clients and plugins that do odd things to the connection: what is on the wire stays well-formed, calls settle."""

from __future__ import annotations

import asyncio
import json
import math
import socket
from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest
from puppets import Puppet, Resident, Speaker
from yamls import CHAT, HELLO, STREAM, config, probe, targets

from qlens import CallError, RateLimited, Reply
from qlens.call import Limit
from qlens.server import Server
from qlens.testing import Running, running

PUPPET = {"plugin": "puppets:Puppet", "name": "puppet"}
SPEAKER = {"speaker": {"plugin": "puppets:Speaker"}}
ONE = {"gpt-4o-mini": {"max_output_tokens": 100, "targets": targets("speaker")}}
STAGES = {"guard": [PUPPET]}


def _http(
    body: dict[str, Any] | None, *headers: str, method: str = "POST", path: str = CHAT, version: str = "1.1"
) -> bytes:
    raw = b"" if body is None else orjson.dumps(body)
    lines = [f"{method} {path} HTTP/{version}", "host: x", *headers]
    if body is not None:
        lines += ["content-type: application/json", f"content-length: {len(raw)}"]
    return "\r\n".join([*lines, "", ""]).encode() + raw


class Client:
    """A connection that reads only when it is told to, and little at a time."""

    def __init__(self, gateway: Running, *, admin: bool = False) -> None:
        host, port = (gateway.admin_url if admin else gateway.url).removeprefix("http://").split(":")
        self.address = (host, int(port))
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.setblocking(False)

    async def send(self, data: bytes) -> Client:
        loop = asyncio.get_running_loop()
        await loop.sock_connect(self.socket, self.address)
        await loop.sock_sendall(self.socket, data)
        return self

    async def rest(self, seconds: float = 5, *, until: bytes = b"") -> bytes:
        """Read until the gateway closes, or until these bytes came."""
        got = bytearray()
        try:
            async with asyncio.timeout(seconds):
                while part := await asyncio.get_running_loop().sock_recv(self.socket, 65536):
                    got += part
                    if until and until in got:
                        break
        except (ConnectionError, TimeoutError) as error:
            got += b"" if isinstance(error, ConnectionError) else b"<still open>"
        return bytes(got)

    def close(self) -> None:
        self.socket.close()


def _big(size: int) -> bytes:
    message = {"index": 0, "message": {"role": "assistant", "content": "x" * size}, "finish_reason": "stop"}
    return orjson.dumps({"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [message]})


def _event(text: str) -> bytes:
    return b'data: {"id":"1","choices":[{"index":0,"delta":{"content":"' + text.encode() + b'"}}]}\n\n'


STOP = b'data: {"id":"1","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'


async def test_a_deadline_in_the_middle_of_a_body_adds_nothing_to_it() -> None:
    body = _big(16_000_000)
    # On a machine that is busy, too, the body has begun by then.
    async with running(config(STAGES, SPEAKER, ONE, call_seconds=2)) as gateway:
        gateway.plugin("provider", "speaker").answer = lambda *_: Reply(body=body, complete=True)
        client = await Client(gateway).send(_http(HELLO))
        await gateway.settled(1)
        await asyncio.sleep(0.2)
        got = await client.rest()
        assert b"call_timeout" not in got
        assert b"<still open>" not in got
        _, _, sent = got.partition(b"\r\n\r\n")
        assert body.startswith(sent)
        assert gateway.plugin("guard", "puppet").held == set()
        client.close()


async def test_a_deadline_at_the_end_of_a_stream_adds_nothing_after_its_last_chunk() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield _event("x" * 16_000) + STOP

    async with running(config(STAGES, SPEAKER, ONE, call_seconds=0.5)) as gateway:
        server: Server = gateway.server
        assert server is gateway.server
        puppet: Puppet = gateway.plugin("guard", "puppet")

        async def large(call: Any, proceed: Any) -> Reply:
            reply: Reply = await proceed()
            inner = reply.chunks
            assert inner is not None

            async def padded() -> AsyncIterator[bytes]:
                async for chunk in inner:
                    yield chunk
                yield b": " + b"x" * 16_000_000 + b"\n\n"

            reply.replace(chunks=padded())
            return reply

        puppet.does["wrap_call"] = large
        gateway.plugin("provider", "speaker").answer = lambda *_: Reply(chunks=chunks())
        client = await Client(gateway).send(_http(STREAM))
        await gateway.settled(1)
        await asyncio.sleep(0.2)
        got = await client.rest()
        assert b"<still open>" not in got
        assert not got.partition(b"\r\n0\r\n\r\n")[2]
        client.close()


HEADERS: list[dict[Any, Any]] = [
    {"x-odd": "a\r\nx-injected: yes"},
    {"x-odd\r\nx-injected: yes": "a"},
    {"x-odd": "a\x00"},
    {"x-odd": "\ud800"},
    {"x-odd": 5},
    {"x-odd": None},
    {5: "x"},
    {"content-length": "3"},
    {"Transfer-Encoding": "chunked"},
    {"Connection": "close, x-request-id"},
]


@pytest.mark.parametrize("body", [HELLO, STREAM], ids=["body", "stream"])
@pytest.mark.parametrize("headers", HEADERS, ids=range(len(HEADERS)))
async def test_a_header_of_a_provider_that_cannot_be_sent_is_left_out(
    headers: dict[Any, Any], body: dict[str, Any]
) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield _event("Hi") + STOP

    async with running(config(STAGES, SPEAKER, ONE)) as gateway:
        gateway.plugin("provider", "speaker").answer = lambda *_: (
            Reply(chunks=chunks(), headers={**headers, "x-good": "Grüße"})
            if body is STREAM
            else Reply(body=_big(2), complete=True, headers={**headers, "x-good": "Grüße"})
        )
        answer = await gateway.post(CHAT, body)
        assert answer.status == 200
        assert answer.text.endswith("[DONE]\n\n") if body is STREAM else answer.json()["choices"]
        assert answer.headers["x-good"] == "Grüße"
        assert "x-injected" not in answer.headers
        assert answer.headers.get("connection") is None
        (receipt,) = await gateway.settled(1)
        assert receipt.outcome == "complete"


def _odd(**fields: Any) -> CallError:
    error = CallError("odd")
    for name, value in fields.items():
        setattr(error, name, value)
    return error


ERRORS: list[CallError] = [
    _odd(retry_after=math.nan),
    _odd(retry_after=math.inf),
    _odd(retry_after=-math.inf),
    _odd(retry_after=1e308),
    _odd(headers={"x-odd": "a\r\nx-injected: yes"}),
    _odd(headers={"Content-Type": "text/html"}),
    _odd(message=b"bytes"),
    _odd(message="\ud800"),
    _odd(param=object()),
    _odd(code="a\r\nb\u2028"),
]


@pytest.mark.parametrize("error", ERRORS, ids=range(len(ERRORS)))
async def test_an_odd_error_of_a_plugin_is_still_an_answer_in_openais_words(error: CallError) -> None:
    async with running(config(STAGES)) as gateway:
        puppet: Puppet = gateway.plugin("guard", "puppet")

        def refuse(*_: object) -> None:
            raise error

        puppet.does["admit"] = refuse
        answer = await gateway.post(CHAT, HELLO)
        assert answer.status == 500
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert answer.headers["content-type"].startswith("application/json")
        assert "x-injected" not in answer.headers
        assert len(answer.headers.get("retry-after", "")) < 12
        assert len(await gateway.settled(1)) == 1


async def test_an_odd_limit_does_not_cost_the_answer() -> None:
    async with running(config(STAGES)) as gateway:
        puppet: Puppet = gateway.plugin("guard", "puppet")
        puppet.does["admit"] = lambda call: call.limits.extend(
            [Limit("requests", "x", 10, 5, math.inf), Limit("tokens", "x", 10, 5, math.nan)]
        )
        answer = await gateway.post(CHAT, HELLO)
        assert answer.status == 200
        assert answer.headers["x-ratelimit-remaining-requests"] == "5"


@pytest.mark.parametrize("path", [b"/v1/models/\xff", b"/v1/models/%ff", b"/v1/models/a%0d%0ab", b"/\xff\xfe"])
async def test_a_path_that_is_no_text_is_refused_in_openais_words(path: bytes) -> None:
    async with running(config()) as gateway:
        client = await Client(gateway).send(b"GET " + path + b" HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        got = await client.rest()
        head, _, body = got.partition(b"\r\n\r\n")
        assert head[:13] in {b"HTTP/1.0 400 ", b"HTTP/1.1 400 ", b"HTTP/1.1 404 "}
        assert json.loads(body)["error"]["type"] == "invalid_request_error"
        client.close()


async def test_http_1_0_gets_a_stream_that_ends_with_the_connection() -> None:
    async with running(config()) as gateway:
        client = await Client(gateway).send(_http(STREAM, "connection: keep-alive", version="1.0"))
        head, _, body = (await client.rest()).partition(b"\r\n\r\n")
        assert b"chunked" not in head.lower()
        assert body.startswith(b"data: ")
        assert body.endswith(b"data: [DONE]\n\n")
        client.close()


async def test_http_1_0_is_not_told_to_continue() -> None:
    async with running(config()) as gateway:
        client = await Client(gateway).send(_http(HELLO, "expect: 100-continue", version="1.0"))
        assert (await client.rest()).startswith(b"HTTP/1.0 200 OK")
        client.close()


@pytest.mark.parametrize("path", ["/v1/models", "/healthz", "/nothing", CHAT])
async def test_head_has_no_body(path: str) -> None:
    async with running(config()) as gateway:
        client = await Client(gateway).send(_http(None, "connection: close", method="HEAD", path=path))
        head, _, body = (await client.rest()).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 ")
        assert body == b""
        client.close()


async def test_fields_nested_too_deeply_to_be_sent_on_are_400() -> None:
    deep: Any = 1
    for _ in range(300):
        deep = [deep]
    async with running(config()) as gateway:
        for name in ("made_up", "metadata", "logit_bias", "tools"):
            raw = json.dumps({**HELLO, name: deep}).encode()
            assert (await gateway.post(CHAT, raw)).status == 400
        assert {receipt.outcome for receipt in await gateway.settled(4)} == {"rejected"}


async def test_a_call_that_ends_while_draining_closes_its_connection() -> None:
    async with running(config(STAGES, SPEAKER, ONE)) as gateway:
        go = asyncio.Event()

        async def later(*_: object) -> Reply:
            await go.wait()
            return Reply(body=_big(2), complete=True)

        gateway.plugin("provider", "speaker").answer = later
        client = await Client(gateway).send(_http(HELLO))
        while not gateway.gateway.current.running:
            await asyncio.sleep(0.01)
        stopping = asyncio.create_task(gateway.server.stop(5))
        await asyncio.sleep(0.05)
        go.set()
        got = await client.rest()
        assert got.startswith(b"HTTP/1.1 200 OK")
        assert b"connection: close" in got.lower()
        await stopping
        client.close()


async def test_a_client_that_does_not_read_holds_back_the_provider() -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 1
            yield _event("x" * 10_000)

    async with running(config(STAGES, SPEAKER, ONE)) as gateway:
        speaker: Speaker = gateway.plugin("provider", "speaker")
        speaker.answer = lambda *_: Reply(chunks=endless(), close=speaker.close)
        client = await Client(gateway).send(_http(STREAM))
        await asyncio.sleep(0.3)
        before = sent
        await asyncio.sleep(0.3)
        assert sent == before
        assert sent < 1000
        client.close()
        (receipt,) = await gateway.settled(1)
        assert (receipt.outcome, speaker.closed) == ("abandoned", 1)


async def test_a_client_that_never_reads_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlens.server.STALL_SECONDS", 0.3)

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield _event("x" * 10_000)

    async with running(config(STAGES, SPEAKER, ONE)) as gateway:
        speaker: Speaker = gateway.plugin("provider", "speaker")
        speaker.answer = lambda *_: Reply(chunks=endless(), close=speaker.close)
        client = await Client(gateway).send(_http(STREAM))
        (receipt,) = await gateway.settled(1, 10)
        assert (receipt.outcome, speaker.closed) == ("abandoned", 1)
        client.close()


RESIDENT = {"plugin": "puppets:Resident", "name": "home"}


async def test_an_endpoint_that_hangs_ends_at_the_calls_deadline() -> None:
    async with running(config({"observe": [RESIDENT]}, call_seconds=0.2)) as gateway:
        home: Resident = gateway.plugin("observe", "home")

        async def hang(call: object) -> None:
            await asyncio.Event().wait()

        home.answer = hang
        for path in ("/home", "/admin/home"):
            answer = await asyncio.wait_for(gateway.get(path), 5)
            assert (answer.status, answer.json()["error"]["code"]) == (504, "call_timeout")


async def test_an_endpoint_may_hang_in_its_authentication_no_longer_than_a_call() -> None:
    auth = [probe("who", hang=["authenticate"])]
    async with running(config({"auth": auth, "observe": [RESIDENT]}, call_seconds=0.2)) as gateway:
        answer = await asyncio.wait_for(gateway.get("/admin/home"), 5)
        assert answer.status == 504


@pytest.mark.parametrize("nonsense", [None, 5, RuntimeError("sk-example-secret"), TimeoutError()], ids=repr)
async def test_an_endpoint_that_answers_nonsense_is_500(nonsense: Any) -> None:
    async with running(config({"observe": [RESIDENT]})) as gateway:
        home: Resident = gateway.plugin("observe", "home")

        async def answer(call: object) -> Any:
            if isinstance(nonsense, Exception):
                raise nonsense
            return nonsense

        home.answer = answer
        got = await gateway.get("/home")
        assert (got.status, got.json()["error"]["code"]) == (500, "internal_error")
        assert "secret" not in got.text


async def test_an_endpoint_has_its_own_content_type_and_may_stream() -> None:
    async with running(config({"observe": [RESIDENT]})) as gateway:
        home: Resident = gateway.plugin("observe", "home")
        closed: list[str] = []

        async def close() -> None:
            closed.append("closed")

        async def pieces() -> AsyncIterator[bytes]:
            yield b"one,"
            yield b"two"

        async def page(call: object) -> Reply:
            return Reply(body=b"<p>", headers={"Content-Type": "text/html"}, close=close)

        async def stream(call: object) -> Reply:
            return Reply(chunks=pieces(), headers={"Content-Type": "text/csv"}, close=close)

        home.answer = page
        client = await Client(gateway).send(_http(None, "connection: close", method="GET", path="/home"))
        assert (await client.rest()).lower().count(b"content-type:") == 1
        home.answer = stream
        answer = await gateway.get("/home")
        assert (answer.text, answer.headers["content-type"]) == ("one,two", "text/csv")
        assert closed == ["closed", "closed"]
        client.close()


async def test_a_mistake_outside_of_a_call_is_no_mistake_of_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: object) -> None:
        raise RuntimeError("sk-example-secret")

    async with running(config()) as gateway:
        monkeypatch.setattr(Server, "_handle", fail)
        answer = await gateway.get("/healthz")
        assert (answer.status, answer.json()["error"]["code"]) == (500, "internal_error")
        assert "secret" not in answer.text


async def test_requests_sent_at_once_are_answered_one_after_another_and_all_of_them() -> None:
    async with running(config(STAGES, SPEAKER, ONE)) as gateway:
        speaker: Speaker = gateway.plugin("provider", "speaker")
        together, most, number = 0, 0, 0

        async def answer(*_: object) -> Reply:
            nonlocal together, most, number
            together += 1
            most = max(most, together)
            await asyncio.sleep(0)
            together, number = together - 1, number + 1
            return Reply(body=_big(number), complete=True)

        speaker.answer = answer
        count = 100  # more than aiohttp keeps in its queue
        client = await Client(gateway).send(_http(HELLO) * (count - 1) + _http(HELLO, "connection: close"))
        got = await client.rest()
        texts = [json.loads(body[: body.index(b"]}") + 2]) for body in got.split(b"\r\n\r\n")[1:]]
        assert [len(text["choices"][0]["message"]["content"]) for text in texts] == list(range(1, count + 1))
        assert most == 1
        client.close()


async def test_an_idle_connection_and_a_slow_head_are_closed() -> None:
    async with running(config(STAGES, SPEAKER, ONE, keepalive_seconds=0.3)) as gateway:
        gateway.plugin("provider", "speaker").answer = lambda *_: Reply(body=_big(2), complete=True)
        for sent in (b"POST /v1", _http(HELLO), _http(HELLO) + b"POST"):
            client = await Client(gateway).send(sent)
            got = await client.rest()
            assert got.count(b"200 OK") == sent.count(b"content-length")
            assert not got.endswith(b"<still open>")
            client.close()


async def test_a_refusal_with_a_huge_retry_after_stays_a_number() -> None:
    async with running(config(STAGES)) as gateway:

        def refuse(*_: object) -> None:
            raise RateLimited("no", retry_after=86400.2)

        gateway.plugin("guard", "puppet").does["admit"] = refuse
        answer = await gateway.post(CHAT, HELLO)
        assert (answer.headers["retry-after"], answer.headers["retry-after-ms"]) == ("86401", "86400200")
