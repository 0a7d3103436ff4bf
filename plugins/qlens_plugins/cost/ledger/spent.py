"""What calls have cost, for other plugins of the same gateway: budgets whose store has lost it ask."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING

from qlens_plugins.cost.ledger.hours import pieces
from qlens_plugins.cost.ledger.rows import DAY_NS
from qlens_plugins.cost.ledger.store import Database
from qlens_plugins.cost.ledger.sums import FIRST, SECOND_NS, Group, Question, is_rolled, part, read

if TYPE_CHECKING:
    from qlens_plugins.cost.ledger.plugin import Ledger


async def spent(
    ledger: Ledger, start: int, end: int, by: tuple[str, ...], where: Mapping[str, tuple[str, ...]]
) -> Mapping[Group, int]:
    """What calls that began in `[start, end)`, in Unix seconds, have cost in picodollars, by dimensions.

    Receipts that wait for the database are not in it, and those that were deleted only where roll-ups know all of the
    dimensions. They do not know `first_attempt`: provider and model that a call was sent to first, as JSON, or nothing
    where nobody can tell. Raises Unavailable when it cannot be read.
    """
    question = Question(start, end, by=by, where=where, names=("cost",))
    if all(map(is_rolled, {*by, *where})):
        found = await ledger.reader.ask(partial(read, question=question))
        return {group: sums["cost"] for (_, group), sums in found.items()}
    hours = await ledger.reader.ask(partial(_hours, question=question))
    costs: Counter[Group] = Counter()
    for _, day in groupby(hours, lambda hour: hour[0] // DAY_NS):
        # A question for each day: there may be more receipts in all than one question has time for.
        costs.update(await ledger.reader.ask(partial(_of_receipts, question=question, times=list(day))))
    return costs


def _hours(database: Database, question: Question) -> list[tuple[int, int]]:
    return list(pieces(database, dict(question.where), question.start * SECOND_NS, question.end * SECOND_NS))


def _of_receipts(database: Database, question: Question, times: Iterable[tuple[int, int]]) -> Counter[Group]:
    costs: Counter[Group] = Counter()
    for start_ns, end_ns in times:
        for (_, group), sums in part(database, question, None, start_ns // SECOND_NS, end_ns // SECOND_NS):
            costs[tuple(map(_said, question.by, group))] += sums["cost"]
    return costs


def _said(dimension: str, value: str) -> str:
    if dimension != FIRST:
        return value
    try:
        (attempt,) = json.loads(value + "}]")
        return json.dumps([attempt["provider"], attempt["model"]])
    except (ValueError, KeyError, TypeError):
        return ""
