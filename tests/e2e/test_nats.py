"""Events outlast the processes that they happened in."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from e2e.serving import Served, serving

from qlens.testing.nats import nats_server


def settings(url: str, workers: int) -> dict[str, Any]:
    nats = {"plugin": "nats", "servers": [url], "stream": {"create": True}, "spool": "outbox"}
    pipeline = {"observe": [nats], "rate_limit": [], "cache": [], "cost": []}
    return {"server": {"workers": workers}, "pipeline": pipeline}


def call(served: Served) -> str:
    """Make a call on a connection of its own, so that all workers get some; the id of its receipt."""
    connection = http.client.HTTPConnection(served.url.removeprefix("http://"), timeout=10)
    body = json.dumps({"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "hello"}]})
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
