"""Buckets in a store that all replicas share, and what a process holds of them in advance.

A process takes more than a call needs while the bucket is far from empty: a lease, which it serves calls from without
asking. Units are gone from the store before they are used, so that all processes together never let more pass than the
bucket gives; what is not used goes back when the lease ends. A leased unit may be used up to `lease` later than it was
taken, while its bucket refills: so a bucket of which leases are given has by as much less room. In any window of t
seconds no more passes than `burst + rate * t`.

While the store is away each process enforces its share, going on from where it knows the bucket to be.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Sequence

from attrs import define, field

from qlens import CallError, Receipt, RedisStore, StoreUnavailable
from qlens_plugins.rate_limit.token_bucket.meters import SECOND, Meter
from qlens_plugins.rate_limit.token_bucket.plans import Hold, Place, Plan, Share, owed, owed_to
from qlens_plugins.rate_limit.token_bucket.purses import Purse, Purses, Seats
from qlens_plugins.rate_limit.token_bucket.refusals import crowded, limited, too_large
from qlens_plugins.rate_limit.token_bucket.script import CLEAR, READ, TAKE, AskedBucket, AskedPlace, arguments
from qlens_plugins.rate_limit.token_bucket.settings import Redis
from qlens_plugins.rate_limit.token_bucket.shown import Used

_TOGETHER = 64
"""How many calls one script decides at most."""
_TICK_SECONDS = 0.25
_GATHER_SECONDS = 0.005
"""How long to wait for more of what is to go back at once."""
_PATIENCE = SECOND // 2
"""How long corrections wait for a call that takes them along."""
_LEASED = 20
"""What all processes together hold of a bucket in advance at most, and how long: one part in so many."""
_LEAST = {"requests": 2, "tokens": 2048}
"""The smallest lease that is worth it."""


@define(eq=False)
class _Waiter:
    tokens: int
    verdict: asyncio.Future[tuple[int, int] | None]
    """Which bucket or place refuses, counted from 1, and the picoseconds to wait; None: the store is away."""

    def passes(self) -> bool:
        """Whether it was decided that it may run."""
        if not self.verdict.done() or self.verdict.cancelled():
            return False
        verdict = self.verdict.result()
        return verdict is not None and not verdict[0]


@define(eq=False)
class _Group:
    """What a plan takes from one slot: one script decides about all of it."""

    shares: tuple[Share[Purse], ...]
    places: tuple[Place[Seats], ...]
    waiting: list[_Waiter] = field(factory=list)
    is_busy: bool = False


@define(eq=False)
class Shared:
    """Takes from the store, from what is held of it, or alone while it is away."""

    store: RedisStore
    settings: Redis
    state: Purses
    now: Callable[[], int]
    processes: int
    count: Callable[[str], None]
    """Counts calls that were not served from what is held."""
    _soon: asyncio.Event = field(factory=asyncio.Event, init=False, repr=False)
    _tasks: set[asyncio.Task[None]] = field(factory=set, init=False, repr=False)

    # --- taking --------------------------------------------------------------------------------

    def take(self, plan: Plan[Purse, Seats], tokens: int) -> Coroutine[object, object, CallError | None] | None:
        """Take what a call may use from what is held, as nearly every call does; or else return what asks for it."""
        parts = plan.parts or groups(plan)
        if not parts or (len(parts) == 1 and self.store.ok and _from_held(parts[0], tokens, self.now())):
            return None
        return self._asked(plan, tokens)

    async def _asked(self, plan: Plan[Purse, Seats], tokens: int) -> CallError | None:
        """Take what a call may use, or nothing; what refuses it is returned."""
        try:
            return await self._take_all(plan, tokens)
        finally:
            now = self.now()
            for share in plan.shares:
                share.missing = _missing(share, now)

    async def _take_all(self, plan: Plan[Purse, Seats], tokens: int) -> CallError | None:
        for share in plan.taking(tokens):
            quantity = share.quantity(tokens)
            if quantity * share.unit > share.room:
                return too_large(share.meter, share.key, quantity, share.room // share.unit)
        taken: list[_Group] = []
        try:
            for group in groups(plan):
                refusal = await self._take(group, tokens)
                if refusal is not None:
                    self._give_back(taken, tokens)
                    return refusal
                taken.append(group)
        except BaseException:
            self._give_back(taken, tokens)
            raise
        return None

    async def _take(self, group: _Group, tokens: int) -> CallError | None:
        now = self.now()
        if not self.store.ok:
            return self._take_alone(group, tokens, now)
        if _from_held(group, tokens, now):
            return None
        verdict = await self._ask(group, tokens)
        if verdict is None:
            return self._take_alone(group, tokens, self.now())
        refused, wait = verdict
        if not refused:
            return None
        if refused > len(group.shares):
            place = group.places[refused - len(group.shares) - 1]
            return crowded(place.cap, place.key, place.cap.most)
        share = group.shares[refused - 1]
        quantity = share.quantity(tokens)
        left = (share.room - max(0, share.level.full_at - self.now())) // share.unit
        return limited(share.meter, share.key, quantity, max(0, left), wait)

    async def _ask(self, group: _Group, tokens: int) -> tuple[int, int] | None:
        """Ask the store; calls that come meanwhile are decided by the next script, all together."""
        self.count("asked")
        waiter = _Waiter(tokens, asyncio.get_running_loop().create_future())
        group.waiting.append(waiter)
        if not group.is_busy:
            group.is_busy = True
            self._start(self._decide(group))
        try:
            return await waiter.verdict
        except asyncio.CancelledError:
            if waiter.passes():  # decided in its favour, and nobody is there to use it
                self._give_back([group], tokens)
            raise

    async def _decide(self, group: _Group) -> None:
        together: list[_Waiter] = []
        try:
            while group.waiting:
                together, group.waiting = group.waiting[:_TOGETHER], group.waiting[_TOGETHER:]
                for place in group.places:
                    place.seats.asking += len(together)
                verdicts = await self._send(group.shares, group.places, [waiter.tokens for waiter in together])
                self._tell(group, together, verdicts)
        finally:
            group.is_busy = False
            for waiter in (*together, *group.waiting):
                if not waiter.verdict.done():  # the process is stopping
                    waiter.verdict.set_result(None)
            group.waiting.clear()

    def _tell(self, group: _Group, together: Sequence[_Waiter], verdicts: Sequence[tuple[int, int]] | None) -> None:
        for number, waiter in enumerate(together):
            verdict = None if verdicts is None else verdicts[number]
            passes = verdict is not None and not verdict[0]
            for place in group.places:
                place.seats.asking -= 1
                place.seats.running += passes
            if not waiter.verdict.done():
                waiter.verdict.set_result(verdict)
            elif passes:
                self._give_back([group], waiter.tokens)

    def _give_back(self, taken: Iterable[_Group], tokens: int) -> None:
        """Undo what groups took for a call that does not run."""
        now = self.now()
        for group in taken:
            for share in group.shares:
                self._owe(share, -share.quantity(tokens), now, is_urgent=True)
            self._leave(group.places)

    # --- the store -----------------------------------------------------------------------------

    async def _send(
        self, shares: Sequence[Share[Purse]], places: Sequence[Place[Seats]], calls: Sequence[int]
    ) -> Sequence[tuple[int, int]] | None:
        """Run the script: settle what is owed, decide calls, and take leases; None when the store is away."""
        now = self.now()
        debts = [(max(0, share.level.owed), share.level.alone_at) for share in shares]
        buckets = [self._asked_bucket(share, calls, now) for share in shares]
        seats = [self._asked_place(place, len(calls), now) for place in places]
        sent = [place.seats.sent for place in places]
        keys, args = arguments(self.state.me, int(self.settings.slot_seconds * 1000), buckets, seats, calls)
        try:
            verdicts, told, _ = await self.store.run(TAKE, keys, args)
        except StoreUnavailable:
            # What was to be given back is lost until the bucket refills; debts are not forgiven.
            for share, (debt, alone_at) in zip(shares, debts, strict=True):
                if alone_at is not None:
                    share.level.alone_at = max(alone_at, share.level.alone_at or 0)
                self._owe(share, debt, self.now())
            return None
        self._learn(shares, told, now)
        for number, place in enumerate(places, len(shares)):
            if place.seats.sent == sent[number - len(shares)]:
                others, place.seats.held = told[2 * number], told[2 * number + 1]
                place.seats.is_tight = others + place.seats.held > place.cap.most * 0.8
            self.state.taken[place.seats] = place
        return list(zip(verdicts[::2], verdicts[1::2], strict=True))

    def _asked_bucket(self, share: Share[Purse], calls: Sequence[int], now: int) -> AskedBucket:
        """What to say of a bucket; what is held of it goes back, so that the store decides about all there is."""
        purse = share.level
        known = max(0, purse.full_at - now)
        owed_ps = (purse.owed - purse.units) * share.unit
        alone_ps = 0
        if purse.alone_at is not None:  # what this process let pass alone and has not come back yet
            alone_ps = max(0, purse.alone_at - now - known) // self.processes
            purse.alone_at = None
        purse.owed = purse.units = 0
        extra = self._wanted(share, sum(share.quantity(tokens) for tokens in calls), now) if calls else 0
        return AskedBucket(purse.key, share.unit, share.room, share.counts_tokens, owed_ps, extra, known, alone_ps)

    def _wanted(self, share: Share[Purse], needed: int, now: int) -> int:
        """How much to lease: twice as much as last time if that was used up early, nothing where calls are rare."""
        purse, life, most = share.level, self._life(share.meter), self._most(share.meter)
        if not life or not most:
            return 0
        is_early = now - purse.asked_at < 2 * life
        purse.asked_at = now
        purse.want = min(most, max(needed, 2 * purse.want)) if is_early else 0
        return purse.want

    def _asked_place(self, place: Place[Seats], calls: int, now: int) -> AskedPlace:
        seats = place.seats
        seats.sent += 1
        seats.held = seats.running  # spare ones go back, too
        most = max(1, place.cap.most // (_LEASED * self.processes))
        if calls:
            is_early = now - seats.asked_at < 2 * SECOND
            seats.want = min(most, max(calls, 2 * seats.want)) if is_early and self.settings.lease_seconds else 0
            seats.asked_at = now
        # Those that are asked for in this very script are counted by it.
        return AskedPlace(seats.key, place.cap.most, seats.running + seats.asking - calls, seats.want if calls else 0)

    def _learn(self, shares: Sequence[Share[Purse]], told: Sequence[int], sent_at: int) -> None:
        now = self.now()
        for number, share in enumerate(shares):
            purse = share.level
            missing, granted = told[2 * number], told[2 * number + 1]
            purse.full_at = now + missing
            if granted:
                # From when it was asked for: a slow answer makes a lease shorter, never longer.
                until = sent_at + self._life(share.meter)
                purse.until = min(purse.until, until) if purse.units else until
                purse.units += granted
                self.state.dirty[purse] = share

    def _life(self, meter: Meter) -> int:
        """How long a lease of a meter lasts, in picoseconds; 0: there are none."""
        return lease(self.settings, meter, self.processes)

    def _most(self, meter: Meter) -> int:
        return meter.capacity // (_LEASED * self.processes)

    # --- while the store is away ---------------------------------------------------------------

    def _take_alone(self, group: _Group, tokens: int, now: int) -> CallError | None:
        """Take from this process' share of each bucket."""
        self.count("alone")
        longest, slowest = 0, None
        for share in group.shares:
            quantity = share.quantity(tokens)
            wait = max(0, self._alone(share, now) - now) + quantity * self._unit(share) - share.room
            # A call that is larger than a share passes when the share is full, or it never would.
            wait = min(wait, max(0, self._alone(share, now) - now))
            if quantity and wait > 0 and wait >= longest:
                longest, slowest = wait, share
        if slowest is not None:
            return limited(slowest.meter, slowest.key, slowest.quantity(tokens), 0, longest)
        for place in group.places:
            if place.seats.running >= max(1, place.cap.most // self.processes):
                return crowded(place.cap, place.key, place.seats.running)
        for share in group.shares:
            share.level.alone_at = max(now, self._alone(share, now)) + share.quantity(tokens) * self._unit(share)
            self.state.dirty[share.level] = share
        for place in group.places:
            place.seats.running += 1
            self.state.taken[place.seats] = place
        return None

    @staticmethod
    def _alone(share: Share[Purse], now: int) -> int:
        """When this process' share is full again; it goes on from what is known of the whole bucket."""
        purse = share.level
        return purse.alone_at if purse.alone_at is not None else max(now, purse.full_at)

    def _unit(self, share: Share[Purse]) -> int:
        return share.unit * self.processes

    # --- settling ------------------------------------------------------------------------------

    def settle(self, hold: Hold[Purse, Seats], receipt: Receipt, provider: str | None = None) -> None:
        """Correct what was held by what was used, and let the next call run."""
        plan, tokens = hold
        if receipt.outcome == "rejected":
            now = self.now()
            for share in plan.requests:
                self._owe(share, -1, now, is_urgent=True)
        if tokens and plan.tokens:
            owes = owed(tokens, receipt) if provider is None else owed_to(provider, tokens, receipt)
            now = self.now()
            for share in plan.tokens:
                self._owe(share, owes, now)
        self._leave(plan.places)

    def unsent(self, hold: Hold[Purse, Seats]) -> None:
        """Give back what a send holds that failed; it was a request all the same."""
        plan, tokens = hold
        now = self.now()
        for share in plan.tokens:
            self._owe(share, -tokens, now)
        self._leave(plan.places)

    def _owe(self, share: Share[Purse], units: int, now: int, *, is_urgent: bool = False) -> None:
        """Note units that are to be taken from the store beyond what was, or below 0 given back to it."""
        purse = share.level
        if purse.alone_at is not None and not self.store.ok:
            purse.alone_at += units * self._unit(share)
            return
        if units > 0 and purse.until > now:
            held = min(units, purse.units)
            purse.units -= held
            units -= held
        if not units:
            return
        if not purse.owed:
            purse.owed_since = now
        purse.owed += units
        self.state.dirty[purse] = share
        if is_urgent:
            purse.owed_since = now - _PATIENCE
            self._soon.set()

    def _leave(self, places: Sequence[Place[Seats]]) -> None:
        """End one running call."""
        for place in places:
            place.seats.running -= 1
            if place.seats.is_tight:
                self._soon.set()

    # --- for operators -------------------------------------------------------------------------

    async def used(self) -> list[Used]:
        """Implements `Shown`: those of all replicas, some of which this process may never have met."""
        found = []
        for name in await self.store.names(self.state.name):
            slot, (_, *key) = self.store.settings.parts(name)
            purse, seats = self.state.purses.get(name), self.state.seated.get(name)
            found.append(Used(tuple(key), slot, purse.meter if purse else seats.cap if seats else None))
        return found

    async def taken(self, used: Sequence[Used]) -> list[int]:
        """Implements `Shown`. What this process holds in advance goes back first; what others hold is taken."""
        await self._flush(list(self.state.dirty.values()), list(self.state.taken.values()))
        slots: dict[str, list[int]] = {}
        for number, each in enumerate(used):
            slots.setdefault(each.slot, []).append(number)
        found = [0] * len(used)

        async def read(slot: str, numbers: Sequence[int]) -> None:
            keys = [self.store.key(self.state.name, *used[number].key, slot=slot) for number in numbers]
            for number, taken in zip(numbers, await self.store.run(READ, keys, ()), strict=True):
                found[number] = taken

        await asyncio.gather(*(read(*each) for each in slots.items()))
        return found

    async def clear(self, used: Used) -> None:
        """Implements `Shown`."""
        name = self.store.key(self.state.name, *used.key, slot=used.slot)
        await self.store.run(CLEAR, [name], ())
        purse = self.state.purses.get(name)
        if purse is not None:
            purse.full_at = 0

    # --- giving back ---------------------------------------------------------------------------

    async def tend(self) -> None:
        """Give back leases that ended, settle corrections, and renew places, until cancelled."""
        while True:
            try:
                async with asyncio.timeout(_TICK_SECONDS):
                    await self._soon.wait()
            except TimeoutError:
                pass
            else:
                await asyncio.sleep(_GATHER_SECONDS)
            self._soon.clear()
            if self.store.ok:
                await self._tidy(self.now())

    async def _tidy(self, now: int) -> None:
        shares = [share for purse, share in self.state.dirty.items() if _is_due(purse, now)]
        places = [place for seats, place in self.state.taken.items() if self._is_due(seats, now)]
        await self._flush(shares, places)
        for purse in [purse for purse in self.state.dirty if not (purse.units or purse.owed or purse.alone_at)]:
            del self.state.dirty[purse]
        for seats in [seats for seats in self.state.taken if not (seats.running or seats.held or seats.asking)]:
            del self.state.taken[seats]

    def _is_due(self, seats: Seats, now: int) -> bool:
        if seats.held != seats.running and (seats.is_tight or now - seats.asked_at > SECOND):
            return True
        if now - seats.asked_at > int(self.settings.slot_seconds * SECOND) // 3:
            seats.asked_at = now
            return True
        return False

    async def _flush(self, shares: Iterable[Share[Purse]], places: Iterable[Place[Seats]]) -> None:
        slots: dict[str, tuple[list[Share[Purse]], list[Place[Seats]]]] = {}
        for share in shares:
            slots.setdefault(share.level.slot, ([], []))[0].append(share)
        for place in places:
            slots.setdefault(place.seats.slot, ([], []))[1].append(place)
        await asyncio.gather(*(self._send(*found, ()) for found in slots.values()))

    async def close(self) -> None:
        """Give back all that is held."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.store.ok:
            await self._flush(list(self.state.dirty.values()), list(self.state.taken.values()))

    def _start(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def lease(settings: Redis, meter: Meter, processes: int) -> int:
    """How long a lease of a meter lasts, in picoseconds; 0: none is given, as there would be too little in it."""
    if meter.capacity // (_LEASED * processes) < _LEAST[meter.kind]:
        return 0
    return min(int(settings.lease_seconds * SECOND), meter.room // _LEASED)


def groups(plan: Plan[Purse, Seats]) -> tuple[_Group, ...]:
    """What a plan takes from each slot, the caller's own first."""
    if plan.parts is None:
        slots = dict.fromkeys([*(s.level.slot for s in plan.shares), *(p.seats.slot for p in plan.places)])
        plan.parts = tuple(
            _Group(
                tuple(share for share in plan.shares if share.level.slot == slot),
                tuple(place for place in plan.places if place.seats.slot == slot),
            )
            for slot in sorted(slots, key=lambda slot: not slot.startswith("tenant="))
        )
    parts: tuple[_Group, ...] = plan.parts
    return parts


def _from_held(group: _Group, tokens: int, now: int) -> bool:
    """Take what a call may use from what is held, all or nothing."""
    for share in group.shares:
        purse = share.level
        if purse.units < (tokens if share.counts_tokens else 1) or purse.until <= now:
            return False
    for place in group.places:
        if place.seats.running >= place.seats.held:
            return False
    for share in group.shares:
        share.level.units -= tokens if share.counts_tokens else 1
        share.missing = _missing(share, now)
    for place in group.places:
        place.seats.running += 1
    return True


def _is_due(purse: Purse, now: int) -> bool:
    if purse.alone_at is not None or (purse.units and purse.until <= now):
        return True
    return bool(purse.owed) and now - purse.owed_since >= _PATIENCE


def _missing(share: Share[Purse], now: int) -> int:
    """The picoseconds until a bucket is full, as far as this process knows: what others took it learns later."""
    purse = share.level
    full_at = purse.full_at - purse.units * share.unit if purse.alone_at is None else purse.alone_at
    return full_at - now if full_at > now else 0
