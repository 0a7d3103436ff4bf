"""OpenAI's own SDK, unchanged, against models of several families on Bedrock: the same program, the same transcript."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
from bedrocks import CLAUDE, LLAMA, NOVA, PNG, config
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam
from pydantic import BaseModel

from qlens.testing import Scripted, running
from qlens.testing.bedrock import TEXT, FakeBedrock, answer, bedrock, failure, stream, streamed, whole

FAMILIES = [CLAUDE, NOVA, LLAMA, "mistral.mistral-large-3-675b-instruct", "openai.gpt-oss-120b-1:0"]
WEATHER: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "get.weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hello"}]


@asynccontextmanager
async def sdk(model: str, **settings: Any) -> AsyncIterator[tuple[AsyncOpenAI, FakeBedrock]]:
    """The SDK in front of a gateway in front of a fake Bedrock."""
    async with (
        bedrock() as aws,
        running(config(aws.root, model, **settings)) as gateway,
        AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="sk-example", max_retries=0) as client,
    ):
        yield client, aws


@pytest.mark.parametrize("model", FAMILIES)
async def test_text_whole_and_streamed(model: str) -> None:
    async with sdk(model) as (client, _):
        got = await client.chat.completions.create(model="ours", messages=HELLO, stop=["END"], max_tokens=50)
        assert got.choices[0].message.content == TEXT
        assert got.choices[0].finish_reason == "stop"
        assert got.usage is not None
        assert got.usage.total_tokens == 13
        told = await client.chat.completions.create(
            model="ours", messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
        text, usage = "", None
        async for chunk in told:
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
            usage = chunk.usage or usage
        assert text == TEXT
        assert usage is not None
        assert usage.prompt_tokens == 9


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("model", FAMILIES)
async def test_parallel_tools_over_two_turns(model: str, streaming: bool) -> None:
    async with sdk(model) as (client, aws):
        offered = await client.chat.completions.create(model="ours", messages=HELLO, tools=[WEATHER])
        assert offered.choices[0].message.content == TEXT
        name = aws.requests[0].body["toolConfig"]["tools"][0]["toolSpec"]["name"]
        uses = [
            {"toolUse": {"toolUseId": f"tooluse_{city}", "name": name, "input": {"city": city}}}
            for city in ("Paris", "Rome")
        ]
        told = answer({"text": "I look."}, *uses, stop="tool_use")
        aws.script(stream(streamed(told)) if streaming else whole(told))
        message = await _asked(client, streaming)
        assert [call["function"]["name"] for call in message["tool_calls"]] == ["get.weather"] * 2
        assert message["tool_calls"][1]["function"]["arguments"] == '{"city":"Rome"}'
        results: list[Any] = [
            {"role": "tool", "tool_call_id": call["id"], "content": "sunny"} for call in message["tool_calls"]
        ]
        history: list[Any] = [*HELLO, message, *results]
        got = await client.chat.completions.create(model="ours", messages=history, tools=[WEATHER])
        assert got.choices[0].message.content == TEXT
        assert aws.refused == []


async def _asked(client: AsyncOpenAI, streaming: bool) -> Any:
    if not streaming:
        got = await client.chat.completions.create(model="ours", messages=HELLO, tools=[WEATHER])
        return got.choices[0].message.model_dump(exclude_none=True)
    async with client.chat.completions.stream(model="ours", messages=HELLO, tools=[WEATHER]) as told:
        final = await told.get_final_completion()
        return final.choices[0].message.model_dump(exclude_none=True, exclude={"parsed": True})


@pytest.mark.parametrize("model", [CLAUDE, NOVA])
async def test_images(model: str) -> None:
    async with sdk(model) as (client, aws):
        parts: list[Any] = [
            {"type": "text", "text": "What is it?"},
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}},
        ]
        await client.chat.completions.create(model="ours", messages=[{"role": "user", "content": parts}])
        assert aws.requests[0].body["messages"][0]["content"][1]["image"]["format"] == "png"


class City(BaseModel):
    """What the answer is to be."""

    name: str


@pytest.mark.parametrize("model", FAMILIES)
async def test_answers_are_parsed_into_a_class(model: str) -> None:
    async with sdk(model) as (client, aws):
        use = {"toolUse": {"toolUseId": "t1", "name": "json_tool_call", "input": {"name": "Paris"}}}
        by_tool = model in {NOVA, "mistral.mistral-large-3-675b-instruct", "openai.gpt-oss-120b-1:0"}
        aws.script(whole(answer(use, stop="tool_use") if by_tool else answer({"text": '{"name": "Paris"}'})))
        got = await client.chat.completions.parse(model="ours", messages=HELLO, response_format=City)
        assert got.choices[0].message.parsed == City(name="Paris")


async def test_reasoning_and_several_choices() -> None:
    async with sdk(CLAUDE) as (client, aws):
        thought = {"reasoningContent": {"reasoningText": {"text": "So.", "signature": "c2ln"}}}
        aws.script(*[whole(answer(thought, {"text": "Yes."}))] * 2)
        got = await client.chat.completions.create(model="ours", messages=HELLO, reasoning_effort="low", n=2)
        assert [choice.message.content for choice in got.choices] == ["Yes.", "Yes."]
        assert got.choices[0].message.model_dump()["reasoning_content"] == "So."


@pytest.mark.parametrize("model", ["amazon.titan-embed-text-v2:0", "cohere.embed-v4:0"])
async def test_embeddings_by_default_are_packed_and_unpacked(model: str) -> None:
    async with sdk(model) as (client, _):
        got = await client.embeddings.create(model="ours", input=["a", "bc"], dimensions=256)
        assert [entry.embedding[:2] for entry in got.data] == [[1.0, 0.5], [2.0, 0.5]]


@pytest.mark.parametrize(
    ("scripted", "expected", "code"),
    [
        (failure("ThrottlingException", "slow down", status=429), openai.RateLimitError, "rate_limit_exceeded"),
        (failure("ValidationException", "Input is too long"), openai.BadRequestError, "context_length_exceeded"),
        (failure("AccessDeniedException", "no", status=403), openai.InternalServerError, "upstream_auth_error"),
        (failure("ResourceNotFoundException", "no", status=404), openai.NotFoundError, "model_not_found"),
        (failure("ModelTimeoutException", "slow", status=408), openai.InternalServerError, "upstream_timeout"),
        (failure("ModelNotReadyException", "wait", status=429), openai.InternalServerError, "model_not_ready"),
        (failure("ConflictException", "busy", status=400), openai.ConflictError, None),
    ],
)
async def test_failures_are_the_exceptions_that_programs_expect(
    scripted: Scripted, expected: type[openai.APIStatusError], code: str | None
) -> None:
    async with sdk(CLAUDE) as (client, aws):
        aws.script(scripted)
        with pytest.raises(expected) as caught:
            await client.chat.completions.create(model="ours", messages=HELLO)
        assert caught.value.code == code


async def test_a_stream_that_breaks_raises() -> None:
    async with sdk(CLAUDE) as (client, aws):
        aws.script(stream(streamed(answer())[:3]))
        told = await client.chat.completions.create(model="ours", messages=HELLO, stream=True)
        with pytest.raises(openai.APIError):
            async for _ in told:
                pass


async def test_leaving_a_stream_closes_the_connection_to_bedrock_where_it_is_to_be_aborted() -> None:
    async with sdk(CLAUDE, on_disconnect="abort") as (client, aws):
        aws.script(stream(streamed(answer())[:3], hang=True))
        told = await client.chat.completions.create(model="ours", messages=HELLO, stream=True)
        await anext(told.__aiter__())
        await told.close()
        await asyncio.wait_for(aws.requests[0].closed.wait(), 1)
