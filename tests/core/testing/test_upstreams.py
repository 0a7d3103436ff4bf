"""The scripted provider of the test kit, seen by a plain client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import aiohttp
import pytest

from qlens.testing import Scripted
from qlens.testing.upstreams import FakeUpstream, chat_events, error


@pytest.fixture
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as client:
        yield client


async def test_request_is_recorded_whole(up: FakeUpstream, client: aiohttp.ClientSession) -> None:
    async with client.post(f"{up.url}/embeddings?a=1", json={"input": "x"}, headers={"X-Own": "y"}) as answer:
        await answer.read()
    (request,) = up.requests
    assert (request.method, request.path, request.query) == ("POST", "/v1/embeddings", {"a": "1"})
    assert (request.body, request.headers["x-own"], request.connection) == ({"input": "x"}, "y", 1)
    assert request.answered.is_set()
    assert not request.closed.is_set()


async def test_scripted_answers_come_in_order_and_then_the_usual_ones(
    up: FakeUpstream, client: aiohttp.ClientSession
) -> None:
    up.script(Scripted(status=418, body={"a": 1}), error(400, "no", code="odd"))
    statuses = []
    for _ in range(3):
        async with client.post(f"{up.url}/completions", json={"prompt": "x"}) as answer:
            statuses.append(answer.status)
    assert statuses == [418, 400, 200]


async def test_path_that_is_not_served_is_an_error_of_openais(up: FakeUpstream, client: aiohttp.ClientSession) -> None:
    async with client.get(f"{up.root}/elsewhere") as answer:
        assert answer.status == 404
        assert (await answer.json())["error"]["code"] == "unknown_url"


async def test_client_that_leaves_early_is_noticed_without_a_write(
    up: FakeUpstream, client: aiohttp.ClientSession
) -> None:
    up.script(Scripted(events=chat_events(), hang=True))
    async with client.post(f"{up.url}/chat/completions", json={}) as answer:
        await answer.content.readany()
        assert up.open == 1
    await asyncio.wait_for(up.requests[0].closed.wait(), 5)
    assert up.open == 0


async def test_server_that_cuts_is_not_a_client_that_left(up: FakeUpstream, client: aiohttp.ClientSession) -> None:
    up.script(Scripted(body=b"x" * 100, cut_at=3))
    async with client.post(up.url, json={}) as answer:
        with pytest.raises(aiohttp.ClientPayloadError):
            await answer.read()
    assert not up.requests[0].closed.is_set()


async def test_body_may_come_in_pieces(up: FakeUpstream, client: aiohttp.ClientSession) -> None:
    up.script(Scripted(body=b"abcdefgh", split=3, gap=0.02))
    async with client.post(up.url, json={}) as answer:
        assert [chunk async for chunk in answer.content.iter_any()] == [b"abc", b"def", b"gh"]


async def test_requests_can_be_waited_for(up: FakeUpstream, client: aiohttp.ClientSession) -> None:
    waiting = asyncio.create_task(up.arrived(2))
    for _ in range(2):
        assert not waiting.done()
        async with client.post(f"{up.url}/embeddings", json={"input": "x"}) as answer:
            await answer.read()
    assert len(await waiting) == 2
    with pytest.raises(TimeoutError):
        await up.arrived(3, seconds=0.01)
