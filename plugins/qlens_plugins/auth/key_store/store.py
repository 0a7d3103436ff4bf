"""What the plugin asks of a database: one small contract, which SQLite and PostgreSQL keep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from attrs import frozen

from qlens import AuditEntry, Event
from qlens_plugins.auth.key_store.records import Key, Tenant


class StoreAway(Exception):
    """The database cannot be asked at present, or did not do what it was asked."""


@frozen
class Changes:
    """What became of keys and tenants since a change."""

    upto: int
    """The number of the last change."""
    keys: Sequence[Key] = ()
    tenants: Sequence[Tenant] = ()
    whole: bool = False
    """Whether this is all there is, instead of what is new."""
    untold: int | None = None
    """From when on the first event that waits to be told is anybody's, in Unix nanoseconds; None: none waits."""


@frozen
class Page:
    """Which part of a list is wanted: so many, after one of them."""

    limit: int
    after: str | None = None


@frozen
class AuditQuery:
    """Which entries of the audit log are wanted; None: any."""

    tenant: str | None = None
    actor: str | None = None
    action: str | None = None
    object: str | None = None
    since: int | None = None
    """Unix nanoseconds."""
    until: int | None = None


@frozen
class Listed:
    """A part of a list, and whether there is more behind it."""

    rows: Sequence[Any]
    more: bool


class Store(Protocol):
    """Keys, tenants and the audit log. Every method may raise StoreAway; a change is in force with its entry or not."""

    async def open(self) -> None:
        """Begin; raises StartupError for what an operator must mend."""

    async def close(self) -> None:
        """End."""

    async def changes(self, since: int | None) -> Changes:
        """What changed since a change; all there is for None, or when the number is not from here."""

    async def key(self, id_: str, tenant: str | None) -> Key | None:
        """A key, of one tenant if that is said."""

    async def keys(self, page: Page, tenant: str | None) -> Listed | None:
        """Keys, the newest first; None when there is no key to begin after."""

    async def add_key(self, key: Key, entry: AuditEntry, event: Event, own_seconds: float = 0.0) -> None:
        """Keep a new key, and the event of that: after some time it is anybody's to tell."""

    async def put_key(self, key: Key, entry: AuditEntry, event: Event, own_seconds: float = 0.0) -> bool:
        """Change a key, unless it is no longer what it was at `key.change`: False."""

    async def forget(self, events: Sequence[Event]) -> None:
        """Let go of events that are told."""

    async def tell(self, publish: Callable[[Sequence[Event]], None], before: int) -> bool:
        """Call `publish` with some of what was anybody's before a time, on the event loop; whether there was anything.

        They are forgotten when it returns, and are there again when anything is raised. Whoever else tells waits.
        """

    async def tenant(self, name: str) -> Tenant | None:
        """A tenant, also one that was deleted."""

    async def tenants(self, page: Page, tenant: str | None) -> Listed:
        """Tenants in the order of their names, or one alone."""

    async def put_tenant(self, tenant: Tenant, entry: AuditEntry) -> bool:
        """Keep a new tenant (`change` 0), or change one, unless it is no longer what it was at `change`: False."""

    async def live_keys(self, tenant: str, now: float) -> int:
        """How many keys of a tenant work."""

    async def keep(self, entry: AuditEntry) -> None:
        """Keep an entry of the audit log."""

    async def entries(self, page: Page, query: AuditQuery) -> Listed | None:
        """Entries as JSON text, the newest first; None when there is none to begin after."""

    async def chain(self) -> tuple[int, str | None, str]:
        """How many entries there are, the id of the first that is not as it was written, and the last hash."""
