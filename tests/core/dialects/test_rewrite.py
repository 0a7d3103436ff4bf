"""Rewriting answers: a stream comes out as the whole text would, and never shows a part of a match."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any

import orjson
import pytest
from attrs import frozen
from hypothesis import given
from hypothesis import strategies as st

from qlens import Blocked, UpstreamInvalid, UpstreamTruncated, sse
from qlens.dialects.rewrite import rewrite_body, rewrite_stream

Body = dict[str, Any]
Deltas = list[tuple[int, str]]
Payload = Body | bytes


@frozen
class Redaction:
    pattern: str
    replacement: str
    longest: int

    def __call__(self, text: str) -> str:
        return re.sub(self.pattern, lambda match: self.replacement, text)

    def first(self, text: str) -> str:
        """The text before the first match."""
        match = re.search(self.pattern, text)
        return text[: match.start()] if match else text

    def refuse(self, text: str) -> str:
        if re.search(self.pattern, text):
            raise Blocked("not this")
        return text


REDACTIONS = [
    Redaction("secret", "", 6),
    Redaction("secret", "[redacted]", 6),
    Redaction(r"\b\d{3}\b", "N", 3),
    Redaction(r"(?<!\w)ab(?!\w)", "-", 2),
    Redaction("aba|ba", "a", 3),
]
WORDS = st.sampled_from(["secret", "ab", "aba", "123", "1234", " ", "\n", "sec", "b", "a", "c", "é"])
DELTAS = st.lists(st.tuples(st.integers(0, 1), st.lists(WORDS, max_size=3).map("".join)), max_size=25)
CUT_DELTAS = st.builds(
    lambda words, sizes: [(0, piece) for piece in cut("".join(words), sizes)],
    st.lists(WORDS, max_size=20),
    st.lists(st.integers(0, 4), min_size=1, max_size=20),
)


def cut(text: str, sizes: list[int]) -> list[str]:
    pieces = []
    for size in sizes:
        pieces.append(text[:size])
        text = text[size:]
    return [*pieces, text]


def delta(choice: int = 0, finish: str | None = None, /, **fields: Any) -> Body:
    choices = [{"index": choice, "delta": fields, "finish_reason": finish}]
    return {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": choices}


async def stream(payloads: Sequence[Payload]) -> AsyncIterator[bytes]:
    for payload in payloads:
        yield payload if isinstance(payload, bytes) else sse.write(payload)


async def rewritten(
    payloads: Sequence[Payload], fn: Callable[[str], str], hold_back: int, dialect: str = "chat"
) -> list[bytes]:
    return [event async for event in rewrite_stream(dialect, stream(payloads), fn, hold_back)]


def parsed(events: Iterable[bytes]) -> list[Body]:
    return [orjson.loads(data) for event in events if (data := sse.data(event)) and data != b"[DONE]"]


def text_of(events: Iterable[bytes], field: str = "content") -> str:
    return "".join(event["choices"][0]["delta"].get(field) or "" for event in parsed(events) if event["choices"])


def chunks_of(deltas: Deltas) -> tuple[dict[int, str], list[Payload]]:
    wholes: dict[int, str] = {}
    for choice, text in deltas:
        wholes[choice] = wholes.get(choice, "") + text
    ends = [delta(choice, "stop") for choice in wholes]
    return wholes, [*(delta(choice, content=text) for choice, text in deltas), *ends, sse.DONE]


# --- streams -----------------------------------------------------------------------------------


@given(DELTAS | CUT_DELTAS, st.sampled_from(REDACTIONS))
async def test_a_stream_comes_out_as_its_whole_text_would_and_never_runs_ahead(
    deltas: Deltas, redact: Redaction
) -> None:
    wholes, payloads = chunks_of(deltas)
    seen = dict.fromkeys(wholes, "")
    async for event in rewrite_stream("chat", stream(payloads), redact, redact.longest):
        for choice in (choice for body in parsed([event]) for choice in body["choices"]):
            seen[choice["index"]] += choice["delta"].get("content") or ""
            assert redact(wholes[choice["index"]]).startswith(seen[choice["index"]])
    assert seen == {choice: redact(text) for choice, text in wholes.items()}


@given(DELTAS | CUT_DELTAS, st.sampled_from(REDACTIONS))
async def test_a_stream_is_refused_when_its_whole_text_would_be_and_shows_nothing_of_it(
    deltas: Deltas, redact: Redaction
) -> None:
    wholes, payloads = chunks_of(deltas)
    seen = dict.fromkeys(wholes, "")
    refused = False
    try:
        async for event in rewrite_stream("chat", stream(payloads), redact.refuse, redact.longest):
            for choice in (choice for body in parsed([event]) for choice in body["choices"]):
                seen[choice["index"]] += choice["delta"].get("content") or ""
    except Blocked:
        refused = True
    assert refused == any(re.search(redact.pattern, text) for text in wholes.values())
    assert all(redact.first(wholes[choice]).startswith(text) for choice, text in seen.items())
    assert refused or seen == wholes


@given(st.lists(st.text(max_size=5)))
async def test_without_hold_back_every_delta_is_rewritten_alone(texts: list[str]) -> None:
    events = await rewritten([delta(content=text) for text in texts], str.upper, 0)
    assert text_of(events) == "".join(texts).upper()
    assert len(events) == len(texts)


@given(st.lists(st.sampled_from(["ab", "c", "secret "]), max_size=40))
async def test_completions_are_rewritten_alike(texts: list[str]) -> None:
    payloads = [{"id": "1", "choices": [{"index": 0, "text": text, "finish_reason": None}]} for text in texts]
    redact = REDACTIONS[0]
    events = await rewritten([*payloads, sse.DONE], redact, redact.longest, "completions")
    assert "".join(event["choices"][0]["text"] for event in parsed(events)) == redact("".join(texts))


@pytest.mark.parametrize("field", ["content", "refusal", "reasoning_content", "field_of_tomorrow"])
async def test_every_text_of_a_delta_is_rewritten(field: str) -> None:
    events = await rewritten([delta(**{field: "my sec"}), delta(**{field: "ret!"}), sse.DONE], REDACTIONS[1], 6)
    assert text_of(events, field) == "my [redacted]!"
    assert events[-1] == sse.DONE


async def test_the_strands_of_a_choice_do_not_mix() -> None:
    payloads: list[Payload] = [
        delta(content="sec", reasoning_content="ret"),
        delta(content="ret", reasoning_content="sec"),
        sse.DONE,
    ]
    events = await rewritten(payloads, REDACTIONS[0], 6)
    assert (text_of(events), text_of(events, "reasoning_content")) == ("", "retsec")


async def test_tool_arguments_are_rewritten_in_their_own_call() -> None:
    def call(index: int, arguments: str, **more: Any) -> Body:
        return delta(tool_calls=[{"index": index, **more, "function": {"arguments": arguments}}])

    payloads: list[Payload] = [
        delta(tool_calls=[{"index": 0, "id": "a", "type": "function", "function": {"name": "f", "arguments": ""}}]),
        call(0, '{"q":"sec'),
        call(1, '{"q":"', id="b", type="function"),
        call(0, 'ret"}'),
        call(1, "secret"),
        call(1, '"}'),
        delta(0, "tool_calls"),
        sse.DONE,
    ]
    events = await rewritten(payloads, REDACTIONS[1], 6)
    arguments = {0: "", 1: ""}
    for event in parsed(events):
        for part in event["choices"][0]["delta"].get("tool_calls", ()):
            arguments[part["index"]] += part["function"]["arguments"]
    assert arguments == {0: '{"q":"[redacted]"}', 1: '{"q":"[redacted]"}'}
    assert parsed(events)[0]["choices"][0]["delta"]["tool_calls"][0]["id"] == "a"
    assert parsed(events)[-1]["choices"][0]["finish_reason"] == "tool_calls"


async def test_what_is_held_back_passes_before_the_finish_of_its_choice() -> None:
    payloads: list[Payload] = [
        delta(0, content="abc"),
        delta(1, content="def"),
        delta(0, "stop"),
        delta(1, "stop"),
        sse.DONE,
    ]
    shown = [
        (choice["index"], choice["delta"].get("content"), choice["finish_reason"])
        for event in parsed(await rewritten(payloads, str.upper, 10))
        for choice in event["choices"]
    ]
    assert shown == [(0, "ABC", None), (0, None, "stop"), (1, "DEF", None), (1, None, "stop")]


async def test_a_finish_that_carries_text_itself_takes_what_was_held_back() -> None:
    payloads: list[Payload] = [delta(content="my sec"), delta(0, "stop", content="ret word"), sse.DONE]
    events = await rewritten(payloads, REDACTIONS[1], 6)
    assert len(events) == 2
    last = parsed(events)[0]["choices"][0]
    assert (last["delta"]["content"], last["finish_reason"]) == ("my [redacted] word", "stop")


@pytest.mark.parametrize("tail", [[], [sse.DONE], [sse.write({"error": {"message": "cut"}})]])
async def test_what_is_held_back_passes_before_the_end_of_the_stream(tail: list[bytes]) -> None:
    events = await rewritten([delta(content="abc"), *tail], str.upper, 10)
    assert parsed(events)[0] == delta(content="ABC")
    assert events[1:] == tail


async def test_events_without_text_pass_byte_for_byte() -> None:
    odd: list[Payload] = [
        b": keep-alive\n\n",
        b"event: ping\r\n\r\n",
        b'data: { "id" : "",  "choices":[] , "prompt_filter_results":[{}]}\r\n\r\n',
        b'data: {"choices":[{"index":0,  "delta":{"role":"assistant","content":null}}]}\n\n',
        b'data: {"choices":[{"index":0,  "delta":{},"finish_reason":"stop"}]}\n\n',
        b'data: {"choices":[],  "usage":{"prompt_tokens":1}}\n\n',
        sse.DONE,
    ]
    assert await rewritten(odd, str.upper, 10) == odd


async def test_text_that_does_not_change_passes_byte_for_byte_without_hold_back() -> None:
    event = b'data: { "choices":[{"index":0,"logprobs":{"content":[1]},"delta":{"content":"A"}}]}\n\n'
    assert await rewritten([event], str.upper, 0) == [event]


async def test_an_event_that_is_held_back_whole_is_dropped_unless_it_says_something_else() -> None:
    first = delta(role="assistant", content="a")
    usage = {**delta(content="b"), "usage": {"prompt_tokens": 1}}
    filtered = delta(content="c")
    filtered["choices"][0]["content_filter_results"] = {"hate": {"filtered": True}}
    tool = delta(tool_calls=[{"index": 0, "id": "x", "function": {"name": "f", "arguments": "d"}}])
    events = parsed(await rewritten([first, usage, filtered, tool, delta(content="e")], str, 10))
    assert [event["choices"][0]["delta"].get("content") for event in events] == ["", "", "", None, "abce", None]
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    assert events[1]["usage"]
    assert events[2]["choices"][0]["content_filter_results"]
    assert events[3]["choices"][0]["delta"]["tool_calls"][0]["function"] == {"name": "f", "arguments": ""}
    assert events[5]["choices"][0]["delta"]["tool_calls"] == [{"index": 0, "function": {"arguments": "d"}}]


async def test_other_fields_of_a_rewritten_event_stay() -> None:
    event = b'id: 7\ndata: {"id":"1","choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'
    assert await rewritten([event], str.upper, 0) == [event.replace(b'"a"', b'"A"')]


async def test_log_probabilities_never_spell_what_is_held_back_or_changed() -> None:
    spelled = [delta(content=text) for text in ("my ", "sec", "ret", " " * 30)] + [delta(), delta(0, "stop")]
    for event in spelled:
        event["choices"][0] |= {"logprobs": {"content": [{"token": "secret"}]}, "token_ids": [1]}
    for hold_back in (6, 0):
        events = await rewritten(spelled, lambda text: text.replace("sec", "").replace("ret", ""), hold_back)
        assert text_of(events) == "my " + " " * 30
        for event in parsed(events):
            choice = event["choices"][0]
            if hold_back or not choice["delta"].get("content", "x"):
                assert choice.get("logprobs") is None
                assert choice.get("token_ids") is None


@pytest.mark.parametrize(
    "event", [b'data: {"choices":\n\n', b'data: "secret"\n\n', b"data: secret\n\n", b"data: \xff\n\n"]
)
async def test_an_event_that_cannot_be_looked_into_does_not_pass(event: bytes) -> None:
    with pytest.raises(UpstreamInvalid, match=r"not (a )?JSON"):
        await rewritten([event], str.upper, 0)


async def test_a_stream_of_very_many_strands_is_refused() -> None:
    payloads = [delta(choice, content="x") for choice in range(5000)]
    with pytest.raises(UpstreamInvalid, match="too much of it must be held back"):
        await rewritten(payloads, str.upper, 5)


async def test_a_text_without_a_good_place_to_cut_is_bounded() -> None:
    # Refuses every cut: what becomes of a text depends on its length.
    payloads = [delta(content="x" * 100_000)] * 20
    with pytest.raises(UpstreamInvalid, match="too much of it must be held back"):
        await rewritten(payloads, lambda text: f"{len(text)}", 2)


async def test_an_error_of_the_provider_goes_through() -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield sse.write(delta(content="a" * 100))
        raise UpstreamTruncated("cut")

    events = rewrite_stream("chat", broken(), str.upper, 10)
    assert set(text_of([await anext(events)])) == {"A"}
    with pytest.raises(UpstreamTruncated):
        await anext(events)


async def test_the_source_is_closed_with_the_rewritten_stream() -> None:
    closed = False

    async def source() -> AsyncIterator[bytes]:
        nonlocal closed
        try:
            while True:
                yield sse.write(delta(content="a"))
        finally:
            closed = True

    events = rewrite_stream("chat", source(), str.upper, 0)
    async for _ in events:
        break
    await events.aclose()  # type: ignore[attr-defined]
    assert closed


# --- bodies ------------------------------------------------------------------------------------


def answer(**message: Any) -> Body:
    choice = {"index": 0, "message": {"role": "assistant", **message}, "logprobs": {"content": []}}
    other = {
        "index": 1,
        "message": {"role": "assistant", "content": "fine"},
        "logprobs": {"content": [{"token": "fine"}]},
    }
    return {"id": "1", "choices": [{**choice, "logprobs": {"content": [{"token": "secret"}]}}, other]}


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"content": "a secret"}, {"content": "a [redacted]"}),
        ({"content": None, "refusal": "secret"}, {"content": None, "refusal": "[redacted]"}),
        ({"reasoning_content": "secret"}, {"reasoning_content": "[redacted]"}),
        ({"content": [{"type": "text", "text": "secret"}]}, {"content": [{"type": "text", "text": "[redacted]"}]}),
        (
            {"tool_calls": [{"id": "secret", "function": {"name": "secret", "arguments": "secret"}}]},
            {"tool_calls": [{"id": "secret", "function": {"name": "secret", "arguments": "[redacted]"}}]},
        ),
        (
            {"audio": {"data": "secret", "transcript": "secret"}},
            {"audio": {"data": "secret", "transcript": "[redacted]"}},
        ),
    ],
)
def test_every_text_of_a_body_is_rewritten(message: Body, expected: Body) -> None:
    body = orjson.loads(rewrite_body("chat", orjson.dumps(answer(**message)), REDACTIONS[1]))
    first, other = answer(**expected)["choices"]
    assert body["choices"] == [{**first, "logprobs": None}, other]


@pytest.mark.parametrize(
    "body", [b'{ "choices" : [{"message":{"content":"A"}}]}', b'{"choices":[]}', b"[1]", b"not JSON", b""]
)
def test_a_body_in_which_nothing_changes_stays_byte_for_byte(body: bytes) -> None:
    assert rewrite_body("chat", body, str.upper) == body


def test_a_body_may_be_refused() -> None:
    with pytest.raises(Blocked):
        rewrite_body("completions", b'{"choices":[{"text":"a secret"}]}', REDACTIONS[0].refuse)


def test_embeddings_have_nothing_to_rewrite() -> None:
    body = b'{"data": [{"embedding": "AAAA"}]}'
    assert rewrite_body("embeddings", body, str.lower) == body
