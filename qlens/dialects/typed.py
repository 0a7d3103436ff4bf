"""The dialects whose streams are made of events that name their types."""

from __future__ import annotations

from typing import Protocol, cast

import orjson

from qlens import dialects
from qlens.dialects import Body, Dialect
from qlens.usage import Usage

NAMES = frozenset({"image_edits", "images", "messages", "responses", "transcriptions"})


class TypedDialect(Dialect, Protocol):
    """What the core asks of such a dialect beside what it asks of every one."""

    QUIET: tuple[bytes, ...]
    """How events begin that need no look: they say nothing of usage, errors or the end."""

    QUIET_KEPT: bool
    """Whether `assemble` needs them."""
    MARKS: tuple[bytes, ...]
    """How the texts begin in which such events differ from each other, where they differ in nothing else."""

    def event_usage(self, payload: Body, before: Usage | None) -> Usage | None:
        """What was used so far, by an event and those before it; None when none of them says so."""

    def event_ends_stream(self, payload: Body) -> bool:
        """Whether this event is the last one of a stream that came to its end."""

    def event_error(self, payload: Body) -> Body | None:
        """The error that an event carries, in OpenAI's shape; None when it carries none."""


def typed(name: str) -> TypedDialect:
    """The dialect of this name, which is one of NAMES."""
    return cast(TypedDialect, dialects.named(name))


def write(payload: Body) -> bytes:
    """One event, named after its type."""
    return b"event: %b\ndata: %b\n\n" % (str(payload["type"]).encode(), orjson.dumps(payload))
