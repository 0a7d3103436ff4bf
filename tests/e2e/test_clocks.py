"""Three gateways whose clocks are hours apart share a Redis: its clock counts for limits, and for who is alive.

Which day or month it is, each gateway's own clock says: so a window begins once, whoever is there first.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from e2e.replicas import Replicas, replicated

from qlens.testing.redis import RedisServer, redis_server

pytestmark = [pytest.mark.alone, pytest.mark.asyncio(loop_scope="module")]

DAY = 86_400
AHEADS = (-7 * 3600.0, 0.0, 1.5 * DAY)
COST = Decimal("0.00001")
"""A call makes 10 tokens of a micro-dollar each; input is free."""
ROOM = 20
"""For how many calls a day there is room."""
CRASH_SECONDS = 3
"""After so long without a sign of life a gateway's reservations are charged."""
LONG_SECONDS = 2 * CRASH_SECONDS
"""How long a call to the model `long` takes."""
LIMITS = {
    "edge": {"requests_per_minute": 1},
    "window": {"requests_per_minute": 3000, "burst_seconds": 2},
    "jump": {"requests_per_minute": 12},
}


def changes(folder: Path, redis: RedisServer) -> dict[str, Any]:
    # Patient: a thousand calls at once hold up the process that makes them.
    store = {"kind": "redis", "url": redis.url, "timeout_ms": 5000}
    limits = [{"per": "tenant", "match": {"model": [model]}, **numbers} for model, numbers in LIMITS.items()]
    # Not of a month: at its end clocks that are days apart are in two of them.
    budgets = [
        {"per": "tenant", "match": {"model": ["day"]}, "usd": float(COST * ROOM), "window": "day"},
        {"per": "tenant", "match": {"model": ["once"]}, "usd": float(COST), "window": "total"},
        {"per": "tenant", "match": {"model": ["ever"]}, "usd": float(COST * ROOM), "window": "total"},
        {"per": "tenant", "match": {"model": ["long"]}, "usd": 1, "window": "total"},
    ]

    def model(name: str, **params: int) -> dict[str, Any]:
        return {"max_output_tokens": 100, "targets": [{"provider": "twin", "model": name, "params": params}]}

    return {
        "pipeline": {
            "rate_limit": [{"plugin": "token_bucket", "store": {**store, "replicas": 3}, "limits": limits}],
            "cache": [],
            "cost": [
                {"plugin": "prices", "table": [{"model": "*", "input": 0, "output": 1}]},
                {"plugin": "budgets", "limits": budgets, "store": {**store, "crash_seconds": CRASH_SECONDS}},
                {"plugin": "ledger", "url": f"sqlite:///{folder / 'ledger.db'}"},
            ],
        },
        "providers": {"twin": {"plugin": "echo"}},
        "models": {
            **{name: model(name) for name in (*LIMITS, "day", "once", "ever")},
            "long": model("long", first_byte_ms=1000 * LONG_SECONDS),
        },
    }


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def three(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Replicas]:
    folder = tmp_path_factory.mktemp("clocks")
    async with (
        redis_server() as redis,
        replicated(folder, redis, len(AHEADS), lambda _, __: changes(folder, redis), AHEADS) as found,
    ):
        yield found


async def budget(three: Replicas, replica: int, model: str) -> tuple[Decimal, Decimal]:
    """What a replica says is spent and reserved of a budget."""
    served = three.served[replica]
    headers = {"authorization": f"Bearer {served.key}"}
    async with three.session.get(f"{served.url}/v1/budgets", headers=headers) as answer:
        (row,) = [row for row in (await answer.json())["data"] if row["budget"].endswith(f"model={model}")]
    return Decimal(row["spent_usd"]), Decimal(row["reserved_usd"])


async def statuses(three: Replicas, model: str, replicas: Sequence[int], count: int) -> Counter[int]:
    """How so many calls at once are answered, spread over some replicas."""
    calls = (three.call(model, replicas[number % len(replicas)]) for number in range(count))
    return Counter(answer.status for answer in await asyncio.gather(*calls))


async def test_their_clocks_are_wrong(three: Replicas) -> None:
    """As every answer says in its Date."""
    for served, ahead in zip(three.served, AHEADS, strict=True):
        async with three.session.get(f"{served.url}/healthz") as answer:
            said = time.mktime(time.strptime(answer.headers["date"], "%a, %d %b %Y %H:%M:%S %Z")) - time.timezone
        assert abs(said - time.time() - ahead) < 60


@pytest.mark.parametrize("model", ["edge", "once"], ids=["limit", "budget"])
async def test_of_a_thousand_calls_at_once_with_room_for_one_exactly_one_passes(three: Replicas, model: str) -> None:
    assert await three.together(model, 1000) == {200: 1, 429: 999}


