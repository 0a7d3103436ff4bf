"""The plugin `echo`, through a gateway: the same answer for the same call, and trouble on demand."""

from __future__ import annotations

import math
import struct
from base64 import b64decode
from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlens import ConfigError
from qlens.testing import Response, Running, check_plugin, running
from qlens_plugins.provider.echo import Echo
from qlens_plugins.provider.echo.tokens import count, tokens

CHAT = "/v1/chat/completions"
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "unit": {"enum": ["celsius", "fahrenheit"]}},
    "required": ["city"],
}


def config(retries: int = 0, **params: Any) -> str:
    targets = [{"provider": "echo", "model": "echo-1", "params": params}]
    content: dict[str, Any] = {
        "pipeline": {"auth": [{"plugin": "anonymous"}]},
        "providers": {"echo": {"plugin": "echo"}},
        "models": {"m": {"max_output_tokens": 1000, "targets": targets}},
    }
    if retries:
        content["pipeline"]["route"] = [{"plugin": "retry", "attempts": 1 + retries, "max_seconds": 0.01}]
    return orjson.dumps(content).decode()


@pytest.fixture
async def gateway() -> AsyncIterator[Running]:
    async with running(config()) as gateway:
        yield gateway


def chat(text: str = "Hello, wide world!", **fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": text}], **fields}


def tool(name: str, parameters: Any = WEATHER) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


async def choice(gateway: Running, body: dict[str, Any]) -> Any:
    answer = await gateway.post(CHAT, body)
    assert answer.status == 200, answer.text
    return answer.json()["choices"][0]


async def called(gateway: Running, body: dict[str, Any]) -> list[tuple[str, Any]]:
    """The tools that the answer calls, with their parsed arguments."""
    calls = (await choice(gateway, body))["message"].get("tool_calls") or []
    return [(call["function"]["name"], orjson.loads(call["function"]["arguments"])) for call in calls]


def joined(answer: Response) -> str:
    return "".join(
        event["choices"][0]["delta"].get("content") or "" for event in answer.events()[:-1] if event["choices"]
    )


def test_it_keeps_the_contract_of_its_stage() -> None:
    check_plugin("provider", Echo)


# --- text --------------------------------------------------------------------------------------


async def test_last_user_message_is_the_answer(gateway: Running) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "first"},
        {"role": "user", "content": [{"type": "text", "text": "sec"}, {"type": "text", "text": "ond"}]},
    ]
    answer = await gateway.post(CHAT, {"model": "m", "messages": messages})
    body = answer.json()
    assert body["choices"][0]["message"]["content"] == "second"
    assert (body["object"], body["model"], body["choices"][0]["finish_reason"]) == ("chat.completion", "echo-1", "stop")


async def test_same_call_has_the_same_answer_in_another_process_too(gateway: Running) -> None:
    body = chat("Tell me", response_format={"type": "json_object"})
    async with running(config()) as other:
        assert await choice(gateway, body) == await choice(other, body)


async def test_picture_without_words_is_answered_by_its_kind(gateway: Running) -> None:
    picture = {"type": "image_url", "image_url": {"url": "https://example.com/x.png"}}
    body = {"model": "m", "messages": [{"role": "user", "content": [picture]}]}
    assert (await choice(gateway, body))["message"]["content"] == "[image_url]"


@given(st.text())
def test_tokens_are_the_text_and_never_more_than_its_bytes(text: str) -> None:
    assert "".join(tokens(text)) == text
    assert count(text) == len(tokens(text)) <= len(text.encode())


async def test_usage_counts_what_was_read_and_said(gateway: Running) -> None:
    body = chat(n=2)
    body["messages"].insert(0, {"role": "system", "content": "Be brief."})
    usage = (await gateway.post(CHAT, body)).json()["usage"]
    asked = count("Hello, wide world!")
    assert usage["prompt_tokens"] == count("Be brief.") + asked
    assert usage["completion_tokens"] == 2 * asked
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    (receipt,) = await gateway.settled(1)
    assert (receipt.usage.prompt, receipt.usage.completion) == (usage["prompt_tokens"], usage["completion_tokens"])


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
async def test_answer_is_cut_at_max_tokens(gateway: Running, field: str) -> None:
    cut = await choice(gateway, chat("one two three", **{field: 2}))
    assert (cut["message"]["content"], cut["finish_reason"]) == ("one two", "length")
    whole = await choice(gateway, chat("one two three", **{field: 3}))
    assert (whole["message"]["content"], whole["finish_reason"]) == ("one two three", "stop")


