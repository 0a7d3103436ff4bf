"""Counts how many tokens a stream has at least, so that it is ended where it has more than a budget has reserved.

A provider that keeps to its max tokens is never cut: what is counted is never more than what there is. By the model's
own vocabulary, where that is on this machine, it is the tokens but for the last word. Without one it is the words,
since no token is a part of two, or where there are no words so many tokens as the bytes must have; it begins only
where a stream may have more, and costs others nothing.
"""

from __future__ import annotations

import re
from collections.abc import Hashable

from attrs import define, field

from qlens.vocabularies import Encode

LONGEST_TOKEN = 128
"""The bytes of the longest token of OpenAI's vocabularies: no text has fewer tokens than its bytes by this."""
_SHORTEST_WORD = 2
"""The bytes of a word and what stands behind it."""
_UNREAD_BYTES = 65_536
"""So many bytes of events wait to be read; they are many times as long as the texts in them."""
_LONGEST_WORD = 256
"""What is longer has no spaces, and is counted in pieces."""
_AT_EDGE = 2
"""The tokens that a text has more when it is cut into two at any place."""
# As vocabularies see it: four control characters are spaces to Python alone.
_SPACE = r"[^\S\x1c-\x1f]"
_LAST_WORD = re.compile(rf"({_SPACE}+)(?:\S|[\x1c-\x1f])+{_SPACE}*\Z")


@define(eq=False)
class Length:
    """What one stream has said."""

    most: int
    """The tokens that it may have."""
    encode: Encode | None = None
    """The model's vocabulary."""
    begun: bool = field(init=False, default=False)
    """Whether there were texts to be added."""
    counted: int = field(init=False, default=0)
    """No more tokens than there are."""
    _told_events: int = field(init=False, default=0)
    _told_size: int = field(init=False, default=0)
    _unread: list[bytes] = field(init=False, factory=list, repr=False)
    _unread_bytes: int = field(init=False, default=0)
    _bytes: int = field(init=False, default=0)
    _words: int = field(init=False, default=0)
    _inside: dict[Hashable, bool] = field(init=False, factory=dict)
    """Whether a text has stopped within a word."""
    _waiting: dict[Hashable, list[str]] = field(init=False, factory=dict, repr=False)
    """What of the texts the vocabulary has not counted."""
    _waiting_bytes: int = field(init=False, default=0)

    @property
    def is_over(self) -> bool:
        """Whether there is surely more than there may be."""
        return self.counted > self.most

    def due(self, block: bytes, events: int, size: int, bare: int) -> bytes:
        """The events whose texts are to be added now, when these have come; nothing while there cannot be too many.

        All that came so far are `events` or more, of `size` bytes, of which each has `bare` at least beside its text.
        """
        new = size - self._told_size - (events - self._told_events) * bare
        if self.encode is None:
            # A word has two bytes with what stands behind it, a token has at least one.
            new //= _SHORTEST_WORD
        if self.encode is not None or self.begun:
            self._unread.append(block)
            self._unread_bytes += len(block)
        if self.counted + self._waiting_bytes + new <= self.most and self._unread_bytes <= _UNREAD_BYTES:
            return b""
        found = b"".join(self._unread) or block
        self.begun, self._unread, self._unread_bytes = True, [], 0
        return found

    def told(self, events: int, size: int) -> None:
        """Take note that all texts of so many events of so many bytes have been added, or never will be."""
        self._told_events, self._told_size = events, size

    def add(self, strand: Hashable, text: str) -> None:
        """Take a text that goes on where the last one of this strand has ended."""
        if not text:
            return
        size = len(text.encode(errors="surrogatepass"))
        if self.encode is not None:
            self._waiting.setdefault(strand, []).append(text)
            self._waiting_bytes += size
            if self.counted + self._waiting_bytes > self.most:
                self._count(self.encode)
            return
        self._bytes += size
        self._words += len(text.split()) - (self._inside.get(strand, False) and not text[0].isspace())
        self._inside[strand] = not text[-1].isspace()
        self.counted = max(self._words, -(-self._bytes // LONGEST_TOKEN))

    def _count(self, encode: Encode) -> None:
        """Count all but the last words, which may go on."""
        self._waiting_bytes = 0
        for strand, pieces in self._waiting.items():
            head, tail, edge = _split("".join(pieces))
            if head:
                self.counted += max(0, len(encode(head)) - edge)
            self._waiting[strand] = [tail]
            self._waiting_bytes += len(tail.encode(errors="surrogatepass"))


def _split(text: str) -> tuple[str, str, int]:
    """A text without its last word, that word with the spaces around it, and how many tokens more both may have."""
    last = _LAST_WORD.search(text, max(0, len(text) - 2 * _LONGEST_WORD))
    if last is None:
        return ("", text, 0) if len(text) <= _LONGEST_WORD else (text, "", _AT_EDGE)
    spaces = last[1]
    newline = max(spaces.rfind("\n"), spaces.rfind("\r")) + 1
    # Vocabularies have newlines together with what stands before them, and other spaces with what follows.
    place = last.start() + newline
    return text[:place], text[place:], 1 if newline else 0
