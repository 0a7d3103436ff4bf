"""A client that leaves: what its provider bills whole is read to its end, unseen; all else is closed, and not free."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
from priced import EXACT, INPUT, OUTPUT, SAID, WHOLE
from yamls import CHAT, HELLO, STREAM, config

from qlens import Receipt
from qlens.errors import ConfigError
from qlens.registry import drafted, register
from qlens.testing import Running, Scripted, running, upstream
from qlens.testing.upstreams import FakeUpstream

MOST = 50
"""Output tokens that each call asks for."""
BODY = {**HELLO, "max_tokens": MOST}
STREAMED = {**STREAM, "max_tokens": MOST}


def yaml(*ups: FakeUpstream, on_disconnect: str | None = "drain", max_connections: int | None = None) -> str:
    """Providers behind one model, in this order, with prices, a hard budget and a limit of two calls at a time."""
    said: dict[str, Any] = {} if on_disconnect is None else {"on_disconnect": on_disconnect}
    if max_connections is not None:
        said["network"] = {"max_connections": max_connections}
    providers = {
        f"up{place}": {"plugin": "openai", "base_url": up.url, "api_key": "sk-example-up", **said}
        for place, up in enumerate(ups)
    }
    stages = {
        "rate_limit": [{"plugin": "token_bucket", "limits": [{"per": "tenant", "tokens_per_minute": 100_000}]}],
        "cost": [
            {"plugin": "prices", "catalogue": False, "table": [{"model": "*", "input": 3, "output": 7}]},
            {"plugin": "budgets", "limits": [{"per": "tenant", "usd": 10}]},
        ],
    }
    models = {
        "gpt-4o-mini": {
            "max_output_tokens": 1000,
            "targets": [{"provider": name, "model": "mini"} for name in providers],
        }
    }
    return config(stages, providers, models)


@asynccontextmanager
async def asking(gateway: Running, body: dict[str, Any]) -> AsyncIterator[asyncio.StreamReader]:
    """Send a call, and leave without a word at the end of the block."""
    host, port = gateway.url.removeprefix("http://").split(":")
    raw = orjson.dumps(body)
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(raw)}\r\n\r\n"
    writer.write(head.encode() + raw)
    try:
        async with asyncio.timeout(5):
            yield reader
    finally:
        writer.transport.abort()


async def leave(gateway: Running, body: dict[str, Any], when: Callable[[], Awaitable[Any]]) -> None:
    """Send a call and leave as soon as something has happened."""
    async with asking(gateway, body):
        await when()


async def leave_once_begun(gateway: Running) -> None:
    """Ask for a stream and leave when its first words are there."""
    async with asking(gateway, STREAMED) as reader:
        await reader.readuntil(b"Hello")


async def leave_slow(gateway: Running, up: FakeUpstream, body: dict[str, Any] | None) -> None:
    """Leave one of the slow answers: once its stream has begun, or once its call has arrived."""
    if body is None:
        await leave_once_begun(gateway)
    else:
        await leave(gateway, body, lambda: up.arrived(1))


async def spent(gateway: Running) -> tuple[int, str]:
    """What the budget has been charged, in picodollars, and what it still holds."""
    (row,) = (await gateway.get("/v1/budgets")).json()["data"]
    return round(float(row["spent_usd"]) * 10**12), row["reserved_usd"]


def is_the_most(receipt: Receipt) -> bool:
    """Whether a call that was abandoned is charged all that it has asked for."""
    cost = receipt.cost.picos == receipt.usage.input * INPUT + MOST * OUTPUT
    return cost and (receipt.usage.output, receipt.usage.source, receipt.cost.state) == (MOST, "estimated", "estimated")


SLOW = {
    "in mid-stream": (None, Scripted(events=SAID, gap=0.05)),
    "before the first event": (STREAMED, Scripted(events=SAID, delay=0.2)),
    "before the answer": (BODY, Scripted(body=WHOLE, delay=0.2)),
}


@pytest.mark.parametrize("when", SLOW)
async def test_an_answer_whose_client_has_left_is_read_to_its_end_and_charged_exactly(when: str) -> None:
    body, answer = SLOW[when]
    async with upstream() as up, running(yaml(up)) as gateway:
        up.script(answer)
        await leave_slow(gateway, up, body)
        (receipt,) = await gateway.settled(1)
        assert (receipt.outcome, receipt.status, receipt.error) == ("abandoned", 499, "client_closed")
        assert (receipt.usage.source, receipt.cost.picos, receipt.cost.state) == ("provider", EXACT, "exact")
        assert await spent(gateway) == (EXACT, "0")


@pytest.mark.parametrize("when", SLOW)
async def test_an_answer_that_is_not_drained_is_closed_and_not_free(when: str) -> None:
    body, answer = SLOW[when]
    async with upstream() as up, running(yaml(up, on_disconnect=None)) as gateway:
        up.script(answer)
        await leave_slow(gateway, up, body)
        (receipt,) = await gateway.settled(1)
        await asyncio.wait_for(up.requests[0].closed.wait(), 5)
        assert receipt.outcome == "abandoned"
        if body is None:
            assert (receipt.usage.source, receipt.cost.state) == ("partial", "estimated")
            assert 0 < receipt.usage.output < MOST
        else:
            assert is_the_most(receipt)
        assert await spent(gateway) == (receipt.cost.picos, "0")


@pytest.mark.parametrize("on_disconnect", ["drain", "abort"])
async def test_what_waits_for_a_connection_when_its_client_leaves_is_not_sent_and_free(on_disconnect: str) -> None:
    async with upstream() as up:
        text = yaml(up, on_disconnect=on_disconnect, max_connections=1)
        async with running(text) as gateway:
            up.script(Scripted(body=WHOLE, delay=0.4))
            first = asyncio.create_task(gateway.post(CHAT, BODY))
            await up.arrived(1)
            await leave(gateway, BODY, lambda: asyncio.sleep(0.1))
            (receipt,) = await gateway.settled(1)
            assert (receipt.outcome, receipt.cost.picos, receipt.usage.total) == ("abandoned", 0, 0)
            assert [attempt.billed for attempt in receipt.attempts] == [False]
            assert (await first).status == 200
            assert len(up.requests) == 1
            assert await spent(gateway) == (EXACT, "0")


@pytest.mark.parametrize("begun", [False, True])
async def test_what_comes_when_enough_is_drained_is_closed_and_charged_the_most(
    monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    monkeypatch.setattr("qlens.drains.MOST_DRAINS", 1)
    async with upstream() as up, running(yaml(up)) as gateway:
        up.script(Scripted(events=SAID, delay=0.5), Scripted(events=SAID[:3], hang=True))
        await leave(gateway, STREAMED, lambda: up.arrived(1))
        await asyncio.sleep(0.05)
        if begun:
            await leave_once_begun(gateway)
        else:
            await leave(gateway, STREAMED, lambda: up.arrived(2))
        beyond, drained = await gateway.settled(2)
        assert is_the_most(beyond)
        assert (drained.usage.source, drained.cost.picos) == ("provider", EXACT)
        assert up.requests[1].closed.is_set()


@pytest.mark.parametrize("begun", [False, True])
async def test_a_drain_is_bounded_in_time_and_then_charged_the_most(
    monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    monkeypatch.setattr("qlens.drains.DRAIN_SECONDS", 0.2)
    async with upstream() as up, running(yaml(up)) as gateway:
        up.script(Scripted(events=SAID[:4] if begun else None, hang=True))
        await (leave_once_begun(gateway) if begun else leave(gateway, STREAMED, lambda: up.arrived(1)))
        (receipt,) = await gateway.settled(1)
        assert is_the_most(receipt)
        await asyncio.wait_for(up.requests[0].closed.wait(), 5)
        assert await spent(gateway) == (receipt.cost.picos, "0")
        assert not gateway.gateway.drains.running()


async def test_a_drained_stream_that_breaks_is_charged_the_most() -> None:
    async with upstream() as up, running(yaml(up)) as gateway:
        up.script(Scripted(events=SAID[:4], gap=0.1))
        await leave_once_begun(gateway)
        (receipt,) = await gateway.settled(1)
        assert receipt.outcome == "abandoned"
        assert is_the_most(receipt)


@pytest.mark.parametrize("seconds", [5, 0.1])
async def test_the_gateway_stops_when_drains_have_ended_or_its_time_is_over(seconds: float) -> None:
    async with upstream() as up, running(yaml(up)) as gateway:
        up.script(Scripted(events=SAID, delay=0.5))
        await leave(gateway, STREAMED, lambda: up.arrived(1))
        await gateway.server.stop(seconds)
        (receipt,) = await gateway.settled(1)
        assert receipt.outcome == "abandoned"
        if seconds == 5:
            assert (receipt.usage.source, receipt.cost.picos) == ("provider", EXACT)
        else:
            assert is_the_most(receipt)


async def test_nobody_else_is_asked_when_a_drained_attempt_fails() -> None:
    async with upstream() as one, upstream() as two, running(yaml(one, two)) as gateway:
        one.script(Scripted(status=500, delay=0.2))
        await leave(gateway, BODY, lambda: one.arrived(1))
        (receipt,) = await gateway.settled(1)
        assert (receipt.outcome, receipt.cost.picos) == ("abandoned", 0)
        assert (len(receipt.attempts), two.requests) == (1, [])


async def test_a_drained_call_keeps_its_place_until_it_has_ended() -> None:
    async with upstream() as up:
        found = orjson.loads(yaml(up))
        found["pipeline"]["rate_limit"][0]["limits"] = [{"per": "tenant", "concurrency": 1}]
        async with running(orjson.dumps(found).decode()) as gateway:
            up.script(Scripted(body=WHOLE, delay=0.3))
            await leave(gateway, BODY, lambda: up.arrived(1))
            await asyncio.sleep(0.05)
            assert (await gateway.post(CHAT, BODY)).status == 429
            await gateway.settled(2)
            assert (await gateway.post(CHAT, BODY)).status == 200


async def test_a_drained_answer_may_be_cached() -> None:
    async with upstream() as up:
        found = orjson.loads(yaml(up))
        found["pipeline"]["cache"] = [{"plugin": "exact"}]
        async with running(orjson.dumps(found).decode()) as gateway:
            up.script(Scripted(events=SAID, gap=0.05))
            await leave_once_begun(gateway)
            await gateway.settled(1)
            answer = await gateway.post(CHAT, STREAMED)
            assert (answer.headers["x-qlens-cache"], len(up.requests)) == ("hit", 1)


async def test_many_clients_that_leave_leave_nothing_behind() -> None:
    async with upstream() as up, running(yaml(up)) as gateway:
        await gateway.post(CHAT, BODY)
        tasks, files = len(asyncio.all_tasks()), len(os.listdir("/proc/self/fd"))
        calls = 150
        up.script(*(Scripted(events=SAID, delay=3) for _ in range(calls)))
        await asyncio.gather(*(leave(gateway, STREAMED, lambda: up.arrived(1 + calls, 20)) for _ in range(calls)))
        receipts = (await gateway.settled(calls + 1))[1:]
        assert {(receipt.outcome, receipt.cost.picos) for receipt in receipts} == {("abandoned", EXACT)}
        assert await spent(gateway) == ((calls + 1) * EXACT, "0")
        assert not gateway.gateway.drains.running()
        await asyncio.wait_for(gateway.gateway.settled(), 5)
        await asyncio.sleep(0.05)
        assert len(asyncio.all_tasks()) <= tasks
        # The pool keeps connections for a while, at both of their ends here.
        assert len(os.listdir("/proc/self/fd")) <= files + 2 * up.open


PROVIDER = """
pipeline: {{auth: [{{plugin: anonymous}}]}}
providers: {{up: {{plugin: {plugin}, {said}}}}}
models: {{m: {{targets: [{{provider: up, model: m}}]}}}}
"""


@pytest.mark.parametrize(
    ("plugin", "said", "drains"),
    [
        ("openai", "", False),
        ("openai", "on_disconnect: drain", True),
        ("openai", 'on_disconnect: "${HOW:-drain}"', True),
        ("echo", "on_disconnect: drain", True),
        ('"plugs:Talker"', "on_disconnect: drain", True),
        ("bedrock", "region: us-east-1", True),
        ("bedrock", "region: us-east-1, on_disconnect: abort", False),
    ],
)
def test_every_provider_may_be_told_and_bedrock_is_drained_by_itself(
    tmp_path: Path, plugin: str, said: str, drains: bool
) -> None:
    path = tmp_path / "qlens.yaml"
    model = "anthropic.claude-3-haiku-20240307-v1:0" if plugin == "bedrock" else "m"
    path.write_text(PROVIDER.format(plugin=plugin, said=said).replace("model: m}", f"model: '{model}'}}"))
    registration = register(drafted(path))
    assert registration.providers["up"].drains is drains
    again = register(drafted(path), registration)
    assert again.providers["up"].drains is drains


def test_a_reload_that_changes_nothing_else_changes_it_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "qlens.yaml"
    path.write_text(PROVIDER.format(plugin="openai", said=""))
    before = register(drafted(path))
    path.write_text(PROVIDER.format(plugin="openai", said="on_disconnect: drain"))
    after = register(drafted(path), before)
    assert (after.new, after.providers["up"].drains) == ((), True)


@pytest.mark.parametrize("said", ["on_disconnect: wait", "on_disconnect: [drain]", "on_disconnect: true"])
def test_what_else_it_is_told_is_a_fault_with_its_place(tmp_path: Path, said: str) -> None:
    path = tmp_path / "qlens.yaml"
    path.write_text(PROVIDER.format(plugin="openai", said=said))
    with pytest.raises(ConfigError, match=r"providers\.up\.on_disconnect.*expected one of: drain, abort"):
        register(drafted(path))
