"""How rows of roll-ups get into an SQLite ledger, those of receipts that another one has deleted among them."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from typing import Any

from qlens_plugins.cost.ledger.rollups import COUNTS, GROUPED, HALF, SUMS, TABLES
from qlens_plugins.cost.ledger.store import Rest

_HALVES = [f"{name}_{half}" for name in SUMS for half in ("high", "low")]
_COLUMNS = ("start", "group_id", *COUNTS, *_HALVES)
# Only names from the code are put into these statements. What is by fewer dimensions, triggers add.
_ADD_GROUP = (
    f"INSERT INTO usage_groups ({', '.join(GROUPED)}) VALUES ({', '.join('?' * len(GROUPED))}) "  # noqa: S608
    "ON CONFLICT DO NOTHING"
)
_GROUP = f"SELECT id FROM usage_groups WHERE {' AND '.join(f'{name} = ?' for name in GROUPED)}"  # noqa: S608
_ADD_LATENCY = (
    "INSERT INTO usage_latencies (start, group_id, latency, calls) VALUES (?, ?, ?, ?) "
    "ON CONFLICT (start, group_id, latency) DO UPDATE SET calls = calls + excluded.calls"
)


def _changes() -> str:
    """What adds a row to the one that is there, in SQL."""
    found = [f"{name} = {name} + excluded.{name}" for name in COUNTS]
    for name in SUMS:
        both = f"({name}_low + excluded.{name}_low)"
        found.append(f"{name}_high = {name}_high + excluded.{name}_high + {both} / {HALF}")
        found.append(f"{name}_low = {both} % {HALF}")
    return ", ".join(found)


def _add(table: str) -> str:
    return (
        f"INSERT INTO {table} ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))}) "  # noqa: S608
        f"ON CONFLICT (start, group_id) DO UPDATE SET {_changes()}"
    )


_ADD = {seconds: _add(table) for seconds, table in TABLES.items()}


def add_sums(database: sqlite3.Connection, seconds: int, rows: Iterable[Sequence[Any]]) -> None:
    """Add to the hours or the days: each row has its start, its group, COUNTS, and both halves of SUMS."""
    database.executemany(_ADD[seconds], rows)


def add(database: sqlite3.Connection, rests: Sequence[Rest]) -> None:
    """Add them to the roll-ups; within the transaction that writes a batch."""
    for rest in rests:
        database.execute(_ADD_GROUP, rest.group)
        (group_id,) = database.execute(_GROUP, rest.group).fetchone()
        counts = [rest.sums.get(name, 0) for name in COUNTS]
        halves = [half for name in SUMS for half in divmod(rest.sums.get(name, 0), HALF)]
        add_sums(database, rest.seconds, [(rest.start, group_id, *counts, *halves)])
        latencies = [(rest.start, group_id, number, calls) for number, calls in rest.latencies.items()]
        database.executemany(_ADD_LATENCY, latencies)
