"""A plugin that takes its time to settle holds up no client; what changes or stops the gateway waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from puppets import Puppet, Resident
from yamls import CHAT, HELLO, STREAM, config

from qlens.testing import Running, running

STAGES = {
    "guard": [{"plugin": "puppets:Puppet", "name": "slow"}],
    "observe": [{"plugin": "puppets:Resident", "name": "home"}],
}


@asynccontextmanager
async def _one_connection() -> AsyncIterator[aiohttp.ClientSession]:
    connector = aiohttp.TCPConnector(limit=1)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(20)) as session:
        yield session


async def _call(session: aiohttp.ClientSession, gateway: Running, body: dict[str, Any]) -> int:
    async with session.post(gateway.url + CHAT, json=body) as answer:
        await answer.read()
        return answer.status


def _slow(gateway: Running, let_go: asyncio.Event) -> Puppet:
    slow: Puppet = gateway.plugin("guard", "slow")
    slow.does["settle"] = lambda receipt: let_go.wait()
    return slow


@pytest.mark.parametrize("body", [HELLO, STREAM, {**HELLO, "model": "nothing"}], ids=["body", "stream", "refused"])
async def test_the_next_call_of_a_connection_is_served_while_the_last_one_settles(body: dict[str, Any]) -> None:
    let_go = asyncio.Event()
    async with running(config(STAGES)) as gateway, _one_connection() as session:
        slow = _slow(gateway, let_go)
        for count in (1, 2, 3):
            assert await _call(session, gateway, body) == (404 if body["model"] == "nothing" else 200)
            assert len(slow.settled) == count
        assert gateway.receipts == []
        let_go.set()
        assert len(await gateway.settled(3)) == 3


async def test_with_too_many_that_settle_calls_wait_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlens.account.MOST_LEAVING", 1)
    let_go = asyncio.Event()
    async with running(config(STAGES)) as gateway, _one_connection() as session:
        slow = _slow(gateway, let_go)
        assert await _call(session, gateway, HELLO) == 200
        assert await _call(session, gateway, HELLO) == 200
        third = asyncio.create_task(_call(session, gateway, HELLO))
        await asyncio.sleep(0.5)
        assert (third.done(), len(slow.settled)) == (False, 2)
        let_go.set()
        assert await third == 200
        assert len(await gateway.settled(3)) == 3


async def test_a_reload_closes_nothing_before_what_settles_alone_has_ended() -> None:
    let_go = asyncio.Event()
    async with running(config(STAGES)) as gateway, _one_connection() as session:
        _slow(gateway, let_go)
        home: Resident = gateway.plugin("observe", "home")
        assert await _call(session, gateway, HELLO) == 200
        assert await _call(session, gateway, HELLO) == 200
        await gateway.reload(config())
        await asyncio.sleep(0.05)
        assert home.events == ["open"]
        let_go.set()
        while home.events != ["open", "close"]:
            await asyncio.sleep(0.01)
