"""Roll-ups: what calls used and cost, summed up by hour and by day in the transaction that writes their receipts."""

from __future__ import annotations

import sqlite3

from qlens_plugins.cost.ledger.rows import BUCKETS

HALF = 10**9
"""Sums may need more than 64 bits (money in picodollars from 9.2 million USD on), so each is kept as two whole numbers:
`_high` of this many and `_low` below it."""
HOUR, DAY = 3600, 86_400
TABLES = {HOUR: "usage_hours", DAY: "usage_days"}
"""By the seconds that one row sums up."""

GROUPS = ("tenant", "project", "key_id", "operation", "model", "provider")
"""What calls are told apart by. Groups have no NULL, so that they are found again: there nothing is an empty text."""
COUNTS = {
    "calls": "1",
    "failed": "outcome IN ('failed', 'cut')",
    "abandoned": "outcome = 'abandoned'",
    "blocked": "outcome = 'blocked'",
    "cached": "cache IN ('hit', 'semantic')",
    "estimated": "cost_picos IS NOT NULL AND cost_state = 'estimated'",
    "unpriced": "cost_picos IS NULL",
}
"""How many of the calls: the name, and when a receipt is one of them."""


def _meter(name: str) -> str:
    return f"CASE meters WHEN '{{}}' THEN 0 ELSE CAST(ifnull(json_extract(meters, '$.{name}'), 0) AS INTEGER) END"


SUMS = {
    **{name: name for name in BUCKETS},
    **{name: _meter(name) for name in ("images", "seconds", "characters")},
    "cost": "ifnull(cost_picos, 0)",
    "saved": "saved_picos",
}
"""How much in all: the name, and what of a receipt is added; money in picodollars."""

STEPS = 4
"""Latencies are counted in ranges of a fixed scale: this many to each doubling, so that a range is 1/4 wide at most."""
_TOP = 36
"""Latencies of 2**36 microseconds (19 hours) and more are in the last range."""


def _range_of(microseconds: str) -> str:
    """The number of a latency's range in SQL, where no logarithm can be relied on."""
    doublings = (
        f"WHEN {microseconds} < {2 ** (e + 1)} THEN {(e - 1) * STEPS} + (({microseconds} >> {e - 2}) & {STEPS - 1})"
        for e in range(3, _TOP)
    )
    return (
        f"CASE WHEN {microseconds} < 0 THEN 0 WHEN {microseconds} < {2 * STEPS} THEN {microseconds} "
        f"{' '.join(doublings)} ELSE {(_TOP - 1) * STEPS} END"
    )


LATENCY = _range_of("total_us")


def middle(number: int) -> int:
    """The middle of a latency's range, in microseconds: off by 1/8 at most."""
    if number < 2 * STEPS:
        return number
    doubling, step = divmod(number, STEPS)
    width = 1 << (doubling - 1)
    return (STEPS + step) * width + width // 2


# --- writing -----------------------------------------------------------------------------------

_DIMENSIONS = [name if name in {"tenant", "operation"} else f"ifnull({name}, '')" for name in GROUPS]
_NEW = "receipts.rowid > ?"
# CROSS: from the new receipts to their groups, never the other way round.
_GROUPED = "FROM receipts CROSS JOIN usage_groups ON " + " AND ".join(
    f"usage_groups.{name} = {value.replace(name, f'receipts.{name}')}"
    for name, value in zip(GROUPS, _DIMENSIONS, strict=True)
)
# Only names from above are put into these statements.
_ADD_GROUPS = (
    f"INSERT INTO usage_groups ({', '.join(GROUPS)}) SELECT DISTINCT {', '.join(_DIMENSIONS)} "  # noqa: S608
    f"FROM receipts WHERE {_NEW} ON CONFLICT DO NOTHING"
)


def _started(seconds: int) -> str:
    return f"wall_ns / {seconds * 10**9} * {seconds}"


def _add(seconds: int) -> str:
    columns = ["start", "group_id", *COUNTS, *(f"{name}_{half}" for name in SUMS for half in ("high", "low"))]
    values = [_started(seconds), "usage_groups.id", *(f"sum({condition})" for condition in COUNTS.values())]
    changes = [f"{name} = {name} + excluded.{name}" for name in COUNTS]
    for name, term in SUMS.items():
        low = f"sum(({term}) % {HALF})"
        values += [f"sum(({term}) / {HALF}) + {low} / {HALF}", f"{low} % {HALF}"]
        both = f"({name}_low + excluded.{name}_low)"
        changes.append(f"{name}_high = {name}_high + excluded.{name}_high + {both} / {HALF}")
        changes.append(f"{name}_low = {both} % {HALF}")
    return (
        f"INSERT INTO {TABLES[seconds]} ({', '.join(columns)}) SELECT {', '.join(values)} "
        f"{_GROUPED} WHERE {_NEW} GROUP BY 1, 2 ON CONFLICT (start, group_id) DO UPDATE SET {', '.join(changes)}"
    )


_ADD_LATENCIES = (
    f"INSERT INTO usage_latencies (start, group_id, latency, calls) SELECT {_started(DAY)}, usage_groups.id, "
    f"{LATENCY}, count(*) {_GROUPED} WHERE {_NEW} GROUP BY 1, 2, 3 "
    "ON CONFLICT (start, group_id, latency) DO UPDATE SET calls = calls + excluded.calls"
)
_STATEMENTS = (_ADD_GROUPS, _add(HOUR), _add(DAY), _ADD_LATENCIES)


def last_row(database: sqlite3.Connection) -> int:
    """The last row of the receipts; those that are inserted after it get higher numbers."""
    found: int | None = database.execute("SELECT max(rowid) FROM receipts").fetchone()[0]
    return found or 0


def add(database: sqlite3.Connection, before: int) -> None:
    """Add the receipts that were inserted after a row: of those that are already there, nothing is counted again.

    Belongs in the transaction that inserts them. Receipts that a gateway of an older version, which knows no roll-ups,
    has meanwhile written to the file are added too.
    """
    (rolled,) = database.execute("SELECT receipt FROM usage_rolled").fetchone()
    # Lower than what was rolled up when receipts were deleted from the end: their numbers are given again.
    after = min(rolled, before)
    last = last_row(database)
    if last > after:
        for statement in _STATEMENTS:
            database.execute(statement, (after,))
    if last != rolled:
        database.execute("UPDATE usage_rolled SET receipt = ?", (last,))
