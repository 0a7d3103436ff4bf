"""A chat client over a provider that has a model in Responses alone: both ways, and as OpenAI's SDK reads them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from copy import deepcopy
from typing import Any

import openai
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from qlens import InvalidRequest, UpstreamError, UpstreamInvalid, UpstreamRejected, sse
from qlens.bridges import between, params
from qlens.dialects import chat, responses, typed
from qlens.testing import Running, Scripted, running
from qlens.testing.responses import ARGUMENTS, FAILURE, THOUGHT, USAGE, FakeResponses, responses_upstream
from qlens.testing.upstreams import TEXT

Body = dict[str, Any]

HELLO: Body = {"role": "user", "content": "Hello"}
WEATHER: Body = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
COUNTS = {
    "prompt_tokens": 9,
    "completion_tokens": 4,
    "total_tokens": 13,
    "prompt_tokens_details": {"cached_tokens": 2, "audio_tokens": 0},
    "completion_tokens_details": {"reasoning_tokens": 1, "audio_tokens": 0},
}


def bridge() -> Any:
    found = between("chat", "responses")
    assert found is not None
    return found


def asked(*messages: Body, **fields: Any) -> Body:
    body = {"model": "gpt-5-codex", "messages": list(messages) or [HELLO], **fields}
    chat.validate(body)
    return body


def sent(*messages: Body, **fields: Any) -> Body:
    found: Body = bridge().request(asked(*messages, **fields))
    responses.validate(found)
    return found


def response(*output: Body, **fields: Any) -> Body:
    return {
        "id": "resp_1",
        "object": "response",
        "created_at": 1700000000.0,
        "model": "gpt-5-codex-2025-09-15",
        "status": "completed",
        "service_tier": "default",
        "output": list(output),
        "usage": USAGE,
        **fields,
    }


def said(*parts: Body, **fields: Any) -> Body:
    return {"id": "msg_1", "type": "message", "status": "completed", "role": "assistant", "content": list(parts)}


def text(words: str, **fields: Any) -> Body:
    return {"type": "output_text", "text": words, "annotations": [], "logprobs": [], **fields}


def call(number: int, arguments: str = ARGUMENTS) -> Body:
    identity = {"id": f"fc_{number}", "call_id": f"call_{number}", "name": f"tool_{number}"}
    return {"type": "function_call", "status": "completed", **identity, "arguments": arguments}


def answered(*output: Body, older: bool = False, **fields: Any) -> Body:
    body = asked(functions=[{"name": "f"}]) if older else asked()
    found: Body = bridge().answer(response(*output, **fields), body)
    return found


def fed(events: list[Body], body: Body | None = None) -> bytes:
    translation = bridge().stream(body or asked())
    out: bytes = b"".join([translation.feed(typed.write(event)) for event in events]) + translation.end()
    return out


def chunks(events: list[Body], body: Body | None = None) -> list[Any]:
    found = [sse.data(event) or b"" for event in sse.cut(fed(events, body))]
    return [data.decode() if data == b"[DONE]" else orjson.loads(data) for data in found]


# --- requests ----------------------------------------------------------------------------------


def test_a_conversation_becomes_items() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}
    file = {"type": "file", "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64,aGk="}}
    calls = [
        {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}},
        {"id": "call_2", "type": "custom", "custom": {"name": "shell", "input": "ls"}},
    ]
    found = sent(
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": [{"type": "text", "text": "In English."}]},
        {"role": "user", "name": "ann", "content": [{"type": "text", "text": "What is it?"}, image, file]},
        {"role": "assistant", "content": "Let me see.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "call_1", "content": "Sunny"},
        {"role": "tool", "tool_call_id": "call_2", "content": [{"type": "text", "text": "a.txt"}]},
        {"role": "assistant", "content": None, "refusal": "No."},
    )
    assert found["input"] == [
        {"type": "message", "role": "system", "content": "Be brief."},
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "In English."}]},
        {
            "type": "message",
            "role": "user",
            "content": [
                {"type": "input_text", "text": "What is it?"},
                {"type": "input_image", "image_url": "data:image/png;base64,aGk=", "detail": "auto"},
                {"type": "input_file", "file_data": "data:application/pdf;base64,aGk=", "filename": "a.pdf"},
            ],
        },
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Let me see."}]},
        {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": ARGUMENTS},
        {"type": "custom_tool_call", "call_id": "call_2", "name": "shell", "input": "ls"},
        {"type": "function_call_output", "call_id": "call_1", "output": "Sunny"},
        {"type": "custom_tool_call_output", "call_id": "call_2", "output": [{"type": "input_text", "text": "a.txt"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
    ]


def test_nothing_is_kept_there() -> None:
    assert sent(store=True, metadata={"a": "b"}) == {
        "model": "gpt-5-codex",
        "input": [{"type": "message", "role": "user", "content": "Hello"}],
        "store": False,
    }


def test_functions_of_the_older_form_are_tools() -> None:
    older = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
    found = sent(
        HELLO, older, {"role": "function", "name": "f", "content": "1"}, functions=[{"name": "f"}], function_call="auto"
    )
    assert found["input"][1:] == [
        {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "call_1", "output": "1"},
    ]
    assert (found["tools"][0]["name"], found["tool_choice"], found["parallel_tool_calls"]) == ("f", "auto", False)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"max_tokens": 100}, {"max_output_tokens": 100}),
        ({"max_completion_tokens": 200, "max_tokens": 100}, {"max_output_tokens": 100}),
        ({"reasoning_effort": "high"}, {"reasoning": {"effort": "high"}}),
        ({"verbosity": "low"}, {"text": {"verbosity": "low"}}),
        ({"response_format": {"type": "json_object"}}, {"text": {"format": {"type": "json_object"}}}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}, "strict": True}}},
            {"text": {"format": {"type": "json_schema", "name": "a", "schema": {}, "strict": True}}},
        ),
        (
            {"logprobs": True, "top_logprobs": 2},
            {"include": ["message.output_text.logprobs"], "top_logprobs": 2},
        ),
        ({"temperature": 0.5, "top_p": 0.5, "user": "u"}, {"temperature": 0.5, "top_p": 0.5, "user": "u"}),
        ({"service_tier": "flex", "prompt_cache_key": "k"}, {"service_tier": "flex", "prompt_cache_key": "k"}),
        ({"stream": True, "stream_options": {"include_usage": True}}, {"stream": True}),
        ({"n": 1, "stop": None, "modalities": ["text"], "seed": 1, "logit_bias": {}, "frequency_penalty": 1}, {}),
        ({"tool_choice": "auto", "parallel_tool_calls": True}, {}),
    ],
)
def test_fields_are_said_in_the_words_of_responses(fields: Body, expected: Body) -> None:
    found = sent(**fields)
    assert {name: found[name] for name in found if name not in {"model", "input", "store"}} == expected


def test_tools_are_flat_and_as_strict_as_chat_has_them() -> None:
    grammar = {"type": "grammar", "grammar": {"syntax": "lark", "definition": "start: /a/"}}
    found = sent(
        tools=[
            WEATHER,
            {"type": "function", "function": {"name": "now", "description": "d", "strict": True}},
            {"type": "custom", "custom": {"name": "shell", "format": grammar}},
        ],
        tool_choice={"type": "function", "function": {"name": "now"}},
        parallel_tool_calls=False,
    )
    assert found["tools"] == [
        {"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": False},
        {
            "type": "function",
            "name": "now",
            "description": "d",
            "parameters": {"type": "object", "properties": {}},
            "strict": True,
        },
        {
            "type": "custom",
            "name": "shell",
            "format": {"type": "grammar", "syntax": "lark", "definition": "start: /a/"},
        },
    ]
    assert (found["tool_choice"], found["parallel_tool_calls"]) == ({"type": "function", "name": "now"}, False)
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "weather"}}]}
    found = sent(tools=[WEATHER], tool_choice={"type": "allowed_tools", "allowed_tools": allowed})
    assert found["tool_choice"] == {
        "type": "allowed_tools",
        "mode": "required",
        "tools": [{"type": "function", "name": "weather"}],
    }


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"stop": ["a"]}, "stop", "unsupported_parameter"),
        ({"n": 2}, "n", "unsupported_parameter"),
        ({"modalities": ["text", "audio"]}, "modalities", "unsupported_parameter"),
        ({"web_search_options": {}}, "web_search_options", "unsupported_parameter"),
        ({"max_tokens": 15}, "max_tokens", "integer_below_min_value"),
        ({"tools": [{"type": "mcp"}]}, "tools[0].type", "unsupported_value"),
        ({"tools": [WEATHER], "tool_choice": {"type": "mcp"}}, "tool_choice.type", "unsupported_value"),
        ({"response_format": {"type": "grammar"}}, "response_format.type", "unsupported_value"),
    ],
)
def test_what_responses_do_not_have_is_refused_by_chats_name(fields: Body, param: str, code: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        sent(**fields)
    assert (caught.value.param, caught.value.code) == (param, code)


def test_nothing_is_shared_with_the_clients_body() -> None:
    body = asked(tools=[deepcopy(WEATHER)])
    bridge().request(body)["tools"][0]["parameters"]["type"] = "array"
    assert body["tools"] == [WEATHER]


@pytest.mark.parametrize(
    ("param", "client", "shown"),
    [
        ("max_output_tokens", "chat", "max_completion_tokens"),
        ("reasoning.effort", "chat", "reasoning_effort"),
        ("text.format.schema", "chat", "response_format"),
        ("text.verbosity", "chat", "verbosity"),
        ("input[2].content", "chat", "messages"),
        ("tools[1].parameters", "chat", "tools[1].function.parameters"),
        ("tools[1].parameters", "messages", "tools[1].input_schema"),
        ("max_output_tokens", "completions", "max_tokens"),
        ("temperature", "chat", "temperature"),
        ("input", "responses", "input"),
        (None, "chat", None),
    ],
)
def test_the_client_reads_its_own_name_of_what_was_refused(param: str | None, client: str, shown: str | None) -> None:
    assert params.asked(client, param, "responses") == shown


# --- answers -----------------------------------------------------------------------------------


def test_an_answer_is_a_chat_completion() -> None:
    page = {"type": "url_citation", "url": "https://a.example", "title": "A", "start_index": 0, "end_index": 2}
    spelled = {"token": "Hi", "logprob": -0.1, "bytes": [72, 105], "top_logprobs": []}
    thought = {"id": "rs_1", "type": "reasoning", "summary": [{"type": "summary_text", "text": THOUGHT}]}
    found = answered(thought, said(text("Hi", annotations=[page], logprobs=[spelled]), text(" there")))
    assert found == {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1700000000,
        "model": "gpt-5-codex-2025-09-15",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "Hi there",
                    "refusal": None,
                    "annotations": [
                        {
                            "type": "url_citation",
                            "url_citation": {name: page[name] for name in page if name != "type"},
                        }
                    ],
                    "reasoning_content": THOUGHT,
                },
                "logprobs": {"content": [spelled], "refusal": None},
                "finish_reason": "stop",
            }
        ],
        "usage": COUNTS,
        "service_tier": "default",
    }


@pytest.mark.parametrize(
    ("fields", "finish"),
    [
        ({}, "stop"),
        ({"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}, "length"),
        ({"status": "incomplete", "incomplete_details": {"reason": "content_filter"}}, "content_filter"),
    ],
)
def test_why_it_ended_is_said_in_chats_words(fields: Body, finish: str) -> None:
    output = [said(text("Hi"))]
    assert answered(*output, **fields)["choices"][0]["finish_reason"] == finish
    told = chunks(list(responses.explode(response(*output, **fields))))
    assert [each["choices"][0]["finish_reason"] for each in told[:-2]][-1] == finish


def test_what_azures_filter_found_stays() -> None:
    safe = {"hate": {"filtered": False, "severity": "safe"}}
    filters = [
        {"source_type": "prompt", "content_filter_results": {}},
        {"source_type": "completion", "content_filter_results": safe},
    ]
    body = response(said(text("Hi")), content_filters=filters)
    assert bridge().answer(body, asked())["choices"][0]["content_filter_results"] == safe
    last = chunks(list(responses.explode(body)))[-3]["choices"][0]
    assert (last["finish_reason"], last["content_filter_results"]) == ("stop", safe)


def test_calls_of_functions_come_back_in_the_form_that_was_asked_for() -> None:
    found = answered(call(1), call(2), older=True)["choices"][0]
    assert found["message"]["function_call"] == {"name": "tool_1", "arguments": ARGUMENTS}
    assert (found["finish_reason"], "tool_calls" in found["message"]) == ("function_call", False)


def test_a_failed_response_is_its_error() -> None:
    with pytest.raises(UpstreamRejected, match="No such image"):
        answered(status="failed", error={"code": "invalid_image", "message": "No such image."})


@pytest.mark.parametrize("fields", [{"status": "queued"}, {"status": None}, {"output": None}, {"output": [{}]}])
def test_what_is_no_response_that_has_ended_is_refused(fields: Body) -> None:
    with pytest.raises(UpstreamInvalid):
        bridge().answer(response(**fields), asked())


# --- streams -----------------------------------------------------------------------------------

OUTPUTS: dict[str, list[Body]] = {
    "text": [said(text("Hi there"))],
    "refusal": [said({"type": "refusal", "refusal": "No."})],
    "reasoning": [
        {"id": "rs_1", "type": "reasoning", "summary": [{"type": "summary_text", "text": THOUGHT}]},
        said(text("Hi")),
    ],
    "parallel calls": [said(text("Let me see.")), call(1), call(2, "{}")],
    "custom": [{"id": "ctc_1", "type": "custom_tool_call", "call_id": "call_1", "name": "shell", "input": "ls"}],
}


@pytest.mark.parametrize("output", OUTPUTS.values(), ids=OUTPUTS)
def test_a_stream_says_what_the_whole_answer_says(output: list[Body]) -> None:
    told = chunks(list(responses.explode(response(*output))))
    assert told[-1] == "[DONE]"
    assert (told[-2]["choices"], told[-2]["usage"]) == ([], COUNTS)
    whole, streamed = answered(*output), chat.assemble(told[:-1])
    message = {name: value for name, value in whole["choices"][0]["message"].items() if value}
    assert {name: value for name, value in streamed["choices"][0]["message"].items() if value} == message
    assert streamed["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert (streamed["usage"], streamed["id"], streamed["model"]) == (COUNTS, whole["id"], whole["model"])


def test_a_call_that_is_told_only_when_it_is_whole_is_told() -> None:
    silent = [
        event
        for event in responses.explode(response(call(1)))
        if not event["type"].startswith("response.function_call_arguments")
    ]
    for events in (silent, [event for event in silent if event["type"] != "response.output_item.added"]):
        calls = chat.assemble(chunks(events)[:-1])["choices"][0]["message"]["tool_calls"]
        assert [each["function"]["arguments"] for each in calls] == [ARGUMENTS]


def test_a_stream_that_breaks_off_is_not_over() -> None:
    events = list(responses.explode(response(said(text("Hi")))))
    assert b"[DONE]" not in fed(events[:-1])
    assert all(each["choices"][0]["finish_reason"] is None for each in chunks(events[:-1]))


def test_an_error_in_a_stream_is_raised() -> None:
    failed = {"type": "response.failed", "sequence_number": 2, "response": {**response(), "error": {"message": "x"}}}
    for event in (failed, {"type": "error", "sequence_number": 2, "message": "x", "code": None, "param": None}):
        with pytest.raises(UpstreamError, match="The provider failed"):
            fed([*list(responses.explode(response()))[:2], event])


@pytest.mark.parametrize(
    "event",
    [
        {"type": "response.output_text.delta", "delta": "Hi"},
        {"type": "response.function_call_arguments.delta", "output_index": 0, "delta": "x"},
        {"type": "response.output_item.added", "output_index": 0, "item": {"type": "function_call"}},
    ],
)
def test_an_event_out_of_place_is_refused(event: Body) -> None:
    with pytest.raises(UpstreamInvalid):
        fed([event])


@given(st.data())
def test_chunk_boundaries_change_nothing(data: st.DataObject) -> None:
    output = data.draw(st.sampled_from(list(OUTPUTS.values())))
    raw = b"".join(map(typed.write, responses.explode(response(*output))))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=20)))
    splitter, translation, out = sse.Splitter(), bridge().stream(asked()), b""
    for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True):
        out += b"".join(map(translation.feed, splitter.feed(raw[start:end])))
    assert out == fed(list(responses.explode(response(*output))))


# --- through a gateway, as OpenAI's SDK reads it -----------------------------------------------


class City(BaseModel):
    """What the model is to fill in."""

    city: str


@pytest.fixture
async def up() -> AsyncIterator[FakeResponses]:
    async with responses_upstream() as fake:
        yield fake


def config(up: FakeResponses, **target: Any) -> str:
    return orjson.dumps(
        {
            "pipeline": {"auth": [{"plugin": "anonymous"}]},
            "providers": {"up": {"plugin": "openai", "base_url": up.url, "responses_only": ["my-codex*"]}},
            "models": {
                "ours": {"max_output_tokens": 1000, "targets": [{"provider": "up", "model": "my-codex-1", **target}]}
            },
        }
    ).decode()


@pytest.fixture
async def gateway(up: FakeResponses) -> AsyncIterator[Running]:
    async with running(config(up)) as gateway:
        yield gateway


@pytest.fixture
async def client(gateway: Running) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="sk-example-any", max_retries=0) as client:
        yield client


async def test_a_chat_client_works_unchanged(client: openai.AsyncOpenAI, gateway: Running, up: FakeResponses) -> None:
    asked: Any = {"model": "ours", "messages": [HELLO]}
    whole = await client.chat.completions.create(**asked, reasoning_effort="low")
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (TEXT, "stop")
    assert whole.usage is not None
    assert whole.usage.model_dump(exclude_unset=True) == COUNTS
    told: Any = await client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    events = [event async for event in told]
    assert "".join(event.choices[0].delta.content or "" for event in events[:-1]) == TEXT
    assert events[-1].usage.prompt_tokens_details.cached_tokens == USAGE["input_tokens_details"]["cached_tokens"]  # type: ignore[index]
    silent: Any = await client.chat.completions.create(**asked, stream=True)
    assert all([event.choices async for event in silent])
    assert {request.path for request in up.requests} == {"/v1/responses"}
    assert not up.kept
    receipts = await gateway.settled(3)
    assert [(each.outcome, each.usage.total, each.usage.reasoning) for each in receipts] == [("complete", 13, 1)] * 3


async def test_tools_are_called_and_answered(client: openai.AsyncOpenAI) -> None:
    messages: Any = [HELLO]
    tools: Any = [WEATHER]
    first: Any = await client.chat.completions.create(
        model="ours", messages=messages, tools=tools, tool_choice="required"
    )
    called = first.choices[0].message.tool_calls[0]
    assert (first.choices[0].finish_reason, called.function.arguments) == ("tool_calls", ARGUMENTS)
    result = {"role": "tool", "tool_call_id": called.id, "content": "Sunny"}
    again: Any = [*messages, first.choices[0].message.model_dump(exclude_none=True), result]
    second = await client.chat.completions.create(model="ours", messages=again, tools=tools)
    assert second.choices[0].message.content == TEXT


async def test_a_schema_is_asked_for(client: openai.AsyncOpenAI, up: FakeResponses) -> None:
    up.script(Scripted(body=response(said(text('{"city":"Paris"}')))))
    found = await client.chat.completions.parse(
        model="ours", messages=[{"role": "user", "content": "Where?"}], response_format=City
    )
    assert found.choices[0].message.parsed == City(city="Paris")
    assert up.requests[0].body["text"]["format"]["name"] == "City"


async def test_errors_are_chats(client: openai.AsyncOpenAI, up: FakeResponses) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model="ours", messages=[{"role": "user", "content": "Hi"}], stop=["a"])
    assert (caught.value.param, caught.value.code) == ("stop", "unsupported_parameter")
    assert "The provider up of the model `ours` has no equal of 'stop'" in caught.value.message
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(
            model="ours", messages=[{"role": "tool", "tool_call_id": "call_none", "content": "x"}]
        )
    assert caught.value.param == "messages"
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError):
            await client.chat.completions.create(
                model="ours", messages=[{"role": "user", "content": FAILURE}], stream=stream
            )


async def test_other_dialects_reach_it_over_chat(gateway: Running, up: FakeResponses) -> None:
    body = {"model": "ours", "max_tokens": 100, "messages": [HELLO]}
    for stream in (False, True):
        message = await gateway.post("/v1/messages", {**body, "stream": stream})
        assert message.status == 200, message.text
        assert "message_stop" in message.text if stream else message.json()["content"][0]["text"] == TEXT
        completed = await gateway.post("/v1/completions", {"model": "ours", "prompt": "Hello", "stream": stream})
        assert completed.status == 200, completed.text
    assert {request.path for request in up.requests} == {"/v1/responses"}


async def test_a_base_model_says_that_there_is_no_chat(up: FakeResponses) -> None:
    for base_model, path in (("gpt-5-codex", "/v1/responses"), ("gpt-5", "/v1/chat/completions")):
        async with running(config(up, model="theirs", base_model=base_model)) as gateway:
            answer = await gateway.post("/v1/chat/completions", {"model": "ours", "messages": [HELLO]})
        assert (answer.status, up.requests[-1].path) == (200, path), answer.text
