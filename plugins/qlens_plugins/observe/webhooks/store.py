"""Events that wait to be delivered, in an SQLite file that the processes of one machine share."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from attrs import define, field

from qlens import Spool, SqliteFile, StartupError, sqlite_transaction
from qlens_plugins.observe.webhooks import statements
from qlens_plugins.observe.webhooks.records import Bounds, Count, Delivery, Ended, Lost, Turn
from qlens_plugins.observe.webhooks.statements import MIGRATIONS, OLDEST, OWNER, Database

log = logging.getLogger("qlens.webhooks")

AT_ONCE = 500
"""How many events of a spool are taken in with one transaction."""
COUNT_SECONDS = 2.0
"""Between two counts of all that lies in the file."""

T = TypeVar("T")


class StoreAway(Exception):
    """The file cannot be used at present."""


@define(eq=False)
class Store:
    """Takes events from spools into the file and gives out what is due, all on one thread.

    A claimed delivery is due again after `lease_seconds`: should its process die, another one has it then. A file that
    is moved or deleted while it is open is away, and is not made anew.
    """

    path: Path
    bounds: Bounds
    lease_seconds: float
    _thread: ThreadPoolExecutor = field(factory=lambda: ThreadPoolExecutor(1, "qlens-webhooks"), init=False)
    _file: SqliteFile = field(init=False)
    _spools: list[Spool] = field(factory=list, init=False)
    """The process's own, and those of processes that died."""
    _count_at: float = field(default=0.0, init=False)

    def __attrs_post_init__(self) -> None:
        self._file = SqliteFile(self.path, OWNER, MIGRATIONS, oldest=OLDEST)

    async def open(self) -> None:
        """Make or open the file; raises StoreAway, or StartupError for what an operator must mend."""
        try:
            await self._on_thread(self._file.connected)
        except sqlite3.Error as error:
            raise StoreAway(str(error)) from error

    async def open_spools(self, folder: Path) -> Spool:
        """Own a spool that events are appended to, and take over those that nobody owns; raises OSError."""

        def work() -> None:
            self._spools = [Spool.open(folder), *Spool.orphans(folder)]

        await self._on_thread(work)
        return self._spools[0]

    async def turn(self, ended: Sequence[Ended], free: Mapping[str, int], now: float) -> Turn:
        """Note how deliveries ended, take in what came, and claim what is due: so many for each endpoint."""
        return await self._on_thread(lambda: self._turned(ended, free, now))

    async def ask(self, work: Callable[[Database], T]) -> T:
        """What some work with the database returns; raises StoreAway."""
        return await self._on_thread(lambda: self._asked(work))

    async def close(self) -> None:
        """Let go of the file and the spools, after what was asked before."""

        def work() -> None:
            self._file.drop()
            for spool in self._spools:
                spool.close()

        await self._on_thread(work)
        self._thread.shutdown(wait=False)

    # --- the thread ----------------------------------------------------------------------------

    async def _on_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _turned(self, ended: Sequence[Ended], free: Mapping[str, int], now: float) -> Turn:
        self._sync()
        found = [_read(spool) for spool in self._spools]
        records = [each for group in found for each in group]
        turn = self._asked(lambda database: self._work(database, records, ended, free, now))
        for spool, group in zip(self._spools, found, strict=True):
            spool.shipped(len(group))
        for spool in self._spools[1:]:
            if not spool.left.records:
                self._spools.remove(spool)
                spool.close()
        return turn

    def _sync(self) -> None:
        """Let the spools keep what they have for sure, and forget it in memory."""
        for spool in self._spools:
            if spool.unsynced:
                try:
                    spool.sync()
                except OSError as error:
                    log.error("webhooks %s: the spool cannot be synced: %s", self.path, error.strerror)

    def _work(
        self,
        database: Database,
        records: Sequence[bytes],
        ended: Sequence[Ended],
        free: Mapping[str, int],
        now: float,
    ) -> Turn:
        lost: Lost = Counter()
        claimed: list[Delivery] = []
        idle = []
        with sqlite_transaction(database):
            for each in ended:
                statements.note(database, each)
            for endpoint in {each.delivery.endpoint for each in ended if each.state == "dead"}:
                lost[endpoint, "dead_full"] += statements.bury(database, endpoint, self.bounds.dead)
            statements.take_in(database, records, self.bounds.waiting, lost)
            for endpoint, most in free.items():
                found = statements.claim(database, endpoint, most, now, self.lease_seconds) if most else []
                claimed += found
                if len(found) < most:
                    idle.append(endpoint)
        dues = [due for endpoint in idle if (due := statements.next_due(database, endpoint)) is not None]
        return Turn(claimed, lost, min(dues, default=None), self._counts(database), len(records) >= AT_ONCE)

    def _counts(self, database: Database) -> Mapping[str, Count] | None:
        if time.monotonic() < self._count_at:
            return None
        self._count_at = time.monotonic() + COUNT_SECONDS
        return statements.counts(database)

    def _asked(self, work: Callable[[Database], T]) -> T:
        try:
            return work(self._file.connected())
        except (sqlite3.Error, StartupError) as error:
            self._file.drop()
            raise StoreAway(str(error)) from error


def _read(spool: Spool) -> list[bytes]:
    try:
        return spool.read(AT_ONCE)
    except OSError as error:  # one that cannot be read holds up none of the others
        log.error("webhooks: the spool %s cannot be read: %s", spool.place, error.strerror)
        return []
