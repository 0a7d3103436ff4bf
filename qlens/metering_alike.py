"""What the events of a stream look like that differ in nothing but their text, which is nearly all of them.

To compare one with those before it costs a small part of what it costs to parse it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from operator import itemgetter
from typing import Any

from attrs import define, field

from qlens import sse
from qlens.errors import CallError

CHAT = (b'"content":"', b'"reasoning_content":"', b'"reasoning":"')
"""How the texts of a chat begin."""
_PADDING = b',"obfuscation":"'
"""What OpenAI hides the length of a text behind: as many letters as it takes, in every event others."""
_DELTA = b'"delta":{'
_FOLLOWS = {b",", b"}"}
# What makes bytes in the place of a text more than one.
_no_text_in = re.compile(rb'["\r\n]').search
_BACKSLASH = 0x5C
_NONE = b"", 0, b""
# A field of a delta with a text; its role and its type are said, and not added up.
_FIELD = re.compile(rb'"(?!role"|type")[^"]*"\s*:\s*"[^"]')


@define(eq=False)
class Likeness:
    """An event that was looked into and is not notable: others that differ from it in a plain text are not, either."""

    before: bytes
    after: bytes
    """What follows its text: up to its end, or to its padding where it has one."""
    last: bytes
    """What follows its padding; empty where there is none."""
    _begin: int = field(init=False)
    _end: bytes = field(init=False)
    """What follows the text, or the padding."""
    _tail: int = field(init=False)
    _text_of: Callable[[bytes], bytes] = field(init=False, repr=False)
    """What cuts the text, or text and padding, out of the line of such an event."""
    _lines: slice | None = field(init=False)
    """Which lines of a block have the texts; None where what follows a text has lines of its own."""

    def __attrs_post_init__(self) -> None:
        self._begin, self._end = len(self.before), self.last or self.after
        self._tail = len(self._end)
        first = self.before.count(b"\n")
        self._lines = slice(first, -1, first + 2) if self._end.find(b"\n") == self._tail - 2 else None
        self._text_of = itemgetter(slice(self._begin - self.before.rfind(b"\n") - 1, 2 - self._tail))

    @classmethod
    def of(cls, event: bytes, marks: Iterable[bytes] = CHAT) -> Likeness | None:
        """How events look that are like this one; None when it has no text, which begins with one of these marks.

        Also where there are more texts than one: what two events have in common would be said once instead of twice.
        """
        for mark in marks:
            begin = event.find(mark) + len(mark)
            end = event.find(b'"', begin)
            # What follows a value is a comma or a brace; after a name it is a colon, and it might become a notable one.
            if begin >= len(mark) and end > begin and event[end + 1 : end + 2] in _FOLLOWS:
                if _says_more(event[:begin] + event[end:]):
                    return None
                padding = event.find(_PADDING, end) + len(_PADDING)
                closed = event.find(b'"', padding)
                if padding < len(_PADDING) or event[closed + 1 : closed + 2] not in _FOLLOWS:
                    return cls(event[:begin], event[end:], b"")
                return cls(event[:begin], event[end:padding], event[closed:])
        return None

    @property
    def bare(self) -> int:
        """The bytes that such an event has at least."""
        return len(self.before) + len(self.after) + len(self.last)

    def event(self, texts: Iterable[bytes]) -> bytes:
        """An event like it with all of these texts."""
        return b"".join((self.before, *texts, self.after, self.last))

    def text(self, event: bytes) -> bytes | None:
        """The text, as JSON has it, of what is exactly one event like it; None for anything else."""
        begin, end = self._begin, len(event) - self._tail
        if begin > end or not event.startswith(self.before) or not event.endswith(self._end):
            return None
        if self.last:
            close = event.find(b'"', begin, end)
            padding = close + len(self.after)
            if close < 0 or not event.startswith(self.after, close) or _no_text_in(event, padding, end):
                return None
            end = close
        # A backslash in front of a quote makes it a part of the text.
        return None if _no_text_in(event, begin, end) or event[end - 1] == _BACKSLASH else event[begin:end]

    def front(self, block: bytes) -> tuple[bytes, int, bytes]:
        """The events like it that a block of whole events begins with, their number and their texts in a row.

        Nothing where another stands between them. They are taken apart at their line ends, and what they should be is
        compared with what they are: to find all that is between two texts takes longer.
        """
        before, end = self.before, self._end
        if self._lines is None or not block.startswith(before):
            return _NONE
        between = end + before
        last = max(block.rfind(between) + len(end), 0)
        alike = block[: block.find(end, last + self._begin) + len(end)]
        texts = list(map(self._text_of, alike.split(b"\n")[self._lines]))
        if b"%b%b%b" % (before, between.join(texts), end) != alike:
            return _NONE
        paddings = b""
        if self.last:
            parts = [text.partition(self.after) for text in texts]
            texts, paddings = [text for text, _, _ in parts], b"".join([padding for _, _, padding in parts])
        text = b"".join(texts)
        more = text + paddings
        if len(more) != len(alike) - len(texts) * self.bare or b'"' in more or b"\r" in more:
            return _NONE
        if b"\\" in text and b"\\\n" in b"\n".join([*texts, b""]):
            return _NONE
        return alike, len(texts), text


def _says_more(rest: bytes) -> bool:
    """Whether there is more in an event than its one text, which is left out here, that is added up from all events."""
    if rest.count(b"[") > 1:  # one of them is around the choices
        return True
    begin = rest.find(_DELTA) + len(_DELTA)
    end = rest.find(b"}", begin)
    return begin >= len(_DELTA) and (b"{" in rest[begin:end] or _FIELD.search(rest, begin, end) is not None)


def payloads(block: bytes, like: Likeness | None = None, marks: Iterable[bytes] = CHAT) -> list[dict[str, Any]]:
    """What the events of a block say, `merged`; without those that nobody can read, whoever looks into them says so."""
    events = sse.cut(block)
    try:
        fewer = merged(events, like, marks) if len(events) > 1 else events
        return [sse.parsed(data) for event in fewer if (data := _json(event))]
    except CallError:
        pass
    found = []
    for data in filter(None, map(_json, events)):
        with suppress(CallError):
            found.append(sse.parsed(data))
    return found


def _json(event: bytes) -> bytes | None:
    """The data of an event that is to be a JSON object."""
    data = sse.data(event)
    return data if data is not None and data.startswith(b"{") else None


def merged(events: Iterable[bytes], like: Likeness | None = None, marks: Iterable[bytes] = CHAT) -> Iterator[bytes]:
    """The same answer in fewer events: of those that differ only in a plain text, one with all of it.

    `like` is how the first of them probably look, `marks` are how the texts begin.
    """
    texts: list[bytes] = []
    for event in events:
        if like is not None and (text := like.text(event)) is not None:
            texts.append(text)
            continue
        if like is not None and texts:
            yield like.event(texts)
        like, texts = Likeness.of(event, marks), []
        if like is not None and (text := like.text(event)) is not None:
            texts.append(text)
        else:
            like = None
            yield event
    if like is not None and texts:
        yield like.event(texts)
