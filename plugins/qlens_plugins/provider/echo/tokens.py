"""Cuts text into tokens: pieces of words, marks, and runs of blanks."""

from __future__ import annotations

import re

# Every character belongs to exactly one token and a token has at least one character, so that a text never has
# more tokens than bytes and its tokens joined are the text again.
_TOKEN = re.compile(r" ?\w{1,6}| ?[^\w\s]{1,3}|\s+")


def tokens(text: str) -> list[str]:
    """The tokens of a text, in order."""
    return _TOKEN.findall(text)


def count(text: str) -> int:
    """How many tokens a text has."""
    return len(_TOKEN.findall(text))
