"""The databases a ledger, or a store of keys, may be in, for tests that hold for each of them."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any, Protocol

from attrs import frozen

from qlens import Secret
from qlens.testing.postgres import PostgresServer
from qlens_plugins.cost.ledger.postgres import PostgresStore
from qlens_plugins.cost.ledger.sqlite import SqliteStore
from qlens_plugins.cost.ledger.store import Store


class Place(Protocol):
    """An empty database."""

    @property
    def url(self) -> str:
        """What a plugin's configuration says."""

    def store(self) -> Store:
        """The ledger in it."""

    def rows(self, sql: str) -> list[dict[str, Any]]:
        """What a statement finds; nothing while there are no tables."""

    def execute(self, sql: str) -> None:
        """Change something behind the gateway's back."""


@frozen
class SqlitePlace:
    """A file."""

    path: Path

    @property
    def url(self) -> str:
        """Where it is."""
        return f"sqlite:///{self.path}"

    def store(self) -> SqliteStore:
        """The ledger in it."""
        return SqliteStore(self.path)

    def rows(self, sql: str) -> list[dict[str, Any]]:
        """What a statement finds."""
        database = sqlite3.connect(self.path, timeout=10)
        database.row_factory = sqlite3.Row
        try:
            return [dict(row) for row in database.execute(sql)]
        except sqlite3.OperationalError as error:
            if "no such table" in str(error):
                return []
            raise
        finally:
            database.close()

    def execute(self, sql: str) -> None:
        """Run a statement."""
        database = sqlite3.connect(self.path, timeout=10)
        try:
            database.execute(sql)
            database.commit()
        finally:
            database.close()


@frozen
class PostgresPlace:
    """A database of a server."""

    server: PostgresServer
    name: str

    @property
    def url(self) -> str:
        """Where it is."""
        return self.server.url(self.name)

    def store(self) -> PostgresStore:
        """The ledger in it."""
        return PostgresStore(Secret(self.url))

    def rows(self, sql: str) -> list[dict[str, Any]]:
        """What a statement finds."""
        import asyncpg

        try:
            return [dict(row) for row in self.server.execute(sql, database=self.name)]
        except asyncpg.UndefinedTableError:
            return []

    def execute(self, sql: str) -> None:
        """Run a statement."""
        self.server.execute(sql, database=self.name)
