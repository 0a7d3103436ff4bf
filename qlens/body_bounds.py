"""How many objects a request's body may have: each is looked at, while all other calls wait."""

from __future__ import annotations

from typing import Any

from qlens.errors import InvalidRequest

MOST_OBJECTS = 50_000
"""More than any conversation with its tools has: a million of them take seconds to validate, to count and to send."""
LARGE_BYTES = 256 * 1024
"""Bodies up to this size are not looked at: what fits into one takes no time."""


def refuse_crowd(raw: bytes, body: dict[str, Any]) -> None:
    """Raise InvalidRequest for a body, as it came and parsed, that has too many objects."""
    if len(raw) <= LARGE_BYTES or raw.count(b"{") <= MOST_OBJECTS:
        return
    # The braces may stand in texts.
    left, seen = [body], 0
    while left:
        value: Any = left.pop()
        if type(value) is dict:
            seen += 1
            if seen > MOST_OBJECTS:
                raise InvalidRequest(f"The body of your request has more than {MOST_OBJECTS} JSON objects.")
            left.extend(value.values())
        elif type(value) is list:
            left.extend(value)
