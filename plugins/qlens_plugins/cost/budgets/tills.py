"""What this process holds and spends of budgets: from a part that the store has given it, or by asking for more."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from datetime import tzinfo
from typing import TypeVar
from uuid import uuid4
from weakref import WeakValueDictionary

from attrs import define, field

from qlens import usd
from qlens_plugins.cost.budgets.lines import Line
from qlens_plugins.cost.budgets.store import Account, Ask, Need, PastUnknown, Store, StoreAnew, StoreAway, Told
from qlens_plugins.cost.budgets.windows import Window, window_of

T = TypeVar("T")
log = logging.getLogger("qlens.budgets")

TICK_SECONDS = 0.25
SWEEP_SECONDS = 3600
"""How often it is looked for windows that are long over."""
_TOGETHER = 256
"""How many calls of one budget are decided in one step."""


@define(eq=False)
class Waiter:
    """A call that waits for the store's word: True, False, or None when it is to ask anew."""

    need: Need
    verdict: asyncio.Future[bool | None]


@define(eq=False)
class Till:
    """This process' part of one budget in one window.

    The store holds for it what running calls hold, plus `room`, less what was spent since the store was told: so
    whatever becomes of this process, all that it can have spent is held.
    """

    purse: Purse
    window: Window
    number: int
    room: int = 0
    """What may be reserved without asking; below 0: what calls cost more than was reserved for them."""
    held: int = 0
    excess: int = 0
    spent: int = 0
    """By this process, ever."""
    said: int = 0
    """What of that the store knows."""
    before: int = 0
    """What of that was said before the store began anew: it is in `floor`."""
    floor: int = 0
    """What everybody had spent then, as far as this process was told."""
    told: Told = field(factory=Told)
    until: int = 0
    """From when on the store is asked whatever there is: the window, or an increase, is over."""
    known: bool = False
    given_up: bool = False
    """The store has charged all that it held: only what calls cost beyond that is still to be counted."""
    busy: bool = False
    waiting: list[Waiter] = field(factory=list)
    want: int = 0
    warned: int = 0
    """The highest percentage that was warned of."""
    warn_from: int = 0
    """How much this process has spent when the next warning is due, as far as it knows what others have."""
    exhausted: int = 0
    """The limit at which it was told that it is exhausted."""

    @property
    def all_spent(self) -> int:
        """By everybody, as far as this process knows."""
        return self.told.spent + self.told.beside + self.spent - self.said

    @property
    def left(self) -> int:
        """Of the limit, as far as this process knows, what running calls hold included: most of that comes back."""
        return (self.told.limit or self.purse.line.limit) - self.all_spent


@define(eq=False)
class Purse:
    """One budget."""

    account: Account
    line: Line
    beside: tuple[str, ...] = ()
    """The budgets that count in it as well."""
    till: Till = field(init=False)


