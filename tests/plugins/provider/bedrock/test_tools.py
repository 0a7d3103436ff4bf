"""Tools: how they are offered and chosen, and how their calls come back."""

from __future__ import annotations

from typing import Any

import pytest
from bedrocks import (
    CHAT,
    CLAUDE,
    LLAMA,
    NOVA,
    TIME,
    WEATHER,
    chat,
    config,
    events,
    image,
    refused,
    result,
    sent,
    told,
    user,
)

from qlens.dialects import chat as chat_dialect
from qlens.testing import running
from qlens.testing.bedrock import answer, bedrock, stream, streamed, whole

BOTH = [WEATHER, TIME]
WEATHER_USE = {"toolUse": {"toolUseId": "t1", "name": "get_weather", "input": {"city": "Paris"}}}
TIME_USE = {"toolUse": {"toolUseId": "t2", "name": "get_time", "input": {}}}


def _allowed(mode: str) -> dict[str, Any]:
    names = [{"type": "function", "function": {"name": "get_time"}}]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": names}}


@pytest.mark.parametrize(
    ("choice", "expected", "names"),
    [
        (None, None, ["get_weather", "get_time"]),
        ("auto", {"auto": {}}, ["get_weather", "get_time"]),
        ("required", {"any": {}}, ["get_weather", "get_time"]),
        ({"type": "function", "function": {"name": "get_time"}}, {"tool": {"name": "get_time"}}, None),
        (_allowed("auto"), {"auto": {}}, ["get_time"]),
        (_allowed("required"), {"any": {}}, ["get_time"]),
    ],
)
async def test_the_choice_among_tools(choice: Any, expected: dict[str, Any] | None, names: list[str] | None) -> None:
    config_sent = (await sent(chat(tools=BOTH, tool_choice=choice)))["toolConfig"]
    assert config_sent.get("toolChoice") == expected
    assert [tool["toolSpec"]["name"] for tool in config_sent["tools"]] == (names or ["get_weather", "get_time"])


async def test_no_tool_is_offered_when_none_may_be_called() -> None:
    assert "toolConfig" not in await sent(chat(tools=BOTH, tool_choice="none"))


@pytest.mark.parametrize("model", [LLAMA, "cohere.command-r-plus-v1:0"])
async def test_a_choice_is_left_out_where_it_would_be_refused(model: str) -> None:
    assert "toolChoice" not in (await sent(chat(tools=BOTH, tool_choice="required"), model))["toolConfig"]


@pytest.mark.parametrize(
    "model", ["us.deepseek.r1-v1:0", "amazon.titan-text-premier-v1:0", "meta.llama3-8b-instruct-v1:0"]
)
async def test_models_without_tools_say_so(model: str) -> None:
    assert (await refused(chat(tools=BOTH), model))["param"] == "tools"


async def test_tools_that_are_no_functions_are_refused() -> None:
    custom = {"type": "custom", "custom": {"name": "sql"}}
    assert (await refused(chat(tools=[WEATHER, custom])))["param"] == "tools[1].type"


@pytest.mark.parametrize(
    ("function", "description", "schema"),
    [
        ({"name": "f"}, "f", {"type": "object", "properties": {}}),
        ({"name": "f", "description": "  ", "parameters": {}}, "f", {"type": "object", "properties": {}}),
        ({"name": "f", "parameters": {"properties": {}}}, "f", {"type": "object", "properties": {}}),
        ({"name": "f", "description": "Does it."}, "Does it.", {"type": "object", "properties": {}}),
    ],
)
async def test_what_a_tool_lacks_is_filled_in(function: dict[str, Any], description: str, schema: Any) -> None:
    body = await sent(chat(tools=[{"type": "function", "function": function}]))
    spec = body["toolConfig"]["tools"][0]["toolSpec"]
    assert (spec["description"], spec["inputSchema"]["json"]) == (description, schema)


@pytest.mark.parametrize("schema", [{"type": "array"}, {"type": "string"}, {"anyOf": [{"type": "object"}]}])
async def test_parameters_that_are_no_object_are_refused(schema: dict[str, Any]) -> None:
    error = await refused(chat(tools=[{"type": "function", "function": {"name": "f", "parameters": schema}}]))
    assert error["code"] == "invalid_function_parameters"


@pytest.mark.parametrize("model", [CLAUDE, NOVA])
async def test_one_call_at_a_time_passes_when_the_client_wants_no_more(model: str) -> None:
    asked = chat(tools=BOTH, parallel_tool_calls=False)
    for choice in await told(answer(WEATHER_USE, TIME_USE, stop="tool_use"), asked, model):
        assert [call["id"] for call in choice["message"]["tool_calls"]] == ["t1"]
    fields = (await sent(asked, model)).get("additionalModelRequestFields")
    claude = {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}
    assert fields == (claude if model == CLAUDE else None)


