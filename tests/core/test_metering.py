"""Streams on their way: withheld events, usage, completeness, at every cut of the bytes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlens import sse
from qlens.call import Call, Cost, Reply
from qlens.dialects import chat
from qlens.errors import CallError, UpstreamTruncated
from qlens.metering import Meter
from qlens.metering_alike import merged
from qlens.operations import OPERATIONS
from qlens.usage import Usage

HEAD = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
USAGE = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}


def _event(value: object, end: str = "\n\n") -> bytes:
    return b"data: " + (value if isinstance(value, bytes) else orjson.dumps(value)) + end.encode()


def _delta(text: str, finish: str | None = None, index: int = 0) -> dict[str, Any]:
    return {**HEAD, "choices": [{"index": index, "delta": {"content": text}, "finish_reason": finish}]}


AZURE = {
    "id": "",
    "object": "",
    "created": 0,
    "model": "",
    "choices": [],
    "prompt_filter_results": [{"prompt_index": 0}],
}
PLAIN = [
    AZURE,
    _delta('say "choices":[] and "usage":{'),
    _delta("!"),
    _delta("", "stop"),
    {**HEAD, "choices": [], "usage": USAGE},
]


def _failed(_: BaseException) -> CallError:
    return CallError("failed")


def _call(*, wants_usage: bool = False, keep: int = 0, n: int = 1) -> Call:
    async def reader() -> bytes:
        return b""

    call = Call(
        id="1", operation=OPERATIONS[0], path="", path_params={}, query={}, headers={}, peer=None, credential=None,
        started=0, wall_ns=0, deadline=0, reader=reader, stream=True, wants_usage=wants_usage, keep=keep,
    )  # fmt: skip
    call.body = {"n": n}
    call.estimated_input = 11
    return call


async def _run(
    pieces: Iterator[bytes] | list[bytes], **options: Any
) -> tuple[list[Any], Meter, list[bytes], CallError | None]:
    kept: list[bytes] = []

    async def ended(body: bytes) -> None:
        kept.append(body)

    async def chunks() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    reply = Reply(chunks=chunks())
    meter = Meter(
        _call(**options),
        reply,
        price=lambda usage: Cost(usage.total),
        ended=ended,
        failed=lambda _: CallError("failed"),
    )
    got, error = b"", None
    try:
        async for chunk in meter.watch(chunks()):
            got += chunk
    except CallError as raised:
        error = raised
    events = [
        line[6:]
        for line in got.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        if line.startswith(b"data: ")
    ]
    return [data.decode() if data == b"[DONE]" else orjson.loads(data) for data in events], meter, kept, error


@pytest.mark.parametrize("end", ["\n\n", "\r\n\r\n", "\r\r"])
async def test_at_every_cut_no_client_sees_an_event_without_choices_unless_it_asked(end: str) -> None:
    raw = b": comment" + end.encode() + b"".join(_event(event, end) for event in PLAIN) + _event(b"[DONE]", end)
    whole, _, _, _ = await _run([raw])
    for cut in range(1, len(raw)):
        seen, meter, _, error = await _run([raw[:cut], raw[cut:]])
        assert error is None
        assert seen == whole
        assert all(event == "[DONE]" or event["choices"] for event in seen)
        assert meter.reply.complete
        assert meter.reply.usage == Usage(input=5, output=2, source="provider")
    assert [event if event == "[DONE]" else event["choices"][0]["delta"]["content"] for event in whole] == [
        'say "choices":[] and "usage":{', "!", "", "[DONE]",
    ]  # fmt: skip


@given(st.lists(st.integers(1, 400), max_size=12))
async def test_the_bytes_may_come_in_any_pieces(sizes: list[int]) -> None:
    raw = b"".join(_event(event) for event in PLAIN) + _event(b"[DONE]")
    pieces, rest = [], raw
    for size in sizes:
        pieces.append(rest[:size])
        rest = rest[size:]
    seen, meter, _, error = await _run([piece for piece in (*pieces, rest) if piece], wants_usage=True)
    assert error is None
    assert seen[-1] == "[DONE]"
    assert seen[-2]["usage"] == {**USAGE, "cost_usd": "0.000000000007"}
    assert [event for event in seen[:-2] if not event["choices"]] == []
    assert meter.usage().total == 7


async def test_a_stream_without_end_mark_but_with_a_finish_reason_is_complete_and_gets_its_mark() -> None:
    seen, meter, _, error = await _run([_event(_delta("hi")), _event(_delta("", "stop"))])
    assert error is None
    assert seen[-1] == "[DONE]"
    assert meter.reply.complete


async def test_the_last_event_may_lack_its_blank_line() -> None:
    seen, _, _, error = await _run([_event(_delta("hi")), _event(_delta("", "stop")) + b"data: [DONE]"])
    assert error is None
    assert seen[-1] == "[DONE]"
    assert seen.count("[DONE]") == 1


@pytest.mark.parametrize("tail", [b"", b'data: {"id":"chatcmpl-1","choices":[{"ind'], ids=["between events", "in one"])
async def test_a_stream_cut_before_its_end_is_an_error_and_no_success(tail: bytes) -> None:
    seen, meter, kept, error = await _run([_event(_delta("hi")), _event(_delta(" there")) + tail], keep=10_000)
    assert isinstance(error, CallError)
    assert error.status == 502
    assert "[DONE]" not in seen
    assert not meter.reply.complete
    assert kept == []
    assert meter.usage().source == "partial"


async def test_with_several_choices_all_must_finish() -> None:
    events = [_event(_delta("a", index=0)), _event(_delta("b", index=1)), _event(_delta("", "stop", 0))]
    _, _, _, error = await _run(list(events), n=2)
    assert isinstance(error, UpstreamTruncated)
    _, _, _, error = await _run([*events, _event(_delta("", "stop", 1))], n=2)
    assert error is None


async def test_an_error_event_of_the_provider_is_mapped_not_forwarded() -> None:
    secret = {"error": {"message": "sk-example-secret is rate limited", "type": "x", "code": "rate_limit_exceeded"}}
    seen, _, _, error = await _run([_event(_delta("hi")), _event(secret)])
    assert isinstance(error, CallError)
    assert "sk-example-secret" not in error.message
    assert len(seen) == 1


async def test_an_error_field_that_is_null_is_no_error() -> None:
    _, _, _, error = await _run([_event({**_delta("hi"), "error": None}), _event(_delta("", "stop"))])
    assert error is None


async def test_usage_is_taken_from_an_event_with_choices_and_its_text_is_kept() -> None:
    with_usage = {**_delta("!", "stop"), "usage": USAGE}
    seen, meter, _, _ = await _run([_event(_delta("hi")), _event(with_usage), _event(b"[DONE]")], wants_usage=True)
    assert seen[1]["choices"][0]["delta"]["content"] == "!"
    assert seen[-2]["choices"] == []
    assert seen[-2]["usage"]["total_tokens"] == 7
    assert meter.usage() == Usage(input=5, output=2, source="provider")


async def test_running_totals_are_not_added_up() -> None:
    totals = [{**HEAD, "choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": n}} for n in (1, 2, 3)]
    events = [_event(_delta("a", "stop")), *map(_event, totals), _event(b"[DONE]")]
    seen, meter, _, _ = await _run(events, wants_usage=True)
    assert meter.usage().total == 8
    assert len([event for event in seen if event != "[DONE]" and not event["choices"]]) == 1


async def test_missing_or_empty_usage_is_estimated_never_zero() -> None:
    zero = {**HEAD, "choices": [], "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}}
    for extra in ([], [_event(zero)]):
        events = [_event(_delta(word)) for word in ("a ", "b ", "c ")] + [
            _event(_delta("", "stop")),
            *extra,
            _event(b"[DONE]"),
        ]
        seen, meter, _, _ = await _run(events, wants_usage=True)
        assert meter.usage().source == "estimated"
        assert meter.usage().input == 11
        assert meter.usage().output >= 3
        assert seen[-2]["usage"]["completion_tokens"] == meter.usage().output


async def test_many_tokens_in_one_event_are_not_counted_as_one() -> None:
    events = [_event(_delta("")), _event(_delta("word " * 400)), _event(_delta("", "stop")), _event(b"[DONE]")]
    _, meter, _, _ = await _run(events)
    assert meter.usage().output >= 400


PLAIN_CHOICE = b'data: {"choices":[{"finish_reason":null,"content":"%s","x":1}]}\n\n'
FINISH_LAST = b'data: {"choices":[{"content":"%s","finish_reason":null}]}\n\n'
PADDED_CHOICE = b'data: {"choices":[{"content":"%s","finish_reason":null}],"obfuscation":"p"}\n\n'
HIDDEN_USAGE = b'","usage":{"prompt_tokens":5,"completion_tokens":2},"x":"'
A_NAME = b'data: {"content":"%s":{},"choices":[{}]}\n\n'


@pytest.mark.parametrize(
    ("plain", "odd"),
    [
        (PLAIN_CHOICE, PLAIN_CHOICE % b'","finish_reason":"stop'),
        (PLAIN_CHOICE, PLAIN_CHOICE % b'"}],"usage":{"prompt_tokens":5,"completion_tokens":2},"x":[{"y":"'),
        (PLAIN_CHOICE, PLAIN_CHOICE % b"a\n\ndata: [DONE]\n\ndata: b"),
        (PLAIN_CHOICE, PLAIN_CHOICE % b"a\r\rdata: [DONE]\r\rdata: b"),
        (PLAIN_CHOICE, PLAIN_CHOICE % b"a\n\ndata: b"),
        (PLAIN_CHOICE, PLAIN_CHOICE % b"a\r\rdata: b"),
        (PLAIN_CHOICE, PLAIN_CHOICE % b"not JSON: \\x [DONE]"),
        (PLAIN_CHOICE, PLAIN_CHOICE.replace(b"null", b'"ok"')),
        (FINISH_LAST, FINISH_LAST.replace(b"null", b'"ok"')),
        (A_NAME, A_NAME % b"usage"),
        (PADDED_CHOICE, PADDED_CHOICE.replace(b'"p"', b'"p' + HIDDEN_USAGE + b'"') % b"a"),
        (PADDED_CHOICE, PADDED_CHOICE.replace(b"null", b'"ok"') % b"a"),
    ],
)
async def test_an_event_that_looks_much_like_others_is_looked_into(plain: bytes, odd: bytes) -> None:
    pieces = [plain % b"a", plain % b"b", odd, plain % b"c", _event(b"[DONE]")]
    apart, together = [await _passed(given) for given in (pieces, [b"".join(pieces)])]
    assert apart == together


async def _passed(pieces: list[bytes]) -> tuple[object, ...]:
    """All that can be seen of a stream."""

    async def chunks() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    async def ended(_: bytes) -> None:
        raise AssertionError

    reply = Reply(chunks=chunks())
    meter = Meter(_call(), reply, price=lambda _: Cost(0), ended=ended, failed=_failed)
    received, error = b"", None
    try:
        async for block in meter.watch(chunks()):
            received += block
    except CallError as raised:
        error = str(raised)
    return received, error, reply.complete, reply.finish, meter.usage(), meter.events, meter.passed


@pytest.mark.parametrize("space", [b"", b" ", b"\t ", b"\r\n"])
@pytest.mark.parametrize(
    ("name", "value"), [(b"usage", b"{}"), (b"finish_reason", b'"stop"'), (b"choices", b"[ ]"), (b"error", b"true")]
)
async def test_white_space_around_a_colon_hides_nothing(name: bytes, value: bytes, space: bytes) -> None:
    null = b"[{}]" if name == b"choices" else b"null"
    plain = b'data: {"%s":%s,"%s":%s}\n\n' % (name, null, name, null)
    odd = b'data: {"%s"%s:%s%s,not JSON}\n\n' % (name, space, space, value)
    for pieces in ([plain, plain, odd], [plain * 2 + odd], [plain + odd + plain]):
        _, _, _, error = await _run(list(pieces))
        assert isinstance(error, CallError)
        assert error.status == 502


async def test_nothing_comes_after_a_stream_that_failed_or_was_cancelled() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield _event(_delta("hi"))
        await asyncio.sleep(60)

    async def ended(_: bytes) -> None:
        raise AssertionError

    reply = Reply(chunks=chunks())
    stream = Meter(_call(), reply, price=lambda _: Cost(0), ended=ended, failed=_failed).watch(chunks())
    await anext(stream)
    waiting = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert [block async for block in stream] == []


async def test_a_closed_stream_passes_nothing_more_and_its_usage_is_known() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield _event(_delta("hi"))
        yield _event(_delta(" there", "stop"))

    async def ended(_: bytes) -> None:
        raise AssertionError

    reply = Reply(chunks=chunks())
    meter = Meter(_call(), reply, price=lambda _: Cost(0), ended=ended, failed=_failed)
    reply.replace(chunks=meter.watch(chunks()))
    assert reply.chunks is not None
    await anext(reply.chunks)
    stream = reply.chunks
    await reply.aclose()
    await reply.aclose()
    assert [block async for block in stream] == []
    assert meter.usage().source == "partial"
    assert reply.chunks is None


async def test_what_comes_after_the_end_mark_is_neither_passed_nor_kept() -> None:
    stream = _event(_delta("a", "stop")) + _event(b"[DONE]") + _event(_delta("late"))
    seen, _, kept, error = await _run([stream], keep=10_000)
    assert error is None
    assert seen[-1] == "[DONE]"
    assert len(seen) == 2
    assert orjson.loads(kept[0])["choices"][0]["message"]["content"] == "a"


async def test_a_kept_answer_is_handed_over_before_the_end_mark_and_not_when_it_is_too_big() -> None:
    events = [
        _event(_delta("hi")),
        _event(_delta("", "stop")),
        _event({**HEAD, "choices": [], "usage": USAGE}),
        _event(b"[DONE]"),
    ]
    _, _, kept, _ = await _run(list(events), keep=10_000)
    (body,) = kept
    assert orjson.loads(body)["choices"][0]["message"]["content"] == "hi"
    assert orjson.loads(body)["usage"] == USAGE
    _, _, kept, _ = await _run(list(events), keep=20)
    assert kept == []


@pytest.mark.parametrize(("keep", "keeps_at_once", "pieces"), [(0, False, 1), (10_000, True, 1), (10_000, False, 2)])
async def test_what_came_whole_passes_whole_unless_its_end_waits_for_a_cache(
    keep: int, keeps_at_once: bool, pieces: int
) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b"".join(map(_event, (_delta("hi"), _delta("", "stop"), b"[DONE]")))

    passed: list[bytes] = []
    when_kept: list[list[bytes]] = []

    async def ended(_: bytes) -> None:
        when_kept.append([*passed])

    reply = Reply(chunks=chunks())
    meter = Meter(
        _call(keep=keep), reply, price=lambda _: Cost(0), ended=ended, failed=_failed, keeps_at_once=keeps_at_once
    )
    async for piece in meter.watch(chunks()):
        passed.append(piece)
        assert meter.is_over is (len(passed) == pieces)
    assert b"".join(passed) == b"".join([piece async for piece in chunks()])
    assert when_kept == ([passed[:-1]] if keep else [])


@pytest.mark.parametrize("data", [b'[{"usage":{}}]', b'"choices":[]', b'{"choices":[],'])
async def test_an_event_that_is_not_a_json_object_is_an_error(data: bytes) -> None:
    _, _, _, error = await _run([_event(_delta("hi")), _event(data)])
    assert isinstance(error, CallError)
    assert error.status == 502


PIECES = st.text(st.sampled_from('ab \\"\n\t[],{}é😀:'), max_size=4)


@given(st.lists(st.tuples(PIECES, st.integers(0, 1), st.sampled_from(["content", "refusal"])), max_size=12))
def test_an_answer_is_the_same_from_fewer_events(pieces: list[tuple[str, int, str]]) -> None:
    payloads = [
        {**HEAD, "choices": [{"index": index, "delta": {name: text}, "finish_reason": None}]}
        for text, index, name in pieces
    ] + [_delta("", "stop", index) for index in (0, 1)]
    events = [_event(payload) for payload in payloads]
    fewer = [orjson.loads(sse.data(event) or b"") for event in merged(events)]
    assert chat.assemble(fewer) == chat.assemble(payloads)


@pytest.mark.parametrize("padding", [{}, {"obfuscation": "aB3"}])
def test_events_that_differ_only_in_their_text_become_one(padding: dict[str, str]) -> None:
    (event,) = merged([_event({**_delta("ab"), **padding}) for _ in range(100)])
    assert orjson.loads(sse.data(event) or b"")["choices"][0]["delta"]["content"] == "ab" * 100


@pytest.mark.parametrize(
    "other",
    [
        lambda text: {"delta": {"reasoning": text, "reasoning_content": text}},
        lambda text: {"delta": {"content": text, "reasoning_content": text}},
        lambda text: {"delta": {"content": text, "more": [{"text": text}]}},
        lambda text: {"delta": {"content": text}, "logprobs": {"content": [{"token": text, "logprob": 0.0}]}},
    ],
)
async def test_what_is_said_in_two_fields_is_kept_in_both(other: Callable[[str], dict[str, Any]]) -> None:
    payloads = [{**HEAD, "choices": [{"index": 0, **other(text)}]} for text in ("a", " ha", " ha", " ha", "!")]
    payloads.append(_delta("", "stop"))
    for way in ([_event(each) for each in payloads], [b"".join(map(_event, payloads))]):
        _, _, kept, _ = await _run([*way, _event(b"[DONE]")], keep=100_000)
        assert [orjson.loads(body) for body in kept] == [chat.assemble(payloads)]


PADDED = st.fixed_dictionaries({}, optional={"obfuscation": st.text(st.sampled_from('aB3"\\['), max_size=3)})


@given(
    st.lists(
        st.tuples(PIECES, st.integers(0, 1), st.sampled_from(["content", "content", "refusal"]), PADDED), max_size=12
    ),
    st.lists(st.integers(1, 400), max_size=12),
)
async def test_whatever_is_alike_all_of_it_passes_and_is_kept(
    pieces: list[tuple[str, int, str, dict[str, str]]], sizes: list[int]
) -> None:
    payloads = [
        {**HEAD, "choices": [{"index": index, "delta": {name: text}, "finish_reason": None}], **padding}
        for text, index, name, padding in pieces
    ] + [_delta("", "stop", index) for index in (0, 1)]
    events = [_event(payload) for payload in payloads]
    raw = b"".join((*events, _event(b"[DONE]")))
    ways = [[*events, _event(b"[DONE]")], [raw], []]
    for size in (*sizes, len(raw)):
        ways[2].append(raw[:size])
        raw = raw[size:]
    for way in ways:
        seen, meter, kept, error = await _run([piece for piece in way if piece], keep=100_000, n=2)
        assert error is None
        assert seen == [*payloads, "[DONE]"]
        assert (meter.events, meter.passed) == (len(events), sum(map(len, events)))
        assert [orjson.loads(body) for body in kept] == [chat.assemble(payloads)]
