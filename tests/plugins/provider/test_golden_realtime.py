"""Golden fixtures of realtime sessions: each event passes as it is, in both directions, and is metered."""

from __future__ import annotations

import asyncio
from typing import Any

import goldens
import orjson
import pytest
from attrs import asdict
from goldens import HEADERS, Case, cases

from qlens.testing import Running, running
from qlens.testing.realtime import realtime


async def _talk(gateway: Running, case: Case, events: int) -> list[str]:
    """Say all that the client has to say, and hear so many events."""
    async with gateway.session.ws_connect(f"{gateway.url}/v1/realtime?model=ours") as socket:
        heard = [await socket.receive_str(timeout=5)]
        for event in case["client"]:
            await socket.send_str(orjson.dumps(event).decode())
        heard += [await socket.receive_str(timeout=5) for _ in range(events - 1)]
        return heard


async def _passes(provider: str, case: Case) -> None:
    said: list[Any] = [event for kind in case["answer"] for event in case["answer"][kind]]
    expected = case.get("reply", said)
    async with (
        realtime(key=goldens.KEY, models=(case["model"],), script=case["answer"]) as up,
        running(goldens.config(provider, up.root, case)) as gateway,
    ):
        heard = await _talk(gateway, case, len(expected))
        assert heard == [orjson.dumps(event).decode() for event in expected]
        (session,) = up.sessions
        async with asyncio.timeout(5):
            await session.closed.wait()
        assert session.events == case["client"]
        assert {"path": session.path, "query": session.query} == case["wire"]
        named = {name: value for name, value in HEADERS[provider].items() if session.headers.get(name) == value}
        assert named == HEADERS[provider]
        (receipt,) = await gateway.settled(1)
        used = {name: value for name, value in asdict(receipt.usage).items() if value}
        assert (receipt.outcome, used) == ("complete", case["usage"])


@pytest.mark.parametrize("case", cases("openai", "realtime"))
async def test_openai(case: Case) -> None:
    await _passes("openai", case)


@pytest.mark.parametrize("case", cases("azure_openai", "realtime"))
async def test_azure_openai(case: Case) -> None:
    await _passes("azure_openai", case)
