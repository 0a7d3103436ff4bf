"""How a batch gets into PostgreSQL: receipts once, roll-ups of those that were new, counts of refused calls."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from operator import itemgetter
from typing import Any

import asyncpg
from attrs import evolve

from qlens_plugins.cost.ledger.postgres import rests
from qlens_plugins.cost.ledger.rollups import COUNTS, DAY, GROUPED, GROUPS, HOUR, LATENCY, SUMS, TABLES, of_none, terms
from qlens_plugins.cost.ledger.rows import COLUMNS, LARGEST, OPTIONAL, Rejection, Row, Value
from qlens_plugins.cost.ledger.store import Batch

AT_ONCE = 250
"""Rows that are encoded in one go: so long no other thread gets Python's lock."""
PAUSE_SECONDS = 0.00005
GIVEN = "ledger_given"
"""A table of the connection, for the receipts of a batch."""

UNFIT = (
    *(asyncpg.DataError, asyncpg.IntegrityConstraintViolationError, asyncpg.ProgramLimitExceededError),
    *(ValueError, TypeError, OverflowError),
)
"""What is raised for a value that the database cannot hold."""
LONGEST_BYTES = 360
"""Of a name that is part of a key, if need be: a row of an index has no room for more than six of them."""


def meter(name: str) -> str:
    """How much a receipt's meter says, in SQL."""
    return (
        f"CASE jsonb_typeof(meters -> '{name}') WHEN 'number' THEN "
        f"least(greatest(trunc((meters ->> '{name}')::numeric), {-LARGEST}), {LARGEST})::bigint ELSE 0 END"
    )


def add_sums(table: str, seconds: int) -> str:
    """Add receipts that were inserted, by their groups, to a roll-up of so many seconds, in SQL."""
    amounts = terms(meter)
    columns = ["start", "group_id", *COUNTS, *amounts]
    values = [
        *(f"wall_ns / {seconds * 10**9} * {seconds}", "group_id"),
        *(f"count(*) FILTER (WHERE {condition})" for condition in COUNTS.values()),
        *(f"sum({term})" for term in amounts.values()),
    ]
    changes = ", ".join(f"{name} = kept.{name} + excluded.{name}" for name in (*COUNTS, *SUMS))
    # In the order of the keys, in which every gateway changes rows: two never wait for each other.
    return (
        f"INSERT INTO {table} AS kept ({', '.join(columns)}) SELECT {', '.join(values)} FROM grouped "  # noqa: S608
        f"GROUP BY 1, 2 ORDER BY 1, 2 ON CONFLICT (start, group_id) DO UPDATE SET {changes}"
    )


def add_latencies(table: str) -> str:
    """The same for how many took how long."""
    return (
        f"INSERT INTO {table} AS kept (start, group_id, latency, calls) "  # noqa: S608
        f"SELECT wall_ns / {DAY * 10**9} * {DAY}, group_id, {LATENCY}, count(*) FROM grouped "
        "GROUP BY 1, 2, 3 ORDER BY 1, 2, 3 "
        "ON CONFLICT (start, group_id, latency) DO UPDATE SET calls = kept.calls + excluded.calls"
    )


# Only names from the code are put into these statements. With the defaults: a newer version may have added columns.
CREATE_GIVEN = f"CREATE TEMPORARY TABLE IF NOT EXISTS {GIVEN} (LIKE receipts INCLUDING DEFAULTS) ON COMMIT DELETE ROWS"
# A commit may have happened though its answer was lost, or may be about to: the row of the writer, which a transaction
# on the old connection keeps locked until it is over, tells.
_BEGUN = (
    "INSERT INTO writers AS known (id, batch) VALUES ($1, $2) ON CONFLICT (id) "
    "DO UPDATE SET batch = excluded.batch WHERE known.batch < excluded.batch RETURNING true"
)
_SAME = " AND ".join(f"usage_groups.{name} = {of_none(name, 'given.')}" for name in GROUPED)
_ADD_GROUPS = (
    f"INSERT INTO usage_groups ({', '.join(GROUPED)}) SELECT DISTINCT {', '.join(map(of_none, GROUPED))} "  # noqa: S608
    f"FROM {GIVEN} AS given WHERE NOT EXISTS (SELECT FROM usage_groups WHERE {_SAME}) "
    f"ORDER BY {', '.join(str(place + 1) for place in range(len(GROUPED)))} ON CONFLICT DO NOTHING"
)
_ROLLED = ("wall_ns", *GROUPED, "outcome", "cache", "cost_state", "cost_picos", "saved_picos", "total_us", "meters")
_BUCKETS = tuple(name for name in SUMS if name in COLUMNS)
ADDED = (*_ROLLED, *_BUCKETS)
"""The columns of a receipt that roll-ups need."""
_ADD = f"""
WITH given AS (
    INSERT INTO receipts ({", ".join(COLUMNS)}) SELECT {", ".join(COLUMNS)} FROM {GIVEN} ORDER BY id
    ON CONFLICT (id) DO NOTHING RETURNING {", ".join(ADDED)}
), grouped AS MATERIALIZED (
    SELECT given.*, usage_groups.id AS group_id FROM given JOIN usage_groups ON {_SAME}
), hours AS ({add_sums(TABLES[HOUR], HOUR)}), days AS ({add_sums(TABLES[DAY], DAY)}),
latencies AS ({add_latencies("usage_latencies")}) SELECT count(*) FROM given
"""  # noqa: S608
_COUNT = """
INSERT INTO rejections AS kept (day, tenant, operation, model, status, error, calls)
SELECT day, tenant, operation, model, status, error, sum(calls)
FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::bigint[], $6::text[], $7::bigint[])
     AS given (day, tenant, operation, model, status, error, calls)
GROUP BY 1, 2, 3, 4, 5, 6 ORDER BY 1, 2, 3, 4, 5, 6
ON CONFLICT (day, tenant, operation, model, status, error) DO UPDATE SET calls = kept.calls + excluded.calls
"""

