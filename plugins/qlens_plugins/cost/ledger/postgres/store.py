"""A ledger in PostgreSQL, which gateways on many machines may share."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

import asyncpg
from attrs import define, field

from qlens import PostgresLine, Secret, postgres_errors, postgres_name
from qlens_plugins.cost.ledger.postgres import schema, writing
from qlens_plugins.cost.ledger.postgres.reading import PostgresDialect, PostgresReading
from qlens_plugins.cost.ledger.postgres.schema import Month
from qlens_plugins.cost.ledger.store import Batch, Dialect, StoreAway

log = logging.getLogger("qlens.ledger")

WRITE_SECONDS = 30.0
"""For a batch; then it is tried again on another connection."""
UPGRADE_SECONDS = 600.0
"""For making or upgrading the tables."""
PARTITION_SECONDS = 60.0
"""Between two tries to make a partition while somebody reads."""
_NO_PARTITION = (asyncpg.InsufficientPrivilegeError, asyncpg.QueryCanceledError, TimeoutError)
"""What keeps a partition from being made while receipts can be written: the tables are another's, or there is so much
to be moved that it takes too long."""
IDLE = 2
"""Connections that are kept for the next question."""


@define(eq=False)
class PostgresStore:
    """The database, the connection that writes to it, and those that wait for questions."""

    url: Secret
    dialect: Dialect = field(factory=PostgresDialect, init=False)
    _line: PostgresLine | None = field(default=None, init=False)
    _months: set[Month] = field(factory=set, init=False)
    """Those that have a partition, as far as is known."""
    _next_try: float = field(default=0.0, init=False)
    """When to make partitions again, in monotonic seconds."""
    _idle: list[PostgresLine] = field(factory=list, init=False)
    _lock: threading.Lock = field(factory=threading.Lock, init=False)
    _closed: bool = field(default=False, init=False)

    def __str__(self) -> str:
        return self.name

    @property
    def name(self) -> str:
        """Where it is, without user and password."""
        return postgres_name(self.url.reveal())

    @property
    def place(self) -> object:
        """Its whole URL: with another password it is another one."""
        return self.url

    def connect(self) -> None:
        """Log in, and make or upgrade the tables."""
        with self._away():
            self._connected()

    def write(self, writer: str, batch: Batch) -> None:
        """Write a batch."""
        with self._away():
            line = self._connected()
            self._partition(line, [str(row[0]) for row in batch.receipts])
            line.run(writing.write(line.connection, writer, batch), WRITE_SECONDS)

    def forget(self, before_ns: int) -> bool:
        """Drop the partitions of months that ended before then."""
        with self._away():
            line = self._connected()
            try:
                more = line.run(schema.forget(line.connection, before_ns), WRITE_SECONDS)
                self._months = line.run(schema.partitions(line.connection), WRITE_SECONDS)
            except asyncpg.LockNotAvailableError:
                return False  # somebody reads; there is time
        return more

    def reading(self, seconds: float) -> PostgresReading:
        """A question."""
        return PostgresReading(self._lent, seconds)

    def disconnect(self) -> None:
        """Close the connection that writes."""
        line, self._line = self._line, None
        if line is not None:
            line.close()

    def close(self) -> None:
        """Close all of them."""
        self.disconnect()
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for line in idle:
            line.close()

    def _connected(self) -> PostgresLine:
        if self._line is None:
            line = self._opened("ledger")
            try:
                line.run(schema.prepare(line.connection, self.name), UPGRADE_SECONDS)
                line.execute(writing.CREATE_GIVEN, WRITE_SECONDS)
                self._months = line.run(schema.partitions(line.connection), WRITE_SECONDS)
            except BaseException:
                line.close()
                raise
            self._line = line
        return self._line

    def _partition(self, line: PostgresLine, ids: Iterable[str]) -> None:
        """Make partitions for what is to be written, and for the next month: without one it goes among the others."""
        month = Month.at(time.time())
        first, end = month.first_id, month.next.next.first_id
        others = (Month.of_id(each) for each in ids if not first <= each < end)
        needed = {month, month.next, *(each for each in others if each is not None)} - self._months
        if needed and time.monotonic() > self._next_try:
            try:
                self._months = line.run(schema.add_partitions(line.connection, needed), WRITE_SECONDS)
            except asyncpg.LockNotAvailableError as error:
                # Somebody reads for long. What has no partition yet is moved when there is one.
                self._next_try = time.monotonic() + PARTITION_SECONDS
                log.info("ledger %s: the next partition has to wait: %s", self, error)
            except _NO_PARTITION as error:
                # It may be so for good, and must not keep receipts waiting for good.
                self._next_try = time.monotonic() + PARTITION_SECONDS
                log.warning("ledger %s: the next partition cannot be made: %s", self, error)
                if isinstance(error, TimeoutError):
                    raise  # the connection is not to be trusted; the next one tries without

    def _opened(self, what: str) -> PostgresLine:
        return PostgresLine.opened(self.url.reveal(), f"qlens {what}")

    @contextmanager
    def _lent(self) -> Iterator[PostgresLine]:
        """A connection for a question; one on which something went wrong is not used again."""
        with postgres_errors(StoreAway):
            line = self._waiting() or self._opened("questions")
            try:
                yield line
            except BaseException:
                line.close()
                raise
            with self._lock:
                is_kept = not self._closed and len(self._idle) < IDLE
                if is_kept:
                    self._idle.append(line)
            if not is_kept:
                line.close()

    def _waiting(self) -> PostgresLine | None:
        """A connection that waits for a question and still answers."""
        while True:
            with self._lock:
                line = self._idle.pop() if self._idle else None
            if line is None or line.answers():
                return line
            line.close()

    def _away(self) -> AbstractContextManager[None]:
        """What asyncpg raises, raised as StoreAway, and what waiting does not help as StartupError."""
        return postgres_errors(StoreAway, f"ledger: {self.name}")
