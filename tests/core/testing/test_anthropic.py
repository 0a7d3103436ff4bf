"""The fake Anthropic, judged by Anthropic's own SDK: what it answers, what it refuses, how it fails."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import anthropic
import orjson
import pytest

from qlens.testing.anthropic import (
    KEY,
    MODEL,
    THOUGHT,
    FakeAnthropic,
    error,
    failure,
    message,
    stream,
    streamed,
    text,
    thinking,
    tool_use,
)
from qlens.testing.anthropic import anthropic as serving
from qlens.testing.upstreams import TEXT, Scripted

HELLO: dict[str, Any] = {"role": "user", "content": "Hello"}
WEATHER = {"name": "get_weather", "input_schema": {"type": "object", "properties": {}}}
CALLED: dict[str, Any] = {"role": "assistant", "content": [tool_use("toolu_1", "get_weather", {})]}
RESULT = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "sunny"}]}
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


@pytest.fixture
async def claude() -> AsyncIterator[FakeAnthropic]:
    async with serving() as fake:
        yield fake


def client(claude: FakeAnthropic, key: str = KEY) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(api_key=key, base_url=claude.url, max_retries=0, timeout=30)


async def ask(claude: FakeAnthropic, **fields: Any) -> Any:
    body = {"model": MODEL, "max_tokens": 2000, "messages": [HELLO], **fields}
    async with client(claude) as own:
        version = body.pop("version", "2023-06-01")
        headers = {"anthropic-version": version}
        known = {name: body.pop(name) for name in ("model", "max_tokens", "messages") if name in body}
        return await own.messages.create(**known, extra_body=body, extra_headers=headers)


async def test_sdk_reads_an_answer(claude: FakeAnthropic) -> None:
    answer = await ask(claude)
    assert [block.text for block in answer.content] == [TEXT]
    assert (answer.stop_reason, answer.usage.input_tokens, answer.usage.output_tokens) == ("end_turn", 9, 4)


async def test_sdk_reads_a_stream_with_thoughts_tools_and_pings(claude: FakeAnthropic) -> None:
    told = message(thinking(), text("I look."), tool_use("toolu_1", "get_weather", {"city": "Oslo"}), stop="tool_use")
    claude.script(stream(told, size=3))
    async with (
        client(claude) as own,
        own.messages.stream(
            model=MODEL,
            max_tokens=2000,
            messages=[{"role": "user", "content": "Hello"}],
            thinking={"type": "enabled", "budget_tokens": 1024},
            tools=[{"name": "get_weather", "input_schema": {"type": "object"}}],
        ) as events,
    ):
        answer = await events.get_final_message()
    thought, said, call = answer.content
    assert (thought.type, said.type, call.type) == ("thinking", "text", "tool_use")
    assert call.to_dict()["input"] == {"city": "Oslo"}
    assert thought.to_dict() == thinking()
    assert (answer.stop_reason, answer.usage.output_tokens) == ("tool_use", 4)
    assert any(event.startswith(b"event: ping") for event in streamed(told))


async def test_it_thinks_and_calls_what_it_must(claude: FakeAnthropic) -> None:
    thoughtful = await ask(claude, thinking={"type": "enabled", "budget_tokens": 1024})
    assert [block.type for block in thoughtful.content] == ["thinking", "text"]
    assert thoughtful.content[0].thinking == THOUGHT
    forced = await ask(claude, tools=[WEATHER], tool_choice={"type": "tool", "name": "get_weather"})
    assert (forced.content[0].name, forced.stop_reason) == ("get_weather", "tool_use")


@pytest.mark.parametrize(
    ("scripted", "kind"),
    [
        (failure("rate_limit_error", "slow down", retry_after=7), anthropic.RateLimitError),
        (failure("overloaded_error", "Overloaded"), anthropic.InternalServerError),
        (failure("api_error", "Internal server error"), anthropic.InternalServerError),
        (failure("permission_error", "no"), anthropic.PermissionDeniedError),
        (failure("request_too_large", "too large"), anthropic.APIStatusError),
    ],
)
async def test_its_failures_are_the_sdks_exceptions(
    claude: FakeAnthropic, scripted: Scripted, kind: type[anthropic.APIStatusError]
) -> None:
    claude.script(scripted)
    with pytest.raises(kind) as caught:
        await ask(claude)
    assert caught.value.request_id == "req_011Example"


async def test_its_failure_within_a_stream_is_an_exception(claude: FakeAnthropic) -> None:
    events = [*list(streamed(message()))[:4], b"event: error\n", _data(error("overloaded_error", "Overloaded"))]
    claude.script(Scripted(events=events))
    heard: list[Any] = []
    async with client(claude) as own:
        hello: Any = [HELLO]
        told = await own.messages.create(model=MODEL, max_tokens=9, messages=hello, stream=True)
        with pytest.raises(anthropic.APIStatusError, match="Overloaded"):
            heard += [event async for event in told]
    assert TEXT.startswith("".join(event.delta.text for event in heard if event.type == "content_block_delta"))


def _data(body: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(body) + b"\n\n"


async def test_it_wants_a_key_a_version_and_a_model_it_has(claude: FakeAnthropic) -> None:
    async with client(claude, "sk-ant-other") as own:
        with pytest.raises(anthropic.AuthenticationError):
            await own.messages.create(model=MODEL, max_tokens=9, messages=[{"role": "user", "content": "x"}])
    with pytest.raises(anthropic.BadRequestError, match="not a valid version"):
        await ask(claude, version="2022-01-01")
    with pytest.raises(anthropic.NotFoundError, match="model: claude-1"):
        await ask(claude, model="claude-1")


@pytest.mark.parametrize(
    ("fields", "wording"),
    [
        ({"surprise": 1}, "surprise: Extra inputs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 64_001}, "maximum allowed number of output tokens"),
        ({"temperature": 0.5, "version": "2026-10-21"}, "temperature: Extra inputs"),
        ({"temperature": 0.5, "top_p": 0.5}, "cannot both"),
        ({"model": "claude-sonnet-5", "temperature": 0.5}, "deprecated"),
        ({"stop_sequences": [" "]}, "non-whitespace"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"metadata": {"team": "x"}}, "metadata.team"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}}}, "additionalProperties"),
        ({"messages": [{"role": "assistant", "content": "x"}, HELLO]}, "first message must use"),
        ({"messages": [{"role": "user", "content": ""}]}, "non-empty content"),
        ({"messages": [{"role": "user", "content": [text(" ")]}]}, "non-whitespace text"),
        ({"messages": [HELLO, {"role": "assistant", "content": "I "}]}, "trailing whitespace"),
        ({"model": "claude-sonnet-5", "messages": [HELLO, {"role": "assistant", "content": "I"}]}, "prefill"),
        ({"messages": [HELLO, CALLED, HELLO], "tools": [WEATHER]}, "without `tool_result`"),
        ({"messages": [HELLO, CALLED], "tools": [WEATHER]}, "without `tool_result`"),
        ({"messages": [RESULT]}, "unexpected `tool_use_id`"),
        ({"messages": [HELLO, CALLED, RESULT]}, "must define tools"),
        (
            {"messages": [HELLO, CALLED, {**RESULT, "content": [text("x"), *RESULT["content"]]}], "tools": [WEATHER]},
            "must come first",
        ),
        ({"messages": [HELLO, {"role": "user", "content": [tool_use("a", "b", {})]}]}, "not allowed in `user`"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {
            "type": "base64", "media_type": "image/gif", "data": PNG}}]}]}, "appears to be a image/png"),
        ({"tools": [{**WEATHER, "name": "a.b"}]}, "should match pattern"),
        ({"tools": [WEATHER, WEATHER]}, "unique"),
        ({"tools": [{"name": "x", "input_schema": {}}]}, "input_schema.type"),
        ({"tool_choice": {"type": "auto"}}, "while providing tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "x"}}, "not found"),
        ({"tools": [WEATHER], "tool_choice": {"type": "required"}}, "tool_choice.type"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1000}}, "budget_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, "must be greater than"),
        ({"thinking": {"type": "adaptive"}}, "adaptive thinking"),
        (
            {"model": "claude-sonnet-5", "thinking": {"type": "enabled", "budget_tokens": 1024}},
            "thinking.type.adaptive",
        ),
        (
            {"thinking": {"type": "enabled", "budget_tokens": 1024}, "tools": [WEATHER],
             "tool_choice": {"type": "any"}},
            "forces tool use",
        ),
        (
            {"thinking": {"type": "enabled", "budget_tokens": 1024}, "tools": [WEATHER],
             "messages": [HELLO, CALLED, RESULT]},
            "Expected `thinking`",
        ),
        (
            {"messages": [HELLO, {"role": "assistant", "content": [{**thinking(), "signature": "forged"}]}, HELLO]},
            "Invalid `signature`",
        ),
        ({"system": [text("x", cache_control={"type": "ephemeral"})] * 5}, "maximum of 4"),
        (
            {"system": [text("x", cache_control={"type": "ephemeral"}),
                        text("x", cache_control={"type": "ephemeral", "ttl": "1h"})]},
            "must not come after",
        ),
        ({"messages": [{"role": "user", "content": "x" * 900_000}]}, "too long"),
    ],
)  # fmt: skip
async def test_what_it_refuses(claude: FakeAnthropic, fields: dict[str, Any], wording: str) -> None:
    with pytest.raises(anthropic.BadRequestError, match=wording):
        await ask(claude, **fields)
    assert len(claude.refused) == 1
