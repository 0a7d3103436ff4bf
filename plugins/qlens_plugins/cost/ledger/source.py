"""A spool as the ledger's database sees it: rows of calls that are over, in the order of their records."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from attrs import define, field

from qlens import Spool
from qlens_plugins.cost.ledger import records, rows
from qlens_plugins.cost.ledger.records import Record, Said
from qlens_plugins.cost.ledger.rows import AT_ONCE, Row

log = logging.getLogger("qlens.ledger")

PAUSE_SECONDS = 0.00005
"""Between a few records and the next. Not 0: with two cores this thread would have Python's lock back at once."""
CARRY_AFTER = 10_000
CARRY_TIMES = 4
"""So many records, and so many times as many as there are calls that run, may stay for calls that run long."""
MAY_BE_UNTOLD = 50
"""How many of the last receipts that a process wrote down it may not have told of. A call's receipt is written down
just before its event is, in one turn of the event loop: that is one, and more only where a plugin in between waits."""


@define(eq=False)
class Source:
    """Reads a spool, and lets its records go when what they say is in the database.

    The record that a call has begun stays until the call is over, and with it all that stand behind it. Of the calls of
    a former owner none runs any more: those that have not ended are over when all is read. Nobody has told of them, nor
    perhaps of the last that did end: where events are told, the records of both stay until that is done.
    """

    spool: Spool
    lost: Callable[[float], object]
    """Called with how many receipts could not be understood."""
    is_former: bool = False
    tells: bool = False
    """Whether what a former owner left untold is kept until it is `told`."""
    _kept: deque[str | None] = field(factory=deque, init=False)
    """For each record that was read and is there still: the call that it waits for, None when for none."""
    _running: dict[str, bytes | Said] = field(factory=dict, init=False)
    """The records of calls that have begun, or what they say, by the call's id."""
    _carried: set[str] = field(factory=set, init=False)
    """Calls whose record was written once more, which is not read yet."""
    _over: list[str] = field(factory=list, init=False)
    """Calls that are being written to the database."""
    _untold: dict[str, Record] = field(factory=dict, init=False)
    """What is perhaps to be told, by the call's id, in the order of the records."""
    _is_read: bool = field(default=False, init=False)
    """Whether all that a former owner left was read."""

    @property
    def left(self) -> int:
        """How many records it has."""
        return self.spool.left.records

    @property
    def is_written(self) -> bool:
        """Whether all that a former owner left is in the database."""
        return self._is_read and not self._over

    @property
    def untold(self) -> list[Record]:
        """What a former owner has perhaps not told, once all of it is in the database."""
        return list(self._untold.values()) if self.is_written else []

    def take(self, most: int) -> list[Row]:
        """The next rows, at most so many; they stay where they are until `done`, and come again after a crash.

        Raises OSError when nothing can be read.
        """
        found: list[Row] = []
        while len(found) < most:
            try:
                # Half of them say that a call has begun, and make no row.
                chunk = self.spool.read(min(2 * AT_ONCE, most - len(found)), after=len(self._kept))
            except OSError:
                if found:  # they count as read already
                    return found
                raise
            if not chunk:
                return found + self._interrupted(most - len(found)) if self.is_former else found
            self._is_read = False
            for record in chunk:
                if (row := self._understood(record)) is not None:
                    found.append(row)
            time.sleep(PAUSE_SECONDS)
        return found

    def _understood(self, data: Any) -> Row | None:
        """The row that a record makes, if it makes one. One that cannot be understood must not hold up all others.

        It is the bytes that were read, or what was `Said` to this process.
        """
        self._kept.append(None)
        try:
            if not isinstance(data, bytes):
                before = data[0]
                if isinstance(before, str):
                    self._begun(before, data)
                    return None
                self._over.append(before[0])
                return rows.ended(before, data[1])
            # Of the own calls nearly all end: their beginnings are read no further than need be.
            if not self.is_former and (id_ := records.begun(data)) is not None:
                self._begun(id_, data)
                return None
            record = records.read(data)
            if record.is_beginning:
                self._begun(record.id, data)
                return None
            self._over.append(record.id)
            if record.is_void:
                return None
            row = record.row
            if self.tells:
                self._hold(record)
            return row
        except Exception:
            log.exception("ledger: a record in %s cannot be understood and is lost: %r", self.spool.place, data)
            self.lost(1)
            return None

    def _begun(self, id_: str, data: bytes | Said) -> None:
        self._kept[-1] = id_
        if id_ in self._carried:
            self._carried.remove(id_)  # it is running still, or over since
        else:
            self._running[id_] = data

    def _hold(self, record: Record) -> None:
        """Keep a receipt until it is told, or so many came after it that it surely was."""
        self._kept[-1] = record.id
        self._untold[record.id] = record
        if len(self._untold) > MAY_BE_UNTOLD:
            del self._untold[next(iter(self._untold))]

    def _interrupted(self, most: int) -> list[Row]:
        """Rows of calls that nobody finishes any more."""
        over = set(self._over)
        ids = [id_ for id_ in self._running if id_ not in over]
        self._is_read = len(ids) <= most
        found = [records.read(data) for id_ in ids[:most] if isinstance(data := self._running[id_], bytes)]
        self._over += ids[:most]
        if self.tells:
            for record in found:
                # Not where there is its end: the record that it had begun was carried on behind it.
                self._untold.setdefault(record.id, record)
        return [record.row for record in found]

    def told(self) -> None:
        """Let go of what was `untold`: whoever listens has it."""
        if self.is_written:
            self._untold = {}
            self._let_go()

    def over(self, id_: str) -> None:
        """Note that a call is over, and its row on the way to the database."""
        self._over.append(id_)

    def done(self) -> None:
        """Let go of what is in the database now."""
        for id_ in self._over:
            self._running.pop(id_, None)
        self._over = []
        self._let_go()
        if self._keeps_too_much():
            self._carry()

    def _keeps_too_much(self) -> bool:
        done = len(self._kept) - CARRY_TIMES * len(self._running)
        return done > CARRY_AFTER or (done > 0 and self.spool.left.bytes * CARRY_TIMES > self.spool.most_bytes)

    def _let_go(self) -> None:
        count = 0
        while self._kept and self._kept[0] not in self._running and self._kept[0] not in self._untold:
            self._kept.popleft()
            count += 1
        self.spool.shipped(count)

    def _append(self, data: bytes | Said) -> None:
        self.spool.append(data if isinstance(data, bytes) else records.opened(data), data)

    def _carry(self) -> None:
        """Write the records of calls that run long once more, at the end: then all that stand behind them may go."""
        try:
            for place, id_ in enumerate(self._kept):
                if id_ in self._running:
                    self._append(self._running[id_])
                    self._carried.add(id_)
                    self._kept[place] = None
            self.spool.sync()
        except OSError as error:
            log.warning("ledger: %s keeps what is done, because it takes nothing: %s", self.spool.place, error.strerror)
            return
        self._let_go()
