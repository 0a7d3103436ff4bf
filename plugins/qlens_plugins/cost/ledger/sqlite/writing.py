"""How a batch gets into an SQLite ledger: receipts once, roll-ups of those that were new, counts of refused calls."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from itertools import cycle

from qlens_plugins.cost.ledger.rollups import COUNTS, DAY, GROUPED, HALF, HOUR, LATENCY, SUMS, of_none, terms
from qlens_plugins.cost.ledger.rows import AT_ONCE, COLUMNS, LARGEST, OPTIONAL, Rejection, Row, Value
from qlens_plugins.cost.ledger.sqlite import rests
from qlens_plugins.cost.ledger.store import Batch

FORGOTTEN_AT_ONCE = 2000
"""Receipts that are deleted in one transaction."""

# Not INSERT OR IGNORE: that would also swallow a row for a missing value.
_INSERT = f"INSERT INTO receipts ({', '.join(COLUMNS)}) VALUES "  # noqa: S608 - only names from above
_ROW = f"({', '.join('?' * len(COLUMNS))})"
_ONCE = " ON CONFLICT (id) DO NOTHING"
_COUNT = (
    "INSERT INTO rejections (day, tenant, operation, model, status, error, calls) VALUES (?, ?, ?, ?, ?, ?, ?) "
    "ON CONFLICT (day, tenant, operation, model, status, error) DO UPDATE SET calls = calls + excluded.calls"
)
_DONE = "INSERT INTO writers (id, batch) VALUES (?, ?) ON CONFLICT (id) DO UPDATE SET batch = excluded.batch"
_UNFIT = (OverflowError, UnicodeError, sqlite3.IntegrityError, sqlite3.InterfaceError, sqlite3.ProgrammingError)
"""What SQLite's module raises for a value that the database cannot hold."""


def write(database: sqlite3.Connection, writer: str, batch: Batch) -> None:
    """Write a batch; within a transaction."""
    # A commit may report a failure and yet have happened. The number, written in the same transaction, tells.
    done = database.execute("SELECT batch FROM writers WHERE id = ?", (writer,)).fetchone()
    if done is not None and done[0] >= batch.number:
        return
    last = last_row(database)
    insert(database, batch.receipts, batch.rejections)
    roll_up(database, last)
    rests.add(database, batch.rests)
    if batch.kept_since_ns:
        keep_since(database, batch.kept_since_ns)
    database.execute(_DONE, (writer, batch.number))


def insert(database: sqlite3.Connection, rows: Sequence[Row], rejections: Mapping[Rejection, int]) -> None:
    """Write receipts, each once however often it is given, and add to the counts of refused calls."""
    for start in range(0, len(rows), AT_ONCE):
        _insert(database, rows[start : start + AT_ONCE])
    database.executemany(_COUNT, ((*(_fit("", value) for value in key), calls) for key, calls in rejections.items()))


def _insert(database: sqlite3.Connection, rows: Sequence[Row]) -> None:
    statement = f"{_INSERT}{', '.join([_ROW] * len(rows))}{_ONCE}"
    values: list[Value] = []
    for row in rows:
        values += row
    try:
        database.execute(statement, values)
    except _UNFIT:
        # Rare, so it is looked for only now; the statement has written nothing. No value can spoil a batch.
        database.execute(statement, list(map(_fit, cycle(COLUMNS), values)))


def _fit(column: str, value: object) -> Value:
    """A value as SQLite can hold it."""
    if value is None:
        return None if column in OPTIONAL else ""
    if isinstance(value, int):
        return max(-LARGEST, min(int(value), LARGEST))
    # A lone surrogate, which JSON can carry, is no text for SQLite.
    return str(value).encode("utf-8", "replace").decode()


def keep_since(database: sqlite3.Connection, since_ns: int) -> None:
    """Note that receipts from before a time may be gone."""
    database.execute("UPDATE receipts_kept SET since_ns = max(since_ns, ?)", (since_ns,))


