"""The store in a database that speaks SQL: SQLite or PostgreSQL."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from attrs import define, field

from qlens import AuditEntry, Event
from qlens_plugins.auth.key_store import audit, untold
from qlens_plugins.auth.key_store.database import CommitLost, Database, Line, Place
from qlens_plugins.auth.key_store.records import Key, Tenant
from qlens_plugins.auth.key_store.rows import KEYS, TENANTS, last_change
from qlens_plugins.auth.key_store.store import AuditQuery, Changes, Listed, Page, StoreAway

FORGET_SECONDS = 30 * 86_400
"""How long after its end a key is still told that it was revoked; later it is unknown."""
TELL_SECONDS = 1.0
"""How long the event loop may take to begin with what it is to publish: others wait meanwhile to change something."""


@define(eq=False)
class SqlStore:
    """Implements `Store`."""

    new_place: Callable[[bool], Place]
    """A place in the database, for one thread, which may or may not make the file."""
    pepper: str
    """Tells the pepper that the keys are hashed with from others."""
    # However many lists somebody asks for, keys can be revoked meanwhile, and gateways hear of it in time.
    _following: Line = field(init=False)
    _desk: Line = field(init=False)
    _lists: Line = field(init=False)
    _followed: Database | None = field(default=None, init=False)
    """The connection that the last changes were read on."""

    def __attrs_post_init__(self) -> None:
        self._following = Line(self.new_place(True), self.pepper, "qlens-key-store")
        self._desk = Line(self.new_place(False), self.pepper, "qlens-key-desk")
        self._lists = Line(self.new_place(False), self.pepper, "qlens-key-lists")

    async def open(self) -> None:
        """Connect, with the tables made or upgraded; raises StartupError for what an operator must mend."""
        await self._following.open()

    async def close(self) -> None:
        """Let go of the database, after what was asked before."""
        for line in (self._following, self._desk, self._lists):
            await line.close()

    # --- what the gateways follow --------------------------------------------------------------

    async def changes(self, since: int | None) -> Changes:
        """Implements `Store`."""

        def work(database: Database) -> Changes:
            # Another connection may be to another database, in which the same numbers mean other changes.
            known = since if database is self._followed else None
            self._followed = database
            upto, oldest = untold.state(database)
            if known is not None and known == upto:
                return Changes(known, untold=oldest)
            with database.moment():
                upto = last_change(database)
                if known is None or known > upto:
                    recent = int(time.time()) - FORGET_SECONDS
                    keys = KEYS.all(database, "coalesce(revoked_at, ?) >= ?", recent, recent)
                    return Changes(upto, keys, TENANTS.all(database, "true"), whole=True, untold=oldest)
                after = "WHERE change > ?"
                keys, tenants = KEYS.find(database, after, known), TENANTS.find(database, after, known)
                return Changes(upto, keys, tenants, untold=oldest)

        return await self._following.ask(work)

    # --- keys ----------------------------------------------------------------------------------

    async def key(self, id_: str, tenant: str | None) -> Key | None:
        """Implements `Store`."""
        within, values = _within(tenant)
        found = await self._desk.ask(lambda database: KEYS.find(database, f"WHERE id = ?{within}", id_, *values))
        return found[0] if found else None

    async def keys(self, page: Page, tenant: str | None) -> Listed | None:
        """Implements `Store`."""
        within, values = _within(tenant)

        def work(database: Database) -> Listed | None:
            start = 2**62
            if page.after is not None:
                # Within what may be seen: a key of another tenant is as unknown as one that is not there.
                found = database.rows(f"SELECT n FROM keys WHERE id = ?{within}", page.after, *values)  # noqa: S608
                if not found:
                    return None
                start = found[0][0]
            where = f"WHERE n < ?{within} ORDER BY n DESC LIMIT ?"
            rows = KEYS.find(database, where, start, *values, page.limit + 1)
            return Listed(rows[: page.limit], len(rows) > page.limit)

        return await self._lists.ask(work)

    async def add_key(self, key: Key, entry: AuditEntry, event: Event, own_seconds: float = 0.0) -> None:
        """Implements `Store`."""
        if not await self.put_key(key, entry, event, own_seconds):
            raise StoreAway(f"there is a key {key.id} already")

    async def put_key(self, key: Key, entry: AuditEntry, event: Event, own_seconds: float = 0.0) -> bool:
        """Implements `Store`."""

        def change(database: Database) -> bool:
            if not KEYS.put(database, key):
                return False
            untold.append(database, event, own_seconds)
            return True

        return await self._changed(change, entry)

    async def forget(self, events: Sequence[Event]) -> None:
        """Implements `Store`."""
        await self._desk.ask(lambda database: untold.forget(database, events))

    async def tell(self, publish: Callable[[Sequence[Event]], None], before: int) -> bool:
        """Implements `Store`."""
        loop = asyncio.get_running_loop()

        def work(database: Database) -> bool:
            with database.transaction():
                events = untold.take(database, before)
                if events:
                    _on_loop(loop, lambda: publish(events))
            return bool(events)

        return await self._desk.ask(work)

    async def live_keys(self, tenant: str, now: float) -> int:
        """Implements `Store`."""
        where = "SELECT count(*) FROM keys WHERE tenant = ? AND revoked_at IS NULL AND coalesce(expires_at, ?) > ?"
        found = await self._desk.ask(lambda database: database.rows(where, tenant, int(now) + 1, int(now)))
        return int(found[0][0])

    # --- tenants -------------------------------------------------------------------------------

    async def tenant(self, name: str) -> Tenant | None:
        """Implements `Store`."""
        found = await self._desk.ask(lambda database: TENANTS.find(database, "WHERE name = ?", name))
        return found[0] if found else None

    async def tenants(self, page: Page, tenant: str | None) -> Listed:
        """Implements `Store`."""
        where = "WHERE name > ? AND name = coalesce(?, name) AND deleted_at IS NULL ORDER BY name LIMIT ?"
        values = page.after or "", tenant, page.limit + 1
        rows = await self._lists.ask(lambda database: TENANTS.find(database, where, *values))
        return Listed(rows[: page.limit], len(rows) > page.limit)

    async def put_tenant(self, tenant: Tenant, entry: AuditEntry) -> bool:
        """Implements `Store`."""
        return await self._changed(lambda database: TENANTS.put(database, tenant), entry)

    # --- the audit log -------------------------------------------------------------------------

    async def keep(self, entry: AuditEntry) -> None:
        """Implements `Store`."""
        await self._changed(lambda _: True, entry)

    async def entries(self, page: Page, query: AuditQuery) -> Listed | None:
        """Implements `Store`."""
        return await self._lists.ask(lambda database: audit.entries(database, page, query))

    async def chain(self) -> tuple[int, str | None, str]:
        """Implements `Store`."""
        return await self._lists.ask(audit.chain)

    # --- changes -------------------------------------------------------------------------------

    async def _changed(self, change: Callable[[Database], bool], entry: AuditEntry) -> bool:
        """Make a change with its entry, once, or none of it; what the change says of itself."""

        def work(database: Database) -> bool:
            with database.transaction():
                if audit.is_kept(database, entry):
                    return True  # and so its change is made
                if not change(database):
                    return False
                audit.append(database, entry)
            return True

        try:
            return await self._desk.ask(work)
        except CommitLost:
            # The transaction of the lost connection is over before this one begins, and then one sees.
            return await self._desk.ask(work)


def _on_loop(loop: asyncio.AbstractEventLoop, work: Callable[[], None]) -> None:
    """Do something on an event loop, and wait for that on this thread; raises StoreAway when it has not begun in time.

    Then it is not done any more.
    """
    done: Future[None] = Future()

    def run() -> None:
        if done.set_running_or_notify_cancel():
            try:
                work()
            except BaseException as error:  # noqa: BLE001 - whatever it is, a thread waits for it
                done.set_exception(error)
            else:
                done.set_result(None)

    loop.call_soon_threadsafe(run)
    try:
        done.result(TELL_SECONDS)
    except TimeoutError:
        if done.cancel():
            raise StoreAway("the gateway is too busy to publish anything") from None
        done.result()


def _within(tenant: str | None) -> tuple[str, tuple[str, ...]]:
    """The condition that a row is of a tenant, if one is said."""
    return ("", ()) if tenant is None else (" AND tenant = ?", (tenant,))
