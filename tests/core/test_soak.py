"""Ten thousand calls of every kind: one receipt each, nothing held, nothing left behind."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import sqlite3
from collections import Counter
from decimal import Decimal
from pathlib import Path

import aiohttp
import orjson
import pytest
from plugs import Probe
from yamls import CHAT, config, probe

from qlens.testing import Running, running

CALLS, AT_ONCE = 10_000, 32

STAGES = {
    "auth": [probe("who", answer=["authenticate"])],
    "rate_limit": [
        {
            "plugin": "token_bucket",
            "store": {"kind": "memory"},
            "limits": [
                {
                    "per": "tenant",
                    "requests_per_minute": 9_000_000,
                    "tokens_per_minute": 2_000_000_000,
                    "concurrency": 64,
                },
                {"per": "model", "requests_per_minute": 60, "match": {"model": ["tight"]}},
            ],
        },
        probe("holder", hold="h"),
    ],
    "cache": [{"plugin": "exact", "store": {"kind": "memory"}}],
    "route": [{"plugin": "weighted"}, {"plugin": "retry"}, {"plugin": "circuit_breaker"}],
    "cost": [
        {"plugin": "prices", "table": [{"model": "gpt-4o-mini", "input": 0.15, "output": 0.60}]},
        {"plugin": "budgets", "limits": [{"per": "tenant", "usd": 1000, "window": "total"}]},
        {"plugin": "ledger", "url": "sqlite:///qlens.db"},
    ],
}
MODELS = {
    name: {"max_output_tokens": 1000, "targets": [{"provider": "echo", "model": name, "base_model": "gpt-4o-mini"}]}
    for name in ("gpt-4o-mini", "tight")
}


def _memory() -> int:
    """Resident memory in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _files() -> int:
    return len(os.listdir("/proc/self/fd"))


def _body(dice: random.Random, place: int) -> bytes:
    words = " ".join(f"word{dice.randrange(1000)}" for _ in range(dice.randrange(1, 40)))
    text = "again and again" if place % 10 == 0 else f"{place} {words}"
    body = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": text}], "stream": place % 3 == 0}
    if place % 17 == 0:
        body["model"] = "unknown"
    if place % 19 == 0:
        body["model"] = "tight"
    if place % 23 == 0:
        body["max_tokens"] = "many"
    return orjson.dumps(body)


async def _abandon(gateway: Running, body: bytes, dice: random.Random) -> None:
    """Send a call and leave at any moment: before, during or after the answer."""
    host, port = gateway.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    sent = head.encode() + body
    writer.write(sent[: dice.choice([len(sent), len(sent), len(head), len(sent) - 5])])
    await asyncio.sleep(dice.random() * 0.02)
    writer.transport.abort()


async def _many(gateway: Running, count: int, seed: int) -> Counter[int]:
    dice = random.Random(seed)
    places = iter(range(count))
    seen: Counter[int] = Counter()

    async def client() -> None:
        for place in places:
            body = _body(dice, place)
            if place % 10 == 7:
                await _abandon(gateway, body, dice)
                continue
            answer = await gateway.post(CHAT, body)
            seen[answer.status] += 1
            if answer.status == 200 and place % 3 == 0:
                assert answer.events()[-1] == "[DONE]"

    await asyncio.gather(*(client() for _ in range(AT_ONCE)))
    async with asyncio.timeout(10):
        await gateway.gateway.settled()
    return seen


@pytest.mark.timeout(180)
async def test_ten_thousand_calls_leave_one_receipt_each_and_nothing_else() -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    async with running(config(STAGES, {"echo": {"plugin": "echo"}}, MODELS)) as gateway:
        await _many(gateway, 1000, seed)
        await asyncio.sleep(0.2)
        gc.collect()
        before_files, before_memory = _files(), _memory()
        before = len(gateway.receipts)
        seen = await _many(gateway, CALLS, seed + 1)
        who: Probe = gateway.plugin("auth", "who")
        holder: Probe = gateway.plugin("rate_limit", "holder")
        receipts = gateway.receipts
        ids = [receipt.id for receipt in receipts]
        assert len(set(ids)) == len(ids) == who.events.count("authenticate")
        assert holder.holds == []
        outcomes = Counter(receipt.outcome for receipt in receipts[before:])
        assert {"complete", "cached", "abandoned", "rejected"} <= set(outcomes), outcomes
        assert outcomes["failed"] == 0
        assert set(seen) == {200, 400, 404, 429}
        assert seen[200] <= outcomes["complete"] + outcomes["cached"]

        limits = await gateway.post(CHAT, {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "last"}]})
        assert limits.status == 200  # no concurrency is held any more
        spent = sum(receipt.cost.picos or 0 for receipt in await gateway.settled(len(ids) + 1))
        (budget,) = (await gateway.get("/v1/budgets")).json()["data"]
        assert Decimal(budget["spent_usd"]) * 10**12 == spent > 0
        assert Decimal(budget["reserved_usd"]) == 0
        await gateway.session.close()
        async with asyncio.timeout(20):
            while _files() > before_files or len(asyncio.all_tasks()) > 12:
                await asyncio.sleep(0.1)
            # A receipt is a row in the ledger, or one of the rejections that are counted there.
            while sum(_ledger(gateway)) < len(receipts):
                await asyncio.sleep(0.1)
        assert sum(_ledger(gateway)) == len(receipts)
        gc.collect()
        receipts_memory = 6_000 * len(receipts)  # the recorder keeps every receipt, on purpose
        assert _memory() - before_memory < receipts_memory + 30 * 1024 * 1024


def _ledger(gateway: Running) -> tuple[int, int]:
    """The rows of the ledger, and the rejections it counted."""
    database = sqlite3.connect(gateway.folder / "qlens.db")
    try:
        rows = database.execute("SELECT count(*), count(DISTINCT id) FROM receipts").fetchone()
        assert rows[0] == rows[1]
        rejected = database.execute("SELECT coalesce(sum(calls), 0) FROM rejections").fetchone()[0]
    finally:
        database.close()
    return rows[0], rejected


async def test_aiohttp_clients_that_time_out_are_abandoned_calls_too() -> None:
    models = {
        "slow": {
            "max_output_tokens": 100,
            "targets": [{"provider": "echo", "model": "slow", "params": {"token_ms": 50}}],
        }
    }
    body = {
        "model": "slow",
        "stream": True,
        "messages": [{"role": "user", "content": "one two three four five six seven"}],
    }
    async with running(config({}, {"echo": {"plugin": "echo"}}, models)) as gateway:
        with pytest.raises(TimeoutError):
            async with gateway.session.post(
                gateway.url + CHAT, json=body, timeout=aiohttp.ClientTimeout(total=0.12)
            ) as answer:
                await answer.read()
        (receipt,) = await gateway.settled(1)
        assert receipt.outcome == "abandoned"
        assert receipt.usage.source == "partial"
        assert receipt.usage.completion >= 1
