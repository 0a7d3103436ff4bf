"""The tables in an SQLite file, which may be the ledger's."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attrs import define, field

from qlens import SqliteFile, sqlite_transaction
from qlens_plugins.auth.key_store.schema import MIGRATIONS, OLDEST, OWNER
from qlens_plugins.auth.key_store.store import StoreAway


@define(eq=False)
class SqliteDatabase:
    """Implements `Database`."""

    connection: sqlite3.Connection

    def rows(self, sql: str, *values: Any) -> Sequence[Sequence[Any]]:
        """Implements `Database`."""
        with _away():
            return self.connection.execute(sql, values).fetchall()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Implements `Database`."""
        with _away(), sqlite_transaction(self.connection):
            yield

    @contextmanager
    def moment(self) -> Iterator[None]:
        """Implements `Database`."""
        self.rows("BEGIN")
        try:
            yield
        finally:
            if self.connection.in_transaction:
                self.rows("ROLLBACK")


@define(eq=False)
class SqlitePlace:
    """Implements `Place`. A file that is moved or deleted while it is open is away, and is not made anew."""

    _file: SqliteFile
    _database: SqliteDatabase | None = field(default=None, init=False)

    @classmethod
    def at(cls, path: Path, *, makes: bool) -> SqlitePlace:
        """A place in a file, which it may make."""
        return cls(SqliteFile(path, OWNER, MIGRATIONS, oldest=OLDEST, makes=makes))

    def connected(self) -> SqliteDatabase:
        """Implements `Place`."""
        with _away():
            connection = self._file.connected()
        if self._database is None or self._database.connection is not connection:
            self._database = SqliteDatabase(connection)
        return self._database

    def drop(self) -> None:
        """Implements `Place`."""
        self._file.drop()


@contextmanager
def _away() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise StoreAway(str(error)) from error
