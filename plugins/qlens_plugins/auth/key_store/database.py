"""What the store's SQL runs on: a connection of its own for each thread, to tables in one database or another."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

from attrs import define, field

from qlens import StartupError
from qlens_plugins.auth.key_store.store import StoreAway

T = TypeVar("T")


class CommitLost(StoreAway):
    """Nobody knows whether what was to be written is written."""


class Database(Protocol):
    """A connection. Whatever is asked of it may raise StoreAway."""

    def rows(self, sql: str, *values: Any) -> Sequence[Sequence[Any]]:
        """All rows of an answer; `?` in the SQL stands for a value."""

    def transaction(self) -> AbstractContextManager[None]:
        """Write all of it or nothing, and alone: who else writes waits. Raises CommitLost as well."""

    def moment(self) -> AbstractContextManager[None]:
        """Read several things as they are at one moment."""


class Place(Protocol):
    """Where the tables are. It keeps one connection, for one thread."""

    def connected(self) -> Database:
        """The connection: a new one where there is none that answers, with the tables made or upgraded.

        Raises StoreAway, and StartupError for what an operator must mend.
        """

    def drop(self) -> None:
        """Let go of the connection, if there is one."""


@define(eq=False)
class Line:
    """A thread that asks the database one thing after another; after whatever went wrong, on a new connection."""

    place: Place
    pepper: str
    """Tells the pepper that the keys are hashed with from others."""
    name: str
    _thread: ThreadPoolExecutor = field(init=False)
    _checked: Database | None = field(default=None, init=False)
    """The connection to keys that are known to have this pepper."""

    def __attrs_post_init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, self.name)

    async def open(self) -> None:
        """Connect; raises StoreAway, or StartupError for what an operator must mend."""
        await self._on_thread(self._connected)

    async def ask(self, work: Callable[[Database], T]) -> T:
        """What some work with the database returns; raises StoreAway."""
        return await self._on_thread(lambda: self._asked(work))

    async def close(self) -> None:
        """Let go of the database, after what was asked before."""
        await self._on_thread(self.place.drop)
        self._thread.shutdown(wait=False)

    async def _on_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _asked(self, work: Callable[[Database], T]) -> T:
        try:
            return work(self._connected())
        except StoreAway:
            self.place.drop()
            raise
        except StartupError as error:
            raise StoreAway(str(error)) from error

    def _connected(self) -> Database:
        database = self.place.connected()
        if database is not self._checked:
            try:
                _check_pepper(database, self.pepper)
            except BaseException:
                self.place.drop()
                raise
            self._checked = database
        return database


def _check_pepper(database: Database, pepper: str) -> None:
    """Raise StartupError unless the keys in the database were hashed with this pepper; the first to come says which."""
    question = "SELECT pepper FROM key_state"
    if database.rows(question)[0][0] is None:
        with database.transaction():
            database.rows("UPDATE key_state SET pepper = ? WHERE pepper IS NULL", pepper)
    if database.rows(question)[0][0] != pepper:
        raise StartupError("the keys in this database were hashed with another `pepper`: set that one again")
