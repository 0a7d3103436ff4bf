"""Sends every text of an answer through a function, in a body or, held back as far as it must be, in a stream."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any

import orjson
from attrs import define, field

from qlens import dialects, sse
from qlens.dialects import Body, Dialect, Strand
from qlens.errors import CallError, UpstreamInvalid

Rewrite = Callable[[str], str]

_LOOKS = 2
"""How far a pattern may look around its match: `\\b` looks at one character on either side."""
_MAX_HELD = 1024 * 1024
_MAX_STRANDS = 4096
_SPELLED = ("logprobs", "token_ids")
"""Fields beside a text that spell it again."""
_EVENT_FRAME = frozenset({"id", "object", "created", "model", "system_fingerprint", "service_tier", "obfuscation"})
_DELTA_FRAME = frozenset({"index", "type"})


def rewrite_body(dialect: str, body: bytes, fn: Rewrite) -> bytes:
    """Send every text of a complete answer through `fn`; a body in which nothing changes stays as it is."""
    kind = dialects.named(dialect)
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        return body
    if type(answer) is not dict:
        return body
    changed = False
    for ref, text in kind.reply_texts(answer):
        new = fn(text)
        if new != text:
            changed = True
            dialects.put(answer, ref, new)
            _forget_spelling(answer[ref[0]][ref[1]])
    return orjson.dumps(answer) if changed else body


async def rewrite_stream(
    dialect: str, events: AsyncIterator[bytes], fn: Rewrite, hold_back: int
) -> AsyncIterator[bytes]:
    """Send every text of a stream through `fn`, as if each were there as a whole.

    Nothing of a match passes before the whole match is known, provided that no match is longer than `hold_back`
    characters; 0 means that `fn` looks at each character alone. `fn` is called many times with pieces of the same text,
    so it must have no effects. Log probabilities are removed where text is held back or changed: they spell it.
    """
    stream = _Stream(dialects.named(dialect), fn, hold_back + _LOOKS if hold_back else 0)
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
class _Held:
    """The end of a strand that has not passed yet."""

    event: Body
    """The event that began it."""
    text: str = ""
    retry_at: int = 0
    """How long the text must be before it is worth looking for a place to cut again."""


@define(eq=False)
class _Stream:
    dialect: Dialect
    fn: Rewrite
    hold_back: int
    held: dict[Strand, _Held] = field(factory=dict)

    def feed(self, event: bytes) -> Iterator[bytes]:
        payload = sse.data(event)
        if payload is None:
            yield event
            return
        if payload == b"[DONE]":
            yield from self.flush()
            yield event
            return
        body = _parsed(payload)
        if body.get("error"):
            yield from self.flush()
        yield from self._rewritten(event, body)

    def flush(self) -> Iterator[bytes]:
        """Let go all that is held."""
        for strand in list(self.held):
            yield from self._let_go(strand)

    def _let_go(self, strand: Strand) -> Iterator[bytes]:
        held = self.held.pop(strand)
        if text := held.text and self.fn(held.text):
            yield sse.write(self.dialect.text_event(held.event, strand, text))

    def _rewritten(self, event: bytes, body: Body) -> Iterator[bytes]:
        places = self.dialect.event_texts(body)
        passing = {ref: self._take(body, strand, text) for strand, ref, text in places}
        last = {strand: ref for strand, ref, _ in places}
        ends = set(self.dialect.event_ends(body))
        for strand in [strand for strand in self.held if strand[0] in ends]:
            if strand in last:
                passing[last[strand]] += self.fn(self.held.pop(strand).text)
            else:
                yield from self._let_go(strand)
        changed = False
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
        """Hold a text; return what can pass of the strand."""
        held = self.held.setdefault(strand, _Held(event))
        held.text += text
        cut, passing = self._cut(held)
        held.text = held.text[cut:]
        if len(held.text) > _MAX_HELD or len(self.held) > _MAX_STRANDS:
            raise UpstreamInvalid("the provider's answer cannot be looked through: it holds back too much text")
        return passing

    def _cut(self, held: _Held) -> tuple[int, str]:
        """How much of a held text can pass, and as what: a match that starts before the edge is there to its end."""
        text, edge = held.text, len(held.text) - self.hold_back
        if not self.hold_back:
            return len(text), self.fn(text)
        if edge <= 0 or len(text) < held.retry_at:
            return 0, ""
        whole = self._try(text)
        if whole is None:
            # What is refused at the end of a text may be harmless once it goes on ("bomb", "bombastic"): wait for
            # more, unless the end alone is harmless, so that it was something before.
            if self._try(text[edge:]) is not None:
                self.fn(text)
            return 0, ""
        changed = whole != text
        # Two wrong pieces can make up the right text by chance, but hardly at every length.
        lengths = range(len(text), edge, -1) if changed else (len(text),)
        wholes = {length: rewritten for length in lengths if (rewritten := self._try(text[:length])) is not None}
        lowest = max(0, edge - 2 * self.hold_back)
        for cut in range(edge, lowest, -1):
            passing = self._try(text[:cut])
            if passing is None or (changed and not self._stands_alone(text, cut, passing)):
                continue
            if self._is_good(text, cut, passing, wholes):
                held.retry_at = 0
                return cut, passing
        if lowest:
            # A text without a good place is rare: looking again after every delta would take quadratic time.
            held.retry_at = 2 * len(text)
        return 0, ""

    def _stands_alone(self, text: str, cut: int, passing: str) -> bool:
        """Tell whether the character before a cut is rewritten by itself.

        If it is, no match goes through the cut. Otherwise a cut in a row of matches that leave nothing behind would
        look good, and the matches after it would be other ones.
        """
        before, alone = self._try(text[: cut - 1]), self._try(text[cut - 1 : cut])
        return before is not None and bool(alone) and passing == f"{before}{alone}"

    def _is_good(self, text: str, cut: int, passing: str, wholes: Mapping[int, str]) -> bool:
        """Tell whether two pieces become what the whole becomes: the cut goes through no match, and makes none."""
        for length, whole in wholes.items():
            rest = self._try(text[cut:length])
            if rest is None or passing + rest != whole:
                return False
        return True

    def _try(self, text: str) -> str | None:
        try:
            return self.fn(text)
        except CallError:
            return None


def _parsed(payload: bytes) -> Body:
    try:
        body = orjson.loads(payload)
    except orjson.JSONDecodeError:
        body = None
    if type(body) is not dict:
        # It cannot be told what a client would read in it.
        raise UpstreamInvalid("the provider sent an event that is no JSON object")
    return body


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
