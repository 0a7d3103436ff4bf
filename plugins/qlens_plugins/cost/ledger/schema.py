"""The ledger's SQLite database: its tables, its versions, and how to open it."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from urllib.parse import quote

from qlens import StartupError
from qlens_plugins.cost.ledger import rollups

APPLICATION = 0x514C6E73
"""Marks a database as a QLens ledger, so that no other program's tables are ever touched."""
BUSY_SECONDS = 1.0
"""How long SQLite itself waits for another writer, before the ledger's own retries."""

# A sum that may not fit into 64 bits is two columns; `start` is in Unix seconds.
_SUMS_3 = """
    start INTEGER NOT NULL,
    group_id INTEGER NOT NULL,
    calls INTEGER NOT NULL,
    failed INTEGER NOT NULL,
    abandoned INTEGER NOT NULL,
    blocked INTEGER NOT NULL,
    cached INTEGER NOT NULL,
    estimated INTEGER NOT NULL,
    unpriced INTEGER NOT NULL,
    input_high INTEGER NOT NULL,
    input_low INTEGER NOT NULL,
    cached_input_high INTEGER NOT NULL,
    cached_input_low INTEGER NOT NULL,
    cache_write_5m_high INTEGER NOT NULL,
    cache_write_5m_low INTEGER NOT NULL,
    cache_write_1h_high INTEGER NOT NULL,
    cache_write_1h_low INTEGER NOT NULL,
    output_high INTEGER NOT NULL,
    output_low INTEGER NOT NULL,
    reasoning_high INTEGER NOT NULL,
    reasoning_low INTEGER NOT NULL,
    audio_in_high INTEGER NOT NULL,
    audio_in_low INTEGER NOT NULL,
    audio_out_high INTEGER NOT NULL,
    audio_out_low INTEGER NOT NULL,
    images_high INTEGER NOT NULL,
    images_low INTEGER NOT NULL,
    seconds_high INTEGER NOT NULL,
    seconds_low INTEGER NOT NULL,
    characters_high INTEGER NOT NULL,
    characters_low INTEGER NOT NULL,
    cost_high INTEGER NOT NULL,
    cost_low INTEGER NOT NULL,
    saved_high INTEGER NOT NULL,
    saved_low INTEGER NOT NULL,
    PRIMARY KEY (start, group_id)
"""
MIGRATIONS = (
    """
    CREATE TABLE receipts (
        id TEXT PRIMARY KEY,
        wall_ns INTEGER NOT NULL,
        day TEXT NOT NULL,
        tenant TEXT NOT NULL,
        project TEXT,
        key_id TEXT,
        subject TEXT NOT NULL,
        operation TEXT NOT NULL,
        model TEXT,
        provider TEXT,
        upstream_model TEXT,
        outcome TEXT NOT NULL,
        status INTEGER NOT NULL,
        error TEXT,
        streamed INTEGER NOT NULL,
        cache TEXT NOT NULL,
        input INTEGER NOT NULL,
        cached_input INTEGER NOT NULL,
        cache_write_5m INTEGER NOT NULL,
        cache_write_1h INTEGER NOT NULL,
        output INTEGER NOT NULL,
        reasoning INTEGER NOT NULL,
        audio_in INTEGER NOT NULL,
        audio_out INTEGER NOT NULL,
        meters TEXT NOT NULL,
        usage_source TEXT NOT NULL,
        tier TEXT,
        cost_picos INTEGER,
        cost_state TEXT NOT NULL,
        price_id TEXT,
        saved_picos INTEGER NOT NULL,
        ttft_us INTEGER,
        total_us INTEGER NOT NULL,
        overhead_us INTEGER NOT NULL,
        bytes_out INTEGER NOT NULL,
        config_version TEXT NOT NULL,
        tags TEXT NOT NULL,
        attempts TEXT NOT NULL
    );
    CREATE INDEX receipts_by_day ON receipts (day, tenant, model);
    CREATE INDEX receipts_by_tenant ON receipts (tenant, day);
    CREATE TABLE rejections (
        day TEXT NOT NULL,
        tenant TEXT NOT NULL,
        operation TEXT NOT NULL,
        model TEXT NOT NULL,
        status INTEGER NOT NULL,
        error TEXT NOT NULL,
        calls INTEGER NOT NULL,
        PRIMARY KEY (day, tenant, operation, model, status, error)
    ) WITHOUT ROWID;
    CREATE TABLE writers (
        id TEXT PRIMARY KEY,
        batch INTEGER NOT NULL
    ) WITHOUT ROWID;
    """,
    # By day alone, which grows at its end. Indexes that begin or go on with the tenant are written to all over: the two
    # took as long as all the rest of a row.
    """
    DROP INDEX receipts_by_day;
    DROP INDEX receipts_by_tenant;
    CREATE INDEX receipts_by_day ON receipts (day);
    """,
    # By time, which also grows at its end and serves days as well.
    f"""
    DROP INDEX receipts_by_day;
    CREATE INDEX receipts_by_time ON receipts (wall_ns);
    CREATE TABLE usage_groups (
        id INTEGER PRIMARY KEY,
        tenant TEXT NOT NULL,
        project TEXT NOT NULL,
        key_id TEXT NOT NULL,
        operation TEXT NOT NULL,
        model TEXT NOT NULL,
        provider TEXT NOT NULL,
        UNIQUE (tenant, project, key_id, operation, model, provider)
    );
    CREATE TABLE usage_hours ({_SUMS_3}) WITHOUT ROWID;
    CREATE TABLE usage_days ({_SUMS_3}) WITHOUT ROWID;
    CREATE TABLE usage_latencies (
        start INTEGER NOT NULL,
        group_id INTEGER NOT NULL,
        latency INTEGER NOT NULL,
        calls INTEGER NOT NULL,
        PRIMARY KEY (start, group_id, latency)
    ) WITHOUT ROWID;
    CREATE TABLE usage_rolled (receipt INTEGER NOT NULL);
    INSERT INTO usage_rolled (receipt) VALUES (0)
    """,  # noqa: S608 - only the columns from above
)
"""What each version adds. A released one is never edited: a change is a new entry at the end."""

