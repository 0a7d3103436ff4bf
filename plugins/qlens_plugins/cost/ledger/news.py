"""Tells of receipts that dead processes left: calls that nobody ended, and the last of those that had ended."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial

from attrs import define, field

from qlens import Event, Gateway
from qlens_plugins.cost.ledger.records import Record
from qlens_plugins.cost.ledger.store import Database, Question, Store, StoreAway, TookTooLong

log = logging.getLogger("qlens.ledger")

AT_ONCE = 10
"""Events that are published in one turn of the event loop: calls wait for it."""
PAUSE_SECONDS = 0.0005
TURN_SECONDS = 10.0
"""How long a turn of the event loop is waited for."""
ASK_AT_ONCE = 100
ASK_SECONDS = 10.0
"""How many receipts the database is asked for with one question, and how long that may take."""


@define(eq=False)
class News:
    """Publishes events on the gateway's event loop, for the thread of a writer."""

    gateway: Gateway
    store: Store
    _loop: asyncio.AbstractEventLoop = field(factory=asyncio.get_running_loop)

    @property
    def is_due(self) -> bool:
        """Whether all who will ever listen do."""
        return self.gateway.events.all_listen

    @property
    def is_heard(self) -> bool:
        """Whether anybody listens."""
        return self.gateway.events.is_heard

    def tell(self, records: Sequence[Record]) -> bool:
        """Publish the events of receipts, each under its call's id; False when some are not published."""
        try:
            records = self._true(records)
        except (StoreAway, TookTooLong):
            return False
        for start in range(0, len(records), AT_ONCE):
            events = [event for record in records[start : start + AT_ONCE] if (event := _event(record)) is not None]
            if not self._on_loop(partial(self._publish, events)):
                return False
            time.sleep(PAUSE_SECONDS)
        return True

    def _true(self, records: Sequence[Record]) -> list[Record]:
        """Without the calls that had no end in the spool, and have another one in the database than to be interrupted.

        It came there from memory, or stood in front of the record that was carried on. Raises what questions raise.
        """
        endless = [record.id for record in records if record.after is None]
        found: set[str] = set()
        for start in range(0, len(endless), ASK_AT_ONCE):
            found |= self.store.reading(ASK_SECONDS).run(_interrupted(endless[start : start + ASK_AT_ONCE]))
        return [record for record in records if record.after is not None or record.id in found]

    def _publish(self, events: Sequence[Event]) -> bool:
        if not self.is_due:
            return False
        for event in events:
            self.gateway.events.publish(event)
        return True

    def come_round(self) -> None:
        """Wait until the event loop is through with what it does: a receipt that it wrote down was told then, too."""
        if self.is_heard:
            self._on_loop(lambda: True)

    def _on_loop(self, work: Callable[[], bool]) -> bool:
        """What some work says that is done on the event loop; False when that does not get to it."""
        done: Future[bool] = Future()
        try:
            self._loop.call_soon_threadsafe(lambda: done.set_result(work()))
            return done.result(TURN_SECONDS)
        except (RuntimeError, TimeoutError):  # it is closed, or hangs
            return False


def _interrupted(ids: Sequence[str]) -> Question[set[str]]:
    marks = ", ".join("?" * len(ids))

    def question(database: Database) -> set[str]:
        rows = database.rows(f"SELECT id FROM receipts WHERE id IN ({marks}) AND error = 'interrupted'", ids)  # noqa: S608
        return {str(id_) for (id_,) in rows}

    return question


def _event(record: Record) -> Event | None:
    try:
        return Event.of_receipt(record.receipt)
    except Exception:
        log.exception("ledger: receipt %s cannot be told", record.id)
        return None
