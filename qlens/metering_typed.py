"""Reads a stream of typed events on its way to the client: usage, completeness, errors, what a cache keeps."""

from __future__ import annotations

import re
import sys
from typing import Any, Literal

from attrs import define, evolve, field

from qlens import sse, vocabularies
from qlens.call import Reply
from qlens.dialects import typed
from qlens.dialects.typed import TypedDialect
from qlens.errors import CallError, UpstreamTruncated
from qlens.estimates import BYTES_PER_TOKEN, estimated
from qlens.metering_alike import Likeness, merged, payloads
from qlens.metering_cut import Ending, ending, within, written
from qlens.metering_length import Length
from qlens.provider_errors import error_from
from qlens.surrogates import json_of
from qlens.usage import Usage, larger
from qlens.watching import EventWatcher

# Where every delta differs in something else as well, it is of no use to remember one.
_MOST_NOTED = 16
_DELTA = re.compile(rb"event: \S*delta\b")


@define(eq=False)
class TypedMeter(EventWatcher):
    """Watches one stream. Whole events pass as they come; those that a dialect calls quiet are not looked into."""

    _dialect: TypedDialect = field(init=False)
    _quiet_kept: bool = field(init=False)
    """Whether a cache needs the events that need no look."""
    _envelope: int = field(init=False, default=0)
    """The bytes around the text of the first delta that has one."""
    _shortest: int = field(init=False, default=sys.maxsize)
    """The bytes of the shortest delta that has a text, and below those around its text, or around a longer one's."""
    _bare: int = field(init=False, default=0)
    _spoken: int = field(init=False, default=0)
    """The deltas that passed, and below their bytes: these hold the answer's texts."""
    _spoken_bytes: int = field(init=False, default=0)
    _told_at: int | None = field(init=False, default=None)
    """How many of these had passed when the stream last said what was used; None: it has not said so."""
    _failed: bool = field(init=False, default=False)
    """Whether there is, or was, an error that ends the stream."""
    _last_event: bytes = field(init=False, default=b"", repr=False)
    """The event that ends the stream, once it was there."""
    _noted: int = field(init=False, default=0)
    """How many deltas were looked at, to know those that are like them."""
    _length: Length = field(init=False)
    """What is counted where there is an `_ending`."""
    _ending: Ending | None = field(init=False, default=None)
    """What ends the stream when it has more than a budget has reserved."""

    def __attrs_post_init__(self) -> None:
        self._dialect = typed.typed(self.reply.dialect)
        self._quiet_kept = bool(self.call.keep) and self._dialect.QUIET_KEPT
        if self.call.most_output is not None:
            self._length = Length(self.call.most_output, vocabularies.encoder(self.call))
            self._ending = ending(self.reply.dialect)

    def _take(self, piece: bytes) -> bytes:
        like = self._like
        if like is None or self._splitter.pending:
            return self._sift(self._splitter.feed(piece))
        if (text := like.text(piece)) is not None:
            return self._pass_deltas(piece, 1, text)
        front, events, text = like.front(piece)
        if not front:
            return self._sift(self._splitter.feed(piece))
        return self._pass_deltas(front, events, text) + self._sift(self._splitter.feed(piece[len(front) :]))

    def _pass_deltas(self, block: bytes, events: int, text: bytes) -> bytes:
        """Count so many deltas that are alike, with all their texts in a row, and go to the client."""
        self._spoken += events
        self._spoken_bytes += len(block)
        return self._pass_alike(block, events, text)

    def _flush(self) -> bytes:
        return self._sift(self._splitter.flush())

    async def _last(self) -> bytes:
        """The event that the stream ends with, once the answer was handed over."""
        if self._error is not None:
            raise self._error
        if self.reply.cut and self._ending is not None:
            return written(self._ending.events(self.usage()))
        if not self._last_event:
            raise UpstreamTruncated("The provider's answer stopped before its end.")
        self.reply.complete = True
        self._count(self._last_event)
        await self._hand_over()
        return self._last_event

    def _ends_at_once(self) -> bool:
        if self._error is not None or self.reply.cut or not self._last_event:
            return False
        return self.keeps_at_once or not self.call.keep

    def _sift(self, events: list[bytes]) -> bytes:
        """What of these events goes to the client now: all but the last of the stream, and what follows it."""
        passing = []
        try:
            for event in events:
                if self._last_event:
                    break
                is_delta = self._is_delta(event)
                if self._quiet_kept or not is_delta:
                    self._keep(event)
                if is_delta:
                    self._spoken += 1
                    self._spoken_bytes += len(event)
                    if len(event) < self._shortest and self._ending is not None:
                        self._measure(event)
                if not (is_delta and self._envelope) and self._is_last(event, is_delta):
                    self._last_event = event
                    break
                if self._ending is not None and self._is_too_much(event, self._ending):
                    break
                passing.append(event)
                self._count(event)
        except CallError as error:
            self._failed, self._error = True, error
        self._ended = self._ended or self._failed or bool(self._last_event) or self.reply.cut
        if passing and self._noted < _MOST_NOTED and self._envelope and self._ending is None:
            self._note(passing[-1])
        return b"".join(passing)

    def _note(self, event: bytes) -> None:
        """Remember what surrounds the text of a delta, which those that follow it are likely to have as well."""
        self._noted += 1
        if self._is_delta(event) and (like := Likeness.of(event, self._dialect.MARKS)) is not None:
            self._fold()
            self._like = like

    def _is_too_much(self, event: bytes, ending: Ending) -> bool:
        """Whether with this event there is more text than was reserved; else it is remembered for the end."""
        spoken = (self._spoken, self._spoken_bytes) if self._bare else (0, self.passed + len(event))
        # Once it matters, the rest of an event counts as text: it is not as long in all, and must hide none.
        if due := self._length.due(event, *spoken, 0 if self._length.begun else self._bare):
            for payload in payloads(due, marks=self._dialect.MARKS):
                for strand, _, text in self._dialect.event_texts(payload):
                    if strand:
                        self._length.add(strand, text)
            if self._bare:
                self._length.told(*spoken)
        if self._length.is_over:
            self.reply.cut, self.reply.finish = True, ending.finish
            return True
        ending.heard(event)
        return False

    def _measure(self, event: bytes) -> None:
        """Find out how much of the shortest delta is no text: a longer one then has as much text as it, or more."""
        if size := sum(map(self._said_in, payloads(event, marks=()))):
            self._shortest = len(event)
            self._bare = min(self._bare or sys.maxsize, len(event) - size)

    def _is_delta(self, event: bytes) -> bool:
        """Whether an event holds text, and need not be looked into."""
        return event.startswith(self._dialect.QUIET) and _DELTA.match(event) is not None

    def _count(self, event: bytes) -> None:
        self.events += 1
        self.passed += len(event)

    def _is_last(self, event: bytes, is_delta: bool) -> bool:
        """Look into one event; whether it ends the stream. Raises the error that it carries."""
        if not is_delta and event.startswith(self._dialect.QUIET):
            return False
        data = sse.data(event)
        if data is None or not data.strip():
            return False
        payload = sse.parsed(data)
        if is_delta:
            size = self._said_in(payload)
            self._envelope = len(event) - size if size else 0
            return False
        before, said = self.reply.usage, self._dialect.event_usage(payload, self.reply.usage)
        self.reply.usage = said
        if (error := self._dialect.event_error(payload)) is not None:
            self._failed_knowing = said is not before
            raise error_from(error)
        self.reply.finish = self._dialect.finish(payload) or self.reply.finish
        if event.startswith(b"data:") and (size := self._said_in(payload)):
            # Without a name every event is looked into.
            self._spoken += 1
            self._spoken_bytes += len(event)
            self._envelope = self._envelope or len(event) - size
        if said is not before:
            self._told_at = self._spoken
        return self._dialect.event_ends_stream(payload)

    def _said_in(self, payload: dict[str, Any]) -> int:
        """The bytes of the text that an event adds to the answer."""
        found = self._dialect.event_texts(payload)
        return sum(len(text.encode(errors="surrogatepass")) for strand, _, text in found if strand)

    # --- usage ---------------------------------------------------------------------------------

    def usage(self) -> Usage:
        """What the stream used so far: the provider's word, or else an estimate from what passed.

        A stream that was cut has used no more than was reserved for it.
        """
        used = self._used()
        return within(used, self.call.most_output or 0) if self.reply.cut else used

    def _used(self) -> Usage:
        said, guess = self.said(), self._guess()
        if self._goes_on():
            guess = max(guess, self.call.bound.output)
        if said is not None and self._is_last_word() and (said.completion or not guess):
            return said
        source: Literal["estimated", "partial"] = "estimated" if self.reply.complete else "partial"
        if (heard := self.heard()) is not None:
            said = heard if said is None else larger(heard, said)
        if said is None or not said.prompt:
            return evolve(estimated(self.call, self.reply.dialect, {}), output=guess, source=source)
        # An answer that stops in the middle has used as much as was said of it, or as was heard.
        return evolve(said, output=max(said.output, guess - said.reasoning), source=source)

    def _is_last_word(self) -> bool:
        """Whether what was said of usage is all, because the answer is over and nothing was delivered after that."""
        if self._failed_knowing:
            return True
        return self.reply.complete and (self._told_at is None or self._spoken == self._told_at)

    def _goes_on(self) -> bool:
        """Whether the provider goes on with the answer though nobody reads this stream any more."""
        over = self.reply.complete or self._failed
        return not over and self.reply.dialect == "responses" and self.call.body.get("background") is True

    def _guess(self) -> int:
        if not self._envelope:
            return 0
        text = self._spoken_bytes - self._spoken * self._envelope
        # Most servers send a token or more in a delta; those that send many are caught by the size of the text.
        return max(self._spoken, text // BYTES_PER_TOKEN)

    # --- what a cache keeps --------------------------------------------------------------------

    def _assembled(self) -> dict[str, Any]:
        events = merged(self._kept, marks=self._dialect.MARKS)
        heard = [sse.parsed(data) for event in events if (data := sse.data(event)) and data.strip()]
        return self._dialect.assemble(heard)


def exploded(reply: Reply) -> list[bytes]:
    """A whole answer as the events of the stream it would have been."""
    assert reply.body is not None
    return [typed.write(payload) for payload in typed.typed(reply.dialect).explode(json_of(reply.body))]
