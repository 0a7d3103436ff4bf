"""The tables of keys, tenants and the audit log in PostgreSQL, by version."""

from __future__ import annotations

from qlens import PostgresMigration

OWNER = "key_store"
"""What these tables' version is kept under, in a schema that others may have tables in too."""
TABLES = ("keys", "tenants", "key_state", "audit")

# COLLATE "C": lists are in the order of names by their bytes, as in SQLite.
MIGRATIONS = (
    PostgresMigration(
        (
            """
            CREATE TABLE keys (
                n bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
                id text COLLATE "C" NOT NULL UNIQUE,
                hash bytea NOT NULL UNIQUE,
                hint text NOT NULL,
                tenant text COLLATE "C" NOT NULL,
                subject text NOT NULL,
                name text,
                project text,
                roles text NOT NULL,
                models text,
                tags text NOT NULL,
                limits text,
                metadata text NOT NULL,
                created_at bigint NOT NULL,
                created_by text NOT NULL,
                expires_at bigint,
                revoked_at bigint,
                rotated_at bigint,
                old_hash bytea,
                old_hint text,
                old_until bigint,
                change bigint NOT NULL
            )
            """,
            "CREATE INDEX keys_by_change ON keys (change)",
            "CREATE INDEX keys_by_tenant ON keys (tenant, n)",
            """
            CREATE TABLE tenants (
                name text COLLATE "C" PRIMARY KEY,
                disabled boolean NOT NULL,
                models text,
                limits text,
                metadata text NOT NULL,
                created_at bigint NOT NULL,
                created_by text NOT NULL,
                deleted_at bigint,
                change bigint NOT NULL
            )
            """,
            "CREATE INDEX tenants_by_change ON tenants (change)",
            # One row: the number of the last change, which every gateway looks at, and what tells its pepper from
            # others.
            "CREATE TABLE key_state (one integer PRIMARY KEY CHECK (one = 1), change bigint NOT NULL, pepper text)",
            "INSERT INTO key_state (one, change) VALUES (1, 0)",
            """
            CREATE TABLE audit (
                n bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
                id text COLLATE "C" NOT NULL UNIQUE,
                wall_ns bigint NOT NULL,
                tenant text COLLATE "C",
                actor text NOT NULL,
                action text NOT NULL,
                object text COLLATE "C" NOT NULL,
                entry text NOT NULL,
                hash bytea NOT NULL
            )
            """,
            "CREATE INDEX audit_by_tenant ON audit (tenant, n)",
            "CREATE INDEX audit_by_object ON audit (object, n)",
            """
            CREATE FUNCTION audit_is_append_only() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
                RAISE EXCEPTION 'the audit log is append-only';
            END $$
            """,
            """
            CREATE TRIGGER audit_is_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit
            FOR EACH STATEMENT EXECUTE FUNCTION audit_is_append_only()
            """,
        ),
        oldest=1,
    ),
    # What has become of keys, until that is told.
    PostgresMigration(
        (
            """
            CREATE TABLE untold_events (
                n bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
                wall_ns bigint NOT NULL,
                event text NOT NULL
            )
            """,
        ),
        oldest=1,
    ),
)
"""What each version adds. A released one is never edited: a change is a new entry at the end."""
