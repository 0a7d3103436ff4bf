"""Whatever clients say becomes something that Bedrock takes; whatever Bedrock says breaks nothing but the call."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from bedrocks import PDF, PNG, document, image
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qlens import CallError, InvalidRequest
from qlens.dialects import chat
from qlens.testing.bedrock import answer, invalid, streamed
from qlens_plugins.provider.bedrock import model_ids
from qlens_plugins.provider.bedrock.converse_reply import Head, choice_of
from qlens_plugins.provider.bedrock.converse_request import Asked, Rules, written
from qlens_plugins.provider.bedrock.converse_stream import ChunkWriter
from qlens_plugins.provider.bedrock.eventstream import Frame, FrameReader
from qlens_plugins.provider.bedrock.families import family_of
from qlens_plugins.provider.bedrock.tools import Names

MODELS = [
    "us.anthropic.claude-sonnet-4-5-20250929-v1:0",
    "anthropic.claude-3-5-sonnet-20241022-v2:0",
    "global.anthropic.claude-opus-4-7",
    "us.anthropic.claude-3-7-sonnet-20250219-v1:0",
    "eu.amazon.nova-lite-v1:0",
    "us.amazon.nova-2-lite-v1:0",
    "us.meta.llama3-3-70b-instruct-v1:0",
    "mistral.mistral-large-3-675b-instruct",
    "mistral.mistral-7b-instruct-v0:2",
    "cohere.command-r-plus-v1:0",
    "us.deepseek.r1-v1:0",
    "openai.gpt-oss-120b-1:0",
    "qwen.qwen3-235b-a22b-2507-v1:0",
    "amazon.titan-text-premier-v1:0",
]

# --- what clients say --------------------------------------------------------------------------

texts = st.one_of(st.sampled_from(["", " ", "\n", "hello", "x "]), st.text(max_size=20))
marks = st.sampled_from(
    [{}, {}, {}, {"cache_control": {"type": "ephemeral"}}, {"cache_control": {"type": "ephemeral", "ttl": "1h"}}]
)
names = st.one_of(
    st.sampled_from(["get_weather", "a.b", "x" * 80, "json_tool_call", "ö"]), st.text(min_size=1, max_size=8)
)
signed = st.fixed_dictionaries(
    {"type": st.just("thinking"), "thinking": texts, "signature": st.sampled_from(["", "c2ln"])}
)
redacted = st.just({"type": "redacted_thinking", "data": "cmVk"})
thoughts = st.lists(st.one_of(signed, redacted), max_size=2)


@st.composite
def parts(draw: st.DrawFn) -> list[dict[str, Any]]:
    text = texts.map(lambda value: {"type": "text", "text": value})
    files = st.sampled_from(
        [
            document("a.pdf"),
            document("a.b.pdf"),
            document("t.csv", "text/csv", PDF),
            image(PNG),
            image(PNG, "image/jpg"),
        ]
    )
    found = draw(st.lists(st.one_of(text, files), min_size=1, max_size=4))
    return [{**part, **draw(marks)} for part in found]


@st.composite
def conversations(draw: st.DrawFn, tools: list[str]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for turn in range(draw(st.integers(1, 5))):
        kind = draw(
            st.sampled_from(
                ["system", "user", "user", "assistant", "calls"] if tools else ["system", "user", "assistant"]
            )
        )
        content = draw(st.one_of(texts, parts()))
        if kind == "calls":
            messages += _calls(draw, turn, tools)
        elif kind == "user":
            messages.append({"role": "user", "content": content, **draw(marks)})
        elif kind == "assistant":
            messages.append(
                {"role": "assistant", "content": draw(texts), "thinking_blocks": draw(thoughts), **draw(marks)}
            )
        else:
            messages.append(
                {"role": draw(st.sampled_from(["system", "developer"])), "content": draw(texts), **draw(marks)}
            )
    return messages


def _calls(draw: st.DrawFn, turn: int, tools: list[str]) -> list[dict[str, Any]]:
    ids = [f"call {turn} {number}" for number in range(draw(st.integers(1, 3)))]
    calls = [
        {
            "id": identifier,
            "type": "function",
            "function": {
                "name": draw(st.sampled_from(tools)),
                "arguments": draw(st.sampled_from(["", "{}", '{"a":1}'])),
            },
        }
        for identifier in ids
    ]
    told = {
        "role": "assistant",
        "content": draw(st.none() | texts),
        "tool_calls": calls,
        "thinking_blocks": draw(thoughts),
    }
    results = [{"role": "tool", "tool_call_id": identifier, "content": draw(texts)} for identifier in ids]
    between = draw(st.sampled_from([[], [], [{"role": "system", "content": "Be brief."}]]))
    return [told, *results[:1], *between, *results[1:]]


def _tool(name: str, mark: dict[str, Any]) -> dict[str, Any]:
    function = {
        "name": name,
        "parameters": {"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}, "$defs": {"a": {}}},
    }
    return {"type": "function", "function": {**function, "strict": True}, **mark}


SCHEMA = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 1}, "o": {"type": "object"}}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}


@st.composite
def calls(draw: st.DrawFn, with_tools: bool) -> dict[str, Any]:
    tools = draw(st.lists(names, max_size=3, unique=True)) if with_tools else []
    body: dict[str, Any] = {"model": "m", "messages": draw(conversations(tools))}
    offered = draw(st.sampled_from([tools, tools, []]))
    if offered:
        body["tools"] = [_tool(name, draw(marks)) for name in offered]
        named = {"type": "function", "function": {"name": offered[0]}}
        body["tool_choice"] = draw(st.sampled_from([None, "auto", "none", "required", named]))
    optional = {
        "max_tokens": st.integers(1, 9000),
        "temperature": st.floats(0, 2),
        "top_p": st.floats(0, 1),
        "top_k": st.integers(1, 100),
        "stop": st.one_of(texts, st.lists(texts, max_size=4)),
        "reasoning_effort": st.sampled_from(["none", "minimal", "low", "medium", "high", "xhigh", "max"]),
        "response_format": st.sampled_from([FORMAT, {"type": "json_object"}, {"type": "text"}]),
        "parallel_tool_calls": st.booleans(),
        "service_tier": st.sampled_from(["auto", "default", "flex", "priority", "other"]),
        "metadata": st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=20),
        "user": st.text(max_size=5),
    }
    for name, strategy in optional.items():
        if draw(st.booleans()):
            body[name] = draw(strategy)
    return body


@pytest.mark.parametrize("model", MODELS)
@settings(max_examples=25)
@given(data=st.data())
def test_every_valid_call_becomes_one_that_bedrock_takes(model: str, data: st.DataObject) -> None:
    family = family_of(model_ids.read(model).base)
    body = data.draw(calls(family.tools))
    chat.validate(body)
    before = orjson.dumps(body)
    asked = written(body, {}, family, Rules(), stream=False)
    assert invalid("Converse", model, orjson.dumps(asked.body)) is None, orjson.dumps(asked.body).decode()
    assert orjson.dumps(body) == before  # another attempt may start from it


PARTS: list[dict[str, Any]] = [{"type": "text", "text": "a"}, {"type": "text", "text": " "}, image(PNG)]
CONTENT = st.one_of(st.sampled_from(["hello", "x ", " "]), st.lists(st.sampled_from(PARTS), min_size=1, max_size=2))
SAID = st.tuples(st.sampled_from(["user", "assistant", "system", "developer"]), CONTENT)
SAMPLING = st.fixed_dictionaries(
    {}, optional={"max_tokens": st.integers(1, 9000), "temperature": st.floats(0, 2), "stop": texts}
)


@settings(max_examples=300)
@given(st.sampled_from(MODELS), st.lists(SAID, min_size=1, max_size=5), SAMPLING)
@example(MODELS[0], [("user", "hello"), ("system", "hello")], {})
def test_a_plain_chat_is_written_as_one_that_is_not(
    model: str, said: list[tuple[str, Any]], sampling: dict[str, Any]
) -> None:
    family = family_of(model_ids.read(model).base)
    body = {"model": "m", "messages": [{"role": role, "content": content} for role, content in said], **sampling}
    plain = written(body, {}, family, Rules(), stream=False)
    # With a field that asks for nothing, but that has to be looked into.
    other = written({**body, "service_tier": None}, {}, family, Rules(), stream=False)
    assert plain.body == other.body


# --- what Bedrock says -------------------------------------------------------------------------

json: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
KINDS = ["messageStart", "contentBlockStart", "contentBlockDelta", "contentBlockStop", "messageStop", "metadata", "x"]
ASKED = Asked({}, Names(), helper="json_tool_call", one_tool=True)


@given(st.lists(st.tuples(st.sampled_from(KINDS), json), max_size=6))
def test_events_of_any_kind_break_nothing(events: list[tuple[str, Any]]) -> None:
    writer = ChunkWriter(ASKED, Head.of("m", "r"))
    for kind, payload in events:
        frame = Frame({":message-type": "event", ":event-type": kind}, orjson.dumps(payload))
        try:
            chunks = writer.write(frame)
        except CallError:
            continue
        for chunk in chunks.split(b"\n\n")[:-1]:
            assert chunk.startswith(b"data: ")
            orjson.loads(chunk[6:])


BLOCKS = st.one_of(
    st.builds(lambda text: {"text": text}, st.text(max_size=20)),
    st.builds(
        lambda text, signature: {"reasoningContent": {"reasoningText": {"text": text, **signature}}},
        st.text(max_size=20),
        st.sampled_from([{}, {"signature": "c2ln"}]),
    ),
    st.builds(
        lambda name, given: {"toolUse": {"toolUseId": "t", "name": name, "input": given}},
        st.sampled_from(["f", "json_tool_call"]),
        st.dictionaries(st.text(max_size=5), json, max_size=3),
    ),
)


@given(st.lists(BLOCKS, min_size=1, max_size=5), st.integers(1, 30), st.booleans())
def test_a_stream_says_the_same_as_the_whole_answer(blocks: list[dict[str, Any]], size: int, one_tool: bool) -> None:
    asked = Asked({}, Names(), helper="json_tool_call", one_tool=one_tool)
    told = answer(*blocks, stop="tool_use")
    writer = ChunkWriter(asked, Head.of("m", "r"))
    reader = FrameReader()
    data = b"".join(streamed(told, size))
    chunks = [writer.write(frame) for at in range(0, len(data), 50) for frame in reader.feed(data[at : at + 50])]
    events = [orjson.loads(event[6:]) for event in b"".join(chunks).split(b"\n\n") if event]
    (added,) = chat.assemble(events)["choices"]
    whole = choice_of(told, asked, 0)
    for name in ("content", "reasoning_content", "thinking_blocks", "tool_calls"):
        assert (added["message"].get(name) or None) == (whole["message"].get(name) or None)
    assert added["finish_reason"] == whole["finish_reason"]


def test_what_is_refused_is_refused_as_the_clients_mistake() -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "logprobs": True}
    with pytest.raises(InvalidRequest):
        written(body, {}, family_of(MODELS[0]), Rules(), stream=False)
