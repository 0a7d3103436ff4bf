"""Chat as messages and messages as chat: what goes there and back is what it was."""

from __future__ import annotations

from typing import Any

import orjson
from hypothesis import given
from hypothesis import strategies as st

from qlens import sse
from qlens.bridges import between
from qlens.dialects import Body, chat, messages
from qlens.testing.anthropic import message, streamed, text, thinking, tool_use
from qlens.testing.messages_rules import refusal

THERE, BACK = between("messages", "chat"), between("chat", "messages")
ASKED: Body = {"model": "claude-haiku-4-5-20251001", "max_tokens": 100, "messages": [{"role": "user", "content": "x"}]}

WORDS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=10).filter(lambda word: bool(word.strip()))
INPUTS = st.dictionaries(WORDS, WORDS | st.integers(0, 9) | st.booleans() | st.none(), max_size=3)


@st.composite
def turns(draw: st.DrawFn) -> list[Body]:
    """A conversation as messages say it: texts, tools and their results, thoughts."""
    found: list[Body] = [{"role": "user", "content": [text(draw(WORDS))]}]
    for turn in range(draw(st.integers(0, 3))):
        calls = [tool_use(f"toolu_{turn}_{at}", "f", draw(INPUTS)) for at in range(draw(st.integers(0, 2)))]
        said = [text(draw(WORDS))] if draw(st.booleans()) or not calls else []
        thought = [thinking(draw(WORDS))] if draw(st.booleans()) else []
        results = [
            {"type": "tool_result", "tool_use_id": each["id"], "content": draw(WORDS)} for each in calls
        ]  # fmt: skip
        asked = [text(draw(WORDS))] if draw(st.booleans()) or not results else []
        found += [
            {"role": "assistant", "content": [*thought, *said, *calls]},
            {"role": "user", "content": [*results, *asked]},
        ]
    return found


@given(turns(), st.none() | WORDS, st.none() | st.floats(0, 1), st.lists(WORDS, max_size=4), st.none() | WORDS)
def test_messages_survive_the_way_over_a_chat(
    conversation: list[Body], system: str | None, temperature: float | None, stops: list[str], user: str | None
) -> None:
    assert THERE is not None
    assert BACK is not None
    body: Body = {**ASKED, "messages": conversation}
    if any(block["type"] == "tool_use" for turn in conversation for block in turn["content"]):
        body["tools"] = [{"name": "f", "input_schema": {"type": "object"}}]
    options: Body = {
        "system": [text(system)] if system else None,
        "temperature": temperature,
        "stop_sequences": stops or None,
        "metadata": {"user_id": user} if user else None,
    }
    body.update({name: value for name, value in options.items() if value is not None})
    assert refusal(body, "2023-06-01") is None
    between_them = THERE.request(body)
    chat.validate(between_them)
    assert BACK.request(between_them) == body


@given(
    st.lists(
        st.one_of(WORDS.map(text), WORDS.map(thinking), INPUTS.map(lambda given: tool_use("toolu_1", "f", given)))
    ),
    st.integers(1, 9),
)
def test_a_stream_of_messages_survives_the_way_over_a_chat(blocks: list[Body], size: int) -> None:
    """What is thought, said and called, each in its order, is the same, however it was cut."""
    assert THERE is not None
    assert BACK is not None
    told = {**message(stop="tool_use"), "content": blocks}
    first, second = BACK.stream(ASKED), THERE.stream(ASKED)
    raw = b"".join([first.feed(event) for event in streamed(told, size)]) + first.end()
    raw = b"".join(second.feed(event) for event in sse.cut(raw)) + second.end()
    found = messages.assemble(orjson.loads(sse.data(event) or b"") for event in sse.cut(raw))
    for kind, name in (("text", "text"), ("thinking", "thinking"), ("thinking", "signature")):
        assert _joined(found, kind, name) == _joined(told, kind, name)
    assert [block["input"] for block in found["content"] if block["type"] == "tool_use"] == [
        block["input"] for block in blocks if block["type"] == "tool_use"
    ]
    assert messages.usage(found) == messages.usage(told)


def _joined(body: Body, kind: str, name: str) -> str:
    return "".join(block[name] for block in body["content"] if block["type"] == kind)


@given(WORDS, st.lists(INPUTS, max_size=3), WORDS)
def test_an_answer_of_chat_survives_the_way_over_messages(
    said: str, inputs: list[dict[str, Any]], thought: str
) -> None:
    assert THERE is not None
    assert BACK is not None
    calls = [
        {"id": f"call_{at}", "type": "function", "function": {"name": "f", "arguments": orjson.dumps(given).decode()}}
        for at, given in enumerate(inputs)
    ]
    spoken = {"role": "assistant", "content": said, "refusal": None, "reasoning_content": thought}
    choice: Body = {
        "index": 0,
        "message": {**spoken, "thinking_blocks": [thinking(thought)], **({"tool_calls": calls} if calls else {})},
        "logprobs": None,
        "finish_reason": "tool_calls" if calls else "stop",
    }
    told = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    assert BACK.answer(THERE.answer(told, ASKED), ASKED)["choices"] == [choice]
