"""What the ledger's commands read of the past: whole days in UTC, and the calls of them, page by page."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from datetime import UTC, date, datetime
from functools import partial
from typing import TypeVar

from attrs import frozen

from qlens import StartupError
from qlens_plugins.cost.ledger.hours import has_calls
from qlens_plugins.cost.ledger.rests import kept_since_ns
from qlens_plugins.cost.ledger.rows import DAY_NS, LARGEST
from qlens_plugins.cost.ledger.store import Database, Found, Question, Store, StoreAway, Value
from qlens_plugins.cost.ledger.sums import SECOND_NS

AT_ONCE = 10_000
"""Calls that are read at once: no transaction lasts longer, whatever there is to read."""
SENT_AGAIN = "(attempts LIKE '%\"n\":2,%' OR attempts LIKE '%\"n\": 2,%')"
"""In SQL, whether a call was sent more than once."""

PAID = "(cost_picos IS NULL OR cost_picos <> 0 OR price_id IS NOT NULL OR usage_source <> 'none')"
"""In SQL, whether a provider is owed something: not where a cache answered, or all attempts failed."""

T = TypeVar("T")


@frozen
class Days:
    """From a day to another, both included; None: from the first on, to the last that there is."""

    first: date | None
    last: date | None

    @classmethod
    def of(cls, args: argparse.Namespace) -> Days:
        """Those that the command's arguments name; raises StartupError when there are none between them."""
        if args.first is not None and args.last is not None and args.first > args.last:
            raise StartupError(f"--from {args.first} is after --to {args.last}")
        return cls(args.first, args.last)

    def __contains__(self, day: date) -> bool:
        return (self.first is None or day >= self.first) and (self.last is None or day <= self.last)

    @property
    def times(self) -> tuple[int, int]:
        """In Unix nanoseconds: the first of them, and the first after them."""
        start = 0 if self.first is None else _nanoseconds(self.first)
        return start, LARGEST if self.last is None else _nanoseconds(self.last) + DAY_NS


def _nanoseconds(day: date) -> int:
    # Beyond what 64 bits can hold there are no calls.
    return max(0, min((day - date(1970, 1, 1)).days * DAY_NS, LARGEST - DAY_NS))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--from` and `--to`."""
    parser.add_argument("--from", dest="first", type=_day, metavar="DAY", help="first day, YYYY-MM-DD in UTC")
    parser.add_argument("--to", dest="last", type=_day, metavar="DAY", help="last day, YYYY-MM-DD in UTC")


def _day(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no day; write YYYY-MM-DD") from None


def ask(store: Store, question: Question[T]) -> T:
    """Ask a ledger, however long it takes; raises StartupError when it cannot be read."""
    try:
        return store.reading(math.inf).run(question)
    except StoreAway as error:
        raise StartupError(f"the ledger {store} cannot be read: {error}") from error


def check_kept(store: Store, days: Days) -> None:
    """Raise StartupError when receipts of the first day, or of a later one, were deleted."""
    if (since_ns := ask(store, partial(_deleted, days))) is not None:
        since = datetime.fromtimestamp(since_ns // 10**9, UTC)
        raise StartupError(
            f"receipts from before {since:%Y-%m-%d %H:%M} UTC were deleted: ask for days after it, --from"
        )


def _deleted(days: Days, database: Database) -> int | None:
    """From when on all receipts are there, when some of these days are not."""
    since_ns = kept_since_ns(database)
    start_ns, end_ns = days.times
    if start_ns >= since_ns:
        return None
    # Nobody says that there was anything before a day that was not named: the roll-ups do.
    end = min(end_ns, since_ns) // SECOND_NS
    return since_ns if days.first is not None or has_calls(database, {}, 0, end) else None


def calls(store: Store, columns: Sequence[str], days: Days, condition: str = "") -> Iterator[Found]:
    """The calls of some days, the oldest first: each with its time, its id and these columns."""
    sql = (
        f"SELECT wall_ns, id, {', '.join(columns)} FROM receipts WHERE wall_ns >= ? AND wall_ns < ? "  # noqa: S608
        f"AND (wall_ns > ? OR id > ?){condition} ORDER BY wall_ns, id LIMIT ?"
    )
    (start, end), last_id = days.times, ""
    while True:
        found = ask(store, partial(_rows, sql, (start, end, start, last_id, AT_ONCE)))
        yield from found
        if len(found) < AT_ONCE:
            return
        start, last_id = found[-1][:2]


def _rows(sql: str, values: Sequence[Value], database: Database) -> Sequence[Found]:
    return database.rows(sql, values)
