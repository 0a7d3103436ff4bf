"""A gateway is killed, a database is away, a disk fails: the ledger is the provider's bill all the same."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from attrs import define, field
from ledgers import Place, PostgresPlace, SqlitePlace

from qlens.testing.postgres import postgres_server

MOST_OUTPUT = 1000
INPUT, OUTPUT = 150_000, 600_000
"""Picodollars for a token."""
CONFIG = """
server: {{port: 0, admin: {{port: 0}}, workers: {workers}}}
pipeline:
  auth: [{{plugin: anonymous}}]
  cost:
    - {{plugin: prices, catalogue: false, table: [{{model: mini, input: 0.15, output: 0.60}}]}}
    - {{plugin: ledger, url: "{url}", spool: spool, flush_seconds: {flush}, batch_size: 100000, close_seconds: 20}}
providers: {{one: {{plugin: openai, base_url: "{upstream}/v1", api_key: sk-example-one}}}}
models: {{mini: {{max_output_tokens: 1000, targets: [{{provider: one, model: mini}}]}}}}
"""


@define(eq=False)
class Provider:
    """Answers chats and keeps the bill; with a user called `hang` it starts to work and does not answer."""

    bill: dict[str, int] = field(factory=dict)
    """Picodollars of what was answered, by the answer's id."""
    hanging: int = 0

    async def chat(self, request: web.Request) -> web.Response:
        body = await request.json()
        if body["messages"][0]["content"] == "hang":
            self.hanging += 1
            await asyncio.sleep(300)
        number = len(self.bill)
        self.bill[f"chat-{number}"] = (100 + number) * INPUT + (10 + number) * OUTPUT
        usage = {"prompt_tokens": 100 + number, "completion_tokens": 10 + number, "total_tokens": 110 + 2 * number}
        choice = {"index": 0, "message": {"role": "assistant", "content": "yes"}, "finish_reason": "stop"}
        answer = {"id": f"chat-{number}", "object": "chat.completion", "created": 1, "model": "mini"}
        headers = {"x-request-id": f"chat-{number}"}
        return web.json_response({**answer, "choices": [choice], "usage": usage}, headers=headers)


@asynccontextmanager
async def provider() -> AsyncIterator[tuple[Provider, str]]:
    """A provider, and where it is."""
    one = Provider()
    application = web.Application()
    application.router.add_post("/v1/chat/completions", one.chat)
    runner = web.AppRunner(application, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield one, f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@contextmanager
def gateway(folder: Path, text: str, before: Sequence[str] = ()) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that serves, and where; it is killed at the end if it still runs."""
    (folder / "qlens.yaml").write_text(text)
    command = [*before, sys.executable, "-m", "qlens", "serve", str(folder / "qlens.yaml")]
    with (folder / "errors.txt").open("a") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if url := next((word for word in line.split() if word.startswith("http://")), None):
                break
        else:
            raise AssertionError((folder / "errors.txt").read_text())
        yield process, url
    finally:
        kill(process)
        process.wait()
        process.stdout.close()


def kill(process: subprocess.Popen[str]) -> None:
    """Kill a process and those that it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


async def stopped(process: subprocess.Popen[str]) -> None:
    process.terminate()
    assert await asyncio.to_thread(process.wait, 40) == 0


async def ask(session: aiohttp.ClientSession, url: str, text: str = "hello") -> tuple[int, str | None]:
    """The status and the provider's id of an answer; 0 when the connection breaks."""
    body = {"model": "mini", "max_tokens": MOST_OUTPUT, "messages": [{"role": "user", "content": text}]}
    try:
        async with session.post(f"{url}/v1/chat/completions", json=body) as answer:
            return answer.status, (await answer.json()).get("id")
    except aiohttp.ClientError:
        return 0, None


async def until_ready(session: aiohttp.ClientSession, url: str) -> None:
    async with asyncio.timeout(30):
        while True:
            try:
                async with session.get(f"{url}/readyz") as answer:
                    if answer.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.05)


async def until(condition: Any, seconds: float = 30) -> None:
    async with asyncio.timeout(seconds):
        while not await asyncio.to_thread(condition):
            await asyncio.sleep(0.05)


@pytest.fixture(params=["sqlite", "postgres"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    if request.param == "sqlite":
        yield SqlitePlace(tmp_path / "x.db")
        return
    with postgres_server() as server:
        yield PostgresPlace(server, server.new_database())


RECEIPTS = "SELECT id, outcome, error, cost_picos, cost_state, output, attempts FROM receipts"


def count(place: Place) -> int:
    return len(place.rows("SELECT id FROM receipts"))


def is_the_bill(place: Place, bill: dict[str, int], interrupted: int) -> None:
    """Each answer is there once at its price, each call without one at the most it can have cost; so are the sums."""
    found = place.rows(RECEIPTS)
    finished = {}
    for row in (row for row in found if row["outcome"] == "complete"):
        attempts = row["attempts"] if isinstance(row["attempts"], list) else json.loads(row["attempts"])
        finished[attempts[0]["upstream_id"]] = row["cost_picos"]
    assert finished == bill
    others = [row for row in found if row["outcome"] != "complete"]
    assert len(others) == interrupted
    assert {(row["outcome"], row["error"], row["cost_state"], row["output"]) for row in others} <= {
        ("failed", "interrupted", "estimated", MOST_OUTPUT)
    }
    assert len({row["cost_picos"] for row in others}) <= 1
    assert all(row["cost_picos"] >= MOST_OUTPUT * OUTPUT for row in others)
    total = sum(row["cost_picos"] for row in found)
    for table in ("usage_hours", "usage_days"):
        sums = place.rows(f"SELECT * FROM {table}")
        assert sum(row["calls"] for row in sums) == len(found)
        cost = [row["cost"] if "cost" in row else row["cost_high"] * 10**9 + row["cost_low"] for row in sums]
        assert sum(map(int, cost)) == total


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
            await until(lambda: count(place) >= 700)
            assert (await ask(session, url))[0] == 200
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
        found = place.rows(RECEIPTS)
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


def memory(process: subprocess.Popen[str]) -> int:
    """The bytes that a process has in memory."""
    return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


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


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
async def test_a_disk_that_cannot_sync_for_a_while_loses_nothing(tmp_path: Path) -> None:
    place = SqlitePlace(tmp_path / "x.db")
    inject = [
        "strace",
        "-f",
        "-o",
        "/dev/null",
        "-e",
        "trace=fdatasync",
        "-e",
        "inject=fdatasync:error=EIO:when=20..30",
    ]
    async with provider() as (one, upstream), aiohttp.ClientSession() as session:
        text = CONFIG.format(workers=1, url=place.url, upstream=upstream, flush=0.01)
        with gateway(tmp_path, text, inject) as (process, url):
            await until_ready(session, url)
            answered = 0
            async with asyncio.timeout(60):
                while "written anew" not in (tmp_path / "errors.txt").read_text() or answered < 60:
                    status, _ = await ask(session, url)
                    assert status in {200, 503}
                    answered += status == 200
                    await asyncio.sleep(0.01)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            os.kill(int(children[0]), signal.SIGTERM)
            await asyncio.to_thread(process.wait, 40)
        assert "could not be synced" in (tmp_path / "errors.txt").read_text()
        is_the_bill(place, one.bill, interrupted=0)
        assert not (tmp_path / "spool").exists()
