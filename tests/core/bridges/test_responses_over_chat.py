"""Responses for clients of a provider that speaks chat only: both ways, and as OpenAI's own SDK reads them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp.web
import openai
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from qlens import InvalidRequest, UpstreamInvalid, UpstreamLimited, sse
from qlens.bridges.responses_over_chat import bridge, thoughts
from qlens.dialects import chat, responses
from qlens.testing.upstreams import USAGE, chat_events
from qlens.usage import from_openai, from_responses

Body = dict[str, Any]

GOLDEN = sorted((Path(__file__).parent / "golden" / "responses_over_chat").glob("*.json"))
EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
HEAD = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1700000000, "model": "their-model"}
TOOL = {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {}}}


def asked(given_input: Any = "Hello", **fields: Any) -> Body:
    return {"model": "ours", "input": given_input, **fields}


def chunk(delta: Body, finish: str | None = None, **fields: Any) -> Body:
    return {**HEAD, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **fields}


def completion(message: Body, finish: str = "stop", **fields: Any) -> Body:
    choice = {"index": 0, "message": {"role": "assistant", "content": None, **message}, "finish_reason": finish}
    return {**HEAD, "object": "chat.completion", "choices": [choice], "usage": USAGE, **fields}


def told(chunks: list[Body], body: Body | None = None, *, done: bool = True) -> list[Body]:
    """The events that these chunks become."""
    stream = bridge().stream(body or asked())
    out = b"".join(stream.feed(sse.write(each)) for each in chunks)
    out += stream.feed(sse.DONE) if done else b""
    out += stream.end()
    return [orjson.loads(sse.data(event) or b"") for event in sse.cut(out)]


def tool_delta(index: int, text: str, **fields: Any) -> Body:
    name = {"name": fields.pop("name")} if "name" in fields else {}
    return {"tool_calls": [{"index": index, "function": {**name, "arguments": text}, **fields}]}


def kinds(events: list[Body]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


def refused(body: Body) -> InvalidRequest:
    responses.validate(body)
    with pytest.raises(InvalidRequest) as caught:
        bridge().request(body)
    assert caught.value.code == "unsupported_parameter"
    assert caught.value.param is not None
    assert caught.value.param in caught.value.message
    return caught.value


# --- golden files ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", GOLDEN, ids=[path.stem for path in GOLDEN])
def test_requests_and_events_are_as_they_were_found_right(path: Path) -> None:
    golden = orjson.loads(path.read_bytes())
    responses.validate(golden["asked"])
    sent = bridge().request(golden["asked"])
    chat.validate(sent)
    assert sent == golden["sent"]
    assert told(golden["chunks"], golden["asked"]) == golden["events"]


@pytest.mark.parametrize("path", GOLDEN, ids=[path.stem for path in GOLDEN])
def test_whole_answers_say_what_their_streams_say(path: Path) -> None:
    golden = orjson.loads(path.read_bytes())
    answer = bridge().answer(chat.assemble(golden["chunks"]), golden["asked"])
    assert answer == golden["events"][-1]["response"] == responses.assemble(golden["events"])
    Response.model_validate(answer)


@pytest.mark.parametrize("path", GOLDEN, ids=[path.stem for path in GOLDEN])
def test_every_event_is_one_that_openais_own_types_accept(path: Path) -> None:
    for event in orjson.loads(path.read_bytes())["events"]:
        EVENTS.validate_python(event)


# --- requests ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param", "word"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "input"),
        ({"conversation": "conv_1"}, "conversation", "input"),
        ({"background": True}, "background", "wait"),
        ({"store": True}, "store", "false"),
        ({"prompt": {"id": "p"}}, "prompt", "instructions"),
        ({"context_management": [{"type": "compaction"}]}, "context_management", "shorten"),
        ({"n": 2}, "n", "chat"),
        ({"max_tokens": 10**9}, "max_tokens", "chat"),
        ({"of_tomorrow": 1}, "of_tomorrow", "chat"),
        ({"tools": [TOOL, {"type": "web_search"}]}, "tools[1].type", "web_search"),
        ({"tools": [{"type": "file_search", "vector_store_ids": []}]}, "tools[0].type", "file_search"),
        ({"tools": [{"type": "computer_use_preview"}]}, "tools[0].type", "computer_use_preview"),
        ({"tools": [{"type": "code_interpreter", "container": "c"}]}, "tools[0].type", "code_interpreter"),
        ({"tools": [{"type": "mcp", "server_label": "s"}]}, "tools[0].type", "mcp"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice.type", "web_search"),
        ({"tool_choice": {"type": "allowed_tools", "tools": [{"type": "mcp"}]}}, "tool_choice.tools[0]", "tool"),
        ({"reasoning": {"mode": "pro"}}, "reasoning.mode", "mode"),
        ({"text": {"format": {"type": "of_tomorrow"}}}, "text.format.type", "of_tomorrow"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]", "item itself"),
        ({"input": [{"id": "msg_1"}]}, "input[0]", "item itself"),
        ({"input": [{"type": "web_search_call", "id": "ws_1"}]}, "input[0].type", "web_search_call"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0]", "call_id"),
    ],
)
def test_what_needs_more_than_chat_is_refused_by_its_name_with_a_way_out(fields: Body, param: str, word: str) -> None:
    error = refused(asked(**{"input": "Hello", **fields}) if "input" not in fields else {"model": "ours", **fields})
    assert error.param == param
    assert word in error.message


@pytest.mark.parametrize(
    ("part", "param"),
    [
        ({"type": "input_image", "file_id": "file-1"}, "file_id"),
        ({"type": "input_image"}, ""),
        ({"type": "input_file", "file_url": "https://example.com/a.pdf"}, "file_url"),
        ({"type": "computer_screenshot", "image_url": "x"}, "type"),
    ],
)
def test_content_that_chat_has_no_place_for_is_refused_where_it_stands(part: Body, param: str) -> None:
    place = "input[0].content[0]" + (f".{param}" if param else "")
    assert refused(asked([{"role": "user", "content": [part]}])).param == place


@pytest.mark.parametrize(
    "fields",
    [
        {"store": False, "background": False, "previous_response_id": None, "conversation": None},
        {"truncation": "auto", "max_tool_calls": 3, "metadata": {"a": "b"}},
        {"include": ["reasoning.encrypted_content", "web_search_call.action.sources"]},
        {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True},
        {"tools": None, "tool_choice": "none", "text": {"format": {"type": "text"}}},
        {"reasoning": {"summary": "auto", "effort": None}, "top_logprobs": 0},
        {"text": None, "reasoning": None, "instructions": ""},
    ],
)
def test_what_says_nothing_to_the_model_is_not_sent(fields: Body) -> None:
    sent = bridge().request(asked(**fields))
    assert sent == {"model": "ours", "messages": [{"role": "user", "content": "Hello"}]}


def test_nothing_to_read_is_no_request() -> None:
    with pytest.raises(InvalidRequest) as caught:
        bridge().request(asked([]))
    assert (caught.value.param, caught.value.code) == ("input", "empty_array")
    assert bridge().request(asked([], instructions="Begin."))["messages"][0]["content"] == "Begin."


def test_a_stream_is_asked_for_its_usage() -> None:
    sent = bridge().request(asked(stream=True, stream_options={"include_obfuscation": False}))
    assert sent["stream_options"] == {"include_usage": True}


def test_the_request_shares_nothing_with_the_clients_body() -> None:
    golden = orjson.loads(next(path for path in GOLDEN if path.stem == "tools").read_bytes())
    before = orjson.dumps(golden["asked"])
    sent = bridge().request(golden["asked"])
    for node in nodes(sent):
        node.clear()
    assert orjson.dumps(golden["asked"]) == before


def nodes(node: Any) -> Iterator[Any]:
    if type(node) in (dict, list):
        for child in list(node.values() if type(node) is dict else node):
            yield from nodes(child)
        yield node


@pytest.mark.parametrize(
    ("choice", "sent"),
    [
        ("required", "required"),
        ({"type": "function", "name": "f"}, {"type": "function", "function": {"name": "f"}}),
        ({"type": "custom", "name": "c"}, {"type": "custom", "custom": {"name": "c"}}),
        ({"type": "allowed_tools"}, {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "f"}]},
            {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "f"}}]},
            },
        ),
    ],
)
def test_a_choice_of_tools_is_said_in_chats_way(choice: Any, sent: Any) -> None:
    assert bridge().request(asked(tools=[TOOL], tool_choice=choice))["tool_choice"] == sent


def test_what_the_model_said_in_one_turn_is_one_message_even_if_a_call_came_first() -> None:
    call = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
    said = {"role": "assistant", "content": [{"type": "output_text", "text": "one"}]}
    refusal = {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}], "phase": "commentary"}
    result = {"type": "function_call_output", "call_id": "c1", "output": "42"}
    messages = bridge().request(asked([said, call, refusal, result, said, said]))["messages"]
    assert [message["role"] for message in messages] == ["assistant", "tool", "assistant"]
    assert messages[0]["content"] == [{"type": "text", "text": "one"}, {"type": "refusal", "refusal": "no"}]
    assert messages[0]["tool_calls"][0]["id"] == "c1"
    assert messages[2]["content"] == [{"type": "text", "text": "one"}, {"type": "text", "text": "one"}]


# --- thoughts ----------------------------------------------------------------------------------


def test_signed_thoughts_come_back_to_the_provider_as_they_were() -> None:
    signed = [
        {"type": "thinking", "thinking": "Because.", "signature": "sig"},
        {"type": "redacted_thinking", "data": "opaque"},
    ]
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    message = {"reasoning_content": "Because.", "thinking_blocks": signed, "tool_calls": [call]}
    answer = bridge().answer(completion(message, "tool_calls"), asked())
    result = {"type": "function_call_output", "call_id": "call_1", "output": "sun"}
    again = bridge().request(asked([{"role": "user", "content": "Hello"}, *answer["output"], result]))
    assert again["messages"][1] == {
        "role": "assistant",
        "content": None,
        "thinking_blocks": signed,
        "tool_calls": [call],
    }


@pytest.mark.parametrize(
    "content",
    [
        "gAAAAA-what-openai-encrypts",
        "qlens-thoughts-1.not base64",
        "qlens-thoughts-1.e30=",
        thoughts.closed([{"type": "thinking", "thinking": "made up", "signature": ""}, "x", {"type": "text"}]),
    ],
)
def test_thoughts_that_the_provider_cannot_know_as_its_own_are_left_out(content: str) -> None:
    item = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": content}
    sent = bridge().request(asked([item, {"role": "assistant", "content": "So."}]))
    assert sent["messages"] == [{"role": "assistant", "content": "So."}]


def test_thoughts_without_a_word_are_still_an_item() -> None:
    redacted = {"type": "redacted_thinking", "data": "opaque"}
    events = told([chunk({"thinking_blocks": [redacted]}), chunk({"content": "So."}), chunk({}, "stop")])
    reasoning, message = events[-1]["response"]["output"]
    assert thoughts.opened(reasoning["encrypted_content"]) == [redacted]
    assert (reasoning["summary"], message["content"][0]["text"]) == ([], "So.")


# --- answers -----------------------------------------------------------------------------------


def test_ids_are_the_same_for_the_same_answer_and_differ_between_answers() -> None:
    one, same = (bridge().answer(completion({"content": "Hi"}), asked()) for _ in range(2))
    other = bridge().answer(completion({"content": "Hi"}, id="chatcmpl-2"), asked())
    assert one == same
    assert one["id"].startswith("resp_")
    assert one["output"][0]["id"].startswith("msg_")
    assert {one["id"], one["output"][0]["id"]}.isdisjoint({other["id"], other["output"][0]["id"]})


def test_an_answer_without_an_id_or_a_model_is_told_by_what_was_asked() -> None:
    bare = {name: value for name, value in completion({"content": "Hi"}).items() if name not in {"id", "model"}}
    one, same, other = (bridge().answer(bare, asked(text)) for text in ("one", "one", "other"))
    assert one == same
    assert one["id"] != other["id"]
    assert one["model"] == "ours"


def test_the_answer_repeats_what_was_asked_and_openais_defaults_for_the_rest() -> None:
    fields: Body = {
        "instructions": "Be kind.",
        "temperature": 0,
        "top_p": 0.5,
        "max_output_tokens": 100,
        "parallel_tool_calls": False,
        "tool_choice": "required",
        "tools": [{"type": "function", "name": "f", "description": "d", "parameters": {}, "strict": True}],
        "text": {"format": {"type": "json_object"}, "verbosity": "low"},
        "reasoning": {"effort": "low", "summary": "auto"},
        "metadata": {"a": "b"},
        "user": "u",
    }
    answer = bridge().answer(completion({"content": "Hi"}), asked(**fields))
    assert {name: answer[name] for name in fields} == fields
    plain = bridge().answer(completion({"content": "Hi"}), asked(temperature=None))
    assert {name: plain[name] for name in fields} == {
        "instructions": None,
        "temperature": 1.0,
        "top_p": 1.0,
        "max_output_tokens": None,
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "text": {"format": {"type": "text"}},
        "reasoning": {"effort": None, "summary": None},
        "metadata": {},
        "user": None,
    }
    assert (plain["store"], plain["truncation"]) == (False, "disabled")


def test_a_token_without_text_keeps_its_log_probability() -> None:
    spelled = {"content": [{"token": "<|end|>", "logprob": -0.5, "bytes": None, "top_logprobs": None}]}
    silent = {"index": 0, "delta": {"content": ""}, "logprobs": spelled, "finish_reason": None}
    events = told([chunk({"content": "Hi"}), {**HEAD, "choices": [silent]}, chunk({}, "stop")])
    (part,) = events[-1]["response"]["output"][0]["content"]
    assert part["logprobs"] == [{"token": "<|end|>", "logprob": -0.5, "bytes": [], "top_logprobs": []}]


@pytest.mark.parametrize(
    ("usage", "counts"),
    [({"prompt_tokens": 3}, (3, 0, 3)), ({"completion_tokens": 2, "prompt_tokens": None}, (0, 2, 2))],
)
def test_counts_that_are_missing_are_none(usage: Body, counts: tuple[int, int, int]) -> None:
    found = bridge().answer(completion({"content": "Hi"}, usage=usage), asked())["usage"]
    assert (found["input_tokens"], found["output_tokens"], found["total_tokens"]) == counts


def test_every_count_of_the_usage_arrives() -> None:
    usage = {
        "prompt_tokens": 100,
        "completion_tokens": 50,
        "prompt_tokens_details": {
            "cached_tokens": 10,
            "cache_write_tokens": 20,
            "cache_write_1h_tokens": 5,
            "audio_tokens": 3,
            "text_tokens": None,
        },
        "completion_tokens_details": {"reasoning_tokens": 30, "audio_tokens": 2},
    }
    answer = bridge().answer(completion({"content": "Hi"}, usage=usage, service_tier="flex"), asked())
    assert from_responses(answer["usage"], answer["service_tier"]) == from_openai(usage, "flex")
    assert answer["usage"]["total_tokens"] == 150


def test_usage_that_is_not_known_is_null() -> None:
    assert told([chunk({"content": "Hi"}, "stop")])[-1]["response"]["usage"] is None


def test_usage_beside_a_choice_counts_and_running_totals_do_not_add_up() -> None:
    totals = [{"prompt_tokens": 9, "completion_tokens": count, "total_tokens": 9 + count} for count in (1, 4)]
    chunks = [chunk({"content": "Hi"}, usage=totals[0]), chunk({}, "stop", usage=totals[1])]
    usage = told(chunks)[-1]["response"]["usage"]
    assert (usage["input_tokens"], usage["output_tokens"], usage["total_tokens"]) == (9, 4, 13)


def test_a_model_that_says_nothing_gives_an_empty_message() -> None:
    assert bridge().answer(completion({"content": ""}), asked())["output"][0]["content"][0]["text"] == ""


def test_a_model_that_only_thought_before_it_was_cut_off_gives_no_message() -> None:
    answer = bridge().answer(completion({"reasoning_content": "Hm"}, "length"), asked())
    assert [item["type"] for item in answer["output"]] == ["reasoning"]
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"}


def test_a_call_that_was_cut_off_is_incomplete_and_keeps_its_text() -> None:
    events = told([chunk(tool_delta(0, '{"a"', id="c", name="f")), chunk({}, "length")])
    (call,) = events[-1]["response"]["output"]
    assert (call["status"], call["arguments"], events[-1]["type"]) == ("incomplete", '{"a"', "response.incomplete")


def test_answer_without_a_choice_is_the_providers_mistake() -> None:
    with pytest.raises(UpstreamInvalid):
        bridge().answer({**HEAD, "choices": []}, asked())


# --- streams -----------------------------------------------------------------------------------


def test_nothing_ends_before_the_usage_is_there() -> None:
    stream = bridge().stream(asked())
    before = b"".join(stream.feed(sse.write(each)) for each in [chunk({"content": "Hi"}), chunk({}, "stop")])
    assert b"response.completed" not in before
    assert stream.feed(sse.write({**HEAD, "choices": [], "usage": USAGE})) == b""
    assert b"response.completed" in stream.feed(sse.DONE)
    assert stream.feed(sse.DONE) == stream.end() == b""


def test_a_stream_without_an_end_mark_ends_if_the_model_had_stopped() -> None:
    chunks = [chunk({"content": "Hi"}), chunk({}, "stop")]
    assert kinds(told(chunks, done=False))[-1] == "completed"
    assert kinds(told(chunks[:1], done=False))[-1] == "output_text.delta"


def test_comments_pass_and_empty_events_do_not() -> None:
    stream = bridge().stream(asked())
    assert stream.feed(b": keep-alive\n\n") == b": keep-alive\n\n"
    assert stream.feed(b"data:\n\n") == b""


@pytest.mark.parametrize("event", [b"data: {\n\n", b"data: [1]\n\n"])
def test_what_is_no_chunk_is_the_providers_mistake(event: bytes) -> None:
    with pytest.raises(UpstreamInvalid):
        bridge().stream(asked()).feed(event)


def test_an_error_in_the_stream_is_raised_as_what_it_means() -> None:
    stream = bridge().stream(asked())
    stream.feed(sse.write(chunk({"content": "Hi"})))
    with pytest.raises(UpstreamLimited):
        stream.feed(sse.write({"error": {"message": "slow down", "code": "rate_limit_exceeded"}}))


def test_calls_in_turn_are_events_in_turn() -> None:
    chunks = [
        chunk(tool_delta(0, "", id="c0", name="f")),
        chunk(tool_delta(0, '{"a":1}')),
        chunk(tool_delta(1, '{"b":2}', id="c1", name="g")),
        chunk({}, "tool_calls"),
    ]
    assert kinds(told(chunks))[2:-1] == [
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"),
    ]


def test_calls_that_grow_side_by_side_lose_nothing() -> None:
    chunks = [
        chunk(tool_delta(0, '{"a', id="c0", name="f")),
        chunk(tool_delta(1, '{"b', id="c1", name="g")),
        chunk(tool_delta(0, '":1}')),
        chunk(tool_delta(1, '":2}')),
        chunk({}, "tool_calls"),
    ]
    calls = told(chunks)[-1]["response"]["output"]
    assert [(call["call_id"], call["name"], call["arguments"]) for call in calls] == [
        ("c0", "f", '{"a":1}'),
        ("c1", "g", '{"b":2}'),
    ]


def test_calls_without_an_index_or_an_id_are_told_apart() -> None:
    parts = [
        {"id": "c0", "function": {"name": "f", "arguments": ""}},
        {"function": {"arguments": '{"a":1}'}},
        {"id": "c1", "function": {"name": "g", "arguments": "{}"}},
    ]
    calls = told([*(chunk({"tool_calls": [part]}) for part in parts), chunk({}, "tool_calls")])[-1]["response"][
        "output"
    ]
    assert [(call["call_id"], call["arguments"]) for call in calls] == [("c0", '{"a":1}'), ("c1", "{}")]
    nameless = told([chunk(tool_delta(0, "{}", name="f")), chunk({}, "tool_calls")])[-1]["response"]["output"]
    assert nameless[0]["call_id"].startswith("call_")


@pytest.mark.parametrize(
    "chunks",
    [
        [chunk(tool_delta(0, "{}", id="c0"))],
        [
            chunk(tool_delta(0, "{}", id="c0", name="f")),
            chunk(tool_delta(1, "", id="c1", name="g")),
            chunk(tool_delta(0, "{}")),
        ],
    ],
    ids=["no name", "after its end"],
)
def test_calls_that_make_no_sense_are_the_providers_mistake(chunks: list[Body]) -> None:
    with pytest.raises(UpstreamInvalid):
        told(chunks)


def test_text_after_a_call_is_a_message_of_its_own() -> None:
    chunks = [
        chunk({"content": "one"}),
        chunk(tool_delta(0, "{}", id="c0", name="f")),
        chunk({"content": "two"}),
        chunk({}, "tool_calls"),
    ]
    output = told(chunks)[-1]["response"]["output"]
    assert [item["type"] for item in output] == ["message", "function_call", "message"]
    assert [item["content"][0]["text"] for item in output[::2]] == ["one", "two"]


def test_other_choices_and_odd_content_do_no_harm() -> None:
    other = {"index": 1, "delta": {"content": "no"}, "finish_reason": None}
    parts = [{"type": "text", "text": "Hi"}, {"type": "of_tomorrow"}, "x"]
    chunks = [{**HEAD, "choices": [other]}, chunk({"content": parts}), chunk({"tool_calls": [None]}), chunk({}, "stop")]
    (message,) = told(chunks)[-1]["response"]["output"]
    assert message["content"][0]["text"] == "Hi"


# Pieces as providers send them: what is said, thought, refused, and given to tools, in any order and cut anywhere.
PIECES = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["content", "reasoning_content", "refusal"]), st.text(max_size=5)),
        st.tuples(st.integers(0, 2), st.text(alphabet='{}":a1', max_size=5)),
    ),
    max_size=30,
)


def chunks_of(pieces: list[tuple[str | int, str]]) -> list[Body]:
    seen: set[int] = set()
    made = []
    for kind, text in pieces:
        if isinstance(kind, str):
            made.append(chunk({kind: text}))
        elif kind in seen:
            made.append(chunk(tool_delta(kind, text)))
        else:
            seen.add(kind)
            # The beginning of no JSON, so that no call is whole before its end.
            made.append(chunk(tool_delta(kind, "<" + text, id=f"c{kind}", name="f")))
    return [chunk({"role": "assistant", "content": ""}), *made, chunk({}, "stop")]


@given(PIECES)
def test_no_text_is_lost_or_doubled_and_the_events_hold_together(pieces: list[tuple[str | int, str]]) -> None:
    events = told(chunks_of(pieces))
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    output = events[-1]["response"]["output"]
    texts: dict[str, str] = {}
    for kind, text in pieces:
        texts[f"{kind}"] = texts.get(f"{kind}", "<" if isinstance(kind, int) else "") + text
    for kind, field in (("content", "text"), ("reasoning_content", "text"), ("refusal", "refusal")):
        name = {"content": "output_text", "reasoning_content": "reasoning_text"}.get(kind, kind)
        parts = [part for item in output for part in item.get("content", ()) if part["type"] == name]
        assert "".join(part[field] for part in parts) == texts.get(kind, "")
    for item in output:
        if item["type"] == "function_call":
            assert item["arguments"] == texts[item["call_id"].removeprefix("c")]
    assert responses.assemble(events) == events[-1]["response"]
    check_order(events)


def check_order(events: list[Body]) -> None:
    """What begins ends, once, after its beginning; and deltas add up to what their ends say."""
    added: dict[int, Body] = {}
    deltas: dict[tuple[int, int], str] = {}
    done: set[int] = set()
    for event in events[2:-1]:
        kind, index = event["type"], event["output_index"]
        if kind == "response.output_item.added":
            assert index == len(added)
            added[index] = event["item"]
            continue
        assert index in added
        assert index not in done
        at = (index, event.get("content_index", 0))
        if kind == "response.output_item.done":
            assert event["item"]["id"] == added[index]["id"]
            done.add(index)
        elif kind.endswith(".delta"):
            deltas[at] = deltas.get(at, "") + event["delta"]
        elif kind.endswith((".text.done", "_text.done", "refusal.done", "arguments.done")):
            said = next(event[name] for name in ("text", "refusal", "arguments") if name in event)
            assert deltas.get(at, "") == said
    assert done == added.keys()


@given(PIECES, st.data())
def test_events_do_not_depend_on_how_the_bytes_arrive(pieces: list[tuple[str | int, str]], data: st.DataObject) -> None:
    raw = b"".join([*map(sse.write, chunks_of(pieces)), sse.DONE])
    whole = bridge().stream(asked())
    expected = b"".join(map(whole.feed, sse.cut(raw)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=8)))
    splitter, stream, found = sse.Splitter(), bridge().stream(asked()), b""
    for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True):
        found += b"".join(map(stream.feed, splitter.feed(raw[start:end])))
    assert found == expected


@given(st.text(), st.text(), st.lists(st.text(min_size=1, max_size=9), max_size=3))
def test_an_answer_sent_back_is_the_message_it_was(said: str, thought: str, names: list[str]) -> None:
    calls = [
        {"id": f"call_{at}", "type": "function", "function": {"name": name, "arguments": "{}"}}
        for at, name in enumerate(names)
    ]
    message = {"content": said, "reasoning_content": thought, **({"tool_calls": calls} if calls else {})}
    answer = bridge().answer(completion(message), asked())
    (again,) = bridge().request(asked(answer["output"]))["messages"]
    expected = {"role": "assistant", "content": said if said or not calls else None}
    assert again == {**expected, **({"tool_calls": calls} if calls else {})}


# --- OpenAI's SDK ------------------------------------------------------------------------------


@asynccontextmanager
async def served(answer: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    """OpenAI's client in front of the bridge; `answer` is a chat completion, or the events of a stream of chat."""

    async def handle(request: aiohttp.web.Request) -> aiohttp.web.Response:
        body = await request.json()
        responses.validate(body)
        chat.validate(bridge().request(body))
        if not body.get("stream"):
            return aiohttp.web.json_response(bridge().answer(answer, body))
        stream = bridge().stream(body)
        events = [sse.write(event) if isinstance(event, dict) else sse.DONE for event in answer]
        content = b"".join([*map(stream.feed, events), stream.end()])
        return aiohttp.web.Response(body=content, headers={"content-type": "text/event-stream"})

    app = aiohttp.web.Application()
    app.router.add_post("/v1/responses", handle)
    runner = aiohttp.web.AppRunner(app)
    await runner.setup()
    try:
        site = aiohttp.web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        async with openai.AsyncOpenAI(
            api_key="sk-example-client", base_url=f"http://127.0.0.1:{port}/v1", max_retries=0
        ) as client:
            yield client
    finally:
        await runner.cleanup()


