"""Calls that end badly leave no reference cycle: the collector looks seldom, and what it has not freed is memory."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager

import orjson
import pytest
from yamls import CHAT, HELLO, STREAM, config, targets

from qlens.testing import Running, Scripted, running, upstream
from qlens.testing.upstreams import FakeUpstream

CALLS = 10
EVENT = {"choices": [{"index": 0, "delta": {"content": "more than a guard holds back " * 20}}]}

Way = Callable[[Running, FakeUpstream], Awaitable[None]]


@contextmanager
def _garbage() -> Iterator[Counter[str]]:
    """Counts what only the collector can free of all that was made within, of QLens' own kinds."""
    found: Counter[str] = Counter()
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        yield found
        gc.collect()
        found.update(
            type(thing).__qualname__
            for thing in gc.garbage
            if type(thing).__module__.startswith("qlens") and not type(thing).__module__.startswith("qlens.testing")
        )
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


@asynccontextmanager
async def _gateway() -> AsyncIterator[tuple[Running, FakeUpstream]]:
    stages = {
        "auth": [{"plugin": "anonymous"}],
        "rate_limit": [{"plugin": "token_bucket", "limits": [{"per": "tenant", "concurrency": 1000}]}],
        "guard": [{"plugin": "pattern", "rules": [{"name": "x", "regex": "forbidden", "action": "block"}]}],
        "cache": [{"plugin": "exact"}],
        "route": [{"plugin": "weighted"}, {"plugin": "circuit_breaker", "failures": 1000}],
        "cost": [{"plugin": "prices"}, {"plugin": "ledger"}],
    }
    async with upstream() as up:
        provider = {"plugin": "openai", "base_url": f"{up.url}/v1", "api_key": "sk-example-upstream"}
        model = {"gpt-4o-mini": {"max_output_tokens": 100, "targets": targets("up")}}
        async with running(config(stages, {"up": provider}, model)) as gateway:
            yield gateway, up


async def _hang_up(
    gateway: Running, body: Mapping[str, object], when: Callable[[asyncio.StreamReader], Awaitable[object]]
) -> None:
    """Send a call on a connection of its own, wait, and reset it."""
    host, port = gateway.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    raw = orjson.dumps(body)
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(raw)}\r\n\r\n"
    writer.write(head.encode() + raw)
    await when(reader)
    writer.transport.abort()


async def _leaves_a_stream(gateway: Running, up: FakeUpstream) -> None:
    up.script(Scripted(events=[EVENT], hang=True))
    await _hang_up(gateway, STREAM, lambda reader: reader.readuntil(b"data:"))


async def _leaves_while_the_provider_thinks(gateway: Running, up: FakeUpstream) -> None:
    up.script(Scripted(hang=True))
    count = len(up.requests) + 1
    await _hang_up(gateway, HELLO, lambda _: up.arrived(count))


async def _is_refused(gateway: Running, up: FakeUpstream) -> None:
    answer = await gateway.post(CHAT, {**HELLO, "max_tokens": "many"})
    assert answer.status == 400


async def _is_blocked(gateway: Running, up: FakeUpstream) -> None:
    answer = await gateway.post(CHAT, {**HELLO, "messages": [{"role": "user", "content": "forbidden"}]})
    assert answer.status == 400


async def _fails_upstream(gateway: Running, up: FakeUpstream) -> None:
    up.script(Scripted(status=500, body={"error": {"message": "no"}}))
    answer = await gateway.post(CHAT, HELLO)
    assert answer.status == 502


async def _breaks_upstream(gateway: Running, up: FakeUpstream) -> None:
    up.script(Scripted(events=[EVENT, EVENT], cut_at=1000, reset=True))
    answer = await gateway.post(CHAT, STREAM)
    assert "[DONE]" not in answer.text


async def _fails_in_the_middle(gateway: Running, up: FakeUpstream) -> None:
    up.script(Scripted(events=[EVENT, EVENT, {"error": {"message": "no", "type": "server_error"}}]))
    answer = await gateway.post(CHAT, STREAM)
    assert '"error"' in answer.text


async def _fails_in_the_middle_of_another_dialect(gateway: Running, up: FakeUpstream) -> None:
    up.script(Scripted(events=[EVENT, EVENT, {"error": {"message": "no", "type": "server_error"}}]))
    answer = await gateway.post("/v1/messages", {**STREAM, "max_tokens": 100})
    assert '"error"' in answer.text


async def _says_nonsense_in_the_middle(gateway: Running, up: FakeUpstream) -> None:
    up.script(Scripted(events=[EVENT, EVENT, b'data: {"finish_reason":"stop\n\n']))
    answer = await gateway.post(CHAT, STREAM)
    assert '"error"' in answer.text


WAYS = [
    _leaves_a_stream,
    _leaves_while_the_provider_thinks,
    _is_refused,
    _is_blocked,
    _fails_upstream,
    _breaks_upstream,
    _fails_in_the_middle,
    _fails_in_the_middle_of_another_dialect,
    _says_nonsense_in_the_middle,
]


@pytest.mark.parametrize("way", WAYS, ids=[way.__name__.strip("_") for way in WAYS])
async def test_a_call_that_ends_badly_leaves_no_cycle(way: Way) -> None:
    async with _gateway() as (gateway, up):
        await way(gateway, up)
        await gateway.settled(1)
        with _garbage() as found:
            for _ in range(CALLS):
                await way(gateway, up)
            receipts = await gateway.settled(CALLS + 1)
            await asyncio.sleep(0.05)  # the last task is done, and its connection lost
            assert len(receipts) == CALLS + 1
            del receipts
        assert found == Counter()
