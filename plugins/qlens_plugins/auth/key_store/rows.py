"""Keys and tenants as rows of tables, whose columns are the fields of the records."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Generic, TypeVar

from attrs import asdict, fields, frozen

from qlens import Allowance
from qlens_plugins.auth.key_store.database import Database
from qlens_plugins.auth.key_store.records import Key, Tenant

R = TypeVar("R", Key, Tenant)

AT_ONCE = 1000
"""How many rows are read in one go."""
_JSON = frozenset({"roles", "models", "tags", "limits", "metadata"})
"""The columns that hold JSON, as text."""


@frozen
class Table(Generic[R]):
    """A table of records of one kind."""

    name: str
    id: str
    kind: type[R]

    @property
    def columns(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(attribute.name for attribute in fields(self.kind))

    def find(self, database: Database, where: str, *values: Any) -> list[R]:
        """The records of which a condition holds."""
        columns = self.columns
        rows = database.rows(f"SELECT {', '.join(columns)} FROM {self.name} {where}", *values)  # noqa: S608 - own words
        return [self.kind(**_read(columns, row)) for row in rows]

    def all(self, database: Database, condition: str, *values: Any) -> list[R]:
        """The same for many: not all their rows are in memory at a time."""
        found: list[R] = []
        while part := self.find(
            database,
            f"WHERE {condition} AND {self.id} > ? ORDER BY {self.id} LIMIT ?",
            *(*values, getattr(found[-1], self.id) if found else "", AT_ONCE),
        ):
            found += part
        return found

    def put(self, database: Database, record: R) -> bool:
        """Write a record, within a transaction, unless it is no longer what it was at `change`, 0 for a new one: False.

        It gets the number of a change of its own.
        """
        columns, id_ = self.columns, getattr(record, self.id)
        found = database.rows(f"SELECT change FROM {self.name} WHERE {self.id} = ?", id_)  # noqa: S608
        if (found[0][0] if found else 0) != record.change:
            return False
        change = last_change(database) + 1
        database.rows("UPDATE key_state SET change = ?", change)
        values = [change if name == "change" else _column(name, getattr(record, name)) for name in columns]
        if found:
            marks = ", ".join(f"{name} = ?" for name in columns)
            database.rows(f"UPDATE {self.name} SET {marks} WHERE {self.id} = ?", *values, id_)  # noqa: S608
        else:
            marks = ", ".join("?" * len(columns))
            database.rows(f"INSERT INTO {self.name} ({', '.join(columns)}) VALUES ({marks})", *values)  # noqa: S608
        return True


KEYS = Table("keys", "id", Key)
TENANTS = Table("tenants", "name", Tenant)


def last_change(database: Database) -> int:
    """The number of the last change of a key or a tenant."""
    return int(database.rows("SELECT change FROM key_state")[0][0])


def _column(name: str, value: Any) -> Any:
    if name not in _JSON or value is None:
        return value
    # Without defaults: a gateway of an older version reads what it knows.
    said = asdict(value, filter=lambda field, each: each != field.default) if isinstance(value, Allowance) else value
    return json.dumps(said, default=dict)


def _read(columns: Sequence[str], row: Sequence[Any]) -> dict[str, Any]:
    return {
        name: _parsed(name, value) if name in _JSON and value is not None else value
        for name, value in zip(columns, row, strict=True)
    }


@lru_cache(maxsize=4096)
def _parsed(name: str, text: str) -> Any:
    """What a column of JSON says. Most rows say the same as another one, and then share it."""
    value = json.loads(text)
    if name in {"roles", "models"}:
        return tuple(value)
    return Allowance(**value) if name == "limits" else value
