"""What roll-ups say beyond the receipts that a ledger still has: all that is left of those it has deleted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from qlens_plugins.cost.ledger import sums
from qlens_plugins.cost.ledger.rollups import DAY, GROUPED, HOUR
from qlens_plugins.cost.ledger.store import Database, Rest
from qlens_plugins.cost.ledger.sums import SECOND_NS, Question, Sums


def kept_since_ns(database: Database) -> int:
    """From when on all receipts are there, in Unix nanoseconds; 0 when none was ever deleted."""
    kept = database.one("SELECT max(since_ns) FROM receipts_kept")
    return int(kept[0]) if kept and kept[0] else 0


def rests(database: Database) -> Iterator[Rest]:
    """What the roll-ups of the days before then say beyond the receipts, the oldest first, a day at a time."""
    since_ns = kept_since_ns(database)
    days = database.rows(
        f"SELECT DISTINCT start FROM usage_days WHERE start * {SECOND_NS} < ? ORDER BY start",  # noqa: S608 - a number
        [since_ns],
    )
    for (start,) in days:
        yield from _of(database, start, HOUR)
        yield from _of(database, start, DAY)


def _of(database: Database, day: int, seconds: int) -> Iterator[Rest]:
    question = Question(day, day + DAY, seconds, GROUPED)
    rolled, receipts = (dict(sums.part(database, question, table, day, day + DAY)) for table in (seconds, None))
    latencies: dict[tuple[str, ...], Counter[int]] = {}
    if seconds == DAY:
        for group, calls in sums.latencies(database, question, receipts=False).items():
            latencies[group] = Counter(calls)
        for group, calls in sums.latencies(database, question, receipts=True).items():
            latencies.setdefault(group, Counter()).subtract(calls)
    for key in sorted({*rolled, *receipts}):
        start, group = key
        mine, other = rolled.get(key, Sums.none()), receipts.get(key, Sums.none())
        left = {name: mine[name] - other[name] for name in question.names if mine[name] != other[name]}
        slow = {number: calls for number, calls in latencies.get(group, {}).items() if calls}
        if left or slow:
            yield Rest(seconds, start, group, left, slow)
