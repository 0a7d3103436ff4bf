"""Settled once: every outcome, streamed or not, and cancellation inside every hook."""

from __future__ import annotations

import asyncio
import gc

import aiohttp
import orjson
import pytest
from plugs import HANGING, Probe, Talker
from yamls import CHAT, HELLO, STREAM, config, probe, targets

from qlens.testing import Running, running


async def _leave(gateway: Running, body: dict[str, object], when: asyncio.Event) -> None:
    """Send a call and close the connection as soon as `when` is set."""
    host, port = gateway.url.removeprefix("http://").split(":")
    raw = orjson.dumps(body)
    _, writer = await asyncio.open_connection(host, int(port))
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(raw)}\r\n\r\n"
    writer.write(head.encode() + raw)
    await writer.drain()
    await asyncio.wait_for(when.wait(), 5)
    writer.transport.abort()


STAGE_OF = {
    "authenticate": "auth",
    "admit": "rate_limit",
    "wrap_call": "guard",
    "lookup": "cache",
    "choose": "route",
    "wrap_send": "route",
    "store": "cache",
}


@pytest.mark.parametrize("body", [HELLO, STREAM], ids=["body", "stream"])
@pytest.mark.parametrize("hook", HANGING)
async def test_a_client_that_leaves_while_a_hook_waits_is_settled_once_as_abandoned(
    hook: str, body: dict[str, object]
) -> None:
    stages = {"rate_limit": [probe("holder", hold="h")]}
    providers = {"talker": {"plugin": "plugs:Talker", "hang": hook == "send"}}
    if hook != "send":
        stage = STAGE_OF[hook]
        stages[stage] = [*stages.get(stage, []), probe("waiter", hang=[hook])]
        if stage == "auth":
            stages["auth"].append({"plugin": "anonymous"})
    async with running(config(stages, providers)) as gateway:
        waiter: Probe | Talker = (
            gateway.plugin("provider", "talker") if hook == "send" else gateway.plugin(STAGE_OF[hook], "waiter")
        )
        if hook == "store":
            # A slow store does not hold the answer: the call completes.
            answer = await gateway.post(CHAT, body)
            assert answer.status == 200
            (receipt,) = await gateway.settled(1)
            assert receipt.outcome == "complete"
            for task in tuple(gateway.gateway.current.pipeline.settling):
                task.cancel()
            return
        await _leave(gateway, body, waiter.hanging)
        if hook == "authenticate":
            await asyncio.sleep(0.05)
            assert gateway.receipts == []
        else:
            (receipt,) = await gateway.settled(1)
            assert (receipt.outcome, receipt.status, receipt.error) == ("abandoned", 499, "client_closed")
        await asyncio.wait_for(gateway.gateway.settled(), 5)
        assert gateway.plugin("rate_limit", "holder").holds == []
        assert len(gateway.receipts) == (0 if hook == "authenticate" else 1)
        assert len(gateway.gateway.current.pipeline.settling) == 0


async def test_a_stream_left_in_its_middle_closes_the_upstream_and_charges_what_was_delivered() -> None:
    providers = {"talker": {"plugin": "plugs:Talker", "stall": True}}
    stages = {"rate_limit": [probe("holder", hold="h")], "cost": [probe("p", answer=["price"])]}
    async with running(config(stages, providers)) as gateway:
        talker: Talker = gateway.plugin("provider", "talker")
        await _leave(gateway, STREAM, talker.hanging)
        (receipt,) = await gateway.settled(1)
        assert (receipt.outcome, receipt.streamed) == ("abandoned", True)
        assert receipt.usage.source == "partial"
        assert receipt.usage.input > 0
        assert receipt.cost.picos == receipt.usage.total * 1_000_000
        assert receipt.cost.picos > 0
        assert talker.closed == 1
        assert gateway.plugin("rate_limit", "holder").holds == []


async def test_the_calls_own_deadline_ends_it_as_failed_with_504() -> None:
    providers = {"talker": {"plugin": "plugs:Talker", "hang": True}}
    stages = {"rate_limit": [probe("holder", hold="h")]}
    async with running(config(stages, providers, call_seconds=0.1)) as gateway:
        answer = await gateway.post(CHAT, HELLO)
        assert answer.status == 504
        assert answer.json()["error"]["code"] == "call_timeout"
        (receipt,) = await gateway.settled(1)
        assert (receipt.outcome, receipt.status, receipt.error) == ("failed", 504, "call_timeout")
        assert gateway.plugin("rate_limit", "holder").holds == []


