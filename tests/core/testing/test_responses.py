"""The fake of OpenAI's Responses: what it keeps, and what it refuses."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from qlens.testing.responses import ARGUMENTS, FAILURE, THOUGHT, USAGE, FakeResponses, responses_upstream
from qlens.testing.upstreams import TEXT

EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
TOOL: Any = {"type": "function", "name": "weather", "parameters": {}, "strict": False}


@pytest.fixture
async def up() -> AsyncIterator[FakeResponses]:
    async with responses_upstream() as fake:
        yield fake


@pytest.fixture
async def client(up: FakeResponses) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(api_key="sk-example-upstream", base_url=up.url, max_retries=0) as client:
        yield client


async def test_a_response_is_made_kept_and_deleted(client: openai.AsyncOpenAI) -> None:
    made = await client.responses.create(model="m", input="Hello")
    assert made.output_text == TEXT
    assert made.usage is not None
    assert made.usage.model_dump(exclude_unset=True) == USAGE
    assert await client.responses.retrieve(made.id) == made
    await client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(made.id)


async def test_a_response_that_is_not_to_be_stored_is_not_kept(client: openai.AsyncOpenAI) -> None:
    made = await client.responses.create(model="m", input="Hello", store=False)
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(made.id)


async def test_input_items_are_listed_latest_first_in_pages(client: openai.AsyncOpenAI) -> None:
    turns: Any = [{"role": "user", "content": text} for text in ("one", "two", "three")]
    made = await client.responses.create(model="m", input=turns)
    page = await client.responses.input_items.list(made.id, limit=2)
    assert page.has_more
    items: list[Any] = [item async for item in page]
    texts = [item.content[0].text for item in items]
    assert texts == ["three", "two", "one"]


@pytest.mark.parametrize(
    ("fields", "kinds"),
    [
        ({}, ["message"]),
        ({"reasoning": {"effort": "low"}, "include": ["reasoning.encrypted_content"]}, ["reasoning", "message"]),
        ({"tools": [TOOL], "tool_choice": "required"}, ["function_call"]),
        ({"max_output_tokens": 16}, ["message"]),
    ],
)
async def test_a_stream_has_openais_events_and_ends_with_the_answer(
    client: openai.AsyncOpenAI, fields: Any, kinds: list[str]
) -> None:
    stream = await client.responses.create(model="m", input="Hello", stream=True, **fields)
    events = [event async for event in stream]
    for number, event in enumerate(events):
        assert event.sequence_number == number
        EVENTS.validate_python(event.model_dump(exclude_unset=True))
    end = events[-1]
    assert end.type in {"response.completed", "response.incomplete"}
    assert [item.type for item in end.response.output] == kinds


async def test_a_conversation_goes_on_from_a_kept_response(client: openai.AsyncOpenAI) -> None:
    first = await client.responses.create(model="m", input="Hello", tools=[TOOL], tool_choice="required")
    (call,) = first.output
    assert call.type == "function_call"
    assert call.arguments == ARGUMENTS
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "sun"}
    again = await client.responses.create(model="m", input=[result], previous_response_id=first.id)
    assert again.previous_response_id == first.id
    with pytest.raises(openai.BadRequestError, match="No tool call found"):
        await client.responses.create(model="m", input=[result])
    with pytest.raises(openai.BadRequestError, match="No tool output found"):
        await client.responses.create(model="m", input="and?", previous_response_id=first.id)


async def test_a_conversation_goes_on_without_anything_kept(client: openai.AsyncOpenAI) -> None:
    first = await client.responses.create(
        model="m", input="Hello", store=False, reasoning={"effort": "low"}, include=["reasoning.encrypted_content"]
    )
    turns: Any = [item.model_dump(exclude_none=True) for item in first.output]
    assert turns[0]["summary"][0]["text"] == THOUGHT
    await client.responses.create(model="m", input=[*turns, {"role": "user", "content": "And?"}], store=False)
    turns[0]["encrypted_content"] = "from another account"
    with pytest.raises(openai.BadRequestError) as caught:
        await client.responses.create(model="m", input=turns, store=False)
    assert caught.value.code == "invalid_encrypted_content"


async def test_what_runs_in_the_background_can_be_cancelled_and_followed(client: openai.AsyncOpenAI) -> None:
    waiting = await client.responses.create(model="m", input="Hello", background=True)
    assert (waiting.status, waiting.usage) == ("queued", None)
    assert (await client.responses.retrieve(waiting.id)).output_text == TEXT
    events = [event async for event in await client.responses.retrieve(waiting.id, stream=True, starting_after=3)]
    assert [event.sequence_number for event in events[:2]] == [4, 5]
    assert (await client.responses.cancel(waiting.id)).status == "cancelled"
    done = await client.responses.create(model="m", input="Hello")
    with pytest.raises(openai.BadRequestError, match="synchronous"):
        await client.responses.cancel(done.id)


async def test_a_response_may_fail_after_it_was_created(client: openai.AsyncOpenAI) -> None:
    stream = await client.responses.create(model="m", input=FAILURE, stream=True)
    assert [event.type async for event in stream] == ["response.created", "response.in_progress", "response.failed"]


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"messages": []}, "messages", "unknown_parameter"),
        ({"max_tokens": 100}, "max_tokens", "unknown_parameter"),
        (
            {"stream": True, "stream_options": {"include_usage": True}},
            "stream_options.include_usage",
            "unknown_parameter",
        ),
        ({"stream_options": {}}, "stream_options", None),
        ({"max_output_tokens": 15}, "max_output_tokens", "integer_below_min_value"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools[0].name", "missing_required_parameter"),
        ({"tools": [{"type": "of_chat"}]}, "tools[0].type", "invalid_value"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role", "invalid_value"),
        (
            {"input": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]},
            "input[0].content[0]",
            "invalid_value",
        ),
        ({"previous_response_id": "resp_unknown"}, "previous_response_id", "previous_response_not_found"),
        ({"background": True, "store": False}, "background", None),
    ],
)
async def test_what_is_no_request_for_a_response_is_refused(
    client: openai.AsyncOpenAI, up: FakeResponses, fields: Any, param: str, code: str | None
) -> None:
    body = {"model": "m", "input": "Hello", **fields}
    with pytest.raises(openai.BadRequestError) as caught:
        await client.post("/responses", body=body, cast_to=object)
    assert (caught.value.param, caught.value.code) == (param, code)
    assert up.made == 0


async def test_other_paths_are_answered_as_ever_or_not_at_all(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "Hello"}])
    assert answer.choices[0].message.content == TEXT
    with pytest.raises(openai.NotFoundError):
        await client.post("/responses/a/b/c", body={}, cast_to=object)
