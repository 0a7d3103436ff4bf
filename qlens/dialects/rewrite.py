"""Sends every text of an answer through a function, in a body or, held back as far as it must be, in a stream."""

from __future__ import annotations

from collections.abc import AsyncIterator, Generator, Iterator
from functools import partial
from typing import Any

import orjson
from attrs import define, field

from qlens import dialects, sse
from qlens.dialects import Body, Dialect, Fixed, Ref, Strand, jsons, signed, typed
from qlens.dialects.growing import Growing, Rewrite
from qlens.errors import Blocked, UpstreamInvalid
from qlens.surrogates import json_of

_MAX_HELD = 1024 * 1024
_MAX_STRANDS = 4096
_SPELLED = ("logprobs", "token_ids")
"""Fields beside a text that spell it again."""
_EVENT_FRAME = frozenset({"id", "object", "created", "model", "system_fingerprint", "service_tier", "obfuscation"})
_DELTA_FRAME = frozenset({"index", "type"})


def rewrite_body(dialect: str, body: bytes, fn: Rewrite) -> bytes:
    """Send every text of a complete answer through `fn`; a body in which nothing changes stays as it is."""
    try:
        answer = json_of(body)
    except orjson.JSONDecodeError:
        return body
    if type(answer) is not dict:
        return body
    changed = signed.may_have_closed(body) and signed.without_closed(answer, fn)
    unsigned: list[Ref] = []
    for ref, text in dialects.named(dialect).reply_texts(answer):
        new = _rewritten(fn, (), ref, text)
        if new != text:
            changed = True
            if signed.is_signed(answer, ref):
                unsigned.append(ref)
            dialects.put(answer, ref, new)
            _forget_spelling(answer[ref[0]][ref[1]] if len(ref) > 1 else answer)
    for ref in reversed(unsigned):  # the last first, for blocks that go leave no gap
        signed.unsign(answer, ref)
    return orjson.dumps(answer) if changed else body


def _rewritten(fn: Rewrite, strand: Strand, ref: Ref, text: str) -> str:
    """A text that is whole, sent through `fn`; raises Blocked for what cannot be another."""
    if type(ref) is Fixed:
        return _kept(fn, text)
    return _arguments(fn, text) if jsons.is_told(strand, ref) else fn(text)


def _arguments(fn: Rewrite, source: str) -> str:
    return jsons.rewritten(source, fn, lambda key: _kept(fn, key))


def _kept(fn: Rewrite, text: str) -> str:
    if fn(text) != text:
        raise Blocked(
            "The answer was blocked: this gateway would have to rewrite a name in it that must stay as it is."
        )
    return text


def rewrite_plain(body: bytes, fn: Rewrite) -> bytes:
    """Send a complete answer that is plain text through `fn`; what is no text stays as it is."""
    try:
        return fn(body.decode()).encode(errors="surrogatepass")
    except UnicodeDecodeError:
        return body


async def rewrite_stream(
    dialect: str, events: AsyncIterator[bytes], fn: Rewrite, hold_back: int
) -> AsyncIterator[bytes]:
    """Send every text of a stream through `fn`, as if each were there as a whole.

    Nothing of a match passes before the whole match is known, provided that no match is longer than `hold_back`
    characters; 0 means that `fn` looks at each character alone. `fn` is called many times with pieces of the same text,
    so it must have no effects. Log probabilities are removed where text is held back or changed: they spell it.
    """
    stream = _Stream(dialects.named(dialect), fn, hold_back)
    try:
        async for event in events:
            for out in stream.feed(event):
                yield out
        for out in stream.flush():
            yield out
    finally:
        if aclose := getattr(events, "aclose", None):
            await aclose()


