"""Reads the ledger beside its writer, off the event loop, a few questions at once."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TypeVar

from attrs import define, field

from qlens import InvalidRequest, Unavailable
from qlens_plugins.cost.ledger import schema

log = logging.getLogger("qlens.ledger")

AT_ONCE = 2
"""Questions that are answered at once; the others wait for their turn, each as long as its call may take."""
LONGEST_SECONDS = 30.0
"""For one question: nobody may keep the machine busy with one that reads millions of receipts."""
RETRY_SECONDS = 5.0

T = TypeVar("T")


@define(eq=False)
class Reader:
    """Answers questions about a ledger; it never keeps the writer waiting."""

    path: Path
    _places: asyncio.Semaphore = field(factory=lambda: asyncio.Semaphore(AT_ONCE), init=False)

    async def ask(self, question: Callable[[sqlite3.Connection], T]) -> T:
        """Ask in one transaction: all that is read is of one moment. Raises Unavailable when it cannot be read."""
        async with self._places:
            reading = _Reading(self.path)
            answer = asyncio.ensure_future(asyncio.to_thread(reading.run, question))
            try:
                return await asyncio.shield(answer)
            except asyncio.CancelledError:
                # The thread must end before its place is free.
                reading.stop()
                await asyncio.wait({answer})
                if not answer.cancelled():
                    answer.exception()
                raise
            except sqlite3.Error as error:
                if reading.stopped:
                    raise InvalidRequest(
                        "There is too much to read for this answer: ask for a shorter time, or leave out "
                        "what only the receipts know (user_id, service_tier, tags, minutes).",
                        code="too_much_to_read",
                    ) from None
                log.warning("ledger %s: cannot be read: %s", self.path, error)
                raise Unavailable(
                    "The ledger cannot be read at present. Please try again later.",
                    code="ledger_unavailable",
                    retry_after=RETRY_SECONDS,
                ) from None


@define(eq=False)
class _Reading:
    """One question, on a connection of its own."""

    path: Path
    stopped: bool = field(default=False, init=False)
    """Whether it was given up, because nobody waits for it any longer or it takes too long."""

    def run(self, question: Callable[[sqlite3.Connection], T]) -> T:
        with closing(schema.connect_to_read(self.path)) as database:
            last = time.monotonic() + LONGEST_SECONDS
            # Asked now and then by SQLite: an interrupt that came before the first statement would be forgotten.
            database.set_progress_handler(lambda: self._goes_too_far(last), 100_000)
            database.execute("BEGIN")
            return question(database)

    def _goes_too_far(self, last: float) -> bool:
        self.stopped = self.stopped or time.monotonic() > last
        return self.stopped

    def stop(self) -> None:
        self.stopped = True
