"""Events as records of the outbox: all that is needed to send them, whatever the configuration says then."""

from __future__ import annotations

import hashlib

from attrs import define

_LONGEST_ID = 256


@define(eq=False)
class Message:
    """An event on its way."""

    subject: str
    """Behind the prefix of the configuration by which it is sent."""
    id: str
    body: bytes
    done: bool = False
    """Whether the stream has it, or never will."""
    refusal: str | None = None
    """Why the stream did not take it the last time."""

    @classmethod
    def read(cls, record: bytes) -> Message:
        """What a record says; raises ValueError when it is none."""
        subject, id_, body = record.split(b"\n", 2)
        return cls(subject.decode("ascii"), id_.decode("ascii"), body)


def record(subject: bytes, id_: str, body: bytes) -> bytes:
    """The record of an event."""
    if not (id_.isascii() and id_.isprintable() and id_ and len(id_) <= _LONGEST_ID):
        # No header could hold it; in the body it is as it is.
        id_ = hashlib.sha256(id_.encode("utf-8", "surrogatepass")).hexdigest()
    return b"%b\n%b\n%b" % (subject, id_.encode(), body)
