"""Buckets in the memory of one process."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from weakref import WeakValueDictionary

from attrs import define, field

from qlens import CallError, Limit, Receipt
from qlens_plugins.rate_limit.token_bucket.meters import MICROSECOND, Cap, Key, Meter
from qlens_plugins.rate_limit.token_bucket.plans import Hold, Place, Plan, Share, owed, standing, tightest
from qlens_plugins.rate_limit.token_bucket.refusals import crowded, limited, too_large


@define(eq=False)
class Level:
    """A bucket: the time when it is full again, in picoseconds."""

    full_at: int = 0


@define(eq=False)
class Seats:
    """The calls of one owner that run at the same time."""

    running: int = 0


@define(eq=False)
class Levels:
    """All buckets: those of remembered plans and running calls live with them, others while they are not full."""

    now: Callable[[], int] = field(repr=False)
    levels: WeakValueDictionary[Key, Level] = field(factory=WeakValueDictionary)
    running: WeakValueDictionary[Key, Seats] = field(factory=WeakValueDictionary)
    left: OrderedDict[Key, Level] = field(factory=OrderedDict)

    def level(self, meter: Meter, key: Key, slot: str) -> Level:
        """The bucket of a meter; whoever makes a new one looks at two that were left, so that those stay few."""
        del meter, slot
        level = self.levels.get(key)
        if level is None:
            level = self.levels[key] = Level()
            self._sweep(2)
        return level

    def seats(self, cap: Cap, key: Key, slot: str) -> Seats:
        """The places of a cap."""
        del cap, slot
        seats = self.running.get(key)
        if seats is None:
            seats = self.running[key] = Seats()
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


def take(plan: Plan[Level, Seats], tokens: int, now: int) -> CallError | None:
    """Take what a call may use, or nothing; what refuses it is returned."""
    # Every call comes this way: it calls nothing and makes nothing.
    for share in plan.requests:
        level = share.level
        full_at = level.full_at
        full_at = (full_at if full_at > now else now) + share.unit
        level.full_at = full_at
        if full_at - now > share.room:
            return _undone(plan, tokens, now, share)
    if tokens:  # who takes nothing from a bucket is not refused by it, however deep in debt it is
        for share in plan.tokens:
            level = share.level
            full_at = level.full_at
            full_at = (full_at if full_at > now else now) + tokens * share.unit
            level.full_at = full_at
            if full_at - now > share.room:
                return _undone(plan, tokens, now, share)
    for place in plan.places:
        if place.seats.running >= place.cap.most:
            return _undone(plan, tokens, now, None)
    for place in plan.places:
        place.seats.running += 1
    return None


def _undone(plan: Plan[Level, Seats], tokens: int, now: int, last: Share[Level] | None) -> CallError:
    """Give back what was taken up to the bucket that refused, and say why."""
    taking = plan.shares if tokens else plan.requests
    for share in taking:
        share.level.full_at -= (tokens if share.meter.kind == "tokens" else 1) * share.unit
        if share is last:
            break
    return refusal(plan, tokens, now)


def refusal(plan: Plan[Level, Seats], tokens: int, now: int) -> CallError:
    """Why a call may not run; of several buckets that refuse, the one that takes longest speaks."""
    longest, slowest = 0, None
    for share in plan.shares if tokens else plan.requests:
        quantity = tokens if share.meter.kind == "tokens" else 1
        if quantity * share.unit > share.room:
            return too_large(share.meter, share.key, quantity, share.meter.capacity)
        wait = share.meter.wait(share.level.full_at, now, quantity)
        if wait > 0 and wait >= longest:
            longest, slowest = wait, share
    if slowest is not None:
        quantity = tokens if slowest.meter.kind == "tokens" else 1
        remaining = slowest.meter.limit(slowest.level.full_at, now).remaining
        return limited(slowest.meter, slowest.key, quantity, remaining, longest)
    full = next(place for place in plan.places if place.seats.running >= place.cap.most)
    return crowded(full.cap, full.key, full.seats.running)


def add(share: Share[Level], units: int, now: int) -> None:
    """Take from a bucket or give back to it: debt has no end, and nothing goes above full."""
    level = share.level
    full_at = level.full_at
    level.full_at = (full_at if full_at > now else now) + units * share.unit


def tell(plan: Plan[Level, Seats], now: int, limits: list[Limit]) -> None:
    """Note where the caller stands: with the tightest bucket of each kind, and with the places."""
    for shares in plan.kinds:
        if len(shares) == 1:
            share = shares[0]
            missing = share.level.full_at - now
        else:
            share, missing = tightest(shares, lambda share: share.level.full_at - now)
        limits.append(standing(share, missing))
    for place in plan.places:
        limits.append(place.cap.limit(place.seats.running))


def settle(hold: Hold[Level, Seats], receipt: Receipt, now: int, provider: str | None = None) -> None:
    """Correct what was held by what was used, and let the next call run."""
    plan, tokens = hold
    if receipt.outcome == "rejected":
        # Any other request that failed was one all the same, or else failing would be a way around the limit.
        for share in plan.requests:
            add(share, -1, now)
    if tokens and plan.tokens and (difference := owed(tokens, receipt, provider)):
        for share in plan.tokens:
            add(share, difference, now)
    for place in plan.places:
        place.seats.running -= 1


def leave(places: tuple[Place[Seats], ...]) -> None:
    """End one running call."""
    for place in places:
        place.seats.running -= 1


def clock(monotonic: Callable[[], float]) -> Callable[[], int]:
    """A clock in picoseconds."""
    # Through whole microseconds, which is as fine as seconds in a float are.
    return lambda: round(monotonic() * 1_000_000) * MICROSECOND
