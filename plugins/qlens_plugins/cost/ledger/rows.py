"""Receipts as rows of the ledger's tables."""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from itertools import cycle

import orjson

from qlens import Attempt, Receipt, Usage, usd

log = logging.getLogger("qlens.ledger")

LARGEST = 2**63 - 1
"""SQLite's integers have 64 bits: 9.2 million USD in picodollars."""
AT_ONCE = 25
"""Rows in one statement. SQLite works without Python's lock, which changes hands once for each statement.

An SQLite before 3.32 takes 999 values in one.
"""
DAY_NS = 86_400 * 10**9

Rejection = tuple[str, str, str, str | None, int, str | None]
"""Day, tenant, operation, model, status, error: what refused calls are counted by."""
Value = str | int | None
Row = tuple[Value, ...]

BUCKETS = (
    "input",
    "cached_input",
    "cache_write_5m",
    "cache_write_1h",
    "output",
    "reasoning",
    "audio_in",
    "audio_out",
)
COLUMNS = (
    *("id", "wall_ns", "day", "tenant", "project", "key_id", "subject", "operation", "model", "provider"),
    *("upstream_model", "outcome", "status", "error", "streamed", "cache"),
    *BUCKETS,
    *("meters", "usage_source", "tier", "cost_picos", "cost_state", "price_id", "saved_picos"),
    *("ttft_us", "total_us", "overhead_us", "bytes_out", "config_version", "tags", "attempts"),
)

OPTIONAL = frozenset(
    ("project", "key_id", "model", "provider", "upstream_model", "error", "tier", "cost_picos", "price_id", "ttft_us")
)
"""The columns that may be NULL."""

# Not INSERT OR IGNORE: that would also swallow a row for a missing value.
_INSERT = f"INSERT INTO receipts ({', '.join(COLUMNS)}) VALUES "  # noqa: S608 - only names from above
_ROW = f"({', '.join('?' * len(COLUMNS))})"
_ONCE = " ON CONFLICT (id) DO NOTHING"
_COUNT = (
    "INSERT INTO rejections (day, tenant, operation, model, status, error, calls) VALUES (?, ?, ?, ?, ?, ?, ?) "
    "ON CONFLICT (day, tenant, operation, model, status, error) DO UPDATE SET calls = calls + excluded.calls"
)
_UNFIT = (OverflowError, UnicodeError, sqlite3.IntegrityError, sqlite3.InterfaceError, sqlite3.ProgrammingError)
"""What SQLite's module raises for a value that the database cannot hold."""


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


def rejection(receipt: Receipt) -> Rejection:
    """What a refused call is counted by: names from the configuration and codes, never a client's text."""
    return (
        _day(receipt.wall_ns // DAY_NS),
        receipt.caller.tenant,
        receipt.operation,
        receipt.model,
        receipt.status,
        receipt.error,
    )


def row(receipt: Receipt) -> Row:
    """A receipt as a row."""
    caller, target, usage, cost = receipt.caller, receipt.target, receipt.usage, receipt.cost
    picos, state = cost.picos, cost.state
    if picos is not None and picos > LARGEST:
        log.error("ledger: receipt %s costs %s USD, more than a row can hold: cut off", receipt.id, usd(picos))
        picos, state = LARGEST, "estimated"
    return (
        receipt.id,
        receipt.wall_ns,
        _day(receipt.wall_ns // DAY_NS),
        caller.tenant,
        caller.project,
        caller.key_id,
        caller.subject,
        receipt.operation,
        receipt.model,
        None if target is None else target.provider,
        None if target is None else target.model,
        receipt.outcome,
        receipt.status,
        receipt.error,
        receipt.streamed,
        receipt.cache,
        usage.input,
        usage.cached_input,
        usage.cache_write_5m,
        usage.cache_write_1h,
        usage.output,
        usage.reasoning,
        usage.audio_in,
        usage.audio_out,
        _json(usage.meters),
        usage.source,
        usage.tier,
        picos,
        state,
        cost.price_id,
        receipt.saved_picos,
        receipt.ttft_us,
        receipt.total_us,
        receipt.overhead_us,
        receipt.bytes_out,
        receipt.config_version,
        _json(receipt.tags),
        _json([_attempt(attempt) for attempt in receipt.attempts]),
    )


def _attempt(attempt: Attempt) -> dict[str, object]:
    target, cost = attempt.target, attempt.cost
    started, first_byte, ended = attempt.started, attempt.first_byte, attempt.ended
    return {
        "n": attempt.n,
        "kind": attempt.kind,
        "provider": target.provider,
        "model": target.model,
        "status": attempt.status,
        "error": attempt.error,
        "first_byte_us": None if first_byte is None else round((first_byte - started) * 1_000_000),
        "total_us": None if ended is None else round((ended - started) * 1_000_000),
        "upstream_id": attempt.upstream_id,
        "billed": attempt.billed,
        "usage": None if attempt.usage is None else _usage(attempt.usage),
        "cost_usd": None if cost.picos is None else usd(cost.picos),
        "cost_state": cost.state,
        "price_id": cost.price_id,
        "cost_lines": cost.lines,
    }


def _usage(usage: Usage) -> dict[str, object]:
    """The buckets that were used; spelled out, because a loop over their names takes five times as long."""
    used: dict[str, object] = {}
    if usage.input:
        used["input"] = usage.input
    if usage.cached_input:
        used["cached_input"] = usage.cached_input
    if usage.cache_write_5m:
        used["cache_write_5m"] = usage.cache_write_5m
    if usage.cache_write_1h:
        used["cache_write_1h"] = usage.cache_write_1h
    if usage.output:
        used["output"] = usage.output
    if usage.reasoning:
        used["reasoning"] = usage.reasoning
    if usage.audio_in:
        used["audio_in"] = usage.audio_in
    if usage.audio_out:
        used["audio_out"] = usage.audio_out
    used.update(usage.meters)
    used["source"] = usage.source
    return used


@lru_cache(maxsize=8)
def _day(days: int) -> str:
    return datetime.fromtimestamp(days * 86_400, UTC).date().isoformat()


def _json(value: object) -> str:
    try:
        return orjson.dumps(value, default=dict).decode()
    except TypeError:
        # It is stricter: no lone surrogates, no integers beyond 64 bits.
        return json.dumps(value, default=dict)


def _fit(column: str, value: object) -> Value:
    """A value as SQLite can hold it."""
    if value is None:
        return None if column in OPTIONAL else ""
    if isinstance(value, int):
        return max(-LARGEST, min(int(value), LARGEST))
    # A lone surrogate, which JSON can carry, is no text for SQLite.
    return str(value).encode("utf-8", "replace").decode()
