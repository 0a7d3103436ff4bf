"""What keeps budgets: one row for each budget and window, and in it what each process has spent and holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from attrs import define, field, frozen

from qlens_plugins.cost.budgets.windows import Period


class StoreAway(Exception):
    """The store does not answer; what was asked may have happened all the same."""


class PastUnknown(StoreAway):
    """The store answers, but must be told what was spent before, and nobody says so."""


class StoreAnew(StoreAway):
    """The store has begun anew, without what it knew: each process says again what it knows."""

    def __init__(self, epoch: str) -> None:
        """Take the name of what has begun."""
        super().__init__("the store has lost its sums and begun anew")
        self.epoch = epoch


@frozen
class Account:
    """Names a budget: the rule and whose it is."""

    id: str
    rule: str
    """What is counted, not how much: a reload that changes numbers keeps it."""
    per: str
    owner: str
    tenant: str | None
    """Whose it is to see; None: everybody's, as a model's."""
    period: Period


@define  # made with every call: frozen takes twice as long. Nobody changes one
class Need:
    """What one call must have reserved: what it will likely cost, and how much more it may."""

    likely: int
    excess: int = 0


@frozen
class Ask:
    """What a process says of one budget in one window, in absolute numbers: saying it twice changes nothing."""

    account: Account
    window: int
    """When the window begins."""
    limit: int
    tolerance: int
    spent: int
    """All that this part of the process has ever spent of it."""
    held: int = 0
    excess: int = 0
    """What its running calls hold."""
    needs: Sequence[Need] = ()
    """What further calls need, first come first served."""
    spare: int = 0
    """What it would like to hold in advance, given only while more than a fifth of the budget is free."""
    part: int = 0
    """Tells the parts of one process apart: one that is forgotten never comes back."""
    is_known: bool = False
    """Whether the store has answered before: if it knows nothing of this process then, it has been given up."""
    floor: int = 0
    """What everybody had spent when the store last said so before it began anew; `spent` begins at 0 then."""
    beside: Sequence[str] = ()
    """Other budgets of which all that was spent and is held counts in this one as well."""


@frozen
class Told:
    """What the store says to that."""

    granted: Sequence[bool] = ()
    spare: int = 0
    spent: int = 0
    """By everybody, in this budget."""
    held: int = 0
    """By everybody, what is granted now included, and what is held in the budgets beside it."""
    limit: int = 0
    """With the increases that hold now."""
    until: int = 2**53
    """When the next of them ends, in Unix seconds."""
    given_up: bool = False
    """The process was believed dead: all that it held was charged, and nothing was changed now."""
    beside: int = 0
    """What was spent in the budgets beside it."""


@frozen
class Increase:
    """A temporary one."""

    id: str
    account: str
    picos: int
    expires_at: int
    reason: str
    by: str
    created_at: int


@frozen
class State:
    """A budget in its latest window of those asked for."""

    account: Account
    window: int
    limit: int
    spent: int
    held: int
    increases: Sequence[Increase] = field(factory=tuple)


class Store(Protocol):
    """Implemented by memory, SQLite and Redis, in the same words."""

    async def sync(self, process: str, asks: Sequence[Ask], now: float, crash_seconds: float) -> list[Told]:
        """Take what a process says and answer it, all in one transaction; the process is alive until `now` and more."""

    async def renew(self, process: str, now: float, crash_seconds: float) -> bool:
        """Say that a process lives, and charge what processes held that do not; False: it was given up itself."""

    async def leave(self, process: str) -> None:
        """Forget a process that has given back all it held."""

    async def sweep(self, process: str, after: str, now: float) -> str:
        """Drop some of the budgets whose windows are long over, and increases; where to go on, "" at the end."""

    async def states(self, now: int, account: str | None = None) -> list[State]:
        """All budgets, each in its latest window."""

    async def increase(self, increase: Increase) -> None:
        """Raise a budget for a time."""

    async def close(self) -> None:
        """Let go of it."""
