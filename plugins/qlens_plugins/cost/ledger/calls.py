"""The calls themselves: a list of them, one with its attempts, and all of them as a file."""

from __future__ import annotations

import csv
import io
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

import orjson
from attrs import frozen

from qlens import Call, InvalidRequest, Reply, usd
from qlens_plugins.cost.ledger import parameters
from qlens_plugins.cost.ledger.answers import NothingThere, json, written
from qlens_plugins.cost.ledger.hours import pieces
from qlens_plugins.cost.ledger.reader import Reader
from qlens_plugins.cost.ledger.rows import BUCKETS, LARGEST
from qlens_plugins.cost.ledger.store import Database, Found
from qlens_plugins.cost.ledger.sums import SECOND_NS, where
from qlens_plugins.cost.ledger.view import Where, narrowed

ROWS, MOST_ROWS = 20, 100
AT_ONCE = 500
"""Calls that an export reads at once, and sends before it reads more."""

_NO_CALL = "There is no such call."

Row = dict[str, Any]

FILTERS = {
    "tenants": "tenant",
    "project_ids": "project_id",
    "user_ids": "subject",
    "api_key_ids": "key_id",
    "models": "model",
    "providers": "provider",
    "operations": "operation",
    "outcomes": "outcome",
}
"""The parameters that narrow, and the dimension of each."""
OUTCOMES = ("complete", "cached", "failed", "abandoned", "rejected", "blocked", "cut")
TIMES: Mapping[str, parameters.Reader] = {"start_time": parameters.time, "end_time": parameters.time}
LISTS: Mapping[str, parameters.Reader] = {
    **dict.fromkeys(FILTERS, parameters.texts),
    "outcomes": parameters.some_of(OUTCOMES),
}

# As everywhere in the API, and not as in the table.
_RENAMED = {"key_id": "api_key_id", "subject": "user_id", "tier": "service_tier"}
_PLAIN = (
    *("id", "tenant", "project", "key_id", "subject", "operation", "model", "provider", "upstream_model"),
    *("outcome", "status", "error", "streamed", "cache", *BUCKETS, "meters", "usage_source", "tier"),
    *("cost_picos", "cost_state", "price_id", "saved_picos", "ttft_us", "total_us", "overhead_us", "bytes_out"),
    *("config_version", "tags", "wall_ns"),
)
_COLUMNS = ", ".join(_PLAIN)
_FLAT = (
    *("time", "id", "tenant", "project", "api_key_id", "user_id", "operation", "model", "provider"),
    *("upstream_model", "outcome", "status", "error", "streamed", "cache", *BUCKETS, "meters", "usage_source"),
    *("service_tier", "cost_usd", "cost_state", "price_id", "saved_usd", "ttft_us", "total_us", "overhead_us"),
    *("bytes_out", "config_version", "tags"),
)
"""The columns of a table of calls."""
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


@frozen
class Asked:
    """Which calls: of a time in Unix nanoseconds, narrowed; after a place, the newest first."""

    where: Where
    start_ns: int
    end_ns: int
    place: tuple[int, str] | None = None
    """The time and the id of the call after which to go on."""


def asked_of(found: Mapping[str, Any], own: Where) -> Asked:
    """Which calls the parameters mean, of those that may be seen."""
    conditions = {FILTERS[name]: found[name] for name in FILTERS if name in found}
    start, end = found.get("start_time", 0), found.get("end_time")
    if end is not None and end <= start:
        raise parameters.wrong("end_time", "must be after `start_time`")
    return Asked(narrowed(own, conditions), start * SECOND_NS, LARGEST if end is None else end * SECOND_NS)


# --- one page, one call ------------------------------------------------------------------------


async def listed(call: Call, reader: Reader, own: Where) -> Reply:
    """A part of the list, the newest call first."""
    ones = {**TIMES, "limit": parameters.number(1, MOST_ROWS), "after": parameters.text}
    found = parameters.asked(call, ones, LISTS)
    asked, limit = asked_of(found, own), found.get("limit", ROWS)
    rows = await reader.ask(partial(_page, asked, own, found.get("after"), limit + 1))
    data = [{"object": "usage.call", **_whole(row)} for row in rows[:limit]]
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    more = len(rows) > limit
    return json({"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": more})


async def one(call: Call, reader: Reader, own: Where) -> Reply:
    """One call, with its attempts."""
    parameters.asked(call, {})
    id_ = call.path_params["id"]
    if not id_.isprintable():  # no call is called so, and PostgreSQL would not take the question
        raise NothingThere(_NO_CALL)

    def read(database: Database) -> Found | None:
        conditions, values = where(own, database.dialect, receipts=True)
        sql = f"SELECT {_COLUMNS}, attempts FROM receipts WHERE id = ?{conditions}"  # noqa: S608 - only names from above
        return database.one(sql, [id_, *values])

    row = await reader.ask(read)
    if row is None:
        raise NothingThere(_NO_CALL)
    return json({"object": "usage.call", **_whole(row[:-1]), "attempts": orjson.Fragment(row[-1])})


