"""What a ledger of the same gateway has of a budget, for a store that has lost it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING

from qlens import CallError, fits
from qlens_plugins.cost.budgets.lines import Line
from qlens_plugins.cost.budgets.store import Account, PastUnknown

if TYPE_CHECKING:
    from qlens import Gateway

_COLUMNS = {"tenant": "tenant", "project": "project", "key": "key_id", "model": "model"}
"""What a ledger calls what `match` narrows by."""

Groups = Mapping[tuple[str, ...], int]
Spending = Callable[[int, int, tuple[str, ...], Mapping[str, tuple[str, ...]]], Awaitable[Groups]]
"""What calls that began within a time have cost, by some dimensions and under some conditions; a ledger offers it."""


def ledger_of(gateway: Gateway) -> Spending | None:
    """The first plugin of the configuration that says, with a method `spent`, what calls have cost."""
    found = (getattr(instance.plugin, "spent", None) for instance in gateway.registration.instances)
    return next((each for each in found if callable(each)), None)


async def spent_of(gateway: Gateway, line: Line | None, account: Account, start: int, end: int) -> int:
    """What a budget has spent by the ledger; raises PastUnknown when that cannot be read.

    A ledger has calls under the names that clients asked for; those of a wildcard are taken to be the wildcard's.
    """
    spending, where, models = ledger_of(gateway), _conditions(line, account), gateway.models
    if spending is None:
        raise PastUnknown("there is no ledger any more")
    if account.per == "model":
        model = models.named(account.owner)
        where["model"] = (account.owner,) if model is None else model.names
    patterns = {} if line is None else {name: getattr(line.match, name) for name in _COLUMNS}
    narrowed = {_COLUMNS[name]: each for name, each in patterns.items() if each is not None}
    try:
        groups = await spending(start, end, tuple(narrowed), where)
    except (CallError, AssertionError) as error:  # it is not open yet, or away
        raise PastUnknown(f"the ledger cannot be read: {error}") from error

    def is_meant(column: str, value: str, patterns: tuple[str, ...]) -> bool:
        model = models.named(value) if column == "model" else None
        return fits(value or None, patterns) if model is None else model.fits(patterns)

    return sum(
        cost
        for group, cost in groups.items()
        if all(is_meant(column, value, narrowed[column]) for column, value in zip(narrowed, group, strict=True))
    )


def _conditions(line: Line | None, account: Account) -> dict[str, tuple[str, ...]]:
    where: dict[str, tuple[str, ...]] = {} if account.tenant is None else {"tenant": (account.tenant,)}
    if account.per in {"project", "subject"}:
        where[account.per] = (account.owner,)
    elif account.per == "key":
        where["key_id"] = (account.owner,)
    elif account.per.startswith("tag "):
        where["tag:" + account.per.removeprefix("tag ")] = (account.owner,)
    elif account.per == "tenant" and line is not None and line.per == "project":
        where["project"] = ("",)
    return where
