"""Answers that fit a JSON schema, in each of the ways that models have."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from bedrocks import CHAT, CLAUDE, LLAMA, NOVA, WEATHER, chat, config, refused, schema, sent, text, told

from qlens.testing import running
from qlens.testing.bedrock import answer, bedrock, failure, whole

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
ASKED = {"response_format": schema(CITY)}
USE = {"toolUse": {"toolUseId": "t1", "name": "json_tool_call", "input": {"city": "Paris"}}}
REAL = {"toolUse": {"toolUseId": "t2", "name": "get_weather", "input": {}}}


def _schema(body: dict[str, Any]) -> Any:
    return orjson.loads(body["outputConfig"]["textFormat"]["structure"]["jsonSchema"]["schema"])


async def test_a_model_that_can_does_it_by_itself() -> None:
    body = await sent(chat(response_format=schema(CITY, description="A city.")))
    structure = body["outputConfig"]["textFormat"]["structure"]["jsonSchema"]
    assert (structure["name"], structure["description"]) == ("answer", "A city.")
    assert _schema(body) == {**CITY, "additionalProperties": False}
    assert "toolConfig" not in body


async def test_its_schema_is_closed_everywhere_and_bounds_are_told_in_words() -> None:
    inner = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 1, "description": "How many."}}}
    wide = {
        "type": "object",
        "properties": {"list": {"type": "array", "items": inner, "maxItems": 3}, "one": {"anyOf": [inner]}},
    }
    found = _schema(await sent(chat(response_format=schema(wide))))
    closed = {
        "type": "object",
        "properties": {"n": {"type": "integer", "description": "How many. minimum: 1"}},
        "additionalProperties": False,
    }
    assert found["properties"]["list"] == {"type": "array", "items": closed, "description": "maxItems: 3"}
    assert found["properties"]["one"] == {"anyOf": [closed]}


async def test_a_property_may_be_called_like_a_keyword() -> None:
    odd = {"type": "object", "properties": {"minimum": {"type": "string"}, "items": {"type": "string"}}}
    assert _schema(await sent(chat(response_format=schema(odd))))["properties"] == odd["properties"]


async def test_an_open_schema_goes_by_tool_because_a_closed_one_cannot_say_it() -> None:
    table = {"type": "object", "properties": {"t": {"type": "object", "additionalProperties": {"type": "string"}}}}
    body = await sent(chat(response_format=schema(table)))
    assert body["toolConfig"]["tools"][0]["toolSpec"]["inputSchema"]["json"] == table


async def test_another_model_calls_a_tool_whose_input_is_the_answer() -> None:
    body = await sent(chat(**ASKED), NOVA)
    assert body["toolConfig"]["toolChoice"] == {"tool": {"name": "json_tool_call"}}
    for choice in await told(answer(USE, stop="tool_use"), chat(**ASKED), NOVA):
        assert orjson.loads(choice["message"]["content"]) == {"city": "Paris"}
        assert choice["finish_reason"] == "stop"
        assert not choice["message"].get("tool_calls")


async def test_real_tools_beside_it_are_not_mixed_up_with_it() -> None:
    asked = chat(**ASKED, tools=[WEATHER])
    body = await sent(asked, NOVA)
    assert [tool["toolSpec"]["name"] for tool in body["toolConfig"]["tools"]] == ["get_weather", "json_tool_call"]
    assert body["toolConfig"]["toolChoice"] == {"any": {}}
    for choice in await told(answer(REAL, stop="tool_use"), asked, NOVA):
        assert choice["finish_reason"] == "tool_calls"
        assert [(call["id"]) for call in choice["message"]["tool_calls"]] == ["t2"]


async def test_a_tool_of_the_client_with_the_same_name_is_another_one() -> None:
    mine = {"type": "function", "function": {"name": "json_tool_call"}}
    names = [
        tool["toolSpec"]["name"] for tool in (await sent(chat(**ASKED, tools=[mine]), NOVA))["toolConfig"]["tools"]
    ]
    assert names == ["json_tool_call", "json_tool_call_"]


@pytest.mark.parametrize("model", [LLAMA, "us.deepseek.r1-v1:0", "amazon.titan-text-premier-v1:0"])
async def test_a_model_that_cannot_be_made_to_is_asked(model: str) -> None:
    body = await sent(chat(**ASKED), model)
    assert "toolConfig" not in body
    assert '"city"' in str(body)


async def test_any_json_is_asked_for_in_words() -> None:
    body = await sent(chat({"role": "system", "content": "Be brief."}, response_format={"type": "json_object"}))
    assert body["system"] == [{"text": "Be brief."}, {"text": "Answer with one JSON object and nothing else."}]
    assert (await sent(chat(response_format={"type": "text"}))).keys() == {"messages"}


@pytest.mark.parametrize("way", ["native", "tool", "prompt"])
async def test_the_operator_may_know_better(way: str) -> None:
    body = await sent(chat(**ASKED), CLAUDE, target={"params": {"structured_output": way}})
    assert (way == "native", way == "tool") == ("outputConfig" in body, "toolConfig" in body)


@pytest.mark.parametrize("streaming", [False, True])
async def test_a_model_that_refuses_to_do_it_by_itself_is_asked_by_tool_from_then_on(streaming: bool) -> None:
    refusal = "This model doesn't support the outputConfig.textFormat field. Remove it and try again."
    async with bedrock() as aws, running(config(aws.root)) as gateway:
        aws.script(failure("ValidationException", refusal))
        for _ in range(2):
            reply = await gateway.post(CHAT, chat(**ASKED, stream=streaming))
            assert text(reply) == "{}"
        assert ["outputConfig" in request.body for request in aws.requests] == [True, False, False]


async def test_a_schema_that_is_refused_goes_by_tool_this_once() -> None:
    async with bedrock() as aws, running(config(aws.root)) as gateway:
        aws.script(failure("ValidationException", "output_config.format.schema: contains unsupported keywords"))
        for _ in range(2):
            assert (await gateway.post(CHAT, chat(**ASKED))).status == 200
        assert ["outputConfig" in request.body for request in aws.requests] == [True, False, True]


async def test_another_refusal_is_the_clients() -> None:
    async with bedrock() as aws, running(config(aws.root)) as gateway:
        aws.script(failure("ValidationException", "The text field is blank."), whole(answer({"text": "{}"})))
        assert (await gateway.post(CHAT, chat(**ASKED))).status == 400
        assert len(aws.requests) == 1


@pytest.mark.parametrize("model", [CLAUDE, NOVA])
async def test_a_recursive_schema_is_refused(model: str) -> None:
    node = {"type": "object", "properties": {"child": {"$ref": "#/$defs/node"}}}
    asked = chat(response_format=schema({"$ref": "#/$defs/node", "$defs": {"node": node}}))
    assert (await refused(asked, model))["code"] == "invalid_schema"


async def test_an_answer_by_tool_must_be_an_object() -> None:
    assert (await refused(chat(response_format=schema({"type": "array"})), NOVA))["code"] == "unsupported_value"
