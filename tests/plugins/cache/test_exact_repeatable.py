"""Answers that are one caller's own, or none at all: no cache gives them to the next who asks the same."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from claudes import claude
from keepers import ACME, kept, sdk, settings

from qlens.testing import Response, Running, Scripted, running, upstream
from qlens.testing.anthropic import anthropic
from qlens.testing.objects import FakeKeeper, keeper
from qlens.testing.upstreams import FakeUpstream

CACHE: dict[str, Any] = {"cache": [{"plugin": "exact"}]}
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture
async def one() -> AsyncIterator[FakeKeeper]:
    async with keeper() as fake:
        yield fake


@pytest.fixture
async def two() -> AsyncIterator[FakeKeeper]:
    async with keeper() as fake:
        yield fake


@pytest.fixture
async def gateway(one: FakeKeeper, two: FakeKeeper) -> AsyncIterator[Running]:
    async with kept(settings(one, two, cache="[{plugin: exact}]")) as gateway:
        yield gateway


async def ask(gateway: Running, path: str = "/v1/responses", **fields: Any) -> Response:
    body: dict[str, Any] = {"model": "first", "input": "Hello"} if path == "/v1/responses" else {"model": "first"}
    return await gateway.post(path, {**body, **fields}, key=ACME)


def states(*answers: Response) -> list[str]:
    assert [answer.status for answer in answers] == [200] * len(answers)
    return [answer.headers["x-qlens-cache"] for answer in answers]


# --- what is stored ----------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
async def test_each_call_of_a_conversation_goes_on_with_it(gateway: Running, one: FakeKeeper, streamed: bool) -> None:
    async with sdk(gateway) as client:
        conversation = await client.conversations.create(extra_headers={"x-qlens-model": "first"})
    for named in (conversation.id, {"id": conversation.id}):
        before = len(one.requests)
        asked: dict[str, Any] = {"input": "Go on", "conversation": named, "store": False, "stream": streamed}
        answers = [await ask(gateway, **asked) for _ in range(2)]
        assert states(*answers) == ["off", "off"]
        assert len(one.requests) == before + 2


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_response_that_is_stored_is_made_for_each_who_asks(
    gateway: Running, one: FakeKeeper, streamed: bool
) -> None:
    for said, state in (({}, "miss"), ({"store": None}, "miss"), ({"store": True}, "off")):
        answers = [await ask(gateway, stream=streamed, **said) for _ in range(2)]
        assert states(*answers) == [state, state]
    assert len(one.kept) == 6


async def test_a_response_that_was_deleted_is_made_again(gateway: Running) -> None:
    async with sdk(gateway) as client:
        made = await client.responses.create(model="first", input="Hello")
        await client.responses.delete(made.id)
        again = await client.responses.create(model="first", input="Hello")
        assert again.id != made.id
        assert (await client.responses.retrieve(again.id)).id == again.id


async def test_a_response_that_nobody_stores_is_kept(gateway: Running, one: FakeKeeper) -> None:
    previous = (await ask(gateway)).json()["id"]
    for said in ({"store": False}, {"store": False, "previous_response_id": previous}):
        before = len(one.requests)
        answers = [await ask(gateway, stream=streamed, **said) for streamed in (False, True, False)]
        assert states(*answers) == ["miss", "hit", "hit"]
        assert len(one.requests) == before + 1
    for streamed in (False, True):  # it is made of a chat
        answers = [await ask(gateway, model="talk", input=f"Hello {streamed}", stream=streamed) for _ in range(2)]
        assert states(*answers) == ["miss", "hit"]


async def test_a_response_of_which_the_provider_does_not_say_that_it_is_unstored_is_not_kept(
    gateway: Running, one: FakeKeeper
) -> None:
    whole = (await ask(gateway)).json()
    del whole["store"]
    one.script(*[Scripted(body={**whole, "id": f"resp_{number}"}) for number in range(3)])
    assert states(*[await ask(gateway) for _ in range(2)]) == ["miss", "miss"]


async def test_a_chat_that_is_to_be_stored_is_sent_each_time(gateway: Running, one: FakeKeeper) -> None:
    asked: dict[str, Any] = {"path": "/v1/chat/completions", "messages": HELLO}
    answer = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1700000000,
        "model": "upstream",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hi"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    }
    one.script(*[Scripted(body=answer) for _ in range(3)])
    assert states(*[await ask(gateway, **asked, store=True) for _ in range(2)]) == ["off", "off"]
    assert states(*[await ask(gateway, **asked, store=False) for _ in range(2)]) == ["miss", "hit"]


# --- what failed -------------------------------------------------------------------------------


def chat(up: FakeUpstream) -> str:
    return f"""
pipeline: {{auth: [{{plugin: anonymous}}], cache: [{{plugin: exact}}]}}
providers: {{up: {{plugin: openai, base_url: '{up.url}'}}}}
models: {{first: {{max_output_tokens: 1000, targets: [{{provider: up, model: small}}]}}}}
"""


def choice(text: str, finish: str, index: int = 0) -> dict[str, Any]:
    return {"index": index, "message": {"role": "assistant", "content": text}, "finish_reason": finish}


@pytest.mark.parametrize(
    ("choices", "kept"),
    [
        ([choice("par", "error")], False),
        ([choice("whole", "stop"), choice("par", "error", 1)], False),
        ([choice('"finish_reason":"error"', "stop")], True),
    ],
)
async def test_an_answer_that_ended_with_an_error_is_not_kept(choices: list[dict[str, Any]], kept: bool) -> None:
    async with upstream() as up, running(chat(up)) as gateway:
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        answer = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "small", "usage": usage}
        for path, question in (("/v1/chat/completions", {"messages": HELLO}), ("/v1/completions", {"prompt": "Hello"})):
            up.script(Scripted(body={**answer, "choices": choices}))
            answers = [await ask(gateway, path, **question, n=len(choices)) for _ in range(2)]
            up._answers.clear()
            assert states(*answers) == ["miss", "hit" if kept else "miss"]


async def test_a_stream_that_ended_with_an_error_is_not_kept() -> None:
    async with upstream() as up, running(chat(up)) as gateway:
        head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "small"}
        parts = [({"role": "assistant", "content": "par"}, None), ({}, "error")]
        events = [
            {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]} for delta, finish in parts
        ]
        up.script(Scripted(events=[*events, "[DONE]"]))
        first = await ask(gateway, "/v1/chat/completions", messages=HELLO, stream=True)
        assert "par" in first.text
        assert states(first, await ask(gateway, "/v1/chat/completions", messages=HELLO)) == ["miss", "miss"]


# --- what shapes an answer beside the body -----------------------------------------------------


async def test_betas_that_a_client_asks_for_are_a_part_of_what_is_asked() -> None:
    async with anthropic() as up:
        configured = claude(up.url, pipeline=CACHE, client_betas=["context-*", "interleaved-*"])
        async with running(configured) as gateway:

            async def state(betas: str | None) -> str:
                body = {"model": "ours", "max_tokens": 10, "messages": HELLO}
                answer = await gateway.post("/v1/messages", body, headers={"anthropic-beta": betas} if betas else None)
                return states(answer)[0]

            assert [await state(None), await state(None)] == ["miss", "hit"]
            assert [await state("context-1m"), await state("context-1m")] == ["miss", "hit"]
            assert await state("interleaved-thinking") == "miss"
            assert await state("context-1m, interleaved-thinking") == "miss"
            assert await state("interleaved-thinking,context-1m") == "hit"
            assert await state(None) == "hit"
        assert len(up.requests) == 4
