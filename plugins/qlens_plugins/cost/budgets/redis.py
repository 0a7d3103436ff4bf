"""Budgets in a Redis that replicas share; when it has lost what it knew, the past comes from a ledger."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from uuid import uuid4

from attrs import define, field

from qlens import RedisStore, Script, StoreUnavailable
from qlens_plugins.cost.budgets import script
from qlens_plugins.cost.budgets.store import Account, Ask, Increase, PastUnknown, State, StoreAnew, StoreAway, Told

log = logging.getLogger("qlens.budgets")

_OPEN_SECONDS = 2.0
"""How long the start of a gateway waits for a store that gathers what was spent."""
_NEVER_SECONDS = 365 * 86_400
_TOGETHER = 32
"""How many budgets one script takes at most: Redis does nothing else meanwhile."""
_PAGE = 200
_SEED_SECONDS = 5.0
_ROUNDS = 3
_LOST = (
    "Redis knows no sums (it is new, was emptied, or was started anew), and there is no ledger to take them from: "
    "say what was spent with `qlens budgets --begin`"
)
_GATHERING = "the budgets' sums are being gathered"

_Raised = list[Any]
"""An increase as the server keeps it: id, picodollars as text, when it ends, reason, by whom, when it was made."""

Spent = Callable[[Account, int, int], Awaitable[int]]
"""What a ledger has of a budget: from the window's beginning up to a time, in Unix seconds."""