def _page(asked: Asked, own: Where, after: str | None, limit: int, database: Database) -> Sequence[Found]:
    """Calls after a place in the list; new ones are before it, so that walking on loses and doubles none."""
    place = asked.place
    if after is not None:
        conditions, values = where(own, database.dialect, receipts=True)
        sql = f"SELECT wall_ns FROM receipts WHERE id = ?{conditions}"  # noqa: S608 - only names from above
        found = database.one(sql, [after, *values])
        if found is None:
            raise InvalidRequest("There is no call that is called as `after` says.", param="after")
        place = (found[0], after)
    conditions, values = where(asked.where, database.dialect, receipts=True)
    given: list[str | int] = [*values]
    end_ns = asked.end_ns
    if place is not None:
        conditions += " AND (wall_ns < ? OR id < ?)"
        given += place
        end_ns = min(end_ns, place[0] + 1)
    sql = (
        f"SELECT {_COLUMNS} FROM receipts WHERE wall_ns >= ? AND wall_ns < ?{conditions} "  # noqa: S608 - names
        "ORDER BY wall_ns DESC, id DESC LIMIT ?"
    )
    rows: list[Found] = []
    for piece in pieces(database, asked.where, asked.start_ns, end_ns):
        rows += database.rows(sql, [*piece, *given, limit - len(rows)])
        if len(rows) == limit:
            break
    return rows


def _whole(row: Sequence[Any]) -> Row:
    """A receipt as the API shows it: money as decimal text, what was not used left out."""
    told = dict(zip(_PLAIN, row, strict=True))
    wall_ns, cost, saved = told.pop("wall_ns"), told.pop("cost_picos"), told.pop("saved_picos")
    used = {name: told.pop(name) for name in BUCKETS}
    meters, tags = orjson.Fragment(told.pop("meters")), orjson.Fragment(told.pop("tags"))
    shown = {_RENAMED.get(name, name): value for name, value in told.items()}
    return {
        **shown,
        "created_at": wall_ns // SECOND_NS,
        "time": _time(wall_ns),
        "streamed": bool(told["streamed"]),
        "usage": {name: count for name, count in used.items() if count},
        "meters": meters,
        "cost_usd": None if cost is None else usd(cost),
        "saved_usd": usd(saved),
        "tags": tags,
    }


def _time(wall_ns: int) -> str:
    seconds, rest = divmod(wall_ns, SECOND_NS)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{rest // 1000:06}Z"


# --- all of them -------------------------------------------------------------------------------


async def exported(call: Call, reader: Reader, own: Where) -> Reply:
    """All calls that are meant, as lines of CSV or of JSON, the newest first; sent as they are read."""
    found = parameters.asked(call, {**TIMES, "format": parameters.one_of(_FORMATS)}, LISTS)
    format_ = found.get("format", "csv")
    head, lines, media_type = _FORMATS[format_]
    headers = {
        "content-type": media_type,
        "content-disposition": f'attachment; filename="usage.{format_}"',
        "cache-control": "no-store",
    }
    return Reply(headers=headers, chunks=_chunks(asked_of(found, own), reader, head, lines), raw=True)


async def _chunks(
    asked: Asked, reader: Reader, head: bytes, lines: Callable[[Sequence[Found]], bytes]
) -> AsyncGenerator[bytes]:
    place, begun = None, False
    while True:
        here = Asked(asked.where, asked.start_ns, asked.end_ns, place)

        # The lines are made there too: five hundred of them would keep the event loop.
        def read(database: Database, here: Asked = here) -> tuple[bytes, tuple[int, str] | None]:
            rows = _page(here, {}, None, AT_ONCE, database)
            end = (rows[-1][-1], rows[-1][0]) if len(rows) == AT_ONCE else None
            return lines(rows), end

        piece, place = await reader.ask(read)
        yield piece if begun else head + piece
        begun = True
        if place is None:
            return


def _csv(rows: Sequence[Found]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\r\n")
    for row in rows:
        told = dict(zip(_PLAIN, row, strict=True))
        cost = told["cost_picos"]
        told |= {
            "time": _time(told["wall_ns"]),
            "cost_usd": "" if cost is None else usd(cost),
            "saved_usd": usd(told["saved_picos"]),
            "streamed": int(told["streamed"]),
            **{new: told[old] for old, new in _RENAMED.items()},
        }
        writer.writerow([_cell(told[name]) for name in _FLAT])
    return text.getvalue().encode("utf-8", "replace")


def _cell(value: Any) -> Any:
    """A value; a text that a spreadsheet would run as a formula is marked as text."""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def _jsonl(rows: Sequence[Found]) -> bytes:
    return b"".join(written(_whole(row)) + b"\n" for row in rows)


_FORMATS = {
    "csv": ((",".join(_FLAT) + "\r\n").encode(), _csv, "text/csv; charset=utf-8"),
    "jsonl": (b"", _jsonl, "application/jsonl"),
}
