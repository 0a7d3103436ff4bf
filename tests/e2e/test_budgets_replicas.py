"""Three gateway processes with one file of budgets: nobody overspends, whatever clients and processes do."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from attrs import define
from e2e.serving import Served, receipts, serving

pytestmark = [pytest.mark.alone, pytest.mark.asyncio(loop_scope="module")]

REPLICAS = 3
CRASH_SECONDS = 3
MICRO = 10**6
"""A token of output costs a micro-dollar, in picodollars; input is free."""
LIMITS = {"edge": 10 * MICRO, "storm": 4000 * MICRO, "kill": 10_000 * MICRO}


def changes(file: Path) -> Mapping[str, Any]:
    limits = [
        {"per": "tenant", "match": {"model": [model]}, "usd": picos / 10**12, "window": "total"}
        for model, picos in LIMITS.items()
    ]
    table = [{"model": "*", "input": 0, "output": 1}]
    store = {"kind": "sqlite", "url": f"sqlite:///{file}", "crash_seconds": CRASH_SECONDS}
    failing = {"provider": "twin", "model": "bad", "params": {"fail_status": 500}}
    return {
        "pipeline": {
            "rate_limit": [],
            "cache": [],
            "cost": [
                {"plugin": "prices", "table": table},
                {"plugin": "budgets", "limits": limits, "store": store},
                {"plugin": "ledger", "url": "sqlite:///qlens.db"},
            ],
        },
        "providers": {"twin": {"plugin": "echo"}},
        "models": {
            "edge": {"max_output_tokens": 10, "targets": [target("edge", first_byte_ms=1500)]},
            "storm": {"max_output_tokens": 50, "targets": [{**failing, "weight": 1}, target("storm", token_ms=1)]},
            "kill": {"max_output_tokens": 1000, "targets": [target("kill", first_byte_ms=60_000)]},
        },
    }


def target(model: str, **params: object) -> dict[str, Any]:
    return {"provider": "twin", "model": model, "params": params}


@define(eq=False)
class Replicas:
    """The gateways, and the file they share."""

    served: list[Served]
    file: Path
    session: aiohttp.ClientSession

    async def call(self, model: str, replica: int, *, stream: bool = False, max_tokens: int = 10) -> int:
        served = self.served[replica % REPLICAS]
        body = {"model": model, "max_tokens": max_tokens, "stream": stream}
        async with self.session.post(
            f"{served.url}/v1/chat/completions",
            json={**body, "messages": [{"role": "user", "content": "a b c " * 20}]},
            headers={"authorization": f"Bearer {served.key}"},
        ) as answer:
            await answer.read()
            return answer.status

    def state(self, model: str) -> tuple[int, int]:
        """What is spent and held."""
        database = sqlite3.connect(self.file, timeout=10)
        try:
            found = database.execute(
                "SELECT spent, held FROM budgets WHERE rule LIKE ?", (f"%model={model}",)
            ).fetchone()
            return found or (0, 0)
        finally:
            database.close()

    async def until_nothing_is_held(self, model: str, seconds: float) -> int:
        async with asyncio.timeout(seconds):
            while self.state(model)[1]:
                await asyncio.sleep(0.05)
        return self.state(model)[0]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def three(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Replicas]:
    folder = tmp_path_factory.mktemp("budgets")
    file = folder / "budgets.db"
    with ExitStack() as processes:

        def start(number: int) -> Served:
            place = folder / f"{number}"
            place.mkdir()
            return processes.enter_context(serving(place, changes=changes(file)))

        served = await asyncio.gather(*(asyncio.to_thread(start, number) for number in range(REPLICAS)))
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            yield Replicas(list(served), file, session)


async def test_of_a_thousand_calls_at_once_with_room_for_one_exactly_one_passes(three: Replicas) -> None:
    statuses = await asyncio.gather(*(three.call("edge", number) for number in range(1000)))
    assert Counter(statuses) == {200: 1, 429: 999}
    assert await three.until_nothing_is_held("edge", 3) == LIMITS["edge"]


async def test_a_storm_of_aborts_and_failures_never_overspends_and_the_sums_agree(three: Replicas) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    dice, ends, seen = random.Random(seed), time.monotonic() + 3, list[int]()

    async def client(number: int) -> None:
        while time.monotonic() < ends:
            try:
                async with asyncio.timeout(dice.choice([0.005, 0.02, 0.05, 5, 5])):
                    await three.call("storm", number, stream=dice.random() < 0.5, max_tokens=dice.randrange(1, 90))
            except TimeoutError:
                pass
            await asyncio.sleep(dice.random() * 0.1)

    async def watch() -> None:
        while time.monotonic() < ends:
            seen.append(sum(three.state("storm")))
            await asyncio.sleep(0.02)

    await asyncio.gather(watch(), *(client(number) for number in range(64)))
    assert seen
    assert max(seen) <= LIMITS["storm"]
    spent = await three.until_nothing_is_held("storm", 4)
    await asyncio.sleep(0.5)  # the ledgers write within 0.2 s
    rows = [row for served in three.served for row in receipts(served, "--by", "model", "--model", "storm")]
    total = sum(round(float(row["cost_usd"] or 0) * 10**12) for row in rows)
    assert 0 < spent == total <= LIMITS["storm"]


async def test_what_a_killed_process_had_reserved_is_charged_once_and_never_refunded(three: Replicas) -> None:
    running = [asyncio.create_task(three.call("kill", 0, max_tokens=1000)) for _ in range(5)]
    async with asyncio.timeout(5):
        while three.state("kill")[1] < 5000 * MICRO:
            await asyncio.sleep(0.02)
    victim = three.served[0]
    victim.told_to_stop, victim.leaves_with = True, -signal.SIGKILL
    victim.process.kill()
    await asyncio.gather(*running, return_exceptions=True)
    await three.until_nothing_is_held("kill", CRASH_SECONDS + 4)
    spent, held = three.state("kill")
    # At least what the calls had reserved, at most what was held in advance beside it: a hundredth of the limit.
    assert 5000 * MICRO <= spent <= 5000 * MICRO + LIMITS["kill"] // 100
    await asyncio.sleep(2.5)
    assert three.state("kill") == (spent, held)
    (row,) = [
        row
        for row in json.loads(three.served[1].qlens("budgets", "--json").stdout)["budgets"]
        if row["budget"].endswith("model=kill")
    ]
    assert row["reserved_usd"] == "0"