async def test_answer_is_not_longer_than_the_model_allows(gateway: Running) -> None:
    cut = await choice(gateway, chat("word " * 2000))
    assert cut["finish_reason"] == "length"
    (receipt,) = await gateway.settled(1)
    assert receipt.usage.completion == 1000


@pytest.mark.parametrize(("stop", "text"), [("three", "one two "), (["four", "two"], "one "), (["x"], "one two three")])
async def test_answer_ends_before_a_stop_sequence(gateway: Running, stop: Any, text: str) -> None:
    said = await choice(gateway, chat("one two three", stop=stop))
    assert (said["message"]["content"], said["finish_reason"]) == (text, "stop")


async def test_stream_has_openais_shape(gateway: Running) -> None:
    answer = await gateway.post(CHAT, chat("one two", stream=True, stream_options={"include_usage": True}))
    *events, usage, end = answer.events()
    assert end == "[DONE]"
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({(event["id"], event["created"], event["model"]) for event in events}) == 1
    assert [event["choices"][0]["delta"] for event in events] == [
        {"role": "assistant", "content": "", "refusal": None},
        {"content": "one"},
        {"content": " two"},
        {},
    ]
    assert [event["choices"][0]["finish_reason"] for event in events] == [None, None, None, "stop"]
    assert all(event["usage"] is None for event in events)
    assert (usage["choices"], usage["usage"]["total_tokens"]) == ([], 4)


async def test_stream_and_body_say_the_same_for_every_choice(gateway: Running) -> None:
    body = chat("one two three", n=3, max_tokens=2)
    whole = (await gateway.post(CHAT, body)).json()["choices"]
    texts, finishes = ["", "", ""], ["", "", ""]
    for event in (await gateway.post(CHAT, {**body, "stream": True})).events()[:-1]:
        (part,) = event["choices"]
        texts[part["index"]] += part["delta"].get("content") or ""
        finishes[part["index"]] = part["finish_reason"] or finishes[part["index"]]
    assert texts == [one["message"]["content"] for one in whole]
    assert finishes == [one["finish_reason"] for one in whole]


# --- completions -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "texts", "read"),
    [
        ("one two", ["one two"], 2),
        (["one", "two three"], ["one", "two three"], 3),
        ([1, 22, 333], ["1 22 333"], 3),
        ([[1], [2, 3]], ["1", "2 3"], 3),
    ],
)
async def test_completion_is_the_prompt_in_all_its_forms(
    gateway: Running, prompt: Any, texts: list[str], read: int
) -> None:
    body = (await gateway.post("/v1/completions", {"model": "m", "prompt": prompt})).json()
    assert body["object"] == "text_completion"
    assert [one["text"] for one in body["choices"]] == texts
    assert [one["index"] for one in body["choices"]] == list(range(len(texts)))
    assert body["usage"]["prompt_tokens"] == read


async def test_completion_may_begin_with_its_prompt(gateway: Running) -> None:
    body = {"model": "m", "prompt": "one two", "echo": True, "max_tokens": 1, "stream": True}
    *events, end = (await gateway.post("/v1/completions", body)).events()
    assert end == "[DONE]"
    assert "".join(event["choices"][0]["text"] for event in events) == "one twoone"
    assert events[-1]["choices"][0]["finish_reason"] == "length"


# --- tools -------------------------------------------------------------------------------------


async def test_tool_whose_name_is_mentioned_is_called(gateway: Running) -> None:
    body = chat("Please use get_weather for Rome", tools=[tool("get_time"), tool("get_weather")])
    said = await choice(gateway, body)
    assert said["finish_reason"] == "tool_calls"
    assert said["message"]["content"] is None
    (call,) = said["message"]["tool_calls"]
    assert call["id"].startswith("call_")
    assert call["function"]["name"] == "get_weather"
    arguments = orjson.loads(call["function"]["arguments"])
    assert arguments == {"city": "Please use get_weather for Rome", "unit": "celsius"}


