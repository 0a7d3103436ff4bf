"""Event streams are decoded as AWS's own parser does it, however they are cut."""

from __future__ import annotations

import struct
from typing import Any
from zlib import crc32

import pytest
from botocore.eventstream import EventStreamBuffer
from hypothesis import given
from hypothesis import strategies as st

from qlens import UpstreamInvalid
from qlens.testing import frames
from qlens_plugins.provider.bedrock.eventstream import Frame, FrameReader

START = bytes.fromhex(
    "000000760000005296d5fade0b3a6576656e742d7479706507000c6d65737361676553746172740d3a636f6e74656e742d74797065070010"
    "6170706c69636174696f6e2f6a736f6e0d3a6d6573736167652d747970650700056576656e747b22726f6c65223a22617373697374616e74"
    "227d6fa8c599"
)
EXCEPTION = bytes.fromhex(
    "0000008e00000061514180540f3a657863657074696f6e2d747970650700137468726f74746c696e67457863657074696f6e0d3a636f6e74"
    "656e742d747970650700106170706c69636174696f6e2f6a736f6e0d3a6d6573736167652d74797065070009657863657074696f6e7b226d"
    "657373616765223a22546f6f206d616e7920746f6b656e73227dc81b1ec1"
)


def _read(data: bytes, size: int) -> list[Frame]:
    reader = FrameReader()
    found = [frame for at in range(0, len(data), size) for frame in reader.feed(data[at : at + size])]
    assert reader.is_between
    return found


def _judged(data: bytes) -> list[tuple[dict[str, str], bytes]]:
    buffer = EventStreamBuffer()
    buffer.add_data(data)
    return [
        ({name: value for name, value in event.headers.items() if isinstance(value, str)}, event.payload)
        for event in buffer
    ]


def test_known_frames() -> None:
    start, exception = _read(START + EXCEPTION, 1000)
    assert start.headers[":event-type"] == "messageStart"
    assert start.payload == b'{"role":"assistant"}'
    assert exception.headers[":exception-type"] == "throttlingException"
    assert exception.headers[":message-type"] == "exception"


def test_the_kit_writes_the_known_frames() -> None:
    assert frames.event("messageStart", {"role": "assistant"}) == START
    assert frames.exception("throttlingException", "Too many tokens") == EXCEPTION


@pytest.mark.parametrize("size", range(1, len(START) + 2))
def test_frames_may_be_cut_anywhere(size: int) -> None:
    assert _read(START + EXCEPTION + START, size) == _read(START + EXCEPTION + START, 10_000)


# What each type of header is on the wire; the value of a type without one is its presence.
VALUES: dict[int, Any] = {
    0: st.just(b""),
    1: st.just(b""),
    2: st.binary(min_size=1, max_size=1),
    3: st.binary(min_size=2, max_size=2),
    4: st.binary(min_size=4, max_size=4),
    5: st.binary(min_size=8, max_size=8),
    6: st.binary(max_size=20).map(lambda value: struct.pack(">H", len(value)) + value),
    7: st.text(max_size=20).map(lambda text: struct.pack(">H", len(text.encode())) + text.encode()),
    8: st.integers(0, 2**40).map(lambda value: struct.pack(">q", value)),
    9: st.binary(min_size=16, max_size=16),
}
names = st.text("abcdefghij:-", min_size=1, max_size=12)


@st.composite
def written(draw: st.DrawFn) -> bytes:
    used = draw(st.lists(names, max_size=5, unique=True))
    block = b""
    for name in used:
        kind = draw(st.sampled_from(sorted(VALUES)))
        block += bytes([len(name)]) + name.encode() + bytes([kind]) + draw(VALUES[kind])
    payload = draw(st.binary(max_size=50))
    prelude = struct.pack(">II", 16 + len(block) + len(payload), len(block))
    body = prelude + struct.pack(">I", crc32(prelude)) + block + payload
    return body + struct.pack(">I", crc32(body))


@given(st.lists(written(), min_size=1, max_size=4), st.integers(1, 64))
def test_every_frame_is_read_as_the_sdk_reads_it(made: list[bytes], size: int) -> None:
    data = b"".join(made)
    assert [(frame.headers, frame.payload) for frame in _read(data, size)] == _judged(data)


@given(st.integers(0, len(START) - 1), st.integers(1, 255))
def test_a_changed_byte_is_noticed(at: int, change: int) -> None:
    broken = bytearray(START)
    broken[at] ^= change
    with pytest.raises(UpstreamInvalid):
        FrameReader().feed(bytes(broken) + START)


@pytest.mark.parametrize(("total", "headers"), [(15, 0), (16, 4), (16 + 25 * 1024 * 1024, 0), (2**31, 200 * 1024)])
def test_impossible_lengths_are_refused_before_anything_is_kept(total: int, headers: int) -> None:
    prelude = struct.pack(">II", total, headers)
    with pytest.raises(UpstreamInvalid, match="length"):
        FrameReader().feed(prelude + struct.pack(">I", crc32(prelude)))


def test_a_frame_that_is_not_whole_is_known() -> None:
    reader = FrameReader()
    assert reader.feed(START[:-1]) == []
    assert not reader.is_between


@pytest.mark.parametrize(
    "block", [b"\x05ab", b"\x01a\x0b", b"\x01a\x07\x00\x09abc", b"\x01a\x07\x00", b"\x01\xff\x00", b"\x01a\x05ab"]
)
def test_broken_headers_are_refused(block: bytes) -> None:
    prelude = struct.pack(">II", 16 + len(block), len(block))
    body = prelude + struct.pack(">I", crc32(prelude)) + block
    with pytest.raises(UpstreamInvalid):
        FrameReader().feed(body + struct.pack(">I", crc32(body)))
