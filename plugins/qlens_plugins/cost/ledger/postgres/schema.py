"""The ledger's tables in PostgreSQL, their versions, and the partitions of the receipts."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from attrs import frozen

from qlens import POSTGRES_LOCK, PostgresMigration, prepare_postgres
from qlens_plugins.cost.ledger.postgres import writing
from qlens_plugins.cost.ledger.rollups import COARSE, COUNTS, DAY, SUMS, of_none
from qlens_plugins.cost.ledger.rows import DAY_NS

OWNER = "ledger"
LOCK_MILLISECONDS = 2000
"""How long partitions wait for those who read: so long new readers wait as well."""
AT_ONCE = 5000
"""Receipts that are deleted one by one in a transaction."""
OTHER = "receipts_other"
"""The partition for what belongs to no month."""

# COLLATE "C": ids are in the order of time by their bytes, and names need no other order.
_SUMS_1 = f"""
    start bigint NOT NULL,
    group_id bigint NOT NULL,
    {", ".join(f"{name} bigint NOT NULL" for name in COUNTS)},
    {", ".join(f"{name} numeric NOT NULL" for name in SUMS)},
    PRIMARY KEY (start, group_id)
"""
# Rows of roll-ups are changed often: with room left on their pages, no index has to follow.
_ROOM = "WITH (fillfactor = 70)"
_SUMMED_1 = (*COUNTS, *SUMS)
_COARSE_2 = ", ".join(COARSE)
_SAME_2 = " AND ".join(f"coarse.{name} = {of_none(name, 'added.')}" for name in COARSE)
# One trigger on the receipts and not several on the other roll-ups: all gateways go in the order of the keys, so that
# they never wait for each other in a circle.
_ADD_COARSE_2 = f"""
CREATE FUNCTION usage_coarse_add() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
    INSERT INTO usage_coarse_groups ({_COARSE_2})
    SELECT DISTINCT {", ".join(map(of_none, COARSE))} FROM added
    WHERE NOT EXISTS (SELECT FROM usage_coarse_groups AS coarse WHERE {_SAME_2})
    ORDER BY 1, 2, 3, 4 ON CONFLICT DO NOTHING;

    WITH grouped AS MATERIALIZED (
        SELECT {", ".join(f"added.{name}" for name in writing.ADDED)}, coarse.id AS group_id
        FROM added JOIN usage_coarse_groups AS coarse ON {_SAME_2}
    ), days AS ({writing.add_sums("usage_coarse_days", DAY)})
    {writing.add_latencies("usage_coarse_latencies")};
    RETURN NULL;
