"""What calls have cost, for other plugins of the same gateway: budgets whose store has lost it ask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from qlens_plugins.cost.ledger.sums import Group, Question, read

if TYPE_CHECKING:
    from qlens_plugins.cost.ledger.plugin import Ledger


async def spent(
    ledger: Ledger, start: int, end: int, by: tuple[str, ...], where: Mapping[str, tuple[str, ...]]
) -> Mapping[Group, int]:
    """What calls that began in `[start, end)`, in Unix seconds, have cost in picodollars, by dimensions.

    Receipts that wait for the database are not in it. Raises Unavailable when it cannot be read.
    """
    question = Question(start, end, by=by, where=where, names=("cost",))
    found = await ledger.reader.ask(lambda database: read(database, question))
    return {group: sums["cost"] for (_, group), sums in found.items()}
