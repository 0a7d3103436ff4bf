"""Server-sent events: splitting is independent of how the bytes arrive."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qlens import sse
from qlens.errors import UpstreamInvalid

LINES = st.sampled_from(
    [
        "",
        "",
        "data: {}",
        'data: {"text":"é€😀"}',
        "data:1",
        "data: 2",
        "data:  two spaces",
        "data",
        "data:",
        "database: no data",
        ": keep-alive",
        ":",
        "event: ping",
        "id: 1",
        "data: [DONE]",
        'data: {"cut',
    ]
)
LINE_ENDS = st.sampled_from(["\n", "\r", "\r\n"])
STREAMS = st.builds(
    lambda lines, tail: ("".join(line + end for line, end in lines) + tail).encode(),
    st.lists(st.tuples(LINES, LINE_ENDS), max_size=12),
    LINES,
)


def reference(stream: bytes) -> list[bytes]:
    """The data of each event, read byte by byte as the HTML standard says, whole last events included."""
    lines, line, after_cr = [], bytearray(), False
    for byte in stream:
        if byte == 0x0A and after_cr:
            after_cr = False
            continue
        after_cr = byte == 0x0D
        if byte in {0x0A, 0x0D}:
            lines.append(bytes(line))
            line.clear()
        else:
            line.append(byte)
    events: list[list[bytes]] = [[]]
    for text in [*lines, bytes(line)] if line else lines:
        name, _, value = text.partition(b":")
        if not text:
            events.append([])
        elif name == b"data":
            events[-1].append(value[1:] if value[:1] == b" " else value)
    *whole, last = [b"\n".join(found) if found else None for found in events]
    return [found for found in whole if found is not None] + ([last] if last is not None and readable(last) else [])


def readable(payload: bytes) -> bool:
    if payload == b"[DONE]":
        return True
    try:
        orjson.loads(payload)
    except orjson.JSONDecodeError:
        return False
    return True


def fed(pieces: Iterable[bytes]) -> list[bytes]:
    splitter = sse.Splitter()
    return [event for piece in pieces for event in splitter.feed(piece)] + splitter.flush()


def in_pieces(stream: bytes, size: int) -> list[bytes]:
    return [stream[at : at + size] for at in range(0, len(stream), size)]


def data_of(events: Iterable[bytes]) -> list[bytes]:
    return [found for event in events if (found := sse.data(event)) is not None]


@given(STREAMS)
@example(b"data: 1\r\n\r\ndata: 2\r\n\r\n")
@example(b"data: 1\r\r\ndata: 2\n\r\n\n")
@example(b"data: 1\rdata: 2\n\n")
def test_events_are_the_same_wherever_the_stream_is_cut_once(stream: bytes) -> None:
    expected = reference(stream)
    for cut in range(len(stream) + 1):
        assert data_of(fed([stream[:cut], stream[cut:]])) == expected, cut


@given(STREAMS)
def test_events_are_the_same_byte_by_byte(stream: bytes) -> None:
    assert data_of(fed(bytes([byte]) for byte in stream)) == reference(stream)


@given(STREAMS, st.lists(st.integers(0, 200), max_size=8))
def test_every_byte_comes_out_again(stream: bytes, cuts: list[int]) -> None:
    ends = [*sorted(cuts), len(stream)]
    pieces = [stream[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    splitter = sse.Splitter()
    passed = b"".join(splitter.take(piece) for piece in pieces)
    assert stream.startswith(passed)
    assert b"\n\n" not in stream[len(passed) :]
    ended = splitter.flush()
    assert ended in ([], [stream[len(passed) :] + b"\n\n"])


@given(STREAMS, st.lists(st.integers(0, 200), max_size=8))
@example(b"data: 1\n\ndata: 2\n\n\n", [3])
@example(b"data: 1\n\n\n\ndata: 2", [8])
@example(b"data: 1\r\n\ndata: 2\n\n", [9])
def test_a_block_is_the_events_that_became_whole_with_it(stream: bytes, cuts: list[int]) -> None:
    ends = [*sorted(cuts), len(stream)]
    splitter, other = sse.Splitter(), sse.Splitter()
    for start, end in zip([0, *ends], ends, strict=False):
        block, events = splitter.take(stream[start:end]), other.feed(stream[start:end])
        assert block == b"".join(events)
        assert sse.cut(block) == events
        assert sse.count(block) == len(events)
    assert splitter.flush() == other.flush()


def test_an_event_is_not_held_back_for_a_line_feed_that_may_never_come() -> None:
    splitter = sse.Splitter()
    assert splitter.feed(b"data: 1\r\r") == [b"data: 1\r\r"]
    assert [sse.data(event) for event in splitter.feed(b"\ndata: 2\n\n")] == [b"2"]


def test_an_event_that_lacks_only_its_blank_line_is_completed() -> None:
    assert fed([b"data: [DO", b"NE]\n"]) == [b"data: [DONE]\n\n\n"]
    assert fed([b'data: {"a":1}']) == [b'data: {"a":1}\n\n']


@pytest.mark.parametrize("tail", [b'data: {"a":', b"data: [DON", b": comment", b"event: x\n", b"\n"])
def test_an_event_that_was_cut_in_the_middle_is_dropped(tail: bytes) -> None:
    assert fed([b"data: 1\n\n", tail]) == [b"data: 1\n\n"]


def test_nothing_is_left_after_the_end() -> None:
    splitter = sse.Splitter()
    splitter.feed(b"data: 1")
    assert splitter.flush() == [b"data: 1\n\n"]
    assert splitter.flush() == []


@pytest.mark.parametrize("size", [64, 1000, 65536])
def test_a_long_event_in_small_pieces_takes_linear_time(size: int) -> None:
    event = b"data: " + b"x" * 4 * 1024 * 1024 + b"\n\n"
    assert fed(in_pieces(event, size)) == [event]


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n"])
def test_an_event_above_the_cap_is_refused_however_it_arrives(size: int, end: bytes) -> None:
    event = b"data: " + b"x" * (94 - len(end)) + end
    allowing, refusing = sse.Splitter(max_bytes=100), sse.Splitter(max_bytes=100)
    assert sse.data(b"".join(map(allowing.take, in_pieces(event, size)))) == b"x" * (94 - len(end))
    with pytest.raises(UpstreamInvalid, match="more than 100 bytes"):
        # Two bytes too long: the last line feed may be left to the next event.
        b"".join(map(refusing.take, in_pieces(b"xx" + event, size)))


def test_an_event_that_never_ends_is_refused() -> None:
    splitter = sse.Splitter(max_bytes=100)
    splitter.feed(b"x" * 100)
    with pytest.raises(UpstreamInvalid, match="more than 100 bytes"):
        splitter.feed(b"x")


def test_many_small_events_may_be_larger_than_the_cap_together() -> None:
    splitter = sse.Splitter(max_bytes=20)
    assert len(splitter.feed(b"data: 12345\n\n" * 10)) == 10


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (b"data: x\n\n", b"x"),
        (b"data:x\n\n", b"x"),
        (b"data:  x\n\n", b" x"),
        (b"data: a\ndata: b\n\n", b"a\nb"),
        (b"data: a\rdata: b\n\n", b"a\nb"),
        (b"data: a\r\ndata: b\r\n\r\n", b"a\nb"),
        (b"data\n\n", b""),
        (b"data:\n\n", b""),
        (b"event: x\ndata: a\nid: 1\n\n", b"a"),
        (b"\xef\xbb\xbfdata: a\n\n", b"a"),
        (b": comment\n\n", None),
        (b":data: x\n\n", None),
        (b"event: x\n\n", None),
        (b"datas: x\n\n", None),
        (b"\n\n", None),
    ],
)
def test_data_is_what_the_data_lines_say(event: bytes, expected: bytes | None) -> None:
    assert sse.data(event) == expected


@given(st.recursive(st.none() | st.text(), lambda inner: st.dictionaries(st.text(), inner) | st.lists(inner)))
def test_what_is_written_is_read_as_one_event(payload: object) -> None:
    event = sse.write(payload)
    assert fed([event]) == [event]
    assert orjson.loads(sse.data(event) or b"") == payload


def test_another_payload_leaves_the_other_fields_of_an_event() -> None:
    event = sse.replace(b"event: delta\r\nid: 7\r\ndata: 1\r\ndata: 2\r\n\r\n", {"a": 1})
    assert event == b'event: delta\nid: 7\ndata: {"a":1}\n\n'


async def test_a_stream_is_split_into_its_events() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for chunk in (b"data: 1\n", b"\ndata: 2\n\nda", b"ta: 3"):
            yield chunk

    assert [event async for event in sse.split(chunks())] == [b"data: 1\n\n", b"data: 2\n\n", b"data: 3\n\n"]
    again = sse.chunks_of([b"data: 1\n\n", sse.DONE])
    assert [event async for event in sse.split(again)] == [b"data: 1\n\n", sse.DONE]