class Forecast(BaseModel):
    city: str
    sunny: bool


async def test_openais_sdk_reads_an_answer_with_its_usage() -> None:
    async with served(completion({"content": "Hello."})) as client:
        answer = await client.responses.create(model="ours", input="Hello", instructions="Be kind.")
    assert (answer.output_text, answer.status, answer.instructions) == ("Hello.", "completed", "Be kind.")
    assert answer.usage is not None
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (9, 4)


async def test_openais_sdk_reads_a_stream_to_its_end() -> None:
    async with served(chat_events(usage=USAGE)) as client:
        stream = await client.responses.create(model="ours", input="Hello", stream=True)
        events = [event async for event in stream]
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    end = events[-1]
    assert end.type == "response.completed"
    assert text == end.response.output_text == "Hello from upstream."
    assert end.response.usage is not None
    assert end.response.usage.total_tokens == 13


async def test_openais_stream_helper_puts_an_answer_together_and_parses_it() -> None:
    text = '{"city":"Paris","sunny":true}'
    async with (
        served(chat_events(text.replace(",", ", "), usage=USAGE)) as client,
        client.responses.stream(model="ours", input="Paris?", text_format=Forecast) as stream,
    ):
        seen = [event.type async for event in stream]
        final = await stream.get_final_response()
    assert final.output_parsed == Forecast(city="Paris", sunny=True)
    assert seen[0] == "response.created"
    assert seen[-1] == "response.completed"


