"""Calls as records of a spool: that one has begun, with who makes it and what it can cost at most, and how it ended."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import orjson

from qlens import Call, Receipt
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
_IS_BEGUN = _BEGUN[0]


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


def opening(call: Call) -> bytes:
    """The record that a call may be sent from now on."""
    return opened(rows.facts_before(call))


def opened(facts: rows.Facts) -> bytes:
    """The same, of what is known of the call."""
    try:
        # A copy, and so no longer than it is, as what orjson writes often is: it is kept for as long as the call runs.
        return _BEGUN + orjson.dumps(facts, dict)
    except TypeError:
        return _BEGUN_ODD + _odd(facts)


def closing(opening: bytes | None, receipt: Receipt) -> bytes:
    """The record of how it ended; it says all, whether the other one was ever written or not."""
    if opening is None:
        opening = opened(rows.facts_of(receipt))
    facts = rows.facts_after(receipt)
    try:
        if opening[0] == _IS_BEGUN:
            return b"e[%b,%b]" % (opening[1:], orjson.dumps(facts, dict))
    except TypeError:
        pass
    return b"E[%b,%b]" % (opening[1:], _odd(facts))


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


def _odd(facts: rows.Facts) -> bytes:
    return json.dumps(facts, default=dict).encode()