@define(eq=False)
class RedisBudgets:
    """Implements `Store`. The server's clock tells who is alive; windows and increases go by the gateways' clocks."""

    redis: RedisStore
    spent: Spent | None = None
    """None: there is no ledger."""
    gather_seconds: float = 1
    """How long processes say again what they hold, before a store that has begun anew admits calls."""
    epoch: str = "-"
    """What this process believes in; a server that was started anew or emptied has another one, or none."""
    _number: int = field(default=0, init=False)
    _raised: dict[str, list[_Raised]] = field(factory=dict, init=False)
    """The increases this process was told of, by budget: a server that has lost them is told of them again."""
    _untold: list[tuple[str, _Raised]] = field(factory=list, init=False)
    """Those that a server which has begun anew may not know."""
    _seeding: dict[tuple[str, int], asyncio.Task[None]] = field(factory=dict, init=False)

    async def open(self) -> None:
        """Begin where there is nothing yet, and wait until calls may be admitted; raises StoreAway."""
        if self.spent is not None:
            left = await self._begin(self.gather_seconds, is_all=False) / 1000
            await asyncio.sleep(min(left, _OPEN_SECONDS))

    async def sync(self, process: str, asks: Sequence[Ask], now: float, crash_seconds: float) -> list[Told]:
        """Implements `Store`."""
        told: list[Told] = []
        for start in range(0, len(asks), _TOGETHER):
            told += await self._sync(process, asks[start : start + _TOGETHER], now, crash_seconds)
        return told

    async def _sync(self, process: str, asks: Sequence[Ask], now: float, crash_seconds: float) -> list[Told]:
        await self._raise_again(now)
        epoch, life = self.epoch, int(crash_seconds * 1000)
        for _ in range(_ROUNDS):
            self._number += 1
            args: list[str | int] = [epoch, process, self._number, life, int(now)]
            for ask in asks:
                args += _words(ask)
            word, *rest = await self._run(script.SYNC, args, process)
            if word == b"told":
                for ask, each in zip(asks, rest, strict=True):
                    self._remember(ask.account.id, each[-1])
                return [_told(each) for each in rest]
            if word == b"given up":
                return [Told(given_up=True)] * len(asks)
            if word != b"seed":
                break
            began, *numbers = rest
            await asyncio.gather(*(self._seeded(asks[number], began // 1000) for number in numbers))
        raise StoreAway(_GATHERING)

    async def renew(self, process: str, now: float, crash_seconds: float) -> bool:
        """Implements `Store`."""
        await self._raise_again(now)
        (word,) = await self._run(script.RENEW, [self.epoch, process, int(crash_seconds * 1000)], process)
        if word == b"wait":
            raise StoreAway(_GATHERING)
        return bool(word == b"told")

    async def leave(self, process: str) -> None:
        """Implements `Store`."""
        await self._run(script.LEAVE, [process], process)

    async def sweep(self, process: str, after: str, now: float) -> str:
        """Implements `Store`: first budgets that are long over, then what this process has said of them."""
        what, cursor = after.split() if after else ("budgets", "0")
        _, then = await self._run(script.SWEEP, [self.epoch, process, int(now), what, cursor, _PAGE], process)
        if then != b"0":
            return f"{what} {then.decode()}"
        return "parts 0" if what == "budgets" else ""

    async def states(self, now: int, account: str | None = None) -> list[State]:
        """Implements `Store`."""
        found: dict[str, State] = {}
        cursor = "0"
        while True:
            _, after, *rows = await self._run(script.LIST, [self.epoch, cursor, _PAGE, account or ""])
            found |= {state.account.id: state for state in (_state(row, now) for row in rows)}
            cursor = after.decode()
            if cursor == "0":
                return [found[id_] for id_ in sorted(found)]

    async def increase(self, increase: Increase) -> None:
        """Implements `Store`."""
        row: _Raised = [
            *(increase.id, str(increase.picos), increase.expires_at, increase.reason),
            *(increase.by, increase.created_at),
        ]
        await self._raise(increase.account, row, increase.created_at)
        self._raised[increase.account] = [*self._raised.get(increase.account, ()), row]

    def _remember(self, account: str, raised: bytes) -> None:
        if raised:
            self._raised[account] = json.loads(raised)
        elif account in self._raised:
            del self._raised[account]

    async def _raise(self, account: str, row: _Raised, now: float) -> None:
        await self._run(script.RAISE, [self.epoch, account, json.dumps(row), int(now)])

    async def _raise_again(self, now: float) -> None:
        """Tell a server that has begun anew of the increases it may have lost; each counts once, whoever tells."""
        while self._untold:
            account, row = self._untold[-1]
            if row[2] > now:
                await self._raise(account, row, now)
            self._untold.pop()

    async def begin(
        self, sums: Sequence[tuple[Account, int, int, int]], noted: Callable[[], Awaitable[object]]
    ) -> bool:
        """Begin with what an operator says: budget, window, limit and what was spent. False: nothing was lost.

        `noted` is awaited once it is sure that something was; when it raises, calls are refused as before.
        """
        new = uuid4().hex
        await self._begin(_NEVER_SECONDS, is_all=True, new=new)
        if self.epoch != new:
            return False
        await noted()
        for account, window, limit, spent in sums:
            await self._seed(account, window, limit, spent)
        await self._run(script.OPEN, [new, int(self.gather_seconds * 1000)])
        return True

    async def close(self) -> None:
        """Implements `Store`; the connection is everybody's."""

    # --- the server ----------------------------------------------------------------------------

    async def _run(self, what: Script, args: Sequence[str | int], process: str = "") -> Any:
        """Run a script; raises StoreAway where it does not answer, and StoreAnew where it is not what it was."""
        names = ("epoch", "sums", "accounts", "windows", "raised", "alive", "process", "heard")
        keys = [self.redis.key(name, slot="budgets") for name in names]
        keys[6] += ":"
        try:
            answer = await self.redis.run(what, keys, args)
        except StoreUnavailable as away:
            raise StoreAway(str(away)) from away
        if answer[0] == b"lost":
            if self.spent is None:
                raise StoreAway(_LOST)
            await self._begin(self.gather_seconds, is_all=False)
            raise StoreAnew(self.epoch)
        if answer[0] == b"epoch" and what is not script.BEGIN:
            self._believe(answer[1].decode())
            raise StoreAnew(self.epoch)
        return answer

    def _believe(self, epoch: str) -> None:
        if epoch != self.epoch:
            self.epoch = epoch
            self._untold = [(account, row) for account, rows in self._raised.items() for row in rows]

    async def _begin(self, seconds: float, *, is_all: bool, new: str | None = None) -> int:
        """Begin an epoch, or find the one that somebody else has begun; the milliseconds until it admits calls."""
        new = new or uuid4().hex
        _, epoch, left = await self._run(script.BEGIN, [new, int(seconds * 1000), int(is_all)])
        if epoch.decode() == new:
            log.warning("budgets: %s knew no sums, a new beginning was made", self.redis.settings.address)
        self._believe(epoch.decode())
        return max(0, int(left))

    # --- the past ------------------------------------------------------------------------------

    async def _seeded(self, ask: Ask, until: int) -> None:
        """Put what the ledger knows of a budget into the store; whoever needs it meanwhile waits for the same."""
        place = (ask.account.id, ask.window)
        task = self._seeding.get(place)
        if task is None:
            task = self._seeding[place] = asyncio.create_task(self._ask_ledger(ask, until))
            task.add_done_callback(lambda task: self._seeded_one(place, task))
        try:
            async with asyncio.timeout(_SEED_SECONDS):
                await asyncio.shield(task)
        except TimeoutError:
            raise PastUnknown("the ledger does not say in time what was spent") from None

    def _seeded_one(self, place: tuple[str, int], task: asyncio.Task[None]) -> None:
        self._seeding.pop(place, None)
        if not task.cancelled():
            task.exception()  # whoever waits has it; perhaps nobody does any more

    async def _ask_ledger(self, ask: Ask, until: int) -> None:
        if self.spent is None:
            raise StoreAway(_LOST)
        # Up to the last second that may have begun before the store did: rather too much than too little.
        spent = await self.spent(ask.account, ask.window, until + 1)
        await self._seed(ask.account, ask.window, ask.limit, spent, ask.beside)

    async def _seed(self, account: Account, window: int, limit: int, spent: int, beside: Sequence[str] = ()) -> None:
        what = _what(account), " ".join(beside)
        await self._run(script.SEED, [self.epoch, account.id, window, str(limit), str(spent), *what])


def _words(ask: Ask) -> list[str | int]:
    needs: list[str] = [str(amount) for need in ask.needs for amount in (need.likely, need.excess)]
    sums = [str(sum_) for sum_ in (ask.limit, ask.tolerance, ask.spent, ask.held, ask.excess, ask.floor)]
    what: list[str | int] = [ask.part, int(ask.is_known), str(ask.spare), _what(ask.account), " ".join(ask.beside)]
    return [ask.account.id, ask.window, *sums, *what, len(ask.needs), *needs]


def _what(account: Account) -> str:
    row = (account.id, account.rule, account.per, account.owner, account.tenant, account.period)
    return json.dumps(row)


def _told(row: Sequence[bytes]) -> Told:
    granted, spare, spent, held, limit, until, beside, _ = row
    return Told(
        *([each == ord("1") for each in granted], int(spare), int(spent), int(held), int(limit), int(until)),
        beside=int(beside),
    )


def _state(row: Sequence[bytes], now: int) -> State:
    account, window, limit, spent, held, raised = row
    what = Account(*json.loads(account))
    increases = (
        Increase(id_, what.id, int(picos), expires_at, reason, by, created_at)
        for id_, picos, expires_at, reason, by, created_at in json.loads(raised)
        if expires_at > now
    )
    return State(what, int(window), int(limit), int(spent), int(held), tuple(increases))
