"""Subjects of events: what a tenant is called cannot leave its token."""

from __future__ import annotations

import hashlib
from urllib.parse import quote, unquote_to_bytes

LONGEST = 256
"""Characters of a token: NATS ends connections whose lines have more than 4096."""
_NOBODY, _EMPTY, _HASHED = "-", "%", "%%"


def subject(type_: str, tenant: str | None) -> str:
    """The subject of an event, behind its prefix, which stands for the `qlens` that QLens' own types begin with."""
    return ".".join([*map(token, type_.removeprefix("qlens.").split(".")), token(tenant)])


def token(text: str | None) -> str:
    """A text as one token: all but ASCII letters, digits, `-` and `_` is percent-encoded UTF-8; None is `-`.

    One that becomes too long is hashed: nobody can read it back, and it is another one's only by a broken hash.
    """
    if text is None:
        return _NOBODY
    if text == _NOBODY:
        return "%2D"
    raw = text.encode("utf-8", "surrogatepass")
    encoded = quote(raw, safe="").replace(".", "%2E").replace("~", "%7E") or _EMPTY
    return encoded if len(encoded) <= LONGEST else f"{_HASHED}{hashlib.sha256(raw).hexdigest()}"


def untoken(encoded: str) -> str | None:
    """The text that a token stands for; raises ValueError for one that was too long."""
    if encoded == _NOBODY:
        return None
    if encoded == _EMPTY:
        return ""
    if encoded.startswith(_HASHED):
        raise ValueError("it was too long, and is hashed")
    return unquote_to_bytes(encoded).decode("utf-8", "surrogatepass")
