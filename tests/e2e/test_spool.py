"""A gateway is killed, a database is away: the ledger is the provider's bill all the same."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest
from e2e.billed import (
    CONFIG,
    ask,
    count,
    gateway,
    is_the_bill,
    kill,
    memory,
    provider,
    stopped,
    until,
    until_ready,
)
from ledgers import Place, PostgresPlace, SqlitePlace

from qlens.testing.postgres import postgres_server


@pytest.fixture(params=["sqlite", "postgres"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    if request.param == "sqlite":
        yield SqlitePlace(tmp_path / "x.db")
        return
    with postgres_server() as server:
        yield PostgresPlace(server, server.new_database())


async def test_a_gateway_killed_with_500_calls_in_flight_forgets_none_and_counts_none_twice(
    place: Place, tmp_path: Path
) -> None:
    async with provider() as (one, upstream), aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        text = CONFIG.format(workers=1, url=place.url, upstream=upstream, flush=600)
        with gateway(tmp_path, text) as (process, url):
            await until_ready(session, url)
            for _ in range(5):
                answers = await asyncio.gather(*(ask(session, url) for _ in range(40)))
                assert {status for status, _ in answers} == {200}
            hanging = [asyncio.create_task(ask(session, url, "hang")) for _ in range(500)]
            async with asyncio.timeout(60):
                while one.hanging < 500:
                    await asyncio.sleep(0.02)
            kill(process)
            assert {status for status, _ in await asyncio.gather(*hanging)} == {0}
        assert count(place) == 0
        text = CONFIG.format(workers=1, url=place.url, upstream=upstream, flush=0.01)
        # Killed once more, wherever in its catching up it is.
        with gateway(tmp_path, text) as (process, url):
            await until_ready(session, url)
            kill(process)
        with gateway(tmp_path, text) as (process, url):
            await until_ready(session, url)
            await until(lambda: count(place) >= 700)
            assert (await ask(session, url))[0] == 200
            await asyncio.sleep(1)  # until all who listen are told, the spool is kept
            await stopped(process)
        is_the_bill(place, one.bill, interrupted=500)
        assert not (tmp_path / "spool").exists()


async def test_a_worker_that_is_killed_is_accounted_for_by_the_next(tmp_path: Path) -> None:
    place = SqlitePlace(tmp_path / "x.db")
    async with provider() as (one, upstream), aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        text = CONFIG.format(workers=2, url=place.url, upstream=upstream, flush=0.01)
        with gateway(tmp_path, text) as (process, url):
            await until_ready(session, url)
            await until(lambda: len(list((tmp_path / "spool").glob("[0-9]"))) == 2)
            hanging = [asyncio.create_task(ask(session, url, "hang")) for _ in range(40)]
            async with asyncio.timeout(30):
                while one.hanging < 40:
                    await asyncio.sleep(0.02)
            worker = owner(tmp_path / "spool" / "0" / "lock")
            os.kill(worker, signal.SIGKILL)
            done, rest = await asyncio.wait(hanging, timeout=1)
            await until(lambda: count(place) == len(done))
            for task in rest:
                task.cancel()
            answers = await asyncio.gather(*(ask(session, url) for _ in range(40)))
            assert {status for status, _ in answers} <= {200, 0}
            await stopped(process)
        found = place.rows("SELECT outcome, error FROM receipts")
        assert sum(row["error"] == "interrupted" for row in found) == len(done)
        assert sum(row["outcome"] == "abandoned" for row in found) == len(rest)
        assert sum(row["outcome"] == "complete" for row in found) == len(one.bill)
        assert not (tmp_path / "spool").exists()


def owner(lock: Path) -> int:
    """The process that holds a lock."""
    inode = str(lock.stat().st_ino)
    for line in Path("/proc/locks").read_text().splitlines():
        words = line.split()
        if words[1] == "FLOCK" and words[5].endswith(f":{inode}"):
            return int(words[4])
    raise AssertionError(f"nobody holds {lock}")


async def test_a_database_that_is_away_under_load_costs_nothing_but_disk(tmp_path: Path) -> None:
    place = SqlitePlace(tmp_path / "x.db")
    async with provider() as (one, upstream), aiohttp.ClientSession() as session:
        text = CONFIG.format(workers=1, url=place.url, upstream=upstream, flush=0.01)
        with gateway(tmp_path, text) as (process, url):
            await until_ready(session, url)

            async def load(calls: int) -> None:
                for _ in range(calls):
                    assert (await ask(session, url))[0] == 200

            await asyncio.gather(*(load(25) for _ in range(10)))
            await until(lambda: count(place) == 250)
            other = sqlite3.connect(tmp_path / "x.db", isolation_level=None)
            other.execute("BEGIN IMMEDIATE")
            before = memory(process)
            await asyncio.gather(*(load(120) for _ in range(10)))
            grown = memory(process) - before
            assert count(place) == 250
            assert sum(path.stat().st_size for path in (tmp_path / "spool").rglob("*.log")) > 1200 * 300
            other.execute("ROLLBACK")
            other.close()
            await until(lambda: count(place) == 1450)
            await stopped(process)
        is_the_bill(place, one.bill, interrupted=0)
        assert grown < 16 * 1024 * 1024, grown
