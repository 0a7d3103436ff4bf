"""Answers questions about a ledger beside its writer, off the event loop, a few at once."""

from __future__ import annotations

import asyncio
import logging
from typing import TypeVar

from attrs import define, field

from qlens import InvalidRequest, Unavailable
from qlens_plugins.cost.ledger.store import Question, Store, StoreAway, TookTooLong

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

    store: Store
    _places: asyncio.Semaphore = field(factory=lambda: asyncio.Semaphore(AT_ONCE), init=False)

    async def ask(self, question: Question[T]) -> T:
        """Ask in one transaction: all that is read is of one moment. Raises Unavailable when it cannot be read."""
        async with self._places:
            reading = self.store.reading(LONGEST_SECONDS)
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
            except TookTooLong:
                raise InvalidRequest(
                    "There is too much to read for this answer: ask for a shorter time, or leave out "
                    "what only the receipts know (user_id, service_tier, outcomes, minutes).",
                    code="too_much_to_read",
                ) from None
            except StoreAway as error:
                log.warning("ledger %s: cannot be read: %s", self.store, error)
                raise Unavailable(
                    "The ledger cannot be read at present. Please try again later.",
                    code="ledger_unavailable",
                    retry_after=RETRY_SECONDS,
                ) from None
