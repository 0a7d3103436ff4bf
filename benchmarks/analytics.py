"""How long the usage API takes over a large ledger: makes receipts, and asks for a month by day and model."""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import resource
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import orjson

from qlens import PostgresLine, Url
from qlens.testing import running
from qlens.testing.postgres import postgres_server
from qlens_plugins.cost.ledger import rows
from qlens_plugins.cost.ledger.places import store_at
from qlens_plugins.cost.ledger.postgres import PostgresStore
from qlens_plugins.cost.ledger.postgres import schema as postgres_schema
from qlens_plugins.cost.ledger.postgres import writing as postgres_writing
from qlens_plugins.cost.ledger.postgres.schema import Month
from qlens_plugins.cost.ledger.sqlite import SqliteStore, schema, writing
from qlens_plugins.cost.ledger.store import Store

START = 1_790_812_800
"""2026-10-01 in UTC, in Unix seconds."""
DAYS = 31
TENANTS, KEYS, MODELS, PROVIDERS = 50, 4, 12, 3  # 2,400 groups
"""Of each tenant so many keys; every key uses every model, each model at one provider."""
BATCH = 100_000
AGAIN = 7
AUTH = {"plugin": "anonymous", "roles": ["member", "viewer"]}
MONTH = f"start_time={START}&end_time={START + DAYS * 86_400}&limit=31"
QUESTIONS = {
    "a month by day and model": f"/v1/organization/usage/completions?{MONTH}&group_by=model",
    "costs of a month by day and project": f"/v1/organization/costs?{MONTH}&group_by=project_id",
    "costs of a month by day and line item": f"/v1/organization/costs?{MONTH}&group_by=line_item",
    "a month by day and key": f"/v1/organization/usage/completions?{MONTH}&group_by=api_key_id",
    "a month by day, one key": f"/v1/organization/usage/completions?{MONTH}&api_key_ids=key-7-1",
    "a day by hour and model": f"/v1/organization/usage/completions?start_time={START}"
    f"&end_time={START + 86_400}&bucket_width=1h&group_by=model",
    "summary of a month by model, with latencies": f"/v1/usage/summary?start_time={START}"
    f"&end_time={START + DAYS * 86_400}&group_by=model",
    "the same by key": f"/v1/usage/summary?start_time={START}&end_time={START + DAYS * 86_400}&group_by=api_key_id",
    "the same of one key": f"/v1/usage/summary?start_time={START}&end_time={START + DAYS * 86_400}&api_key_ids=key-7-1",
    "the newest 100 calls": "/v1/usage/calls?limit=100",
    "100 calls from the middle of the month": f"/v1/usage/calls?limit=100&end_time={START + DAYS * 43_200}",
    "the newest 100 calls of a key": "/v1/usage/calls?limit=100&api_key_ids=key-7-1",
    "the calls of a key that has made none": "/v1/usage/calls?limit=100&api_key_ids=key-0",
}

# Made in SQLite: a hundred thousand rows at once, spread over the month by the millisecond (a row's number times
# nanoseconds would not fit 64 bits).
_MAKE = f"""
WITH RECURSIVE n (i) AS (SELECT ? UNION ALL SELECT i + 1 FROM n WHERE i + 1 < ?),
     h AS (SELECT i, (i * 2654435761) % 4294967296 AS a FROM n),
     r AS (SELECT i, a, (a >> 7) % 65536 AS b, (a >> 24) % {TENANTS} AS t, (a >> 16) % {KEYS} AS k,
           (a >> 9) % {MODELS} AS m FROM h)
INSERT INTO receipts ({", ".join(rows.COLUMNS)})
SELECT
    printf('%016x-%08x', i, a), wall, strftime('%Y-%m-%d', wall / 1000000000, 'unixepoch'), 'tenant-' || t,
    'project-' || (k % 2), 'key-' || t || '-' || k, 'user-' || (b % 997),
    'chat', 'model-' || m, 'provider-' || (m % {PROVIDERS}), 'model-' || m,
    CASE WHEN b % 50 = 0 THEN 'failed' ELSE 'complete' END, CASE WHEN b % 50 = 0 THEN 502 ELSE 200 END, NULL, b % 2, 'off',
    100 + a % 4000, 0, 0, 0, 50 + b % 900, 0, 0, 0, '{{}}', 'provider', NULL,
    (100 + a % 4000) * 150000 + (50 + b % 900) * 600000, 'exact', '*/model', 0,
    1000 + b, 20000 + a % 3000000, 200, 2000, 'v1', '{{}}', '[]'
FROM (SELECT *, {START}000000000 + i * {DAYS * 86_400}000 / ? * 1000000 AS wall FROM r)
"""  # noqa: E501