@define(eq=False)
class _Stream:
    dialect: Dialect
    fn: Rewrite
    hold_back: int
    strands: dict[Strand, tuple[Growing | jsons.Arriving, Body]] = field(factory=dict)
    """The text of each strand that has not passed yet, and the event that began it."""
    _number: int = field(init=False, default=0)
    """The number of the event at hand, where events are numbered."""
    _added: int = field(init=False, default=0)
    """How many events were put between those that came."""
    _unsigned: set[Strand] = field(init=False, factory=set)
    """The thoughts that were rewritten, and whose signatures came after them."""

    def feed(self, event: bytes) -> Iterator[bytes]:
        """Take an event; hand out what can pass now."""
        payload = sse.data(event)
        if payload is None:
            yield event
            return
        if payload == b"[DONE]":
            yield from self.flush()
            yield event
            return
        body = sse.parsed(payload)  # or it could not be told what a client would read in it
        if body.get("error"):
            yield from self.flush()
        yield from self._rewritten(event, body)

    def flush(self) -> Iterator[bytes]:
        """Let go all that is held."""
        for strand in list(self.strands):
            yield from self._let_go(strand)

    def _let_go(self, strand: Strand) -> Iterator[bytes]:
        growing, event = self.strands.pop(strand)
        if text := growing.end():
            own = self.dialect.text_event(event, strand, text)
            if "sequence_number" in own:
                own["sequence_number"] = self._number + self._added
                self._added += 1
            # Clients of dialects with typed events read no event that has no name.
            yield typed.write(own) if "type" in own else sse.write(own)

    def _rewritten(self, event: bytes, body: Body) -> Iterator[bytes]:
        places = self.dialect.event_texts(body)
        number = body.get("sequence_number")
        if type(number) is int:
            self._number = number
        passing = {
            ref: self._take(body, strand, ref, text) if strand else _rewritten(self.fn, strand, ref, text)
            for strand, ref, text in places
        }
        changed = "delta" in body and (yield from self._signature(body))
        ends = set(self.dialect.event_ends(body))
        # A thought that is signed has come to its end.
        proven = {strand for strand, ref, _ in places if ref[-1] == "thinking" and signed.is_signed(body, ref)}
        unsigned: list[tuple[Ref, bool]] = []
        if ends or proven:
            last = {strand: ref for strand, ref, _ in places}
            over = [strand for strand in self.strands if strand[0] in ends or strand in proven]
            unsigned = yield from self._end(body, over, last, passing)
        if self._added > 0 and type(number) is int:
            changed = True
            body["sequence_number"] = self._number + self._added
        for _, ref, text in places:
            if type(ref) is not Fixed and passing[ref] != text:  # a key has the same ref as its value
                changed = True
                dialects.put(body, ref, passing[ref])
        for ref, whole in reversed(unsigned):
            changed = True
            signed.unsign(body, ref, whole=whole)
        if signed.may_have_closed(event):
            changed = signed.without_closed(body, self.fn) or changed
        if changed or self.hold_back:
            changed = _forget_spelling(body) or changed
        if not changed:
            yield event
        elif not _is_empty(body, _EVENT_FRAME):
            yield sse.replace(event, body)

    def _end(
        self, body: Body, over: list[Strand], last: dict[Strand, Ref], passing: dict[Ref, str]
    ) -> Generator[bytes, None, list[tuple[Ref, bool]]]:
        """Add the rest of these texts to what passes of them in this event, or let it go before the event.

        Returns the thoughts that were rewritten though they are signed, and whether each is whole in the event.
        """
        unsigned = []
        for strand in over:
            if strand not in last:
                yield from self._let_go(strand)
                continue
            growing, began = self.strands.pop(strand)
            passing[last[strand]] += growing.end()
            if growing.changed and signed.is_signed(body, last[strand]):
                unsigned.append((last[strand], began is body))
        return unsigned

    def _signature(self, body: Body) -> Generator[bytes, None, bool]:
        """Let go the thought that this event signs; tell whether the signature had to be taken back."""
        strand = signed.strand_of(body)
        if strand in self.strands:
            growing, _ = self.strands[strand]
            yield from self._let_go(strand)
            if growing.changed:
                self._unsigned.add(strand)
                body["delta"]["signature"] = signed.REWRITTEN
                return True
        elif strand in self._unsigned:
            body["delta"]["signature"] = ""
            return True
        return False

    def _take(self, event: Body, strand: Strand, ref: Ref, text: str) -> str:
        """Hold a text; return what can pass of its strand."""
        if strand not in self.strands:
            self.strands[strand] = self._opened(strand, ref), event
        growing, _ = self.strands[strand]
        passing = growing.grow(text)
        if growing.size > _MAX_HELD or len(self.strands) > _MAX_STRANDS:
            raise UpstreamInvalid("The provider's answer cannot be looked through: too much of it must be held back.")
        return passing

    def _opened(self, strand: Strand, ref: Ref) -> Growing | jsons.Arriving:
        if jsons.is_told(strand, ref):
            return jsons.Arriving(partial(_arguments, self.fn))
        return Growing(self.fn, self.hold_back)


def _forget_spelling(node: Any) -> bool:
    """Remove what spells texts again; tell whether there was something."""
    if type(node) is list:
        return any(list(map(_forget_spelling, node)))
    if type(node) is not dict:
        return False
    spelled = [name for name in _SPELLED if node.get(name)]
    for name in spelled:
        node[name] = None
    return any([bool(spelled), *map(_forget_spelling, node.values())])


def _is_empty(node: Any, frame: frozenset[str]) -> bool:
    """Tell whether nothing is left in an event that a client would miss."""
    if type(node) is dict:
        return all(name in frame or _is_empty(child, _DELTA_FRAME) for name, child in node.items())
    if type(node) is list:
        return all(_is_empty(child, _DELTA_FRAME) for child in node)
    return not node
