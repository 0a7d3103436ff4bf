"""Sends every text of an answer through a function, in a body or, held back as far as it must be, in a stream."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import orjson
from attrs import define, field

from qlens import dialects, sse
from qlens.dialects import Body, Dialect, Strand, typed
from qlens.dialects.growing import Growing, Rewrite
from qlens.errors import UpstreamInvalid

_MAX_HELD = 1024 * 1024
_MAX_STRANDS = 4096
_SPELLED = ("logprobs", "token_ids")
"""Fields beside a text that spell it again."""
_EVENT_FRAME = frozenset({"id", "object", "created", "model", "system_fingerprint", "service_tier", "obfuscation"})
_DELTA_FRAME = frozenset({"index", "type"})


def rewrite_body(dialect: str, body: bytes, fn: Rewrite) -> bytes:
    """Send every text of a complete answer through `fn`; a body in which nothing changes stays as it is."""
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        return body
    if type(answer) is not dict:
        return body
    changed = False
    for ref, text in dialects.named(dialect).reply_texts(answer):
        new = fn(text)
        if new != text:
            changed = True
            dialects.put(answer, ref, new)
            _forget_spelling(answer[ref[0]][ref[1]] if len(ref) > 1 else answer)
    return orjson.dumps(answer) if changed else body


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
    strands: dict[Strand, tuple[Growing, Body]] = field(factory=dict)
    """The text of each strand that has not passed yet, and the event that began it."""
    _number: int = field(init=False, default=0)
    """The number of the event at hand, where events are numbered."""
    _added: int = field(init=False, default=0)
    """How many events were put between those that came."""

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
        passing = {ref: self._take(body, strand, text) if strand else self.fn(text) for strand, ref, text in places}
        last = {strand: ref for strand, ref, _ in places}
        ends = set(self.dialect.event_ends(body))
        for strand in [strand for strand in self.strands if strand[0] in ends]:
            if strand in last:
                passing[last[strand]] += self.strands.pop(strand)[0].end()
            else:
                yield from self._let_go(strand)
        changed = self._added > 0 and type(number) is int
        if changed:
            body["sequence_number"] = self._number + self._added
        for _, ref, text in places:
            if passing[ref] != text:
                changed = True
                dialects.put(body, ref, passing[ref])
        if changed or self.hold_back:
            changed = _forget_spelling(body) or changed
        if not changed:
            yield event
        elif not _is_empty(body, _EVENT_FRAME):
            yield sse.replace(event, body)

    def _take(self, event: Body, strand: Strand, text: str) -> str:
        """Hold a text; return what can pass of its strand."""
        if strand not in self.strands:
            self.strands[strand] = Growing(self.fn, self.hold_back), event
        growing, _ = self.strands[strand]
        passing = growing.grow(text)
        if len(growing.held) > _MAX_HELD or len(self.strands) > _MAX_STRANDS:
            raise UpstreamInvalid("The provider's answer cannot be looked through: too much of it must be held back.")
        return passing


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
