"""Reads a stream on its way to the client: usage, completeness, what must be withheld, what a cache keeps."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import orjson
from attrs import define, evolve, field

from qlens import dialects, sse, vocabularies
from qlens.bridges.counts import as_openai
from qlens.call import Call, Cost, Reply
from qlens.dialects.plain import Plain
from qlens.errors import CallError, UpstreamTruncated
from qlens.exchange import error_from
from qlens.metering_cut import within
from qlens.metering_length import Length
from qlens.money import usd
from qlens.usage import Usage, counts_of, larger
from qlens.watching import EventWatcher

# What makes an event worth parsing. Inside a JSON string the quotes would be escaped, so text never matches; and
# what matches is parsed before it is believed.
_NOTABLE = re.compile(
    rb'"usage"\s*:\s*\{|"choices"\s*:\s*\[\s*\]|"finish_reason"\s*:\s*"|"error"\s*:\s*["{\[t]|\[DONE\]'
)
_TEXT = b'"content":"'
# What makes bytes in the place of a text more than one, or the end mark.
_NO_TEXT = re.compile(rb'["\[\r\n]')
# Where every event differs in something else as well, it is of no use to remember one.
_MOST_NOTED = 16
_MOST_LOOKED_AT = 4
"""How many events of a block are looked at alone, to learn what the others look like."""
_BYTES_PER_TOKEN = 4


@define(eq=False)
class Meter(EventWatcher):
    """Watches one stream. Bytes pass as they come, in whole events; only notable events are parsed."""

    price: Callable[[Usage], Cost]
    _envelope: int = field(init=False, default=0)
    """The bytes of the first event, which carries the role and hardly any text."""
    _finished: set[int] = field(init=False, factory=set)
    _usage_event: dict[str, Any] | None = field(init=False, default=None)
    _counts_there: tuple[int, ...] = field(init=False, default=())
    """The tokens that it says."""
    _hears_usage: bool = field(init=False, default=False)
    """Whether the event that is looked into says what was used."""
    _told_early: tuple[int, int] | None = field(init=False, default=None)
    """The events and the bytes that had passed when the stream last said what was used, before it was over."""
    _head: dict[str, Any] = field(init=False, factory=dict)
    _before: bytes = field(init=False, default=b"", repr=False)
    """How an event began that was not notable, up to its text."""
    _after: bytes = field(init=False, default=b"", repr=False)
    """How it went on after its text."""
    _noted: int = field(init=False, default=0)
    _done: bool = field(init=False, default=False)
    """Whether the end mark was seen."""
    _bare: int = field(init=False, default=0)
    """The bytes around the text of the shortest event that was looked at; 0: none was."""
    _measured: int = field(init=False, default=0)
    """How many events were looked at for that alone."""
    _length: Length | None = field(init=False)
    """What is counted where a budget has reserved so many tokens."""

    @_length.default
    def _reserved(self) -> Length | None:
        most = self.call.most_output
        return None if most is None else Length(most, vocabularies.encoder(self.call))

    def _let_go(self) -> None:
        super()._let_go()
        del self.price

    def _take(self, piece: bytes) -> bytes:
        block = self._splitter.take(piece)
        if self._length is not None and block:
            self._weigh(block, self._length)
            if self.reply.cut:
                return b""
        return self._look(block) if block else b""

    def _flush(self) -> bytes:
        return self._sift(self._splitter.flush())

    def _weigh(self, block: bytes, length: Length) -> None:
        """Count the texts of a block, where there may be too many by a rough count; cut the stream if there are.

        The rough count takes all that an event has beside its text for text, but for what the shortest has.
        """
        dialect = dialects.named(self.reply.dialect)
        due = length.due(block, self.passed + len(block) - self.events * self._bare)
        for event in sse.cut(due) if due else ():
            data = sse.data(event)
            if data is None or not data.startswith(b"{"):
                continue
            try:
                payload = sse.parsed(data)
            except CallError:
                continue  # whoever looks for what is notable says so
            self._head = {key: payload[key] for key in ("id", "object", "created", "model") if key in payload}
            for strand, _, text in dialect.event_texts(payload):
                length.add(strand, text)
        if length.is_over:
            self._ended = self.reply.cut = True
            self.reply.finish = "length"

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

    def _is_finished(self) -> bool:
        """Whether every choice has its finish reason."""
        return len(self._finished) >= dialects.named(self.reply.dialect).returned(self.call.body)

    def _look(self, block: bytes) -> bytes:
        """What of a block of whole events goes to the client: all of it, most of the time."""
        size, events = self._alike(block)
        if size == len(block):
            return self._pass(block, events)
        passing, looked_at = [], 0
        while block and not self._ended:
            if size:
                passing.append(self._pass(block[:size], events))
            elif looked_at < _MOST_LOOKED_AT and b"\r" not in block:
                looked_at += 1
                passing.append(self._scan(event := sse.first(block)))
                size = len(event)
            else:
                passing.append(self._scan(block))
                break
            block = block[size:]
            size, events = self._alike(block)
        return b"".join(passing)

    def _pass(self, block: bytes, events: int, size: int = -1) -> bytes:
        """Count what goes to the client as it is: so many events, of all its bytes or of `size`."""
        self._keep(block)
        self.events += events
        self.passed += len(block) if size < 0 else size
        return block

    def _alike(self, block: bytes) -> tuple[int, int]:
        """The bytes and the number of the events in front that differ from one before in nothing but a plain text.

        That one was not notable, so they are not. Most events are alike, and to compare costs a quarter of a search.
        """
        before, after = self._before, self._after
        if not before or not block.startswith(before):
            return 0, 0
        begin, end = len(before), len(block) - len(after)
        if begin <= end and block.endswith(after) and _NO_TEXT.search(block, begin, end) is None:
            return (0, 0) if block.endswith(b"\\", 0, end) else (len(block), 1)
        *texts, rest = block[begin:].split(after + before)
        if (end := rest.find(after)) >= 0:
            texts.append(rest[:end])
        size = len(texts) * (len(before) + len(after)) + sum(map(len, texts))
        # A backslash in front of a quote makes it a part of the text.
        if _NO_TEXT.search(b"".join(texts)) is not None or block.find(b"\\" + after, 0, size) >= 0:
            return 0, 0
        return size, len(texts)

    def _scan(self, block: bytes) -> bytes:
        """Search a block for what is notable, and remember how an event of it that is not looks."""
        if _is_notable(block):
            begin = _start_of_the_notable(block)
            return (self._scan(block[:begin]) if begin else b"") + self._sift(sse.cut(block[begin:]))
        if self._noted < _MOST_NOTED:
            self._note(_first_said(block))
        return self._pass(block, *_counted(block))

    def _note(self, event: bytes) -> None:
        """Remember what surrounds the text of an event that is not notable."""
        if not self._envelope:
            self._envelope = len(event)
        if (around := _around_text(event)) is not None:
            self._before, self._after = around
            self._bare_is(len(self._before) + len(self._after))
            self._noted += 1
        elif self._length is not None and self._measured < _MOST_NOTED:
            self._measured += 1
            try:
                texts = dialects.named(self.reply.dialect).event_texts(sse.parsed(sse.data(event) or b""))
            except CallError:
                return
            self._bare_is(len(event) - sum(len(orjson.dumps(text)) - 2 for _, _, text in texts))

    def _bare_is(self, size: int) -> None:
        self._bare = min(self._bare or size, size)

    def _sift(self, events: list[bytes]) -> bytes:
        """What of these events goes to the client, each looked into."""
        passing: list[bytes] = []
        self._keep(b"".join(events))
        try:
            for event in events:
                if seen := self._see(event):
                    passing.append(seen)
                if self._hears_usage:
                    self._hears_usage = False
                    count, size = _counted(b"".join(passing))
                    passed = self.events + count, self.passed + size
                    self._told_early = None if self._is_finished() else passed
        except CallError as error:
            self._ended, self._error = True, error
            if self._hears_usage:
                self._told_early = None
        self._ended = self._ended or self._done
        if passing and not self._envelope:
            self._envelope = len(_first_said(b"".join(passing)))
        block = b"".join(passing)
        count, size = _counted(block)
        self.events += count
        self.passed += size
        return block

    def _see(self, event: bytes) -> bytes:
        """Look into one event; what is returned goes to the client."""
        if not _NOTABLE.search(event):
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
        used = self._used()
        return within(used, self.call.most_output or 0) if self.reply.cut else used

    def _used(self) -> Usage:
        said, guess = self.said(), self._guess(self.events, self.passed)
        source: Literal["estimated", "partial"] = "estimated" if self.reply.complete else "partial"
        if said is None or (not said.total and self.events):
            return Usage(input=vocabularies.estimated_input(self.call), output=guess, source=source)
        if said.source != "estimated" and (said.completion or not guess):
            if self._told_early is None:
                return said
            events, passed = self._told_early
            if not self._guess(self.events - events, self.passed - passed):
                return said if self.reply.complete else evolve(said, source=source)
        # What was delivered is charged at least, whatever was said of it before it was over.
        return evolve(said, output=max(said.output, guess - said.reasoning - said.audio_out), source=source)

    def _guess(self, events: int, passed: int) -> int:
        """The tokens of so many events with so many bytes, about."""
        text = max(0, passed - events * self._envelope)
        # Most servers send a token an event; those that send more are caught by the size of the text.
        return max(events - 1, text // _BYTES_PER_TOKEN, 0)

    def _assembled(self) -> dict[str, Any]:
        found = [sse.data(event) for event in merged(sse.cut(b"".join(self._kept)))]
        payloads = [sse.parsed(data) for data in found if data and not data.startswith(b"[DONE")]
        return dialects.named(self.reply.dialect).assemble(payloads)


def _counted(block: bytes) -> tuple[int, int]:
    """How many events a block has that say something, and their bytes: keep-alives are comments, and cost nothing."""
    if not block.startswith(b":") and b"\n:" not in block:
        return sse.count(block), len(block)
    told = [event for event in sse.cut(block) if sse.data(event) is not None]
    return len(told), sum(map(len, told))


def _first_said(block: bytes) -> bytes:
    """The first event of a block that is no comment; empty when all are."""
    event = sse.first(block)
    return next((each for each in sse.cut(block) if each[:1] != b":"), b"") if event.startswith(b":") else event


def _around_text(event: bytes) -> tuple[bytes, bytes] | None:
    """What stands in front of and behind the text of an event."""
    begin = event.find(_TEXT) + len(_TEXT)
    end = event.find(b'"', begin)
    # A value is followed by a comma or a brace; with a colon it would be a name, and might become a notable one.
    if begin < len(_TEXT) or event[end + 1 : end + 2] not in {b",", b"}"}:
        return None
    return event[:begin], event[end:]


def _between(block: bytes, before: bytes, after: bytes) -> bytes | None:
    """What a block has between a beginning and an end; None when it has not both, or the end's quote is a text's."""
    end = len(block) - len(after)
    if not before or not block.startswith(before) or not block.endswith(after) or len(before) > end:
        return None
    return None if b"\\" + after in block else block[len(before) : end]


def merged(events: Iterable[bytes]) -> Iterator[bytes]:
    """The same answer in fewer events: of those that differ only in a plain text, one with all of it."""
    before = after = b""
    texts: list[bytes] = []
    for event in events:
        text = _between(event, before, after)
        if text is not None and _NO_TEXT.search(text) is None:
            texts.append(text)
            continue
        if texts:
            yield before + b"".join(texts) + after
        texts, (before, after) = [], _around_text(event) or (b"", b"")
        text = event[len(before) : len(event) - len(after)]
        if before and _NO_TEXT.search(text) is None:
            texts.append(text)
        else:
            before = after = b""
            yield event
    if texts:
        yield before + b"".join(texts) + after


def _is_notable(block: bytes) -> bool:
    """Whether one of these events is. Where each has only what nearly all have, the slow search is spared."""
    return (
        b"[DONE]" in block
        or b'"error"' in block
        or block.count(b'"usage"') != block.count(b'"usage":null')
        or block.count(b'"finish_reason"') != block.count(b'"finish_reason":null')
        or block.count(b'"choices"') != block.count(b'"choices":[{')
    ) and _NOTABLE.search(block) is not None


def _start_of_the_notable(block: bytes) -> int:
    """Where the first notable event begins, or one in front of it."""
    found = _NOTABLE.search(block)
    assert found is not None
    boundary = -1 if b"\r" in block else block.rfind(b"\n\n", 0, found.start())
    return boundary + 2 if boundary >= 0 else 0


def cost_text(cost: Cost) -> str | None:
    """A cost as clients see it: a decimal text, null when the price is unknown."""
    return None if cost.picos is None else usd(cost.picos)


def estimated(call: Call, dialect: str, body: dict[str, Any]) -> Usage:
    """A guess at what a whole answer used, for providers that do not say."""
    spoken = dialects.named(dialect)
    texts = [text for _, text in spoken.reply_texts(body)]
    counted = vocabularies.estimated_output(call, "\n".join(texts))
    if counted is None:
        counted = -(-sum(len(text.encode(errors="surrogatepass")) for text in texts) // _BYTES_PER_TOKEN)
    meters = spoken.guessed_meters(call.bound.meters, texts) if isinstance(spoken, Plain) else {}
    return Usage(input=vocabularies.estimated_input(call), output=counted, meters=meters, source="estimated")


def exploded(call: Call, reply: Reply, cost: Cost) -> list[bytes]:
    """A whole answer as the events of the stream it would have been."""
    assert reply.body is not None
    payloads = list(dialects.named(reply.dialect).explode(orjson.loads(reply.body)))
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
