"""How what roll-ups said of receipts that another ledger has deleted gets into PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qlens_plugins.cost.ledger.rollups import COARSE, COARSE_TABLES, COUNTS, GROUPED, SUMS, TABLES
from qlens_plugins.cost.ledger.store import Rest

_SUMMED = (*COUNTS, *SUMS)
_BY = {"usage_groups": GROUPED, "usage_coarse_groups": COARSE}
_NAMES = ", ".join("tags::jsonb AS tags" if name == "tags" else name for name in GROUPED)

# Only names from the code are put into these statements.


def _given(numbers: Sequence[str]) -> str:
    """What is to be added as a table: the group and some numbers, which go as text, for they may be of any size."""
    columns = (*GROUPED, *numbers)
    values = ", ".join(f"${place}::text[]" for place in range(1, len(columns) + 1))
    read = ", ".join(f"{name}::{'numeric' if name in SUMS else 'bigint'} AS {name}" for name in numbers)
    return f"(SELECT {_NAMES}, {read} FROM unnest({values}) AS given ({', '.join(columns)})) AS given"  # noqa: S608


def _same(table: str, groups: str) -> str:
    return " AND ".join(f"{table}.{name} = given.{name}" for name in _BY[groups])


def _add_groups(groups: str) -> str:
    names = ", ".join(_BY[groups])
    return (
        f"INSERT INTO {groups} ({names}) SELECT DISTINCT {names} FROM {_given(('start', *_SUMMED))} "  # noqa: S608
        f"WHERE NOT EXISTS (SELECT FROM {groups} AS known WHERE {_same('known', groups)}) "
        f"ORDER BY {names} ON CONFLICT DO NOTHING"
    )


def _add(table: str, groups: str, keys: Sequence[str] = ("start",), summed: Sequence[str] = _SUMMED) -> str:
    first, *others = keys
    key = ", ".join((first, "group_id", *others))
    # In the order of the keys, in which every gateway changes rows: two never wait for each other.
    return (
        f"INSERT INTO {table} AS kept ({key}, {', '.join(summed)}) "  # noqa: S608
        f"SELECT {', '.join((first, 'known.id AS group_id', *others))}, {', '.join(f'sum({name})' for name in summed)} "
        f"FROM {_given((*keys, *summed))} JOIN {groups} AS known ON {_same('known', groups)} "
        f"GROUP BY {', '.join((first, 'known.id', *others))} ORDER BY {', '.join((first, 'known.id', *others))} "
        f"ON CONFLICT ({key}) DO UPDATE SET {', '.join(f'{name} = kept.{name} + excluded.{name}' for name in summed)}"
    )


def _both(table: str, keys: Sequence[str] = ("start",), summed: Sequence[str] = _SUMMED) -> list[str]:
    """A roll-up, and the one by fewer dimensions: the trigger that keeps that sees receipts alone."""
    coarse = [_add(COARSE_TABLES[table], "usage_coarse_groups", keys, summed)] if table in COARSE_TABLES else []
    return [_add(table, "usage_groups", keys, summed), *coarse]


_ADD_GROUPS = [_add_groups(groups) for groups in _BY]
_ADD: Mapping[int, Sequence[str]] = {seconds: _both(table) for seconds, table in TABLES.items()}
_ADD_LATENCIES = _both("usage_latencies", ("start", "latency"), ("calls",))


async def add(connection: Any, rests: Sequence[Rest]) -> None:
    """Add them to the roll-ups; within the transaction that writes a batch."""
    for seconds in TABLES:
        mine = [rest for rest in rests if rest.seconds == seconds]
        sums = ((*rest.group, rest.start, *(rest.sums.get(name, 0) for name in _SUMMED)) for rest in mine)
        await _execute(connection, [*_ADD_GROUPS, *_ADD[seconds]], sums)
    latencies = ((*rest.group, rest.start, *counted) for rest in rests for counted in rest.latencies.items())
    await _execute(connection, _ADD_LATENCIES, latencies)


async def _execute(connection: Any, statements: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Run statements that are given the columns of some rows."""
    columns = [[str(value) for value in column] for column in zip(*rows, strict=True)]
    for statement in statements if columns else ():
        await connection.execute(statement, *columns)
