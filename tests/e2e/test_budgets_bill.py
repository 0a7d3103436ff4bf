"""Three gateway processes with one store of budgets: the provider's own bill, the receipts and the budget agree."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import ExitStack
from decimal import Decimal
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from attrs import define, field
from e2e.serving import Served, receipts, serving

from qlens.testing import Scripted
from qlens.testing.redis import RedisServer, redis_server
from qlens.testing.upstreams import Event, FakeUpstream, Recorded
from qlens.testing.upstreams import serving as playing

pytestmark = [pytest.mark.alone, pytest.mark.asyncio(loop_scope="module")]

REPLICAS = 3
CLIENTS = 64
SECONDS = 4
MICRO = 10**6
"""A token of output costs a micro-dollar, in picodollars; input is free."""
LIMIT = 8_000 * MICRO
"""So much is spent before the storm is over, and the last calls are refused."""
MOST = 60
"""The most tokens that an answer may have."""
STORES: Mapping[str, Callable[[Path, RedisServer], Mapping[str, Any]]] = {
    "redis": lambda _, redis: {"kind": "redis", "url": redis.url, "timeout_ms": 2000},
    "sqlite": lambda folder, _: {"kind": "sqlite", "url": f"sqlite:///{folder}/budgets.db"},
}
"""Where budgets are kept that processes share."""

FATES = ("whole", "stream", "leave", "break", "flaky", "reset", "down", "silent")
"""What becomes of a call. The provider bills the first five: it has told the gateway what they used."""


@define(eq=False)
class Biller(FakeUpstream):
    """A provider that does what a call says, and writes down what it wants for it."""

    bill: int = 0
    """In picodollars."""
    answered_again: set[str] = field(factory=set)

    def _usual(self, request: Recorded) -> Scripted:
        fate, number, tokens = request.body["messages"][0]["content"].split()
        first = number not in self.answered_again
        self.answered_again.add(number)
        if fate == "silent":
            return Scripted(hang=True)
        if fate == "down" or (fate == "flaky" and first):
            return Scripted(status=500)
        if fate == "reset" and first:
            return Scripted(raw=b"")
        self.bill += int(tokens) * MICRO
        used = {"prompt_tokens": 5, "completion_tokens": int(tokens), "total_tokens": 5 + int(tokens)}
        return _stream(used, fate) if request.body.get("stream") else _whole(used)


def _whole(used: Mapping[str, int]) -> Scripted:
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "hi"}}
    return Scripted(body={"id": "x", "object": "chat.completion", "model": "m", "usage": used, "choices": [choice]})


def _stream(used: Mapping[str, int], fate: str) -> Scripted:
    """A stream that says what it uses before its end, which it reaches or not."""
    head = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    say: list[Event] = [
        {**head, "choices": [{"index": 0, "delta": {"content": each}, "finish_reason": None}]} for each in "ab"
    ]
    told = {**head, "usage": used, "choices": [{"index": 0, "delta": {"content": "told"}, "finish_reason": None}]}
    end = {**head, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
    last: list[Event] = [] if fate in {"leave", "break"} else [end, "[DONE]"]
    return Scripted(events=[*say, told, *last], hang=fate == "leave", gap=0.001)


def changes(provider: FakeUpstream, store: Mapping[str, Any]) -> Mapping[str, Any]:
    return {
        "pipeline": {
            "rate_limit": [],
            "cache": [],
            "route": [{"plugin": "retry", "backoff_seconds": 0.001}],
            "cost": [
                {"plugin": "prices", "table": [{"model": "*", "input": 0, "output": 1}]},
                {
                    "plugin": "budgets",
                    "limits": [{"per": "tenant", "usd": LIMIT / 10**12, "window": "total"}],
                    "store": store,
                },
                {"plugin": "ledger", "url": "sqlite:///qlens.db"},
            ],
        },
        "providers": {"biller": {"plugin": "openai", "base_url": provider.url, "api_key": "sk-example-up"}},
        "models": {"m": {"max_output_tokens": MOST, "targets": [{"provider": "biller", "model": "m"}]}},
    }


@define(eq=False)
class Storm:
    """The gateways, the provider behind them, and who calls them."""

    served: list[Served]
    provider: Biller
    session: aiohttp.ClientSession
    dice: random.Random
    statuses: Counter[int] = field(factory=Counter)
    fates: Counter[str] = field(factory=Counter)
    _made: int = 0

    async def call(self) -> None:
        """One call with a fate, as often as a client tries."""
        dice, served = self.dice, self.dice.choice(self.served)
        self._made += 1
        fate, tokens = dice.choice(FATES), dice.randrange(1, MOST + 1)
        body = {"model": "m", "max_tokens": dice.choice([tokens, MOST, 10 * MOST])}
        body["messages"] = [{"role": "user", "content": f"{fate} {self._made} {tokens}"}]
        body["stream"] = fate in {"stream", "leave", "break"} or (fate == "flaky" and dice.random() < 0.5)
        for _ in range(dice.randrange(1, 4)):
            status = await self._try(served, body, fate)
            self.statuses[status] += 1
            if status == 200:
                self.fates[fate] += 1
                return

    async def _try(self, served: Served, body: Mapping[str, Any], fate: str) -> int:
        headers = {"authorization": f"Bearer {served.key}"}
        patience = self.dice.random() * 0.08 if fate == "silent" else 30
        try:
            async with (
                asyncio.timeout(patience),
                self.session.post(f"{served.url}/v1/chat/completions", json=body, headers=headers) as answer,
            ):
                async for line in answer.content:
                    if fate == "leave" and b"told" in line:
                        break
                return answer.status
        except TimeoutError:
            return 0

    async def told(self) -> tuple[int, int]:
        """What a replica says is spent and reserved."""
        served = self.dice.choice(self.served)
        headers = {"authorization": f"Bearer {served.key}"}
        async with self.session.get(f"{served.url}/v1/budgets", headers=headers) as answer:
            (row,) = (await answer.json())["data"]
        return int(Decimal(row["spent_usd"]) * 10**12), int(Decimal(row["reserved_usd"]) * 10**12)


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=sorted(STORES))
async def storm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Storm]:
    folder, seed = tmp_path_factory.mktemp("bill"), random.randrange(10**6)
    print(f"seed {seed}")
    async with playing(Biller()) as provider, redis_server() as redis:
        with ExitStack() as processes:

            def start(number: int) -> Served:
                place = folder / f"{number}"
                place.mkdir()
                told = changes(provider, STORES[request.param](folder, redis))
                return processes.enter_context(serving(place, changes=told))

            served = await asyncio.gather(*(asyncio.to_thread(start, number) for number in range(REPLICAS)))
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
                yield Storm(list(served), provider, session, random.Random(seed))


async def test_in_a_storm_of_aborts_retries_and_failures_the_bill_is_the_sum_of_the_receipts(storm: Storm) -> None:
    begun, seen = time.monotonic(), list[int]()

    def goes_on() -> bool:
        passed = time.monotonic() - begun
        return passed < SECONDS or (429 not in storm.statuses and passed < 3 * SECONDS)

    async def client() -> None:
        while goes_on():
            await storm.call()
            await asyncio.sleep(storm.dice.random() * 0.1)

    async def watch() -> None:
        while goes_on():
            seen.append(sum(await storm.told()))
            await asyncio.sleep(0.05)

    await asyncio.gather(watch(), *(client() for _ in range(CLIENTS)))
    print(storm.statuses, storm.fates, max(seen), len(seen))
    assert len(seen) > 5
    assert max(seen) <= LIMIT
    async with asyncio.timeout(2):
        while (told := await storm.told())[1]:
            await asyncio.sleep(0.05)
    spent = told[0]
    await asyncio.sleep(0.5)  # the ledgers write within 0.2 s
    rows = [row for served in storm.served for row in receipts(served, "--by", "model", "--model", "m")]
    total = sum(round(float(row["cost_usd"] or 0) * 10**12) for row in rows)
    assert storm.provider.bill == total == spent
    assert 0 < spent <= LIMIT
    assert {200, 429, 502} <= storm.statuses.keys()  # what went wrong did go wrong
    assert set(FATES) - {"down", "silent"} <= storm.fates.keys()
