"""The tables of keys, tenants and the audit log, by version."""

from __future__ import annotations

OWNER = "key_store"
"""What these tables' version is kept under, in a file that others may have tables in too."""

MIGRATIONS = (
    (
        """
        CREATE TABLE keys (
            n INTEGER PRIMARY KEY AUTOINCREMENT,
            id TEXT NOT NULL UNIQUE,
            hash BLOB NOT NULL UNIQUE,
            hint TEXT NOT NULL,
            tenant TEXT NOT NULL,
            subject TEXT NOT NULL,
            name TEXT,
            project TEXT,
            roles TEXT NOT NULL,
            models TEXT,
            tags TEXT NOT NULL,
            limits TEXT,
            created_at INTEGER NOT NULL,
            created_by TEXT NOT NULL,
            expires_at INTEGER,
            revoked_at INTEGER,
            rotated_at INTEGER,
            old_hash BLOB,
            old_hint TEXT,
            old_until INTEGER,
            change INTEGER NOT NULL
        )
        """,
        "CREATE INDEX keys_by_change ON keys (change)",
        "CREATE INDEX keys_by_tenant ON keys (tenant, n)",
        """
        CREATE TABLE tenants (
            name TEXT PRIMARY KEY,
            disabled INTEGER NOT NULL,
            models TEXT,
            limits TEXT,
            metadata TEXT NOT NULL,
            created_at INTEGER NOT NULL,
            created_by TEXT NOT NULL,
            deleted_at INTEGER,
            change INTEGER NOT NULL
        )
        """,
        "CREATE INDEX tenants_by_change ON tenants (change)",
        # One row: the number of the last change, which every gateway looks at, and what tells its pepper from others.
        "CREATE TABLE key_state (one INTEGER PRIMARY KEY CHECK (one = 1), change INTEGER NOT NULL, pepper TEXT)",
        "INSERT INTO key_state (one, change) VALUES (1, 0)",
        """
        CREATE TABLE audit (
            n INTEGER PRIMARY KEY AUTOINCREMENT,
            id TEXT NOT NULL UNIQUE,
            wall_ns INTEGER NOT NULL,
            tenant TEXT,
            actor TEXT NOT NULL,
            action TEXT NOT NULL,
            object TEXT NOT NULL,
            entry TEXT NOT NULL,
            hash BLOB NOT NULL
        )
        """,
        "CREATE INDEX audit_by_tenant ON audit (tenant, n)",
        "CREATE INDEX audit_by_object ON audit (object, n)",
        """
        CREATE TRIGGER audit_is_not_changed BEFORE UPDATE ON audit
        BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END
        """,
        """
        CREATE TRIGGER audit_is_not_deleted BEFORE DELETE ON audit
        BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END
        """,
        # REPLACE deletes without asking that trigger.
        """
        CREATE TRIGGER audit_is_not_replaced BEFORE INSERT ON audit
        WHEN EXISTS (SELECT 1 FROM audit WHERE id = NEW.id OR n = NEW.n)
        BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END
        """,
    ),
    ("ALTER TABLE keys ADD COLUMN metadata TEXT NOT NULL DEFAULT '{}'",),
    # What has become of keys, until that is told.
    (
        """
        CREATE TABLE untold_events (
            n INTEGER PRIMARY KEY AUTOINCREMENT,
            wall_ns INTEGER NOT NULL,
            event TEXT NOT NULL
        )
        """,
    ),
)
"""What each version adds. A released one is never edited: a change is a new entry at the end."""
OLDEST = 1
"""The oldest version whose QLens may go on writing: what came after it must not disturb it."""
