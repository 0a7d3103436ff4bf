"""A ledger in an SQLite file, which the processes of one machine may share."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from attrs import define, field

from qlens import file_identity, sqlite_transaction
from qlens_plugins.cost.ledger.sqlite import schema, writing
from qlens_plugins.cost.ledger.sqlite.reading import SqliteDialect, SqliteReading, away
from qlens_plugins.cost.ledger.store import Batch, Dialect


@define(eq=False)
class SqliteStore:
    """The file, and the connection that writes to it; each question has a connection of its own."""

    path: Path
    dialect: Dialect = field(factory=SqliteDialect, init=False)
    _database: sqlite3.Connection | None = field(default=None, init=False)
    _file: tuple[int, int] | None = field(default=None, init=False)
    """Device and inode of the open file."""

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        """The file's name."""
        return self.path.name

    @property
    def place(self) -> object:
        """Its path."""
        return self.path

    def connect(self) -> None:
        """Open the file to write."""
        with away():
            self._connected()

    def write(self, writer: str, batch: Batch) -> None:
        """Write a batch in one transaction."""
        with away():
            database = self._connected()
            with sqlite_transaction(database):
                writing.write(database, writer, batch)
            # Somebody may have moved or deleted the file; SQLite goes on writing to what is no longer there.
            if file_identity(self.path) != self._file:
                raise sqlite3.OperationalError("the file was moved or deleted")

    def forget(self, before_ns: int) -> bool:
        """Delete some of what is older."""
        with away():
            database = self._connected()
            with sqlite_transaction(database):
                return writing.forget(database, before_ns)

    def reading(self, seconds: float) -> SqliteReading:
        """A question."""
        return SqliteReading(self.path, seconds)

    def disconnect(self) -> None:
        """Close the connection that writes."""
        database, self._database = self._database, None
        if database is not None:
            database.close()

    def close(self) -> None:
        """Close it: questions close their own."""
        self.disconnect()

    def _connected(self) -> sqlite3.Connection:
        if self._database is None:
            self._database = schema.connect(self.path)
            self._file = file_identity(self.path)
        return self._database
