"""Budgets in an SQLite file that the processes of one machine share, asked on one thread, many at a time."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from attrs import define, field, frozen

from qlens import SqliteFile, StartupError, sqlite_transaction
from qlens_plugins.cost.budgets.store import Account, Ask, Increase, State, StoreAway, Told
from qlens_plugins.cost.budgets.windows import is_over

OWNER = "budgets"
_PAGE = 200
MIGRATIONS = (
    (
        """
        CREATE TABLE budgets (
            id TEXT NOT NULL, window INTEGER NOT NULL, rule TEXT NOT NULL, per TEXT NOT NULL, owner TEXT NOT NULL,
            tenant TEXT, period TEXT NOT NULL, cap INTEGER NOT NULL,
            spent INTEGER NOT NULL, held INTEGER NOT NULL, excess INTEGER NOT NULL, PRIMARY KEY (id, window)
        ) WITHOUT ROWID
        """,
        """
        CREATE TABLE budget_parts (
            process TEXT NOT NULL, id TEXT NOT NULL, window INTEGER NOT NULL,
            spent INTEGER NOT NULL, held INTEGER NOT NULL, excess INTEGER NOT NULL,
            part INTEGER NOT NULL, PRIMARY KEY (process, id, window, part)
        ) WITHOUT ROWID
        """,
        "CREATE TABLE budget_processes (process TEXT PRIMARY KEY, until REAL NOT NULL) WITHOUT ROWID",
        """
        CREATE TABLE budget_increases (
            id TEXT PRIMARY KEY, budget TEXT NOT NULL, picos INTEGER NOT NULL, expires_at INTEGER NOT NULL,
            reason TEXT NOT NULL, by TEXT NOT NULL, created_at INTEGER NOT NULL
        ) WITHOUT ROWID
        """,
        "CREATE INDEX budget_increases_by_budget ON budget_increases (budget, expires_at)",
    ),
)
"""A released version is never edited: a change is a new entry at the end."""
OLDEST = 1
"""The oldest version whose QLens may go on writing: what came after it must not disturb it."""

# By name wherever something is written or read: a later version may add columns.
_PART = "process, id, window, spent, held, excess, part"
_INCREASE = "id, budget, picos, expires_at, reason, by, created_at"

T = TypeVar("T")
Database = sqlite3.Connection


@frozen
class _Synced:
    """One `sync` that waits for the thread."""

    process: str
    asks: Sequence[Ask]
    now: float
    crash_seconds: float
    answer: asyncio.Future[list[Told]]


@define(eq=False)
class SqliteStore:
    """Implements `Store`. A file that is moved or deleted while it is open is away, and is not made anew."""

    path: Path
    _thread: ThreadPoolExecutor = field(factory=lambda: ThreadPoolExecutor(1, "qlens-budgets"), init=False)
    _file: SqliteFile = field(init=False)
    _waiting: list[_Synced] = field(factory=list, init=False)
    _working: asyncio.Task[None] | None = field(default=None, init=False)

    def __attrs_post_init__(self) -> None:
        self._file = SqliteFile(self.path, OWNER, MIGRATIONS, oldest=OLDEST)

    async def open(self) -> None:
        """Make or open the file; raises StartupError for what an operator must mend."""
        try:
            await self._on_thread(self._file.connected)
        except sqlite3.Error as error:
            raise StoreAway(str(error)) from error

    async def sync(self, process: str, asks: Sequence[Ask], now: float, crash_seconds: float) -> list[Told]:
        """Implements `Store`; what is asked while a transaction runs goes into the next one together."""
        answer: asyncio.Future[list[Told]] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Synced(process, asks, now, crash_seconds, answer))
        if self._working is None or self._working.done():
            self._working = asyncio.get_running_loop().create_task(self._work())
        return await answer

    async def _work(self) -> None:
        while self._waiting:
            together, self._waiting = self._waiting, []
            try:
                answers = await self._ask(lambda database, those=together: _sync_all(database, those))  # type: ignore[misc]
            except Exception as away:  # noqa: BLE001 - whatever it is, nobody may wait for ever
                for synced in together:
                    if not synced.answer.done():
                        synced.answer.set_exception(StoreAway(str(away)))
                continue
            for synced, told in zip(together, answers, strict=True):
                if not synced.answer.done():
                    synced.answer.set_result(told)

    async def renew(self, process: str, now: float, crash_seconds: float) -> bool:
        """Implements `Store`."""

        def work(database: Database) -> bool:
            with sqlite_transaction(database):
                _reap(database, now)
                return _renew(database, process, now + crash_seconds)

        return await self._ask(work)

    async def leave(self, process: str) -> None:
        """Implements `Store`."""

        def work(database: Database) -> None:
            with sqlite_transaction(database):
                _charge(database, process)

        await self._ask(work)

    async def sweep(self, process: str, after: str, now: float) -> str:
        """Implements `Store`."""

        def work(database: Database) -> str:
            with sqlite_transaction(database):
                return _sweep(database, after, now)

        return await self._ask(work)

    async def states(self, now: int, account: str | None = None) -> list[State]:
        """Implements `Store`."""
        return await self._ask(lambda database: _states(database, now, account))

    async def increase(self, increase: Increase) -> None:
        """Implements `Store`."""
        row = (
            *(increase.id, increase.account, increase.picos, increase.expires_at),
            *(increase.reason, increase.by, increase.created_at),
        )
        await self._ask(
            lambda database: database.execute(
                f"INSERT OR IGNORE INTO budget_increases ({_INCREASE}) VALUES (?, ?, ?, ?, ?, ?, ?)",  # noqa: S608
                row,
            )
        )

    async def close(self) -> None:
        """Implements `Store`."""
        await self._on_thread(self._file.drop)
        self._thread.shutdown(wait=False)

    # --- the thread ----------------------------------------------------------------------------

    async def _on_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def _ask(self, work: Callable[[Database], T]) -> T:
        return await self._on_thread(lambda: self._asked(work))

    def _asked(self, work: Callable[[Database], T]) -> T:
        try:
            return work(self._file.connected())
        except (sqlite3.Error, StartupError, OverflowError) as error:
            self._file.drop()
            raise StoreAway(str(error)) from error


def _sync_all(database: Database, together: Sequence[_Synced]) -> list[list[Told]]:
    answers = []
    with sqlite_transaction(database):
        for synced in together:
            _reap(database, synced.now)
            until = synced.now + synced.crash_seconds
            is_alive = _renew(database, synced.process, until)
            if not is_alive and any(ask.is_known for ask in synced.asks):
                answers.append([Told(given_up=True)] * len(synced.asks))
                continue
            if not is_alive:
                database.execute("INSERT INTO budget_processes (process, until) VALUES (?, ?)", (synced.process, until))
            answers.append([_answer(database, synced.process, ask, synced.now) for ask in synced.asks])
    return answers


def _answer(database: Database, process: str, ask: Ask, now: float) -> Told:
    account, place = ask.account, (ask.account.id, ask.window)
    database.execute(
        "INSERT INTO budgets (id, window, rule, per, owner, tenant, period, cap, spent, held, excess) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, 0, 0, 0) ON CONFLICT DO NOTHING",
        (*place, account.rule, account.per, account.owner, account.tenant, account.period, ask.limit),
    )
    spent, held, excess = database.execute(
        "SELECT spent, held, excess FROM budgets WHERE id = ? AND window = ?", place
    ).fetchone()
    before = database.execute(
        "SELECT spent, held, excess FROM budget_parts WHERE process = ? AND id = ? AND window = ? AND part = ?",
        (process, *place, ask.part),
    ).fetchone() or (0, 0, 0)
    spent, held, excess = spent + ask.spent - before[0], held + ask.held - before[1], excess + ask.excess - before[2]
    raised, until = database.execute(
        "SELECT ifnull(sum(picos), 0), ifnull(min(expires_at), 1 << 53) FROM budget_increases "
        "WHERE budget = ? AND expires_at > ?",
        (account.id, now),
    ).fetchone()
    others = [
        row
        for id_ in ask.beside
        for row in database.execute(
            "SELECT spent, held, excess FROM budgets WHERE id = ? AND window = ?", (id_, ask.window)
        )
    ]
    beside, beside_held, beside_excess = (sum(each) for each in zip((0, 0, 0), *others, strict=True))
    limit, mine, my_excess, granted = ask.limit + raised, ask.held, ask.excess, []
    room, slack = limit - beside - beside_held, ask.tolerance - beside_excess
    for need in ask.needs:
        fits = spent + held + need.likely <= room and excess + need.excess <= slack
        if fits:
            held, mine = held + need.likely, mine + need.likely
            excess, my_excess = excess + need.excess, my_excess + need.excess
        granted.append(fits)
    spare = max(0, min(ask.spare, room - limit // 5 - spent - held)) if all(granted) else 0
    held, mine = held + spare, mine + spare
    database.execute(
        "UPDATE budgets SET cap = ?, spent = ?, held = ?, excess = ? WHERE id = ? AND window = ?",
        (ask.limit, spent, held, excess, *place),
    )
    database.execute(
        f"INSERT INTO budget_parts ({_PART}) VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE "  # noqa: S608
        "SET spent = excluded.spent, held = excluded.held, excess = excluded.excess",
        (process, *place, ask.spent, mine, my_excess, ask.part),
    )
    return Told(granted, spare, spent, held + beside_held, limit, until, beside=beside)


def _renew(database: Database, process: str, until: float) -> bool:
    update = "UPDATE budget_processes SET until = ? WHERE process = ?"
    return database.execute(update, (until, process)).rowcount == 1


def _reap(database: Database, now: float) -> None:
    dead = database.execute("SELECT process FROM budget_processes WHERE until <= ?", (now,)).fetchall()
    for (process,) in dead:
        _charge(database, process)


def _charge(database: Database, process: str) -> None:
    """Charge all that a process held, and forget it: what it had spent is in the sum already."""
    for id_, window, held, excess in database.execute(
        "SELECT id, window, held, excess FROM budget_parts WHERE process = ?", (process,)
    ).fetchall():
        database.execute(
            "UPDATE budgets SET spent = spent + ?, held = held - ?, excess = excess - ? WHERE id = ? AND window = ?",
            (held + excess, held, excess, id_, window),
        )
    database.execute("DELETE FROM budget_parts WHERE process = ?", (process,))
    database.execute("DELETE FROM budget_processes WHERE process = ?", (process,))


def _sweep(database: Database, after: str, now: float) -> str:
    """Drop windows of some budgets, those of this process among them; what it says late makes them anew."""
    database.execute("DELETE FROM budget_increases WHERE expires_at <= ?", (now,))
    ids = [
        id_
        for (id_,) in database.execute(
            "SELECT DISTINCT id FROM budgets WHERE id > ? ORDER BY id LIMIT ?", (after, _PAGE)
        )
    ]
    rows = database.execute(
        "SELECT id, window, period FROM budgets WHERE id > ? AND id <= ? AND held = 0 AND excess = 0 "
        "AND id NOT IN (SELECT budget FROM budget_increases)",
        (after, ids[-1] if ids else after),
    ).fetchall()
    for id_, window, period in rows:
        if is_over(period, window, now):
            database.execute("DELETE FROM budgets WHERE id = ? AND window = ?", (id_, window))
            database.execute("DELETE FROM budget_parts WHERE id = ? AND window = ?", (id_, window))
    return ids[-1] if len(ids) == _PAGE else ""


def _states(database: Database, now: int, account: str | None) -> list[State]:
    increases: dict[str, list[Increase]] = {}
    live = f"SELECT {_INCREASE} FROM budget_increases WHERE expires_at > ? ORDER BY created_at"  # noqa: S608
    for row in database.execute(live, (now,)):
        increases.setdefault(row[1], []).append(Increase(*row))
    rows = database.execute(
        "SELECT id, rule, per, owner, tenant, period, max(window), cap, spent, held FROM budgets "
        "WHERE id = ifnull(?, id) GROUP BY id ORDER BY id",
        (account,),
    )
    return [State(Account(*row[:6]), row[6], row[7], row[8], row[9], tuple(increases.get(row[0], ()))) for row in rows]
