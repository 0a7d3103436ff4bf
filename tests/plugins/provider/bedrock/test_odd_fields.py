"""Calls with fields of a wrong type: they end in a 400 that names the field, and never as the provider's failure."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from bedrocks import (
    CHAT,
    CLAUDE,
    NOVA,
    WEATHER,
    called,
    chat,
    config,
    document,
    image,
    refused,
    result,
    schema,
    sent,
    user,
)

from qlens.testing import running
from qlens.testing.bedrock import bedrock

OPUS = "anthropic.claude-opus-4-8"
MARK = {"type": "ephemeral", "ttl": "1h"}
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"type": "integer", "minimum": 1, "description": "d"}},
    "required": ["city"],
    "$defs": {"city": {"type": "string", "enum": ["Paris"], "default": "Paris"}},
}
RICH = chat(
    {"role": "system", "content": "Be brief."},
    user([{"type": "text", "text": "?", "cache_control": MARK}, image(), document("a.pdf")], cache_control=MARK),
    called(
        ("c1", "get_weather", '{"city": "Paris"}'),
        thinking_blocks=[{"type": "thinking", "thinking": "t", "signature": "s"}],
    ),
    result("c1", [{"type": "text", "text": "sunny"}]),
    {"role": "assistant", "content": None, "refusal": "no", "function_call": {"name": "get_time", "arguments": "{}"}},
    {"role": "function", "name": "get_time", "content": "noon"},
    tools=[
        {
            "type": "function",
            "cache_control": MARK,
            "function": {"name": "get_weather", "description": "d", "parameters": PARAMETERS, "strict": True},
        }
    ],
    tool_choice={"type": "function", "function": {"name": "get_weather"}},
    response_format=schema(PARAMETERS, description="d", strict=True),
    thinking={"type": "enabled", "budget_tokens": 1024},
    reasoning_effort="low",
    guardrail={"id": "gr1example", "version": "1", "stream": "sync"},
    latency="standard",
    service_tier="auto",
    metadata={"a": "b"},
    user="u",
    safety_identifier="s",
    stop=["end"],
    temperature=1,
    top_p=0.5,
    top_k=5,
    seed=1,
    modalities=["text"],
    web_search_options={},
    parallel_tool_calls=False,
    max_tokens=2000,
)
OLDER = chat(functions=[WEATHER["function"]], function_call={"name": "get_weather"})
ALLOWED = chat(
    tools=[WEATHER],
    tool_choice={
        "type": "allowed_tools",
        "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "get_weather"}}]},
    },
)
MESSAGES = {
    "model": "ours",
    "max_tokens": 2000,
    "system": [{"type": "text", "text": "Be brief.", "cache_control": MARK}],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "?", "cache_control": MARK}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "t", "signature": "s"},
                {"type": "tool_use", "id": "c1", "name": "get_weather", "input": {"city": "Paris"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "sunny"}]},
                {"type": "text", "text": "and?"},
            ],
        },
    ],
    "tools": [{"name": "get_weather", "description": "d", "input_schema": PARAMETERS, "cache_control": MARK}],
    "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
    "thinking": {"type": "enabled", "budget_tokens": 1024},
    "output_config": {"format": {"type": "json_schema", "schema": PARAMETERS}},
    "metadata": {"user_id": "u"},
    "stop_sequences": ["end"],
    "temperature": 1,
    "top_k": 5,
    "service_tier": "auto",
}
COUNTED = {
    **{name: value for name, value in MESSAGES.items() if name not in {"output_config", "thinking"}},
    "messages": [{"role": "user", "content": [{"type": "text", "text": "?", "cache_control": MARK}]}],
}
ODD: tuple[Any, ...] = (None, [], {}, 5, "x", True)


def changed(node: Any) -> Iterator[Any]:
    """The value with each of its parts replaced by each odd value, one at a time; itself first."""
    yield from ODD
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for place, child in inner:
        for other in changed(child):
            copy = node.copy()
            copy[place] = other
            yield copy


@pytest.mark.parametrize(
    ("path", "body", "model"),
    [
        *[(CHAT, RICH, model) for model in (CLAUDE, OPUS, NOVA)],
        (CHAT, OLDER, CLAUDE),
        (CHAT, ALLOWED, CLAUDE),
        ("/v1/messages", MESSAGES, CLAUDE),
        ("/v1/messages", MESSAGES, NOVA),
        ("/v1/messages/count_tokens", COUNTED, CLAUDE),
    ],
)
async def test_no_part_of_a_call_is_the_providers_failure_for_being_of_a_wrong_type(
    path: str, body: dict[str, Any], model: str
) -> None:
    async with bedrock() as aws, running(config(aws.root, model)) as gateway:
        assert (await gateway.post(path, body)).status == 200, aws.refused
        failed = []
        for name, value in body.items():
            for other in changed(value):
                answer = await gateway.post(path, {**body, name: other})
                if answer.status >= 500:
                    failed.append(f"{answer.status} {name}: {json.dumps(other)}")
        assert failed == []


def _marked(place: dict[str, Any], ttl: Any) -> dict[str, Any]:
    return {**place, "cache_control": {"type": "ephemeral", "ttl": ttl}}


def _forced(function: Any) -> dict[str, Any]:
    return chat(tools=[WEATHER], tool_choice={"type": "function", "function": function})


def _guarded(**fields: Any) -> dict[str, Any]:
    return chat(guardrail={"id": "gr1example", **fields})


NO_CALL = {"role": "assistant", "tool_calls": [{"type": "x"}]}
BOUND = {"type": "object", "properties": {"a": {"type": "string", "minLength": 1, "description": None}}}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (chat(latency=[]), "latency"),
        (chat(latency={}), "latency"),
        (chat(latency=5), "latency"),
        (chat(user([_marked({"type": "text", "text": "x"}, ["1h"])])), "messages[0].content[0].cache_control.ttl"),
        (chat(user("x", prompt_cache_breakpoint={"ttl": {}})), "messages[0].prompt_cache_breakpoint.ttl"),
        (chat(tools=[WEATHER, _marked(WEATHER, [])]), "tools[1].cache_control.ttl"),
        (chat(thinking={"type": []}), "thinking.type"),
        (_forced(None), "tool_choice.function.name"),
        (_forced({}), "tool_choice.function.name"),
        (_forced({"name": None}), "tool_choice.function.name"),
        (chat(functions=[WEATHER["function"]], function_call={}), "function_call.name"),
        (chat(response_format=schema({"type": "object"}, description=5)), "response_format.json_schema.description"),
        (chat(response_format=schema(BOUND)), "response_format.json_schema.schema"),
        (chat(user("?"), NO_CALL, result("c1")), "messages[1].tool_calls[0].type"),
        (_guarded(version=None), "guardrail.version"),
        (_guarded(version=[]), "guardrail.version"),
        (_guarded(version=True), "guardrail.version"),
        (_guarded(version=""), "guardrail.version"),
        (_guarded(version="0"), "guardrail.version"),
        (_guarded(stream=None), "guardrail.stream"),
        (_guarded(stream=[]), "guardrail.stream"),
        (_guarded(stream="x"), "guardrail.stream"),
    ],
)
async def test_what_is_of_a_wrong_type_is_named(body: dict[str, Any], param: str) -> None:
    assert (await refused(body))["param"] == param


@pytest.mark.parametrize("version", ["DRAFT", "3", 3])
async def test_a_guardrails_version_is_its_number_or_the_draft(version: Any) -> None:
    body = await sent(chat(guardrail={"id": "gr1example", "version": version}))
    assert body["guardrailConfig"]["guardrailVersion"] == str(version)


async def test_what_is_null_is_left_out() -> None:
    nothing = {"latency": None, "thinking": {"type": None}, "tool_choice": None}
    body = await sent(chat(user("x", cache_control={"type": "ephemeral", "ttl": None}), **nothing))
    assert body.keys() == {"messages"}
    assert body["messages"][0]["content"][1] == {"cachePoint": {"type": "default"}}
