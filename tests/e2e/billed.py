"""A gateway process in front of a provider that keeps the bill, and whether a ledger is that bill."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from attrs import define, field
from ledgers import Place

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
def gateway(
    folder: Path, text: str, before: Sequence[str] = (), env: Mapping[str, str] | None = None
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that serves, and where; it is killed at the end if it still runs."""
    (folder / "qlens.yaml").write_text(text)
    command = [*before, sys.executable, "-m", "qlens", "serve", str(folder / "qlens.yaml")]
    with (folder / "errors.txt").open("a") as errors:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
            env={**os.environ, **(env or {})},
        )
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


def body(text: str) -> dict[str, Any]:
    """A chat."""
    return {"model": "mini", "max_tokens": MOST_OUTPUT, "messages": [{"role": "user", "content": text}]}


async def ask(session: aiohttp.ClientSession, url: str, text: str = "hello") -> tuple[int, str | None]:
    """The status and the provider's id of an answer; 0 when the connection breaks."""
    try:
        async with session.post(f"{url}/v1/chat/completions", json=body(text)) as answer:
            return answer.status, (await answer.json()).get("id")
    except aiohttp.ClientError:
        return 0, None


async def call(session: aiohttp.ClientSession, url: str) -> tuple[int, str]:
    """The status and the gateway's id of an answer."""
    async with session.post(f"{url}/v1/chat/completions", json=body("hello")) as answer:
        await answer.read()
        return answer.status, answer.headers["x-request-id"]


async def until_ready(session: aiohttp.ClientSession, url: str) -> None:
    async with asyncio.timeout(60):
        while True:
            try:
                async with session.get(f"{url}/readyz") as answer:
                    if answer.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.05)


async def until(condition: Any, seconds: float = 60) -> None:
    async with asyncio.timeout(seconds):
        while not await asyncio.to_thread(condition):
            await asyncio.sleep(0.05)


def memory(process: subprocess.Popen[str]) -> int:
    """The bytes that a process has in memory."""
    return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


RECEIPTS = "SELECT id, outcome, error, cost_picos, cost_state, output, attempts FROM receipts"


def count(place: Place) -> int:
    return len(place.rows("SELECT id FROM receipts"))


def finished(place: Place) -> dict[str, int]:
    """Picodollars of what was answered, by the answer's id, as the ledger has it."""
    return {
        json.loads(row["attempts"])[0]["upstream_id"]: row["cost_picos"]
        for row in place.rows(RECEIPTS)
        if row["outcome"] == "complete"
    }


def is_the_bill(place: Place, bill: dict[str, int], interrupted: int) -> None:
    """Each answer is there once at its price, each call without one at the most it can have cost; so are the sums."""
    found = place.rows(RECEIPTS)
    assert finished(place) == bill
    assert sum(row["outcome"] == "complete" for row in found) == len(bill)
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
