"""Calls that are not in an SQLite ledger, because the process that was to write them died: they are in its spool."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from qlens import Spool
from qlens_plugins.cost.ledger.source import Source

AT_ONCE = 500
"""Calls that are looked for with one question."""


def spool_of(path: Path) -> Path:
    """Where a ledger's spool is that has not been told another place."""
    return path.with_name(f"{path.name}.spool")


def count(database: sqlite3.Connection, path: Path) -> int:
    """How many calls the spool beside a file has that are not in it; they stay where they are. Raises OSError."""
    return sum(_missing(database, spool) for spool in Spool.orphans(spool_of(path)))


def _missing(database: sqlite3.Connection, spool: Spool) -> int:
    source, missing = Source(spool, lambda _: None, is_former=True), 0
    try:
        while found := source.take(AT_ONCE):
            ids = {row[0] for row in found}
            marks = ", ".join("?" * len(ids))
            sql = f"SELECT count(*) FROM receipts WHERE id IN ({marks})"  # noqa: S608 - question marks
            ((known,),) = database.execute(sql, list(ids))
            missing += len(ids) - known
    finally:
        spool.close()
    return missing
