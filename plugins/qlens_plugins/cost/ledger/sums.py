"""Adds up what calls used and cost over a time: from roll-ups where they know, from receipts where they do not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from attrs import define, field, frozen

from qlens_plugins.cost.ledger.rollups import (
    COARSE,
    COARSE_TABLES,
    COUNTS,
    DAY,
    GROUPS,
    HOUR,
    LATENCY,
    SUMS,
    TABLES,
    terms,
)
from qlens_plugins.cost.ledger.store import Database, Dialect

SECOND_NS = 10**9
LAST_SECOND = 2**33
"""A time beyond all calls, in Unix seconds (the year 2242): nanoseconds up to it fit 64 bits."""

PROJECT_ID = "project_id"
# An id of OpenAI's kind: `acme/search`, or `acme` where the key says no project. Escaped, so that it has one meaning.
_PROJECT_ID = (
    "replace(replace({tenant}, '%', '%25'), '/', '%2F') || CASE {project} WHEN '' THEN '' ELSE '/' || {project} END"
)
_IN_RECEIPTS = {
    **{name: f"coalesce({name}, '')" for name in GROUPS},
    **{name: f"coalesce({name}, '')" for name in ("subject", "tier", "outcome")},
}
_IN_ROLLUPS = {name: name for name in GROUPS}
BATCHES = ("batch_chat", "batch_completions", "batch_embeddings", "batch_moderations", "batch_responses")
"""The operations of batches that are over."""
BATCH = "batch"
"""The dimension that is `true` for them."""
for _columns in (_IN_RECEIPTS, _IN_ROLLUPS):
    _columns["tags"] = "tags"
    _columns[BATCH] = "CASE WHEN operation IN ({}) THEN 'true' ELSE '' END".format(", ".join(map(repr, BATCHES)))
    _columns[PROJECT_ID] = _PROJECT_ID.format_map(_columns)
TAG = "tag:"
"""Before the name of a tag, where a dimension is named."""
FIRST = "first_attempt"
"""The dimension that says where a call was sent first: the beginning of its attempts' JSON, in receipts alone."""


@frozen
class Question:
    """What is to be added up: `[start, end)` in Unix seconds, by buckets of a width and by dimensions."""

    start: int
    end: int
    width: int | None = None
    """Seconds of a bucket; None: all of the time is one."""
    by: tuple[str, ...] = ()
    where: Mapping[str, tuple[str, ...]] = field(factory=dict, hash=False)
    """By dimension, the values that count."""
    names: tuple[str, ...] = (*COUNTS, *SUMS)
    """What is added up: each sum has its price where there are many rows."""


@define
class Sums:
    """What a group of calls used and cost, by names of COUNTS and SUMS; exact, of any size."""

    values: dict[str, int]

    @classmethod
    def none(cls) -> Sums:
        """No calls."""
        return cls(dict.fromkeys((*COUNTS, *SUMS), 0))

    def add(self, other: Sums) -> None:
        """Put another group into this one."""
        for name, value in other.values.items():
            self.values[name] += value

    def __getitem__(self, name: str) -> int:
        return self.values[name]

    @property
    def cost_picos(self) -> int | None:
        """What the priced calls cost; None when there are only others: that is not 0."""
        return None if self["calls"] and self["calls"] == self["unpriced"] else self["cost"]


Group = tuple[str, ...]
Found = dict[tuple[int, Group], Sums]
"""By the start of the bucket, aligned to the width, and the values of the dimensions; an empty text is none."""


def read(database: Database, question: Question) -> Found:
    """Add up. Within one transaction all parts are of the same moment."""
    found: Found = {}
    for table, start, end in parts(question):
        for key, sums in part(database, question, table, start, end):
            known = found.setdefault(key, sums)
            if known is not sums:
                known.add(sums)
    return found


def parts(question: Question) -> Iterator[tuple[int | None, int, int]]:
    """Cut a time into parts: each with the seconds of the roll-ups that know it, None: only the receipts do."""
    start, end, width = question.start, question.end, question.width
    if start >= end:
        return
    dimensions = {*question.by, *question.where}
    if (width is not None and width < HOUR) or not all(map(is_rolled, dimensions)):
        yield None, start, end
        return
    yield from _cut(start, end, (HOUR,) if width == HOUR else (DAY, HOUR))


def is_rolled(dimension: str) -> bool:
    """Whether the roll-ups know it."""
    return dimension in _IN_ROLLUPS or dimension.startswith(TAG)


