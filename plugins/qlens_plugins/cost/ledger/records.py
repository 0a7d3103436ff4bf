"""Calls as records of a spool: that one has begun, with who makes it and what it can cost at most, and how it ended."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import orjson

from qlens import Receipt
from qlens_plugins.cost.ledger import rows

# Small letters: written by orjson. Capitals: by json, because there is a lone surrogate, or an integer beyond 64 bits,
# of which orjson would make a float.
_BEGUN, _BEGUN_ODD = b"b", b"B"
_ENDED, _ENDED_ODD = b"e", b"E"
_VOID = b"v"
_LOADS: Mapping[bytes, Callable[[bytes], Any]] = {
    _BEGUN: orjson.loads,
    _ENDED: orjson.loads,
    _BEGUN_ODD: json.loads,
    _ENDED_ODD: json.loads,
}

Ended = tuple[rows.Facts, rows.Facts]
"""What was known of a call before, and how it ended."""
Said = Sequence[Any]
"""What a record says: what is known of a call that has begun, with its id in front, or an `Ended`."""


class Record(NamedTuple):
    """A record that was read."""

    id: str
    before: Sequence[Any] | None
    """None for a call that was refused after it had begun."""
    after: Sequence[Any] | None
    """None while it runs."""

    @property
    def is_void(self) -> bool:
        """Whether nothing was sent, and nothing is owed."""
        return self.before is None

    @property
    def is_beginning(self) -> bool:
        """Whether it only says that the call may be sent."""
        return self.before is not None and self.after is None

    @property
    def row(self) -> rows.Row:
        """The receipt; of a call that has not ended, one that charges the most that it can have used."""
        return rows.ended(*self._facts)

    @property
    def receipt(self) -> Receipt:
        """The same as what plugins know."""
        return rows.receipt(*self._facts)

    @property
    def _facts(self) -> tuple[rows.Facts, rows.Facts]:
        assert self.before is not None, "nothing was sent"
        return self.before, rows.interrupted(self.before) if self.after is None else self.after


def opened(facts: rows.Facts) -> bytes:
    """The record that a call of which this is known may be sent from now on."""
    try:
        # A copy, and so no longer than it is, as what orjson writes often is: it is kept until it is on the disk.
        return _BEGUN + orjson.dumps(facts, dict)
    except TypeError:
        return _BEGUN_ODD + _odd(facts)


def closed(said: Ended) -> bytes:
    """The record of how a call ended; it says all, whether the other one was ever written or not."""
    try:
        return _ENDED + orjson.dumps(said, dict)
    except TypeError:
        return _ENDED_ODD + _odd(said)


def voiding(id_: str) -> bytes:
    """The record that a call was refused before it was sent."""
    return _VOID + id_.encode("utf-8", "surrogatepass")


def begun(record: bytes) -> str | None:
    """The call that this record says has begun, without all that it says of it; None where only `read` knows."""
    if not record.startswith(_BEGUN + b'["'):
        return None
    id_ = record[3 : record.index(b'"', 3)]
    return None if b"\\" in id_ else id_.decode()


def read(record: bytes) -> Record:
    """What a record says; raises ValueError when it is none of these."""
    kind, text = record[:1], record[1:]
    if kind == _VOID:
        return Record(text.decode("utf-8", "surrogatepass"), None, None)
    if (loads := _LOADS.get(kind)) is None:
        raise ValueError("it is of no known kind")
    found = loads(text)
    return Record(found[0], found, None) if kind in (_BEGUN, _BEGUN_ODD) else Record(found[0][0], *found)


def _odd(facts: rows.Facts | Ended) -> bytes:
    return json.dumps(facts, default=dict).encode()
