"""A chat client over a provider of messages: every field there and back, whole and streamed."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

import openai
import orjson
import pytest
from claudes import claude as config
from claudes import openai_client, plain
from hypothesis import given
from hypothesis import strategies as st

from qlens import InvalidRequest, UpstreamInvalid, UpstreamUnavailable, sse
from qlens.bridges import between
from qlens.dialects import Body, chat, typed
from qlens.testing import Running, Scripted, running
from qlens.testing.anthropic import (
    MODEL,
    FakeAnthropic,
    anthropic,
    error,
    failure,
    message,
    stream,
    streamed,
    text,
    thinking,
    tool_use,
    whole,
)
from qlens.testing.messages_rules import refusal
from qlens.testing.upstreams import TEXT

FOLDER = Path(__file__).parent / "golden/chat_over_messages"
GOLDEN = json.loads((FOLDER / "requests.json").read_text())
ANSWERS = json.loads((FOLDER / "answers.json").read_text())
HELLO: dict[str, Any] = {"role": "user", "content": "Hello"}
BODY: dict[str, Any] = {"model": MODEL, "messages": [HELLO]}
TOOL = {"type": "function", "function": {"name": "files.read"}}
COUNTS = {
    "input_tokens": 5,
    "cache_read_input_tokens": 7,
    "cache_creation_input_tokens": 30,
    "cache_creation": {"ephemeral_5m_input_tokens": 10, "ephemeral_1h_input_tokens": 20},
    "output_tokens": 50,
    "output_tokens_details": {"thinking_tokens": 30},
    "service_tier": "priority",
}
USAGE = {
    "prompt_tokens": 42,
    "completion_tokens": 50,
    "total_tokens": 92,
    "prompt_tokens_details": {
        "cached_tokens": 7,
        "audio_tokens": 0,
        "cache_write_tokens": 30,
        "cache_write_1h_tokens": 20,
    },
    "completion_tokens_details": {"reasoning_tokens": 30, "audio_tokens": 0},
}


def bridge() -> Any:
    found = between("chat", "messages")
    assert found is not None
    return found


def asked(**fields: Any) -> Body:
    return {**BODY, **fields}


def answered(told: Body, **fields: Any) -> Body:
    found: Body = bridge().answer(told, asked(**fields))
    return found


def chunks(events: Iterable[bytes], **fields: Any) -> list[Any]:
    translation = bridge().stream(asked(**fields))
    raw = b"".join([translation.feed(event) for event in events]) + translation.end()
    found = [sse.data(event) or b"" for event in sse.cut(raw)]
    return [data.decode() if data == b"[DONE]" else orjson.loads(data) for data in found]


# --- requests ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GOLDEN, ids=[case["case"] for case in GOLDEN])
def test_a_chat_is_written_as_messages(case: dict[str, Any]) -> None:
    given = deepcopy(case["client"])
    assert bridge().request(given) == case["provider"]
    assert given == case["client"]


@pytest.mark.parametrize("case", GOLDEN, ids=[case["case"] for case in GOLDEN])
def test_the_provider_takes_what_is_written(case: dict[str, Any]) -> None:
    assert refusal(case["provider"], "2023-06-01") is None


def test_nothing_is_shared_with_the_clients_body() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    given = asked(tools=[tool], thinking={"type": "enabled", "budget_tokens": 1024}, max_tokens=2000)
    sent = bridge().request(given)
    sent["tools"][0]["input_schema"]["properties"]["a"]["type"] = "number"
    sent["thinking"]["budget_tokens"] = 1
    assert schema["properties"] == {"a": {"type": "string"}}
    assert given["thinking"]["budget_tokens"] == 1024


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"what_comes_tomorrow": 1}, "what_comes_tomorrow"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "x", "parameters": {"type": "array"}}}]},
         "tools[0].function.parameters"),
        ({"tools": [TOOL], "tool_choice": {"type": "custom", "custom": {"name": "x"}}}, "tool_choice.type"),
        ({"response_format": {"type": "grammar"}}, "response_format.type"),
        ({"model": "claude-3-7-sonnet-latest",
          "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "array"}}}},
         "response_format.json_schema.schema"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {
            "data": "", "format": "mp3"}}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_id": "file-1"}}]}]},
         "messages[0].content[0].file.file_id"),
        ({"messages": [{"role": "user", "content": [{"type": "file", "file": {
            "file_data": "data:application/msword;base64,aGk="}}]}]}, "messages[0].content[0].file.file_data"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "ftp://x"}}]}]},
         "messages[0].content[0].image_url.url"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": None}}]}]},
         "messages[0].content[0].image_url.url"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {
            "url": "data:image/png;base64,no!"}}]}]}, "messages[0].content[0].image_url.url"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {
            "url": "data:image/bmp;base64,aGk="}}]}]}, "messages[0].content[0].image_url.url"),
        ({"messages": [HELLO, {"role": "assistant", "tool_calls": [{"id": "a", "type": "function", "function": {
            "name": "f", "arguments": "{no"}}]}]}, "messages[1].tool_calls[0].function.arguments"),
        ({"messages": [HELLO, {"role": "assistant", "tool_calls": [{"id": "a", "type": "custom", "custom": {
            "name": "f", "input": "x"}}]}]}, "messages[1].tool_calls[0].type"),
        ({"messages": [HELLO, {"role": "assistant", "audio": {"id": "a"}}]}, "messages[1].audio"),
    ],
)  # fmt: skip
def test_what_cannot_be_said_is_refused_by_the_clients_own_field(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        bridge().request(asked(**fields))
    assert caught.value.param == param


# --- answers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ANSWERS, ids=[case["case"] for case in ANSWERS])
def test_answers_and_streams_are_what_they_were(case: dict[str, Any]) -> None:
    """The wire, event by event: `events` is what the provider writes, `chunks` what the client reads."""
    assert plain(bridge().answer(case["provider"], case["asked"])) == plain(case["client"])
    found = chunks([event.encode() for event in case["events"]], **case["asked"])
    assert [event if event == "[DONE]" else plain(event) for event in found] == [
        event if event == "[DONE]" else plain(event) for event in case["chunks"]
    ]
    assert "".join(case["events"]).encode() == b"".join(streamed(case["provider"], 4))


def test_an_answer_is_a_chat_completion() -> None:
    told = message(thinking("hm"), text("I "), text("look."), usage=COUNTS)
    assert plain(answered(told)) == {
        "object": "chat.completion",
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "I look.",
                    "refusal": None,
                    "reasoning_content": "hm",
                    "thinking_blocks": [thinking("hm")],
                },
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": USAGE,
        "service_tier": "priority",
    }


@pytest.mark.parametrize(
    ("stop", "finish"),
    [
        ("end_turn", "stop"),
        ("stop_sequence", "stop"),
        ("max_tokens", "length"),
        ("model_context_window_exceeded", "length"),
        ("pause_turn", "length"),
        ("refusal", "content_filter"),
        ("what_comes_tomorrow", "stop"),
    ],
)
def test_reasons_to_stop(stop: str, finish: str) -> None:
    told = message(stop=stop)
    assert answered(told)["choices"][0]["finish_reason"] == finish
    assert chunks(streamed(told))[-3]["choices"][0]["finish_reason"] == finish


def test_a_refusal_says_why() -> None:
    why = {"type": "refusal", "category": "cyber", "explanation": "Not this."}
    told = message(text("I "), stop="refusal", stop_details=why)
    assert answered(told)["choices"][0]["message"]["refusal"] == "Not this."
    assert chat.assemble(chunks(streamed(told))[:-1])["choices"][0]["message"]["refusal"] == "Not this."


def test_calls_have_the_clients_names_and_their_own_ids() -> None:
    sent = bridge().request(asked(tools=[TOOL]))["tools"][0]["name"]
    told = message(tool_use("toolu_1", sent, {"path": "a"}), tool_use("toolu_2", sent, {}), stop="tool_use")
    choice = answered(told, tools=[TOOL])["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    assert choice["message"]["tool_calls"] == [
        {"id": "toolu_1", "type": "function", "function": {"name": "files.read", "arguments": '{"path":"a"}'}},
        {"id": "toolu_2", "type": "function", "function": {"name": "files.read", "arguments": "{}"}},
    ]
    events = chunks(streamed(told, 2), tools=[TOOL])
    assert chat.assemble(events[:-1])["choices"][0]["message"]["tool_calls"] == choice["message"]["tool_calls"]
    parts = [part for event in events[:-1] for each in event["choices"] for part in each["delta"].get("tool_calls", ())]
    assert [part["index"] for part in parts] == sorted(part["index"] for part in parts)
    assert [part["id"] for part in parts if "id" in part] == ["toolu_1", "toolu_2"]


def test_the_answer_of_the_helper_tool_is_the_text() -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    told = message(tool_use("toolu_1", "json_tool_call", {"a": 1}), stop="tool_use")
    choice = answered(told, response_format=form)["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ('{"a":1}', "stop")
    whole_again = chat.assemble(chunks(streamed(told, 2), response_format=form)[:-1])["choices"][0]
    assert (whole_again["message"]["content"], whole_again["finish_reason"]) == ('{"a":1}', "stop")
    # Without a schema it is a tool of the client's like any other.
    assert answered(told)["choices"][0]["finish_reason"] == "tool_calls"


def test_a_client_of_functions_gets_a_function_call() -> None:
    told = message(tool_use("toolu_1", "f", {"a": 1}), stop="tool_use")
    choice = answered(told, functions=[{"name": "f"}])["choices"][0]
    assert choice["finish_reason"] == "function_call"
    assert choice["message"]["function_call"] == {"name": "f", "arguments": '{"a":1}'}
    events = chunks(streamed(told, 3), functions=[{"name": "f"}])
    assert chat.assemble(events[:-1])["choices"][0]["message"]["function_call"] == choice["message"]["function_call"]
    assert events[-3]["choices"][0]["finish_reason"] == "function_call"


def test_citations_of_pages_are_annotations() -> None:
    cited = {"type": "web_search_result_location", "url": "https://example.com", "title": "t", "cited_text": "c"}
    told = message(text("one "), text("two", citations=[cited, {"type": "page_location"}]))
    note = {"url": "https://example.com", "title": "t", "start_index": 4, "end_index": 7}
    notes = [{"type": "url_citation", "url_citation": note}]
    assert answered(told)["choices"][0]["message"]["annotations"] == notes
    assert chat.assemble(chunks(streamed(told, 2))[:-1])["choices"][0]["message"]["annotations"] == notes


@pytest.mark.parametrize("told", [{}, {"content": [1]}, {"content": [{"type": "text"}]}, {"content": "x"}])
def test_what_is_no_message_is_the_providers_fault(told: Body) -> None:
    with pytest.raises(UpstreamInvalid):
        answered(told)


# --- streams -----------------------------------------------------------------------------------


def test_a_stream_is_a_chat_stream() -> None:
    told = message(thinking("hm"), text("Hello"), usage=COUNTS)
    *events, usage, end = chunks(streamed(told, 3))
    assert end == "[DONE]"
    assert [event["choices"][0]["delta"] for event in events] == [
        {"role": "assistant", "content": ""},
        {"reasoning_content": "hm"},
        {"thinking_blocks": [thinking("hm")]},
        {"content": "Hel"},
        {"content": "lo"},
        {},
    ]
    assert [event["choices"][0]["finish_reason"] for event in events] == [None] * 5 + ["stop"]
    assert (usage["choices"], usage["usage"], usage["service_tier"]) == ([], USAGE, "priority")
    heads = {(event["id"], event["created"], event["model"], event["object"]) for event in [*events, usage]}
    assert len(heads) == 1
    assert heads.pop()[3] == "chat.completion.chunk"


BLOCKS = st.lists(
    st.one_of(
        st.text(max_size=12).map(text),
        st.text(max_size=12).map(thinking),
        st.just({"type": "redacted_thinking", "data": "xyz"}),
        st.tuples(
            st.sampled_from(["toolu_1", "toolu_2"]),
            st.dictionaries(st.text(max_size=4), st.text(max_size=4) | st.integers(0, 99) | st.none(), max_size=3),
        ).map(lambda call: tool_use(call[0], "f", call[1])),
    ),
    max_size=6,
)


@given(BLOCKS, st.integers(1, 9), st.sampled_from(["end_turn", "tool_use", "max_tokens"]))
def test_no_text_is_lost_or_doubled_by_streaming(blocks: list[Body], size: int, stop: str) -> None:
    told = message(stop=stop, usage=COUNTS)
    told["content"] = blocks
    expected = plain(answered(told))
    assembled = plain(chat.assemble(chunks(streamed(told, size))[:-1]))
    for choice in (expected["choices"][0], assembled["choices"][0]):
        for name in ("content", "refusal", "reasoning_content"):
            choice["message"][name] = choice["message"].get(name) or ""
    assert assembled == expected


def test_what_comes_after_the_end_is_not_passed() -> None:
    events = list(streamed(message()))
    assert chunks([*events, *events]) == chunks(events)


def test_a_stream_that_ends_after_its_reason_still_says_its_usage() -> None:
    *events, last = streamed(message())
    assert b"message_stop" in last
    assert chunks(events)[-1]["usage"]["completion_tokens"] == 4


def test_a_stream_that_is_cut_has_no_end() -> None:
    events = list(streamed(message()))
    assert all(event != "[DONE]" and event["choices"][0]["finish_reason"] is None for event in chunks(events[:-2]))


def test_errors_and_nonsense_in_a_stream_are_raised() -> None:
    first = next(iter(streamed(message())))
    with pytest.raises(UpstreamUnavailable):
        chunks([first, typed.write(error("overloaded_error", "Overloaded"))])
    for wrong in (b"data: {no\n\n", b'data: {"type":"content_block_delta"}\n\n', typed.write(
        {"type": "content_block_delta", "index": 7, "delta": {"type": "text_delta", "text": "x"}}
    )):  # fmt: skip
        with pytest.raises(UpstreamInvalid):
            chunks([first, wrong])
    with pytest.raises(UpstreamInvalid):
        chunks([list(streamed(message()))[3]])


# --- the official client -----------------------------------------------------------------------


@pytest.fixture
async def claude() -> AsyncIterator[FakeAnthropic]:
    async with anthropic() as fake:
        yield fake


@pytest.fixture
async def gateway(claude: FakeAnthropic) -> AsyncIterator[Running]:
    async with running(config(claude.url)) as found:
        yield found


async def test_openais_sdk_uses_tools_over_turns_and_keeps_thoughts(claude: FakeAnthropic, gateway: Running) -> None:
    calls = [tool_use("toolu_1", "files_read", {"a": 1}), tool_use("toolu_2", "files_read", {})]
    claude.script(whole(message(thinking(), *calls, stop="tool_use")), stream(message(text("Done."))))
    tools: Any = [{"type": "function", "function": {"name": "files_read", "parameters": {"type": "object"}}}]
    options: Any = {"model": "ours", "tools": tools, "reasoning_effort": "low", "max_completion_tokens": 4000}
    history: list[Any] = [HELLO]
    async with openai_client(gateway) as own:
        first = await own.chat.completions.create(messages=history, **options)
        said = first.choices[0].message
        history.append(said.model_dump(exclude_none=True))
        for call in said.tool_calls or ():
            history.append({"role": "tool", "tool_call_id": call.id, "content": "42"})
        heard, usage = "", None
        async for chunk in await own.chat.completions.create(
            messages=history, stream=True, stream_options={"include_usage": True}, **options
        ):
            heard += chunk.choices[0].delta.content or "" if chunk.choices else ""
            usage = chunk.usage or usage
    assert claude.refused == []
    assert heard == "Done."
    assert usage is not None
    assert usage.prompt_tokens == 9
    sent = claude.requests[1].body["messages"]
    assert sent[1]["content"] == [thinking(), *calls]
    assert [block["tool_use_id"] for block in sent[2]["content"]] == ["toolu_1", "toolu_2"]


@pytest.mark.parametrize(
    ("path", "fields", "most", "params", "sent", "budget"),
    [
        ("chat/completions", {"reasoning_effort": "high"}, 8000, {}, 8000, 4000),
        ("chat/completions", {"reasoning_effort": "low"}, 8000, {}, 8000, 1024),
        ("chat/completions", {"reasoning_effort": "high", "max_tokens": 20_000}, 60_000, {}, 20_000, 10_000),
        ("chat/completions", {"reasoning_effort": "medium"}, 60_000, {"max_tokens": 3000}, 3000, 1500),
        ("chat/completions", {"reasoning_effort": "medium"}, 60_000, {"max_tokens": 2000}, 2000, None),
        ("chat/completions", {"reasoning_effort": "low"}, 2000, {}, 2000, None),
        ("chat/completions", {"reasoning_effort": "low", "max_tokens": 2048}, 8000, {}, 2048, 1024),
        ("chat/completions", {"reasoning_effort": "low", "max_tokens": 2047}, 8000, {}, 2047, None),
        # A budget of the client's own is as large as it says, if it may.
        ("chat/completions", {"thinking": {"type": "enabled", "budget_tokens": 9000}}, 8000, {}, 8000, 7999),
        ("chat/completions", {"thinking": {"type": "enabled", "budget_tokens": 6000}}, 8000, {}, 8000, 6000),
        ("responses", {"reasoning": {"effort": "high"}}, 8000, {}, 8000, 4000),
    ],
)
async def test_half_of_what_is_sent_as_the_limit_is_for_the_answer(
    claude: FakeAnthropic,
    path: str,
    fields: dict[str, Any],
    most: int,
    params: dict[str, Any],
    sent: int,
    budget: int | None,
) -> None:
    content = json.loads(config(claude.url))
    model = content["models"]["ours"]
    model["max_output_tokens"], model["targets"][0]["params"] = most, params
    given = {"input": "Hello"} if path == "responses" else {"messages": [HELLO]}
    async with running(json.dumps(content)) as gateway:
        answer = await gateway.post(f"/v1/{path}", {"model": "ours", **given, **fields})
        assert answer.status == 200, answer.text
    body = claude.requests[0].body
    assert (body["max_tokens"], body.get("thinking", {}).get("budget_tokens")) == (sent, budget)
    assert claude.refused == []


async def test_openais_sdk_parses_an_answer_that_fits_a_schema(claude: FakeAnthropic, gateway: Running) -> None:
    from pydantic import BaseModel

    class Answer(BaseModel):
        city: str

    claude.script(whole(message(text('{"city":"Oslo"}'))))
    async with openai_client(gateway) as own:
        answer = await own.chat.completions.parse(
            model="ours", messages=[{"role": "user", "content": "x"}], response_format=Answer
        )
    assert answer.choices[0].message.parsed == Answer(city="Oslo")
    assert claude.requests[0].body["output_config"]["format"]["type"] == "json_schema"


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (failure("rate_limit_error", "x"), openai.RateLimitError),
        (failure("overloaded_error", "x"), openai.InternalServerError),
        (failure("authentication_error", "x"), openai.InternalServerError),
        (failure("not_found_error", "model: x"), openai.NotFoundError),
        (failure("invalid_request_error", "prompt is too long: 9 tokens > 8 maximum"), openai.BadRequestError),
    ],
)
async def test_failures_are_openais_exceptions(
    claude: FakeAnthropic, gateway: Running, answer: Scripted, kind: type[openai.APIStatusError]
) -> None:
    claude.script(answer)
    async with openai_client(gateway) as own:
        with pytest.raises(kind):
            await own.chat.completions.create(model="ours", messages=[{"role": "user", "content": "x"}])


@pytest.mark.parametrize("split", [1, 7, 64])
async def test_bytes_may_come_in_any_pieces(claude: FakeAnthropic, gateway: Running, split: int) -> None:
    claude.script(stream(message(text(TEXT + " ünïcödé")), split=split))
    async with openai_client(gateway) as own:
        heard = [
            chunk.choices[0].delta.content or ""
            async for chunk in await own.chat.completions.create(
                model="ours", messages=[{"role": "user", "content": "x"}], stream=True
            )
        ]
    assert "".join(heard) == TEXT + " ünïcödé"


async def test_a_stream_that_breaks_is_no_success(claude: FakeAnthropic, gateway: Running) -> None:
    claude.script(Scripted(events=list(streamed(message()))[:4]))
    async with openai_client(gateway) as own:
        with pytest.raises(openai.APIError):
            async for _ in await own.chat.completions.create(
                model="ours", messages=[{"role": "user", "content": "x"}], stream=True
            ):
                pass
    assert (await gateway.settled(1))[0].outcome == "failed"
