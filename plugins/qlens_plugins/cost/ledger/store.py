"""What a ledger needs of a database: to write batches exactly once, and to answer questions in one transaction."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from attrs import field, frozen

from qlens_plugins.cost.ledger.rows import Rejection, Row

T = TypeVar("T")
Value = str | int | None
Found = Sequence[Any]
"""A row of an answer."""


class StoreAway(Exception):
    """The database cannot be used at present; that may pass."""


class TookTooLong(Exception):
    """A question was given up: it took too long, or nobody waits for it any longer."""


@frozen
class Rest:
    """What the roll-ups of an hour or a day say of one group beyond the receipts that are there."""

    seconds: int
    """Of an hour or of a day."""
    start: int
    """In Unix seconds."""
    group: tuple[str, ...]
    """The values of GROUPED."""
    sums: Mapping[str, int]
    """By names of COUNTS and SUMS; what is missing is 0."""
    latencies: Mapping[int, int] = field(factory=dict)
    """Calls of a day by the number of their latency's range."""


@frozen
class Batch:
    """What one transaction writes. Its number makes sure that it is applied once."""

    number: int
    receipts: Sequence[Row]
    rejections: Mapping[Rejection, int]
    rests: Sequence[Rest] = ()
    """What is added to the roll-ups for receipts that another ledger has deleted."""
    kept_since_ns: int = 0
    """Before then it may have deleted some."""


class Dialect(Protocol):
    """What one database's SQL says in its own way."""

    @property
    def join(self) -> str:
        """A join that begins with the table on its left."""

    @property
    def sorts_groups(self) -> bool:
        """Whether it groups many rows by sorting all of them."""

    def tag(self, name: str) -> tuple[str, str]:
        """The text of a receipt's tag, with one `?` in it, and the value for that; NULL where there is none."""

    def before(self, column: str, mark: str) -> str:
        """What a column has before a text that is in it."""

    def meter(self, name: str) -> str:
        """How much a receipt's meter of a name says, a whole number of 64 bits; 0 where there is none."""

    def summed(self, terms: Sequence[str]) -> Sequence[str]:
        """Columns that add up terms over receipts. A sum may need more than 64 bits."""

    def rolled(self, names: Sequence[str]) -> Sequence[str]:
        """Columns that add up what roll-ups have under some names."""

    def whole(self, found: Found) -> list[int]:
        """The sums in what such columns gave."""


class Database(Protocol):
    """A connection that reads, to which a question is a plain function: it runs on a thread and may wait."""

    @property
    def dialect(self) -> Dialect:
        """Its ways."""

    def rows(self, sql: str, values: Sequence[Value] = ()) -> Sequence[Found]:
        """All rows of an answer; `?` in the SQL stands for a value."""

    def one(self, sql: str, values: Sequence[Value] = ()) -> Found | None:
        """The first row of an answer."""


Question = Callable[[Database], T]


class Reading(Protocol):
    """One question to a ledger."""

    def run(self, question: Question[T]) -> T:
        """Ask, on a thread; all that is read is of one moment. Raises StoreAway and TookTooLong."""

    def stop(self) -> None:
        """Let it end with TookTooLong, from another thread."""


class Store(Protocol):
    """A database with a ledger in it. What writes is used by one thread; reading goes on beside it on others."""

    @property
    def name(self) -> str:
        """What it is called for short; as text it is named in full. Both are without a password."""

    @property
    def dialect(self) -> Dialect:
        """What is special in its SQL."""

    @property
    def place(self) -> object:
        """Equal where one store can stand for another."""

    def connect(self) -> None:
        """Be ready to write, with the tables made or upgraded; nothing when it is.

        Raises StartupError for what an operator must mend, StoreAway for what may pass.
        """

    def write(self, writer: str, batch: Batch) -> None:
        """Write a batch; one that the writer has written already, by its number, is left alone.

        Each receipt is kept once however often it is given, and what is kept is added to the roll-ups in the same
        transaction. Connects where that is needed. After whatever is raised the batch may be in or not: give it again.
        """

    def forget(self, before_ns: int) -> bool:
        """Delete receipts from before a time, perhaps not all of them; whether to ask again soon.

        What the roll-ups say stays. The table `receipts_kept` tells from when on all receipts are there.
        """

    def reading(self, seconds: float) -> Reading:
        """A question that may take so long."""

    def disconnect(self) -> None:
        """Let go of the connection that writes."""

    def close(self) -> None:
        """Let go of all connections; those with a question on them end with it."""