END $$
"""  # noqa: S608
MIGRATIONS = (
    PostgresMigration(
        (
            """
            CREATE TABLE receipts (
                id text COLLATE "C" PRIMARY KEY,
                wall_ns bigint NOT NULL,
                day text COLLATE "C" NOT NULL,
                tenant text COLLATE "C" NOT NULL,
                project text COLLATE "C",
                key_id text COLLATE "C",
                subject text COLLATE "C" NOT NULL,
                operation text COLLATE "C" NOT NULL,
                model text COLLATE "C",
                provider text COLLATE "C",
                upstream_model text,
                outcome text NOT NULL,
                status bigint NOT NULL,
                error text,
                streamed boolean NOT NULL,
                cache text NOT NULL,
                input bigint NOT NULL,
                cached_input bigint NOT NULL,
                cache_write_5m bigint NOT NULL,
                cache_write_1h bigint NOT NULL,
                output bigint NOT NULL,
                reasoning bigint NOT NULL,
                audio_in bigint NOT NULL,
                audio_out bigint NOT NULL,
                meters jsonb NOT NULL,
                usage_source text NOT NULL,
                tier text,
                cost_picos bigint,
                cost_state text NOT NULL,
                price_id text,
                saved_picos bigint NOT NULL,
                ttft_us bigint,
                total_us bigint NOT NULL,
                overhead_us bigint NOT NULL,
                bytes_out bigint NOT NULL,
                config_version text NOT NULL,
                tags jsonb NOT NULL,
                attempts text NOT NULL
            ) PARTITION BY RANGE (id)
            """,
            "CREATE INDEX receipts_by_time ON receipts (wall_ns)",
            f"CREATE TABLE {OTHER} PARTITION OF receipts DEFAULT",
            """
            CREATE TABLE rejections (
                day text COLLATE "C" NOT NULL,
                tenant text COLLATE "C" NOT NULL,
                operation text COLLATE "C" NOT NULL,
                model text COLLATE "C" NOT NULL,
                status bigint NOT NULL,
                error text COLLATE "C" NOT NULL,
                calls bigint NOT NULL,
                PRIMARY KEY (day, tenant, operation, model, status, error)
            )
            """,
            "CREATE TABLE writers (id text PRIMARY KEY, batch bigint NOT NULL)",
            """
            CREATE TABLE usage_groups (
                id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
                tenant text COLLATE "C" NOT NULL,
                project text COLLATE "C" NOT NULL,
                key_id text COLLATE "C" NOT NULL,
                operation text COLLATE "C" NOT NULL,
                model text COLLATE "C" NOT NULL,
                provider text COLLATE "C" NOT NULL,
                tags jsonb NOT NULL
            )
            """,
            # Not the tags themselves: what is in an index may not be long.
            "CREATE UNIQUE INDEX usage_groups_once ON usage_groups "
            "(tenant, project, key_id, operation, model, provider, md5(tags::text))",
            f"CREATE TABLE usage_hours ({_SUMS_1}) {_ROOM}",
            f"CREATE TABLE usage_days ({_SUMS_1}) {_ROOM}",
            f"""
            CREATE TABLE usage_latencies (
                start bigint NOT NULL,
                group_id bigint NOT NULL,
                latency bigint NOT NULL,
                calls bigint NOT NULL,
                PRIMARY KEY (start, group_id, latency)
            ) {_ROOM}
            """,
            "CREATE TABLE receipts_kept (since_ns bigint NOT NULL)",
            "INSERT INTO receipts_kept (since_ns) VALUES (0)",
        ),
        oldest=1,
    ),
    # Days and latencies by fewer dimensions. A trigger keeps them, so that an older version may go on writing.
    PostgresMigration(
        (
            f"""
            CREATE TABLE usage_coarse_groups (
                id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
                {", ".join(f'{name} text COLLATE "C" NOT NULL' for name in COARSE)},
                UNIQUE ({_COARSE_2})
            )
            """,
            f"CREATE TABLE usage_coarse_days ({_SUMS_1}) {_ROOM}",
            f"""
            CREATE TABLE usage_coarse_latencies (
                start bigint NOT NULL,
                group_id bigint NOT NULL,
                latency bigint NOT NULL,
                calls bigint NOT NULL,
                PRIMARY KEY (start, group_id, latency)
            ) {_ROOM}
            """,
            _ADD_COARSE_2,
            # From here on nobody adds receipts before this is over.
            """
            CREATE TRIGGER usage_coarse_add AFTER INSERT ON receipts REFERENCING NEW TABLE AS added
            FOR EACH STATEMENT EXECUTE FUNCTION usage_coarse_add()
            """,
            f"INSERT INTO usage_coarse_groups ({_COARSE_2}) SELECT DISTINCT {_COARSE_2} FROM usage_groups",  # noqa: S608
            f"""
            INSERT INTO usage_coarse_days (start, group_id, {", ".join(_SUMMED_1)})
            SELECT start, coarse.id, {", ".join(f"sum({name})" for name in _SUMMED_1)}
            FROM usage_days JOIN usage_groups ON usage_groups.id = group_id
                JOIN usage_coarse_groups AS coarse USING ({_COARSE_2})
            GROUP BY 1, 2 ORDER BY 1, 2
            """,  # noqa: S608
            f"""
            INSERT INTO usage_coarse_latencies (start, group_id, latency, calls)
            SELECT start, coarse.id, latency, sum(calls)
            FROM usage_latencies JOIN usage_groups ON usage_groups.id = group_id
                JOIN usage_coarse_groups AS coarse USING ({_COARSE_2})
            GROUP BY 1, 2, 3 ORDER BY 1, 2, 3
            """,  # noqa: S608
        ),
        oldest=1,
    ),
)
"""What each version adds. A released one is never edited: a change is a new entry at the end."""


async def prepare(connection: Any, name: str) -> None:
    """Make or upgrade the tables; raises StartupError for tables of another program or of a version beyond this one."""
    await prepare_postgres(connection, OWNER, MIGRATIONS, ("receipts",), name)


# --- partitions --------------------------------------------------------------------------------
# By the id, which is a UUIDv7: its time is a part of it. So an id is unique over all partitions, whatever its receipt
# says of the time, and one call is looked up in one partition.

_TIMED = re.compile(r"([0-9a-f]{8})-([0-9a-f]{4})")
_FIRST_YEAR, _LAST_YEAR = 2020, 2100


@frozen(order=True)
class Month:
    """A month, in UTC."""

    year: int
    month: int

    @classmethod
    def of_id(cls, call_id: str) -> Month | None:
        """The month of an id's time; None for an id without one."""
        found = _TIMED.match(call_id)
        if found is None:
            return None
        seconds = int(found[1] + found[2], 16) / 1000
        if not datetime(_FIRST_YEAR, 1, 1, tzinfo=UTC).timestamp() <= seconds < _begin(_LAST_YEAR, 1).timestamp():
            return None
        return cls.at(seconds)

    @classmethod
    def at(cls, seconds: float) -> Month:
        """The month of a time in Unix seconds."""
        moment = datetime.fromtimestamp(seconds, UTC)
        return cls(moment.year, moment.month)

    @classmethod
    def of_partition(cls, name: str) -> Month | None:
        """The month of a partition's table."""
        found = re.fullmatch(r"receipts_(\d{4})_(\d\d)", name)
        return None if found is None else cls(int(found[1]), int(found[2]))

    @property
    def next(self) -> Month:
        """The month after it."""
        return Month(self.year + self.month // 12, self.month % 12 + 1)

    @property
    def begin(self) -> datetime:
        """Its first moment."""
        return _begin(self.year, self.month)

    @property
    def first_id(self) -> str:
        """How ids of its first millisecond begin; no id of the month is before it."""
        digits = f"{int(self.begin.timestamp() * 1000):012x}"
        return f"{digits[:8]}-{digits[8:]}"

    @property
    def table(self) -> str:
        """The name of its partition."""
        return f"receipts_{self.year:04}_{self.month:02}"


def _begin(year: int, month: int) -> datetime:
    return datetime(year, month, 1, tzinfo=UTC)


async def partitions(connection: Any) -> set[Month]:
    """The months that have a partition."""
    found = await connection.fetch(
        "SELECT relname FROM pg_inherits JOIN pg_class ON pg_class.oid = inhrelid "
        "WHERE inhparent = 'receipts'::regclass"
    )
    return {month for (name,) in found if (month := Month.of_partition(name)) is not None}


async def add_partitions(connection: Any, months: Iterable[Month]) -> set[Month]:
    """Make the partitions of some months that have none; all that there are then. Raises LockNotAvailableError."""
    async with connection.transaction():
        await connection.execute(f"SET LOCAL lock_timeout = {LOCK_MILLISECONDS}")
        await connection.execute(POSTGRES_LOCK)
        known = await partitions(connection)
        for month in sorted(set(months) - known):
            await _add_partition(connection, month)
            known.add(month)
    return known


_NOW_NS = "SELECT floor(extract(epoch FROM clock_timestamp()) * 1000000000)::bigint"


async def forget(connection: Any, before_ns: int) -> bool:
    """Drop the months that ended before a time, and what is older of the others; whether there may be more.

    The time goes by this machine's clock. One that is ahead of the server's must not delete what others count on.
    """
    now_ns = time.time_ns()
    before_ns -= max(0, now_ns - await connection.fetchval(_NOW_NS))
    async with connection.transaction():
        await connection.execute(f"SET LOCAL lock_timeout = {LOCK_MILLISECONDS}")
        await connection.execute(POSTGRES_LOCK)
        for month in sorted(await partitions(connection)):
            if month.next.begin.timestamp() * 10**9 <= before_ns:
                newest = await connection.fetchval(f"SELECT max(wall_ns) FROM {month.table}")  # noqa: S608 - digits
                await connection.execute(f"DROP TABLE {month.table}")
                await _kept_since(connection, newest)
        gone = await connection.fetch(
            f"DELETE FROM {OTHER} WHERE id IN (SELECT id FROM {OTHER} WHERE wall_ns < $1 LIMIT {AT_ONCE}) "  # noqa: S608
            "RETURNING wall_ns",
            before_ns,
        )
        await _kept_since(connection, max((wall_ns for (wall_ns,) in gone), default=None))
    return len(gone) == AT_ONCE


async def _kept_since(connection: Any, newest: int | None) -> None:
    """Note that a receipt of this time is gone: from the day after it on, all are there."""
    if newest is not None:
        since = (newest // DAY_NS + 1) * DAY_NS
        await connection.execute("UPDATE receipts_kept SET since_ns = greatest(since_ns, $1)", since)


async def _add_partition(connection: Any, month: Month) -> None:
    table, first, end = month.table, month.first_id, month.next.first_id
    await connection.execute(f"CREATE TABLE {table} (LIKE receipts INCLUDING ALL)")
    # Attached, which keeps no reader of the other partitions waiting. What came before it lies among the others.
    await connection.execute(
        f"WITH found AS (DELETE FROM {OTHER} WHERE id >= '{first}' AND id < '{end}' RETURNING *) "  # noqa: S608 - digits
        f"INSERT INTO {table} SELECT * FROM found"
    )
    await connection.execute(f"ALTER TABLE receipts ATTACH PARTITION {table} FOR VALUES FROM ('{first}') TO ('{end}')")
