"""The ledger's tables in SQLite, their versions, and how to open a file with them."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from urllib.parse import quote

from qlens import open_sqlite, sqlite_transaction
from qlens_plugins.cost.ledger.sqlite import writing

OWNER = "ledger"

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
_SUMMED_3 = [
    *("calls", "failed", "abandoned", "blocked", "cached", "estimated", "unpriced"),
    *(
        f"{name}_{half}"
        for name in (
            *("input", "cached_input", "cache_write_5m", "cache_write_1h", "output", "reasoning", "audio_in"),
            *("audio_out", "images", "seconds", "characters", "cost", "saved"),
        )
        for half in ("high", "low")
    ),
]
"""The columns of _SUMS_3 that are added up."""
_COARSE_6 = "tenant, operation, model, provider"
# From the coarse group of what a trigger was called for.
_FROM_COARSE_6 = f"""
    FROM usage_groups CROSS JOIN usage_coarse_groups USING ({_COARSE_6}) WHERE usage_groups.id = NEW.group_id
"""
_ALL_KEPT = "(SELECT max(since_ns) FROM receipts_kept) = 0"
MIGRATIONS = (
    (
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
        )
        """,
        "CREATE INDEX receipts_by_day ON receipts (day, tenant, model)",
        "CREATE INDEX receipts_by_tenant ON receipts (tenant, day)",
        """
        CREATE TABLE rejections (
            day TEXT NOT NULL,
            tenant TEXT NOT NULL,
            operation TEXT NOT NULL,
            model TEXT NOT NULL,
            status INTEGER NOT NULL,
            error TEXT NOT NULL,
            calls INTEGER NOT NULL,
            PRIMARY KEY (day, tenant, operation, model, status, error)
        ) WITHOUT ROWID
        """,
        """
        CREATE TABLE writers (
            id TEXT PRIMARY KEY,
            batch INTEGER NOT NULL
        ) WITHOUT ROWID
        """,
    ),
    # By day alone, which grows at its end. Indexes that begin or go on with the tenant are written to all over: the two
    # took as long as all the rest of a row.
    (
        "DROP INDEX receipts_by_day",
        "DROP INDEX receipts_by_tenant",
        "CREATE INDEX receipts_by_day ON receipts (day)",
    ),
    # By time, which also grows at its end and serves days as well.
    (
        "DROP INDEX receipts_by_day",
        "CREATE INDEX receipts_by_time ON receipts (wall_ns)",
        """
        CREATE TABLE usage_groups (
            id INTEGER PRIMARY KEY,
            tenant TEXT NOT NULL,
            project TEXT NOT NULL,
            key_id TEXT NOT NULL,
            operation TEXT NOT NULL,
            model TEXT NOT NULL,
            provider TEXT NOT NULL,
            UNIQUE (tenant, project, key_id, operation, model, provider)
        )
        """,
        f"CREATE TABLE usage_hours ({_SUMS_3}) WITHOUT ROWID",
        f"CREATE TABLE usage_days ({_SUMS_3}) WITHOUT ROWID",
        """
        CREATE TABLE usage_latencies (
            start INTEGER NOT NULL,
            group_id INTEGER NOT NULL,
            latency INTEGER NOT NULL,
            calls INTEGER NOT NULL,
            PRIMARY KEY (start, group_id, latency)
        ) WITHOUT ROWID
        """,
        "CREATE TABLE usage_rolled (receipt INTEGER NOT NULL)",
        "INSERT INTO usage_rolled (receipt) VALUES (0)",
    ),
    # From when on all receipts are there: older ones may have been deleted, and are in the roll-ups alone.
    (
        "CREATE TABLE receipts_kept (since_ns INTEGER NOT NULL)",
        "INSERT INTO receipts_kept (since_ns) VALUES (0)",
    ),
    # With the tags. What is summed up already has none, so it is summed up anew, where the receipts are still there.
    (
        """
        CREATE TABLE usage_groups_5 (
            id INTEGER PRIMARY KEY,
            tenant TEXT NOT NULL,
            project TEXT NOT NULL,
            key_id TEXT NOT NULL,
            operation TEXT NOT NULL,
            model TEXT NOT NULL,
            provider TEXT NOT NULL,
            tags TEXT NOT NULL,
            UNIQUE (tenant, project, key_id, operation, model, provider, tags)
        )
        """,
        f"INSERT INTO usage_groups_5 SELECT *, '{{}}' FROM usage_groups WHERE NOT {_ALL_KEPT}",  # noqa: S608
        "DROP TABLE usage_groups",
        "ALTER TABLE usage_groups_5 RENAME TO usage_groups",
        f"DELETE FROM usage_hours WHERE {_ALL_KEPT}",  # noqa: S608
        f"DELETE FROM usage_days WHERE {_ALL_KEPT}",  # noqa: S608
        f"DELETE FROM usage_latencies WHERE {_ALL_KEPT}",  # noqa: S608
        f"UPDATE usage_rolled SET receipt = 0 WHERE {_ALL_KEPT}",  # noqa: S608
    ),
    # Days and latencies by fewer dimensions. Triggers keep them, so that they have what a gateway of an older version
    # still writes. Each column is the sum of this column over the groups: here a `_low` may be 10**9 and more.
    (
        """
        CREATE TABLE usage_coarse_groups (
            id INTEGER PRIMARY KEY,
            tenant TEXT NOT NULL,
            operation TEXT NOT NULL,
            model TEXT NOT NULL,
            provider TEXT NOT NULL,
            UNIQUE (tenant, operation, model, provider)
        )
        """,
        f"CREATE TABLE usage_coarse_days ({_SUMS_3}) WITHOUT ROWID",
        """
        CREATE TABLE usage_coarse_latencies (
            start INTEGER NOT NULL,
            group_id INTEGER NOT NULL,
            latency INTEGER NOT NULL,
            calls INTEGER NOT NULL,
            PRIMARY KEY (start, group_id, latency)
        ) WITHOUT ROWID
        """,
        f"INSERT INTO usage_coarse_groups ({_COARSE_6}) SELECT DISTINCT {_COARSE_6} FROM usage_groups",  # noqa: S608
        f"""
        INSERT INTO usage_coarse_days (start, group_id, {", ".join(_SUMMED_3)})
        SELECT start, usage_coarse_groups.id, {", ".join(f"sum({name})" for name in _SUMMED_3)}
        FROM usage_days CROSS JOIN usage_groups ON usage_groups.id = group_id
            CROSS JOIN usage_coarse_groups USING ({_COARSE_6})
        GROUP BY 1, 2
        """,  # noqa: S608
        f"""
        INSERT INTO usage_coarse_latencies (start, group_id, latency, calls)
        SELECT start, usage_coarse_groups.id, latency, sum(calls)
        FROM usage_latencies CROSS JOIN usage_groups ON usage_groups.id = group_id
            CROSS JOIN usage_coarse_groups USING ({_COARSE_6})
        GROUP BY 1, 2, 3
        """,  # noqa: S608
        f"""
        CREATE TRIGGER usage_groups_added AFTER INSERT ON usage_groups BEGIN
            INSERT INTO usage_coarse_groups ({_COARSE_6})
            VALUES (NEW.tenant, NEW.operation, NEW.model, NEW.provider) ON CONFLICT DO NOTHING;
        END
        """,  # noqa: S608
        f"""
        CREATE TRIGGER usage_days_added AFTER INSERT ON usage_days BEGIN
            INSERT INTO usage_coarse_days (start, group_id, {", ".join(_SUMMED_3)})
            SELECT NEW.start, usage_coarse_groups.id, {", ".join(f"NEW.{name}" for name in _SUMMED_3)} {_FROM_COARSE_6}
            ON CONFLICT (start, group_id)
            DO UPDATE SET {", ".join(f"{name} = {name} + excluded.{name}" for name in _SUMMED_3)};
        END
        """,
        f"""
        CREATE TRIGGER usage_days_changed AFTER UPDATE ON usage_days BEGIN
            UPDATE usage_coarse_days
            SET {", ".join(f"{name} = {name} + NEW.{name} - OLD.{name}" for name in _SUMMED_3)}
            WHERE start = NEW.start AND group_id = (SELECT usage_coarse_groups.id {_FROM_COARSE_6});
        END
        """,  # noqa: S608
        f"""
        CREATE TRIGGER usage_latencies_added AFTER INSERT ON usage_latencies BEGIN
            INSERT INTO usage_coarse_latencies (start, group_id, latency, calls)
            SELECT NEW.start, usage_coarse_groups.id, NEW.latency, NEW.calls {_FROM_COARSE_6}
            ON CONFLICT (start, group_id, latency) DO UPDATE SET calls = calls + excluded.calls;
        END
        """,
        f"""
        CREATE TRIGGER usage_latencies_changed AFTER UPDATE ON usage_latencies BEGIN
            UPDATE usage_coarse_latencies SET calls = calls + NEW.calls - OLD.calls
            WHERE start = NEW.start AND latency = NEW.latency
                AND group_id = (SELECT usage_coarse_groups.id {_FROM_COARSE_6});
        END
        """,  # noqa: S608
    ),
)
"""What each version adds. A released one is never edited: a change is a new entry at the end."""
OLDEST = 5
"""The oldest version whose QLens may go on writing: what came after it must not disturb it."""


def connect(path: Path) -> sqlite3.Connection:
    """Open the ledger for writing, and create or upgrade its tables.

    Raises StartupError for what an operator must mend, sqlite3.Error for what may pass (locked, disk full).
    """
    database = open_sqlite(path, OWNER, MIGRATIONS, oldest=OLDEST, unversioned=_unversioned)
    try:
        # What was written before there were roll-ups is in none yet: all in one go, 20 seconds for a million receipts.
        with sqlite_transaction(database):
            writing.roll_up(database, writing.last_row(database))
    except BaseException:
        database.close()
        raise
    return database


def connect_to_read(path: Path) -> sqlite3.Connection:
    """Open the ledger beside its writer; nothing can be changed through this connection."""
    return sqlite3.connect(f"file:{quote(os.fspath(path))}?mode=ro", uri=True, timeout=10, isolation_level=None)


def _unversioned(database: sqlite3.Connection) -> int:
    """The version of a ledger from when it was alone in its file."""
    return int(database.execute("PRAGMA user_version").fetchone()[0])
