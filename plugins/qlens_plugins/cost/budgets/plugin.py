"""The plugin: reserves at admission, settles to what a call cost."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any, Literal, NoReturn
from zoneinfo import ZoneInfo

from attrs import define, field, frozen

from qlens import Call, Command, Endpoint, Health, Receipt, hookimpl, redis_store, usd
from qlens_plugins.cost.budgets import past, reached, refusals
from qlens_plugins.cost.budgets.endpoints import BudgetApi
from qlens_plugins.cost.budgets.lines import Line, lines_for, lines_of
from qlens_plugins.cost.budgets.memory import MemoryStore
from qlens_plugins.cost.budgets.redis import RedisBudgets, Spent
from qlens_plugins.cost.budgets.settings import BudgetsConfig, Memory, Redis, Sqlite, place
from qlens_plugins.cost.budgets.sqlite import SqliteStore
from qlens_plugins.cost.budgets.store import Account, Need, Store, StoreAway
from qlens_plugins.cost.budgets.tills import Purse, Till, Tills, describe
from qlens_plugins.cost.budgets.windows import window_of

if TYPE_CHECKING:
    from qlens import Caller, Gateway, Model

log = logging.getLogger("qlens.budgets")

REMEMBERED = 4096
"""How many plans are kept at most: credentials that others make, such as JWTs, name callers without end."""
_SAMPLES = 20
"""Of how many costs the largest is what a call will likely cost: nineteen of twenty are not above it."""
_COSTLY = frozenset({"batch_create", "passthrough"})
"""Operations without a model that may cost something all the same."""
_SAID = frozenset({"output", "reasoning", "audio_out"})
_CRASH_SECONDS = 60.0
_AHEAD_SECONDS = 86_400
"""How far a gateway's clock may be ahead of Redis' for its receipts to be found after a loss."""

NOTHING = Need(0)
Hold = tuple["Plan", list[tuple[Till, Need]]]


@define(eq=False)
class Plan:
    """The budgets that one caller with one model counts in."""

    caller: Caller
    model: Model | None
    hard: tuple[Purse, ...]
    soft: tuple[Purse, ...]
    tolerant: bool
    recent: deque[int] = field(factory=lambda: deque(maxlen=_SAMPLES))
    """What calls cost."""


@frozen
class _Counters:
    refused: Any
    warned: Any
    overrun: Any


@define(eq=False)
class Budgets:
    """Reserves what a call can cost at most in all its budgets or in none, and settles to what it cost."""

    config: BudgetsConfig
    name: str
    lines: tuple[Line, ...] = field(init=False)
    _plans: dict[tuple[int, int], Plan] = field(factory=dict, init=False, repr=False)
    _tills: Tills | None = field(default=None, init=False, repr=False)
    _retired: bool = field(default=False, init=False, repr=False)
    """Whether a newer configuration's limits hold."""
    _gateway: Gateway | None = field(default=None, init=False, repr=False)
    _count: _Counters | None = field(default=None, init=False, repr=False)

    Config = BudgetsConfig

    def __attrs_post_init__(self) -> None:
        self.lines = lines_of(self.config.limits, self.config.tolerance)

    @property
    def shares(self) -> Literal["process", "store"]:
        """How far the budgets reach."""
        return "process" if isinstance(self.config.store, Memory) else "store"

    @property
    def tills(self) -> Tills:
        """The budgets, from the time the lifespan has opened."""
        assert self._tills is not None, "the budgets are not open"
        return self._tills

    @property
    def gateway(self) -> Gateway:
        """The gateway, from the time the lifespan has opened."""
        assert self._gateway is not None, "the budgets are not open"
        return self._gateway

    @property
    def wants_bound(self) -> bool:
        """Whether calls are refused of which nobody knows how much they can generate."""
        return any(line.hard for line in self.lines)

    @property
    def zone(self) -> ZoneInfo:
        """Where days begin."""
        return ZoneInfo(self.config.time_zone)

    # --- its life ------------------------------------------------------------------------------

    @hookimpl
    def adopt(self, old: Budgets) -> None:
        """Go on with what is spent and held: a changed limit is no fresh budget."""
        if old.config.store == self.config.store and old.config.time_zone == self.config.time_zone:
            self._tills, old._retired = old._tills, True

    @hookimpl
    @asynccontextmanager
    async def lifespan(self, gateway: Gateway) -> AsyncIterator[None]:
        """Hold a part of each budget while calls are served; what is left goes back at the end."""
        self._gateway = gateway
        if not gateway.url:  # a command runs, which opens the store itself
            yield
            return
        async with AsyncExitStack() as stack:
            store = await stack.enter_async_context(self.open_store(gateway))
            if self._tills is None or not self._tills.users:
                self._tills = await self._new_tills(store, gateway)
            self._count = _counters(gateway)
            self._tills.warn = self._warn
            await self._tills.open()
            try:
                yield
            finally:
                await self._tills.close()

    async def _new_tills(self, store: Store, gateway: Gateway) -> Tills:
        config = self.config.store
        if isinstance(store, SqliteStore | RedisBudgets):
            try:
                await store.open()
            except StoreAway as away:
                log.error("budgets: the store does not answer: %s", away)
        if isinstance(config, Memory):
            # Nobody else has a part: all that is free may be held in advance.
            return Tills(store, gateway.clock.time, self.zone, 1, 1e12, 1)
        tills = Tills(store, gateway.clock.time, self.zone, config.lease_seconds, config.crash_seconds, 100)
        if isinstance(config, Redis):
            tills.look_ticks = 2  # a Redis that was emptied is to hear of all that is held within `gather_seconds`
        return tills

    @asynccontextmanager
    async def open_store(self, gateway: Gateway) -> AsyncIterator[Store]:
        """A store, which is asked nothing yet."""
        config = self.config.store
        if isinstance(config, Redis):
            async with redis_store(gateway, config) as redis:
                yield RedisBudgets(redis, self._spent(gateway), config.gather_seconds)
        elif isinstance(config, Sqlite):
            yield SqliteStore(place(config.url, gateway.config.folder))
        else:
            yield MemoryStore()

    def _spent(self, gateway: Gateway) -> Spent | None:
        """What a ledger of the same gateway says of a budget, if there is one."""
        if past.ledger_of(gateway) is None:
            return None

        async def spent(account: Account, start: int, end: int) -> int:
            line = next((line for line in self.lines if line.name == account.rule), None)
            if line is None or line.hard:
                # Nothing has begun under a hard budget since: what seems to have is of a gateway whose clock is ahead.
                end = min(end + _AHEAD_SECONDS, window_of(account.period, start, self.zone).end)
            return await past.spent_of(gateway, line, account, start, end)

        return spent

    @hookimpl
    def banner(self) -> Iterable[str]:
        """Say it where a restart forgets what was spent."""
        if isinstance(self.config.store, Memory):
            yield (
                f"{self.name}: what is spent is kept in memory, and a restart forgets it; "
                "`store: {kind: sqlite}` keeps it"
            )

    @hookimpl
    def health(self) -> Health:
        """Whether the store answers."""
        if isinstance(self.config.store, Memory):
            return Health(True, "kept in memory: a restart forgets what was spent")
        trouble = self.tills.trouble
        return Health(not trouble, f"calls under hard budgets are refused: {trouble}" if trouble else "")

    # --- a call's way --------------------------------------------------------------------------

    @hookimpl
    async def admit(self, call: Call) -> Hold | None:
        """Reserve the most that the call can cost; nothing is reserved unless every budget has room."""
        plan = self._plans.get((id(call.caller), id(call.model))) or self._plan(call)
        if not (plan.hard or plan.soft):
            return None
        tills = self._tills
        assert tills is not None, "the budgets are not open"
        held = [(tills.current(purse), NOTHING) for purse in plan.soft] if plan.soft else []
        if not plan.hard:
            return plan, held
        cost = call.bound_cost.picos
        if cost is None:
            if call.model is None and (call.operation.name not in _COSTLY or call.operation.method == "GET"):
                return None
            raise refusals.unpriced(call)
        if not cost:
            return plan, [*held, *((tills.current(purse), NOTHING) for purse in plan.hard)]
        call.most_output = call.bound.output
        if plan.tolerant:
            return await self._ask(plan, cost, held, call)
        now = tills.now()
        for purse in plan.hard:
            till = purse.till
            if cost > till.room or now >= till.until:
                return await self._ask(plan, cost, held, call)
        need = Need(cost)
        for purse in plan.hard:
            till = purse.till
            till.room -= cost
            till.held += cost
            held.append((till, need))
        return plan, held

    async def _ask(self, plan: Plan, cost: int, held: list[tuple[Till, Need]], call: Call) -> Hold:
        """Reserve in one budget after the other, where one at least must be asked of the store.

        The one with the least left comes first: a call that it has no money for holds nothing of the others meanwhile,
        which other callers may share, and is told of what is spent rather than of what is held.
        """
        tills = self.tills
        taken: list[tuple[Till, Need]] = []
        try:
            for purse in sorted(plan.hard, key=lambda purse: tills.current(purse).left):
                need = self._need(plan, purse, cost, call)
                try:
                    till = await tills.take(purse, need)
                    if till is None and need.excess:  # no tolerance is left, but the whole bound may fit
                        need = Need(cost)
                        till = await tills.take(purse, need)
                except StoreAway as away:
                    raise refusals.away() from away
                taken.append((till or self._refuse(purse, need), need))
        except BaseException:
            for till, need in taken:
                tills.give_back(till, need)
            raise
        return plan, [*held, *taken]

    async def reserve_more(self, call: Call, hold: Hold, picos: int) -> bool:
        """Reserve this beside what a call holds, in all its hard budgets or in none: a failed attempt has cost it."""
        tills, more = self.tills, Need(picos)
        _, held = hold
        taken: list[Till] = []
        try:
            for till in [till for till, need in held if need is not NOTHING]:
                # What a call costs counts in the window in which it was admitted: once that is over nobody else takes
                # of it, and no other window has anything to do with it.
                if tills.current(till.purse) is not till:
                    continue
                granted = await tills.take(till.purse, more)
                taken += [] if granted is None else [granted]
                if granted is not till:
                    return False
            held[:] = [(till, Need(need.likely + picos, need.excess) if till in taken else need) for till, need in held]
            taken = []
            return True
        except StoreAway:
            return False
        finally:
            for till in taken:
                tills.give_back(till, more)

    def _refuse(self, purse: Purse, need: Need) -> NoReturn:
        if self._count is not None:
            self._count.refused.labels(purse.line.name).inc()
        if refusals.is_spent(purse.till, need):
            reached.exhaust(self.gateway, purse.till)
        raise refusals.spent(purse.till, need)

    def _need(self, plan: Plan, purse: Purse, cost: int, call: Call) -> Need:
        """The whole bound, or with a tolerance what such calls cost, and the rest as excess."""
        tolerance = purse.line.tolerance
        if not tolerance or not call.bound_cost.lines:
            return Need(cost)
        asked = sum(quantity * each for meter, quantity, each in call.bound_cost.lines if meter not in _SAID)
        likely = min(cost, max(asked, *plan.recent)) if plan.recent else min(cost, asked)
        excess = min(cost - likely, tolerance)
        return Need(cost - excess, excess)

    @hookimpl
    async def settle(self, call: Call, receipt: Receipt, hold: Hold | None) -> None:
        """Charge what the receipt says; where it does not know, what was reserved."""
        if hold is None:
            return
        plan, held = hold
        tills, cost = self._tills, receipt.cost.picos
        assert tills is not None, "the budgets are not open"
        for till, need in held:
            reserved = need.likely + need.excess
            tills.settle(till, need, reserved if cost is None else cost)
            if cost is not None and cost > reserved and need is not NOTHING:
                self._overrun(till, cost - reserved)
        if plan.tolerant and cost:
            plan.recent.append(cost)

    def _overrun(self, till: Till, picos: int) -> None:
        if self._count is not None:
            self._count.overrun.labels(till.purse.line.name).inc()
        log.warning("%s: a call cost %s USD more than was reserved", describe(till), usd(picos))

    def _warn(self, till: Till, percent: int) -> None:
        if self._count is not None:
            self._count.warned.labels(till.purse.line.name, str(percent)).inc()
        log.warning("%s: %d %% are spent (%s USD)", describe(till), percent, usd(till.all_spent))
        reached.announce(self.gateway, till, percent)

    def _beside(self, line: Line, account: Account) -> tuple[str, ...]:
        """The budgets of a model's other names: what they have spent is its own, whichever name came first then."""
        model = self.gateway.models.named(account.owner) if account.per == "model" else None
        return () if model is None else tuple(line.of_model(name).id for name in model.names if name != account.owner)

    def _plan(self, call: Call) -> Plan:
        found = [
            (line, self.tills.purse(account, line, self._beside(line, account), is_newest=not self._retired))
            for line, account in lines_for(self.lines, call)
        ]
        plan = Plan(
            call.known,
            call.model,
            tuple(purse for line, purse in found if line.hard),
            tuple(purse for line, purse in found if not line.hard),
            any(line.tolerance for line, _ in found if line.hard),
        )
        if len(self._plans) >= REMEMBERED:
            del self._plans[next(iter(self._plans))]
        # By identity, which costs no hash over all a caller has; the plan keeps both alive, so nothing has their ids.
        self._plans[id(call.caller), id(call.model)] = plan
        return plan

    # --- the rest ------------------------------------------------------------------------------

    @hookimpl
    def endpoints(self) -> Iterable[Endpoint]:
        """What is spent and left, for callers and operators."""
        return BudgetApi(self).endpoints()

    @hookimpl
    def commands(self) -> Iterable[Command]:
        """`qlens budgets`."""
        from qlens_plugins.cost.budgets.commands import command  # not for those that serve

        yield command(self)

    @hookimpl
    def explain(self, call: Call) -> list[str]:
        """Say what would be reserved where."""
        cost = call.bound_cost.picos
        amount = "an unknown amount" if cost is None else f"up to {usd(cost)} USD"
        return [
            f"{'reserves' if line.hard else 'counts'} {amount} in the {line.period} budget of "
            f"{account.per} {account.owner} ({usd(line.limit)} USD)"
            for line, account in lines_for(self.lines, call)
        ]


def _counters(gateway: Gateway) -> _Counters:
    metrics = gateway.metrics
    return _Counters(
        metrics.counter("qlens_budget_refusals_total", "Calls that a budget had no room for.", ("budget",)),
        metrics.counter(
            "qlens_budget_warnings_total", "Budgets that reached a share of their limit.", ("budget", "percent")
        ),
        metrics.counter("qlens_budget_overruns_total", "Calls that cost more than was reserved for them.", ("budget",)),
    )
