"""Three gateways, their clocks hours apart, lose the one Redis that keeps their limits and budgets.

It is killed, slow, emptied and frozen.

How long each outage lasts is said by the environment variable QLENS_OUTAGE_SECONDS; `pytest -s` shows how fast calls
were answered before, while and after.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from decimal import Decimal
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import pytest_asyncio
from attrs import frozen
from e2e.replicas import Answered, Fault, Replicas, flush, freeze, kill, quick, replicated, restart, slow, thaw
from e2e.serving import receipts

from qlens.testing.faults import FaultProxy
from qlens.testing.redis import RedisServer, redis_server

pytestmark = [pytest.mark.alone, pytest.mark.asyncio(loop_scope="module")]

OUTAGE_SECONDS = float(os.environ.get("QLENS_OUTAGE_SECONDS", "2.5"))
BACK_SECONDS = 2
"""After so long everything is as before, on a machine that has time for it."""
REPLICAS = 3
AHEADS = (-3600.0, 0.0, 5400.0)
"""How many seconds the clock of each is ahead."""
FAULTS = ("kill", "slow", "flush", "freeze", "all")
RATE, BURST = 5, 120
"""What the narrow limit gives: calls a second, and at once."""
LEASED = 6
"""How much of it may be held in advance while the store goes away: one part in twenty."""
COST = Decimal("0.00001")
"""A call makes 10 tokens of a micro-dollar each; input is free."""
MOST_CALLS = 90
"""How many calls the tight budget has room for."""
PLUGINS = ("rate_limit.token_bucket", "cost.budgets")


def changes(folder: Path, redis: RedisServer, proxy: FaultProxy) -> dict[str, Any]:
    def each(kind: str, **numbers: object) -> list[dict[str, Any]]:
        return [{"per": "tenant", "match": {"model": [f"{kind}-{fault}"]}, **numbers} for fault in FAULTS]

    store = {"kind": "redis", "url": f"redis://127.0.0.1:{proxy.port}"}
    limits = [
        *each("wide", requests_per_minute=60_000),
        *each("narrow", requests_per_minute=60 * RATE, burst_seconds=BURST // RATE),
    ]
    budgets = [
        *each("soft", usd=1000, window="total", hard=False),
        *each("strict", usd=1000, window="total"),
        *each("tight", usd=float(COST * MOST_CALLS), window="total"),
    ]
    names = [rule["match"]["model"][0] for rule in (*limits, *budgets)]
    return {
        "pipeline": {
            "rate_limit": [{"plugin": "token_bucket", "store": {**store, "replicas": REPLICAS}, "limits": limits}],
            "cache": [],
            "cost": [
                {"plugin": "prices", "table": [{"model": "*", "input": 0, "output": 1}]},
                # More patient than the limits, as a machine that is busy with tests must not look like an outage.
                {"plugin": "budgets", "store": {**store, "timeout_ms": 100}, "limits": budgets},
                {"plugin": "ledger", "url": f"sqlite:///{folder / 'ledger.db'}"},
            ],
        },
        "providers": {"twin": {"plugin": "echo"}},
        "models": {
            name: {"max_output_tokens": 100, "targets": [{"provider": "twin", "model": name}]} for name in names
        },
    }


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def three(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Replicas]:
    folder = tmp_path_factory.mktemp("outages")
    async with (
        redis_server() as redis,
        replicated(folder, redis, REPLICAS, lambda _, proxy: changes(folder, redis, proxy), AHEADS) as found,
    ):
        yield found


@pytest_asyncio.fixture(loop_scope="module")
async def replicas(three: Replicas) -> Replicas:
    """All well."""
    await three.until_ok(ok=True, seconds=10, plugins=PLUGINS)
    return three


@frozen
class Outage:
    """When it began, was noticed by all, began to end, and was over: between those two a call may be served."""

    began: float
    noticed: float
    ending: float
    over: float
    back_seconds: float
    """How soon all must be as before."""

    def phases(self, answers: list[Answered]) -> Mapping[str, list[Answered]]:
        """The calls before, in the first second, in the rest of it, and after.

        What processes held of a budget in advance is used up, or gone, within the first second.
        """
        return {
            "before": [each for each in answers if each.ended < self.began],
            "first second": [each for each in answers if self.began <= each.ended < self.began + 1],
            "outage": [each for each in answers if each.sent > self.noticed + 1 and each.ended < self.ending],
            "after": [each for each in answers if each.sent > self.over + self.back_seconds],
        }


def show(fault: str, outage: Outage, answers: list[Answered]) -> None:
    """Print how fast the calls were that were served; nothing is asserted of that."""
    seconds = outage.over - outage.began
    print(f"\n{fault} for {seconds:.1f} s, noticed by all after {outage.noticed - outage.began:.2f} s")
    for name, those in outage.phases(answers).items():
        times = sorted(each.seconds * 1000 for each in those if each.status == 200)
        if times:
            p50, p99 = times[len(times) // 2], times[math.ceil(len(times) * 0.99) - 1]
            print(f"  {name:<13} {len(times):>6} calls served, p50 {p50:6.1f} ms, p99 {p99:6.1f} ms")


async def suffered(replicas: Replicas, fault: Fault, mend: Fault) -> Outage:
    """Break the store for so long, under load, and wait until calls under hard budgets are served again."""
    await asyncio.sleep(1)
    back_seconds, began = usually_back(replicas), time.monotonic()
    await fault(replicas)
    await replicas.until_ok(ok=False, seconds=5, plugins=PLUGINS)
    noticed, asked = time.monotonic(), await replicas.asked()
    await asyncio.sleep(OUTAGE_SECONDS)
    # While the breaker is open no call waits for the store.
    assert await replicas.asked() - asked <= REPLICAS
    ending = time.monotonic()
    await mend(replicas)
    over = time.monotonic()
    await replicas.until_ok(ok=True, seconds=back_seconds, plugins=PLUGINS)
    await asyncio.sleep(back_seconds + 1)
    return Outage(began, noticed, ending, over, back_seconds)


def usually_back(replicas: Replicas) -> float:
    """How soon all must be as before: where calls wait for a busy machine, the way back waits for it too."""
    return BACK_SECONDS + 40 * median(each.seconds for _, each in replicas.calls)


@pytest.mark.parametrize(
    ("fault", "mend"),
    [
        pytest.param(kill, restart, id="R8-killed-and-back-empty"),
        pytest.param(slow, quick, id="R9-slow"),
        pytest.param(freeze, thaw, id="R11-frozen"),
    ],
)
async def test_an_outage_fails_no_call_but_those_of_strict_budgets_and_gives_nobody_more(
    replicas: Replicas, fault: Fault, mend: Fault
) -> None:
    """R12 as well: who calls is never asked of Redis, so no outage of it makes a key unknown."""
    wide, narrow, soft, strict, tight = models = [
        f"{kind}-{fault.__name__}" for kind in ("wide", "narrow", "soft", "strict", "tight")
    ]
    async with replicas.load(*models, pause=0.1):
        outage = await suffered(replicas, fault, mend)
        await until_spent(replicas, tight, narrow)
    show(fault.__name__, outage, [each for name, each in replicas.calls if name in {wide, soft}])

    # Limits and soft budgets let pass what they did before, and no more.
    assert statuses(replicas, wide) == statuses(replicas, soft) == {200}
    assert statuses(replicas, narrow) == {200, 429}
    passed = replicas.passed(narrow)
    seconds = max(each.ended for each in passed) - min(each.sent for each in passed)
    assert len(passed) <= BURST + RATE * seconds + LEASED
    ends = sorted(each.ended for each in passed)
    gap = max(later - earlier for earlier, later in itertools.pairwise(ends))
    assert gap < outage.back_seconds + 0.5  # never nothing either

    # Strict budgets refuse while the store is away, and serve within seconds after.
    phases = outage.phases(replicas.answers(strict))
    refused = [each for each in phases["outage"] if each.status != 200]
    assert {(each.status, each.code) for each in refused} == {(503, "budget_unavailable")}
    # What is slow may be in time for a process that is slow itself.
    assert len(refused) == len(phases["outage"]) or (fault is slow and len(refused) > 0.9 * len(phases["outage"]))
    assert sum(each.status == 200 for each in phases["after"]) > len(phases["after"]) / 2
    assert (
        min(each.ended for each in replicas.passed(strict) if each.sent > outage.over)
        < outage.over + outage.back_seconds
    )
    assert statuses(replicas, strict) == {200, 503}

    # Nothing is overspent, and what was spent is known: exactly where nothing was lost.
    assert statuses(replicas, tight) == {200, 429, 503}
    assert 0 < len(replicas.passed(tight)) <= MOST_CALLS
    assert len(replicas.passed(tight)) == MOST_CALLS or fault is kill
    await assert_known(replicas, strict, is_exact=fault is not kill)


async def test_a_store_that_forgets_again_and_again_fails_no_call_and_gives_nobody_more(replicas: Replicas) -> None:
    """R10: FLUSHALL and SCRIPT FLUSH; strict budgets wait until the ledger has said what was spent."""
    wide, narrow, soft, strict, tight = models = [
        f"{kind}-flush" for kind in ("wide", "narrow", "soft", "strict", "tight")
    ]
    backs = []
    async with replicas.load(*models, pause=0.1):
        await asyncio.sleep(1.5)
        back_seconds, began = usually_back(replicas), time.monotonic()
        while time.monotonic() - began < OUTAGE_SECONDS:
            await flush(replicas)
            flushed = time.monotonic()
            await asyncio.sleep(back_seconds)
            backs.append((flushed, flushed + back_seconds))
        await until_spent(replicas, tight, narrow)
    over = time.monotonic()
    outage = Outage(began, began, over, over, back_seconds)
    show("flush", outage, [each for name, each in replicas.calls if name in {wide, soft}])

    assert statuses(replicas, wide) == statuses(replicas, soft) == {200}
    passed = replicas.passed(narrow)
    seconds = max(each.ended for each in passed) - min(each.sent for each in passed)
    # Redis is told by whoever asks first, who may not have heard of the last calls of the others.
    assert len(passed) <= BURST + RATE * seconds + LEASED + 2 * REPLICAS * len(backs)

    assert statuses(replicas, strict) == {200, 503}
    # A call that was on its way at the loss may have been let pass by Redis just before.
    in_time = [
        any(flushed + 0.5 < each.sent and each.ended < back for each in replicas.passed(strict))
        for flushed, back in backs
    ]
    assert in_time.count(False) <= len(in_time) // 10

    assert statuses(replicas, tight) <= {200, 429, 503}
    assert 0 < len(replicas.passed(tight)) <= MOST_CALLS
    await assert_known(replicas, strict, is_exact=False)


async def test_a_store_that_is_killed_comes_back_empty_is_emptied_and_frozen_gives_nobody_more(
    replicas: Replicas,
) -> None:
    """R8, R10, R11 and R12 in one load, with hardly a moment between them."""
    wide, narrow, soft, strict, tight = models = [
        f"{kind}-all" for kind in ("wide", "narrow", "soft", "strict", "tight")
    ]
    async with replicas.load(*models, pause=0.1):
        await asyncio.sleep(1)
        back_seconds = usually_back(replicas)
        await kill(replicas)
        await replicas.until_ok(ok=False, seconds=5, plugins=PLUGINS)
        await asyncio.sleep(0.5)
        await restart(replicas)
        for _ in range(3):  # while the sums are being gathered, and when they have just been
            await asyncio.sleep(0.7)
            await flush(replicas)
        await freeze(replicas)
        await replicas.until_ok(ok=False, seconds=5, plugins=PLUGINS)
        await thaw(replicas)
        await flush(replicas)
        over = time.monotonic()
        await replicas.until_ok(ok=True, seconds=2 * back_seconds, plugins=PLUGINS)
        await until_spent(replicas, tight, narrow)
        await asyncio.sleep(back_seconds)

    assert statuses(replicas, wide) == statuses(replicas, soft) == {200}
    passed = replicas.passed(narrow)
    seconds = max(each.ended for each in passed) - min(each.sent for each in passed)
    # Redis is told by whoever asks first, who may not have heard of the others' last calls: five times.
    assert len(passed) <= BURST + RATE * seconds + LEASED + 2 * REPLICAS * 5
    assert {(each.status, each.code) for each in replicas.answers(strict) if each.status != 200} == {
        (503, "budget_unavailable")
    }
    assert any(each.sent > over for each in replicas.passed(strict))
    assert statuses(replicas, tight) == {200, 429, 503}
    assert 0 < len(replicas.passed(tight)) <= MOST_CALLS
    await assert_known(replicas, strict, is_exact=False)


def statuses(replicas: Replicas, model: str) -> set[int]:
    return {each.status for each in replicas.answers(model)}


async def until_spent(replicas: Replicas, *models: str) -> None:
    """Wait until a budget, or a limit, has no room left."""
    ends = time.monotonic() + 60
    for model in models:
        while all(each.status != 429 for each in replicas.answers(model)):
            assert time.monotonic() < ends, (model, Counter(each.status for each in replicas.answers(model)))
            await asyncio.sleep(0.05)


async def assert_known(replicas: Replicas, model: str, *, is_exact: bool) -> None:
    """Of a budget as much is spent as the ledger has, and after a loss perhaps more, but never less."""
    served = replicas.served[0]
    await asyncio.sleep(1)  # ledgers are written within 0.2 s
    (row,) = await asyncio.to_thread(receipts, served, "--by", "model", "--model", model)
    assert Decimal(row["cost_usd"]) == COST * len(replicas.passed(model))
    async with replicas.session.get(
        f"{served.url}/v1/budgets", headers={"authorization": f"Bearer {served.key}"}
    ) as answer:
        budgets = (await answer.json())["data"]
    (spent,) = [Decimal(each["spent_usd"]) for each in budgets if each["budget"].endswith(f"model={model}")]
    assert spent == Decimal(row["cost_usd"]) if is_exact else spent >= Decimal(row["cost_usd"])
