"""Caches that keep the very objects they were given: calls change theirs, and never what a cache has."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import orjson
import pytest
from puppets import Puppet
from yamls import CHAT, HELLO, STREAM, config

from qlens import Call, Reply
from qlens.testing import Response, Running, running

STAGES = {"guard": [{"plugin": "puppets:Puppet", "name": "guard"}], "cache": [{"plugin": "puppets:Puppet"}]}


def _puppet(gateway: Running, stage: str) -> Puppet:
    puppet: Puppet = gateway.plugin(stage, "guard" if stage == "guard" else "Puppet")
    return puppet


def _text(answer: Response) -> str:
    if answer.headers["content-type"].startswith("application/json"):
        return str(answer.json()["choices"][0]["message"]["content"])
    return "".join(
        event["choices"][0]["delta"].get("content") or ""
        for event in answer.events()
        if event != "[DONE]" and event["choices"]
    )


async def _doubled(call: Call, proceed: Callable[[], Awaitable[Reply]]) -> Reply:
    reply = await proceed()
    reply.rewrite_text(lambda text: text.replace("l", "ll"), hold_back=0)
    return reply


@pytest.mark.parametrize("first", [HELLO, STREAM], ids=["body", "stream"])
async def test_a_cache_may_return_the_reply_that_it_was_handed(first: dict[str, Any]) -> None:
    async with running(config(STAGES)) as gateway:
        cache, kept = _puppet(gateway, "cache"), dict[str, Reply]()
        _puppet(gateway, "guard").does["wrap_call"] = _doubled

        def lookup(call: Call) -> Reply | None:
            call.keep = 100_000
            return kept.get("reply")

        cache.does["lookup"], cache.does["store"] = lookup, lambda call, reply: kept.update(reply=reply)
        for body in (first, HELLO, STREAM, HELLO, STREAM):
            answer = await gateway.post(CHAT, body)
            assert (answer.status, _text(answer)) == (200, "Hellllo there!")
        assert [receipt.outcome for receipt in await gateway.settled(5)] == ["complete", *["cached"] * 4]
        assert orjson.loads(kept["reply"].body or b"")["choices"][0]["message"]["content"] == "Hello there!"


async def test_a_stream_that_a_cache_returns_again_is_a_miss_and_its_mistake() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b'data: {"id":"1","choices":[{"index":0,"delta":{"content":"kept"},"finish_reason":"stop"}]}\n\n'
        yield b"data: [DONE]\n\n"

    closed: list[str] = []

    async def close() -> None:
        closed.append("closed")

    async with running(config(STAGES)) as gateway:
        kept = Reply(chunks=chunks(), close=close)
        _puppet(gateway, "cache").does["lookup"] = lambda call: kept
        assert _text(await gateway.post(CHAT, STREAM)) == "kept"
        for body in (STREAM, HELLO):
            answer = await gateway.post(CHAT, body)
            assert (answer.status, _text(answer)) == (200, "Hello there!")
        assert [receipt.outcome for receipt in await gateway.settled(3)] == ["cached", "complete", "complete"]
        assert closed == ["closed"]
        counted = 'qlens_plugin_failures_total{hook="lookup",plugin="Puppet"} 2.0'
        assert counted in (await gateway.get("/metrics")).text
