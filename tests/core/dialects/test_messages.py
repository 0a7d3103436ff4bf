"""Anthropic's messages: what is refused, what counts, where texts stand, events there and back."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlens import InvalidRequest, Reply, sse
from qlens.dialects import Fixed, messages, named, put, typed
from qlens.testing.anthropic import error, message, streamed, text, thinking, tool_use
from qlens.usage import Usage

HELLO = {"role": "user", "content": "Hello"}
BODY: dict[str, Any] = {"model": "claude", "max_tokens": 100, "messages": [HELLO]}
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}}
PDF = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "JVBERi0="}}
TEXT = {"type": "text", "media_type": "text/plain", "data": "a text"}
PLAIN = {"type": "document", "title": "a title", "source": TEXT}
RICH: dict[str, Any] = {
    **BODY,
    "system": [text("be kind", cache_control={"type": "ephemeral"})],
    "messages": [
        {"role": "user", "content": [text("look"), IMAGE, PDF, PLAIN]},
        {"role": "assistant", "content": [thinking("hm"), tool_use("toolu_1", "find", {"name": "n", "url": ["u"]})]},
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": [text("found"), IMAGE, PLAIN]}],
        },
    ],
}


NAMES = {"find", "hm"}
"""What of it must stay as it is."""


def body(**fields: Any) -> dict[str, Any]:
    return {**BODY, **fields}


def content(*blocks: Any) -> dict[str, Any]:
    return body(messages=[{"role": "user", "content": list(blocks)}])


# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "good",
    [
        BODY,
        RICH,
        body(max_tokens=0),
        body(stop_sequences=["a"] * 9, top_k=3, thinking={"type": "adaptive"}, unknown={"a": [1]}),
        body(tools=[{"type": "web_search_20260318", "name": "web_search"}, {"name": "x", "input_schema": {}}]),
        body(tool_choice={"type": "tool", "name": "x", "disable_parallel_tool_use": True}),
        body(output_config={"effort": "low", "format": {"type": "json_schema", "schema": {}}}, service_tier="auto"),
        body(messages=[HELLO, {"role": "system", "content": "note"}]),
        content({"type": "what_comes_tomorrow", "x": 1}),
    ],
)
def test_what_the_api_takes_is_taken(good: dict[str, Any]) -> None:
    messages.validate(good)


@pytest.mark.parametrize(
    ("bad", "param"),
    [
        ({"model": "m", "messages": [HELLO]}, "max_tokens"),
        ({"max_tokens": 1, "messages": [HELLO]}, "model"),
        (body(messages=[]), "messages"),
        (body(max_tokens=1.5), "max_tokens"),
        (body(max_tokens=True), "max_tokens"),
        (body(max_tokens=-1), "max_tokens"),
        (body(temperature=1.5), "temperature"),
        (body(messages=[{"role": "tool", "content": "x"}]), "messages[0].role"),
        (body(messages=[{"role": "user"}]), "messages[0].content"),
        (body(messages=[{"role": "user", "content": None}]), "messages[0].content"),
        (content({"text": "x"}), "messages[0].content[0].type"),
        (content({"type": "text"}), "messages[0].content[0].text"),
        (content({"type": "image", "source": {"type": "base64"}}), "messages[0].content[0].source.media_type"),
        (content({"type": "tool_use", "id": "a", "name": "b", "input": "c"}), "messages[0].content[0].input"),
        (content({"type": "tool_result"}), "messages[0].content[0].tool_use_id"),
        (content({"type": "thinking", "thinking": "x"}), "messages[0].content[0].signature"),
        (body(system=[{"type": "image"}]), "system[0].type"),
        (body(tools=[{"name": "x"}]), "tools[0].input_schema"),
        (body(tools=["x"]), "tools[0]"),
        (body(tool_choice={"type": "tool"}), "tool_choice.name"),
        (body(tool_choice={"type": "required"}), "tool_choice.type"),
        (body(thinking={"type": "enabled"}), "thinking.budget_tokens"),
        (body(output_config={"format": {"type": "text"}}), "output_config.format.type"),
        (body(stop_sequences="x"), "stop_sequences"),
        (body(stream="yes"), "stream"),
    ],
)
def test_what_is_wrong_is_refused_by_its_place(bad: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        messages.validate(bad)
    assert caught.value.param == param


# --- what counts -------------------------------------------------------------------------------


def test_every_text_that_a_model_reads_is_listed_and_names_and_thoughts_are_fixed() -> None:
    texts = messages.request_texts(RICH)
    assert [found for ref, found in texts if type(ref) is not Fixed] == [
        "be kind", "look", "a text", "a title", "n", "u", "found", "a text", "a title",
    ]  # fmt: skip
    assert {found for ref, found in texts if type(ref) is Fixed} == {*NAMES, "name", "url"}  # and keys
    changed = orjson.loads(orjson.dumps(RICH))
    for ref, found in texts:
        if type(ref) is not Fixed:
            put(changed, ref, found.upper())
    assert [found for _, found in messages.request_texts(changed)] == [
        found if type(ref) is Fixed else found.upper() for ref, found in texts
    ]


def test_texts_of_tools_that_are_named_like_settings_are_read_too() -> None:
    given = {"type": "t", "id": "i", "data": {"role": "r"}, "signature": ["s"]}
    called = body(messages=[HELLO, {"role": "assistant", "content": [tool_use("a", "b", given)]}])
    found = messages.request_texts(called)
    assert {text for ref, text in found if type(ref) is not Fixed} == {"Hello", "t", "i", "r", "s"}
    assert {text for ref, text in found if type(ref) is Fixed} == {"b", "type", "id", "data", "role", "signature"}


def test_bound_holds_all_texts_and_no_media() -> None:
    hard, estimate = messages.input_bound(RICH)
    larger = orjson.loads(orjson.dumps(RICH))
    for block in (larger["messages"][0]["content"][1], larger["messages"][2]["content"][0]["content"][1]):
        block["source"]["data"] *= 1000
    assert messages.input_bound(larger) == (hard, estimate)
    assert hard > sum(len(found.encode()) for _, found in messages.request_texts(RICH))
    longer, _ = messages.input_bound({**RICH, "tools": [{"name": "x", "input_schema": {}, "description": "d" * 500}]})
    assert longer > hard + 500


def test_bound_counts_bytes_of_plain_documents_wherever_they_stand() -> None:
    small, _ = messages.input_bound(content(PLAIN))
    long = {**PLAIN, "source": {**TEXT, "data": "é" * 500}}
    assert messages.input_bound(content(long))[0] > small + 990
    within = {"type": "tool_result", "tool_use_id": "a", "content": [long]}
    assert messages.input_bound(content(within))[0] > small + 990


def test_media_are_counted_by_kind() -> None:
    assert messages.media(RICH) == {"images": 2, "files": 1}
    assert messages.media(BODY) == {}


@pytest.mark.parametrize(
    ("asked", "limit", "tokens", "budget"),
    [
        (100, None, 100, None),
        (100, 50, 50, None),
        (9000, 5000, 5000, 4999),
        (9000, 1024, 1024, None),
    ],
)
def test_output_is_clamped_and_thinking_with_it(asked: int, limit: int | None, tokens: int, budget: int | None) -> None:
    given = body(max_tokens=asked, thinking={"type": "enabled", "budget_tokens": 8000 if asked > 8000 else 10})
    assert messages.clamp(given, limit, 1) == tokens
    assert messages.output_bound(given) == ("max_tokens", tokens)
    if asked > 8000:
        assert given.get("thinking") == (None if budget is None else {"type": "enabled", "budget_tokens": budget})


# --- answers -----------------------------------------------------------------------------------

ANSWER = message(
    thinking("I must look."),
    {"type": "redacted_thinking", "data": "abc"},
    text("I look.", citations=[{"type": "page_location", "cited_text": "x"}]),
    tool_use("toolu_1", "find", {"city": "Oslo"}),
    tool_use("toolu_2", "stop", {}),
    stop="tool_use",
)


def test_an_answer_says_its_texts_usage_and_reason() -> None:
    assert [found for _, found in messages.reply_texts(ANSWER)] == ["I must look.", "I look.", "x", "city", "Oslo"]
    assert messages.finish(ANSWER) == "tool_use"
    assert messages.usage(ANSWER) == Usage(input=9, output=4, source="provider", tier="standard")


def test_events_add_up_to_the_answer_again() -> None:
    assert messages.assemble(messages.explode(ANSWER)) == ANSWER
    assert messages.assemble(_parsed(list(streamed(ANSWER, 2)))) == ANSWER


BLOCKS = st.one_of(
    st.text(max_size=20).map(text),
    st.text(min_size=1, max_size=20).map(thinking),
    st.dictionaries(st.text(max_size=5), st.text(max_size=5) | st.integers(0, 9), max_size=3).map(
        lambda given: tool_use("toolu_1", "find", given)
    ),
)


@given(st.lists(BLOCKS, max_size=5), st.integers(1, 7))
def test_any_answer_survives_being_a_stream(blocks: list[dict[str, Any]], size: int) -> None:
    told = {**message(), "content": blocks}
    assert messages.assemble(_parsed(list(streamed(told, size)))) == told


def _parsed(events: list[Any]) -> list[dict[str, Any]]:
    return [orjson.loads(sse.data(event) or b"") for event in events]


def test_usage_of_a_stream_adds_up_to_the_usage_of_the_answer() -> None:
    counted = {
        "input_tokens": 5,
        "cache_read_input_tokens": 7,
        "cache_creation_input_tokens": 30,
        "cache_creation": {"ephemeral_5m_input_tokens": 10, "ephemeral_1h_input_tokens": 20},
        "output_tokens": 50,
        "output_tokens_details": {"thinking_tokens": 30},
    }
    answer = message(usage=counted)
    opening, *_, closing, _ = events = list(messages.explode(answer))
    first = messages.event_usage(opening, None)
    last = messages.event_usage(closing, first)
    assert first is not None
    assert (first.prompt, first.completion) == (42, 0)
    assert last == messages.usage(answer)
    assert last == Usage(
        input=5, cached_input=7, cache_write_5m=10, cache_write_1h=20, output=20, reasoning=30, source="provider"
    )
    assert [event for event in events if messages.event_usage(event, None) is not None] == [opening, closing]


@pytest.mark.parametrize(
    ("event", "code"),
    [
        (error("overloaded_error", "Overloaded"), None),
        (error("invalid_request_error", "prompt is too long: 9 tokens > 8 maximum"), "context_length_exceeded"),
        (
            error("invalid_request_error", "input length and `max_tokens` exceed context limit: 1 + 2 > 2"),
            "context_length_exceeded",
        ),
        (
            error("invalid_request_error", "Your credit balance is too low to access the Anthropic API."),
            "insufficient_quota",
        ),
        (error("rate_limit_error", "x", error_code="enforced_spend_limit_reached"), "insufficient_quota"),
        (error("billing_error", "x"), "insufficient_quota"),
    ],
)
def test_errors_are_told_in_openais_shape(event: dict[str, Any], code: str | None) -> None:
    found = messages.event_error(event)
    assert found is not None
    assert (found["error"]["type"], found["error"]["code"]) == (event["error"]["type"], code)
    assert messages.event_error({"type": "ping"}) is None


def test_only_the_last_event_ends_a_stream() -> None:
    ends = [messages.event_ends_stream(event) for event in messages.explode(ANSWER)]
    assert ends == [False] * (len(ends) - 1) + [True]


# --- rewriting ---------------------------------------------------------------------------------


async def _rewritten(raw: list[bytes], word: str) -> list[dict[str, Any]]:
    async def chunks() -> AsyncIterator[bytes]:
        for piece in raw:
            yield piece

    reply = Reply(chunks=chunks(), dialect="messages")
    reply.rewrite_text(lambda said: said.replace(word, "***"), hold_back=len(word))
    events = [event async for event in reply.events()]
    # Anthropic's clients read no event without a name, or under another name than its type.
    for event in events:
        assert event.split(b"\n")[0].removeprefix(b"event: ").decode() == orjson.loads(sse.data(event) or b"")["type"]
    return [orjson.loads(sse.data(event) or b"") for event in events]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 50])
async def test_a_word_is_found_in_a_stream_however_it_is_cut(size: int) -> None:
    told = message(thinking("the secret word"), text("a secret, a secret"), tool_use("toolu_1", "x", {"a": "secret"}))
    events = await _rewritten(list(streamed(told, size)), "secret")
    assert "secret" not in orjson.dumps(messages.assemble(events)).decode()
    assembled = messages.assemble(events)["content"]
    assert assembled[1]["text"] == "a ***, a ***"
    assert assembled[2]["input"] == {"a": "***"}


async def test_what_is_held_back_comes_before_the_end_of_its_block() -> None:
    events = await _rewritten(list(streamed(message(text("abc")), 3)), "xyz")
    kinds = [event["type"] for event in events]
    assert kinds.index("content_block_stop") > max(at for at, kind in enumerate(kinds) if kind == "content_block_delta")
    assert messages.assemble(events)["content"][0]["text"] == "abc"


def test_it_is_a_dialect_with_typed_events() -> None:
    assert named("messages") is not None
    assert typed.typed("messages").event_ends_stream({"type": "message_stop"})
