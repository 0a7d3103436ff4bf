"""Bedrock bills all that a model generates, read or not: its bill is the ledger's, whenever clients leave."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import aiohttp
import pytest
from attrs import evolve
from bedrocks import CHAT, CLAUDE, chat, config

from qlens.testing import Running, Scripted, running
from qlens.testing.bedrock import answer, bedrock, stream, streamed, whole

PRICES = {
    "plugin": "prices",
    "catalogue": False,
    "table": [{"model": CLAUDE, "input": 3, "output": 15}],
}
COST = [PRICES, {"plugin": "budgets", "limits": [{"per": "tenant", "usd": 10}]}, {"plugin": "ledger"}]
CALLS = 40


def used(dice: random.Random) -> dict[str, int]:
    """What Bedrock says that a call used."""
    prompt, completion = dice.randint(5, 30), dice.randint(5, 50)
    return {"inputTokens": prompt, "outputTokens": completion, "totalTokens": prompt + completion}


def told(usage: dict[str, int], *, streaming: bool, dice: random.Random) -> Scripted:
    """An answer that takes its time."""
    said = answer({"text": "one two three four five six"}, usage=usage)
    if streaming:
        return stream(streamed(said), delay=dice.random(), gap=0.3)
    return evolve(whole(said), delay=1 + dice.random())


async def leave(gateway: Running, after: float, body: dict[str, Any]) -> None:
    """Send a call and leave after some time."""
    timeout = aiohttp.ClientTimeout(total=after)
    try:
        async with aiohttp.ClientSession() as own, own.post(gateway.url + CHAT, json=body, timeout=timeout) as reply:
            await reply.read()
    except (TimeoutError, aiohttp.ClientError):
        pass


@pytest.mark.parametrize("streaming", [True, False], ids=["streams", "whole answers"])
async def test_the_bill_of_the_provider_is_that_of_the_ledger_though_clients_leave(streaming: bool) -> None:
    dice = random.Random(7)
    bills = [used(dice) for _ in range(CALLS)]
    async with bedrock() as aws, running(config(aws.root, pipeline={"cost": COST})) as gateway:
        aws.script(*(told(usage, streaming=streaming, dice=dice) for usage in bills))
        body = chat(stream=streaming, max_tokens=100)
        leaving = [asyncio.create_task(leave(gateway, 30, body)) for _ in range(CALLS)]
        await aws.arrived(CALLS)
        for task in leaving:
            await asyncio.sleep(dice.random() / 100)
            task.cancel()
        await asyncio.gather(*leaving, return_exceptions=True)
        receipts = await gateway.settled(CALLS)
        assert sum(receipt.outcome == "abandoned" for receipt in receipts) > CALLS / 4
        assert {receipt.usage.source for receipt in receipts} == {"provider"}
        bill = sum(3 * usage["inputTokens"] + 15 * usage["outputTokens"] for usage in bills) * 10**6
        assert sum(receipt.cost.picos or 0 for receipt in receipts) == bill
        (row,) = (await gateway.get("/v1/budgets")).json()["data"]
        assert (round(float(row["spent_usd"]) * 10**12), row["reserved_usd"]) == (bill, "0")
        assert aws.refused == []
