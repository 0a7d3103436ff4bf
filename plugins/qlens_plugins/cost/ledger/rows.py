"""Receipts as rows of the ledger's tables."""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime

from qlens import Attempt, Receipt, Usage, usd

log = logging.getLogger("qlens.ledger")

LARGEST = 2**63 - 1
"""SQLite's integers have 64 bits: 9.2 million USD in picodollars."""

Rejection = tuple[str, str, str, str, int, str]
"""Day, tenant, operation, model, status, error: what refused calls are counted by."""
Row = tuple[str | int | None, ...]

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

# Not INSERT OR IGNORE: that would also swallow a row for a missing value.
_INSERT = (
    f"INSERT INTO receipts ({', '.join(COLUMNS)}) VALUES ({', '.join('?' * len(COLUMNS))}) "  # noqa: S608
    "ON CONFLICT (id) DO NOTHING"
)
_COUNT = (
    "INSERT INTO rejections (day, tenant, operation, model, status, error, calls) VALUES (?, ?, ?, ?, ?, ?, ?) "
    "ON CONFLICT (day, tenant, operation, model, status, error) DO UPDATE SET calls = calls + excluded.calls"
)


def insert(database: sqlite3.Connection, rows: Iterable[Row], rejections: Mapping[Rejection, int]) -> None:
    """Write receipts, each once however often it is given, and add to the counts of refused calls."""
    database.executemany(_INSERT, rows)
    database.executemany(_COUNT, ((*key, calls) for key, calls in rejections.items()))


def rejection(receipt: Receipt) -> Rejection:
    """What a refused call is counted by: names from the configuration and codes, never a client's text."""
    return (
        _day(receipt.wall_ns),
        _text(receipt.caller.tenant),
        _text(receipt.operation),
        _text(receipt.model),
        receipt.status,
        _text(receipt.error),
    )


def row(receipt: Receipt) -> Row:
    """A receipt as a row; what SQLite cannot hold is made to fit, so that no value can spoil a batch."""
    caller, target, usage, cost = receipt.caller, receipt.target, receipt.usage, receipt.cost
    picos, state = cost.picos, cost.state
    if picos is not None and picos > LARGEST:
        log.error("ledger: receipt %s costs %s USD, more than a row can hold: cut off", receipt.id, usd(picos))
        picos, state = LARGEST, "estimated"
    return (
        _text(receipt.id),
        _integer(receipt.wall_ns),
        _day(receipt.wall_ns),
        _text(caller.tenant),
        _optional(caller.project),
        _optional(caller.key_id),
        _text(caller.subject),
        _text(receipt.operation),
        _optional(receipt.model),
        _optional(target and target.provider),
        _optional(target and target.model),
        _text(receipt.outcome),
        _integer(receipt.status),
        _optional(receipt.error),
        int(receipt.streamed),
        _text(receipt.cache),
        *(_integer(getattr(usage, bucket)) for bucket in BUCKETS),
        json.dumps(dict(usage.meters)),
        _text(usage.source),
        _optional(usage.tier),
        picos,
        _text(state),
        _optional(cost.price_id),
        _integer(receipt.saved_picos),
        None if receipt.ttft_us is None else _integer(receipt.ttft_us),
        _integer(receipt.total_us),
        _integer(receipt.overhead_us),
        _integer(receipt.bytes_out),
        _text(receipt.config_version),
        json.dumps(dict(receipt.tags)),
        json.dumps([_attempt(attempt) for attempt in receipt.attempts]),
    )


def _attempt(attempt: Attempt) -> dict[str, object]:
    cost = attempt.cost
    return {
        "n": attempt.n,
        "kind": attempt.kind,
        "provider": attempt.target.provider,
        "model": attempt.target.model,
        "status": attempt.status,
        "error": attempt.error,
        "first_byte_us": _micros(attempt.started, attempt.first_byte),
        "total_us": _micros(attempt.started, attempt.ended),
        "upstream_id": attempt.upstream_id,
        "billed": attempt.billed,
        "usage": None if attempt.usage is None else _usage(attempt.usage),
        "cost_usd": None if cost.picos is None else usd(cost.picos),
        "cost_state": cost.state,
        "price_id": cost.price_id,
        "cost_lines": cost.lines,
    }


def _usage(usage: Usage) -> dict[str, object]:
    """The buckets that were used."""
    used = {bucket: count for bucket in BUCKETS if (count := getattr(usage, bucket))}
    return {**used, **usage.meters, "source": usage.source}


def _micros(started: float, until: float | None) -> int | None:
    return None if until is None else round((until - started) * 1_000_000)


def _day(wall_ns: int) -> str:
    return datetime.fromtimestamp(wall_ns // 10**9, UTC).date().isoformat()


def _text(value: object) -> str:
    # A lone surrogate, which JSON can carry, is no text for SQLite.
    return "" if value is None else str(value).encode("utf-8", "replace").decode()


def _optional(value: object) -> str | None:
    return None if value is None else _text(value)


def _integer(value: int) -> int:
    return max(-LARGEST, min(int(value), LARGEST))
