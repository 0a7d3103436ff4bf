"""Watches an answer of plain bytes on its way to the client: whether it comes to its end, and what it used."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from attrs import define, evolve, field

from qlens import dialects, sse
from qlens.call import Call, Reply
from qlens.errors import CallError, UpstreamTruncated
from qlens.estimates import estimated
from qlens.usage import Usage
from qlens.watching import Watcher

_SPOKEN = b"speech.audio.done"
"""The type of the event with which speech ends, where it comes in events."""


@define(eq=False)
class RawMeter(Watcher):
    """Passes bytes on as they come; nothing in them says what was used, so that the request tells it."""

    def usage(self) -> Usage:
        """What was used: the provider's word, or else an estimate; it is used up with the request."""
        if (said := self.said()) is not None:
            return said
        guess = estimated(self.call, self.reply.dialect, {})
        return guess if self.reply.complete else evolve(guess, source="partial")


@define(eq=False)
class SpokenMeter(RawMeter):
    """Passes speech on that comes in events; the last of them says what was used, and without it the speech is cut."""

    _splitter: sse.Splitter = field(init=False, factory=sse.Splitter, repr=False)
    _done: bool = field(init=False, default=False)

    def _take(self, piece: bytes) -> bytes:
        self._look(self._splitter.feed(piece))
        return piece

    async def _last(self) -> bytes:
        self._look(self._splitter.flush())
        if not self._done:
            raise UpstreamTruncated("The provider's answer stopped before its end.")
        return await super()._last()

    def _look(self, events: Iterable[bytes]) -> None:
        for event in events:
            # The others are long and hold nothing but sound.
            if _SPOKEN not in event or (data := sse.data(event)) is None:
                continue
            payload = sse.parsed(data)
            if payload.get("type") != _SPOKEN.decode():
                continue
            self._done = True
            said = dialects.named(self.reply.dialect).usage(payload)
            if said is not None and said.total:
                self.reply.usage = said


def raw_meter(call: Call, reply: Reply, failed: Callable[[BaseException], CallError]) -> RawMeter:
    """The meter for an answer that passes as it is."""
    media_type = reply.headers.get("content-type", "").partition(";")[0].strip().lower()
    spoken = reply.dialect == "speech" and media_type == "text/event-stream"
    return (SpokenMeter if spoken else RawMeter)(call, reply, failed=failed)
