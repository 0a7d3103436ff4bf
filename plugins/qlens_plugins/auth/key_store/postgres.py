"""The tables in a PostgreSQL database, which may be the ledger's; needs the extra `postgres`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from attrs import define, field

from qlens import PostgresLine, Secret, postgres_errors, postgres_name, prepare_postgres
from qlens_plugins.auth.key_store.database import CommitLost
from qlens_plugins.auth.key_store.postgres_schema import MIGRATIONS, OWNER, TABLES
from qlens_plugins.auth.key_store.store import StoreAway

PROBE_SECONDS = 2.0
"""How long a connection may take to show that it still works, before another one is made."""
STEP_SECONDS = 30.0
"""For one statement."""
UPGRADE_SECONDS = 600.0
"""For making or upgrading the tables."""

# As long somebody who changes something waits for others who do.
_SETTINGS = "SET lock_timeout = '2s'"
# Whoever writes has this row: changes are in force in the order of their numbers, and entries in that of the log.
_BEGIN = "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE; SELECT FROM key_state FOR UPDATE"


@define(eq=False)
class PostgresDatabase:
    """Implements `Database`."""

    line: PostgresLine

    def rows(self, sql: str, *values: Any) -> Sequence[Sequence[Any]]:
        """Implements `Database`."""
        with postgres_errors(StoreAway):
            return self.line.rows(sql, values, STEP_SECONDS)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Implements `Database`."""
        self._execute(_BEGIN)
        try:
            yield
        except BaseException:
            self._execute("ROLLBACK")
            raise
        with postgres_errors(CommitLost):
            self.line.execute("COMMIT", STEP_SECONDS)

    @contextmanager
    def moment(self) -> Iterator[None]:
        """Implements `Database`."""
        self._execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        try:
            yield
        finally:
            self._execute("ROLLBACK")

    def _execute(self, sql: str) -> None:
        with postgres_errors(StoreAway):
            self.line.execute(sql, STEP_SECONDS)


@define(eq=False)
class PostgresPlace:
    """Implements `Place`."""

    url: Secret
    _database: PostgresDatabase | None = field(default=None, init=False)

    def connected(self) -> PostgresDatabase:
        """Implements `Place`."""
        if self._database is not None and not self._database.line.answers(PROBE_SECONDS):
            self.drop()
        if self._database is None:
            name = postgres_name(self.url.reveal())
            with postgres_errors(StoreAway, f"{OWNER}: {name}"):
                self._database = PostgresDatabase(self._opened(name))
        return self._database

    def drop(self) -> None:
        """Implements `Place`."""
        database, self._database = self._database, None
        if database is not None:
            database.line.close()

    def _opened(self, name: str) -> PostgresLine:
        line = PostgresLine.opened(self.url.reveal(), "qlens keys")
        try:
            line.execute(_SETTINGS, STEP_SECONDS)
            line.run(prepare_postgres(line.connection, OWNER, MIGRATIONS, TABLES, name), UPGRADE_SECONDS)
        except BaseException:
            line.close()
            raise
        return line
