"""Answers that fit a JSON schema, in each of the ways that models have."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from bedrocks import CHAT, CLAUDE, LLAMA, NOVA, WEATHER, chat, config, events, refused, schema, sent, text, told

from qlens.testing import frames, running
from qlens.testing.bedrock import answer, bedrock, failure, stream, streamed, whole
from qlens_plugins.provider.bedrock.converse_stream import MOST_HELD_BYTES

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
ASKED = {"response_format": schema(CITY)}
USE = {"toolUse": {"toolUseId": "t1", "name": "json_tool_call", "input": {"city": "Paris"}}}
REAL = {"toolUse": {"toolUseId": "t2", "name": "get_weather", "input": {}}}
SOURCE = {"title": "A page", "location": {"web": {"url": "https://example.com"}}}
BEGUN = b"".join(streamed(answer({"text": "Sure, here"}))[:3])


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


def _odd(*names: str, value: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A schema with properties of these names and this value among its values, and how it is written."""
    one = {"type": "object", "properties": {"$schema": {"type": "string"}}, "required": ["$schema"]}
    properties = {
        **{name: {"type": "string"} for name in names},
        "one": {"$ref": "#/$defs/One"},
        "values": {"enum": [value, {"$schema": 1}], "default": value},
        "same": {"const": {"definitions": {"additionalProperties": True}}, "examples": [value]},
    }
    rest = {
        "type": "object",
        "patternProperties": {"definitions": {"type": "string"}},
        "dependentRequired": {"$schema": ["one"]},
        "required": [*names],
    }
    asked = {**rest, "properties": properties, "$defs": {"One": one}}
    return asked, {**rest, "properties": {**properties, "one": one}}


async def test_a_property_may_be_called_like_what_holds_definitions_and_values_are_not_rewritten() -> None:
    asked, written = _odd("definitions", "$schema", "additionalProperties", value={"$schema": 1})
    tool = {"type": "function", "function": {"name": "f", "parameters": asked}}
    assert (await sent(chat(tools=[tool])))["toolConfig"]["tools"][0]["toolSpec"]["inputSchema"]["json"] == written
    asked, written = _odd("definitions", "$defs", "$schema", "$ref", "minimum", value={"$ref": "#/$defs/One"})
    hint = (await sent(chat(response_format=schema(asked)), LLAMA))["system"][0]["text"]
    assert orjson.loads(hint[hint.index("{") :]) == written
    asked, written = _odd("definitions", "$defs", "$schema", "additionalProperties", value={"$defs": 1})
    written["properties"]["one"]["additionalProperties"] = written["additionalProperties"] = False
    assert _schema(await sent(chat(response_format=schema(asked)))) == written


@pytest.mark.parametrize(
    "definitions",
    [
        {f"d{n}": {"type": "object", "properties": {"a": {"$ref": f"#/$defs/d{n + 1}"}}} for n in range(300)},
        {f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 9} for n in range(9)},
        {"d0": {"anyOf": [{"$ref": "#/$defs/d300"}] * 400}, "d300": {"const": "x" * 10_000}},
    ],
    ids=["deep", "wide", "long"],
)
@pytest.mark.parametrize("model", [CLAUDE, NOVA])
async def test_a_schema_that_grows_too_much_when_its_references_are_written_out_is_refused(
    definitions: dict[str, Any], model: str
) -> None:
    asked = {"type": "object", "properties": {"a": {"$ref": "#/$defs/d0"}}}
    body = chat(response_format=schema({**asked, "$defs": {"d9": {}, "d300": {}, **definitions}}))
    assert (await refused(body, model))["code"] == "invalid_schema"


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


@pytest.mark.parametrize(
    "blocks",
    [
        [{"text": "Sure, here it is: "}, USE],
        [USE, {"text": " Anything else?"}],
        [{"text": "Sure: "}, USE, {"toolUse": {**USE["toolUse"], "toolUseId": "t3", "input": {"city": "Rome"}}}],
        [{"citationsContent": {"content": [{"text": "Seen."}], "citations": [SOURCE]}}, USE],
    ],
)
async def test_what_the_model_says_beside_the_tool_is_not_in_the_answer(blocks: list[dict[str, Any]]) -> None:
    for choice in await told(answer(*blocks, stop="tool_use"), chat(**ASKED), NOVA):
        assert choice["message"]["content"] in ('{"city":"Paris"}', '{"city": "Paris"}')
        assert not choice["message"].get("annotations")
        assert choice["finish_reason"] == "stop"


async def test_a_text_is_the_answer_of_a_model_that_does_not_call_the_tool() -> None:
    said = {"text": '{"city": "Paris"}'}
    thought = {"reasoningContent": {"reasoningText": {"text": "Hm."}}}
    for choice in await told(answer(thought, said), chat(**ASKED), NOVA):
        assert choice["message"]["content"] == said["text"]
        assert choice["message"]["reasoning_content"] == "Hm."
    for choice in await told(answer(said, REAL, stop="tool_use"), chat(**ASKED, tools=[WEATHER]), NOVA):
        assert choice["message"]["content"] == said["text"]
        assert len(choice["message"]["tool_calls"]) == 1


async def test_text_that_a_stream_held_back_comes_before_the_finish_reason() -> None:
    async with bedrock() as aws, running(config(aws.root, NOVA)) as gateway:
        aws.script(stream(streamed(answer({"text": "Sure, here"}))))
        *_, said, last = events(await gateway.post(CHAT, chat(**ASKED, stream=True)))
        assert said["choices"][0]["delta"] == {"content": "here"}
        assert last["choices"][0]["finish_reason"] == "stop"


async def test_a_stream_holds_back_so_much_text_and_no_more() -> None:
    long = "x" * (MOST_HELD_BYTES + 1)
    async with bedrock() as aws, running(config(aws.root, NOVA)) as gateway:
        aws.script(stream(streamed(answer({"text": long}, USE, stop="tool_use"), size=100_000)))
        assert text(await gateway.post(CHAT, chat(**ASKED, stream=True))).startswith(long)


@pytest.mark.parametrize(
    ("end", "options"),
    [([frames.exception("throttlingException", "no")], {}), ([], {}), ([b"\0"], {}), ([b"\0"], {"cut_at": len(BEGUN)})],
    ids=["an exception", "its end", "half a frame", "a cut"],
)
async def test_what_a_stream_held_back_is_told_when_it_breaks(end: list[bytes], options: dict[str, Any]) -> None:
    async with bedrock() as aws, running(config(aws.root, NOVA)) as gateway:
        aws.script(stream([BEGUN, *end], **options))
        *told, last = (await gateway.post(CHAT, chat(**ASKED, stream=True))).events()
        assert "".join(event["choices"][0]["delta"]["content"] for event in told) == "Sure, here"
        assert "error" in last


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
