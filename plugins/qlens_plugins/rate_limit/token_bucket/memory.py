"""Buckets in the memory of one process."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from weakref import WeakValueDictionary

from attrs import define, field

from qlens import CallError, Receipt
from qlens_plugins.rate_limit.token_bucket.meters import NANOSECOND, Cap, Key, Meter
from qlens_plugins.rate_limit.token_bucket.plans import Hold, Place, Plan, Share, owed, owed_to
from qlens_plugins.rate_limit.token_bucket.refusals import crowded, limited, too_large
from qlens_plugins.rate_limit.token_bucket.shown import Used


@define(eq=False)
class Level:
    """A bucket: the time when it is full again, in picoseconds."""

    meter: Meter
    """As it was asked for last: a reload changes its numbers."""
    slot: str
    full_at: int = 0


@define(eq=False)
class Seats:
    """The calls of one owner that run at the same time."""

    cap: Cap
    slot: str
    running: int = 0


@define(eq=False)
class Levels:
    """All buckets: those of remembered plans and running calls live with them, others while they are not full."""

    now: Callable[[], int] = field(default=int, repr=False)
    """The clock, once there is one."""
    levels: WeakValueDictionary[Key, Level] = field(factory=WeakValueDictionary)
    running: WeakValueDictionary[Key, Seats] = field(factory=WeakValueDictionary)
    left: OrderedDict[Key, Level] = field(factory=OrderedDict)

    def level(self, meter: Meter, key: Key, slot: str) -> Level:
        """The bucket of a meter; whoever makes a new one looks at two that were left, so that those stay few."""
        level = self.levels.get(key)
        if level is None:
            level = self.levels[key] = Level(meter, slot)
            self._sweep(2)
        level.meter = meter
        return level

    def seats(self, cap: Cap, key: Key, slot: str) -> Seats:
        """The places of a cap."""
        seats = self.running.get(key)
        if seats is None:
            seats = self.running[key] = Seats(cap, slot)
        seats.cap = cap
        return seats

    def keep(self, plan: Plan[Level, Seats]) -> None:
        """Hold on to those of a plan's buckets that are not full."""
        now = self.now()
        for share in plan.shares:
            if share.level.full_at > now:
                self.left[share.key] = share.level

    def _sweep(self, count: int) -> None:
        """Drop those that are full again, of the `count` that were not looked at for longest."""
        now = self.now()
        for _ in range(min(count, len(self.left))):
            key, level = self.left.popitem(last=False)
            if level.full_at > now:
                self.left[key] = level

    # --- a call's way --------------------------------------------------------------------------

    def take(self, plan: Plan[Level, Seats], tokens: int) -> CallError | None:
        """Take what a call may use, or nothing; what refuses it is returned."""
        # Every call comes this way: it calls nothing and makes nothing.
        now = self.now()
        for share in plan.shares:
            level = share.level
            needed = tokens * share.unit if share.counts_tokens else share.unit
            full_at = level.full_at
            missing = needed + full_at - now if full_at > now else needed
            if missing > share.room and needed:
                return self._undone(plan, tokens, now, share)
            level.full_at = now + missing
            share.missing = missing
        for place in plan.places:
            seats = place.seats
            if seats.running >= place.limit:
                return self._undone(plan, tokens, now, place)
            seats.running += 1
        return None

    def _undone(self, plan: Plan[Level, Seats], tokens: int, now: int, last: Share[Level] | Place[Seats]) -> CallError:
        """Give back what was taken before the bucket or place that refused, and say why."""
        for taken in plan.limits:
            if taken is last:
                break
            if isinstance(taken, Share):
                taken.level.full_at -= taken.quantity(tokens) * taken.unit
            else:
                taken.seats.running -= 1
        for share in plan.shares:
            share.missing = max(0, share.level.full_at - now)
        return refusal(plan, tokens, now)

    def settle(self, hold: Hold[Level, Seats], receipt: Receipt, provider: str | None = None) -> None:
        """Correct what was held by what was used, and let the next call run."""
        plan, tokens = hold
        if receipt.outcome == "rejected":
            # Any other request that failed was one all the same, or else failing would be a way around the limit.
            self._add(plan.requests, -1)
        if tokens and plan.tokens:
            self._add(plan.tokens, owed(tokens, receipt) if provider is None else owed_to(provider, tokens, receipt))
        for place in plan.places:
            place.seats.running -= 1
        if not plan.kept:
            self.keep(plan)

    def unsent(self, hold: Hold[Level, Seats]) -> None:
        """Give back what a send holds that failed; it was a request all the same."""
        plan, tokens = hold
        self._add(plan.tokens, -tokens)
        for place in plan.places:
            place.seats.running -= 1

    def _add(self, shares: Iterable[Share[Level]], units: int) -> None:
        """Take from buckets without end, or give back to them: nothing goes above full."""
        if units <= 0:
            for share in shares:
                share.level.full_at += units * share.unit  # a time that is over: the bucket is full, as it was
            return
        now = self.now()
        for share in shares:
            share.level.full_at = max(share.level.full_at, now) + units * share.unit

    # --- for operators -------------------------------------------------------------------------

    async def used(self) -> list[Used]:
        """Implements `Shown`."""
        levels = [Used(key, level.slot, level.meter) for key, level in self.levels.items()]
        return levels + [Used(key, seats.slot, seats.cap) for key, seats in self.running.items()]

    async def taken(self, used: Sequence[Used]) -> list[int]:
        """Implements `Shown`."""
        now, found = self.now(), []
        for each in used:
            level, seats = self.levels.get(each.key), self.running.get(each.key)
            found.append(seats.running if seats is not None else max(0, level.full_at - now) if level else 0)
        return found

    async def clear(self, used: Used) -> None:
        """Implements `Shown`."""
        level = self.levels.get(used.key)
        if level is not None:
            level.full_at = 0


def refusal(plan: Plan[Level, Seats], tokens: int, now: int) -> CallError:
    """Why a call may not run; of several buckets that refuse, the one that takes longest speaks."""
    longest, slowest = 0, None
    for share in plan.taking(tokens):
        quantity = share.quantity(tokens)
        if quantity * share.unit > share.room:
            return too_large(share.meter, share.key, quantity, share.meter.capacity)
        wait = share.meter.wait(share.level.full_at, now, quantity)
        if wait > 0 and wait >= longest:
            longest, slowest = wait, share
    if slowest is not None:
        return limited(slowest.meter, slowest.key, slowest.quantity(tokens), slowest.remaining, longest)
    full = next(place for place in plan.places if place.seats.running >= place.limit)
    return crowded(full.cap, full.key, full.seats.running)


def clock(monotonic_ns: Callable[[], int]) -> Callable[[], int]:
    """A clock in picoseconds."""
    return lambda: monotonic_ns() * NANOSECOND