# The same in PostgreSQL, where a sum of wider numbers is no matter and an id has its time in it.
_MAKE_POSTGRES = f"""
INSERT INTO {postgres_writing.GIVEN} ({", ".join(rows.COLUMNS)})
SELECT
    substr(ms, 1, 8) || '-' || substr(ms, 9) || '-7000-8000-' || lpad(to_hex(i), 12, '0'), wall,
    to_char(to_timestamp(wall / 1000000000), 'YYYY-MM-DD'), 'tenant-' || t, 'project-' || (k % 2),
    'key-' || t || '-' || k, 'user-' || (b % 997),
    'chat', 'model-' || m, 'provider-' || (m % {PROVIDERS}), 'model-' || m,
    CASE WHEN b % 50 = 0 THEN 'failed' ELSE 'complete' END, CASE WHEN b % 50 = 0 THEN 502 ELSE 200 END, NULL,
    b % 2 = 1, 'off', 100 + a % 4000, 0, 0, 0, 50 + b % 900, 0, 0, 0, '{{}}', 'provider', NULL,
    (100 + a % 4000) * 150000 + (50 + b % 900) * 600000, 'exact', '*/model', 0,
    1000 + b, 20000 + a % 3000000, 200, 2000, 'v1', '{{}}', '[]'
FROM (
    SELECT *, lpad(to_hex(wall / 1000000), 12, '0') AS ms, (a >> 7) % 65536 AS b, (a >> 24) % {TENANTS} AS t,
           (a >> 16) % {KEYS} AS k, (a >> 9) % {MODELS} AS m
    FROM (
        SELECT i, (i * 2654435761) % 4294967296 AS a, {START}000000000 + i * {DAYS * 86_400}000 / $3 * 1000000 AS wall
        FROM generate_series($1::bigint, $2::bigint - 1) AS i
    ) AS n
) AS r
"""


def generate(store: Store, receipts: int) -> None:
    """Write a ledger of so many receipts over a month, in the order of their times, with its roll-ups."""
    if isinstance(store, PostgresStore):
        _in_postgres(store, receipts)
    elif isinstance(store, SqliteStore):
        _in_sqlite(store.path, receipts)


def _in_sqlite(path: Path, receipts: int) -> None:
    database = schema.connect(path)
    database.execute("PRAGMA synchronous = OFF")
    for first in range(0, receipts, BATCH):
        database.execute("BEGIN IMMEDIATE")
        last = writing.last_row(database)
        database.execute(_MAKE, (first, min(first + BATCH, receipts), receipts))
        writing.roll_up(database, last)
        database.execute("COMMIT")
    database.close()


def _in_postgres(store: PostgresStore, receipts: int) -> None:
    store.connect()
    line = PostgresLine.opened(store.url.reveal(), "qlens benchmark")

    async def make(connection: Any) -> None:
        await connection.execute(postgres_writing.CREATE_GIVEN)
        await connection.execute("SET work_mem = '256MB'; SET temp_buffers = '256MB'; SET synchronous_commit = off")
        await postgres_schema.add_partitions(connection, [Month.at(START)])
        for first in range(0, receipts, BATCH):
            async with connection.transaction():
                await connection.execute(_MAKE_POSTGRES, first, min(first + BATCH, receipts), receipts)
                await postgres_writing.add(connection)
        # As autovacuum does it in time.
        await connection.execute("VACUUM ANALYZE")

    line.run(make(line.connection), math.inf)
    line.close()
    store.close()


async def asked(url: str) -> dict[str, list[float]]:
    """The milliseconds of each answer, as a client sees them."""
    config = {
        "pipeline": {"auth": [AUTH], "cost": [{"plugin": "ledger", "url": url}]},
        "providers": {"echo": {"plugin": "echo"}},
        "models": {"echo": {"targets": [{"provider": "echo", "model": "echo"}]}},
    }
    took: dict[str, list[float]] = {}
    async with running(orjson.dumps(config).decode()) as gateway:
        for name, question in QUESTIONS.items():
            for _ in range(AGAIN):
                begun = time.perf_counter()
                answer = await gateway.get(question)
                took.setdefault(name, []).append((time.perf_counter() - begun) * 1000)
                assert answer.status == 200, answer.text
    return took


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("receipts", type=int, nargs="?", default=200_000)
    parser.add_argument("--folder", type=Path, help="where the SQLite ledger is made, and left")
    parser.add_argument("--postgres", action="store_true", help="in a PostgreSQL of its own")
    parser.add_argument("--url", help="in an empty database that is there, which is left full")
    args = parser.parse_args()
    with ExitStack() as stack:
        if args.postgres:
            # As it comes, but for its memory: a tenth of what a server for it would have.
            server = stack.enter_context(postgres_server(fsync="on", full_page_writes="on", shared_buffers="256MB"))
            url = server.url(server.new_database())
        else:
            folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            url = args.url or f"sqlite:///{folder}/analytics.db"
        measure(url, args.receipts)


def measure(url: str, receipts: int) -> None:
    """Make the ledger, ask, print."""
    store = store_at(Url(url), Path())
    begun = time.perf_counter()
    generate(store, receipts)
    seconds = time.perf_counter() - begun
    days = store.reading(60).run(lambda database: database.one("SELECT count(*) FROM usage_days"))
    store.close()
    print(
        f"{receipts:,} receipts in {type(store).__name__} in {seconds:.1f} s, {days[0] if days else 0:,} rows by day\n"
    )
    # What others do on the machine meanwhile is in the times too.
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs\n")
    print("| question | median ms | slowest ms |\n|---|---|---|")
    for name, took in asyncio.run(asked(url)).items():
        print(f"| {name} | {statistics.median(took):.1f} | {max(took):.1f} |")
    print(f"\nlargest memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


if __name__ == "__main__":
    main()
