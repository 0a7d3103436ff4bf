"""Calls of Responses through a gateway: to a provider that has them, and over chat to one that has not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import orjson
import pytest

from qlens.testing import Running, Scripted, running
from qlens.testing.responses import FAILURE, FakeResponses, responses_upstream
from qlens.testing.upstreams import TEXT, chat_events

PATH = "/v1/responses"
WORDS = "tell the secret to many more people than you have met"
CLEAN = WORDS.replace("secret", "[redacted]")


def config(url: str, **pipeline: Any) -> str:
    provider = {"plugin": "openai", "base_url": url, "api_key": "sk-example-upstream"}
    targets = {
        "native": [{"provider": "native", "model": "theirs"}],
        "chat": [{"provider": "chat", "model": "theirs"}],
        "echo": [{"provider": "echo", "model": "theirs"}],
        "both": [{"provider": "native", "model": "theirs"}, {"provider": "echo", "model": "theirs"}],
    }
    content = {
        "pipeline": {"auth": [{"plugin": "anonymous"}], **pipeline},
        "providers": {"native": provider, "chat": {**provider, "responses": False}, "echo": {"plugin": "echo"}},
        "models": {name: {"max_output_tokens": 1000, "targets": listed} for name, listed in targets.items()},
    }
    return orjson.dumps(content).decode()


@asynccontextmanager
async def served(**pipeline: Any) -> AsyncIterator[tuple[Running, FakeResponses, openai.AsyncOpenAI]]:
    async with (
        responses_upstream() as up,
        running(config(up.url, **pipeline)) as gateway,
        openai.AsyncOpenAI(api_key="sk-example-client", base_url=f"{gateway.url}/v1", max_retries=0) as client,
    ):
        yield gateway, up, client


@pytest.mark.parametrize(("model", "text", "total"), [("native", TEXT, 13), ("chat", TEXT, 13), ("echo", "Hello", 4)])
async def test_an_answer_and_its_stream_are_the_same_wherever_it_comes_from(model: str, text: str, total: int) -> None:
    async with served() as (gateway, _, client):
        whole = await client.responses.create(model=model, input="Hello")
        async with client.responses.stream(model=model, input="Hello") as stream:
            deltas = [event.delta async for event in stream if event.type == "response.output_text.delta"]
            streamed = await stream.get_final_response()
        assert whole.output_text == streamed.output_text == "".join(deltas) == text
        assert whole.usage is not None
        assert whole.usage == streamed.usage
        receipts = await gateway.settled(2)
        assert [(receipt.outcome, receipt.usage.source) for receipt in receipts] == [("complete", "provider")] * 2
        assert {receipt.usage.total for receipt in receipts} == {whole.usage.total_tokens}
        assert model == "echo" or whole.usage.total_tokens == total


async def test_a_provider_without_responses_is_asked_by_chat() -> None:
    async with served() as (_, up, client):
        for model in ("native", "chat"):
            await client.responses.create(model=model, input="Hello", instructions="Be kind.", max_output_tokens=20)
        native, chat = up.requests
        assert (native.path, chat.path) == ("/v1/responses", "/v1/chat/completions")
        assert native.body == {
            "model": "theirs",
            "input": "Hello",
            "instructions": "Be kind.",
            "max_output_tokens": 20,
        }
        assert chat.body == {
            "model": "theirs",
            "messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}],
            "max_completion_tokens": 20,
        }


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        # Of chat there is no response that anybody could keep, so none is found.
        ({"previous_response_id": "resp_1"}, "previous_response_id", "previous_response_not_found"),
        ({"tools": [{"type": "mcp"}]}, "tools[0].type", "unsupported_parameter"),
    ],
)
async def test_what_chat_cannot_do_is_refused_before_anything_is_sent(fields: Any, param: str, code: str) -> None:
    async with served() as (gateway, up, client):
        with pytest.raises(openai.BadRequestError) as caught:
            await client.responses.create(model="chat", input="Hello", **fields)
        assert (caught.value.param, caught.value.code) == (param, code)
        assert up.requests == []
        assert (await gateway.settled(1))[0].status == 400


@pytest.mark.parametrize("model", ["native", "echo"])
async def test_a_cached_answer_is_given_whole_or_as_a_stream(model: str) -> None:
    async with served(cache=[{"plugin": "exact"}]) as (gateway, up, client):
        stream = await client.responses.create(model=model, input="Hello", stream=True, store=False)
        end = [event async for event in stream][-1]
        assert end.type == "response.completed"
        assert await client.responses.create(model=model, input="Hello", store=False) == end.response
        again = [
            event async for event in await client.responses.create(model=model, input="Hello", stream=True, store=False)
        ]
        assert [event.sequence_number for event in again] == list(range(len(again)))
        assert again[-1].type == "response.completed"
        assert again[-1].response == end.response
        assert [receipt.cache for receipt in await gateway.settled(3)] == ["miss", "hit", "hit"]
        assert len(up.requests) <= 1


async def test_a_guard_sees_every_text_of_a_stream_and_of_its_repetitions() -> None:
    rule = {"name": "secrets", "words": ["secret"], "action": "redact", "on": ["reply"]}
    async with served(guard=[{"plugin": "pattern", "rules": [rule]}]) as (gateway, _, client):
        raw = await gateway.post(PATH, {"model": "echo", "input": WORDS, "stream": True})
        assert b"secret" not in raw.body
        assert [event["sequence_number"] for event in raw.events()] == list(range(len(raw.events())))
        async with client.responses.stream(model="echo", input=WORDS) as stream:
            deltas = [event.delta async for event in stream if event.type == "response.output_text.delta"]
            final = await stream.get_final_response()
        assert "".join(deltas) == final.output_text == CLEAN


@pytest.mark.parametrize("streamed", [True, False])
async def test_a_response_that_fails_at_once_is_asked_of_the_next_target(streamed: bool) -> None:
    async with served() as (gateway, up, client):
        answer = await gateway.post(PATH, {"model": "both", "input": FAILURE, "stream": streamed})
        assert answer.status == 200
        assert FAILURE.encode() in answer.body
        (receipt,) = await gateway.settled(1)
        assert [attempt.status for attempt in receipt.attempts] == [502, 200]
        assert len(up.requests) == 1
        with pytest.raises(openai.InternalServerError):
            await client.responses.create(model="native", input=FAILURE, stream=streamed)


@pytest.mark.parametrize("model", ["native", "chat"])
async def test_a_stream_that_breaks_off_ends_with_an_error_and_is_no_answer(model: str) -> None:
    async with served() as (gateway, up, _):
        whole = [event async for event in _events(gateway, model)]
        begun = len(whole) // 2
        raw = b"".join(whole[:begun])
        up.script(Scripted(events=[raw]) if model == "native" else Scripted(events=chat_events()[:3]))
        answer = await gateway.post(PATH, {"model": model, "input": "Hello", "stream": True})
        *events, last = answer.events()
        assert last["type"] == "error"
        assert {event["type"] for event in events}.isdisjoint({"response.completed", "response.incomplete", "error"})
        assert (await gateway.settled(2))[1].outcome == "failed"


async def _events(gateway: Running, model: str) -> AsyncIterator[bytes]:
    answer = await gateway.post(PATH, {"model": model, "input": "Hello", "stream": True})
    for event in answer.body.split(b"\n\n")[:-1]:
        yield event + b"\n\n"


async def test_client_that_leaves_stops_the_provider() -> None:
    async with served() as (gateway, up, client):
        events = [event async for event in _events(gateway, "native")]
        up.script(Scripted(events=events[:6], hang=True))
        stream = await client.responses.create(model="native", input="Hello", stream=True)
        async for event in stream:
            if event.type == "response.output_text.delta":
                break
        await stream.close()
        assert (await gateway.settled(2))[1].outcome == "abandoned"
        await asyncio.wait_for(up.requests[-1].closed.wait(), 5)


async def test_conversation_goes_on_where_the_provider_keeps_it() -> None:
    async with served() as (_, up, client):
        first = await client.responses.create(model="native", input="Hello")
        again = await client.responses.create(model="native", input="And?", previous_response_id=first.id)
        assert again.previous_response_id == first.id
        # The client's ids are sealed; the provider knows its own.
        kept = list(up.kept.values())[-1]
        assert [item["role"] for item in kept.history] == ["user", "assistant", "user", "assistant"]
        assert again.id not in up.kept
