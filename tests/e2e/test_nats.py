"""Events outlast the processes that they happened in."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from e2e.serving import Served, receipts, serving
from ledgers import SqlitePlace

from qlens import usd
from qlens.testing.nats import NatsServer, nats_server


def settings(url: str, workers: int, cost: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    nats = {"plugin": "nats", "servers": [url], "stream": {"create": True}, "spool": "outbox"}
    pipeline = {"observe": [nats], "rate_limit": [], "cache": [], "cost": list(cost)}
    hangs = {"provider": "echo", "model": "gpt-4o-mini", "params": {"first_byte_ms": 60_000}}
    models = {"hangs": {"max_output_tokens": 100, "targets": [hangs]}}
    return {"server": {"workers": workers}, "pipeline": pipeline, "models": models}


def call(served: Served, model: str = "gpt-4o-mini") -> str:
    """Make a call on a connection of its own, so that all workers get some; the id of its receipt."""
    connection = http.client.HTTPConnection(served.url.removeprefix("http://"), timeout=10)
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "hello"}]})
    headers = {"authorization": f"Bearer {served.key}", "content-type": "application/json"}
    try:
        connection.request("POST", "/v1/chat/completions", body, headers)
        answer = connection.getresponse()
        assert (answer.status, bool(answer.read())) == (200, True)
        return str(answer.headers["x-request-id"])
    finally:
        connection.close()


def waiting(folder: Path) -> int:
    """How many receipts are in the outboxes' files."""
    return sum(file.read_bytes().count(b"qlens.receipt") for file in (folder / "outbox").glob("*/*.log"))


def kill(served: Served) -> None:
    """End the gateway and its workers, all at once."""
    pid = served.process.pid
    served.signal(signal.SIGSTOP)  # it must not start others meanwhile
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for child in map(int, children):
        os.kill(child, signal.SIGKILL)
    served.process.kill()
    served.told_to_stop, served.leaves_with = True, -signal.SIGKILL


@pytest.mark.parametrize("workers", [1, 2])
async def test_what_a_killed_gateway_had_to_tell_is_told_by_the_next(tmp_path: Path, workers: int) -> None:
    async with nats_server() as nats:
        nats.kill()
        with serving(tmp_path, changes=settings(nats.url, workers)) as served:
            made = [await asyncio.to_thread(call, served) for _ in range(40)]
            async with asyncio.timeout(10):
                while waiting(tmp_path) < len(made):
                    await asyncio.sleep(0.02)
            assert len(list((tmp_path / "outbox").iterdir())) == workers
            kill(served)
        await nats.start()
        with serving(tmp_path, changes=settings(nats.url, 1)) as served:
            await nats.reached(len(made))
            made.append(await asyncio.to_thread(call, served))
            await nats.reached(len(made))
        assert Counter(message.headers["Nats-Msg-Id"] for message in await nats.messages()) == Counter(made)
        assert not (tmp_path / "outbox").exists()


# --- and those of calls that were in flight ------------------------------------------------------


def booked(flush_seconds: float) -> list[dict[str, Any]]:
    price = {"model": "gpt-4o-mini", "input": 0.15, "output": 0.60}
    return [
        {"plugin": "prices", "catalogue": False, "table": [price]},
        {"plugin": "ledger", "url": "sqlite:///ledger.db", "flush_seconds": flush_seconds, "batch_size": 100_000},
    ]


def booked_in(folder: Path) -> list[dict[str, Any]]:
    return SqlitePlace(folder / "ledger.db").rows("SELECT * FROM receipts")


def begun(folder: Path) -> int:
    """How many calls that hang the ledger's spool knows of."""
    return sum(file.read_bytes().count(b'"hangs"') for file in (folder / "ledger.db.spool").glob("*/*.log"))


async def made_and_killed(served: Served, folder: Path, calls: int, hanging: int) -> None:
    """Make some calls, and kill the gateway while others are on their way."""
    loop, threads = asyncio.get_running_loop(), ThreadPoolExecutor(hanging)
    in_flight = [loop.run_in_executor(threads, call, served, "hangs") for _ in range(hanging)]
    made = [await asyncio.to_thread(call, served) for _ in range(calls)]
    async with asyncio.timeout(20):
        while begun(folder) < hanging or waiting(folder) < len(made):
            await asyncio.sleep(0.02)
    kill(served)
    ended = await asyncio.gather(*in_flight, return_exceptions=True)
    assert all(isinstance(each, OSError | http.client.HTTPException) for each in ended), ended


async def told_is_the_book(nats: NatsServer, folder: Path, count: int, interrupted: int) -> None:
    """The stream has one event of each receipt in the ledger, which says what the receipt says."""
    await nats.reached(count)
    events = [json.loads(message.data) for message in await nats.messages()]
    told = [
        (event["id"], event["data"]["outcome"], event["data"]["error"], event["data"]["cost_usd"]) for event in events
    ]
    rows = booked_in(folder)
    assert sorted(told) == sorted((row["id"], row["outcome"], row["error"], usd(row["cost_picos"])) for row in rows)
    assert (len(rows), sum(row["error"] == "interrupted" for row in rows)) == (count, interrupted)
    for event in events:
        assert event["subject"] == event["id"] == event["data"]["id"]
        if event["data"]["error"] == "interrupted":
            assert (event["data"]["status"], event["data"]["usage"]["output"]) == (503, 100)


@pytest.mark.parametrize(
    ("workers", "nats_is_away", "outbox_is_lost"),
    [(1, False, False), (2, False, False), (1, True, False), (1, False, True)],
)
async def test_each_receipt_is_told_once_though_the_gateway_was_killed_with_calls_in_flight(
    tmp_path: Path, workers: int, nats_is_away: bool, outbox_is_lost: bool
) -> None:
    """What the outbox did not get, which is the last of what was written down, is told by the ledger alone."""
    async with nats_server() as nats:
        if outbox_is_lost:
            nats.kill()
        with serving(tmp_path, changes=settings(nats.url, workers, booked(600))) as served:
            await made_and_killed(served, tmp_path, calls=40, hanging=25)
            receipts(served)  # a command writes what is in the spool, and leaves it to those who can tell
            assert len(booked_in(tmp_path)) == 65
        if outbox_is_lost:
            shutil.rmtree(tmp_path / "outbox")
            await nats.start()
        if nats_is_away:
            nats.kill()
        with serving(tmp_path, changes=settings(nats.url, 1, booked(0.01))) as served:
            await asyncio.to_thread(call, served)
            if nats_is_away:
                async with asyncio.timeout(10):
                    while waiting(tmp_path) < 26:
                        await asyncio.sleep(0.02)
                await nats.start()
            await nats.reached(66)
        await told_is_the_book(nats, tmp_path, count=66, interrupted=25)
        assert not (tmp_path / "ledger.db.spool").exists()


async def test_a_gateway_that_is_killed_before_it_told_leaves_that_to_the_next(tmp_path: Path) -> None:
    async with nats_server() as nats:
        with serving(tmp_path, changes=settings(nats.url, 1, booked(600))) as served:
            await made_and_killed(served, tmp_path, calls=5, hanging=25)
        for _ in range(2):
            with serving(tmp_path, changes=settings(nats.url, 1, booked(0))) as served:
                kill(served)
        with serving(tmp_path, changes=settings(nats.url, 1, booked(0))):
            await nats.reached(30)
        await told_is_the_book(nats, tmp_path, count=30, interrupted=25)
        assert not (tmp_path / "ledger.db.spool").exists()