async def test_in_no_window_more_passes_than_the_burst_and_what_the_rate_gives(three: Replicas) -> None:
    async with three.load("window", pause=0):
        await asyncio.sleep(3)
    passed = sorted(three.passed("window"), key=lambda answer: answer.sent)
    assert len(passed) > 100  # more than the burst: it goes on at the rate
    for first in passed:
        inside = sorted(answer.ended for answer in passed if answer.sent >= first.sent)
        for count, ended in enumerate(inside, 1):
            assert count <= 100 + 50 * (ended - first.sent) + 1e-6


async def test_a_clock_that_jumps_fills_no_bucket(three: Replicas) -> None:
    three.calls.clear()
    began = time.monotonic()
    for aheads in (AHEADS, (30 * DAY, -DAY, 0), (0, 60, 400 * DAY)):
        for clock, ahead in zip(three.clocks, aheads, strict=True):
            clock.ahead = ahead
        assert 429 in await three.together("jump", 60)
    assert 12 <= len(three.passed("jump")) <= 12 + 0.2 * (time.monotonic() - began)


async def test_nobody_is_taken_for_dead_by_a_gateway_that_is_days_ahead(three: Replicas) -> None:
    for clock, ahead in zip(three.clocks, AHEADS, strict=True):
        clock.ahead = ahead
    began = time.monotonic()
    running = [asyncio.create_task(three.call("long", replica)) for replica in (0, 1, 2)]
    async with asyncio.timeout(5):
        while (await budget(three, 1, "long"))[1] < 3 * COST:
            await asyncio.sleep(0.05)
    seen_at = began
    for replica in itertools.cycle((0, 1, 2)):
        spent, reserved = await budget(three, replica, "long")
        # What was read before the first of them can have ended was read while all of them ran.
        if time.monotonic() >= began + LONG_SECONDS:
            break
        seen_at = time.monotonic()
        assert spent == 0
        assert reserved >= 3 * COST
        await asyncio.sleep(0.2)
    assert seen_at > began + CRASH_SECONDS
    assert [answer.status for answer in await asyncio.gather(*running)] == [200] * 3
    async with asyncio.timeout(5):
        while await budget(three, 1, "long") != (3 * COST, Decimal()):
            await asyncio.sleep(0.05)


async def test_what_a_gateway_spent_whose_clock_is_ahead_is_found_when_redis_has_lost_it(tmp_path: Path) -> None:
    """Also when nobody is left who remembers: only the ledger does, under the times of that clock."""
    async with redis_server() as redis:
        for turn, ahead in (("ahead", 7200.0), ("right", 0.0)):
            (folder := tmp_path / turn).mkdir()
            async with replicated(folder, redis, 1, lambda _, __: changes(tmp_path, redis), (ahead,)) as one:
                async with asyncio.timeout(20):
                    while (answer := await one.call("ever", 0)).status == 503:
                        await asyncio.sleep(0.05)
                await one.together("ever", 2 * ROOM)
                assert (answer.status, len(one.passed("ever"))) == ((200, ROOM) if ahead else (429, 0))
            await redis.command("FLUSHALL")


async def test_a_day_begins_once_for_all(three: Replicas) -> None:
    """Before midnight and after it, in whatever order the gateways get there, and when one goes back."""
    midnight = (int(time.time()) // DAY + 2) * DAY

    def at(*seconds: int) -> None:
        """So many seconds after midnight it is now."""
        for clock, each in zip(three.clocks, seconds, strict=True):
            clock.ahead = midnight + each - time.time()

    at(-6 * 3600, -4 * 3600, -2 * 3600)
    assert await statuses(three, "day", (0, 1, 2), 3 * ROOM) == {200: ROOM, 429: 2 * ROOM}

    at(-2 * 3600, -3600, 600)
    assert await statuses(three, "day", (0, 1), ROOM) == {429: ROOM}  # for them the day goes on
    assert await statuses(three, "day", (2,), 5) == {200: 5}
    assert await statuses(three, "day", (0, 1), ROOM) == {429: ROOM}

    at(-600, 60, 3600)
    assert await statuses(three, "day", (0,), ROOM) == {429: ROOM}
    assert await statuses(three, "day", (1, 2), 3 * ROOM) == {200: ROOM - 5, 429: 2 * ROOM + 5}

    at(60, 3600, 2 * 3600)
    assert await statuses(three, "day", (0, 1, 2), 3 * ROOM) == {429: 3 * ROOM}

    at(3600, -600, 2 * 3600)  # one is set right, back to a day of which nothing is left either
    assert await statuses(three, "day", (0, 1, 2), 3 * ROOM) == {429: 3 * ROOM}
    assert (await budget(three, 0, "day"))[0] == ROOM * COST
    assert len(three.passed("day")) == 2 * ROOM
