"""The disk of the spool is full, or cannot sync: the ledger is the provider's bill all the same."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path
from signal import SIGQUIT

import aiohttp
import pytest
from e2e.billed import (
    CONFIG,
    ask,
    count,
    finished,
    gateway,
    is_the_bill,
    provider,
    stopped,
    until,
    until_ready,
)
from e2e.disks import Disk, NoGrowth, failing_syncs, small_disk
from ledgers import PostgresPlace, SqlitePlace

from qlens.testing.postgres import postgres_server
from qlens.testing.processes import free_port

FULL = "the spool cannot be used"


@pytest.fixture
def place() -> Iterator[PostgresPlace]:
    """A database that is on another disk than the spool."""
    with postgres_server() as server:
        yield PostgresPlace(server, server.new_database())


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    (tmp_path / "spool").mkdir()
    return tmp_path / "spool"


class Operator:
    """Looks at the admin listener."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self.session, self.port = session, free_port()

    async def get(self, path: str) -> str:
        async with self.session.get(f"http://127.0.0.1:{self.port}{path}") as answer:
            return await answer.text()

    async def says(self, text: str) -> None:
        """Wait until the gateway says something of its health."""
        async with asyncio.timeout(30):
            while text not in await self.get("/admin/health"):
                await asyncio.sleep(0.02)

    async def metric(self, name: str) -> int:
        lines = (await self.get("/metrics")).splitlines()
        return sum(int(float(line.split()[-1])) for line in lines if line.startswith(name))


def config(place: PostgresPlace, upstream: str, spool: Path, operator: Operator, ledger: str) -> str:
    text = CONFIG.format(workers=1, url=place.url, upstream=upstream, flush=0.01)
    changes = {
        "spool: spool": f'spool: "{spool}/s"',
        "admin: {port: 0}": f"admin: {{port: {operator.port}}}",
        "plugin: anonymous": "plugin: anonymous, roles: [member, viewer]",
        "close_seconds: 20": f"close_seconds: 20, {ledger}",
    }
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    return text


async def calls(session: aiohttp.ClientSession, url: str, number: int) -> set[int]:
    """The statuses of some calls."""
    return {status for status, _ in await asyncio.gather(*(ask(session, url) for _ in range(number)))}


@pytest.mark.parametrize("is_small", [True, False], ids=["a small disk", "no growth"])
async def test_a_full_disk_loses_nothing_and_stops_calls_only_while_the_database_is_away_too(
    place: PostgresPlace, tmp_path: Path, spool: Path, is_small: bool
) -> None:
    disk: Disk = small_disk(spool) if is_small else NoGrowth()
    async with provider() as (one, upstream), aiohttp.ClientSession() as session:
        operator = Operator(session)
        text = config(place, upstream, spool, operator, "when_full: refuse")
        with gateway(tmp_path, text, disk.before) as (process, url):
            await until_ready(session, url)
            assert await calls(session, url, 40) == {200}
            # The database takes what the disk does not, and what it has taken leaves some room on the disk.
            async with asyncio.timeout(30):
                while FULL not in await operator.get("/admin/health"):
                    disk.fill(process.pid)
                    assert await calls(session, url, 10) == {200}
            assert await calls(session, url, 40) == {200}
            await until(lambda: count(place) == len(one.bill))
            # Neither takes anything: what cannot be accounted for is not sent.
            await asyncio.to_thread(place.server.stop, SIGQUIT)
            async with asyncio.timeout(30):
                while (found := await calls(session, url, 5)) != {503}:
                    disk.fill(process.pid)
                    assert found <= {200, 503}
            billed = len(one.bill)
            assert await calls(session, url, 40) == {503}
            assert len(one.bill) == billed
            await asyncio.to_thread(place.server.start)
            async with asyncio.timeout(30):
                while await calls(session, url, 1) != {200}:
                    await asyncio.sleep(0.05)
            disk.empty(process.pid)
            async with asyncio.timeout(30):
                while FULL in await operator.get("/admin/health"):
                    assert await calls(session, url, 10) == {200}
            assert await calls(session, url, 40) == {200}
            await stopped(process)
        is_the_bill(place, one.bill, interrupted=0)


async def test_a_full_disk_and_no_database_drop_and_count_receipts_where_that_is_wanted(
    place: PostgresPlace, tmp_path: Path, spool: Path
) -> None:
    disk = small_disk(spool)
    async with provider() as (one, upstream), aiohttp.ClientSession() as session:
        operator = Operator(session)
        text = config(place, upstream, spool, operator, "when_full: drop, queue_size: 20")
        with gateway(tmp_path, text, disk.before) as (process, url):
            await until_ready(session, url)
            assert await calls(session, url, 40) == {200}
            await until(lambda: count(place) == 40)
            await asyncio.to_thread(place.server.stop, SIGQUIT)
            async with asyncio.timeout(60):
                while await operator.metric("qlens_ledger_dropped_total") < 50:
                    disk.fill(process.pid)
                    assert await calls(session, url, 10) == {200}
            await asyncio.to_thread(place.server.start)
            disk.empty(process.pid)
            await operator.says("0 receipts wait")
            dropped = await operator.metric("qlens_ledger_dropped_total")
            assert await calls(session, url, 40) == {200}
            await operator.says("0 receipts wait")
            assert await operator.metric("qlens_ledger_dropped_total") == dropped
            await stopped(process)
        found = finished(place)
        assert len(found) == count(place) == len(one.bill) - dropped
        assert found.items() <= one.bill.items()


@pytest.mark.parametrize("is_compiled", [True, False], ids=["the system's sync", "Python's sync"])
async def test_a_disk_that_cannot_sync_for_a_while_loses_nothing(tmp_path: Path, is_compiled: bool) -> None:
    place = SqlitePlace(tmp_path / "x.db")
    compiler = shutil.which("cc") if is_compiled else None
    env = failing_syncs(tmp_path, 20, 30, compiler)
    async with provider() as (one, upstream), aiohttp.ClientSession() as session:
        text = CONFIG.format(workers=1, url=place.url, upstream=upstream, flush=0.01)
        with gateway(tmp_path, text, env=env) as (process, url):
            await until_ready(session, url)
            answered = 0
            async with asyncio.timeout(60):
                while "written anew" not in (tmp_path / "errors.txt").read_text() or answered < 60:
                    status, _ = await ask(session, url)
                    assert status in {200, 503}
                    answered += status == 200
                    await asyncio.sleep(0.01)
            await stopped(process)
        assert "could not be synced" in (tmp_path / "errors.txt").read_text()
        is_the_bill(place, one.bill, interrupted=0)
        assert not (tmp_path / "spool").exists()
