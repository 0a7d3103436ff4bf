"""What a ledger is made of is checked value by value, whatever file it comes from: SQLite takes anything.

All of it raises KeyError, TypeError and ValueError, the last with the column that is wrong.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from attrs import frozen

from qlens_plugins.cost.ledger.rollups import COUNTS, DAY, GROUPED, SUMS, TABLES
from qlens_plugins.cost.ledger.rows import BUCKETS, COLUMNS, LARGEST, OPTIONAL, Rejection, Row
from qlens_plugins.cost.ledger.store import Rest
from qlens_plugins.cost.ledger.sums import SECOND_NS

KEY = ("day", "tenant", "operation", "model", "status", "error")
"""What refused calls are counted by."""
_INTEGERS = {
    *("wall_ns", "status", "cost_picos", "saved_picos", "ttft_us", "total_us", "overhead_us", "bytes_out"),
    *BUCKETS,
}
_JSON: dict[str, type] = {"meters": dict, "tags": dict, "attempts": list}
_RECEIPT: dict[str, type] = {
    name: bool if name == "streamed" else int if name in _INTEGERS else str for name in COLUMNS
}
_REJECTION: dict[str, type] = {name: int if name in {"status", "calls"} else str for name in (*KEY, "calls")}
_GROUP: dict[str, type] = dict.fromkeys(GROUPED, str)
_SAID = {bool: "true or false", int: f"a whole number from 0 to {LARGEST}", str: "a text"}
_WHOLE = re.compile(r"-?[0-9]{1,100}")


def receipt(said: Mapping[str, Any]) -> Row:
    """The row of a receipt."""
    _check(said, _RECEIPT, OPTIONAL)
    return tuple(said[name] for name in COLUMNS)


def rejection(said: Mapping[str, Any]) -> tuple[Rejection, int]:
    """A count of refused calls."""
    _check(said, _REJECTION, OPTIONAL)
    return key([said[name] for name in KEY]), said["calls"]


def key(found: Sequence[Any]) -> Rejection:
    """What a count of refused calls is of, by the values of KEY."""
    day, tenant, operation, model, status, error = found[: len(KEY)]
    return day, tenant, operation, model, status, error


def rest(said: Mapping[str, Any]) -> Rest:
    """What roll-ups say beyond the receipts; sums are texts, as JSON has no numbers of more than 64 bits."""
    for value in said["sums"].values():
        if not _WHOLE.fullmatch(value):
            raise ValueError(f"{value!r} is no sum")
    latencies = said.get("latencies", {})
    _check(said, {"start": int, **_GROUP})
    _whole(latencies, latencies)
    values = {name: int(value) for name, value in said["sums"].items()}
    if said["seconds"] not in TABLES or not {*COUNTS, *SUMS}.issuperset(values):
        raise ValueError("it has sums that this QLens does not know")
    group = tuple(said[name] for name in GROUPED)
    return Rest(said["seconds"], said["start"], group, values, {int(number): n for number, n in latencies.items()})


def kept_since_ns(said: Mapping[str, Any], name: str = "kept_since_ns") -> int:
    """From when on all receipts are there."""
    _check(said, {name: int})
    return int(said[name])


def _check(said: Mapping[str, Any], kinds: Mapping[str, type], optional: Collection[str] = ()) -> None:
    for name, kind in kinds.items():
        value = said[name]
        if value is None and name in optional:
            continue
        if not _fits(value, kind):
            raise ValueError(f"{name} is {value!r:.40} and must be {_SAID[kind]}")
        if name in _JSON and not _is_json(name, value):
            raise ValueError(f"{name} is {value!r:.40} and must be JSON of its kind")


def _fits(value: object, kind: type) -> bool:
    """Whether it is of a kind, and in the range of a column."""
    if kind is int:
        return type(value) is int and 0 <= value <= LARGEST
    return type(value) is kind


def _is_json(name: str, text: str) -> bool:
    """Whether it is what a column has."""
    kind = _JSON[name]
    if text in {"{}", "[]"}:
        return text == ("{}" if kind is dict else "[]")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return False
    if kind is list:
        return isinstance(found, list) and all(isinstance(each, dict) for each in found)
    if not isinstance(found, dict):
        return False
    return name != "meters" or all(type(each) is int and each >= 0 for each in found.values())


def _whole(said: Mapping[str, Any], names: Iterable[str]) -> None:
    """Whole numbers, which may be negative: roll-ups may say less than the receipts."""
    for name in names:
        if type(said[name]) is not int:
            raise ValueError(f"{name} is {said[name]!r:.40} and must be a whole number")


# --- an SQLite file ------------------------------------------------------------------------------


@frozen
class _Table:
    name: str
    row: tuple[str, ...]
    """What names a row of it."""
    columns: tuple[str, ...]
    check: Callable[[Mapping[str, Any]], object]
    is_rolled: bool = False
    """Whether only the days matter of which receipts were deleted."""


def _receipt_in_sqlite(said: Mapping[str, Any]) -> None:
    receipt({**said, "streamed": flag(said["streamed"])})


def flag(value: object) -> object:
    """What SQLite has of true and false, which it keeps as numbers; anything else is left as it is."""
    return bool(value) if type(value) is int and value in (0, 1) else value


def _sums(said: Mapping[str, Any]) -> None:
    _check(said, {"start": int})
    _whole(said, said)


_HALVES = tuple(f"{name}_{half}" for name in SUMS for half in ("high", "low"))
_LATENCY = ("start", "group_id", "latency")
_KEPT = _Table("receipts_kept", ("rowid",), ("since_ns",), lambda said: kept_since_ns(said, "since_ns"))
_TABLES = (
    _Table("receipts", ("rowid",), COLUMNS, _receipt_in_sqlite),
    _Table("rejections", KEY, (*KEY, "calls"), rejection),
)
_ROLLED = (
    _Table("usage_groups", ("id",), GROUPED, lambda said: _check(said, _GROUP)),
    *(
        _Table(table, ("start", "group_id"), ("start", "group_id", *COUNTS, *_HALVES), _sums, is_rolled=True)
        for table in TABLES.values()
    ),
    _Table("usage_latencies", _LATENCY, (*_LATENCY, "calls"), _sums, is_rolled=True),
)


def sqlite_file(database: sqlite3.Connection) -> None:
    """All values of an SQLite ledger that a new one is made of: roll-ups alone where receipts were deleted."""
    _check_table(database, _KEPT, 0)
    ((since_ns,),) = database.execute("SELECT ifnull(max(since_ns), 0) FROM receipts_kept")
    for table in (*_TABLES, *(_ROLLED if since_ns else ())):
        _check_table(database, table, since_ns)


def _check_table(database: sqlite3.Connection, table: _Table, since_ns: int) -> None:
    columns, count = (*table.row, *table.columns), len(table.row)
    sql, values = f"SELECT {', '.join(columns)} FROM {table.name}", []  # noqa: S608 - names from the code
    if table.is_rolled:
        # What is no number stands behind all numbers.
        sql += " WHERE start < ? OR typeof(start) <> 'integer'"
        values = [-(-since_ns // (DAY * SECOND_NS)) * DAY]
    for found in database.execute(sql, values):
        try:
            table.check(dict(zip(table.columns, found[count:], strict=True)))
        except ValueError as error:
            row = ", ".join(f"{name} {value!r:.60}" for name, value in zip(table.row, found, strict=False))
            raise ValueError(f"{table.name}, row with {row}: {error}") from error


def text(raw: bytes) -> str | bytes:
    """A text of SQLite's; one that is no UTF-8 stays bytes, which no column may have."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw
