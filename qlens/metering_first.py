"""What is learnt of a chat stream from its first event, so that those that nobody looks into can be counted."""

from __future__ import annotations

import re
from collections.abc import Iterable

from qlens import dialects, sse
from qlens.errors import CallError
from qlens.surrogates import json_of

_LITERAL = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"')
# What most servers begin with, the role or a plain text or both; it need not be parsed.
_PLAIN_DELTA = re.compile(rb'"delta":\{(?:"role":"assistant",)?"content":(?:null|"([^"\\]*)")(?:,"refusal":null)?\}')
# Inside a JSON string the quotes would be escaped: no text says of itself that it is a tier.
_TIER = re.compile(rb'"service_tier"\s*:\s*"([^"\\]+)"')


def text_in(event: bytes, dialect: str) -> int:
    """The bytes of the text in an event, as they stand there: servers escape it each in their own way."""
    if event.count(b'"delta"') == 1 and (plain := _PLAIN_DELTA.search(event)) is not None:
        size = len(plain[1] or b"")
        if dialect == "chat" or not size:
            return size
    try:
        payload = sse.parsed(sse.data(event) or b"")
    except CallError:
        return 0  # whoever looks into it says so
    texts = [text for _, _, text in dialects.named(dialect).event_texts(payload) if text]
    return _as_written(event, texts) if texts else 0


def _as_written(event: bytes, texts: Iterable[str]) -> int:
    left, size = list(texts), 0
    for literal in _LITERAL.findall(event):
        if len(literal) > 2 and (text := json_of(literal)) in left:
            left.remove(text)
            size += len(literal) - 2
    return size


def tier_in(event: bytes) -> str | None:
    """The service tier that an event says, without parsing it."""
    found = _TIER.search(event)
    return None if found is None else found[1].decode(errors="replace")


def last_tier_in(events: bytes) -> str | None:
    """The last service tier that one of these events says."""
    found = _TIER.findall(events)
    return found[-1].decode(errors="replace") if found else None
