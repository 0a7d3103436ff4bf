"""What a ledger of the same gateway has of a budget, for a store that has lost it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from attrs import frozen

from qlens import CallError, fits
from qlens_plugins.cost.budgets.lines import Line
from qlens_plugins.cost.budgets.store import Account, PastUnknown

if TYPE_CHECKING:
    from qlens import Gateway, Model

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

    A ledger has calls under the names that clients asked for; one behind a wildcard counts as what it has come to.
    """
    spending, where = ledger_of(gateway), _conditions(line, account)
    if spending is None:
        raise PastUnknown("there is no ledger any more")
    patterns = {} if line is None else {name: getattr(line.match, name) for name in _COLUMNS}
    meant = _Meant(gateway, account, patterns.pop("model", None))
    narrowed = {_COLUMNS[name]: each for name, each in patterns.items() if each is not None}
    by, mixed = (*narrowed, "model"), tuple(filter(meant.is_mixed, gateway.models))
    if account.per == "model":
        model = gateway.models.named(account.owner)
        where["model"] = (account.owner,) if model is None else model.names
        where["model"] = tuple(dict.fromkeys((*where["model"], *mixed)))
    try:
        costs = Counter(await spending(start, end, by, where))
        # After the sums: what is written in between is counted twice rather than not at all.
        ways = (*by, "first_attempt"), {**where, "model": mixed}
        behind = await spending(start, end, *ways) if mixed else {}
    except (CallError, AssertionError) as error:  # it is not open yet, or away
        raise PastUnknown(f"the ledger cannot be read: {error}") from error

    def fit(values: Sequence[str]) -> bool:
        return all(fits(value or None, each) for value, each in zip(values, narrowed.values(), strict=True))

    spent = 0
    for (*values, name, first), cost in behind.items():
        spent += cost if fit(values) and meant.behind(name, *(json.loads(first) if first else ("", ""))) else 0
        costs[*values, name] -= cost
    # What is left of a wildcard then is of receipts that were deleted: it stays the wildcard's.
    return spent + sum(max(0, cost) for (*values, name), cost in costs.items() if fit(values) and meant.named(name))


@frozen
class _Meant:
    """Which models a budget counts."""

    gateway: Gateway
    account: Account
    patterns: tuple[str, ...] | None
    """What `match` narrows them by."""

    def named(self, name: str) -> bool:
        """Whether calls are meant that the ledger has under a name; those without a model are under an empty one."""
        model = self.gateway.models.named(name)
        if model is not None:
            return self._is(model)
        return fits(name or None, self.patterns) and (self.account.per != "model" or name == self.account.owner)

    def is_mixed(self, name: str) -> bool:
        """Whether of the calls behind a wildcard some are meant and others are not."""
        return len({self._is(model) for model in self._ways(name)}) > 1

    def behind(self, name: str, provider: str, upstream: str) -> bool:
        """Whether a call behind a wildcard is meant, by where it was sent first.

        Where that is none of the wildcard's own places, or not known, it is meant as soon as one of the wildcard's
        calls is: then it is counted twice rather than not at all.
        """
        found = []
        for target in self.gateway.models[name].candidates:
            if target.provider == provider and target.model.endswith("*") and upstream.startswith(target.model[:-1]):
                found += self._resolved(name, name[:-1] + upstream[len(target.model) - 1 :])
        return any(map(self._is, found or self._ways(name)))

    def _is(self, model: Model) -> bool:
        if not model.fits(self.patterns) or self.account.per != "model":
            return model.fits(self.patterns)
        owner = self.gateway.models.named(self.account.owner)
        return owner is not None and model.counts_as in owner.names

    def _ways(self, name: str) -> list[Model]:
        """What an entry's calls may count as."""
        models = self.gateway.models
        reached = [model for asked, _ in models.reached(name) for model in self._resolved(name, asked)]
        return [models[name], *reached]

    def _resolved(self, name: str, asked: str) -> list[Model]:
        """What is asked for by a name, if that is behind the wildcard."""
        model = self.gateway.models.resolve(asked)
        return [model] if model is not None and model.name == name else []


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