async def test_openais_sdk_parses_a_structured_answer_and_the_arguments_of_a_call() -> None:
    async with served(completion({"content": '{"city":"Paris","sunny":true}'})) as client:
        parsed = await client.responses.parse(model="ours", input="Paris?", text_format=Forecast)
    assert parsed.output_parsed == Forecast(city="Paris", sunny=True)
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "Forecast", "arguments": '{"city":"P","sunny":true}'},
    }
    tool = openai.pydantic_function_tool(Forecast)["function"]
    flat: Any = {"type": "function", **tool}
    chunks = list(chat.explode(completion({"tool_calls": [call]}, "tool_calls")))
    async with (
        served(chunks) as client,
        client.responses.stream(model="ours", input="Paris?", tools=[flat]) as stream,
    ):
        final = await stream.get_final_response()
    (item,) = final.output
    assert item.type == "function_call"
    assert (item.call_id, item.parsed_arguments) == ("call_1", {"city": "P", "sunny": True})


async def test_openais_sdk_carries_a_conversation_with_thoughts_and_tools_over_turns() -> None:
    signed = {"type": "thinking", "thinking": "Look.", "signature": "sig"}
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    message = {"reasoning_content": "Look.", "thinking_blocks": [signed], "tool_calls": [call]}
    async with served(list(chat.explode(completion(message, "tool_calls")))) as client:
        turns: list[Any] = [{"role": "user", "content": "Weather?"}]
        async with client.responses.stream(model="ours", input=turns, tools=[TOOL]) as stream:  # type: ignore[list-item]
            first = await stream.get_final_response()
    turns += [item.model_dump(exclude_none=True) for item in first.output]
    turns.append({"type": "function_call_output", "call_id": "call_1", "output": "sun"})
    body = asked([{name: turn[name] for name in turn if name != "parsed_arguments"} for turn in turns])
    responses.validate(body)
    sent = bridge().request(body)["messages"]
    assert sent == [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "thinking_blocks": [signed], "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sun"},
    ]