async def test_a_stream_that_outlives_the_deadline_ends_with_an_error_event_and_no_end_mark() -> None:
    providers = {"talker": {"plugin": "plugs:Talker", "stall": True}}
    async with running(config({}, providers, call_seconds=0.2)) as gateway:
        answer = await gateway.post(CHAT, STREAM)
        assert answer.status == 200
        assert answer.events()[-1]["error"]["code"] == "call_timeout"
        assert "[DONE]" not in answer.text
        (receipt,) = await gateway.settled(1)
        assert (receipt.outcome, receipt.status, receipt.error) == ("failed", 200, "call_timeout")


async def test_a_stream_cut_off_by_shutdown_ends_with_an_error_event_and_settles() -> None:
    providers = {"talker": {"plugin": "plugs:Talker", "stall": True}}
    async with running(config({}, providers, drain_seconds=0.1)) as gateway:
        talker: Talker = gateway.plugin("provider", "talker")
        asking = asyncio.create_task(gateway.post(CHAT, STREAM))
        await talker.hanging.wait()
        await gateway.server.stop(0.1)
        answer = await asking
        assert answer.events()[-1]["error"]["code"] == "shutting_down"
        (receipt,) = await gateway.settled(1)
        assert (receipt.outcome, receipt.status, receipt.error) == ("failed", 200, "shutting_down")


async def test_a_local_operation_is_admitted_and_settled_too() -> None:
    stages = {"rate_limit": [probe("holder", hold="h")]}
    async with running(config(stages)) as gateway:
        assert (await gateway.get("/v1/models")).status == 200
        (receipt,) = await gateway.settled(1)
        assert (receipt.operation, receipt.outcome, receipt.cost.picos) == ("models", "complete", 0)
        assert gateway.plugin("rate_limit", "holder").events == ["open", "admit", "settle complete"]


async def test_random_leaving_loses_no_receipt_and_no_hold() -> None:
    stages = {"rate_limit": [probe("holder", hold="h")]}
    async with running(config(stages)) as gateway:
        before = len(asyncio.all_tasks())

        async def one(place: int) -> None:
            timeout = aiohttp.ClientTimeout(total=0.0005 * (place % 20) if place % 3 == 0 else 30)
            try:
                async with gateway.session.post(
                    gateway.url + CHAT, json=STREAM if place % 2 else HELLO, timeout=timeout
                ) as answer:
                    await answer.read()
            except (TimeoutError, aiohttp.ClientError):
                pass

        for batch in range(0, 300, 30):
            await asyncio.gather(*(one(place) for place in range(batch, batch + 30)))
        await asyncio.wait_for(gateway.gateway.settled(), 10)
        holder: Probe = gateway.plugin("rate_limit", "holder")
        settled = [event for event in holder.events if event.startswith("settle")]
        ids = [receipt.id for receipt in gateway.receipts]
        assert holder.holds == []
        assert len(ids) == len(set(ids)) == len(settled)
        assert holder.events.count("admit") <= len(ids) <= 300
        assert {"complete"} <= {receipt.outcome for receipt in gateway.receipts}
        await asyncio.sleep(0.05)
        assert len(asyncio.all_tasks()) <= before + 64  # the pool's idle connections, not one per call


TYPED = {"model": "gpt-4o-mini", "max_tokens": 10, "stream": True}


@pytest.mark.parametrize(
    ("path", "body"),
    [(CHAT, HELLO), (CHAT, STREAM), ("/v1/messages", TYPED), ("/v1/audio/speech", {"model": "gpt-4o-mini"})],
    ids=["body", "stream", "typed stream", "bytes"],
)
async def test_a_call_leaves_no_cycle_for_the_collector(path: str, body: dict[str, object]) -> None:
    stages = {
        "guard": [{"plugin": "pattern", "rules": [{"name": "x", "regex": "nothing", "action": "block"}]}],
        "cache": [{"plugin": "exact"}],
        "route": [{"plugin": "weighted"}, {"plugin": "retry"}, {"plugin": "circuit_breaker"}],
        "cost": [{"plugin": "prices"}, {"plugin": "ledger"}],
    }
    model = {"gpt-4o-mini": {"max_output_tokens": 100, "targets": targets("echo")}}
    async with running(config(stages, {"echo": {"plugin": "echo"}}, model)) as gateway:

        async def say(number: int) -> None:
            message = {"role": "user", "content": f"Say {number}"}
            said = {"input": f"Say {number}", "voice": "alloy"} if "speech" in path else {"messages": [message]}
            answer = await gateway.post(path, {**body, **said})
            assert answer.status == 200, answer.text

        await say(0)
        gc.collect()
        gc.disable()
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            for number in range(1, 11):
                await say(number)
            await gateway.settled(11)
            gc.collect()
            assert [thing for thing in gc.garbage if type(thing).__module__.startswith("qlens")] == []
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()
