"""The one thread that writes to a ledger's database, and the bounded queue in front of it."""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from uuid import uuid4

from attrs import define, field, frozen

from qlens import Receipt
from qlens_plugins.cost.ledger import rollups, rows, schema

log = logging.getLogger("qlens.ledger")

FIRST_WAIT_SECONDS = 0.05
LONGEST_WAIT_SECONDS = 5.0
"""Between two tries of a batch that could not be written; each wait is twice the one before."""
PAUSE_SECONDS = 0.00005
"""Between a few receipts and the next. Not 0: with two cores this thread would have Python's lock back at once."""
GRACE_SECONDS = 5.0
"""How much longer than the closing time one stuck call into SQLite or the disk is waited for."""


@frozen
class Batch:
    """What one transaction writes. Its number makes sure that it is applied once."""

    number: int
    receipts: Sequence[rows.Row]
    rejections: dict[rows.Rejection, int]


@define(eq=False)
class Writer:
    """Takes receipts from the event loop without waiting and writes them in batches, each exactly once.

    Shared by the instances that follow each other over reloads; it ends with the last that opened it.
    """

    path: Path
    written: Callable[[float], object]
    dropped: Callable[[float], object]
    waits: Callable[[float], object]
    """Called with what was written, what could not be kept, and the length of the queue: metrics."""
    batch_size: int = 500
    flush_seconds: float = 0.2
    problem: str | None = field(default=None, init=False)
    """Why nothing can be written at present."""
    since: float = field(default=0.0, init=False)
    """Since when, in monotonic seconds."""

    _id: str = field(factory=lambda: uuid4().hex, init=False)
    _users: int = field(default=0, init=False)
    _wake: threading.Condition = field(factory=threading.Condition, init=False)
    _receipts: deque[Receipt] = field(factory=deque, init=False)
    _taken: int = field(default=0, init=False)
    """How many receipts are in the batch that is being written: they left the queue and are not in the file yet."""
    _rejections: dict[rows.Rejection, int] = field(factory=dict, init=False)
    _uncounted: int = field(default=0, init=False)
    """How many refused calls are not yet counted in the file."""
    _promised: int = field(default=0, init=False)
    """Places kept for calls on their way."""
    _closing: float | None = field(default=None, init=False)
    """Until when to try, in monotonic seconds, once the end has come."""
    _ended: Future[None] = field(factory=Future, init=False)
    _batches: int = field(default=0, init=False)
    _database: sqlite3.Connection | None = field(default=None, init=False)
    _file: tuple[int, int] | None = field(default=None, init=False)
    """Device and inode of the open file."""

    # --- on the event loop ---------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether the last user has left: it takes nothing more."""
        return self._closing is not None

    async def open(self) -> None:
        """Start writing, or join those for whom it writes already; raises StartupError when the file is unusable."""
        self._users += 1
        if self._users > 1:
            return
        opened: Future[None] = Future()
        threading.Thread(target=self._run, args=(opened,), name="qlens-ledger", daemon=True).start()
        try:
            await asyncio.wrap_future(opened)
        except BaseException:
            self._end(0)
            raise

    async def close(self, seconds: float) -> None:
        """Leave. The last to leave waits until everything is written, or says what could not be within some seconds."""
        self._users -= 1
        if self._users:
            return
        self._end(seconds)
        done, _ = await asyncio.wait({asyncio.wrap_future(self._ended)}, timeout=seconds + GRACE_SECONDS)
        if not done or self.waiting or self._uncounted:
            log.error(
                "ledger %s: %d receipts and %d refused calls could not be written within %g s and are lost: %s",
                *(self.path, self.waiting, self._uncounted, seconds, self.problem or "the writer did not finish"),
            )

    def _end(self, seconds: float) -> None:
        with self._wake:
            self._closing = time.monotonic() + seconds
            self._wake.notify_all()

    @property
    def waiting(self) -> int:
        """How many receipts are not yet written."""
        return len(self._receipts) + self._taken

    def full(self, places: int) -> bool:
        """Whether all places are taken, by receipts that wait or by calls that will bring one."""
        return len(self._receipts) + self._taken + self._promised >= places

    def promise(self) -> None:
        """Keep a place for a call's receipt."""
        self._promised += 1

    def redeem(self) -> None:
        """Give a kept place free, because its call has ended."""
        self._promised -= 1

    def keep(self, receipt: Receipt) -> None:
        """Put a receipt in the queue."""
        # Without the lock, which is for waking the thread: it only ever takes from the other end.
        self._receipts.append(receipt)
        if len(self._receipts) in (1, self.batch_size):
            with self._wake:
                self._wake.notify()

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
        except Exception as error:
            log.exception("ledger %s: the writer has stopped", self.path)
            self._failed(error)
        finally:
            self._disconnect()
            self._ended.set_result(None)

    def _first(self, opened: Future[None]) -> bool:
        """Open the file once before anyone is served; what may pass, like a lock, is no reason not to start."""
        try:
            self._connected()
        except sqlite3.Error as error:
            self._failed(error)
        except BaseException as error:  # noqa: BLE001 - handed to whoever waits in open()
            opened.set_exception(error)
            return False
        opened.set_result(None)
        return True

    def _next(self) -> Batch | None:
        """Wait for something to write; None when there is nothing left and the end has come."""
        with self._wake:
            self._wake.wait_for(lambda: self._receipts or self._rejections or self._closing is not None)
            # The first receipt starts a batch; those that come within the next moment are written with it.
            self._wake.wait_for(
                lambda: len(self._receipts) >= self.batch_size or self._closing is not None, timeout=self.flush_seconds
            )
            rejections, self._rejections = self._rejections, {}
        # Counted before they leave the queue: at no moment does it look emptier than it is.
        self._taken = min(len(self._receipts), self.batch_size)
        if not self._taken and not rejections:
            return None
        self._batches += 1
        return Batch(self._batches, self._rows(self._taken), rejections)

    def _rows(self, count: int) -> list[rows.Row]:
        """Take receipts from the queue as rows, a few at a time, so that the event loop is never kept for long."""
        found: list[rows.Row] = []
        for start in range(0, count, rows.AT_ONCE):
            for _ in range(min(rows.AT_ONCE, count - start)):
                receipt = self._receipts.popleft()
                try:
                    found.append(rows.row(receipt))
                except Exception:
                    # One receipt that cannot be written down must not hold up all that come after it.
                    log.exception("ledger %s: receipt %s cannot be written down and is lost", self.path, receipt.id)
                    self.dropped(1)
            time.sleep(PAUSE_SECONDS)
        return found

    def _persist(self, batch: Batch) -> bool:
        """Write a batch, however often it takes; False when the end came first."""
        wait = FIRST_WAIT_SECONDS
        while not self._tried(batch):
            self.waits(self.waiting)
            if not self._may_wait(wait):
                return False
            wait = min(wait * 2, LONGEST_WAIT_SECONDS)
        self._taken = 0
        with self._wake:
            self._uncounted -= sum(batch.rejections.values())
        self.written(len(batch.receipts))
        self.waits(self.waiting)
        return True

    def _tried(self, batch: Batch) -> bool:
        try:
            self._write(batch)
        except Exception as error:  # noqa: BLE001 - whatever it is, the batch is kept and the reason is shown
            self._failed(error)
            self._disconnect()
            return False
        self._recovered()
        return True

    def _write(self, batch: Batch) -> None:
        database = self._connected()
        database.execute("BEGIN IMMEDIATE")
        # A commit may report a failure and yet have happened. The number, written in the same transaction, tells.
        done = database.execute("SELECT batch FROM writers WHERE id = ?", (self._id,)).fetchone()
        if done is None or done[0] < batch.number:
            last = rollups.last_row(database)
            rows.insert(database, batch.receipts, batch.rejections)
            rollups.add(database, last)
            database.execute(
                "INSERT INTO writers (id, batch) VALUES (?, ?) ON CONFLICT (id) DO UPDATE SET batch = excluded.batch",
                (self._id, batch.number),
            )
        database.execute("COMMIT")
        # Somebody may have moved or deleted the file; SQLite goes on writing to what is no longer there.
        if self._identity() != self._file:
            raise sqlite3.OperationalError("the file was moved or deleted")

    def _connected(self) -> sqlite3.Connection:
        if self._database is None:
            self._database = schema.connect(self.path)
            self._file = self._identity()
        return self._database

    def _disconnect(self) -> None:
        database, self._database = self._database, None
        if database is not None:
            database.close()

    def _identity(self) -> tuple[int, int] | None:
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            return None
        return found.st_dev, found.st_ino

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
            log.warning("ledger %s: cannot write, will try again: %s", self.path, text)
        self.problem = text

    def _recovered(self) -> None:
        if self.problem is not None:
            log.warning("ledger %s: writes again after %.1f s", self.path, time.monotonic() - self.since)
        self.problem = None
