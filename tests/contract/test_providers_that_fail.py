"""Providers that are down, slow, refusing or lying, as the client sees them and as the receipt tells it."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest
from yamls import CHAT, HELLO, STREAM, config

from qlens.testing import Running, Scripted, running, upstream
from qlens.testing.upstreams import FakeUpstream

HEAD = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "gpt-4o-mini"}
HI: dict[str, Any] = {
    **HEAD,
    "choices": [{"index": 0, "delta": {"role": "assistant", "content": "Hi"}, "finish_reason": None}],
}
USAGE = {"prompt_tokens": -5, "completion_tokens": 2**60, "total_tokens": "many"}
MODELS = {"gpt-4o-mini": {"max_output_tokens": 100, "targets": [{"provider": "up", "model": "gpt-4o-mini"}]}}


def _config(url: str, **settings: Any) -> str:
    return config({}, {"up": {"plugin": "openai", "base_url": url, "api_key": "sk-example-up", **settings}}, MODELS)


LIES = {
    "short length": Scripted(body=b'{"choices":[{}', headers={"content-length": "500"}, cut_at=12),
    "both framings": Scripted(
        raw=b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"
    ),
    "two lengths": Scripted(raw=b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello!"),
    "no HTTP": Scripted(raw=b"hello, is it me?\r\n\r\n"),
    "no answer": Scripted(raw=b""),
    "many headers": Scripted(raw=b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 500 + b"\r\n"),
    "long header": Scripted(raw=b"HTTP/1.1 200 OK\r\nx: " + b"y" * 20_000 + b"\r\n\r\n"),
    "HTML": Scripted(body=b"<html>busy</html>", headers={"content-type": "text/html"}),
    "empty": Scripted(body=b"", headers={"content-type": "application/json"}),
    "no JSON": Scripted(body=b"{", headers={"content-type": "application/json"}),
    "no object": Scripted(body=b"[1]", headers={"content-type": "application/json"}),
    "no UTF-8": Scripted(body=b'{"choices":"\xff"}', headers={"content-type": "application/json"}),
    "no choices": Scripted(body={"id": "x"}),
    "redirect": Scripted(status=302, headers={"location": "http://127.0.0.1:1/"}),
    "reset": Scripted(body=b'{"choices":[', cut_at=5, reset=True),
    "error in a 200": Scripted(body={"error": {"message": "no", "type": "server_error", "code": None}}),
}


MADE = {"no JSON", "no UTF-8", "short length"}
"""Those of them that were made as whole answers, and what they used stood in them; of a reset nobody knows."""


@pytest.mark.parametrize("body", [HELLO, STREAM], ids=["body", "stream"])
@pytest.mark.parametrize("lie", LIES, ids=str)
async def test_a_lie_before_the_first_byte_is_502_and_one_failed_attempt(lie: str, body: dict[str, Any]) -> None:
    async with upstream() as up:
        up.script(LIES[lie])
        async with running(_config(up.url)) as gateway:
            answer = await gateway.post(CHAT, body)
            assert answer.status == 502, answer.text
            error = answer.json()["error"]
            assert error["type"] == "server_error"
            assert error["code"].startswith("upstream")
            (receipt,) = await gateway.settled(1)
            assert (receipt.outcome, receipt.status, len(receipt.attempts)) == ("failed", 502, 1)
            # What is no JSON by its type is no answer to one who asked for a stream, and is not read.
            made = lie in MADE and (body is HELLO or lie != "short length")
            if lie != "reset":
                assert (receipt.attempts[0].billed, receipt.usage.output) == (made, 100 if made else 0)
                assert receipt.cost.state == ("unpriced" if made else "exact")
            assert (await gateway.post(CHAT, body)).status == 200  # the connection pool is not poisoned


@pytest.mark.parametrize(
    ("events", "options"),
    [
        ([HI], {}),
        ([HI, b'data: {"id":"chatcmpl-1","cho'], {}),
        ([HI, {"error": {"message": "sk-example-inside", "type": "server_error", "code": None}}], {}),
        ([HI, b'data: {"choices":[],\n\n'], {}),
        ([HI, HI, HI], {"cut_at": 300, "reset": True}),
        ([HI, b"data: " + b"x" * (9 * 1024 * 1024)], {}),
    ],
    ids=["ends early", "ends in an event", "error event", "no JSON", "reset", "endless event"],
)
async def test_a_stream_that_breaks_ends_with_an_error_event_and_no_end_mark(
    events: list[Any], options: dict[str, Any]
) -> None:
    async with upstream() as up:
        up.script(Scripted(events=events, **options))
        async with running(_config(up.url)) as gateway:
            answer = await gateway.post(CHAT, STREAM)
            assert answer.status == 200
            seen = answer.events()
            assert "error" in seen[-1]
            assert seen[-1]["error"]["code"]
            assert "[DONE]" not in answer.text
            assert "sk-example-inside" not in answer.text
            (receipt,) = await gateway.settled(1)
            assert receipt.outcome == "failed"
            assert receipt.usage.source == "partial"
            assert receipt.usage.input > 0
            assert len(receipt.attempts) == len(up.requests) == 1  # nothing is repeated once a byte was sent


@pytest.mark.parametrize("body", [HELLO, STREAM], ids=["body", "stream"])
async def test_a_provider_that_is_down_is_502(body: dict[str, Any]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        async with running(_config(f"http://127.0.0.1:{taken.getsockname()[1]}/v1")) as gateway:
            answer = await gateway.post(CHAT, body)
            assert (answer.status, answer.json()["error"]["code"]) == (502, "upstream_unreachable")


@pytest.mark.parametrize("body", [HELLO, STREAM], ids=["body", "stream"])
async def test_a_provider_that_is_slow_is_504_and_its_connection_is_closed(body: dict[str, Any]) -> None:
    async with upstream() as up:
        up.script(Scripted(hang=True))
        async with running(_config(up.url, first_byte_seconds=0.2)) as gateway:
            answer = await gateway.post(CHAT, body)
            assert (answer.status, answer.json()["error"]["code"]) == (504, "upstream_timeout")
            await asyncio.wait_for(up.requests[0].closed.wait(), 1)


async def test_a_provider_that_pauses_in_the_middle_ends_the_stream_with_an_error_event() -> None:
    async with upstream() as up:
        up.script(Scripted(events=[HI], hang=True))
        async with running(_config(up.url, idle_seconds=0.2)) as gateway:
            answer = await gateway.post(CHAT, STREAM)
            assert answer.events()[-1]["error"]["code"] == "upstream_timeout"
            (receipt,) = await gateway.settled(1)
            assert receipt.outcome == "failed"


@pytest.mark.parametrize(
    ("scripted", "status", "code"),
    [
        (Scripted(status=401, body={"error": {"message": "bad key"}}), 502, "upstream_auth_error"),
        (Scripted(status=403, body={"error": {"message": "no"}}), 502, "upstream_auth_error"),
        (Scripted(status=500, body=b"oops"), 502, "upstream_error"),
        (Scripted(status=503, headers={"retry-after": "7"}), 503, "upstream_unavailable"),
        (
            Scripted(status=429, headers={"retry-after-ms": "1500"}, body={"error": {"message": "x"}}),
            429,
            "rate_limit_exceeded",
        ),
        (
            Scripted(
                status=400,
                body={"error": {"message": "too long", "code": "context_length_exceeded", "param": "messages"}},
            ),
            400,
            "context_length_exceeded",
        ),
        (Scripted(status=404, body={"error": {"message": "DeploymentNotFound"}}), 404, "model_not_found"),
    ],
    ids=["401", "403", "500", "503", "429", "400", "404"],
)
async def test_a_refusal_is_mapped(scripted: Scripted, status: int, code: str) -> None:
    async with upstream() as up:
        up.script(scripted)
        async with running(_config(up.url)) as gateway:
            answer = await gateway.post(CHAT, HELLO)
            assert (answer.status, answer.json()["error"]["code"]) == (status, code)
            if status == 429:
                assert (answer.headers["retry-after"], answer.headers["retry-after-ms"]) == ("2", "1500")
            if status == 503:
                assert answer.headers["retry-after"] == "7"


async def test_nonsense_in_usage_is_never_a_negative_charge_or_an_error() -> None:
    stages = {"cost": [{"plugin": "prices", "table": [{"model": "gpt-4o-mini", "input": 0.15, "output": 0.6}]}]}
    providers = {"up": {"plugin": "openai", "api_key": "sk-example-up"}}
    async with upstream() as up:
        providers["up"]["base_url"] = up.url
        done = {**HEAD, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
        message = {"index": 0, "message": {"role": "assistant", "content": "Hi"}, "finish_reason": "stop"}
        up.script(
            Scripted(events=[HI, done, {**HEAD, "choices": [], "usage": USAGE}, "[DONE]"]),
            Scripted(body={**HEAD, "object": "chat.completion", "choices": [message], "usage": USAGE}),
        )
        async with running(config(stages, providers, MODELS)) as gateway:
            assert (await gateway.post(CHAT, STREAM)).status == 200
            assert (await gateway.post(CHAT, HELLO)).status == 200
            for receipt in await gateway.settled(2):
                assert receipt.outcome == "complete"
                assert receipt.usage.source == "estimated"
                assert receipt.cost.picos is not None
                assert receipt.cost.picos > 0


async def _leaves(gateway: Running, up: FakeUpstream, body: dict[str, Any]) -> None:
    asking = asyncio.create_task(gateway.post(CHAT, body))
    (request,) = await up.arrived(1)
    await asyncio.sleep(0.05)
    asking.cancel()
    await asyncio.wait_for(request.closed.wait(), 1)
    (receipt,) = await gateway.settled(1)
    assert (receipt.outcome, receipt.status) == ("abandoned", 499)


@pytest.mark.parametrize("events", [None, [HI]], ids=["before the first byte", "mid-stream"])
async def test_a_client_that_leaves_closes_the_upstream_within_a_second(events: list[Any] | None) -> None:
    async with upstream() as up:
        up.script(Scripted(events=events, hang=True))
        async with running(_config(up.url)) as gateway:
            await _leaves(gateway, up, STREAM)


async def test_a_client_that_leaves_while_a_body_is_awaited_closes_the_upstream_within_a_second() -> None:
    async with upstream() as up:
        up.script(Scripted(hang=True))
        async with running(_config(up.url)) as gateway:
            await _leaves(gateway, up, HELLO)


async def test_two_hundred_streams_run_at_once() -> None:
    async with upstream() as up:
        up.script(*(Scripted(events=[HI], hang=True) for _ in range(200)))
        async with running(_config(up.url)) as gateway:
            asking = [asyncio.create_task(gateway.post(CHAT, STREAM)) for _ in range(200)]
            await up.arrived(200, 20)
            assert up.open == 200
            for task in asking:
                task.cancel()
            receipts = await gateway.settled(200, 20)
            assert {receipt.outcome for receipt in receipts} == {"abandoned"}
