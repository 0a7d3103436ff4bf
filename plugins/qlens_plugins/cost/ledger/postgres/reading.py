"""How a question reads a PostgreSQL ledger, and what is special in its SQL."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TypeVar

import asyncpg
from attrs import define, field, frozen

from qlens import PostgresLine
from qlens_plugins.cost.ledger.postgres.writing import meter
from qlens_plugins.cost.ledger.store import Dialect, Found, Question, TookTooLong, Value

T = TypeVar("T")


@frozen
class PostgresDialect:
    """PostgreSQL's own ways."""

    join: str = "JOIN"
    sorts_groups: bool = False

    def tag(self, name: str) -> tuple[str, str]:
        """Read it from the JSON."""
        return "tags ->> CAST(? AS text)", name

    def before(self, column: str, mark: str) -> str:
        """All of it where the text is missing."""
        return f"split_part({column}, '{mark}', 1)"

    def meter(self, name: str) -> str:
        """Read it from the JSON."""
        return meter(name)

    def summed(self, terms: Sequence[str]) -> Sequence[str]:
        """One column each: its sums have any size."""
        return [f"sum({term})" for term in terms]

    def rolled(self, names: Sequence[str]) -> Sequence[str]:
        """One column each."""
        return [f"sum({name})" for name in names]

    def whole(self, found: Found) -> list[int]:
        """They are whole."""
        return list(found)


@define(eq=False)
class PostgresDatabase:
    """A connection that reads."""

    line: PostgresLine
    last: float
    """Until when, in monotonic seconds."""
    dialect: Dialect = field(factory=PostgresDialect)

    def rows(self, sql: str, values: Sequence[Value] = ()) -> Sequence[Found]:
        """All rows."""
        return self.line.rows(sql, values, self.last - time.monotonic())

    def one(self, sql: str, values: Sequence[Value] = ()) -> Found | None:
        """The first row."""
        found = self.rows(sql, values)
        return found[0] if found else None


@define(eq=False)
class PostgresReading:
    """One question, on a connection that waits for questions or on a new one."""

    lent: Callable[[], AbstractContextManager[PostgresLine]]
    seconds: float
    _line: PostgresLine | None = field(default=None, init=False)
    _stopped: bool = field(default=False, init=False)
    _lock: threading.Lock = field(factory=threading.Lock, init=False)

    def run(self, question: Question[T]) -> T:
        """Ask in one transaction."""
        last = time.monotonic() + self.seconds
        with self.lent() as line:
            self._use(line)
            try:
                answer = self._asked(line, question, last)
            except (asyncio.CancelledError, TimeoutError) as error:
                raise TookTooLong from error
            except asyncpg.QueryCanceledError as error:
                if self.seconds == math.inf:
                    raise  # there was no limit: somebody at the server has ended it
                raise TookTooLong from error
            finally:
                self._use(None)
            if self._stopped:
                raise TookTooLong  # or what was to stop it would stop the next question on the connection
            return answer

    def _use(self, line: PostgresLine | None) -> None:
        with self._lock:
            self._line = line

    def _asked(self, line: PostgresLine, question: Question[T], last: float) -> T:
        # The server gives up by itself as well: it may not hear that nobody waits.
        milliseconds = 0 if self.seconds == math.inf else max(1, round(self.seconds * 1000))
        begin = f"BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET LOCAL statement_timeout = {milliseconds}"
        if self.seconds == math.inf:
            # A command may take its time between two statements: `verify` does with each large day.
            begin += "; SET LOCAL idle_in_transaction_session_timeout = 0"
        # Before anything is read: who waited later until a month is dropped would read on as of before, without it.
        begin += "; LOCK TABLE ONLY receipts IN ACCESS SHARE MODE"
        line.execute(begin, last - time.monotonic())
        if self._stopped:
            raise TookTooLong
        answer = question(PostgresDatabase(line, last))
        line.execute("COMMIT", last - time.monotonic())
        return answer

    def stop(self) -> None:
        """Give up what is asked now or next."""
        with self._lock:
            self._stopped = True
            if self._line is not None:
                self._line.stop()
