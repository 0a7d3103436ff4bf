"""The audit log: rows that are only ever added, each sealed with the hash of all before it."""

from __future__ import annotations

import hashlib
import json

from qlens import AuditEntry
from qlens_plugins.auth.key_store.bodies import nanoseconds
from qlens_plugins.auth.key_store.database import Database
from qlens_plugins.auth.key_store.store import AuditQuery, Listed, Page

AT_ONCE = 1000
"""How many entries are read in one go to check them."""
_FIRST = b""


def is_kept(database: Database, entry: AuditEntry) -> bool:
    """Whether an entry is there."""
    return bool(database.rows("SELECT 1 FROM audit WHERE id = ?", entry.id))


def append(database: Database, entry: AuditEntry) -> None:
    """Add an entry that is not there yet, within the transaction that is open."""
    text = json.dumps(entry.row())
    last = database.rows("SELECT hash FROM audit ORDER BY n DESC LIMIT 1")
    database.rows(
        "INSERT INTO audit (id, wall_ns, tenant, actor, action, object, entry, hash) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        *(entry.id, entry.wall_ns, entry.tenant, entry.actor.subject, entry.action, entry.object),
        *(text, _sealed(last[0][0] if last else _FIRST, text)),
    )


def entries(database: Database, page: Page, query: AuditQuery) -> Listed | None:
    """A part of the log that a query asks for, the newest first."""
    conditions: dict[str, str | int | None] = {
        "tenant = ?": query.tenant,
        "actor = ?": query.actor,
        "action = ?": query.action,
        "object = ?": query.object,
        "wall_ns >= ?": query.since,
        "wall_ns < ?": query.until,
    }
    if page.after is not None:
        # Within what may be seen: an entry of another tenant is as unknown as one that is not there.
        found = database.rows(
            "SELECT n FROM audit WHERE id = ? AND coalesce(tenant, '') = coalesce(?, tenant, '')",
            *(page.after, query.tenant),
        )
        if not found:
            return None
        conditions["n < ?"] = found[0][0]
    asked = {condition: value for condition, value in conditions.items() if value is not None}
    rows = database.rows(
        f"SELECT entry FROM audit WHERE {' AND '.join(asked) or 'true'} ORDER BY n DESC LIMIT ?",  # noqa: S608 - own words
        *(*asked.values(), page.limit + 1),
    )
    return Listed([row[0] for row in rows[: page.limit]], len(rows) > page.limit)


def chain(database: Database) -> tuple[int, str | None, str]:
    """How many entries there are, the id of the first that is not as it was written, and the last hash."""
    last, count, place = _FIRST, 0, -(2**62)
    while found := database.rows(
        "SELECT n, entry, hash, id, wall_ns, tenant, actor, action, object FROM audit WHERE n > ? ORDER BY n LIMIT ?",
        *(place, AT_ONCE),
    ):
        for place, text, seal, *columns in found:  # noqa: B007 - where the next part begins
            count += 1
            last = _sealed(last, text)
            if last != seal or not _told(text, *columns):
                return count, columns[0], last.hex()
    return count, None, last.hex()


def _told(text: str, id_: str, wall_ns: int, *columns: str | None) -> bool:
    """Whether the columns that entries are found by say what the entry says, which alone is sealed."""
    row = json.loads(text)
    said = (row["id"], row["tenant"], row["actor"]["subject"], row["action"], row["object"])
    return said == (id_, *columns) and nanoseconds(row["at"]) == wall_ns // 1000 * 1000


def _sealed(before: bytes, text: str) -> bytes:
    return hashlib.sha256(before + text.encode()).digest()
