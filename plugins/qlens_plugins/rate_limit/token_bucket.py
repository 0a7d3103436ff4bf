"""Token buckets: requests and tokens a minute, and calls at a time, per tenant, project, key or model."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from typing import Literal

from attrs import asdict, define, field, frozen
from attrs.validators import ge, gt, min_len, optional

from qlens import Call, Gateway, InvalidRequest, Limit, RateLimited, Receipt, hookimpl

_SECOND = 10**12
"""Times are whole picoseconds: fine enough that a rate's rounding is lost in a clock's own."""
_MINUTE = 60 * _SECOND

Key = tuple[str | None, ...]
"""Names a bucket: the rule, what it counts, and whose it is."""


@frozen
class Memory:
    """Keeps the buckets in the memory of each process."""

    kind: Literal["memory"] = "memory"
    """The only kind there is so far."""
    per_worker: bool = False
    """Allows several workers, each with buckets of its own that hold its share: the limit divided by the workers."""


@frozen
class Match:
    """Narrows a rule to some callers and models; a pattern may end in `*`."""

    tenant: tuple[str, ...] | None = None
    """Tenants the rule is for."""
    project: tuple[str, ...] | None = None
    """Projects the rule is for; a caller without a project is not meant."""
    key: tuple[str, ...] | None = None
    """Key ids the rule is for; a caller without a key is not meant."""
    model: tuple[str, ...] | None = None
    """Models the rule is for, by their names in `models`."""

    def fits(self, call: Call) -> bool:
        """Whether the rule is for this call."""
        caller = call.known
        return (
            _one_of(self.tenant, caller.tenant)
            and _one_of(self.project, caller.project)
            and _one_of(self.key, caller.key_id)
            and _one_of(self.model, call.model.name if call.model else None)
        )


@frozen
class Rule:
    """How much each tenant, project, key or model may do."""

    per: Literal["tenant", "project", "key", "model"]
    """Whose calls are counted together. Without a project that is the tenant, without a key the subject."""
    requests_per_minute: int | None = field(default=None, validator=optional(ge(1)))
    """Calls a minute."""
    tokens_per_minute: int | None = field(default=None, validator=optional(ge(1)))
    """Tokens a minute: held at admission by what a call may use, corrected by what it used."""
    concurrency: int | None = field(default=None, validator=optional(ge(1)))
    """Calls at a time; a stream counts until its end."""
    burst_seconds: float = field(default=60, validator=gt(0))
    """How many seconds' worth of requests and tokens a full bucket holds, to be used at once."""
    match: Match = field(factory=Match)
    """Narrows the rule to some callers and models."""

    def __attrs_post_init__(self) -> None:
        if self.requests_per_minute is None and self.tokens_per_minute is None and self.concurrency is None:
            raise ValueError("the rule limits nothing: give requests_per_minute, tokens_per_minute or concurrency")


@frozen
class TokenBucketConfig:
    """Limits requests a minute, tokens a minute and calls at a time."""

    limits: tuple[Rule, ...] = field(validator=min_len(1))
    """All rules that fit a call must let it pass."""
    store: Memory = field(factory=Memory)
    """Where the buckets are kept."""