_KEPT = "UPDATE receipts_kept SET since_ns = greatest(since_ns, $1)"


async def write(connection: Any, writer: str, batch: Batch) -> None:
    """Write a batch in one transaction, whatever its values are."""
    try:
        await _write(connection, writer, batch, _ordered(batch.receipts))
    except UNFIT:
        # Rare, so it is looked for only now; the transaction has written nothing. No value can spoil a batch.
        await _write(connection, writer, batch, _ordered(list(map(_fit, batch.receipts))))


async def add(connection: Any) -> None:
    """Add the receipts of the connection's table that are new, and what they used and cost; within a transaction."""
    await connection.execute(_ADD_GROUPS)
    await connection.execute(_ADD)


def _ordered(rows: Sequence[Row]) -> list[Row]:
    """The first of each id, in the order in which every gateway inserts."""
    first = {row[0]: row for row in reversed(rows)}
    return sorted(first.values(), key=itemgetter(0))


async def _write(connection: Any, writer: str, batch: Batch, rows: Sequence[Row]) -> None:
    async with connection.transaction(isolation="read_committed"):
        if not await connection.fetchval(_BEGUN, writer, batch.number):
            return
        if rows:
            for start in range(0, len(rows), AT_ONCE):
                await connection.copy_records_to_table(
                    GIVEN, records=rows[start : start + AT_ONCE], columns=COLUMNS, schema_name="pg_temp"
                )
                await asyncio.sleep(PAUSE_SECONDS)
            await add(connection)
        if batch.rejections:
            await connection.execute(_COUNT, *_counts(batch.rejections))
        if batch.rests:
            # Names as receipts would have them here.
            await rests.add(connection, [evolve(rest, group=_fit_group(rest.group)) for rest in batch.rests])
        if batch.kept_since_ns:
            await connection.execute(_KEPT, batch.kept_since_ns)


def _counts(rejections: Mapping[Rejection, int]) -> list[list[Value]]:
    """By column."""
    rows = [(*map(_text_or_number, key), calls) for key, calls in rejections.items()]
    return [list(column) for column in zip(*rows, strict=True)]


def _text_or_number(value: Value) -> Value:
    return value if type(value) is int else _name(value)


# --- values that do not fit --------------------------------------------------------------------

_WHOLE = frozenset(
    ("wall_ns", "status", *_BUCKETS, "cost_picos", "saved_picos", "ttft_us", "total_us", "overhead_us", "bytes_out")
)
_JSON = frozenset(("meters", "tags"))
_NAMES = frozenset(("id", *GROUPS))


def _fit(row: Row) -> Row:
    """A row as PostgreSQL can hold it."""
    return tuple(map(_fit_value, COLUMNS, row))


def _fit_group(group: Sequence[str]) -> tuple[str, ...]:
    """A group of roll-ups as PostgreSQL can hold it."""
    return tuple(_json(value) if name in _JSON else _name(value) for name, value in zip(GROUPED, group, strict=True))


def _fit_value(column: str, value: object) -> Value:
    if value is None and column in OPTIONAL:
        return None
    if column in _WHOLE:
        return max(-LARGEST, min(int(value), LARGEST)) if isinstance(value, int) else 0
    if column == "streamed":
        return bool(value)
    if column in _JSON:
        return _json(value)
    return _name(value) if column in _NAMES else _text(value)


def _name(value: object) -> str:
    """A text that fits into a key; of a long one the beginning, and what tells it from others."""
    text = _text(value)
    written = text.encode()
    if len(written) <= LONGEST_BYTES:
        return text
    digest = blake2b(written, digest_size=12).hexdigest()
    return f"{written[: LONGEST_BYTES - len(digest) - 1].decode(errors='ignore')}~{digest}"


def _text(value: object) -> str:
    # Neither a lone surrogate, which JSON can carry, nor a zero character is a text for PostgreSQL.
    return "" if value is None else str(value).encode("utf-8", "replace").decode().replace("\0", "?")


def _json(value: object) -> str:
    try:
        return json.dumps(_plain(json.loads(str(value))), ensure_ascii=False)
    except ValueError:
        return "{}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {_text(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return _text(value) if isinstance(value, str) else value
