"""Reads a stream on its way to the client: usage, completeness, what must be withheld, what a cache keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import orjson
from attrs import define, evolve, field

from qlens import dialects, sse, vocabularies
from qlens.bridges.counts import as_openai
from qlens.call import Call, Cost, Reply
from qlens.errors import CallError, UpstreamTruncated
from qlens.estimates import BYTES_PER_TOKEN, delivered
from qlens.exchange import error_from
from qlens.metering_alike import CHAT, Likeness, merged, payloads
from qlens.metering_cut import within
from qlens.metering_first import last_tier_in, text_in, tier_in
from qlens.metering_length import Length
from qlens.metering_notable import NOTABLE, start_of_the_notable
from qlens.money import usd
from qlens.surrogates import json_of
from qlens.usage import Usage, counts_of, larger
from qlens.watching import EventWatcher

# Where every event differs in something else as well, it is of no use to remember one.
_MOST_NOTED = 16
_MOST_LOOKED_AT = 4
"""How many events of a block are looked at alone, to learn what the others look like."""
_FEW = 8
"""So many events are parsed as fast as they are compared."""


@define(eq=False)
class Meter(EventWatcher):
    """Watches one stream. Bytes pass as they come, in whole events; only notable events are parsed."""

    price: Callable[[Usage], Cost]
    _envelope: int = field(init=False, default=0)
    """The bytes around the text of the first event, which carries the role and mostly no text."""
    _silent: int = field(init=False, default=1)
    """How many events have no text: the first, if it says no more than the role."""
    _tier: str | None = field(init=False, default=None)
    """The service tier that was said last, by whichever event."""
    _finished: set[int] = field(init=False, factory=set)
    _usage_event: dict[str, Any] | None = field(init=False, default=None)
    _counts_there: tuple[int, ...] = field(init=False, default=())
    """The tokens that it says."""
    _hears_usage: bool = field(init=False, default=False)
    """Whether the event that is looked into says what was used."""
    _told_early: tuple[int, int] | None = field(init=False, default=None)
    """The events and the bytes that had passed when the stream last said what was used, before it was over."""
    _head: dict[str, Any] = field(init=False, factory=dict)
    _noted: int = field(init=False, default=0)
    _done: bool = field(init=False, default=False)
    """Whether the end mark was seen."""
    _bare: int = field(init=False, default=0)
    """The bytes around the text of the shortest event that was looked at; 0: none was."""
    _measured: int = field(init=False, default=0)
    """How many other events were looked at."""
    _length: Length | None = field(init=False)
    """What is counted where a budget has reserved so many tokens."""

    _known: tuple[Usage | None, Usage] | None = field(init=False, default=None)
    """What a stream that is over has used, with what the provider had said of it."""

    @_length.default
    def _reserved(self) -> Length | None:
        most = self.call.most_output
        return None if most is None else Length(most, vocabularies.encoder(self.call))

    def _let_go(self) -> None:
        super()._let_go()
        del self.price

    def _take(self, piece: bytes) -> bytes:
        like = self._like
        if like is not None and not self._splitter.pending and (text := like.text(piece)) is not None:
            # Nearly always it is one event, and one like those before it: then this is all there is to do.
            if self._length is not None and self._is_too_much(piece, 1):
                return b""
            self.events += 1
            self.passed += len(piece)
            if (most := self.call.keep) and self._kept_bytes <= most:
                self._texts.append(text)
                self._kept_bytes += len(piece)
            return piece
        block = self._splitter.take(piece)
        return self._look(block) if block and not self._is_too_much(block) else b""

    def _flush(self) -> bytes:
        return self._sift(self._splitter.flush())

    def _is_too_much(self, block: bytes, alike: int = 0) -> bool:
        """Whether with this block there is more text than was reserved, which ends the stream.

        The rough count takes all that an event has beside its text for text, but for what the shortest has; of a block,
        where it is not known to be so many events that are `alike`, it takes all.
        """
        if (length := self._length) is None:
            return False
        events, size = self.events + alike, self.passed + len(block)
        # Once it matters, the rest of an event counts as text: it is not as long in all, and must hide none.
        if not (due := length.due(block, events, size, 0 if length.begun else self._bare)):
            return False
        dialect = dialects.named(self.reply.dialect)
        for payload in payloads(due, self._like):
            self._head = {key: payload[key] for key in ("id", "object", "created", "model") if key in payload}
            heard = dialect.event_texts(payload)
            if len(heard) > 1:  # some servers say the same in two fields
                heard = list({(strand[0], text): (strand, ref, text) for strand, ref, text in heard}.values())
            for strand, _, text in heard:
                length.add(strand, text)
        length.told(events, size if alike else self.passed)  # who knows how much of another block will pass
        if length.is_over:
            self._ended = self.reply.cut = True
            self.reply.finish = "length"
        return length.is_over

    def _cut_short(self) -> bytes:
        """The end of a stream that was cut: every choice that is not over has reached its length."""
        empty: dict[str, Any] = {"text": ""} if self.reply.dialect == "completions" else {"delta": {}}
        left = set(range(dialects.named(self.reply.dialect).returned(self.call.body))) - self._finished
        choices = [{"index": index, **empty, "finish_reason": "length"} for index in sorted(left)]
        return sse.write({**self._head, "choices": choices}) + self._usage() + sse.DONE

    async def _last(self) -> bytes:
        if self._error is not None:
            raise self._error
        if self.reply.cut:
            return self._cut_short()
        if not self._done and not self._is_finished():
            raise UpstreamTruncated("The provider's answer stopped before its end.")
        # A finish reason followed by the end of the stream is complete: some servers send no [DONE].
        self.reply.complete = True
        await self._hand_over()
        return self._usage() + sse.DONE

    def _ends_at_once(self) -> bool:
        return self._done and self._error is None and not self.reply.cut and (self.keeps_at_once or not self.call.keep)

    def _is_finished(self) -> bool:
        """Whether every choice has its finish reason."""
        return len(self._finished) >= dialects.named(self.reply.dialect).returned(self.call.body)

    def _look(self, block: bytes) -> bytes:
        """What of a block of whole events goes to the client: all of it, most of the time."""
        passing: list[bytes] = []
        looked_at = 0
        while block and not self._ended:
            # Most events are alike, and to compare costs a quarter of a search.
            front, events, text = (b"", 0, b"") if self._like is None else self._like.front(block)
            if front:
                passing.append(self._pass_alike(front, events, text))
            elif _is_the_end(block):
                passing.append(self._sift(sse.cut(block)))
                break
            elif looked_at < _MOST_LOOKED_AT and b"\r" not in block:
                looked_at += 1
                passing.append(self._scan(front := sse.first(block)))
            else:
                passing.append(self._scan(block))
                break
            block = block[len(front) :]
        return b"".join(passing)

    def _pass(self, block: bytes, events: int, size: int) -> bytes:
        """Count what goes to the client as it is: so many events, of so many bytes."""
        self._keep(block)
        self.events += events
        self.passed += size
        return block

    def _scan(self, block: bytes) -> bytes:
        """Search a block for what is notable, and remember how an event of it that is not looks."""
        if (begin := start_of_the_notable(block)) >= 0:
            return (self._scan(block[:begin]) if begin else b"") + self._sift(sse.cut(block[begin:]))
        if self._noted < _MOST_NOTED or self._measured < _MOST_NOTED:
            self._note(_first_said(block))
            if self._like is not None and (text := self._like.text(block)) is not None:
                return self._pass_alike(block, 1, text)
        if b'"service_tier"' in block:
            self._tier = last_tier_in(block) or self._tier
        return self._pass(block, *_counted(block))

    def _note(self, event: bytes) -> None:
        """Remember what surrounds the text of an event that is not notable."""
        if not self._envelope:
            self._begin(event)
        self._tier = tier_in(event) or self._tier
        # Events of reasoning are not counted with the others: they are longer beside their text, and would hide theirs.
        is_content = CHAT[0] in event
        if (self._noted if is_content else self._measured) >= _MOST_NOTED:
            return
        like = Likeness.of(event)
        if like is None and self._length is None:
            return
        self._noted += is_content
        self._measured += not is_content
        if like is not None:
            self._fold()
            self._like = like
            self._bare_is(like.bare)
        else:
            try:
                texts = dialects.named(self.reply.dialect).event_texts(sse.parsed(sse.data(event) or b""))
            except CallError:
                return
            self._bare_is(len(event) - sum(len(orjson.dumps(text)) - 2 for _, _, text in texts))

    def _begin(self, event: bytes) -> None:
        """Learn from the first event what all have beside their text."""
        said = text_in(event, self.reply.dialect)
        self._envelope, self._silent = len(event) - said, 0 if said else 1

    def _bare_is(self, size: int) -> None:
        self._bare = min(self._bare or size, size)

    def _sift(self, events: list[bytes]) -> bytes:
        """What of these events goes to the client, each looked into."""
        passing: list[bytes] = []
        if sse.DONE in events:
            events = events[: events.index(sse.DONE) + 1]  # what comes after it is nobody's
        self._keep(b"".join(events))
        try:
            for event in events:
                if seen := self._see(event):
                    passing.append(seen)
                if self._hears_usage:
                    self._hears_usage = False
                    self._told_early = None if self._is_finished() else self._passed_with(passing)
        except CallError as error:
            self._ended, self._error = True, error
            if self._hears_usage:
                self._told_early = None
        self._ended = self._ended or self._done
        block = b"".join(passing)
        if block and not self._envelope:
            self._begin(_first_said(block))
        self.events, self.passed = self._passed_with(passing)
        return block

    def _passed_with(self, events: Iterable[bytes]) -> tuple[int, int]:
        """How many events will have passed with these, and how many bytes."""
        count, size = _counted(b"".join(events))
        return self.events + count, self.passed + size

    def _see(self, event: bytes) -> bytes:
        """Look into one event; what is returned goes to the client."""
        if not NOTABLE.search(event):
            self._tier = tier_in(event) or self._tier
            return b"" if self._done else event
        data = sse.data(event)
        if data is None or self._done:
            return b"" if self._done else event
        if data.startswith(b"[DONE]"):
            self._done = self.reply.complete = True
            return b""
        payload = sse.parsed(data)
        if payload.get("error"):
            self._heard(dialects.named(self.reply.dialect).usage(payload))
            raise error_from(payload, None)
        return self._read(event, payload)

    def _heard(self, usage: Usage | None) -> None:
        if usage is not None:
            self.reply.usage, self._hears_usage = larger(self.reply.usage, usage), True

    def _read(self, event: bytes, payload: dict[str, Any]) -> bytes:
        dialect = dialects.named(self.reply.dialect)
        self._heard(usage := dialect.usage(payload))
        if type(tier := payload.get("service_tier")) is str:
            self._tier = tier or self._tier
        choices = payload.get("choices")
        if not choices:
            # OpenAI's usage event, or Azure's first event with its filter results: the first is kept for the end, the
            # second would break clients that read choices[0].
            if usage:
                self._usage_event, self._counts_there = payload, counts_of(usage)
            return b""
        self._head = {key: payload[key] for key in ("id", "object", "created", "model") if key in payload}
        self._finished.update(dialect.event_ends(payload))
        for choice in choices:
            if isinstance(choice, dict) and choice.get("finish_reason"):
                self.reply.finish = choice["finish_reason"]
        return event

    def _usage(self) -> bytes:
        """The usage event for a client that asked for it, with the exact cost; else nothing."""
        if not self.call.wants_usage:
            return b""
        usage = self.usage()
        event = self._usage_event
        # What is shown is what is priced: an event may say less than one before it, or than what was delivered.
        if event is None or usage.source != "provider" or counts_of(usage) != self._counts_there:
            event = {**self._head, "choices": [], "usage": as_openai(usage)}
        event["usage"]["cost_usd"] = cost_text(self.price(usage))
        return sse.write(event)

    def usage(self) -> Usage:
        """What the stream used so far: the provider's word, or else an estimate from what passed.

        A stream that was cut has used no more than was reserved for it.
        """
        if self._known is not None and self._known[0] is self.reply.usage:
            return self._known[1]
        used = self._used(heard := self.heard())
        tier = self._tier or (None if heard is None else heard.tier)
        if tier is not None and used.tier != tier:
            used = evolve(used, tier=tier)  # the event with the usage need not say it
        if self.reply.cut:
            return within(used, self.call.most_output or 0)
        if self._over and self.reply.complete:
            self._known = self.reply.usage, used  # it is asked for by the cache, the client and the receipt
        return used

    def _used(self, heard: Usage | None) -> Usage:
        said, guess = self.said(), self._guess(self.events, self.passed, self._silent)
        source: Literal["estimated", "partial"] = "estimated" if self.reply.complete else "partial"
        if said is None or (not said.total and self.events):
            if heard is None or not heard.total:
                return delivered(self.call, guess, source)
            said = heard  # before its translation has come to say it
        elif said.source != "estimated" and (said.completion or not guess):
            if self._told_early is None or self._failed_knowing:
                return said
            events, passed = self._told_early
            if not self._guess(self.events - events, self.passed - passed, silent=1):
                return said if self.reply.complete else evolve(said, source=source)
        # What was delivered is charged at least, whatever was said of it before it was over.
        return evolve(said, output=max(said.output, guess - said.reasoning - said.audio_out), source=source)

    def _guess(self, events: int, passed: int, silent: int) -> int:
        """The tokens of so many events with so many bytes, about; so many of the events have no text."""
        text = max(0, passed - events * self._envelope)
        # Most servers send a token an event; those that send more are caught by the size of the text.
        return max(events - silent, text // BYTES_PER_TOKEN, 0)

    def _assembled(self) -> dict[str, Any]:
        events = sse.cut(b"".join(self._kept))
        fewer = merged(events, self._like) if len(events) > _FEW else events
        found = [sse.data(event) for event in fewer]
        heard = [sse.parsed(data) for data in found if data and not data.startswith(b"[DONE")]
        return dialects.named(self.reply.dialect).assemble(heard)


def _is_the_end(block: bytes) -> bool:
    """Whether a block has the end mark and so few events in front of it that nothing is to be learnt from them."""
    return block.endswith(sse.DONE) and len(block.split(b"\n\n", _MOST_LOOKED_AT + 1)) <= _MOST_LOOKED_AT + 1


def _counted(block: bytes) -> tuple[int, int]:
    """How many events a block has that say something, and their bytes: keep-alives are comments, and cost nothing."""
    if not block.startswith(b":") and b"\n:" not in block:
        # Names without data, and blank lines too many, are no events: each would hide text as long as all around one.
        return min(sse.count(block), block.count(b"data:")), len(block)
    told = [event for event in sse.cut(block) if sse.data(event) is not None]
    return len(told), sum(map(len, told))


def _first_said(block: bytes) -> bytes:
    """The first event of a block that is no comment; empty when all are."""
    event = sse.first(block)
    return next((each for each in sse.cut(block) if each[:1] != b":"), b"") if event.startswith(b":") else event


def cost_text(cost: Cost) -> str | None:
    """A cost as clients see it: a decimal text, null when the price is unknown."""
    return None if cost.picos is None else usd(cost.picos)


def exploded(call: Call, reply: Reply, cost: Cost) -> list[bytes]:
    """A whole answer as the events of the stream it would have been."""
    assert reply.body is not None
    payloads = list(dialects.named(reply.dialect).explode(json_of(reply.body)))
    events = [sse.write(payload) for payload in payloads if payload.get("choices")]
    if call.wants_usage and payloads:
        head = {key: payloads[0][key] for key in ("id", "object", "created", "model") if key in payloads[0]}
        usage = {**_shown(reply, payloads), "cost_usd": cost_text(cost)}
        events.append(sse.write({**head, "choices": [], "usage": usage}))
    return [*events, sse.DONE]


def _shown(reply: Reply, payloads: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """What these events say was used, as the provider wrote it where that is what is priced."""
    said = next((payload for payload in payloads if payload.get("usage")), None)
    if said is not None:
        read = dialects.named(reply.dialect).usage(said)
        if reply.usage is None or (read is not None and counts_of(read) == counts_of(reply.usage)):
            return dict(said["usage"])
    return as_openai(reply.usage or Usage())