@define(eq=False)
class Tills:
    """All budgets of this process; shared by the instances before and after a reload."""

    store: Store
    now: Callable[[], float]
    zone: tzinfo
    lease_seconds: float
    crash_seconds: float
    share: int
    """The most that is held in advance is the limit divided by this."""
    warn: Callable[[Till, int], None] = lambda till, percent: None
    look_ticks: int = 8
    """How often it is looked for processes that died, and for a store that has begun anew."""
    process: str = field(factory=lambda: uuid4().hex)
    epoch: str = ""
    """Names what the store knows, where it can lose that."""
    users: int = 0
    trouble: str = ""
    purses: WeakValueDictionary[str, Purse] = field(factory=WeakValueDictionary)
    dirty: dict[Till, None] = field(factory=dict)
    """Those of which the store does not know the latest, or that hold something in advance."""
    _lacks_past: bool = False
    """Whether the trouble is one that the store answers all the same."""
    _renewed: float = 0
    _opened: int = 0
    _sweep_at: float = 0
    _swept_to: str = ""
    _tending: asyncio.Task[None] | None = None
    _tasks: set[asyncio.Task[None]] = field(factory=set)

    def purse(self, account: Account, line: Line, beside: tuple[str, ...] = (), *, is_newest: bool = True) -> Purse:
        """The budget of an account; a changed limit holds from the next call on."""
        purse = self.purses.get(account.id)
        if purse is None:
            purse = self.purses[account.id] = Purse(account, line, beside)
            purse.till = self._open(purse)
        elif is_newest and (purse.line, purse.beside) != (line, beside):
            purse.line, purse.beside, purse.till.until = line, beside, 0
        return purse

    def _open(self, purse: Purse) -> Till:
        self._opened += 1
        return Till(purse, window_of(purse.account.period, self.now(), self.zone), self._opened)

    def current(self, purse: Purse) -> Till:
        """The part of the window that is now; a clock that goes back opens none that is over."""
        till = purse.till
        if till.given_up or self.now() >= till.window.end:
            if till.held or till.room or till.spent != till.said:
                self.dirty[till] = None
            purse.till = self._open(purse)
            if till.given_up:
                # What calls cost beyond what was held, and so beyond what was charged for it.
                purse.till.spent = max(0, -till.room)
                self.dirty[purse.till] = None
        return purse.till

    # --- reserving -----------------------------------------------------------------------------

    async def take(self, purse: Purse, need: Need) -> Till | None:
        """Reserve for a call; None when there is not enough. Raises StoreAway; whoever is cancelled has nothing."""
        while True:
            till = self.current(purse)
            if self._in_advance(till, need):
                return till
            waiter = Waiter(need, asyncio.get_running_loop().create_future())
            till.waiting.append(waiter)
            if not till.busy:
                self._start(till)
            try:
                verdict = await waiter.verdict
            except asyncio.CancelledError:
                if waiter.verdict.done() and not waiter.verdict.cancelled() and waiter.verdict.result():
                    self.give_back(till, need)
                raise
            if verdict is not None:
                return till if verdict else None

    def give_back(self, till: Till, need: Need) -> None:
        """Undo a reservation of a call that does not run."""
        till.held -= need.likely
        till.excess -= need.excess
        till.room += need.likely
        self.dirty[till] = None

    def settle(self, till: Till, need: Need, cost: int) -> None:
        """Turn what a call had reserved into what it cost. Every call comes this way: it waits for nothing."""
        if till.given_up:
            if cost > need.likely + need.excess:
                till.purse.till.spent += cost - need.likely - need.excess
                self.dirty[till.purse.till] = None
            return
        till.held -= need.likely
        till.excess -= need.excess
        till.spent += cost
        till.room += need.likely - cost
        self.dirty[till] = None
        if till.spent >= till.warn_from:
            self._warn(till)

    def _warn(self, till: Till) -> None:
        """Say what thresholds are reached, once."""
        limit = till.told.limit or till.purse.line.limit
        for percent in till.purse.line.warn_at:
            if percent > till.warned and till.all_spent * 100 >= limit * percent:
                till.warned = percent
                self.warn(till, percent)
        rest = [percent for percent in till.purse.line.warn_at if percent > till.warned]
        till.warn_from = -(-limit * rest[0] // 100) - (till.all_spent - till.spent) if rest else 2**63

    # --- the store -----------------------------------------------------------------------------

    def _start(self, till: Till) -> None:
        till.busy = True
        task = asyncio.get_running_loop().create_task(self._decide(till))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _decide(self, till: Till) -> None:
        try:
            while self._still_waiting(till):
                together, till.waiting = till.waiting[:_TOGETHER], till.waiting[_TOGETHER:]
                needs = [waiter.need for waiter in together]
                # Twice as much as last time where calls come often; what was not used is back within a moment.
                till.want = min(
                    till.purse.line.limit // self.share, max(2 * till.want, 4 * sum(n.likely for n in needs))
                )
                try:
                    (told,) = await self._sync([till], needs)
                except Exception as away:
                    if not isinstance(away, StoreAway):
                        log.exception("budgets: deciding failed")
                    for waiter in together:
                        if not waiter.verdict.done():
                            waiter.verdict.set_exception(StoreAway(str(away)))
                    continue
                self._tell(till, together, told)
        finally:
            till.busy = False

    def _in_advance(self, till: Till, need: Need) -> bool:
        """Reserve of what is held in advance; False when the store must be asked."""
        if need.excess or need.likely > till.room or till.given_up or self.now() >= till.until:
            return False
        till.room -= need.likely
        till.held += need.likely
        return True

    def _still_waiting(self, till: Till) -> bool:
        """Give those who wait, in turn, what is held in advance by now; whether somebody needs the store's word.

        Else each answer would be followed by another question, for the calls that came meanwhile, with all room given
        back until its answer is there: under load most calls would wait for the store.
        """
        served = 0
        for waiter in till.waiting:
            if not waiter.verdict.done():  # nobody waits for what was cancelled
                if not self._in_advance(till, waiter.need):
                    break
                waiter.verdict.set_result(True)
            served += 1
        del till.waiting[:served]
        return bool(till.waiting)

    def _tell(self, till: Till, together: Sequence[Waiter], told: Told) -> None:
        for number, waiter in enumerate(together):
            passes = None if told.given_up else told.granted[number]
            if passes:
                till.held += waiter.need.likely
                till.excess += waiter.need.excess
            if not waiter.verdict.done():
                waiter.verdict.set_result(passes)
            elif passes:
                self.give_back(till, waiter.need)

    async def _sync(self, tills: Sequence[Till], needs: Sequence[Need] = ()) -> list[Told]:
        """Tell the store all about some parts, and give all room back: it decides about what there is."""
        try:
            return await self._sync_once(tills, needs)
        except StoreAnew as anew:
            self._say_again(anew)
            return await self._sync_once(tills, needs)

    async def _sync_once(self, tills: Sequence[Till], needs: Sequence[Need]) -> list[Told]:
        process = self.process
        asks = [self._ask(till, needs) for till in tills]
        rooms = [till.room for till in tills]
        for till in tills:
            till.room = 0
            self.dirty[till] = None  # until it is known to have come through
        self._renewed = self.now()
        try:
            answers = await self.store.sync(process, asks, self._renewed, self.crash_seconds)
        except StoreAnew:
            raise
        except StoreAway as away:
            self._failed(away)
            raise
        self.trouble = ""
        if any(told.given_up for told in answers):
            for till, room in zip(tills, rooms, strict=True):
                till.room += room
            self._given_up(process)
            return answers
        for till, ask, told in zip(tills, asks, answers, strict=True):
            till.known, till.told, till.said = True, told, till.before + ask.spent
            till.room += told.spare
            till.until = min(till.window.end, told.until)
            till.warn_from = 0
            if not (till.held or till.room or till.excess or till.spent != till.said):
                self.dirty.pop(till, None)
        return answers

    def _ask(self, till: Till, needs: Sequence[Need]) -> Ask:
        line = till.purse.line
        is_used = bool(needs) or till.spent != till.said
        spare = till.want if line.hard and is_used and self.lease_seconds and till is till.purse.till else 0
        account, window = till.purse.account, till.window.start
        return Ask(
            account,
            window,
            line.limit,
            line.tolerance,
            till.spent - till.before,
            till.held,
            till.excess,
            needs,
            spare,
            till.number,
            till.known,
            till.floor,
            till.purse.beside,
        )

    def _say_again(self, anew: StoreAnew) -> None:
        """Have all said again to a store that has lost it; nothing is held in advance there any more."""
        if anew.epoch == self.epoch:
            return
        if self.epoch:
            log.error("budgets: %s", anew)
        self.epoch = anew.epoch
        for till in [*self.dirty, *(purse.till for purse in self.purses.values())]:
            if not till.given_up:
                till.before, till.floor, till.known = till.said, till.told.spent, False
                till.room, till.until = min(till.room, 0), 0
                self.dirty[till] = None

    def _failed(self, away: StoreAway) -> None:
        if not self.trouble:
            log.error("budgets: the store does not answer: %s", away)
        self.trouble, self._lacks_past = str(away), isinstance(away, PastUnknown)

    def _given_up(self, process: str) -> None:
        """Begin anew: this process showed no sign of life for so long that all it held was charged."""
        if process != self.process:
            return
        log.error("budgets: this process was taken for dead: what its running calls had reserved was charged")
        self.process = uuid4().hex
        for till in [*self.dirty, *(purse.till for purse in self.purses.values())]:
            till.given_up = True
        self.dirty.clear()
        for purse in list(self.purses.values()):
            self.current(purse)

    # --- tending -------------------------------------------------------------------------------

    async def open(self) -> None:
        """Begin, or join those who use it already."""
        self.users += 1
        if self.users == 1:
            self._tending = asyncio.create_task(self._tend(), name="tend budgets")

    async def close(self) -> None:
        """Leave; the last to leave gives back all that is held."""
        self.users -= 1
        if self.users:
            return
        assert self._tending is not None
        self._tending.cancel()
        await asyncio.gather(self._tending, *self._tasks, return_exceptions=True)
        try:
            await self._flush(list(self.dirty), final=True)
            await self.store.leave(self.process)
        except StoreAway as away:
            log.error("budgets: what was spent last could not be written: %s", away)
        await self.store.close()

    async def _tend(self) -> None:
        ticks = 0
        while True:
            await asyncio.sleep(TICK_SECONDS)
            ticks += 1
            try:
                if ticks % max(1, round(self.lease_seconds / 2 / TICK_SECONDS)) == 0:
                    await self.flush()
                # Others that died are looked for as often, too.
                if self.now() - self._renewed >= self.crash_seconds / 4 or ticks % self.look_ticks == 0:
                    await self._renew()
                await self._sweep()
            except StoreAway:
                continue
            except Exception:
                log.exception("budgets: tending failed")

    async def _renew(self) -> None:
        process, self._renewed = self.process, self.now()
        try:
            is_alive = await self.store.renew(process, self._renewed, self.crash_seconds)
        except StoreAnew as anew:
            self._say_again(anew)
            await self.flush()
            return
        except StoreAway as away:
            self._failed(away)
            raise
        if not self._lacks_past:
            self.trouble = ""
        if not is_alive and any(till.known for till in (*self.dirty, *(p.till for p in self.purses.values()))):
            self._given_up(process)

    async def _sweep(self) -> None:
        """Drop a page of what is long over; after the last one wait an hour."""
        now = self.now()
        if not self._swept_to and now < self._sweep_at <= now + SWEEP_SECONDS:
            return
        self._swept_to = await self.through(lambda: self.store.sweep(self.process, self._swept_to, now))
        self._sweep_at = now + SWEEP_SECONDS

    async def through(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Ask the store something else. One that has begun anew then is told first what this process knows."""
        try:
            return await ask()
        except StoreAnew as anew:
            self._say_again(anew)
            await self.tell_all()
            return await ask()

    async def tell_all(self) -> None:
        """Tell the store what is known by now, also of tills that await its answer: for these it waits a second."""
        left, epoch = set(self.dirty), self.epoch
        for _ in range(200):
            idle = {till for till in left if not till.busy}
            await self.flush(idle)
            left -= idle
            if epoch != self.epoch:  # it has begun anew, and only these were said again
                left, epoch = set(self.dirty), self.epoch
            if not left:
                return
            await asyncio.sleep(0.005)

    async def flush(self, tills: Iterable[Till] | None = None) -> None:
        """Tell the store what was spent, and give back what no call needed."""
        wanted = list(self.dirty) if tills is None else list(tills)
        await self._flush(
            [till for till in wanted if till.spent != till.said or till.room or not (till.held and till.known)]
        )

    async def _flush(self, tills: Sequence[Till], *, final: bool = False) -> None:
        idle = [till for till in tills if not till.busy and not till.given_up]
        if not idle:
            return
        for till in idle:
            till.busy = True
            if final:
                till.want = 0
        try:
            await self._sync(idle)
        finally:
            for till in idle:
                till.busy = False
                if till.waiting:
                    self._start(till)


def describe(till: Till) -> str:
    """A budget in words, for logs."""
    account, line = till.purse.account, till.purse.line
    return f"{line.period} budget of {account.per} {account.owner!r}, {usd(till.told.limit or line.limit)} USD"
