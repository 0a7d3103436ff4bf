"""In which hours there are calls, as the roll-ups tell: those who look for few of many need not read all receipts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from qlens_plugins.cost.ledger.rollups import DAY, HOUR, TABLES
from qlens_plugins.cost.ledger.store import Database
from qlens_plugins.cost.ledger.sums import SECOND_NS, Question, is_rolled, where, with_groups
from qlens_plugins.cost.ledger.view import Where

MONTH = 31 * DAY
"""So many days are looked through at once: mostly the newest calls are meant, and there may be years of older ones."""


def pieces(database: Database, conditions: Where, start_ns: int, end_ns: int) -> Iterator[tuple[int, int]]:
    """The pieces of a time, in Unix nanoseconds, that may have calls which are meant: the newest first, none twice.

    Where roll-ups know nothing of the conditions, it is all of the time.
    """
    known = {name: values for name, values in conditions.items() if is_rolled(name)}
    if not known:
        yield start_ns, end_ns
        return
    for hour in _hours(database, known, start_ns // SECOND_NS, -(-end_ns // SECOND_NS)):
        yield max(hour * SECOND_NS, start_ns), min((hour + HOUR) * SECOND_NS, end_ns)


def has_calls(database: Database, conditions: Mapping[str, tuple[str, ...]], start: int, end: int) -> bool:
    """Whether an hour that has a part in a time, in Unix seconds, may have calls that are meant."""
    known = {name: values for name, values in conditions.items() if is_rolled(name)}
    return next(_hours(database, known, start, end), None) is not None


def _hours(database: Database, conditions: Where, start: int, end: int) -> Iterator[int]:
    # Each by itself: then SQLite looks into the index alone.
    found = database.rows("SELECT (SELECT min(start) FROM usage_days), (SELECT max(start) FROM usage_days)")
    ((first, last),) = found
    if first is None:
        return
    start, end = max(start, first), min(end, last + DAY)
    while start < end:
        since = max(start, (end - MONTH) // DAY * DAY)
        for day in _starts(database, DAY, Question(since, end, where=conditions)):
            yield from _starts(database, HOUR, Question(max(day, since), min(day + DAY, end), where=conditions))
        end = since


def _starts(database: Database, seconds: int, question: Question) -> list[int]:
    """When the roll-ups begin that have such calls and are in the time, be it with a part; the newest first."""
    conditions, values = where(question.where, database.dialect, receipts=False)
    found = database.rows(
        f"SELECT DISTINCT start FROM {with_groups(TABLES[seconds], question, database.dialect)} "  # noqa: S608 - names
        f"WHERE start >= ? AND start < ?{conditions} ORDER BY 1 DESC",
        [question.start // seconds * seconds, question.end, *values],
    )
    return [start for (start,) in found]
