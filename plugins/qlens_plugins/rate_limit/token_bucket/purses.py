"""What a process knows and holds of buckets and places in a store."""

from __future__ import annotations

import secrets
from weakref import WeakValueDictionary

from attrs import define, field

from qlens_plugins.rate_limit.token_bucket.meters import Cap, Key, Meter
from qlens_plugins.rate_limit.token_bucket.plans import Place, Plan, Share
from qlens_plugins.rate_limit.token_bucket.settings import Redis


@define(eq=False)
class Purse:
    """What a process knows and holds of a bucket in the store. Times are picoseconds of its own clock."""

    key: str
    slot: str
    meter: Meter
    """As it was asked for last: a reload changes its numbers."""
    units: int = 0
    """Leased, and not used yet."""
    until: int = 0
    """When the lease ends."""
    want: int = 0
    """How many units were wanted in advance last time."""
    asked_at: int = 0
    owed: int = 0
    """Units to be taken from the store, or below 0 given back to it, with the next script."""
    owed_since: int = 0
    full_at: int = 0
    """When the bucket is full again, as the store said last."""
    alone_at: int | None = None
    """The same of this process' share, while the store is away."""


@define(eq=False)
class Seats:
    """The places of one owner, of which a process holds some in the store."""

    key: str
    slot: str
    cap: Cap
    running: int = 0
    held: int = 0
    """How many the store counts for this process; those that do not run are spare."""
    asking: int = 0
    """For how many calls the store was asked that has not answered yet."""
    want: int = 0
    asked_at: int = 0
    sent: int = 0
    """How many scripts were sent about it: only the newest one's answer holds."""
    is_tight: bool = False
    """Whether most places are taken: what ends is given back at once."""


@define(eq=False)
class Purses:
    """All that a process holds in the store; an instance and its successor share it."""

    settings: Redis
    name: str
    me: str = field(factory=lambda: secrets.token_hex(8))
    """This process, to the store."""
    purses: WeakValueDictionary[str, Purse] = field(factory=WeakValueDictionary)
    seated: WeakValueDictionary[str, Seats] = field(factory=WeakValueDictionary)
    dirty: dict[Purse, Share[Purse]] = field(factory=dict)
    """Those that hold or owe something."""
    taken: dict[Seats, Place[Seats]] = field(factory=dict)
    """Those of which places are held."""

    def level(self, meter: Meter, key: Key, slot: str) -> Purse:
        """The purse for a bucket."""
        name = self.settings.key(self.name, *key, slot=slot)
        purse = self.purses.get(name)
        if purse is None:
            purse = self.purses[name] = Purse(name, slot, meter)
        purse.meter = meter
        return purse

    def seats(self, cap: Cap, key: Key, slot: str) -> Seats:
        """The places of a cap."""
        name = self.settings.key(self.name, *key, slot=slot)
        seats = self.seated.get(name)
        if seats is None:
            seats = self.seated[name] = Seats(name, slot, cap)
        seats.cap = cap
        return seats

    def keep(self, plan: Plan[Purse, Seats]) -> None:
        """Nothing is lost with a plan: the store has it."""
