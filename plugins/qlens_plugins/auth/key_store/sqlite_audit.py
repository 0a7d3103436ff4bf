"""The audit log in SQLite: rows that are only ever added, each sealed with the hash of all before it."""

from __future__ import annotations

import hashlib
import json
import sqlite3

from qlens import AuditEntry
from qlens_plugins.auth.key_store.bodies import nanoseconds
from qlens_plugins.auth.key_store.store import AuditQuery, Listed, Page

_FIRST = b""


def append(database: sqlite3.Connection, entry: AuditEntry) -> None:
    """Add an entry, within the transaction that is open; one that is there already is left alone."""
    if database.execute("SELECT 1 FROM audit WHERE id = ?", (entry.id,)).fetchone():
        return
    text = json.dumps(entry.row())
    last = database.execute("SELECT hash FROM audit ORDER BY n DESC LIMIT 1").fetchone()
    database.execute(
        "INSERT INTO audit (id, wall_ns, tenant, actor, action, object, entry, hash) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (
            *(entry.id, entry.wall_ns, entry.tenant, entry.actor.subject, entry.action, entry.object),
            *(text, _sealed(last[0] if last else _FIRST, text)),
        ),
    )


def entries(database: sqlite3.Connection, page: Page, query: AuditQuery) -> Listed | None:
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
        found = database.execute(
            "SELECT n FROM audit WHERE id = ? AND ifnull(tenant, '') = coalesce(?, tenant, '')",
            (page.after, query.tenant),
        ).fetchone()
        if found is None:
            return None
        conditions["n < ?"] = found[0]
    asked = {condition: value for condition, value in conditions.items() if value is not None}
    rows = database.execute(
        f"SELECT entry FROM audit WHERE {' AND '.join(asked) or '1'} ORDER BY n DESC LIMIT ?",  # noqa: S608 - own words
        (*asked.values(), page.limit + 1),
    ).fetchall()
    return Listed([row[0] for row in rows[: page.limit]], len(rows) > page.limit)


def chain(database: sqlite3.Connection) -> tuple[int, str | None, str]:
    """How many entries there are, the id of the first that is not as it was written, and the last hash."""
    last, count = _FIRST, 0
    for text, seal, *columns in database.execute(
        "SELECT entry, hash, id, wall_ns, tenant, actor, action, object FROM audit ORDER BY n"
    ):
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
