"""The one thread that writes to a ledger's database, and what stands in front of it."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from attrs import define, field, frozen

from qlens import Call, Receipt, background_thread
from qlens_plugins.cost.ledger import records, rows
from qlens_plugins.cost.ledger.journal import Journal
from qlens_plugins.cost.ledger.news import News
from qlens_plugins.cost.ledger.store import Batch, Store, StoreAway

log = logging.getLogger("qlens.ledger")

FIRST_WAIT_SECONDS = 0.05
LONGEST_WAIT_SECONDS = 5.0
"""Between two tries of a batch that could not be written; each wait is twice the one before."""
LOOK_SECONDS = 600.0
"""Between two looks for receipts that are old enough to be deleted."""
TAKE_OVER_SECONDS = 30.0
"""Between two looks for what dead processes left."""
LOOK_AGAIN_SECONDS = 0.01
"""Between two looks of a command at whether that is written."""
TELL_SECONDS = 0.2
"""Between two tries to tell of it."""
PATIENCE_SECONDS = 10.0
"""How long a command waits for what dead processes left while none of it is written."""
GRACE_SECONDS = 5.0
"""How much longer than the closing time one stuck call into the database or the disk is waited for."""


@frozen
class Promised:
    """A call that the disk has no record of; its receipt has a place in memory."""

    facts: rows.Facts


Begun = rows.Facts | Promised
"""What `begin` gives for a call, what the record on the disk says if it is there, and `keep` or `void` takes back."""


@define(eq=False)
class Writer:
    """Takes receipts from the event loop without waiting and writes them in batches, each exactly once.

    Shared by the instances that follow each other over reloads; it ends with the last that opened it.
    """

    store: Store
    journal: Journal
    written: Callable[[float], object]
    dropped: Callable[[float], object]
    waits: Callable[[float], object]
    """Called with what was written, what could not be kept, and the length of the queue: metrics."""
    news: News | None = None
    """Tells of what dead processes left."""
    batch_size: int = 500
    flush_seconds: float = 0.2
    queue_size: int = 100_000
    """Most receipts in memory, calls on their way included."""
    may_drop: bool = False
    """Whether calls may be sent that nothing durable knows of."""
    keep_days: int | None = None
    """How long receipts are kept; None: for good."""
    problem: str | None = field(default=None, init=False)
    """Why nothing can be written at present."""
    since: float = field(default=0.0, init=False)
    """Since when, in monotonic seconds."""

    _id: str = field(factory=lambda: uuid4().hex, init=False)
    _users: int = field(default=0, init=False)
    _wake: threading.Condition = field(factory=threading.Condition, init=False)
    _rejections: dict[rows.Rejection, int] = field(factory=dict, init=False)
    _uncounted: int = field(default=0, init=False)
    """How many refused calls are not yet counted in the file."""
    _promised: int = field(default=0, init=False)
    """Places kept for calls on their way."""
    _closing: float | None = field(default=None, init=False)
    """Until when to try, in monotonic seconds, once the end has come."""
    _thread: threading.Thread | None = field(default=None, init=False)
    _ended: Future[None] = field(factory=Future, init=False)
    _batches: int = field(default=0, init=False)
    _lost: int = field(default=0, init=False)
    """How many receipts neither the database nor the disk took in the end."""
    _next_look: float = field(default=0.0, init=False)
    """When to look for receipts that are old enough to be deleted, in monotonic seconds."""
    _next_take_over: float = field(default=0.0, init=False)
    """When to look for what dead processes left."""

    # --- on the event loop ---------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether the last user has left: it takes nothing more."""
        return self._closing is not None

    def is_for(self, store: Store, folder: Path) -> bool:
        """Whether it writes to this store from this spool."""
        return self.store.place == store.place and self.journal.folder == folder

    async def open(self) -> None:
        """Start writing, or join those for whom it writes already; raises StartupError when the store is unusable."""
        self._users += 1
        if self._users > 1:
            return
        opened: Future[None] = Future()
        self._thread = background_thread(lambda: self._run(opened), "qlens-ledger")
        self._thread.start()
        try:
            await asyncio.wrap_future(opened)
        except BaseException as error:
            self._end(0)
            if isinstance(error, Exception):  # the thread's own, which is its last but for closing what it opened
                self._thread.join(GRACE_SECONDS)
            raise

    async def close(self, seconds: float) -> None:
        """Leave. The last to leave waits until everything is written, or says what could not be within some seconds."""
        self._users -= 1
        if self._users:
            return
        self._end(seconds)
        done, _ = await asyncio.wait({asyncio.wrap_future(self._ended)}, timeout=seconds + GRACE_SECONDS)
        if done and self._thread is not None:  # it has nothing left to do but to return
            self._thread.join(GRACE_SECONDS)
        reason = self.problem or self.journal.problem or "the writer did not finish"
        if self.waiting:
            log.error(
                "ledger %s: %d receipts could not be written within %g s: %s; the next start writes what is in %s",
                *(self.store, self.waiting, seconds, reason, self.journal.folder),
            )
        lost = self._lost if done else self.journal.in_memory
        if lost or self._uncounted:
            log.error(
                "ledger %s: %d receipts and %d refused calls are lost: %s",
                *(self.store, lost, self._uncounted, reason),
            )

    async def caught_up(self) -> int:
        """Wait until what dead processes left is written, as long as that goes on.

        Returns how many of their records may be of receipts that are still not in the database.
        """
        batches, last = self._batches, time.monotonic()
        while (left := self.journal.left_behind) and time.monotonic() < last + PATIENCE_SECONDS:
            await asyncio.sleep(LOOK_AGAIN_SECONDS)
            if self._batches != batches:
                batches, last = self._batches, time.monotonic()
        return left

    def _end(self, seconds: float) -> None:
        with self._wake:
            self._closing = time.monotonic() + seconds
            self._wake.notify_all()

    @property
    def waiting(self) -> int:
        """How many receipts are not yet written."""
        return self.journal.waiting

    def begin(self, call: Call) -> Begun | None:
        """Note that a call may be sent from now on; None when there is no place for that."""
        facts = rows.facts_before(call)
        if self.journal.note(records.opened(facts), facts):
            return facts
        if not self._has_place:
            return None
        self._promised += 1
        return Promised(facts)

    def keep(self, receipt: Receipt, begun: Begun | None = None) -> bool:
        """Put a receipt in the queue; False when it has no place there, because the call had not begun."""
        try:
            before = begun if type(begun) is tuple else self._redeemed(begun) or rows.facts_of(receipt)
            said = before, rows.facts_after(receipt)
            record = records.closed(said)
        except Exception:
            # One receipt that cannot be written down must not hold up all that come after it.
            log.exception("ledger %s: receipt %s cannot be written down and is lost", self.store, receipt.id)
            self.dropped(1)
            return True
        journal = self.journal
        if not journal.note(record, said, 1):
            if begun is None and not self._has_place:
                return False
            journal.remember(record)
        fresh = journal.fresh
        if fresh == 1 or fresh == self.batch_size:  # noqa: PLR1714 - a tuple would be made for every call
            with self._wake:
                self._wake.notify()
        return True

    async def synced(self, call: Call, begun: Begun) -> None:
        """Wait until the disk has it that a call may be sent; taken back if that fails, with OSError, or is cut off."""
        try:
            await self.journal.synced()
        except BaseException:
            self.void(call.id, begun)
            raise

    def void(self, id_: str, begun: Begun) -> None:
        """Take back that a call may be sent."""
        if self._redeemed(begun) is begun:
            self.journal.void(records.voiding(id_))

    @property
    def _has_place(self) -> bool:
        """Whether one more receipt may be in memory alone, beside those that are there and those that calls will bring.

        Not while the database is away, or else what nobody else knows of would pile up.
        """
        if self.problem is not None and not self.may_drop:
            return False
        return self.journal.in_memory + self._promised < self.queue_size

    def _redeemed(self, begun: Begun | None) -> rows.Facts | None:
        """What is known of a call from before, whose place in memory is free again."""
        if isinstance(begun, Promised):
            self._promised -= 1
            return begun.facts
        return begun

    def count(self, receipt: Receipt) -> None:
        """Count a refused call instead of keeping its receipt."""
        key = rows.rejection(receipt)
        with self._wake:
            self._rejections[key] = self._rejections.get(key, 0) + 1
            self._uncounted += 1
            if len(self._rejections) == 1:
                self._wake.notify()

    # --- on the thread -------------------------------------------------------------------------

    def _run(self, opened: Future[None]) -> None:
        try:
            if not self._first(opened):
                return
            while batch := self._next():
                if not self._persist(batch):
                    break
                self._tell()
                self._forget()
        except Exception as error:
            log.exception("ledger %s: the writer has stopped", self.store)
            self._failed(error)
        finally:
            self.store.close()
            self._lost = self.journal.close()
            self._ended.set_result(None)

    def _first(self, opened: Future[None]) -> bool:
        """Connect once before anyone is served; what may pass, like a lock, is no reason not to start."""
        try:
            self._connect()
            self.journal.open()
        except BaseException as error:  # noqa: BLE001 - handed to whoever waits in open()
            opened.set_exception(error)
            return False
        self._next_take_over = time.monotonic() + TAKE_OVER_SECONDS
        opened.set_result(None)
        return True

    def _connect(self) -> None:
        try:
            self.store.connect()
        except StoreAway as error:
            self._failed(error)

    def _next(self) -> Batch | None:
        """Wait for something to write; None when there is nothing left and the end has come."""
        while True:
            self._take_over()
            with self._wake:
                if not self._wake.wait_for(lambda: self._has_work or self._closing is not None, TAKE_OVER_SECONDS):
                    continue
                # The first receipt starts a batch; those that come within the next moment are written with it.
                self._wake.wait_for(lambda: self._has_batch or self._closing is not None, timeout=self.flush_seconds)
                rejections, self._rejections = self._rejections, {}
                is_closing = self._closing is not None
            receipts = self.journal.take(self.batch_size)
            if receipts or rejections:
                self._batches += 1
                return Batch(self._batches, receipts, rejections)
            self.journal.done()
            if is_closing:
                return None
            if self.journal.is_stuck:
                self._may_wait(LONGEST_WAIT_SECONDS)
            elif not self._tell():
                self._may_wait(TELL_SECONDS)

    @property
    def _has_work(self) -> bool:
        journal = self.journal
        return bool(journal.fresh or journal.has_more or self._rejections or journal.left_behind or journal.has_news)

    @property
    def _has_batch(self) -> bool:
        # What a dead process left has waited long enough.
        journal = self.journal
        return journal.has_more or journal.fresh >= self.batch_size or journal.left_behind > 0

    def _persist(self, batch: Batch) -> bool:
        """Write a batch, however often it takes; False when the end came first."""
        wait = FIRST_WAIT_SECONDS
        while not self._tried(batch):
            self.waits(self.waiting)
            if not self._may_wait(wait):
                return False
            wait = min(wait * 2, LONGEST_WAIT_SECONDS)
        if self.news is not None:
            # Before the records go: should this process die now, the next one tells of those that were not told.
            self.news.come_round()
        self.journal.done()
        with self._wake:
            self._uncounted -= sum(batch.rejections.values())
        self.written(len(batch.receipts))
        self.waits(self.waiting)
        return True

    def _tried(self, batch: Batch) -> bool:
        try:
            self.store.write(self._id, batch)
        except Exception as error:  # noqa: BLE001 - whatever it is, the batch is kept and the reason is shown
            self._failed(error)
            self.store.disconnect()
            return False
        self._recovered()
        return True

    def _take_over(self) -> None:
        """Now and then, take what processes left that have died since."""
        if time.monotonic() >= self._next_take_over:
            self._next_take_over = time.monotonic() + TAKE_OVER_SECONDS
            with suppress(OSError):  # what is wrong with the folder, its own spool finds out
                self.journal.take_over()

    def _tell(self) -> bool:
        """Tell of what dead processes left, once it is written; False when that must be tried again."""
        news, untold = self.news, self.journal.untold
        if news is None or not untold:
            return True
        if not news.is_due:
            return False
        if news.is_heard and not news.tell(untold):
            return False
        self.journal.told()
        return True

    def _forget(self) -> None:
        """Now and then, delete receipts that are old enough; none that would come once more after a crash."""
        if self.keep_days is None or time.monotonic() < self._next_look:
            return
        if self.journal.left_behind or self.journal.has_news:
            return
        more = False
        try:
            more = self.store.forget((time.time_ns() // rows.DAY_NS - self.keep_days) * rows.DAY_NS)
        except Exception as error:  # noqa: BLE001 - it can wait, and what is to be written cannot
            log.warning("ledger %s: old receipts could not be deleted: %s", self.store, error)
            self.store.disconnect()
        self._next_look = time.monotonic() + (0 if more else LOOK_SECONDS)

    def _may_wait(self, seconds: float) -> bool:
        """Wait before the next try, woken by the end; False when that leaves no time for one."""
        with self._wake:
            self._wake.wait_for(lambda: self._closing is not None, timeout=seconds)
            closing = self._closing
        if closing is None:
            return True
        left = closing - time.monotonic()
        time.sleep(max(0.0, min(FIRST_WAIT_SECONDS, left)))
        return left > 0

    def _failed(self, error: Exception) -> None:
        text = str(error).removeprefix("ledger: ")
        if self.problem is None:
            self.since = time.monotonic()
            log.warning("ledger %s: cannot write, will try again: %s", self.store, text)
        self.problem = text

    def _recovered(self) -> None:
        if self.problem is not None:
            log.warning("ledger %s: writes again after %.1f s", self.store, time.monotonic() - self.since)
        self.problem = None