@pytest.mark.parametrize("text", ["What is the weather?", "forget_weather", "get_weather_now", "get-weather"])
async def test_tool_whose_name_is_not_mentioned_is_not_called(gateway: Running, text: str) -> None:
    assert (await choice(gateway, chat(text, tools=[tool("get_weather")])))["message"]["content"] == text


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"tool_choice": "none"}, []),
        ({"tool_choice": "auto"}, ["b", "a"]),
        ({"tool_choice": "auto", "parallel_tool_calls": False}, ["b"]),
        ({"tool_choice": "required"}, ["b", "a"]),
        ({"tool_choice": {"type": "function", "function": {"name": "c"}}}, ["c"]),
        (
            {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [tool("a")]}}},
            ["a"],
        ),
    ],
)
async def test_tool_choice_is_obeyed(gateway: Running, fields: dict[str, Any], names: list[str]) -> None:
    body = chat("call b and then a", tools=[tool("a"), tool("b"), tool("c")], **fields)
    assert [name for name, _ in await called(gateway, body)] == names


async def test_required_tool_is_the_first_when_none_is_mentioned(gateway: Running) -> None:
    body = chat("hello", tools=[tool("get_time"), tool("get_weather")], tool_choice="required")
    assert [name for name, _ in await called(gateway, body)] == ["get_time"]


async def test_tool_that_does_not_exist_cannot_be_chosen(gateway: Running) -> None:
    body = chat(tools=[tool("a")], tool_choice={"type": "function", "function": {"name": "z"}})
    answer = await gateway.post(CHAT, body)
    assert (answer.status, answer.json()["error"]["param"]) == (400, "tool_choice")


async def test_tool_results_are_answered_in_text(gateway: Running) -> None:
    asked = {"role": "user", "content": "get_weather in Rome and Oslo"}
    calls = [
        {"id": f"call_{n}", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}} for n in (1, 2)
    ]
    results = [
        {"role": "tool", "tool_call_id": "call_1", "content": "Rome: sun"},
        {"role": "tool", "tool_call_id": "call_2", "content": "Oslo: snow"},
    ]
    messages = [asked, {"role": "assistant", "content": None, "tool_calls": calls}, *results]
    said = await choice(gateway, {"model": "m", "messages": messages, "tools": [tool("get_weather")]})
    assert (said["message"]["content"], said["finish_reason"]) == ("Rome: sun\nOslo: snow", "stop")


async def test_streamed_tool_calls_come_in_pieces_with_the_name_first(gateway: Running) -> None:
    body = chat("a and b", tools=[tool("a"), tool("b")])
    *events, _ = (await gateway.post(CHAT, {**body, "stream": True})).events()
    pieces = [piece for event in events for piece in event["choices"][0]["delta"].get("tool_calls", [])]
    assert [(piece["index"], piece["function"]["name"]) for piece in pieces if "id" in piece] == [(0, "a"), (1, "b")]
    assert all(piece["function"]["arguments"] == "" for piece in pieces if "id" in piece)
    arguments = ["".join(p["function"]["arguments"] for p in pieces if p["index"] == index) for index in (0, 1)]
    assert [("a", orjson.loads(arguments[0])), ("b", orjson.loads(arguments[1]))] == await called(gateway, body)
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert events[0]["choices"][0]["delta"]["content"] is None


async def test_tool_call_may_be_cut_at_max_tokens(gateway: Running) -> None:
    said = await choice(gateway, chat("a", tools=[tool("a")], max_tokens=3))
    assert said["finish_reason"] == "length"
    (receipt,) = await gateway.settled(1)
    assert receipt.usage.completion == 3


# --- values from schemas -----------------------------------------------------------------------

