"""What every meter does with a stream: passes it on, tells mistakes from errors, and lets go of it at the end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Self

import orjson
from attrs import define, field

from qlens import returned, sse
from qlens.bridges import Translation
from qlens.call import Body, Call, Reply
from qlens.errors import CallError
from qlens.metering_alike import Likeness
from qlens.returned import mistakes
from qlens.upstream import Answer
from qlens.usage import Usage


@define(eq=False)
class Watcher(ABC):
    """Watches one stream on its way to the client; a meter says what becomes of its pieces, and what was used."""

    call: Call
    reply: Reply
    failed: Callable[[BaseException], CallError]
    """What a provider's mistake means for the client."""
    translation: Translation | None = field(init=False, default=None, repr=False)
    """What stands in front, where the provider speaks another dialect: it may know of usage earlier."""
    _source: AsyncIterator[bytes] = field(init=False, repr=False)
    _ended: bool = field(init=False, default=False)
    """Whether nothing more is read."""
    _over: bool = field(init=False, default=False)
    """Whether nothing more is passed."""
    _closed: bool = field(init=False, default=False)
    _failed_knowing: bool = field(init=False, default=False)
    """Whether the error that ends the stream says what was used."""

    def watch(self, chunks: AsyncIterator[bytes]) -> Self:
        """Pass a stream on; raises UpstreamTruncated when it ends before it is complete."""
        self._source = chunks
        return self

    # An iterator of its own and no generator: it takes every piece from its source without a layer in between.
    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        passing = b""
        try:
            while not self._ended and not passing:
                try:
                    passing = self._take(await self._source.__anext__())
                except StopAsyncIteration:
                    self._ended = True
                    passing = self._flush()
        except BaseException as mistake:
            if self._is_stopped(mistake):
                raise
            raise self.failed(mistake) from mistake
        if passing and not (self._ended and self._ends_at_once()):
            return passing
        if self._over:
            self._let_source_go()
            raise StopAsyncIteration
        self._over = True
        return passing + await self._last()  # one write instead of two

    def _ends_at_once(self) -> bool:
        """Whether all has come, and `_last` gives what the stream ends with and waits for nothing."""
        return False

    @property
    def is_over(self) -> bool:
        """Whether nothing comes after what was given last."""
        return self._over and not self._closed

    def _let_source_go(self) -> None:
        """Close a stream that was read to its end, as its connection was: then the call has nothing to wait for."""
        if self._closed or not isinstance(source := self._source, Answer):
            return
        if self.reply.complete:
            source.leave()
        if source.is_closed and self.reply.let_go(self, source, source.close):
            self._closed = True
            self._let_go()

    async def pour(self, write: Callable[[bytes], bool]) -> None:
        """Give what passes to a function at once, as it arrives, until it returns False or the stream must be iterated.

        A piece that is iterated for costs a turn of the event loop and of its task; most of a stream passes here.
        """
        if self._ended or not isinstance(self._source, Answer):
            return

        take = self._take

        def sink(piece: bytes) -> bool:
            passing = take(piece)
            return (not passing or write(passing)) and not self._ended

        try:
            await self._source.pour(sink)
        except BaseException as mistake:
            if self._is_stopped(mistake):
                raise
            raise self.failed(mistake) from mistake

    def _is_stopped(self, reason: BaseException) -> bool:
        """End the stream; whether that is raised as it is, because it is no provider's mistake."""
        self._ended = self._over = True
        if isinstance(reason, CallError) and reason.usage is not None:
            self.reply.usage, self._failed_knowing = reason.usage, True
        return isinstance(reason, CallError) or not isinstance(reason, mistakes())

    async def aclose(self) -> None:
        """Pass nothing more, and let go of what was needed for that; how much was used can still be asked."""
        if not self._closed:
            self._closed = self._ended = self._over = True
            self._let_go()
            if self.reply.chunks is self:
                self.reply.chunks = None

    def _let_go(self) -> None:
        """Drop what refers back to this object: it would leave a cycle to the collector."""
        del self._source, self.failed

    def _take(self, piece: bytes) -> bytes:
        """What a piece becomes; it may become nothing yet."""
        return piece

    def _flush(self) -> bytes:
        """What was held when the source ended."""
        return b""

    async def _last(self) -> bytes:
        """What the stream ends with; raises what makes it no success, or StopAsyncIteration for nothing."""
        self.reply.complete = True
        raise StopAsyncIteration

    def said(self) -> Usage | None:
        """What the provider says was used; it may say so at any time."""
        try:
            return returned.usage(self.reply.usage)
        except TypeError:
            return None

    def heard(self) -> Usage | None:
        """What the provider of a translated stream has said so far, which need not be its last word."""
        return None if self.translation is None else self.translation.used

    @abstractmethod
    def usage(self) -> Usage:
        """What the stream used so far: the provider's word, or else an estimate from what passed."""


@define(eq=False)
class EventWatcher(Watcher):
    """Watches a stream of events, of which a cache may keep the answer."""

    ended: Callable[[bytes], Awaitable[None]]
    """Awaited with the assembled answer before the end event passes, when the call asked to `keep` it."""
    keeps_at_once: bool = field(kw_only=True, default=False)
    """Whether nothing is waited for in there."""
    events: int = field(init=False, default=0)
    """Events with data that passed."""
    passed: int = field(init=False, default=0)
    """Their bytes."""
    _splitter: sse.Splitter = field(init=False, factory=sse.Splitter, repr=False)
    _error: CallError | None = field(init=False, default=None)
    """What ends the stream after the events in front of it."""
    _kept: list[bytes] = field(init=False, factory=list, repr=False)
    _kept_bytes: int = field(init=False, default=0)
    _like: Likeness | None = field(init=False, default=None, repr=False)
    """How an event looks that need not be looked into."""
    _texts: list[bytes] = field(init=False, factory=list, repr=False)
    """Kept texts of the events that are alike and came last."""

    def _let_go(self) -> None:
        super()._let_go()
        self._error = None  # its traceback refers to this object too
        del self.ended

    def _pass_alike(self, block: bytes, events: int, text: bytes) -> bytes:
        """Count so many events that are alike and go to the client; one event will have all their texts in a row."""
        self.events += events
        self.passed += len(block)
        if (most := self.call.keep) and self._kept_bytes <= most:
            self._texts.append(text)
            self._kept_bytes += len(block)
        return block

    def _fold(self) -> None:
        """Make one event of the kept texts in a row."""
        if self._texts and self._like is not None:
            self._kept.append(self._like.event(self._texts))
            self._texts = []

    def _keep(self, block: bytes) -> None:
        self._fold()
        if self.call.keep and self._kept_bytes <= self.call.keep:
            self._kept.append(block)
            self._kept_bytes += len(block)

    async def _hand_over(self) -> None:
        """Give the cache what it asked for."""
        if not self.call.keep or self._kept_bytes > self.call.keep:
            return
        try:
            self._fold()
            body = orjson.dumps(self._assembled())
        except (CallError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            return  # good enough for the client, who reads the events one by one, and nothing to keep
        await self.ended(body)

    @abstractmethod
    def _assembled(self) -> Body:
        """The answer that the kept events make."""
