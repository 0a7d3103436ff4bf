"""A line to an SQLite file: one thread asks it, one thing after another, whoever waits for the answers."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from attrs import define, field

from qlens import StartupError, file_identity, open_sqlite, sqlite_transaction
from qlens_plugins.auth.key_store.schema import MIGRATIONS, OWNER
from qlens_plugins.auth.key_store.store import StoreAway

T = TypeVar("T")
Database = sqlite3.Connection


@define(eq=False)
class Line:
    """A thread with a connection of its own, which is made anew after whatever went wrong."""

    path: Path
    pepper: str
    """Tells the pepper that the keys are hashed with from others."""
    name: str
    makes: bool
    """Whether it may make the file, until it was open once."""
    _thread: ThreadPoolExecutor = field(init=False)
    _database: Database | None = field(default=None, init=False)
    _file: tuple[int, int] | None = field(default=None, init=False)

    def __attrs_post_init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, self.name)

    async def open(self) -> None:
        """Connect; raises StoreAway, or StartupError for what an operator must mend."""
        try:
            await self._on_thread(self._connected)
        except sqlite3.Error as error:
            raise StoreAway(str(error)) from error

    async def ask(self, work: Callable[[Database], T]) -> T:
        """What some work with the database returns; raises StoreAway."""
        return await self._on_thread(lambda: self._asked(work))

    async def close(self) -> None:
        """Let go of the file, after what was asked before."""
        await self._on_thread(self._disconnect)
        self._thread.shutdown(wait=False)

    async def _on_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _asked(self, work: Callable[[Database], T]) -> T:
        try:
            answer = work(self._connected())
            if file_identity(self.path) != self._file:
                raise sqlite3.OperationalError("the file was moved or deleted")
        except (sqlite3.Error, StartupError) as error:
            self._disconnect()
            raise StoreAway(str(error)) from error
        return answer

    def _connected(self) -> Database:
        if self._database is None:
            database = open_sqlite(self.path, OWNER, MIGRATIONS, create=self.makes)
            try:
                _check_pepper(database, self.pepper)
            except BaseException:
                database.close()
                raise
            self._database, self._file, self.makes = database, file_identity(self.path), False
        return self._database

    def _disconnect(self) -> None:
        database, self._database = self._database, None
        if database is not None:
            database.close()


def _check_pepper(database: Database, pepper: str) -> None:
    """Raise StartupError unless the keys in the file were hashed with this pepper; the first to come says which."""
    if database.execute("SELECT pepper FROM key_state").fetchone()[0] is None:
        with sqlite_transaction(database):
            database.execute("UPDATE key_state SET pepper = ? WHERE pepper IS NULL", (pepper,))
    if database.execute("SELECT pepper FROM key_state").fetchone()[0] != pepper:
        raise StartupError("the keys in this database were hashed with another `pepper`: set that one again")