NODE = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}, "value": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"type": "string", "maxLength": 3}, "tex"),
        ({"type": "string", "minLength": 6}, "textxx"),
        ({"type": "string", "format": "date"}, "2024-10-21"),
        ({"enum": ["b", "a"]}, "b"),
        ({"const": 7}, 7),
        ({"type": "string", "default": "x"}, "x"),
        ({"type": "integer"}, 0),
        ({"type": "integer", "minimum": 3, "multipleOf": 5}, 5),
        ({"type": "integer", "exclusiveMinimum": 3}, 4),
        ({"type": "integer", "maximum": -2}, -2),
        ({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}, 0.001),
        ({"type": "boolean"}, True),
        ({"type": "null"}, None),
        ({"type": ["null", "integer"]}, 0),
        ({"type": "array", "items": {"type": "integer"}}, [0]),
        ({"type": "array", "items": {"type": "boolean"}, "minItems": 2}, [True, True]),
        ({"type": "array", "maxItems": 0}, []),
        ({"type": "array", "prefixItems": [{"type": "integer"}, {"const": "x"}]}, [0, "x"]),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, 0),
        ({"oneOf": [{"type": "null"}, {"type": "integer"}]}, None),
        (
            {"allOf": [{"properties": {"a": {"const": 1}}}, {"$ref": "#/$defs/b"}], "$defs": {"b": WEATHER}},
            {"a": 1, "city": "text", "unit": "celsius"},
        ),
        ({"type": "object", "required": ["undescribed"]}, {"undescribed": "text"}),
        ({"properties": {"a": {"$ref": "#/$defs/x~1y"}}, "$defs": {"x/y": {"const": 1}}}, {"a": 1}),
        ({"properties": {"a": {"$ref": "https://example.com/schema"}}}, {"a": "text"}),
        ({"$ref": "#/$defs/node", "$defs": {"node": NODE}}, {"value": 0}),
        ({"type": "array", "items": {"$ref": "#"}}, [[]]),
        ({"anyOf": [{"$ref": "#"}, {"type": "integer"}]}, 0),
        ({"type": "string", "maxLength": "many", "enum": []}, "text"),
        ({"type": "integer", "minimum": "low", "multipleOf": 0}, 0),
        (True, "text"),
        ({}, "text"),
    ],
)
async def test_value_fits_its_schema(gateway: Running, schema: Any, value: Any) -> None:
    wrapped = {"type": "object", "properties": {"value": schema}, "required": ["value"]}
    if isinstance(schema, dict):
        wrapped |= {"$defs": schema.get("$defs", {})}
        if '"$ref":"#"' in orjson.dumps(schema).decode():
            wrapped = schema
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": wrapped, "strict": True}}
    said = await choice(gateway, chat("text", response_format=form))
    made = orjson.loads(said["message"]["content"])
    assert made == (value if wrapped is schema else {"value": value})


async def test_json_object_is_an_object(gateway: Running) -> None:
    said = await choice(gateway, chat('say "hi"', response_format={"type": "json_object"}))
    assert orjson.loads(said["message"]["content"]) == {"answer": 'say "hi"'}


def _doubling(levels: int) -> dict[str, Any]:
    """A small schema whose smallest value has 2**levels parts."""
    definitions = {
        f"l{n}": {
            "type": "object",
            "properties": {"a": {"$ref": f"#/$defs/l{n + 1}"}, "b": {"$ref": f"#/$defs/l{n + 1}"}},
            "required": ["a", "b"],
        }
        for n in range(levels)
    }
    return {"$ref": "#/$defs/l0", "$defs": {**definitions, f"l{levels}": {"type": "integer"}}}


def _deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


@pytest.mark.parametrize(
    "schema",
    [
        pytest.param({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, id="endless"),
        pytest.param({"$ref": "#"}, id="itself"),
        pytest.param(_doubling(30), id="doubling"),
        pytest.param(_deep(80), id="deep"),
        pytest.param({"type": "array", "items": {}, "minItems": 10**9}, id="long"),
    ],
)
async def test_schema_without_a_small_value_is_refused(gateway: Running, schema: Any) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    answer = await gateway.post(CHAT, chat(response_format=form))
    assert answer.status == 400
    assert "schema" in answer.json()["error"]["message"]


# --- embeddings --------------------------------------------------------------------------------


async def embed(gateway: Running, **fields: Any) -> Any:
    answer = await gateway.post("/v1/embeddings", {"model": "m", **fields})
    assert answer.status == 200, answer.text
    return answer.json()


async def test_embedding_is_a_unit_vector_that_depends_on_the_text_alone(gateway: Running) -> None:
    body = await embed(gateway, input=["one", "two", "one"])
    first, second, third = (entry["embedding"] for entry in body["data"])
    assert len(first) == 1536
    assert first == third != second
    assert math.isclose(math.hypot(*first), 1, rel_tol=1e-5)
    assert [entry["index"] for entry in body["data"]] == [0, 1, 2]
    assert body["usage"] == {"prompt_tokens": 3, "total_tokens": 3}


async def test_packed_embedding_is_the_same_in_little_endian_float32(gateway: Running) -> None:
    plain = (await embed(gateway, input="one", dimensions=8))["data"][0]["embedding"]
    packed = (await embed(gateway, input="one", dimensions=8, encoding_format="base64"))["data"][0]["embedding"]
    assert list(struct.unpack("<8f", b64decode(packed))) == plain


@pytest.mark.parametrize(("given", "vectors", "read"), [([1, 2, 3], 1, 3), ([[1], [2, 3]], 2, 3), ("a b", 1, 2)])
async def test_tokens_can_be_embedded(gateway: Running, given: Any, vectors: int, read: int) -> None:
    body = await embed(gateway, input=given, dimensions=2)
    assert (len(body["data"]), body["usage"]["prompt_tokens"]) == (vectors, read)


async def test_too_long_a_vector_is_refused(gateway: Running) -> None:
    answer = await gateway.post("/v1/embeddings", {"model": "m", "input": "x", "dimensions": 100_000})
    assert (answer.status, answer.json()["error"]["param"]) == (400, "dimensions")


# --- trouble on demand -------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("params", "status", "code"),
    [
        ({"fail_status": 400}, 400, None),
        ({"fail_status": 400, "fail_code": "context_length_exceeded"}, 400, "context_length_exceeded"),
        ({"fail_status": 401}, 502, "upstream_auth_error"),
        ({"fail_status": 429}, 429, "rate_limit_exceeded"),
        ({"fail_status": 500}, 502, "upstream_error"),
        ({"fail_status": 503}, 503, "upstream_unavailable"),
    ],
)
async def test_it_fails_as_a_provider_with_that_status(
    params: dict[str, Any], status: int, code: str | None, stream: bool
) -> None:
    async with running(config(**params)) as gateway:
        answer = await gateway.post(CHAT, chat(stream=stream))
        assert (answer.status, answer.json()["error"]["code"]) == (status, code)


