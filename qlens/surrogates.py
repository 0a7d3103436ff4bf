"""JSON in which half of a surrogate pair stands alone: its grammar lets it, no Unicode text can hold it."""

from __future__ import annotations

import re
from typing import Any

import orjson

__all__ = ["json_of"]

# The whole pair, half of one, and any other escape: a backslash that is escaped begins none.
_ESCAPES = re.compile(
    rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(u[dD][89a-fA-F][0-9a-fA-F]{2})|.)", re.DOTALL
)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def json_of(data: bytes) -> Any:
    """The value of a provider's JSON; half of a surrogate pair is read as U+FFFD. Raises orjson.JSONDecodeError.

    Models stream text token by token, and some tokens end inside a character: servers that escape what is not ASCII
    then send its halves in two events. orjson refuses them, as all that cannot be encoded.
    """
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        if _SURROGATE.search(data) is None:
            raise
    return orjson.loads(_ESCAPES.sub(lambda found: rb"\ufffd" if found[1] else found[0], data))
