"""Mends what Azure's streams have that clients of OpenAI do not expect.

https://learn.microsoft.com/azure/ai-services/openai/concepts/content-streaming
"""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Callable
from typing import Any
from uuid import uuid4

import orjson
from attrs import define, field

from qlens import json_of

# What makes an event worth parsing. Inside a JSON string the quotes would be escaped, so text never matches.
_ODD = re.compile(rb'"content_filter_offsets"|"finish_reason"\s*:\s*"|"id"\s*:\s*""')
_ODD_OR_USAGE = re.compile(_ODD.pattern + rb'|"usage"\s*:\s*\{')
_USAGE = re.compile(rb'"usage"\s*:\s*\{')
_MAX_BYTES = 8 * 1024 * 1024
"""A longer event is passed on in pieces, for the core to refuse."""
_HEAD = ("id", "object", "created", "model")
_EMPTY: dict[str, tuple[str, type]] = {"chat": ("delta", dict), "completions": ("text", str)}
"""What a choice of each dialect must have, and the kind of value that says nothing."""
_OBJECTS = {"chat": "chat.completion.chunk", "completions": "text_completion"}
_MOST_EARLY = 64
"""How many verdicts wait for the answer's name."""


@define(eq=False)
class Mender:
    """Mends one stream; events that are not odd pass as they are, byte for byte.

    Results of the asynchronous content filter come as choices without a delta, in events without id and model, and may
    end a choice that has ended already. Those in front of the answer wait until it says its id. Azure's first event,
    without choices, is withheld by the core.
    """

    dialect: str
    tier: str | None = None
    """The service tier that the usage is to be priced by; None: what Azure says."""
    named: Callable[[object], None] = lambda model: None
    """Told what answers, as soon as the stream says so."""
    model: str = ""
    """The model's name where the stream never says one."""
    _source: AsyncIterator[bytes] = field(init=False, repr=False)
    _pending: bytearray = field(factory=bytearray, init=False, repr=False)
    _head: dict[str, Any] = field(factory=dict, init=False)
    _finished: set[int] = field(factory=set, init=False)
    _early: list[dict[str, Any]] = field(factory=list, init=False, repr=False)
    """Verdicts that came before anything that has an id."""

    def mend(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Pass a stream on in whole events."""
        self._source = chunks
        return self

    # An iterator of its own and no generator: it takes every piece from its source without a layer in between.
    def __aiter__(self) -> Mender:
        return self

    async def __anext__(self) -> bytes:
        while True:
            try:
                chunk = await self._source.__anext__()
            except StopAsyncIteration:
                if not self._pending and not self._early:
                    raise
                rest, self._pending = bytes(self._pending), bytearray()
                return self._last(rest)
            # JSON has no bare CR, so that lines ending in CRLF can be read as if they ended in LF.
            whole = self._whole(chunk.replace(b"\r", b"") if b"\r" in chunk else chunk)
            if whole and (block := self._block(whole)):
                return block

    def _whole(self, data: bytes) -> bytes:
        """The events that are whole now; b"" while none is."""
        pending, end = self._pending, data.rfind(b"\n\n") + 2
        if end == 1 and not (data.startswith(b"\n") and pending.endswith(b"\n")) and len(pending) < _MAX_BYTES:
            pending += data
            return b""
        if not pending and end == len(data):
            return data
        block = bytes(pending) + data[:end]
        pending[:] = data[end:]
        return block

    def _block(self, block: bytes) -> bytes:
        odd = _ODD if self.tier is None else _ODD_OR_USAGE
        if self._head and not odd.search(block):
            return block
        mended: list[bytes] = []
        for event in block.split(b"\n\n"):
            if self._head and not odd.search(event):
                mended.append(event)
            else:
                mended += self._events(event)
        return b"\n\n".join(mended)

    def _last(self, rest: bytes) -> bytes:
        """What is left at the end: an event without its blank line, and verdicts of an answer that never came."""
        block = self._block(rest) if rest else b""
        early = self._named_early()
        if not early:
            return block
        return b"\n\n".join([*([block] if block else []), *early, b""])

    def _events(self, event: bytes) -> list[bytes]:
        """What goes to the client for one event: none while it waits, and those that have waited for it."""
        before, data = _parts(event)
        try:
            payload = json_of(data)
        except orjson.JSONDecodeError:
            # A comment, [DONE], or something for the core to judge.
            return [*(self._named_early() if b"[DONE]" in data else ()), event]
        if not isinstance(payload, dict):
            return [event]
        if "error" in payload or len(self._early) >= _MOST_EARLY:
            return [*self._named_early(), self._mended(event, before, payload)]
        if not self._head and payload.get("id") == "" and payload.get("choices"):
            self._mend(payload)
            self._early.append(payload)
            return []
        last = self._mended(event, before, payload)
        return [*(self._named_early() if self._head else ()), last]

    def _mended(self, event: bytes, before: bytes, payload: dict[str, Any]) -> bytes:
        return before + b"data: " + orjson.dumps(payload) if self._mend(payload) else event

    def _named_early(self) -> list[bytes]:
        """The verdicts that have waited, with the answer's name; with one of their own if it never said any."""
        if not self._early:
            return []
        if not self._head:
            values = (f"chatcmpl-{uuid4().hex}", _OBJECTS[self.dialect], int(time.time()), self.model)
            self._head = dict(zip(_HEAD, values, strict=True))
        early, self._early = self._early, []
        return [b"data: " + orjson.dumps(payload | self._head) for payload in early]

    def _mend(self, payload: dict[str, Any]) -> bool:
        """Edit one event; whether there was anything to edit."""
        mended = False
        if self.tier is not None and isinstance(payload.get("usage"), dict):
            payload["service_tier"], mended = self.tier, True
        choices = payload.get("choices")
        if not isinstance(choices, list):
            return mended
        if payload.get("id"):
            if choices:
                self._take_head(payload)
        elif self._head:
            payload.update(self._head)
            mended = True
        for choice in choices:
            if isinstance(choice, dict) and self._mend_choice(choice):
                mended = True
        return mended

    def _take_head(self, payload: dict[str, Any]) -> None:
        if self._head:
            return
        self._head = {name: payload[name] for name in _HEAD if name in payload}
        self.named(payload.get("model"))

    def _mend_choice(self, choice: dict[str, Any]) -> bool:
        mended = False
        name, kind = _EMPTY[self.dialect]
        if not isinstance(choice.get(name), kind):
            choice[name], mended = kind(), True
        index = choice.get("index", 0)
        if choice.get("finish_reason") is None:
            return mended
        if index in self._finished:
            choice["finish_reason"], mended = None, True
        else:
            self._finished.add(index)
        return mended


@define(eq=False)
class Tiered(Mender):
    """Passes a stream of typed events on; the one with the usage says by which tier this is to be priced."""

    def _block(self, block: bytes) -> bytes:
        if not _USAGE.search(block):
            return block
        return b"\n\n".join([self._event(event) if _USAGE.search(event) else event for event in block.split(b"\n\n")])

    def _event(self, event: bytes) -> bytes:
        before, data = _parts(event)
        try:
            payload = json_of(data)
        except orjson.JSONDecodeError:
            return event  # something for the core to judge
        # A response's usage stands in the response; that of an image or a transcript in the event itself.
        told = payload.get("response", payload) if isinstance(payload, dict) else None
        if not isinstance(told, dict):
            return event
        told["service_tier"] = self.tier
        return before + b"data: " + orjson.dumps(payload)


def _parts(event: bytes) -> tuple[bytes, bytes]:
    """The lines of an event that are no data, and the data, which may have several lines."""
    if event.startswith(b"data:") and b"\n" not in event:
        return b"", event[5:]
    before, data = [], []
    for line in event.split(b"\n"):
        if line.startswith(b"data:"):
            data.append(line[5:])
        else:
            before.append(line + b"\n")
    return b"".join(before), b"\n".join(data)
