"""Calls as records of a spool: that one has begun, with who makes it and what it can cost at most, and how it ended."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import orjson

from qlens import Call, Receipt, trimmed
from qlens_plugins.cost.ledger import rows

# Small letters: written by orjson. Capitals: by json, because there is a lone surrogate or an integer beyond 64 bits.
_BEGUN, _BEGUN_ODD = b"b", b"B"
_ENDED, _ENDED_ODD = b"e", b"E"
_VOID = b"v"
_LOADS: Mapping[bytes, Callable[[bytes], Any]] = {
    _BEGUN: orjson.loads,
    _ENDED: orjson.loads,
    _BEGUN_ODD: json.loads,
    _ENDED_ODD: json.loads,
}
_ODD = 32
"""A space, in front of JSON that orjson must not read: it would make a float of a large integer."""


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


def begun(call: Call) -> bytes:
    """What is known of a call before it is sent: `opening` makes a record of it, and `closing` of how it ended."""
    return trimmed(_dumps(rows.facts_before(call)))  # kept for as long as the call runs


def begun_late(receipt: Receipt) -> bytes:
    """The same, of a call that has ended."""
    return _dumps(rows.facts_of(receipt))


def opening(begun: bytes) -> bytes:
    """The record that a call may be sent from now on."""
    return (_BEGUN if begun[0] != _ODD else _BEGUN_ODD) + begun


def closing(begun: bytes, receipt: Receipt) -> bytes:
    """The record of how it ended; it says all, whether the other one is still there or not."""
    ended = _dumps(rows.facts_after(receipt))
    kind = _ENDED if begun[0] != _ODD and ended[0] != _ODD else _ENDED_ODD
    return b"%b[%b,%b]" % (kind, begun, ended)


def voiding(id_: str) -> bytes:
    """The record that a call was refused before it was sent."""
    return _VOID + id_.encode("utf-8", "surrogatepass")


def read(record: bytes) -> Record:
    """What a record says; raises ValueError when it is none of these."""
    kind, text = record[:1], record[1:]
    if kind == _VOID:
        return Record(text.decode("utf-8", "surrogatepass"), None, None)
    if (loads := _LOADS.get(kind)) is None:
        raise ValueError("it is of no known kind")
    found = loads(text)
    return Record(found[0], found, None) if kind in (_BEGUN, _BEGUN_ODD) else Record(found[0][0], *found)


def _dumps(facts: Sequence[object]) -> bytes:
    try:
        return orjson.dumps(facts, default=dict)
    except TypeError:
        return b" " + json.dumps(facts, default=dict).encode()