@frozen
class _Rate:
    """Units a minute with room for a burst. A bucket under it is one number: the time at which it is full again."""

    per_minute: int
    capacity: int
    unit: int
    """Picoseconds in which one unit comes back, rounded up: never in the caller's favour."""

    @classmethod
    def of(cls, per_minute: int, burst_seconds: float) -> _Rate:
        return cls(per_minute, max(1, int(per_minute * burst_seconds / 60)), -(-_MINUTE // per_minute))

    def wait(self, full_at: int, now: int, quantity: int) -> int:
        """How long until `quantity` units are there; 0: now. This is the generic cell rate algorithm."""
        return max(0, max(full_at, now) + quantity * self.unit - now - self.capacity * self.unit)

    def remaining(self, full_at: int, now: int) -> int:
        """How many units are there."""
        return max(0, (self.capacity * self.unit - max(0, full_at - now)) // self.unit)


@frozen
class _Meter:
    """The requests or tokens a minute of one rule."""

    name: str
    """Names the meter in its buckets' keys: no two have the same, and a reload that changes numbers keeps it."""
    rule: Rule
    kind: Literal["requests", "tokens"]
    rate: _Rate


@frozen
class _Cap:
    """The calls at a time of one rule."""

    name: str
    rule: Rule
    most: int


@frozen
class _Take:
    """What a call takes from one bucket."""

    meter: _Meter
    key: Key
    quantity: int


@frozen
class _Slot:
    """A call's place among those that run at the same time."""

    cap: _Cap
    key: Key


@frozen
class _Hold:
    """What a call took; corrected and given back when it settles."""

    takes: tuple[_Take, ...]
    slots: tuple[_Slot, ...]


@define(eq=False)
class _Buckets:
    """The state: buckets that are not full, and calls that run. An instance and its successor share it."""

    full_at: OrderedDict[Key, int] = field(factory=OrderedDict)
    running: Counter[Key] = field(factory=Counter)

    def add(self, key: Key, picoseconds: int, now: int) -> None:
        """Take from a bucket or give back to it. What goes below empty is debt; nothing goes above full."""
        full_at = max(self.full_at.get(key, now), now) + picoseconds
        if full_at > now:
            self.full_at[key] = full_at
        else:
            self.full_at.pop(key, None)

    def leave(self, key: Key) -> None:
        """End one running call."""
        self.running[key] -= 1
        if self.running[key] <= 0:
            del self.running[key]

    def sweep(self, count: int, now: int) -> None:
        """Look at the `count` buckets that were not looked at for longest, and drop those that are full again."""
        for _ in range(min(count, len(self.full_at))):
            key, full_at = self.full_at.popitem(last=False)
            if full_at > now:
                self.full_at[key] = full_at


@define(eq=False)
class TokenBucket:
    """Takes from all buckets of a call or from none, and corrects them when the call has settled."""

    config: TokenBucketConfig
    name: str
    _gateway: Gateway = field(init=False, repr=False)
    _meters: tuple[_Meter, ...] = field(init=False, repr=False)
    _caps: tuple[_Cap, ...] = field(init=False, repr=False)
    _buckets: _Buckets = field(factory=_Buckets, init=False, repr=False)

    Config = TokenBucketConfig

    def __attrs_post_init__(self) -> None:
        self._divide(1)

    @property
    def bounded(self) -> bool:
        """Whether a call must say how much it can generate."""
        return any(rule.tokens_per_minute is not None for rule in self.config.limits)

    @property
    def shares(self) -> Literal["process", "store"]:
        """How far the limits reach: with a share for each worker they hold for all of them together."""
        return "store" if self.config.store.per_worker else "process"

    @hookimpl
    @asynccontextmanager
    async def lifespan(self, gateway: Gateway) -> AsyncIterator[None]:
        """Take the clock, and this worker's share of the limits."""
        self._gateway = gateway
        if self.config.store.per_worker:
            self._divide(gateway.config.server.workers)
        yield

    @hookimpl
    def adopt(self, old: object) -> None:
        """Go on with the buckets as they are: a changed number is no fresh bucket."""
        assert isinstance(old, TokenBucket)
        self._buckets = old._buckets

    @hookimpl
    async def admit(self, call: Call) -> _Hold:
        """Take what the call may use; nothing is written before every bucket has said yes."""
        now = self._now()
        hold = self._wanted(call)
        refusal = self._refusal(hold, now)
        if refusal is None:
            self._take(hold, now)
        call.limits.extend(self._standing(hold, now))
        if refusal is not None:
            raise refusal
        return hold

    @hookimpl
    async def settle(self, receipt: Receipt, hold: object | None) -> None:
        """Correct what was held by what was used, and let the next call run."""
        if not isinstance(hold, _Hold):
            return
        now = self._now()
        for take in hold.takes:
            if difference := _due(take, receipt) - take.quantity:
                self._buckets.add(take.key, difference * take.meter.rate.unit, now)
        for slot in hold.slots:
            self._buckets.leave(slot.key)

    @hookimpl
    def explain(self, call: Call) -> list[str]:
        """Say what the call would take from whom."""
        hold = self._wanted(call)
        takes = [
            f"takes {take.quantity} of {take.meter.rate.per_minute} {take.meter.kind} a minute from {_owner(take.key)}"
            for take in hold.takes
        ]
        slots = [f"takes one of {slot.cap.most} places at a time from {_owner(slot.key)}" for slot in hold.slots]
        large = [_too_large(take).message for take in hold.takes if take.quantity > take.meter.rate.capacity]
        return [*takes, *slots, *large]

    def _divide(self, workers: int) -> None:
        """Set the limits to the share of one worker."""
        rules = list(_named(self.config.limits))
        self._meters = tuple(meter for name, rule in rules for meter in _meters(name, rule, workers))
        self._caps = tuple(
            _Cap(f"concurrency per {name}", rule, max(1, rule.concurrency // workers))
            for name, rule in rules
            if rule.concurrency is not None
        )

    def _now(self) -> int:
        # Through whole microseconds, which is as fine as seconds in a float are.
        return round(self._gateway.clock.monotonic() * 10**6) * (_SECOND // 10**6)

    def _wanted(self, call: Call) -> _Hold:
        """What the call takes where; a bucket it takes nothing from cannot refuse it, however deep in debt."""
        quantities = {"requests": 1, "tokens": call.estimated_input + call.bound.output}
        return _Hold(
            tuple(
                _Take(meter, (meter.name, *_whose(meter.rule, call)), quantities[meter.kind])
                for meter in self._meters
                if quantities[meter.kind] and _applies(meter.rule, call)
            ),
            tuple(_Slot(cap, (cap.name, *_whose(cap.rule, call))) for cap in self._caps if _applies(cap.rule, call)),
        )

    def _refusal(self, hold: _Hold, now: int) -> InvalidRequest | RateLimited | None:
        """Why the call may not run; of several buckets that refuse, the one that takes longest speaks."""
        for take in hold.takes:
            if take.quantity > take.meter.rate.capacity:
                return _too_large(take)
        waits = [(self._wait(take, now), place) for place, take in enumerate(hold.takes)]
        longest, place = max(waits, default=(0, 0))
        if longest:
            take = hold.takes[place]
            return _limited(take, take.meter.rate.remaining(self._full_at(take), now), longest)
        for slot in hold.slots:
            running = self._buckets.running[slot.key]
            if running >= slot.cap.most:
                return _crowded(slot, running)
        return None

    def _full_at(self, take: _Take) -> int:
        return self._buckets.full_at.get(take.key, 0)

    def _wait(self, take: _Take, now: int) -> int:
        return take.meter.rate.wait(self._full_at(take), now, take.quantity)

    def _take(self, hold: _Hold, now: int) -> None:
        for take in hold.takes:
            self._buckets.add(take.key, take.quantity * take.meter.rate.unit, now)
        for slot in hold.slots:
            self._buckets.running[slot.key] += 1
        # Twice as many as were added, so that their number stays near that of the buckets in use.
        self._buckets.sweep(2 * len(hold.takes), now)

    def _standing(self, hold: _Hold, now: int) -> Iterator[Limit]:
        """Where the caller stands with every limit of the call."""
        for take in hold.takes:
            rate, full_at = take.meter.rate, self._full_at(take)
            yield Limit(
                kind=take.meter.kind,
                name=take.meter.name,
                limit=rate.per_minute,
                remaining=rate.remaining(full_at, now),
                reset_seconds=max(0, full_at - now) / _SECOND,
            )
        for slot in hold.slots:
            left = max(0, slot.cap.most - self._buckets.running[slot.key])
            yield Limit(kind="concurrency", name=slot.cap.name, limit=slot.cap.most, remaining=left, reset_seconds=0)


def _one_of(patterns: tuple[str, ...] | None, name: str | None) -> bool:
    """Whether a name fits one of the patterns; without patterns every name does, and none at all."""
    if patterns is None:
        return True
    return name is not None and any(
        name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern for pattern in patterns
    )


def _named(rules: Iterable[Rule]) -> Iterator[tuple[str, Rule]]:
    """Give each rule a name made of what it counts, not of its numbers or its place in the list."""
    seen: Counter[str] = Counter()
    for rule in rules:
        match = asdict(rule.match, filter=lambda _, value: value is not None)
        name = " ".join([rule.per, *(f"{field}={','.join(patterns)}" for field, patterns in match.items())])
        seen[name] += 1
        yield (name if seen[name] == 1 else f"{name} #{seen[name]}"), rule


def _meters(name: str, rule: Rule, workers: int) -> Iterator[_Meter]:
    numbers: tuple[tuple[Literal["requests", "tokens"], int | None], ...] = (
        ("requests", rule.requests_per_minute),
        ("tokens", rule.tokens_per_minute),
    )
    for kind, per_minute in numbers:
        if per_minute is not None:
            rate = _Rate.of(max(1, per_minute // workers), rule.burst_seconds)
            yield _Meter(f"{kind} per {name}", rule, kind, rate)


def _applies(rule: Rule, call: Call) -> bool:
    return (rule.per != "model" or call.model is not None) and rule.match.fits(call)


def _whose(rule: Rule, call: Call) -> tuple[str, ...]:
    """Whose bucket a call takes from. The first two words name the owner; the others tell namesakes apart."""
    caller = call.known
    if rule.per == "model":
        # The name in the configuration, for a wildcard the pattern: a client's spelling makes no bucket of its own.
        return "model", call.model.name if call.model else ""
    if rule.per == "key" and caller.key_id is not None:
        return "key", caller.key_id, caller.by
    if rule.per == "key":
        return "subject", caller.subject, caller.by, caller.tenant
    if rule.per == "project" and caller.project is not None:
        return "project", caller.project, caller.tenant
    return "tenant", caller.tenant


def _owner(key: Key) -> str:
    return f"{key[1]} {key[2]}"


def _due(take: _Take, receipt: Receipt) -> int:
    """What a call owes a bucket in the end."""
    if take.meter.kind == "requests":
        # A request that failed was one all the same, or else failing would be a way around the limit.
        return 0 if receipt.outcome == "rejected" else take.quantity
    if not any(attempt.billed for attempt in receipt.attempts):
        # Who leaves before the first byte does not stop the provider from generating.
        return take.quantity if receipt.outcome == "abandoned" and receipt.attempts else 0
    if receipt.usage.source == "provider":
        return receipt.usage.total
    # An estimate may be too low: it is never a reason to give back.
    return max(receipt.usage.total, take.quantity)


_WORDS = {"requests": "requests per min (RPM)", "tokens": "tokens per min (TPM)"}


def _limited(take: _Take, remaining: int, picoseconds: int) -> RateLimited:
    # Rounded up, so that who waits as long as this says is not refused again.
    milliseconds = -(-picoseconds // (_SECOND // 1000))
    return RateLimited(
        f"Rate limit reached for {_owner(take.key)} on {_WORDS[take.meter.kind]}: "
        f"Limit {take.meter.rate.per_minute}, Remaining {remaining}, Requested {take.quantity}. "
        f"Please try again in {_duration(milliseconds)}.",
        kind=take.meter.kind,
        retry_after=milliseconds / 1000,
    )


def _crowded(slot: _Slot, running: int) -> RateLimited:
    return RateLimited(
        f"Rate limit reached for {_owner(slot.key)} on concurrent requests: "
        f"Limit {slot.cap.most}, Running {running}. Please try again when one has ended.",
        kind="requests",
        retry_after=1.0,
    )


def _too_large(take: _Take) -> InvalidRequest:
    hint = " Send a shorter prompt or a smaller max_tokens." if take.meter.kind == "tokens" else ""
    return InvalidRequest(
        f"Request too large for {_owner(take.key)} on {_WORDS[take.meter.kind]}: it needs up to {take.quantity}, and "
        f"the limit `{take.meter.name}` never allows more than {take.meter.rate.capacity} at once.{hint}",
        code="request_too_large",
    )


def _duration(milliseconds: int) -> str:
    """A wait as OpenAI writes it: 120ms, 1.5s, 2m3s."""
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    if milliseconds < 60_000:
        return f"{milliseconds / 1000:g}s"
    seconds = math.ceil(milliseconds / 1000)
    return f"{seconds // 60}m{seconds % 60}s"
