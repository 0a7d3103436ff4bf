"""Responses over messages, by way of chat: OpenAI's client of Responses against Claude."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from claudes import claude as config
from claudes import openai_client

from qlens.testing import Running, Scripted, running
from qlens.testing.anthropic import (
    FakeAnthropic,
    anthropic,
    failure,
    message,
    stream,
    streamed,
    text,
    thinking,
    tool_use,
    whole,
)
from qlens.testing.upstreams import TEXT

RESPONSES = "/v1/responses"
TOOL: Any = {"type": "function", "name": "files.read", "parameters": {"type": "object"}, "strict": False}


@pytest.fixture
async def claude() -> AsyncIterator[FakeAnthropic]:
    async with anthropic() as fake:
        yield fake


@pytest.fixture
async def gateway(claude: FakeAnthropic) -> AsyncIterator[Running]:
    async with running(config(claude.url)) as found:
        yield found


async def test_a_response_is_answered_whole_and_streamed(claude: FakeAnthropic, gateway: Running) -> None:
    async with openai_client(gateway) as sdk:
        answer = await sdk.responses.create(model="ours", input="Hello", max_output_tokens=100)
        assert answer.output_text == TEXT
        assert answer.usage is not None
        assert answer.usage.total_tokens == 13
        async with sdk.responses.stream(model="ours", input="Hello", max_output_tokens=100) as events:
            kinds = [event.type async for event in events]
            assert (await events.get_final_response()).output_text == TEXT
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    assert [receipt.usage.total for receipt in await gateway.settled(2)] == [13, 13]
    assert claude.refused == []


async def test_tools_and_thoughts_go_on_over_turns(claude: FakeAnthropic, gateway: Running) -> None:
    async with openai_client(gateway) as sdk:
        options: Any = {"model": "ours", "tools": [TOOL], "reasoning": {"effort": "low"}, "max_output_tokens": 4000}
        sent = "files_read_601e4eb608f9175e"
        claude.script(whole(message(thinking(), tool_use("toolu_1", sent, {"a": 1}), stop="tool_use")))
        first = await sdk.responses.create(input="Hello", **options)
        items: list[Any] = [{"role": "user", "content": "Hello"}, *(item.model_dump() for item in first.output)]
        call = next(item for item in first.output if item.type == "function_call")
        assert (call.name, call.arguments) == ("files.read", '{"a":1}')
        items.append({"type": "function_call_output", "call_id": call.call_id, "output": "42"})
        claude.script(stream(message(text("Done."))))
        async with sdk.responses.stream(input=items, **options) as events:
            last = await events.get_final_response()
    assert last.output_text == "Done."
    assert claude.refused == []
    assert claude.requests[1].body["messages"][1]["content"] == [thinking(), tool_use("toolu_1", sent, {"a": 1})]


async def test_failures_before_and_within_a_stream(claude: FakeAnthropic, gateway: Running) -> None:
    claude.script(failure("overloaded_error", "x"), Scripted(events=list(streamed(message()))[:5]))
    body = {"model": "ours", "input": "Hello", "stream": True, "max_output_tokens": 100}
    before = await gateway.post(RESPONSES, body)
    within = await gateway.post(RESPONSES, body)
    assert (before.status, before.json()["error"]["code"]) == (503, "upstream_unavailable")
    assert within.events()[-1]["type"] == "error"
    assert [receipt.outcome for receipt in await gateway.settled(2)] == ["failed", "failed"]


async def test_what_messages_cannot_say_is_refused(claude: FakeAnthropic, gateway: Running) -> None:
    body = {"model": "ours", "input": "Hello", "top_logprobs": 3}
    answer = await gateway.post(RESPONSES, body)
    assert (answer.status, answer.json()["error"]["code"]) == (400, "unsupported_parameter")
    assert claude.requests == []
