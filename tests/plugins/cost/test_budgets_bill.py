"""The provider's own bill, the receipts and the budget agree, whatever retries and clients that leave do to calls."""

from __future__ import annotations

import asyncio
import random
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import aiohttp
import pytest

from qlens.testing import ManualClock, Running, Scripted, running, upstream
from qlens.testing.redis import redis_server

PATH = "/v1/chat/completions"
ASKED = {"model": "out", "max_tokens": 50, "messages": [{"role": "user", "content": "hello"}]}
CONFIG = """
server: {{port: 0}}
pipeline:
  auth: [{{plugin: anonymous}}]
  route: [{{plugin: retry, backoff_seconds: 0.001}}]
  cost:
    - {{plugin: prices, table: [{{model: out, input: 3, output: 7}}]}}
    - {{plugin: ledger, url: "sqlite:///ledger.db"}}
    - {{plugin: budgets, limits: [{{per: tenant, usd: 10}}], store: {store}}}
providers: {{up: {{plugin: openai, base_url: "{url}", api_key: sk-example-up}}}}
models: {{out: {{max_output_tokens: 1000, targets: [{{provider: up, model: out}}]}}}}
"""


def usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def whole(said: dict[str, int]) -> Scripted:
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "hi"}}
    return Scripted(body={"id": "x", "object": "chat.completion", "model": "out", "usage": said, "choices": [choice]})


def stream(said: dict[str, int], *, ends: bool) -> Scripted:
    """A stream whose last event before its end says what was used; without an end it stands still after it."""
    head = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "out"}
    texts: list[Any] = [
        {**head, "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]} for text in "ab"
    ]
    told = {**texts[-1], "usage": said, "choices": [{"index": 0, "delta": {"content": "told"}, "finish_reason": None}]}
    end = {**head, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
    last: list[Any] = [end, "[DONE]"] if ends else []
    return Scripted(events=[*texts, told, *last], hang=not ends)


async def leave_once_told(gateway: Running) -> None:
    async with (
        aiohttp.ClientSession() as client,
        client.post(gateway.url + PATH, json={**ASKED, "stream": True}) as answer,
    ):
        async for line in answer.content:
            if b"told" in line:
                return


@pytest.mark.parametrize("kind", ["sqlite", "redis"])
async def test_the_providers_bill_is_the_sum_of_the_receipts_and_what_the_budget_has_spent(kind: str) -> None:
    async with redis_server() as server:
        places = {
            "sqlite": '{kind: sqlite, url: "sqlite:///budgets.db"}',
            "redis": f'{{kind: redis, url: "{server.url}", timeout_ms: 2000}}',
        }
        await bill_and_budget(places[kind])


async def bill_and_budget(store: str) -> None:
    chance = random.Random(7)
    bills = [usage(chance.randint(1, 15), chance.randint(1, 50)) for _ in range(240)]
    async with upstream() as provider, running(CONFIG.format(url=provider.url, store=store)) as gateway:
        for number, said in enumerate(bills[:100]):
            provider.script(*([Scripted(status=500)] if number % 5 == 0 else []), whole(said))
        for _ in range(10):
            await asyncio.gather(*(gateway.post(PATH, ASKED) for _ in range(10)))
        provider.script(*(stream(said, ends=True) for said in bills[100:200]))
        await asyncio.gather(*(gateway.post(PATH, {**ASKED, "stream": True}) for _ in range(100)))
        provider.script(*(stream(said, ends=False) for said in bills[200:]))
        await asyncio.gather(*(leave_once_told(gateway) for _ in range(40)))
        receipts = await gateway.settled(240)
        bill = sum(3 * said["prompt_tokens"] + 7 * said["completion_tokens"] for said in bills) * 10**6
        assert sum(receipt.cost.picos or 0 for receipt in receipts) == bill
        assert [receipt.outcome for receipt in receipts].count("abandoned") == 40
        assert len(provider.requests) == 260
        (row,) = (await gateway.get("/v1/budgets")).json()["data"]
        assert (Decimal(row["spent_usd"]), row["reserved_usd"]) == (Decimal(bill) / 10**12, "0")


FAILED: dict[str, Any] = {
    "id": "resp_1",
    "object": "response",
    "created_at": 1,
    "model": "out",
    "status": "failed",
    "error": {"code": "server_error", "message": "It broke."},
    "output": [],
    "usage": {"input_tokens": 5, "output_tokens": 100, "total_tokens": 105},
}
"""A response that costs 0.0001 USD all the same, where a token of output costs 1 micro-dollar."""


@pytest.mark.parametrize("store", ["{kind: memory}", '{kind: sqlite, url: "sqlite:///budgets.db"}'])
@pytest.mark.parametrize(
    ("tenants", "models", "attempts"),
    [("1", "0.00019", 1), ("0.00019", "1", 1), ("1", "0.00029", 2), ("0.00035", "0.0003", 3), ("1", "1", 3)],
)
async def test_no_attempt_is_made_for_which_a_failed_one_that_is_billed_has_left_no_room(
    tenants: str, models: str, attempts: int, store: str
) -> None:
    limits = f"[{{per: tenant, usd: {tenants}}}, {{per: model, usd: {models}}}]"
    async with upstream() as provider:
        text = CONFIG.format(url=provider.url, store=store).replace("[{per: tenant, usd: 10}]", limits)
        text = text.replace("input: 3, output: 7", "input: 0, output: 1").replace("retry,", "retry, attempts: 3,")
        async with running(text) as gateway:
            provider.script(*[Scripted(body=FAILED)] * 3)
            answer = await gateway.post("/v1/responses", {"model": "out", "input": "Hello", "max_output_tokens": 100})
            assert (answer.status, answer.json()["error"]["code"]) == (502, "upstream_error")
            (receipt,) = await gateway.settled(1)
            assert len(provider.requests) == len(receipt.attempts) == attempts
            rows = (await gateway.get("/v1/budgets")).json()["data"]
            spent = {(Decimal(row["spent_usd"]), row["reserved_usd"]) for row in rows}
            assert (len(rows), spent) == (2, {(attempts * Decimal("0.0001"), "0")})


@pytest.mark.parametrize("store", ["{kind: memory}", '{kind: sqlite, url: "sqlite:///budgets.db"}'])
async def test_a_window_that_is_over_stands_in_the_way_of_no_attempt(store: str) -> None:
    clock = ManualClock(datetime(2026, 11, 28, 23, 59, 58, tzinfo=UTC).timestamp())
    async with upstream() as provider:
        text = CONFIG.format(url=provider.url, store=store).replace("usd: 10}", "usd: 10, window: day}")
        async with running(text, clock=clock) as gateway:
            provider.script(
                Scripted(body=FAILED, delay=0.3), Scripted(body={**FAILED, "status": "completed", "error": None})
            )
            body = {"model": "out", "input": "Hello", "max_output_tokens": 100}
            async with asyncio.TaskGroup() as tasks:
                asked = tasks.create_task(gateway.post("/v1/responses", body))
                while not provider.requests:
                    await asyncio.sleep(0.01)
                clock.advance(3)
            assert asked.result().status == 200
            (receipt,) = await gateway.settled(1)
            assert [attempt.billed for attempt in receipt.attempts] == [True, True]
            rows = (await gateway.get("/v1/budgets")).json()["data"]
            assert {row["reserved_usd"] for row in rows} <= {"0"}
