"""Server-sent events: split, read, write (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterable
from typing import Any

import orjson

from qlens.errors import UpstreamInvalid
from qlens.surrogates import json_of

DONE = b"data: [DONE]\n\n"
MAX_EVENT_BYTES = 8 * 1024 * 1024

# Lines end in CR, LF or CRLF. The group is atomic, or else a lone CRLF would match as two line ends.
_BLANK_LINE = re.compile(rb"(?>\r\n|\n|\r){2}")
_LINE_END = re.compile(rb"\r\n|\n|\r")
_BOM = b"\xef\xbb\xbf"


def _cut_at_blank_lines(buffer: bytes | bytearray, position: int) -> tuple[list[bytes], int]:
    """The whole events, and where the rest begins; no blank line ends in front of `position`."""
    # A CR that ends the buffer is taken as a line end at once: waiting for a possible LF would hold the event back.
    # The LF then starts the next event, where it is an empty line and does no harm.
    events, start = [], 0
    while (match := _BLANK_LINE.search(buffer, position)) is not None:
        position = match.end()
        events.append(bytes(buffer[start:position]))
        start = position
    return events, start


def _cut_at_two_feeds(buffer: bytes | bytearray, position: int) -> tuple[list[bytes], int]:
    """The same for what all providers send, and ten times as fast."""
    if buffer.find(b"\n\n", position) < 0:
        return [], 0
    *events, rest = bytes(buffer).split(b"\n\n")
    return [event + b"\n\n" for event in events], len(buffer) - len(rest)


class Splitter:
    """Cuts a byte stream into whole events, however the bytes arrive; every byte comes out again.

    Raises UpstreamInvalid when an event grows beyond `max_bytes`.
    """

    def __init__(self, max_bytes: int = MAX_EVENT_BYTES) -> None:
        # Grows in place: a long event in small pieces is neither copied nor searched again for each piece.
        self.pending = bytearray()
        """What has come of an event that is not whole."""
        self._max = max_bytes

    def feed(self, data: bytes) -> list[bytes]:
        """Take bytes; return the events that are whole now, each with its blank line."""
        if is_one(data) and not self.pending and len(data) <= self._max:
            return [data]  # as most often
        # Of a blank line at most the first of its two line ends is pending: its last byte is enough to find it.
        position = max(0, len(self.pending) - 1)
        buffer: bytes | bytearray = data
        if self.pending:
            self.pending += data
            buffer = self.pending
        if buffer.find(b"\r", position) >= 0:
            events, start = _cut_at_blank_lines(buffer, position)
        else:
            events, start = _cut_at_two_feeds(buffer, position)
        if buffer is data:
            self.pending += data[start:]
        else:
            del self.pending[:start]
        if max(map(len, events), default=0) > self._max or len(self.pending) > self._max:
            raise UpstreamInvalid(f"The provider sent an event of more than {self._max} bytes.")
        return events

    def take(self, data: bytes) -> bytes:
        """Take bytes; return all events that are whole now as one block."""
        pending = self.pending
        if (
            not pending
            and data.endswith(b"\n\n")
            and b"\r" not in data
            and not data.endswith(b"\n\n\n")
            and len(data) <= self._max
        ):
            return data  # as nearly always: whole events
        end = data.rfind(b"\n\n") + 2
        if (
            b"\r" in data
            or data.endswith(b"\n\n\n", 0, end)
            or pending.endswith((b"\r", b"\n"))
            or len(pending) + len(data) > self._max
        ):
            return b"".join(self.feed(data))
        # Only the last blank line must be found: it is two line feeds, neither is pending, and none is in front of it.
        if end == 1:
            pending += data
            return b""
        block = bytes(pending) + data[:end]
        pending[:] = data[end:]
        return block

    def flush(self) -> list[bytes]:
        """End the stream: an event that lacks only its blank line is completed, so that it is not lost.

        One that was cut in the middle of its data is dropped: no client could read it.
        """
        event, self.pending = bytes(self.pending) + b"\n\n", bytearray()
        payload = data(event)
        return [event] if payload is not None and _is_whole(payload) else []


def _is_whole(payload: bytes) -> bool:
    if payload == b"[DONE]":
        return True
    try:
        json_of(payload)
    except orjson.JSONDecodeError:
        return False
    return True


async def split(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Iterate over the events of a stream of chunks."""
    splitter = Splitter()
    async for chunk in chunks:
        for event in splitter.feed(chunk):
            yield event
    for event in splitter.flush():
        yield event


def cut(block: bytes) -> list[bytes]:
    """The events of a block of whole events."""
    return Splitter(len(block)).feed(block)


def is_one(block: bytes) -> bool:
    """Whether this is exactly one whole event; of those with carriage returns only a `Splitter` knows."""
    return 0 <= block.find(b"\n\n") == len(block) - 2 and b"\r" not in block


def first(block: bytes) -> bytes:
    """The first event of a block of whole events."""
    return cut(block)[0] if b"\r" in block else block[: block.find(b"\n\n") + 2]


def count(block: bytes) -> int:
    """How many events a block of whole events has."""
    return len(cut(block)) if b"\r" in block else block.count(b"\n\n")


def data(event: bytes) -> bytes | None:
    """The event's data: its `data` lines joined by newlines; None when it has none (a comment, say)."""
    if (
        event.startswith(b"data: ")
        and event.endswith(b"\n\n")
        and event.find(b"\n") == len(event) - 2
        and b"\r" not in event
    ):
        return event[6:-2]
    name = event.find(b"\ndata: ")
    if (
        name > 0
        and event.startswith(b"event: ")
        and event.endswith(b"\n\n")
        and event.find(b"\n") == name
        and event.find(b"\n", name + 1) == len(event) - 2
        and b"\r" not in event
    ):
        return event[name + 7 : -2]
    found = [value for name, value in _lines(event) if name == b"data"]
    return b"\n".join(found) if found else None


def _lines(event: bytes) -> list[tuple[bytes, bytes]]:
    """The fields of an event, by name and value; comments have an empty name."""
    pairs = (line.partition(b":") for line in _LINE_END.split(event.removeprefix(_BOM)) if line)
    return [(name, value.removeprefix(b" ")) for name, _, value in pairs]


def parsed(data: bytes) -> dict[str, Any]:
    """The JSON object in an event's data; raises UpstreamInvalid for anything else."""
    try:
        payload = json_of(data)
    except orjson.JSONDecodeError:
        raise UpstreamInvalid("The provider sent an event that is not JSON.") from None
    if not isinstance(payload, dict):
        raise UpstreamInvalid("The provider sent an event that is not a JSON object.")
    return payload


def write(payload: Any) -> bytes:
    """One event that carries a JSON value."""
    return b"data: " + orjson.dumps(payload) + b"\n\n"


def replace(event: bytes, payload: Any) -> bytes:
    """The same event with another JSON value; its other fields stay."""
    kept = [name + b": " + value + b"\n" for name, value in _lines(event) if name != b"data"]
    return b"".join(kept) + write(payload)


async def chunks_of(events: Iterable[bytes]) -> AsyncIterator[bytes]:
    """A stream of events that are all there already."""
    for event in events:
        yield event
