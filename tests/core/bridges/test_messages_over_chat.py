"""A client of messages over a provider of chat: every field there and back, whole and streamed."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

import anthropic
import orjson
import pytest
from claudes import anthropic_client, compatible
from hypothesis import given
from hypothesis import strategies as st

from qlens import InvalidRequest, UpstreamInvalid, UpstreamLimited, sse
from qlens.bridges import between
from qlens.bridges.messages_over_chat import without_extensions
from qlens.bridges.messages_over_chat.answer import called, said
from qlens.dialects import Body, chat, messages
from qlens.testing import Running, Scripted, running, upstream
from qlens.testing.anthropic import thinking
from qlens.testing.upstreams import FakeUpstream, chat_events
from qlens.testing.upstreams import error as openai_error

FOLDER = Path(__file__).parent / "golden/messages_over_chat"
GOLDEN = json.loads((FOLDER / "requests.json").read_text())
ANSWERS = json.loads((FOLDER / "answers.json").read_text())
HELLO: dict[str, Any] = {"role": "user", "content": "Hello"}
BODY: dict[str, Any] = {"model": "gpt", "max_tokens": 100, "messages": [HELLO]}
HEAD = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "gpt-4o"}
USAGE = {
    "prompt_tokens": 42,
    "completion_tokens": 50,
    "total_tokens": 92,
    "prompt_tokens_details": {"cached_tokens": 7, "cache_write_tokens": 30, "cache_write_1h_tokens": 20},
    "completion_tokens_details": {"reasoning_tokens": 30},
}
COUNTS = {
    "input_tokens": 5,
    "cache_creation_input_tokens": 30,
    "cache_read_input_tokens": 7,
    "output_tokens": 50,
    "cache_creation": {"ephemeral_5m_input_tokens": 10, "ephemeral_1h_input_tokens": 20},
    "output_tokens_details": {"thinking_tokens": 30},
    "server_tool_use": None,
    "inference_geo": None,
    "service_tier": None,
}


def bridge() -> Any:
    found = between("messages", "chat")
    assert found is not None
    return found


def asked(**fields: Any) -> Body:
    return {**BODY, **fields}


def content(*blocks: Any) -> Body:
    return asked(messages=[{"role": "user", "content": list(blocks)}])


def completion(finish: str = "stop", usage: Body | None = None, **fields: Any) -> Body:
    choice = {"index": 0, "message": {"role": "assistant", "content": None, **fields}, "finish_reason": finish}
    return {**HEAD, "choices": [choice], **({"usage": usage} if usage else {})}


def call(identifier: str, name: str, arguments: str) -> Body:
    return {"id": identifier, "type": "function", "function": {"name": name, "arguments": arguments}}


def answered(told: Body, **fields: Any) -> Body:
    found: Body = bridge().answer(told, asked(**fields))
    return found


def events(chunks: Iterable[Any], **fields: Any) -> list[Body]:
    translation = bridge().stream(asked(**fields))
    raw = b"".join(translation.feed(chunk if isinstance(chunk, bytes) else sse.write(chunk)) for chunk in chunks)
    raw += translation.end()
    found = []
    for event in sse.cut(raw):
        payload = orjson.loads(sse.data(event) or b"")
        assert event.startswith(b"event: %b\n" % payload["type"].encode())
        found.append(payload)
    return found


def streamed(told: Body) -> list[Any]:
    """The chunks that tell a completion, with the end mark."""
    return [*chat.explode(told), sse.DONE]


def delta(finish: str | None = None, **fields: Any) -> Body:
    return {**HEAD, "choices": [{"index": 0, "delta": fields, "finish_reason": finish}]}


# --- requests ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GOLDEN, ids=[case["case"] for case in GOLDEN])
def test_messages_are_written_as_a_chat(case: dict[str, Any]) -> None:
    given = deepcopy(case["client"])
    assert bridge().request(given) == case["provider"]
    assert given == case["client"]
    chat.validate(case["provider"])


def test_a_provider_that_knows_only_openais_fields_gets_no_others() -> None:
    for case in GOLDEN:
        plain = orjson.dumps(without_extensions(case["provider"])).decode()
        assert not any(name in plain for name in ('"cache_control"', '"thinking_blocks"', '"top_k"', '"thinking"'))
    bare = {"model": "gpt", "messages": [HELLO, {"role": "user", "content": [{"type": "text", "text": "a"}]}]}
    assert without_extensions(bare) == bare


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (asked(max_tokens=0), "max_tokens"),
        (asked(stop_sequences=["a", "b", "c", "d", "e"]), "stop_sequences"),
        (asked(container="c"), "container"),
        (asked(mcp_servers=[{"url": "x"}]), "mcp_servers"),
        (asked(inference_geo="us"), "inference_geo"),
        (asked(what_comes_tomorrow=1), "what_comes_tomorrow"),
        (asked(tools=[{"type": "web_search_20260318", "name": "web_search"}]), "tools[0].type"),
        (content({"type": "image", "source": {"type": "file", "file_id": "f"}}),
         "messages[0].content[0].source.file_id"),
        (content({"type": "document", "source": {"type": "url", "url": "https://example.com/a.pdf"}}),
         "messages[0].content[0].source.type"),
        (content({"type": "document", "citations": {"enabled": True}, "source": {"type": "text", "data": "x"}}),
         "messages[0].content[0].citations"),
        (content({"type": "container_upload", "file_id": "f"}), "messages[0].content[0].type"),
        (content({"type": "tool_result", "tool_use_id": "a", "content": [{"type": "tool_reference"}]}),
         "messages[0].content[0].content[0].type"),
        (asked(messages=[HELLO, {"role": "assistant", "content": [{"type": "server_tool_use"}]}]),
         "messages[1].content[0].type"),
    ],
)  # fmt: skip
def test_what_cannot_be_said_is_refused_by_the_clients_own_field(body: Body, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        bridge().request(body)
    assert caught.value.param == param


# --- answers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ANSWERS, ids=[case["case"] for case in ANSWERS])
def test_answers_and_streams_are_what_they_were(case: dict[str, Any]) -> None:
    """The wire, event by event: `chunks` is what the provider writes, `events` what the client reads."""
    assert bridge().answer(case["provider"], case["asked"]) == case["client"]
    assert events([chunk.encode() for chunk in case["chunks"]], **case["asked"]) == case["events"]


def test_an_answer_is_a_message() -> None:
    told = completion("tool_calls", USAGE, content="I look.", tool_calls=[call("call_1", "f", '{"a":1}')])
    assert answered({**told, "service_tier": "default"}) == {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "gpt-4o",
        "content": [said("I look."), called("call_1", "f", {"a": 1})],
        "stop_reason": "tool_use",
        "stop_sequence": None,
        "stop_details": None,
        "container": None,
        "usage": {**COUNTS, "service_tier": "standard"},
    }


@pytest.mark.parametrize(
    ("finish", "stop"),
    [
        ("stop", "end_turn"),
        ("length", "max_tokens"),
        ("content_filter", "refusal"),
        ("what_comes_tomorrow", "end_turn"),
    ],
)
def test_reasons_to_stop(finish: str, stop: str) -> None:
    told = completion(finish, content="x")
    assert answered(told)["stop_reason"] == stop
    assert events(streamed(told))[-2]["delta"]["stop_reason"] == stop


def test_the_stop_sequence_is_told_where_the_server_says_it() -> None:
    told = completion(content="x")
    told["choices"][0]["stop_reason"] = "END"
    assert answered(told, stop_sequences=["END"])["stop_sequence"] == "END"
    assert answered(told, stop_sequences=["END"])["stop_reason"] == "stop_sequence"
    assert answered(told)["stop_reason"] == "end_turn"
    assert events(streamed(told), stop_sequences=["END"])[-2]["delta"] == {
        "stop_reason": "stop_sequence",
        "stop_sequence": "END",
    }


def test_signed_thoughts_come_back_as_they_were_and_others_unsigned() -> None:
    signed = completion(content="x", reasoning_content="hm", thinking_blocks=[thinking("hm")])
    assert answered(signed)["content"] == [thinking("hm"), said("x")]
    assert messages.assemble(events(streamed(signed)))["content"] == [thinking("hm"), said("x")]
    unsigned = completion(content="x", reasoning_content="hm")
    expected = [{"type": "thinking", "thinking": "hm", "signature": ""}, said("x")]
    assert answered(unsigned)["content"] == expected
    assert messages.assemble(events(streamed(unsigned)))["content"] == expected


def test_a_refusal_is_what_the_answer_says() -> None:
    told = completion("stop", refusal="I cannot.")
    assert answered(told)["content"] == [said("I cannot.")]
    assert messages.assemble(events(streamed(told)))["content"] == [said("I cannot.")]


@pytest.mark.parametrize(
    ("fields", "stop"),
    [
        ({"refusal": "I cannot."}, "refusal"),
        ({"content": "I", "refusal": " cannot."}, "refusal"),
        ({"content": "I can.", "refusal": None}, "end_turn"),
        ({"content": "I can.", "refusal": ""}, "end_turn"),
    ],
)
async def test_a_refusal_is_why_the_answer_stopped(up: FakeUpstream, gateway: Running, fields: Body, stop: str) -> None:
    told = completion(usage=USAGE, **fields)
    up.script(Scripted(body=told), Scripted(events=streamed(told)))
    options: Any = {"model": "ours", "max_tokens": 100, "messages": [HELLO]}
    async with anthropic_client(gateway) as own:
        whole = await own.messages.create(**options)
        async with own.messages.stream(**options) as events_of:
            assembled = await events_of.get_final_message()
    assert [each.stop_reason for each in (whole, assembled)] == [stop] * 2


def test_arguments_that_are_no_object_are_the_providers_fault_unless_they_were_cut() -> None:
    broken = [call("call_1", "f", '{"a":')]
    with pytest.raises(UpstreamInvalid):
        answered(completion("tool_calls", tool_calls=broken))
    cut = answered(completion("length", tool_calls=broken))
    assert (cut["content"], cut["stop_reason"]) == ([called("call_1", "f", {})], "max_tokens")


@pytest.mark.parametrize("choices", [None, [], [{}], [{"message": {"tool_calls": [1]}}]])
def test_what_is_no_completion_is_the_providers_fault(choices: Any) -> None:
    with pytest.raises(UpstreamInvalid):
        answered({**HEAD, "choices": choices})


# --- streams -----------------------------------------------------------------------------------


def test_a_stream_is_a_stream_of_messages() -> None:
    told = completion("tool_calls", USAGE, content="I look.", tool_calls=[call("call_1", "f", '{"a":1}')])
    found = events(streamed(told))
    assert [(event["type"], event.get("index")) for event in found] == [
        ("message_start", None),
        ("content_block_start", 0),
        ("content_block_delta", 0),
        ("content_block_stop", 0),
        ("content_block_start", 1),
        ("content_block_delta", 1),
        ("content_block_stop", 1),
        ("message_delta", None),
        ("message_stop", None),
    ]
    assert found[0]["message"]["id"] == "msg_1"
    assert found[0]["message"]["content"] == []
    assert found[-2]["usage"] == COUNTS
    assert messages.assemble(found) == answered(told)


CALLS = st.dictionaries(st.text(max_size=4), st.text(max_size=4) | st.integers(0, 99) | st.none(), max_size=3).map(
    lambda given: orjson.dumps(given).decode()
)


@given(st.text(max_size=12), st.text(max_size=12), st.lists(CALLS, max_size=3), st.integers(1, 9))
def test_no_text_is_lost_or_doubled_by_streaming(thought: str, words: str, calls: list[str], size: int) -> None:
    tools = [call(f"call_{at}", "f", arguments) for at, arguments in enumerate(calls)]
    fields: dict[str, Any] = {
        "content": words,
        "reasoning_content": thought,
        **({"tool_calls": tools} if tools else {}),
    }
    told = completion("tool_calls" if tools else "stop", USAGE, **fields)
    assert messages.assemble(events(_in_pieces(streamed(told), size))) == answered(told)


def _in_pieces(chunks: list[Any], size: int) -> list[Any]:
    found: list[Any] = []
    for chunk in chunks:
        given = chunk["choices"][0]["delta"] if isinstance(chunk, dict) and chunk["choices"] else {}
        name = next((name for name in ("content", "reasoning_content") if given.get(name)), None)
        if name is None:
            found.append(chunk)
            continue
        found += [delta(**{name: given[name][at : at + size]}) for at in range(0, len(given[name]), size)]
    return found


@given(st.permutations([0, 0, 0, 1, 1, 1, 2, 2, 2]))
def test_calls_that_grow_at_the_same_time_come_one_after_another(order: list[int]) -> None:
    pieces = {index: iter(('{"a', '":', f"{index}}}")) for index in range(3)}
    chunks: list[Body] = []
    for index in order:
        part: Body = {"index": index, "function": {"arguments": next(pieces[index])}}
        if order.index(index) == len(chunks):
            part = {"id": f"call_{index}", "type": "function", **part}
            part["function"]["name"] = "f"
        chunks.append(delta(tool_calls=[part]))
    found = messages.assemble(events([*chunks, delta("tool_calls"), sse.DONE]))
    assert sorted(block["id"] for block in found["content"]) == ["call_0", "call_1", "call_2"]
    assert all(block["input"] == {"a": int(block["id"][-1])} for block in found["content"])


def test_calls_without_index_begin_with_their_id() -> None:
    parts: list[Body] = [
        {"id": "a", "function": {"name": "f", "arguments": "{"}},
        {"function": {"arguments": "}"}},
        {"id": "b", "function": {"name": "g", "arguments": "{}"}},
    ]
    found = messages.assemble(events([*(delta(tool_calls=[part]) for part in parts), delta("tool_calls"), sse.DONE]))
    assert found["content"] == [called("a", "f", {}), called("b", "g", {})]


def test_text_after_a_call_begins_a_block_of_its_own() -> None:
    chunks = [delta(tool_calls=[{"index": 0, **call("a", "f", "{}")}]), delta(content="then"), delta("tool_calls")]
    found = messages.assemble(events(chunks))
    assert found["content"] == [called("a", "f", {}), said("then")]
    with pytest.raises(UpstreamInvalid):
        events([*chunks[:2], delta(tool_calls=[{"index": 0, "function": {"arguments": "x"}}])])


def test_a_stream_without_end_mark_ends_with_its_reason() -> None:
    assert events([delta(content="x"), delta("stop")])[-1] == {"type": "message_stop"}
    assert [event["type"] for event in events([delta(content="x")])][-1] == "content_block_delta"


def test_azures_first_event_and_comments_are_not_passed() -> None:
    first = {"id": "", "object": "", "created": 0, "model": "", "choices": [], "prompt_filter_results": []}
    found = events([first, b": keep-alive\n\n", delta(content="x"), delta("stop"), sse.DONE])
    assert (found[0]["type"], found[0]["message"]["model"]) == ("message_start", "gpt-4o")


def test_errors_and_nonsense_in_a_stream_are_raised() -> None:
    with pytest.raises(UpstreamLimited):
        events([delta(content="x"), {"error": {"type": "rate_limit_error", "message": "x"}}])
    for wrong in (b"data: {no\n\n", b'data: {"choices":[1]}\n\n', delta(tool_calls=[{"index": 0, "function": {}}])):
        with pytest.raises(UpstreamInvalid):
            events([wrong])


# --- the official client -----------------------------------------------------------------------


@pytest.fixture
async def up() -> AsyncIterator[FakeUpstream]:
    async with upstream() as fake:
        yield fake


@pytest.fixture
async def gateway(up: FakeUpstream) -> AsyncIterator[Running]:
    async with running(compatible(up.url)) as found:
        yield found


async def test_anthropics_sdk_uses_tools_over_turns(up: FakeUpstream, gateway: Running) -> None:
    calls = [call("call_1", "f", '{"a":1}'), call("call_2", "f", "{}")]
    first = streamed(completion("tool_calls", USAGE, content="I look.", tool_calls=calls))
    up.script(Scripted(events=first), Scripted(body=completion(content="Done.", usage=USAGE)))
    tools: Any = [{"name": "f", "input_schema": {"type": "object"}}]
    options: Any = {"model": "ours", "max_tokens": 100, "tools": tools}
    async with anthropic_client(gateway) as own:
        async with own.messages.stream(messages=[{"role": "user", "content": "Hello"}], **options) as told:
            answer = await told.get_final_message()
        results: Any = [
            {"type": "tool_result", "tool_use_id": block.id, "content": "42"}
            for block in answer.content
            if block.type == "tool_use"
        ]
        history: Any = [HELLO, {"role": "assistant", "content": answer.content}, {"role": "user", "content": results}]
        last = await own.messages.create(messages=history, **options)
    assert (answer.stop_reason, answer.usage.input_tokens, answer.usage.cache_read_input_tokens) == ("tool_use", 5, 7)
    assert last.content[0].to_dict() == said("Done.")
    sent = up.requests[1].body["messages"]
    assert [each["function"] for each in sent[1]["tool_calls"]] == [each["function"] for each in calls]
    assert [each["tool_call_id"] for each in sent[2:]] == ["call_1", "call_2"]
    assert [receipt.usage.total for receipt in await gateway.settled(2)] == [92, 92]
    assert up.requests[0].body["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize("split", [1, 7, 64])
async def test_bytes_may_come_in_any_pieces(up: FakeUpstream, gateway: Running, split: int) -> None:
    up.script(Scripted(events=chat_events("all ünïcödé words"), split=split))
    async with (
        anthropic_client(gateway) as own,
        own.messages.stream(
            model="ours", max_tokens=9, messages=[{"role": "user", "content": "x"}]
        ) as told,
    ):  # fmt: skip
        assert await told.get_final_text() == "all ünïcödé words"


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, anthropic.BadRequestError),
        (404, anthropic.NotFoundError),
        (429, anthropic.RateLimitError),
        (503, anthropic.InternalServerError),
    ],
)
async def test_failures_are_anthropics_exceptions(
    up: FakeUpstream, gateway: Running, status: int, kind: type[anthropic.APIStatusError]
) -> None:
    up.script(openai_error(status, "wrong"))
    async with anthropic_client(gateway) as own:
        with pytest.raises(kind):
            await own.messages.create(model="ours", max_tokens=9, messages=[{"role": "user", "content": "x"}])


async def test_a_stream_that_breaks_is_no_success(up: FakeUpstream, gateway: Running) -> None:
    up.script(Scripted(events=chat_events()[:3]))
    async with anthropic_client(gateway) as own:
        with pytest.raises(anthropic.APIStatusError):
            async with own.messages.stream(
                model="ours", max_tokens=9, messages=[{"role": "user", "content": "x"}]
            ) as told:
                await told.get_final_message()
    receipt = (await gateway.settled(1))[0]
    assert (receipt.outcome, receipt.usage.source) == ("failed", "partial")
