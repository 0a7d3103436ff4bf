"""Three gateway processes with one store of budgets: the provider's own bill, the receipts and the budget agree.

With a tolerance too, which lets calls begin that ask for much more than such calls use.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import ExitStack
from decimal import Decimal
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from attrs import define, field, frozen
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
EDGE_LIMIT, EDGE_MOST, AT_ONCE = 1000 * MICRO, 600, 30
"""The budget of calls of which all that begin use all that they may, how much that is, and how many want to."""


@frozen
class Kind:
    """Where budgets are kept, and how far they may be overspent."""

    store: str
    tolerance: int = 0
    """In picodollars, of each budget."""
    most: int = MOST

    @property
    def limit(self) -> int:
        """What may be spent of the storm's budget, all in all."""
        return LIMIT + self.tolerance

    def tokens(self, dice: random.Random) -> int:
        """How many an answer has: with a tolerance few, as a rule, and now and then many."""
        often = 20 if self.tolerance and dice.random() < 0.97 else self.most
        return dice.randrange(1, often + 1)


KINDS = (
    Kind("redis"),
    Kind("sqlite"),
    Kind("redis", tolerance=1300 * MICRO, most=EDGE_MOST),
    Kind("sqlite", tolerance=1300 * MICRO, most=EDGE_MOST),
)

FATES = ("whole", "stream", "leave", "break", "flaky", "reset", "down", "silent")
"""What becomes of a call. The provider bills the first five: it has told the gateway what they used."""


@define(eq=False)
class Biller(FakeUpstream):
    """A provider that does what a call says, and writes down what it wants for it."""

    bill: Counter[str] = field(factory=Counter)
    """In picodollars, by model."""
    answered_again: set[str] = field(factory=set)
    silent: dict[str, asyncio.Event] = field(factory=lambda: defaultdict(asyncio.Event))
    """Which calls have arrived whose clients leave before an answer, by their number."""
    waiting: int = 0
    """How many calls wait until there is an `end`."""
    end: asyncio.Event = field(factory=asyncio.Event)

    async def _record(self, request: Recorded) -> Scripted:
        if request.body["model"] == "edge":
            self.waiting += 1
            await self.end.wait()
        return await super()._record(request)

    def _usual(self, request: Recorded) -> Scripted:
        fate, number, tokens = request.body["messages"][0]["content"].split()
        first = number not in self.answered_again
        self.answered_again.add(number)
        if fate == "silent":
            # It works all the same, and wants the most that it was allowed for what nobody waits for.
            self.bill[request.body["model"]] += int(request.body["max_tokens"]) * MICRO
            self.silent[number].set()
            return Scripted(hang=True)
        if fate == "down" or (fate == "flaky" and first):
            return Scripted(status=500)
        if fate == "reset" and first:
            return Scripted(raw=b"")
        self.bill[request.body["model"]] += int(tokens) * MICRO
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


def changes(provider: FakeUpstream, store: Mapping[str, Any], kind: Kind) -> Mapping[str, Any]:
    limits = [
        {"per": "tenant", "match": {"model": [model]}, "usd": picos / 10**12, "window": "total"}
        for model, picos in (("m", LIMIT), ("edge", EDGE_LIMIT))
    ]
    return {
        "pipeline": {
            "rate_limit": [],
            "cache": [],
            "route": [{"plugin": "retry", "backoff_seconds": 0.001}],
            "cost": [
                {"plugin": "prices", "table": [{"model": "*", "input": 0, "output": 1}]},
                {
                    "plugin": "budgets",
                    "limits": limits,
                    "tolerance": str(Decimal(kind.tolerance) / 10**12),
                    "store": store,
                },
                {"plugin": "ledger", "url": "sqlite:///qlens.db"},
            ],
        },
        "providers": {"biller": {"plugin": "openai", "base_url": provider.url, "api_key": "sk-example-up"}},
        "models": {
            name: {"max_output_tokens": most, "targets": [{"provider": "biller", "model": name}]}
            for name, most in (("m", kind.most), ("edge", EDGE_MOST))
        },
    }


