"""Watches an answer that passes through: what it says was used is billed, and not a byte of it changes."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Mapping

import orjson
from attrs import define, evolve, field

from qlens import sse
from qlens.call import Call, Reply, Target
from qlens.dialects import unnamed
from qlens.errors import CallError
from qlens.metering_raw import RawMeter
from qlens.surrogates import json_of
from qlens.usage import NO_USAGE, Usage

MOST_BYTES = 8 * 1024 * 1024
"""Up to how many bytes an answer of JSON, or an event, is looked into."""

_USED = re.compile(rb'"usage"\s*:\s*\{')


@define(eq=False)
class Told:
    """What an answer says was used, and of which model."""

    path: str
    """What was asked, as the client wrote it."""
    usage: Usage | None = field(init=False, default=None)
    """None: nothing was said so far."""
    model: str = field(init=False, default="")

    def hear(self, text: bytes) -> None:
        """Read an answer of JSON, or the data of one of its events; what is neither says nothing."""
        if _USED.search(text) is None:
            return
        try:
            body = json_of(text)
        except orjson.JSONDecodeError:
            return
        # To cancel or to change what is there already shows it, with what it used when it was made.
        if type(body) is not dict or unnamed.answer_of(body).get("id") in self.path.split("/"):
            return
        said = unnamed.usage(body, self.usage)
        if said is self.usage:
            return
        self.usage = said
        self.model = self.model or unnamed.model(body)


@define(eq=False)
class PassedMeter(RawMeter):
    """Passes an answer on as it comes and looks at it on the side, as long as that costs little."""

    told: Told
    asked: Callable[[], Awaitable[str]]
    """Finds the model that the request names; empty: it names none."""
    billed: Callable[[str, str], Target | None]
    """Whose price a model of these names has, as the answer and as the request call it; None: nobody's."""
    _asked: str = field(init=False, default="")

    async def conclude(self) -> None:
        """Find all that must be known of an answer that is whole."""
        self._hear_rest()
        if self.told.usage is not None:
            self._asked = await self.asked()

    async def _last(self) -> bytes:
        await self.conclude()
        return await super()._last()

    def usage(self) -> Usage:
        """What was used, and with it in the reply whose price that has; none is what the answer says nothing of."""
        self._hear_rest()
        # A provider that meters what passes has said it itself.
        if (said := self._said()) is not None and self.reply.usage is NO_USAGE:
            self.reply.usage = said
            self.reply.target = self.billed(self.told.model, self._asked) or self.reply.target
        return super().usage()

    @abstractmethod
    def _hear_rest(self) -> None:
        """Look at what was kept so far."""

    @abstractmethod
    def _said(self) -> Usage | None:
        """What the answer says, as sure as that is."""


@define(eq=False)
class PassedBody(PassedMeter):
    """Of an answer of JSON, which is kept until it is whole, and read once."""

    _kept: list[bytes] = field(init=False, factory=list, repr=False)
    _size: int = field(init=False, default=0)

    def _take(self, piece: bytes) -> bytes:
        self._size += len(piece)
        if self._size <= MOST_BYTES:
            self._kept.append(piece)
        else:
            self._kept.clear()
        return piece

    def _hear_rest(self) -> None:
        if self._kept:
            self.told.hear(b"".join(self._kept))
            self._kept.clear()

    def _said(self) -> Usage | None:
        return self.told.usage


@define(eq=False)
class PassedEvents(PassedMeter):
    """Of a stream of events, of which only those are parsed that speak of usage."""

    _splitter: sse.Splitter | None = field(init=False, factory=lambda: sse.Splitter(max_bytes=MOST_BYTES), repr=False)
    """None: nothing is looked for any more."""

    def _take(self, piece: bytes) -> bytes:
        if self._splitter is not None:
            try:
                block = self._splitter.take(piece)
            except CallError:  # an event without an end
                self._splitter = None
            else:
                if b'"usage"' in block and _USED.search(block) is not None:
                    self._hear(sse.cut(block))
        return piece

    def _flush(self) -> bytes:
        if self._splitter is not None:
            self._hear(self._splitter.flush())
        return b""

    def _hear(self, events: list[bytes]) -> None:
        for event in events:
            if (data := sse.data(event)) is not None:
                self.told.hear(data)

    def _hear_rest(self) -> None:
        """There is no rest: each event was looked at when it was whole."""

    def _said(self) -> Usage | None:
        said = self.told.usage
        return said if said is None or self.reply.complete else evolve(said, source="partial")


_METERS: Mapping[str, type[PassedBody] | type[PassedEvents]] = {
    "application/json": PassedBody,
    "text/event-stream": PassedEvents,
}


def passed_meter(
    call: Call,
    reply: Reply,
    failed: Callable[[BaseException], CallError],
    asked: Callable[[], Awaitable[str]],
    billed: Callable[[str, str], Target | None],
) -> RawMeter:
    """The meter for what a provider answers to a request that passes through.

    Only a POST makes something: whoever gets what is kept sees what it used once more, and does not pay once more.
    """
    media_type = reply.headers.get("content-type", "").partition(";")[0].strip().lower()
    meter = _METERS.get(media_type)
    if meter is None or call.operation.method != "POST":
        return RawMeter(call, reply, failed)
    return meter(call, reply, failed, Told(call.path_params["path"]), asked, billed)
