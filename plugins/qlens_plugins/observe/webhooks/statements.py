"""The table of deliveries, and what is done in it."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

import orjson

from qlens import Event, sqlite_transaction
from qlens_plugins.observe.webhooks.records import Count, Delivery, Ended, Lost
from qlens_plugins.observe.webhooks.schedule import LATEST_SECONDS

OWNER = "webhooks"
MIGRATIONS = (
    (
        """
        CREATE TABLE webhook_deliveries (
            endpoint TEXT NOT NULL, event TEXT NOT NULL, type TEXT NOT NULL, tenant TEXT, body BLOB NOT NULL,
            since REAL NOT NULL, due REAL NOT NULL, dead INTEGER NOT NULL DEFAULT 0,
            attempts INTEGER NOT NULL DEFAULT 0, problem TEXT, PRIMARY KEY (endpoint, event)
        )
        """,
        "CREATE INDEX webhook_deliveries_by_due ON webhook_deliveries (endpoint, dead, due, since)",
    ),
)
"""A released version is never edited: a change is a new entry at the end."""
OLDEST = 1
"""The oldest version whose QLens may go on writing: what came after it must not disturb it."""

Database = sqlite3.Connection

_COLUMNS = "endpoint, event, type, tenant, body, since, attempts, due, problem"


def record(event: Event, endpoints: Sequence[str], now: float, body: bytes) -> bytes:
    """An event as it stands in the spool."""
    return orjson.dumps([event.id, event.type, event.tenant, endpoints, now]) + b"\n" + body


def take_in(database: Database, records: Sequence[bytes], most: int, lost: Lost) -> None:
    """Make deliveries of what was in a spool; one that is there already stays as it is."""
    rooms: dict[str, int] = {}
    for each in records:
        head, _, body = each.partition(b"\n")
        event, type_, tenant, endpoints, now = orjson.loads(head)
        for endpoint in endpoints:
            if endpoint not in rooms:
                rooms[endpoint] = most - _waiting(database, endpoint)
            if rooms[endpoint] <= 0:
                lost[endpoint, "queue_full"] += 1
                continue
            rooms[endpoint] -= database.execute(
                "INSERT OR IGNORE INTO webhook_deliveries (endpoint, event, type, tenant, body, since, due) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                (endpoint, event, type_, tenant, body, now, now),
            ).rowcount


def note(database: Database, ended: Ended) -> None:
    """Write down how a delivery has ended, unless somebody has taken it out meanwhile."""
    which = (ended.delivery.endpoint, ended.delivery.event)
    if ended.state == "delivered":
        database.execute("DELETE FROM webhook_deliveries WHERE endpoint = ? AND event = ?", which)
    elif ended.state == "untried":
        database.execute("UPDATE webhook_deliveries SET due = ? WHERE endpoint = ? AND event = ?", (ended.due, *which))
    else:
        database.execute(
            "UPDATE webhook_deliveries SET due = ?, dead = ?, attempts = attempts + 1, problem = ? "
            "WHERE endpoint = ? AND event = ?",
            (ended.due, ended.state == "dead", ended.problem, *which),
        )


def bury(database: Database, endpoint: str, most: int) -> int:
    """Delete the oldest dead deliveries to an endpoint beyond so many; how many that were."""
    return database.execute(
        "DELETE FROM webhook_deliveries WHERE rowid IN (SELECT rowid FROM webhook_deliveries "
        "WHERE endpoint = ? AND dead = 1 ORDER BY due DESC LIMIT -1 OFFSET ?)",
        (endpoint, most),
    ).rowcount


def claim(database: Database, endpoint: str, most: int, now: float, lease_seconds: float) -> list[Delivery]:
    """Take what is due; it is due again when the lease is over, should nobody note an end before."""
    # What is further away than any try may be was planned by a clock that has gone back since.
    database.execute(
        "UPDATE webhook_deliveries SET due = ? WHERE endpoint = ? AND dead = 0 AND due > ?",
        (now, endpoint, now + LATEST_SECONDS + lease_seconds),
    )
    found = _deliveries(database, "endpoint = ? AND dead = 0 AND due <= ? ORDER BY due LIMIT ?", endpoint, now, most)
    database.executemany(
        "UPDATE webhook_deliveries SET due = ? WHERE endpoint = ? AND event = ?",
        [(now + lease_seconds, each.endpoint, each.event) for each in found],
    )
    return found


def next_due(database: Database, endpoint: str) -> float | None:
    """When the next delivery to an endpoint is due."""
    found = database.execute(
        "SELECT min(due) FROM webhook_deliveries WHERE endpoint = ? AND dead = 0", (endpoint,)
    ).fetchone()
    return None if found[0] is None else float(found[0])


def counts(database: Database) -> dict[str, Count]:
    """What lies in the file, by endpoint."""
    waiting: dict[str, tuple[int, float]] = {}
    dead: dict[str, int] = {}
    rows = database.execute(
        "SELECT endpoint, dead, count(*), min(since) FROM webhook_deliveries GROUP BY endpoint, dead"
    )
    for endpoint, is_dead, number, since in rows:
        if is_dead:
            dead[endpoint] = number
        else:
            waiting[endpoint] = number, since
    found = {}
    for name in sorted(waiting.keys() | dead.keys()):
        number, oldest = waiting.get(name, (0, None))
        found[name] = Count(number, oldest, dead.get(name, 0))
    return found


def dead(database: Database, endpoint: str | None = None) -> list[Delivery]:
    """The dead deliveries, the oldest first."""
    return _deliveries(database, "dead = 1 AND endpoint = ifnull(?, endpoint) ORDER BY due", endpoint)


def revive(database: Database, endpoint: str, events: Sequence[str], now: float) -> int:
    """Try dead deliveries again, as if they were new; how many were there."""
    update = "UPDATE webhook_deliveries SET dead = 0, attempts = 0, since = ?, due = ? WHERE endpoint = ? AND event = ?"
    with sqlite_transaction(database):
        rows = [(now, now, endpoint, event) for event in events]
        return database.executemany(f"{update} AND dead = 1", rows).rowcount


def drop(database: Database, endpoint: str, events: Sequence[str]) -> int:
    """Delete dead deliveries; how many were there."""
    with sqlite_transaction(database):
        return database.executemany(
            "DELETE FROM webhook_deliveries WHERE endpoint = ? AND event = ? AND dead = 1",
            [(endpoint, event) for event in events],
        ).rowcount


def _waiting(database: Database, endpoint: str) -> int:
    found = database.execute(
        "SELECT count(*) FROM webhook_deliveries WHERE endpoint = ? AND dead = 0", (endpoint,)
    ).fetchone()
    return int(found[0])


def _deliveries(database: Database, where: str, *values: object) -> list[Delivery]:
    rows = database.execute(f"SELECT {_COLUMNS} FROM webhook_deliveries WHERE {where}", values)  # noqa: S608
    return [Delivery(*row) for row in rows]