@define(eq=False)
class Storm:
    """The gateways, the provider behind them, and who calls them."""

    kind: Kind
    served: list[Served]
    provider: Biller
    session: aiohttp.ClientSession
    dice: random.Random
    statuses: Counter[int] = field(factory=Counter)
    fates: Counter[str] = field(factory=Counter)
    _made: int = 0

    async def call(self) -> None:
        """One call with a fate, as often as a client tries."""
        dice, served, most = self.dice, self.dice.choice(self.served), self.kind.most
        self._made += 1
        fate, tokens = dice.choice(FATES), self.kind.tokens(dice)
        body = {"model": "m", "max_tokens": dice.choice([tokens, most, 10 * most])}
        body["messages"] = [{"role": "user", "content": f"{fate} {self._made} {tokens}"}]
        body["stream"] = fate in {"stream", "leave", "break"} or (fate == "flaky" and dice.random() < 0.5)
        for _ in range(dice.randrange(1, 4)):
            status = await self._try(served, body, fate)
            self.statuses[status] += 1
            if status == 200:
                self.fates[fate] += 1
                return

    async def _try(self, served: Served, body: Mapping[str, Any], fate: str) -> int:
        if fate == "silent":
            return await self._leave(served, body)
        return await self._ask(served, body, fate)

    async def _leave(self, served: Served, body: Mapping[str, Any]) -> int:
        """Ask, and leave some time after the call has arrived at the provider."""
        arrived = self.provider.silent[body["messages"][0]["content"].split()[1]]
        arrived.clear()
        asking, hearing = (
            asyncio.create_task(self._ask(served, body, "silent")),
            asyncio.create_task(arrived.wait()),
        )
        await asyncio.wait({asking, hearing}, return_when=asyncio.FIRST_COMPLETED)
        hearing.cancel()
        if not asking.done():
            await asyncio.sleep(self.dice.random() * 0.08)
            asking.cancel()
            await asyncio.wait({asking})
        return 0 if asking.cancelled() else asking.result()

    async def _ask(self, served: Served, body: Mapping[str, Any], fate: str) -> int:
        headers = {"authorization": f"Bearer {served.key}"}
        try:
            async with (
                asyncio.timeout(30),
                self.session.post(f"{served.url}/v1/chat/completions", json=body, headers=headers) as answer,
            ):
                async for line in answer.content:
                    if fate == "leave" and b"told" in line:
                        break
                return answer.status
        except TimeoutError:
            return 0

    async def told(self, model: str = "m") -> tuple[int, int]:
        """What a replica says is spent and reserved."""
        served = self.dice.choice(self.served)
        headers = {"authorization": f"Bearer {served.key}"}
        async with self.session.get(f"{served.url}/v1/budgets", headers=headers) as answer:
            (row,) = [row for row in (await answer.json())["data"] if row["budget"].endswith(f"model={model}")]
        return int(Decimal(row["spent_usd"]) * 10**12), int(Decimal(row["reserved_usd"]) * 10**12)

    async def settled(self, model: str = "m") -> None:
        """Two seconds later nothing is reserved, and what is spent is the bill, is the receipts, and stays so."""
        ends, whole = time.monotonic() + 2, (self.provider.bill[model], 0)
        # What a call may use beyond what such calls use is not shown as reserved.
        while (told := await self.told(model)) != whole and time.monotonic() < ends:
            await asyncio.sleep(0.05)
        assert told == whole
        assert await self.in_ledgers(model) == whole[0]
        assert await self.told(model) == whole

    async def in_ledgers(self, model: str = "m") -> int:
        """The sum of all receipts of a model."""
        await asyncio.sleep(0.5)  # the ledgers write within 0.2 s
        rows = [row for served in self.served for row in receipts(served, "--by", "model", "--model", model)]
        return sum(round(Decimal(row["cost_usd"] or 0) * 10**12) for row in rows)


@pytest_asyncio.fixture(
    scope="module", loop_scope="module", params=KINDS,
    ids=[f"{kind.store}{'-tolerant' if kind.tolerance else ''}" for kind in KINDS],
)  # fmt: skip
async def storm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Storm]:
    folder, seed, kind = tmp_path_factory.mktemp("bill"), random.randrange(10**6), request.param
    print(f"seed {seed}")
    async with playing(Biller()) as provider, redis_server() as redis:
        with ExitStack() as processes:

            def start(number: int) -> Served:
                place = folder / f"{number}"
                place.mkdir()
                told = changes(provider, STORES[kind.store](folder, redis), kind)
                return processes.enter_context(serving(place, changes=told))

            served = await asyncio.gather(*(asyncio.to_thread(start, number) for number in range(REPLICAS)))
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
                yield Storm(kind, list(served), provider, session, random.Random(seed))


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
    assert max(seen) <= storm.kind.limit
    await storm.settled()
    assert 0 < storm.provider.bill["m"] <= storm.kind.limit
    assert {200, 429, 502} <= storm.statuses.keys()  # what went wrong did go wrong
    assert set(FATES) - {"down", "silent"} <= storm.fates.keys()


async def test_at_the_edge_a_tolerance_is_used_and_never_more_than_it(storm: Storm) -> None:
    """Many calls at once ask for much, and all that begin use all of it, which nobody could know before."""
    body = {"model": "edge", "max_tokens": EDGE_MOST, "messages": [{"role": "user", "content": f"whole 0 {EDGE_MOST}"}]}
    answered: list[int] = []

    async def call(number: int) -> None:
        answered.append(await storm._try(storm.served[number % REPLICAS], body, "whole"))

    calls = [asyncio.create_task(call(number)) for number in range(AT_ONCE)]
    async with asyncio.timeout(30):
        while storm.provider.waiting + len(answered) < AT_ONCE:
            await asyncio.sleep(0.02)
    assert sum(await storm.told("edge")) <= EDGE_LIMIT + storm.kind.tolerance
    storm.provider.end.set()
    await asyncio.gather(*calls)
    assert set(answered) == {200, 429}
    await storm.settled("edge")
    spent = storm.provider.bill["edge"]
    assert spent == answered.count(200) * EDGE_MOST * MICRO
    assert spent <= EDGE_LIMIT + storm.kind.tolerance
    assert (spent > EDGE_LIMIT) == (storm.kind.tolerance > 0)