async def test_its_failure_may_ask_to_wait() -> None:
    async with running(config(fail_status=429, retry_after=3)) as gateway:
        assert (await gateway.post(CHAT, chat())).headers["retry-after"] == "3"


async def test_it_fails_the_first_attempts_and_then_works() -> None:
    async with running(config(fail_first=2)) as gateway:
        statuses = [(await gateway.post(CHAT, chat())).status for _ in range(4)]
        assert statuses == [503, 503, 200, 200]


async def test_answer_without_a_stream_that_breaks_off_is_an_error() -> None:
    async with running(config(break_after_tokens=2)) as gateway:
        answer = await gateway.post(CHAT, chat())
        assert (answer.status, answer.json()["error"]["code"]) == (502, "upstream_truncated")


@pytest.mark.parametrize(("after", "text"), [(0, ""), (2, "one two"), (3, "one two three"), (99, "one two three")])
async def test_stream_breaks_off_after_its_tokens_and_never_ends_well(after: int, text: str) -> None:
    async with running(config(break_after_tokens=after)) as gateway:
        answer = await gateway.post(CHAT, chat("one two three", stream=True))
        *events, last = answer.events()
        assert last["error"]["code"] == "upstream_truncated"
        assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == text
        assert not any(event["choices"][0]["finish_reason"] for event in events)


async def test_slow_answer_takes_its_time_for_the_first_byte_and_each_token() -> None:
    async with running(config(first_byte_ms=60, token_ms=30)) as gateway:
        assert joined(await gateway.post(CHAT, chat("one two three", stream=True))) == "one two three"
        await gateway.post(CHAT, chat("one two three"))
        streamed, full = await gateway.settled(2)
        assert streamed.ttft_us is not None
        assert streamed.ttft_us >= 60_000
        assert min(streamed.total_us, full.total_us) >= 150_000


async def test_client_cannot_ask_for_trouble_and_params_are_no_fields(gateway: Running) -> None:
    assert (await gateway.post(CHAT, chat(fail_status=500, break_after_tokens=0))).status == 200


@pytest.mark.parametrize(
    ("params", "fault"),
    [
        ({"first_byte_ms": "slow"}, "params.first_byte_ms must be milliseconds"),
        ({"token_ms": -1}, "params.token_ms must be milliseconds"),
        ({"fail_status": 200}, "params.fail_status must be a status from 400 to 599"),
        ({"fail_status": True}, "params.fail_status must be a status"),
        ({"fail_first": 0}, "params.fail_first must be a number of attempts"),
        ({"break_after_tokens": 1.5}, "params.break_after_tokens must be a number of tokens"),
        ({"retry_after": 1}, "params.retry_after does nothing without"),
        ({"fail_status": 429, "fail_code": 5}, "params.fail_code must be an error code"),
    ],
)
async def test_wrong_param_is_a_fault_that_names_target_and_param(params: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError) as caught:
        async with running(config(**params)):
            pass
    assert fault in str(caught.value)
    assert "echo/echo-1" in str(caught.value)