# These mean that the path or the file is wrong, and that waiting will not mend it.
_HOPELESS = {
    sqlite3.SQLITE_NOTADB: "is no SQLite database",
    sqlite3.SQLITE_CORRUPT: "is damaged",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened",
    sqlite3.SQLITE_READONLY: "cannot be written",
    sqlite3.SQLITE_PERM: "cannot be opened",
}


def connect(path: Path) -> sqlite3.Connection:
    """Open the ledger for writing, and create or upgrade its tables.

    Raises StartupError for what an operator must mend, sqlite3.Error for what may pass (locked, disk full).
    """
    if not path.parent.is_dir():
        raise StartupError(f"ledger: the folder {path.parent} does not exist; create it, or change `url`")
    try:
        # Autocommit: every transaction here begins and ends in plain sight.
        database = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)
        try:
            _prepare(database, path)
        except BaseException:
            database.close()
            raise
    except sqlite3.Error as error:
        problem = _HOPELESS.get(getattr(error, "sqlite_errorcode", 0) & 0xFF)
        if problem is None:
            raise
        raise StartupError(f"ledger: {path} {problem} ({error}); name another file in `url`, or mend it") from error
    return database


def connect_to_read(path: Path) -> sqlite3.Connection:
    """Open the ledger beside its writer; nothing can be changed through this connection."""
    return sqlite3.connect(f"file:{quote(os.fspath(path))}?mode=ro", uri=True, timeout=10, isolation_level=None)


def _prepare(database: sqlite3.Connection, path: Path) -> None:
    # In a transaction, or another gateway that makes the tables at this moment would look like another program.
    database.execute("BEGIN")
    _check(database, path)
    database.execute("COMMIT")
    database.execute("PRAGMA journal_mode = WAL")
    # FULL: what is written survives a power cut. It costs one fsync a batch, on the writer's own thread.
    database.execute("PRAGMA synchronous = FULL")
    if _number(database, "user_version") == len(MIGRATIONS):
        return
    database.execute("BEGIN IMMEDIATE")
    # Another gateway may have upgraded the file while this one waited.
    _check(database, path)
    for version in range(_number(database, "user_version"), len(MIGRATIONS)):
        for statement in MIGRATIONS[version].split(";"):
            database.execute(statement)
        database.execute(f"PRAGMA user_version = {version + 1}")
    # What an older version wrote is in no roll-up yet: all in one go, 20 seconds for a million receipts.
    rollups.add(database, rollups.last_row(database))
    database.execute(f"PRAGMA application_id = {APPLICATION}")
    database.execute("COMMIT")


def _check(database: sqlite3.Connection, path: Path) -> None:
    """Raise StartupError unless the file is empty or a ledger of a known version."""
    if _number(database, "application_id") != APPLICATION:
        if database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            raise StartupError(f"ledger: {path} is the database of another program; name another file in `url`")
        return
    version = _number(database, "user_version")
    if version > len(MIGRATIONS):
        raise StartupError(
            f"ledger: {path} has version {version}, this QLens knows up to version {len(MIGRATIONS)}; "
            "upgrade QLens, or name another file in `url`"
        )


def _number(database: sqlite3.Connection, pragma: str) -> int:
    return int(database.execute(f"PRAGMA {pragma}").fetchone()[0])
