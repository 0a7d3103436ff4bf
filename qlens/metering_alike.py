"""What the events of a stream look like that differ in nothing but their text, which is nearly all of them.

To compare one with those before it costs a small part of what it costs to parse it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
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
# What makes bytes in the place of a text more than one, or the end mark.
_NO_TEXT = re.compile(rb'["\[\r\n]')
_BACKSLASH = 0x5C
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
    _tail: int = field(init=False)
    """The bytes behind the text, or behind the padding."""

    def __attrs_post_init__(self) -> None:
        self._begin, self._tail = len(self.before), len(self.last or self.after)

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
        if begin > end or not event.startswith(self.before) or not event.endswith(self.last or self.after):
            return None
        if self.last:
            close = event.find(b'"', begin, end)
            padding = close + len(self.after)
            if close < 0 or not event.startswith(self.after, close) or _NO_TEXT.search(event, padding, end):
                return None
            end = close
        text = event[begin:end]
        # A backslash in front of a quote makes it a part of the text.
        return None if _NO_TEXT.search(text) or (text and text[-1] == _BACKSLASH) else text

    def front(self, block: bytes) -> tuple[int, int, bytes]:
        """The bytes, the number and the texts of the events like it that a block of whole events begins with.

        Not where they are padded: there each would have to be compared alone, and a search of all of them costs less.
        """
        before, after, begin = self.before, self.after, self._begin
        if self.last or not block.startswith(before):
            return 0, 0, b""
        *texts, rest = block[begin:].split(after + before)
        if (end := rest.find(after)) >= 0:
            texts.append(rest[:end])
        text = b"".join(texts)
        size = len(texts) * (begin + len(after)) + len(text)
        if _NO_TEXT.search(text) is not None or block.find(b"\\" + after, 0, size) >= 0:
            return 0, 0, b""
        return size, len(texts), text


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
