"""The store in an SQLite file, which may be the ledger's."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from attrs import asdict, define, field, fields, frozen

from qlens import Allowance, AuditEntry, sqlite_transaction
from qlens_plugins.auth.key_store import sqlite_audit
from qlens_plugins.auth.key_store.records import Key, Tenant
from qlens_plugins.auth.key_store.sqlite_line import Database, Line
from qlens_plugins.auth.key_store.store import AuditQuery, Changes, Listed, Page, StoreAway

T = TypeVar("T")

FORGET_SECONDS = 30 * 86_400
"""How long after its end a key is still told that it was revoked; later it is unknown."""

_JSON = frozenset({"roles", "models", "tags", "limits", "metadata"})
"""The columns that hold JSON."""


@frozen
class _Table:
    """A table whose columns are the fields of a record."""

    name: str
    id: str
    columns: tuple[str, ...]

    def select(self, where: str) -> str:
        return f"SELECT {', '.join(self.columns)} FROM {self.name} {where}"  # noqa: S608 - own words

    def insert(self) -> str:
        marks = ", ".join("?" * len(self.columns))
        return f"INSERT INTO {self.name} ({', '.join(self.columns)}) VALUES ({marks})"  # noqa: S608

    def update(self) -> str:
        """Change a row, unless it is no longer what it was."""
        marks = ", ".join(f"{column} = ?" for column in self.columns)
        return f"UPDATE {self.name} SET {marks} WHERE {self.id} = ? AND change = ?"  # noqa: S608


_KEYS = _Table("keys", "id", tuple(attribute.name for attribute in fields(Key)))
_TENANTS = _Table("tenants", "name", tuple(attribute.name for attribute in fields(Tenant)))


class _Raced(Exception):
    """The row is no longer what it was."""


@define(eq=False)
class SqliteStore:
    """Implements `Store`. A file that is moved or deleted while it is open is away, and is not made anew."""

    path: Path
    pepper: str
    """Tells the pepper that the keys are hashed with from others."""
    # However many lists somebody asks for, keys can be revoked meanwhile, and gateways hear of it in time.
    _following: Line = field(init=False)
    _desk: Line = field(init=False)
    _lists: Line = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._following = Line(self.path, self.pepper, "qlens-key-store", makes=True)
        self._desk = Line(self.path, self.pepper, "qlens-key-desk", makes=False)
        self._lists = Line(self.path, self.pepper, "qlens-key-lists", makes=False)

    async def open(self) -> None:
        """Make or open the file; raises StartupError for what an operator must mend."""
        await self._following.open()

    async def close(self) -> None:
        """Let go of the file, after what was asked before."""
        for line in (self._following, self._desk, self._lists):
            await line.close()

    # --- what the gateways follow --------------------------------------------------------------

    async def changes(self, since: int | None) -> Changes:
        """Implements `Store`."""

        def work(database: Database) -> Changes:
            with _moment(database):
                upto = int(database.execute("SELECT change FROM key_state").fetchone()[0])
                if since == upto:
                    return Changes(upto)
                if since is None or since > upto:
                    recent = int(time.time()) - FORGET_SECONDS
                    keys = _keys(database, "WHERE ifnull(revoked_at, ?) >= ?", recent, recent)
                    return Changes(upto, keys, _tenants(database, ""), whole=True)
                after = "WHERE change > ?"
                return Changes(upto, _keys(database, after, since), _tenants(database, after, since))

        return await self._following.ask(work)

    # --- keys ----------------------------------------------------------------------------------

    async def key(self, id_: str, tenant: str | None) -> Key | None:
        """Implements `Store`."""
        within, values = _within(tenant)
        found = await self._ask(lambda database: _keys(database, f"WHERE id = ?{within}", id_, *values))
        return found[0] if found else None

    async def keys(self, page: Page, tenant: str | None) -> Listed | None:
        """Implements `Store`."""

        within, values = _within(tenant)

        def work(database: Database) -> Listed | None:
            start = 2**62
            if page.after is not None:
                # Within what may be seen: a key of another tenant is as unknown as one that is not there.
                place = f"SELECT n FROM keys WHERE id = ?{within}"  # noqa: S608 - own words
                found = database.execute(place, (page.after, *values)).fetchone()
                if found is None:
                    return None
                start = found[0]
            where = f"WHERE n < ?{within} ORDER BY n DESC LIMIT ?"
            rows = _keys(database, where, start, *values, page.limit + 1)
            return Listed(rows[: page.limit], len(rows) > page.limit)

        return await self._lists.ask(work)

    async def add_key(self, key: Key, entry: AuditEntry) -> None:
        """Implements `Store`."""
        await self._ask(lambda database: _add(database, _KEYS, key, entry))

    async def put_key(self, key: Key, entry: AuditEntry) -> bool:
        """Implements `Store`."""
        return await self._unless_raced(lambda database: _put(database, _KEYS, key, entry))

    async def live_keys(self, tenant: str, now: float) -> int:
        """Implements `Store`."""
        where = "SELECT count(*) FROM keys WHERE tenant = ? AND revoked_at IS NULL AND ifnull(expires_at, ?) > ?"
        count = await self._ask(lambda database: database.execute(where, (tenant, now + 1, now)).fetchone()[0])
        return int(count)

    # --- tenants -------------------------------------------------------------------------------

    async def tenant(self, name: str) -> Tenant | None:
        """Implements `Store`."""
        found = await self._ask(lambda database: _tenants(database, "WHERE name = ?", name))
        return found[0] if found else None

    async def tenants(self, page: Page, tenant: str | None) -> Listed:
        """Implements `Store`."""
        where = "WHERE name > ? AND name = ifnull(?, name) AND deleted_at IS NULL ORDER BY name LIMIT ?"
        rows = await self._lists.ask(lambda d: _tenants(d, where, page.after or "", tenant, page.limit + 1))
        return Listed(rows[: page.limit], len(rows) > page.limit)

    async def put_tenant(self, tenant: Tenant, entry: AuditEntry) -> bool:
        """Implements `Store`."""
        if tenant.change:
            return await self._unless_raced(lambda database: _put(database, _TENANTS, tenant, entry))
        try:
            await self._ask(lambda database: _add(database, _TENANTS, tenant, entry))
        except StoreAway as away:
            if isinstance(away.__cause__, sqlite3.IntegrityError):  # somebody was faster
                return False
            raise
        return True

    # --- the audit log -------------------------------------------------------------------------

    async def keep(self, entry: AuditEntry) -> None:
        """Implements `Store`."""

        def work(database: Database) -> None:
            with sqlite_transaction(database):
                sqlite_audit.append(database, entry)

        await self._ask(work)

    async def entries(self, page: Page, query: AuditQuery) -> Listed | None:
        """Implements `Store`."""
        return await self._lists.ask(lambda database: sqlite_audit.entries(database, page, query))

    async def chain(self) -> tuple[int, str | None, str]:
        """Implements `Store`."""
        return await self._lists.ask(sqlite_audit.chain)

    async def _ask(self, work: Callable[[Database], T]) -> T:
        return await self._desk.ask(work)

    async def _unless_raced(self, work: Callable[[Database], object]) -> bool:
        try:
            await self._ask(work)
        except _Raced:
            return False
        return True


# --- statements --------------------------------------------------------------------------------


def _within(tenant: str | None) -> tuple[str, tuple[str, ...]]:
    """The condition that a row is of a tenant, if one is said."""
    return ("", ()) if tenant is None else (" AND tenant = ?", (tenant,))


@contextmanager
def _moment(database: Database) -> Iterator[None]:
    """Read several things as they are at one moment."""
    database.execute("BEGIN")
    try:
        yield
    finally:
        if database.in_transaction:
            database.execute("ROLLBACK")


def _add(database: Database, table: _Table, row: Key | Tenant, entry: AuditEntry) -> None:
    with sqlite_transaction(database):
        database.execute(table.insert(), _values(row, table.columns, _next(database)))
        sqlite_audit.append(database, entry)


def _put(database: Database, table: _Table, row: Key | Tenant, entry: AuditEntry) -> None:
    with sqlite_transaction(database):
        values = _values(row, table.columns, _next(database))
        done = database.execute(table.update(), (*values, getattr(row, table.id), row.change))
        if done.rowcount != 1:
            raise _Raced
        sqlite_audit.append(database, entry)


def _next(database: Database) -> int:
    """The number of the change that is being made."""
    database.execute("UPDATE key_state SET change = change + 1")
    return int(database.execute("SELECT change FROM key_state").fetchone()[0])


def _values(row: Key | Tenant, columns: tuple[str, ...], change: int) -> list[Any]:
    return [change if name == "change" else _column(name, getattr(row, name)) for name in columns]


def _column(name: str, value: Any) -> Any:
    if name not in _JSON or value is None:
        return value
    return json.dumps(asdict(value) if isinstance(value, Allowance) else value, default=dict)


def _keys(database: Database, where: str, *values: object) -> list[Key]:
    return [Key(**_read(_KEYS.columns, row)) for row in database.execute(_KEYS.select(where), values)]


def _tenants(database: Database, where: str, *values: object) -> list[Tenant]:
    return [Tenant(**_read(_TENANTS.columns, row)) for row in database.execute(_TENANTS.select(where), values)]


def _read(columns: tuple[str, ...], row: tuple[Any, ...]) -> dict[str, Any]:
    return {
        name: _parsed(name, value) if name in _JSON and value is not None else value
        for name, value in zip(columns, row, strict=True)
    }


@lru_cache(maxsize=4096)
def _parsed(name: str, text: str) -> Any:
    """What a column of JSON says. Most rows say the same as another one, and then share it."""
    value = json.loads(text)
    if name in {"roles", "models"}:
        return tuple(value)
    return Allowance(**value) if name == "limits" else value