def _cut(start: int, end: int, sizes: Sequence[int]) -> Iterator[tuple[int | None, int, int]]:
    """The largest whole pieces in the middle, smaller ones at both ends."""
    if start >= end:
        return
    if not sizes:
        yield None, start, end
        return
    size, *smaller = sizes
    first, last = -(-start // size) * size, end // size * size
    if first >= last:
        yield from _cut(start, end, smaller)
        return
    yield from _cut(start, first, smaller)
    yield size, first, last
    yield from _cut(last, end, smaller)


def part(
    database: Database, question: Question, table: int | None, start: int, end: int
) -> Iterator[tuple[tuple[int, Group], Sums]]:
    """Add up a part of the time from the roll-ups of so many seconds, or from the receipts."""
    dialect = database.dialect
    conditions, values = where(question.where, dialect, receipts=table is None)
    dimensions, tags = _dimensions(question.by, dialect, receipts=table is None)
    unit, time, source = (
        (SECOND_NS, "wall_ns", "receipts")
        if table is None
        else (1, "start", with_groups(TABLES[table], question, dialect))
    )
    bucket = "0" if question.width is None else f"{time} / {question.width * unit} * {question.width}"
    counts = [name for name in question.names if name in COUNTS]
    amounts = [name for name in question.names if name in SUMS]
    columns = [bucket, *dimensions]
    if table is None:
        amount_of = terms(dialect.meter)
        columns += [f"count(*) FILTER (WHERE {COUNTS[name]})" for name in counts]
        columns += dialect.summed([amount_of[name] for name in amounts])
    else:
        columns += [f"sum({name})" for name in counts]
        columns += dialect.rolled(amounts)
    rows = database.rows(
        f"SELECT {', '.join(columns)} FROM {source} WHERE {time} >= ? AND {time} < ?{conditions} "  # noqa: S608 - names
        f"GROUP BY {', '.join(['1', *_grouped_by(question.by, 2, receipts=table is None)])}",
        [*tags, start * unit, end * unit, *values],
    )
    width = 1 + len(dimensions)
    for row in rows:
        added = (*row[width : width + len(counts)], *dialect.whole(row[width + len(counts) :]))
        yield (row[0], tuple(row[1:width])), Sums(dict(zip((*counts, *amounts), added, strict=True)))


def with_groups(table: str, question: Question, dialect: Dialect) -> str:
    """Roll-ups and their groups, joined."""
    table, groups = _tables(table, question)
    return f"{table} {dialect.join} {groups} ON id = group_id"


def _tables(table: str, question: Question) -> tuple[str, str]:
    """Roll-ups and their groups: the coarse ones, of which there are fewer, where they know all dimensions."""
    if table in COARSE_TABLES and {*question.by, *question.where} <= set(COARSE):
        return COARSE_TABLES[table], "usage_coarse_groups"
    return table, "usage_groups"


def _dimensions(names: Sequence[str], dialect: Dialect, *, receipts: bool) -> tuple[list[str], list[str]]:
    """Expressions of SQL, and the values in them."""
    known = _IN_RECEIPTS if receipts else _IN_ROLLUPS
    found, values = [], []
    for name in names:
        if name in known:
            found.append(known[name])
        elif name == FIRST:
            found.append(dialect.before("attempts", ',"status":'))
        else:
            text, value = dialect.tag(name.removeprefix(TAG))
            found.append(f"coalesce({text}, '')")
            values.append(value)
    return found, values


def _grouped_by(names: Sequence[str], first: int, *, receipts: bool) -> list[str]:
    """What to group by; columns of dimensions begin with the first. An id of a project is made once for each group."""
    known = _IN_RECEIPTS if receipts else _IN_ROLLUPS
    return [
        f"{known['tenant']}, {known['project']}" if name == PROJECT_ID else str(place)
        for place, name in enumerate(names, first)
    ]


def where(conditions: Mapping[str, tuple[str, ...]], dialect: Dialect, *, receipts: bool) -> tuple[str, list[str]]:
    """More conditions of SQL, each with AND before it, and the values in them."""
    text, found = "", []
    for name, values in conditions.items():
        if not values:
            return " AND 1 = 0", []
        (expression,), tags = _dimensions((name,), dialect, receipts=receipts)
        text += f" AND {expression} IN ({', '.join('?' * len(values))})"
        found += [*tags, *values]
    return text, found


# --- latencies ---------------------------------------------------------------------------------


def latencies(database: Database, question: Question, *, receipts: bool | None = None) -> dict[Group, dict[int, int]]:
    """How many calls took how long, by the dimensions: calls by the number of the latency's range. For whole days.

    Without a word about it, from receipts where the roll-ups do not know.
    """
    if receipts is None:
        receipts = not all(map(is_rolled, {*question.by, *question.where}))
    dialect = database.dialect
    conditions, values = where(question.where, dialect, receipts=receipts)
    dimensions, tags = _dimensions(question.by, dialect, receipts=receipts)
    if receipts:
        unit, latency, calls = SECOND_NS, LATENCY, "count(*)"
        source = f"receipts WHERE wall_ns >= ? AND wall_ns < ?{conditions}"
    else:
        unit, latency, calls = 1, "latency", "sum(calls)"
        source = _latencies_of("usage_latencies", question, dialect, conditions)
    rows = database.rows(
        f"SELECT {', '.join([latency, calls, *dimensions])} FROM {source} "  # noqa: S608 - only names from above
        f"GROUP BY {', '.join(['1', *_grouped_by(question.by, 3, receipts=receipts)])}",
        [*tags, question.start * unit, question.end * unit, *values],
    )
    found: dict[Group, dict[int, int]] = {}
    for number, count, *group in rows:
        found.setdefault(tuple(group), {})[number] = count
    return found


def _latencies_of(table: str, question: Question, dialect: Dialect, conditions: str) -> str:
    """Roll-ups of latencies with their groups, of a time."""
    if conditions or not dialect.sorts_groups:
        return f"{with_groups(table, question, dialect)} WHERE start >= ? AND start < ?{conditions}"
    # By numbers first, of which sorting is quicker than of names.
    table, groups = _tables(table, question)
    return (
        f"(SELECT group_id, latency, sum(calls) AS calls FROM {table} WHERE start >= ? AND start < ? "  # noqa: S608
        f"GROUP BY 1, 2) AS counted {dialect.join} {groups} ON id = group_id"
    )