async def test_a_call_that_was_made_counts_whatever_the_model_says_about_its_end() -> None:
    for choice in await told(answer(WEATHER_USE, stop="end_turn"), chat(tools=BOTH)):
        assert choice["finish_reason"] == "tool_calls"


async def test_results_may_have_images() -> None:
    parts = [{"type": "text", "text": "a map"}, image()]
    history = [user("?"), {"role": "assistant", "tool_calls": [_call("c1")]}, result("c1", parts)]
    content = (await sent(chat(*history, tools=[WEATHER])))["messages"][2]["content"]
    assert [next(iter(block)) for block in content[0]["toolResult"]["content"]] == ["text", "image"]


def _call(identifier: str) -> dict[str, Any]:
    return {"id": identifier, "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}


# --- the older functions -----------------------------------------------------------------------

FUNCTIONS = [WEATHER["function"], TIME["function"]]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [("auto", {"auto": {}}), ({"name": "get_time"}, {"tool": {"name": "get_time"}}), (None, None)],
)
async def test_functions_are_tools(choice: Any, expected: Any) -> None:
    config_sent = (await sent(chat(functions=FUNCTIONS, function_call=choice)))["toolConfig"]
    assert (len(config_sent["tools"]), config_sent.get("toolChoice")) == (2, expected)


async def test_who_speaks_of_functions_is_answered_so() -> None:
    for choice in await told(answer(WEATHER_USE, TIME_USE, stop="tool_use"), chat(functions=FUNCTIONS)):
        assert choice["finish_reason"] == "function_call"
        assert choice["message"]["function_call"] == {"name": "get_weather", "arguments": '{"city":"Paris"}'}
        assert not choice["message"].get("tool_calls")


async def test_a_history_of_functions_is_one_of_tools() -> None:
    calling = {"role": "assistant", "content": None, "function_call": {"name": "get_weather", "arguments": "{}"}}
    history = [user("?"), calling, {"role": "function", "name": "get_weather", "content": "sunny"}, user("And?")]
    body = await sent(chat(*history, functions=FUNCTIONS))
    use, found = body["messages"][1]["content"][0]["toolUse"], body["messages"][2]["content"][0]["toolResult"]
    assert use["toolUseId"] == found["toolUseId"]


# --- Nova's search -----------------------------------------------------------------------------


async def test_novas_own_search_is_offered_where_it_is() -> None:
    body = await sent(chat(web_search_options={}), "us.amazon.nova-2-lite-v1:0")
    assert body["toolConfig"] == {"tools": [{"systemTool": {"name": "nova_grounding"}}]}
    assert "toolConfig" not in await sent(chat(web_search_options={}), NOVA)


async def test_what_the_service_calls_itself_is_no_call_for_the_client() -> None:
    own = {"toolUse": {"toolUseId": "s1", "name": "nova_grounding", "input": {}, "type": "server_tool_use"}}
    for choice in await told(answer(own, {"text": "Found."}), chat(), "us.amazon.nova-2-lite-v1:0"):
        assert not choice["message"].get("tool_calls")
        assert (choice["message"]["content"], choice["finish_reason"]) == ("Found.", "stop")


async def test_an_unknown_tool_in_an_answer_keeps_its_name() -> None:
    async with bedrock() as aws, running(config(aws.root)) as gateway:
        use = {"toolUse": {"toolUseId": "t", "name": "made_up", "input": {}}}
        aws.script(whole(answer(use, stop="tool_use")))
        message = (await gateway.post(CHAT, chat(tools=[WEATHER]))).json()["choices"][0]["message"]
        assert message["tool_calls"][0]["function"]["name"] == "made_up"


async def test_a_call_whose_block_ends_with_the_message_has_arguments_that_are_json() -> None:
    use = {"toolUse": {"toolUseId": "t1", "name": "get_time", "input": {}}}
    thought = {"reasoningContent": {"reasoningText": {"text": "Hm.", "signature": "s"}}}
    frames = streamed(answer(thought, use, stop="tool_use"))
    kept = [frame for frame in frames if b"contentBlockStop" not in frame]
    assert len(kept) == len(frames) - 2
    async with bedrock() as aws, running(config(aws.root)) as gateway:
        aws.script(stream(kept))
        found = chat_dialect.assemble(events(await gateway.post(CHAT, chat(tools=[TIME], stream=True))))
    message = found["choices"][0]["message"]
    assert message["tool_calls"][0]["function"] == {"name": "get_time", "arguments": "{}"}
    assert message["thinking_blocks"] == [{"type": "thinking", "thinking": "Hm.", "signature": "s"}]
