"""How a question reads an SQLite ledger, and what is special in SQLite's SQL."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TypeVar

from attrs import define, field, frozen

from qlens_plugins.cost.ledger.rollups import HALF
from qlens_plugins.cost.ledger.sqlite import schema, writing
from qlens_plugins.cost.ledger.store import Dialect, Found, Question, StoreAway, TookTooLong, Value

STEPS = 100_000
"""Of SQLite's machine, between two looks at whether to go on."""

T = TypeVar("T")


@contextmanager
def away() -> Iterator[None]:
    """What SQLite raises, raised as StoreAway."""
    try:
        yield
    except sqlite3.Error as error:
        raise StoreAway(str(error)) from error


@frozen
class SqliteDialect:
    """SQLite's own ways."""

    # CROSS: it never turns the tables round.
    join: str = "CROSS JOIN"
    sorts_groups: bool = True

    def tag(self, name: str) -> tuple[str, str]:
        """Read it from the JSON: by a path, which is quicker, where the name cannot have been escaped in there."""
        if json.dumps(name) == f'"{name}"':
            return "CAST(json_extract(tags, ?) AS TEXT)", f'$."{name}"'
        return "(SELECT CAST(value AS TEXT) FROM json_each(tags) WHERE key = ?)", name

    def before(self, column: str, mark: str) -> str:
        """Nothing where the text is missing."""
        return f"substr({column}, 1, max(instr({column}, '{mark}') - 1, 0))"

    def meter(self, name: str) -> str:
        """Read it from the JSON, where there is any."""
        return writing.meter(name)

    def summed(self, terms: Sequence[str]) -> Sequence[str]:
        """Two columns each: sum() fails beyond 64 bits, which money in picodollars reaches at 9.2 million USD."""
        return [half for term in terms for half in (f"sum(({term}) / {HALF})", f"sum(({term}) % {HALF})")]

    def rolled(self, names: Sequence[str]) -> Sequence[str]:
        """Two columns each, as they are kept."""
        return [half for name in names for half in (f"sum({name}_high)", f"sum({name}_low)")]

    def whole(self, found: Found) -> list[int]:
        """Put the halves together."""
        return [high * HALF + low for high, low in zip(found[::2], found[1::2], strict=True)]


@define(eq=False)
class SqliteDatabase:
    """A connection that reads."""

    database: sqlite3.Connection
    dialect: Dialect = field(factory=SqliteDialect)

    def rows(self, sql: str, values: Sequence[Value] = ()) -> Sequence[Found]:
        """All rows."""
        return self.database.execute(sql, values).fetchall()

    def one(self, sql: str, values: Sequence[Value] = ()) -> Found | None:
        """The first row."""
        found: Found | None = self.database.execute(sql, values).fetchone()
        return found


@define(eq=False)
class SqliteReading:
    """One question, on a connection of its own."""

    path: Path
    seconds: float
    _stopped: bool = field(default=False, init=False)

    def run(self, question: Question[T]) -> T:
        """Ask in one transaction, beside the writer."""
        try:
            with away(), closing(schema.connect_to_read(self.path)) as database:
                last = time.monotonic() + self.seconds
                # Asked now and then by SQLite: an interrupt before the first statement would be forgotten.
                database.set_progress_handler(lambda: self._goes_too_far(last), STEPS)
                database.execute("BEGIN")
                return question(SqliteDatabase(database))
        except StoreAway as error:
            if self._stopped:
                raise TookTooLong from error
            raise

    def _goes_too_far(self, last: float) -> bool:
        self._stopped = self._stopped or time.monotonic() > last
        return self._stopped

    def stop(self) -> None:
        """Let SQLite give up at its next look."""
        self._stopped = True