def forget(database: sqlite3.Connection, before_ns: int) -> bool:
    """Delete some receipts from before a time; whether there may be more."""
    keep_since(database, before_ns)
    found = database.execute(
        "DELETE FROM receipts WHERE rowid IN (SELECT rowid FROM receipts WHERE wall_ns < ? ORDER BY wall_ns LIMIT ?)",
        (before_ns, FORGOTTEN_AT_ONCE),
    )
    return found.rowcount == FORGOTTEN_AT_ONCE


# --- roll-ups ----------------------------------------------------------------------------------


def meter(name: str) -> str:
    """How much a receipt's meter says, in SQL."""
    return f"CASE meters WHEN '{{}}' THEN 0 ELSE CAST(coalesce(json_extract(meters, '$.{name}'), 0) AS INTEGER) END"


_NEW = "receipts.rowid > ?"
_DIMENSIONS = [of_none(name) for name in GROUPED]
# CROSS: from the new receipts to their groups, never the other way round.
_GROUPED = "FROM receipts CROSS JOIN usage_groups ON " + " AND ".join(
    f"usage_groups.{name} = {of_none(name, 'receipts.')}" for name in GROUPED
)
# Only names from above are put into these statements.
_ADD_GROUPS = (
    f"INSERT INTO usage_groups ({', '.join(GROUPED)}) SELECT DISTINCT {', '.join(_DIMENSIONS)} "  # noqa: S608
    f"FROM receipts WHERE {_NEW} ON CONFLICT DO NOTHING"
)


def _started(seconds: int) -> str:
    return f"wall_ns / {seconds * 10**9} * {seconds}"


def _sums() -> str:
    found, amounts = [f"sum({condition})" for condition in COUNTS.values()], terms(meter)
    for name in SUMS:
        low = f"sum(({amounts[name]}) % {HALF})"
        found += [f"sum(({amounts[name]}) / {HALF}) + {low} / {HALF}", f"{low} % {HALF}"]
    return ", ".join(found)


_SUMS = f"SELECT {_started(HOUR)}, usage_groups.id, {_sums()} {_GROUPED} WHERE {_NEW} GROUP BY 1, 2"
_ADD_LATENCIES = (
    f"INSERT INTO usage_latencies (start, group_id, latency, calls) SELECT {_started(DAY)}, usage_groups.id, "
    f"{LATENCY}, count(*) {_GROUPED} WHERE {_NEW} GROUP BY 1, 2, 3 "
    "ON CONFLICT (start, group_id, latency) DO UPDATE SET calls = calls + excluded.calls"
)
_SUMS_AT_ONCE = 1000


def last_row(database: sqlite3.Connection) -> int:
    """The last row of the receipts; those that are inserted after it get higher numbers."""
    found: int | None = database.execute("SELECT max(rowid) FROM receipts").fetchone()[0]
    return found or 0


def roll_up(database: sqlite3.Connection, before: int) -> None:
    """Add the receipts that were inserted after a row: of those that are already there, nothing is counted again.

    Belongs in the transaction that inserts them. Receipts that a gateway of an older version, which knows no roll-ups,
    has meanwhile written to the file are added too.
    """
    (rolled,) = database.execute("SELECT receipt FROM usage_rolled").fetchone()
    # Lower than what was rolled up when receipts were deleted from the end: their numbers are given again.
    after = min(rolled, before)
    last = last_row(database)
    if last > after:
        database.execute(_ADD_GROUPS, (after,))
        _add_sums(database, after)
        database.execute(_ADD_LATENCIES, (after,))
    if last != rolled:
        database.execute("UPDATE usage_rolled SET receipt = ?", (last,))


def _add_sums(database: sqlite3.Connection, after: int) -> None:
    """Add what comes after a row to hours and days. Summed up once, for that takes as long as all the rest of it."""
    found = database.execute(_SUMS, (after,))
    while hours := found.fetchmany(_SUMS_AT_ONCE):
        rests.add_sums(database, HOUR, hours)
        rests.add_sums(database, DAY, [(start // DAY * DAY, *sums) for start, *sums in hours])
