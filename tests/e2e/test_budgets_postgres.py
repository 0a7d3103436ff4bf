"""Two gateways as on two machines: budgets in one Redis, the ledger in one PostgreSQL, and Redis forgets."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from e2e.replicas import Replicas, replicated

from qlens.testing.postgres import PostgresServer, postgres_server
from qlens.testing.redis import RedisServer, redis_server

COST = Decimal("0.00001")
"""A call makes 10 tokens of a micro-dollar each; input is free."""
ROOM = {"quick": 40, "lingering": 10}
"""For how many calls there is room."""


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    with postgres_server() as server:
        yield server


def changes(redis: RedisServer, database: str) -> dict[str, Any]:
    store = {"kind": "redis", "url": redis.url, "timeout_ms": 500}
    limits = [
        {"per": "tenant", "usd": float(COST * calls), "match": {"model": [model]}, "window": "month"}
        for model, calls in ROOM.items()
    ]

    def model(name: str, **params: int) -> dict[str, Any]:
        return {"max_output_tokens": 100, "targets": [{"provider": "twin", "model": name, "params": params}]}

    return {
        "pipeline": {
            "rate_limit": [],
            "cache": [],
            "cost": [
                {"plugin": "prices", "table": [{"model": "*", "input": 0, "output": 1}]},
                {"plugin": "budgets", "store": store, "limits": limits},
                {"plugin": "ledger", "url": database},  # its spool is in each gateway's own folder
            ],
        },
        "providers": {"twin": {"plugin": "echo"}},
        "models": {"quick": model("quick"), "lingering": model("lingering", first_byte_ms=2500)},
    }


async def spent(gateways: Replicas, model: str) -> Decimal:
    """What Redis has, after every gateway has told it the last of it."""
    rows: list[Any] = []
    for served in gateways.served:
        async with gateways.session.get(
            f"{served.url}/v1/budgets", headers={"authorization": f"Bearer {served.key}"}
        ) as answer:
            rows = [row for row in (await answer.json())["data"] if row["budget"].endswith(f"model={model}")]
    return Decimal(rows[0]["spent_usd"])


async def admitted(gateways: Replicas, model: str) -> int:
    """The status of the first call that is not refused because the sums are being gathered."""
    async with asyncio.timeout(15):
        while (answer := await gateways.call(model, len(gateways.calls))).status == 503:
            assert answer.code == "budget_unavailable"
            await asyncio.sleep(0.05)
    return answer.status


async def until_kept(postgres: PostgresServer, database: str, model: str, calls: int) -> None:
    """Wait until the ledger has what so many calls of a model cost."""
    question = "SELECT sum(cost_picos) FROM receipts WHERE model = $1"
    ends = time.monotonic() + 60
    while True:
        (row,) = await asyncio.to_thread(partial(postgres.execute, question, model, database=database))
        if row[0] == COST * calls * 10**12:
            return
        assert time.monotonic() < ends, row
        await asyncio.sleep(0.1)


async def test_budgets_in_redis_are_rebuilt_from_the_one_ledger_in_postgresql(
    postgres: PostgresServer, tmp_path: Path
) -> None:
    name = postgres.new_database()
    async with redis_server() as redis:

        def gateways(place: str) -> Any:
            folder = tmp_path / place
            folder.mkdir()
            return replicated(folder, redis, 2, lambda number, proxy: changes(redis, postgres.url(name)))

        async with gateways("first") as two:
            assert await two.together("quick", 12) == {200: 12}
            assert await spent(two, "quick") == COST * 12
            await until_kept(postgres, name, "quick", 12)

            # Redis forgets while calls run, on both: they hold what they did, and others get no more than the rest.
            running = [asyncio.create_task(two.call("lingering", number)) for number in range(4)]
            await asyncio.sleep(0.5)
            await redis.command("FLUSHALL")
            await asyncio.sleep(0.6)
            assert await admitted(two, "quick") == 200
            more = [asyncio.create_task(two.call("lingering", number)) for number in range(12)]
            assert [(await each).status for each in running] == [200] * 4
            assert sorted([(await each).status for each in more]) == [200] * 6 + [429] * 6
            assert await spent(two, "quick") == COST * 13
            await until_kept(postgres, name, "lingering", 10)

        # It forgets while nobody runs, and the ledger has what both have ever written.
        await redis.command("FLUSHALL")
        async with gateways("second") as two:
            assert await admitted(two, "lingering") == 429
            assert await admitted(two, "quick") == 200
            assert await spent(two, "quick") == COST * 14
            assert await spent(two, "lingering") == COST * 10

            # And while the ledger is away, nothing is admitted that nobody can know the past of.
            await until_kept(postgres, name, "quick", 14)
            postgres.stop(signal.SIGQUIT)
            await redis.command("FLUSHALL")
            await asyncio.sleep(2.5)
            answers = [await two.call("quick", number) for number in range(4)]
            assert {(each.status, each.code) for each in answers} == {(503, "budget_unavailable")}
            await asyncio.to_thread(postgres.start)
            assert await admitted(two, "quick") == 200
            rest = await two.together("quick", 2 * ROOM["quick"])
            assert rest == {200: ROOM["quick"] - 15, 429: ROOM["quick"] + 15}
            assert await spent(two, "quick") == COST * ROOM["quick"]
            await until_kept(postgres, name, "quick", ROOM["quick"])
