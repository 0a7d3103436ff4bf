"""Reads a stream of typed events on its way to the client: usage, completeness, errors, what a cache keeps."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Literal

import orjson
from attrs import define, evolve, field

from qlens import returned, sse
from qlens.call import Call, Cost, Reply
from qlens.dialects import typed
from qlens.dialects.typed import TypedDialect
from qlens.errors import CallError, UpstreamTruncated
from qlens.metering import estimated, parsed
from qlens.provider_errors import error_from
from qlens.returned import mistakes
from qlens.usage import Usage, grown

_BYTES_PER_TOKEN = 4
_DELTA = re.compile(rb"event: \S*delta\b")


@define(eq=False)
class TypedMeter:
    """Watches one stream. Whole events pass as they come; those that a dialect calls quiet are not looked into."""

    call: Call
    reply: Reply
    price: Callable[[Usage], Cost]
    """Not asked: no field of these streams is for a cost."""
    ended: Callable[[bytes], Awaitable[None]]
    """Awaited with the assembled answer before the last event passes, when the call asked to `keep` it."""
    failed: Callable[[BaseException], CallError]
    """What a provider's mistake means for the client."""
    events: int = 0
    """Events with data that passed."""
    passed: int = 0
    """Their bytes."""
    _dialect: TypedDialect = field(init=False)
    _source: AsyncIterator[bytes] = field(init=False, repr=False)
    _splitter: sse.Splitter = field(init=False, factory=sse.Splitter, repr=False)
    _kept: list[bytes] = field(init=False, factory=list, repr=False)
    _kept_bytes: int = field(init=False, default=0)
    _envelope: int = field(init=False, default=0)
    """The bytes around the text of the first delta that has one."""
    _spoken: int = field(init=False, default=0)
    """The deltas that passed, and below their bytes: these hold the answer's texts."""
    _spoken_bytes: int = field(init=False, default=0)
    _last_event: bytes = field(init=False, default=b"", repr=False)
    """The event that ends the stream, once it was there."""
    _ended: bool = field(init=False, default=False)
    """Whether nothing more is read."""
    _over: bool = field(init=False, default=False)
    """Whether nothing more is passed."""
    _error: CallError | None = field(init=False, default=None)
    """What ends the stream after the events in front of it."""

    def __attrs_post_init__(self) -> None:
        self._dialect = typed.typed(self.reply.dialect)

    def watch(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Pass a stream on; raises UpstreamTruncated when it ends before it is complete."""
        self._source = chunks
        return self

    # An iterator of its own and no generator: it takes every piece from its source without a layer in between.
    def __aiter__(self) -> TypedMeter:
        return self

    async def __anext__(self) -> bytes:
        try:
            while not self._ended:
                try:
                    events = self._splitter.feed(await self._source.__anext__())
                except StopAsyncIteration:
                    self._ended = True
                    events = self._splitter.flush()
                if passing := self._sift(events):
                    return passing
        except BaseException as mistake:
            self._ended = self._over = True
            if isinstance(mistake, CallError) or not isinstance(mistake, mistakes()):
                raise
            raise self.failed(mistake) from mistake
        return await self._last()

    async def _last(self) -> bytes:
        """The event that the stream ends with, once the answer was handed over."""
        if self._over:
            raise StopAsyncIteration
        self._over = True
        if self._error is not None:
            raise self._error
        if not self._last_event:
            raise UpstreamTruncated("The provider's answer stopped before its end.")
        self.reply.complete = True
        self._count(self._last_event)
        if self.call.keep and self._kept_bytes <= self.call.keep:
            await self._hand_over()
        return self._last_event

    def _sift(self, events: list[bytes]) -> bytes:
        """What of these events goes to the client now: all but the last of the stream, and what follows it."""
        passing = []
        try:
            for event in events:
                if self._last_event:
                    break
                self._keep(event)
                if self._is_last(event):
                    self._last_event = event
                    break
                passing.append(event)
                self._count(event)
        except CallError as error:
            self._error = error
        self._ended = self._ended or self._error is not None or bool(self._last_event)
        return b"".join(passing)

    def _count(self, event: bytes) -> None:
        self.events += 1
        self.passed += len(event)

    def _keep(self, event: bytes) -> None:
        if self.call.keep and self._kept_bytes <= self.call.keep:
            self._kept.append(event)
            self._kept_bytes += len(event)

    def _is_last(self, event: bytes) -> bool:
        """Look into one event; whether it ends the stream. Raises the error that it carries."""
        quiet = event.startswith(self._dialect.QUIET)
        if quiet:
            if not _DELTA.match(event):
                return False
            self._spoken += 1
            self._spoken_bytes += len(event)
            if self._envelope:
                return False
        data = sse.data(event)
        if data is None or not data.strip():
            return False
        payload = parsed(data)
        if quiet:
            self._envelope = self._around_text(event, payload)
            return False
        if (error := self._dialect.event_error(payload)) is not None:
            raise error_from(error)
        if (said := self._dialect.event_usage(payload)) is not None:
            self.reply.usage = grown(self.reply.usage, said)
        self.reply.finish = self._dialect.finish(payload) or self.reply.finish
        return self._dialect.event_ends_stream(payload)

    def _around_text(self, event: bytes, payload: dict[str, Any]) -> int:
        found = [text for _, _, text in self._dialect.event_texts(payload)]
        return len(event) - sum(len(text.encode(errors="surrogatepass")) for text in found) if found else 0

    # --- usage ---------------------------------------------------------------------------------

    def usage(self) -> Usage:
        """What the stream used so far: the provider's word, or else an estimate from what passed."""
        said, guess = self._said(), self._guess()
        if said is not None and self.reply.complete and (said.completion or not guess):
            return said
        source: Literal["estimated", "partial"] = "estimated" if self.reply.complete else "partial"
        if said is None or not said.prompt:
            unsaid = estimated(self.call, self.reply.dialect, {})
            return evolve(unsaid, output=guess, source=source)
        # An answer that stops in the middle has used as much as was said of it, or as was heard.
        return evolve(said, output=max(said.output, guess - said.reasoning), source=source)

    def _said(self) -> Usage | None:
        try:
            return returned.usage(self.reply.usage)  # the provider may set it at any time
        except TypeError:
            return None

    def _guess(self) -> int:
        if not self._envelope:
            return 0
        text = self._spoken_bytes - self._spoken * self._envelope
        # Most servers send a token or more in a delta; those that send many are caught by the size of the text.
        return max(self._spoken, text // _BYTES_PER_TOKEN)

    # --- what a cache keeps --------------------------------------------------------------------

    async def _hand_over(self) -> None:
        try:
            payloads = [parsed(data) for event in self._kept if (data := sse.data(event)) and data.strip()]
            body = orjson.dumps(self._dialect.assemble(payloads))
        except (CallError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            return  # good enough for the client, who reads the events one by one, and nothing to keep
        await self.ended(body)


def exploded(reply: Reply) -> list[bytes]:
    """A whole answer as the events of the stream it would have been."""
    assert reply.body is not None
    return [typed.write(payload) for payload in typed.typed(reply.dialect).explode(orjson.loads(reply.body))]
