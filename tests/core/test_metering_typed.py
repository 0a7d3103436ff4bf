"""Streams of typed events on their way: usage, completeness, errors, what is kept, at every cut of the bytes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

import orjson
import pytest
from claudes import call_of
from hypothesis import given
from hypothesis import strategies as st

from qlens import CallError, Reply, UpstreamInvalid, UpstreamTruncated, UpstreamUnavailable
from qlens.dialects import messages, typed
from qlens.metering_typed import TypedMeter, exploded
from qlens.testing.anthropic import error, message, streamed, text, thinking, tool_use
from qlens.usage import Usage

COUNTS = {
    "input_tokens": 9,
    "cache_read_input_tokens": 3,
    "cache_creation_input_tokens": 0,
    "output_tokens": 40,
    "output_tokens_details": {"thinking_tokens": 10},
}
TOLD = message(thinking("hm"), text("Hello, world."), tool_use("toolu_1", "f", {"a": "b"}), usage=COUNTS)
EVENTS = list(streamed(TOLD, 4))
RAW = b"".join(EVENTS)
USED = Usage(input=9, cached_input=3, output=30, reasoning=10, source="provider")
BODY: dict[str, Any] = {"model": "m", "max_tokens": 9, "messages": [], "stream": True}


async def watched(
    pieces: Iterable[bytes | BaseException], *, keep: int = 0, dialect: str = "messages"
) -> tuple[bytes, TypedMeter, list[bytes], BaseException | None]:
    kept: list[bytes] = []

    async def ended(body: bytes) -> None:
        kept.append(body)

    async def chunks() -> AsyncIterator[bytes]:
        for piece in pieces:
            if isinstance(piece, BaseException):
                raise piece
            yield piece

    reply = Reply(chunks=chunks(), dialect=dialect)
    meter = TypedMeter(call_of(BODY, dialect, keep=keep), reply, ended=ended, failed=lambda _: CallError("failed"))
    got, raised = b"", None
    try:
        async for chunk in meter.watch(chunks()):
            got += chunk
    except BaseException as mistake:
        raised = mistake
    return got, meter, kept, raised


async def test_at_every_cut_all_bytes_pass_and_usage_is_found() -> None:
    for cut in range(1, len(RAW)):
        got, meter, _, raised = await watched([RAW[:cut], RAW[cut:]])
        assert raised is None
        assert got == RAW
        assert meter.reply.complete
        assert meter.usage() == USED
        assert meter.reply.finish == "end_turn"
        assert (meter.events, meter.passed) == (len(EVENTS), len(RAW))


@given(st.lists(st.integers(1, 300), max_size=12))
async def test_the_bytes_may_come_in_any_pieces(sizes: list[int]) -> None:
    pieces, rest = [], RAW
    for size in sizes:
        pieces.append(rest[:size])
        rest = rest[size:]
    got, meter, _, raised = await watched([*pieces, rest])
    assert (got, raised, meter.usage()) == (RAW, None, USED)


SAID = st.text(st.sampled_from('ab \\"\n[]{}é😀:'), min_size=1, max_size=12)


@given(SAID, SAID, st.integers(1, 4), st.lists(st.integers(1, 300), max_size=12))
async def test_what_is_kept_is_the_whole_answer_however_it_came(
    said: str, thought: str, size: int, sizes: list[int]
) -> None:
    told = message(thinking(thought), text(said), tool_use("toolu_1", "f", {"a": said}), text(said), usage=COUNTS)
    events = list(streamed(told, size))
    pieces, rest = [], b"".join(events)
    for length in sizes:
        pieces.append(rest[:length])
        rest = rest[length:]
    for way in (events, [*pieces, rest]):
        _, meter, kept, raised = await watched(way, keep=100_000)
        assert raised is None
        (body,) = map(orjson.loads, kept)
        assert body["content"] == told["content"]
        assert body["usage"]["output_tokens"] == 40
        assert (meter.events, meter.usage()) == (len(events), USED)


@pytest.mark.parametrize("is_repeated", [True, False])
async def test_of_responses_only_what_repeats_the_deltas_is_kept(is_repeated: bool) -> None:
    item = {"type": "message", "id": "msg_1", "content": [{"type": "output_text", "text": "word " * 50}]}
    answer = {"id": "resp_1", "status": "completed", "output": [item] if is_repeated else []}
    delta = {"type": "response.output_text.delta", "output_index": 0, "content_index": 0, "delta": "word "}
    events: list[dict[str, Any]] = [
        {"type": "response.created", "response": {"id": "resp_1", "status": "in_progress", "output": []}},
        *({**delta, "sequence_number": number} for number in range(50)),
        {"type": "response.output_item.done", "output_index": 0, "item": item},
        {"type": "response.completed", "response": answer},
    ]
    # The deltas alone are more than may be kept.
    got, _, kept, raised = await watched(map(typed.write, events), keep=2000, dialect="responses")
    assert (got, raised) == (b"".join(map(typed.write, events)), None)
    assert [orjson.loads(body) for body in kept] == [{**answer, "output": [item]}]


async def test_a_stream_without_names_of_events_is_read_too() -> None:
    bare = [b"data:" + event.split(b"\ndata:")[1] for event in EVENTS]
    got, meter, _, raised = await watched(bare)
    assert (got, raised, meter.usage()) == (b"".join(bare), None, USED)


@pytest.mark.parametrize("dropped", [1, 2, len(EVENTS) - 1])
async def test_a_stream_that_is_cut_is_no_success_and_is_charged_for_what_was_heard(dropped: int) -> None:
    got, meter, _, raised = await watched(EVENTS[:-dropped])
    assert isinstance(raised, UpstreamTruncated)
    assert got == b"".join(EVENTS[:-dropped])
    assert not meter.reply.complete
    used = meter.usage()
    assert (used.prompt, used.source) == (12, "partial")
    heard = {1: range(40, 41), 2: range(5, 40), len(EVENTS) - 1: range(1)}
    assert used.completion in heard[dropped]


async def test_what_was_heard_of_a_long_answer_counts_though_the_provider_said_nothing_of_it() -> None:
    long = list(streamed(message(text("word " * 400)), 20))
    _, meter, _, _ = await watched(long[:-5])
    assert 400 < meter.usage().output < 600


async def test_an_answer_whose_usage_is_never_told_is_estimated() -> None:
    told = streamed(message(text("word " * 400), usage={}), 20)
    silent = [event.replace(b'"output_tokens":0', b'"other":0') for event in told]
    _, meter, _, raised = await watched(silent)
    assert raised is None
    used = meter.usage()
    assert (used.input, used.source) == (11, "estimated")
    assert 400 < used.output < 600


async def test_an_error_ends_the_stream_after_what_came_before_it() -> None:
    wrong = typed.write({**error("overloaded_error", "Overloaded sk-ant-secret123"), "type": "error"})
    got, meter, _, raised = await watched([b"".join(EVENTS[:5]) + wrong + EVENTS[5]])
    assert got == b"".join(EVENTS[:5])
    assert isinstance(raised, UpstreamUnavailable)
    assert "secret" not in raised.message
    assert not meter.reply.complete


async def test_what_is_no_event_of_the_api_ends_the_stream() -> None:
    _, _, _, raised = await watched([EVENTS[0], b"event: message_delta\ndata: {no\n\n"])
    assert isinstance(raised, UpstreamInvalid)


async def test_nothing_passes_after_the_end() -> None:
    got, meter, _, raised = await watched([RAW + EVENTS[0], EVENTS[1]])
    assert (got, raised, meter.reply.complete) == (RAW, None, True)


async def test_the_answer_is_kept_before_the_last_event_passes() -> None:
    passed: list[bytes] = []

    async def ended(body: bytes) -> None:
        assert messages.assemble([]) is not None
        assert not any(b"message_stop" in chunk for chunk in passed)
        passed.append(b"kept")
        assert orjson.loads(body) == TOLD

    async def chunks() -> AsyncIterator[bytes]:
        yield RAW

    reply = Reply(chunks=chunks(), dialect="messages")
    call = call_of(BODY, "messages", keep=100_000)
    meter = TypedMeter(call, reply, ended=ended, failed=lambda _: CallError("failed"))
    async for chunk in meter.watch(chunks()):
        passed.append(chunk)
    assert passed[-2] == b"kept"
    assert b"message_stop" in passed[-1]


async def test_an_answer_that_is_too_long_or_broken_is_not_kept_and_passes_all_the_same() -> None:
    got, _, kept, raised = await watched([RAW], keep=len(RAW) - 1)
    assert (got, kept, raised) == (RAW, [], None)
    broken = RAW.replace(b'"input_json_delta"', b'"text_delta"', 1)
    got, _, kept, raised = await watched([broken], keep=100_000)
    assert (got, kept, raised) == (broken, [], None)


@pytest.mark.parametrize("mistake", [ValueError("theirs"), CallError("ours")])
async def test_a_provider_that_fails_by_itself_fails_the_call(mistake: Exception) -> None:
    got, _, _, raised = await watched([EVENTS[0], mistake])
    assert got == EVENTS[0]
    assert isinstance(raised, CallError)


async def test_cancelling_is_not_taken_for_a_mistake() -> None:
    started = asyncio.Event()

    async def chunks() -> AsyncIterator[bytes]:
        yield EVENTS[0]
        started.set()
        await asyncio.Event().wait()

    reply = Reply(chunks=chunks(), dialect="messages")

    async def read() -> None:
        async def ended(body: bytes) -> None: ...

        meter = TypedMeter(call_of(BODY, "messages"), reply, ended=ended, failed=lambda _: CallError("failed"))
        async for _ in meter.watch(chunks()):
            pass

    task = asyncio.create_task(read())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_whole_answer_becomes_a_stream_that_says_the_same() -> None:
    reply = Reply(body=orjson.dumps(TOLD), dialect="messages")
    got, meter, kept, raised = await watched(exploded(reply), keep=100_000)
    assert (raised, meter.usage(), orjson.loads(kept[0])) == (None, USED, TOLD)
    assert got.startswith(b"event: message_start\n")
