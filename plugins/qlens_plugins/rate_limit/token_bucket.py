"""Token buckets: requests and tokens a minute, and calls at a time, per tenant, project, key or model."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from typing import Literal

from attrs import asdict, define, field, frozen
from attrs.validators import ge, gt, min_len, optional

from qlens import Call, Gateway, InvalidRequest, Limit, RateLimited, Receipt, hookimpl

_SECOND = 10**12
"""Times are whole picoseconds: fine enough that a rate's rounding is lost in a clock's own."""
_MICROSECOND = 10**6
_MINUTE = 60 * _SECOND
_REMEMBERED = 4096
"""How many scopes are kept at most: credentials that others make, such as JWTs, name callers without end."""

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


@define(eq=False)
class _Meter:
    """The requests or tokens a minute of one rule. A bucket under it is one number: the time when it is full again."""

    name: str
    """Names the meter in its buckets' keys: no two have the same, and a reload that changes numbers keeps it."""
    rule: Rule
    kind: Literal["requests", "tokens"]
    per_minute: int
    capacity: int
    unit: int = field(init=False)
    """Picoseconds in which one unit comes back, rounded up: never in the caller's favour."""
    room: int = field(init=False)
    """Picoseconds in which an empty bucket is full again."""

    def __attrs_post_init__(self) -> None:
        self.unit = -(-_MINUTE // self.per_minute)
        self.room = self.capacity * self.unit

    def wait(self, full_at: int, now: int, quantity: int) -> int:
        """How long until `quantity` units are there; not above 0: now. This is the generic cell rate algorithm."""
        return (full_at - now if full_at > now else 0) + quantity * self.unit - self.room

    def limit(self, full_at: int, now: int) -> Limit:
        """Where the owner of a bucket stands."""
        missing = full_at - now if full_at > now else 0
        remaining = (self.room - missing) // self.unit
        return Limit(self.kind, self.name, self.per_minute, remaining if remaining > 0 else 0, missing / _SECOND)


@define(eq=False)
class _Cap:
    """The calls at a time of one rule."""

    name: str
    rule: Rule
    most: int
    _limits: dict[int, Limit] = field(factory=dict, init=False, repr=False)

    def limit(self, running: int) -> Limit:
        """Where the owner of the places stands; the same for everybody who has as many calls running."""
        limit = self._limits.get(running)
        if limit is None:
            limit = Limit("concurrency", self.name, self.most, max(0, self.most - running), 0)
            self._limits[running] = limit
        return limit


@define(eq=False)
class _Bucket:
    """One bucket that calls take from."""

    meter: _Meter
    key: Key

    def quantity(self, tokens: int) -> int:
        """How much a call of so many tokens takes."""
        return tokens if self.meter.kind == "tokens" else 1


@define(eq=False)
class _Place:
    """The places of calls that run at the same time."""

    cap: _Cap
    key: Key


@define(eq=False)
class _Scope:
    """What holds for one caller and one model: which rules, and whose buckets. Worked out once, not for each call."""

    buckets: tuple[_Bucket, ...]
    places: tuple[_Place, ...]
    without_tokens: tuple[_Bucket, ...] = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.without_tokens = tuple(bucket for bucket in self.buckets if bucket.meter.kind != "tokens")


@define(eq=False)
class _Hold:
    """What a call took; corrected and given back when it settles."""

    buckets: tuple[_Bucket, ...]
    tokens: int
    places: tuple[_Place, ...]


@define(eq=False)
class _Buckets:
    """The state: buckets that are not full, and calls that run. An instance and its successor share it."""

    full_at: OrderedDict[Key, int] = field(factory=OrderedDict)
    running: dict[Key, int] = field(factory=dict)

    def add(self, key: Key, picoseconds: int, now: int) -> int:
        """Take from a bucket or give back to it: debt has no end, and nothing goes above full. When it is full again.

        A new bucket pays for a look at the two that were not looked at for longest, so that the number of buckets
        stays near that of those in use.
        """
        known = self.full_at.get(key)
        full_at = (now if known is None or known < now else known) + picoseconds
        if known is not None:
            self.full_at[key] = full_at
        elif full_at > now:
            self.full_at[key] = full_at
            self.sweep(2, now)
        return full_at

    def enter(self, key: Key) -> int:
        """Begin one running call; how many there are now."""
        running = self.running[key] = self.running.get(key, 0) + 1
        return running

    def leave(self, key: Key) -> None:
        """End one running call."""
        left = self.running[key] - 1
        if left > 0:
            self.running[key] = left
        else:
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
    _monotonic: Callable[[], float] = field(init=False, repr=False)
    _meters: tuple[_Meter, ...] = field(init=False, repr=False)
    _caps: tuple[_Cap, ...] = field(init=False, repr=False)
    _scopes: dict[tuple[str | None, ...], _Scope] = field(factory=dict, init=False, repr=False)
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
        self._monotonic = gateway.clock.monotonic
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
        if refusal is not None:
            call.limits.extend(self._standing(hold, now))
            raise refusal
        self._take(hold, now, call.limits)
        return hold

    @hookimpl
    async def settle(self, receipt: Receipt, hold: object | None) -> None:
        """Correct what was held by what was used, and let the next call run."""
        if not isinstance(hold, _Hold):
            return
        now = self._now()
        for bucket in hold.buckets:
            if difference := _owed(bucket, hold.tokens, receipt):
                self._buckets.add(bucket.key, difference * bucket.meter.unit, now)
        for place in hold.places:
            self._buckets.leave(place.key)

    @hookimpl
    def explain(self, call: Call) -> list[str]:
        """Say what the call would take from whom."""
        hold = self._wanted(call)
        takes = [(bucket, bucket.quantity(hold.tokens)) for bucket in hold.buckets]
        return [
            *(
                f"takes {quantity} of {bucket.meter.per_minute} {bucket.meter.kind} a minute from {_owner(bucket.key)}"
                for bucket, quantity in takes
            ),
            *(f"takes one of {place.cap.most} places at a time from {_owner(place.key)}" for place in hold.places),
            *(_too_large(bucket, quantity).message for bucket, quantity in takes if quantity > bucket.meter.capacity),
        ]

    def _divide(self, workers: int) -> None:
        """Set the limits to the share of one worker."""
        rules = list(_named(self.config.limits))
        self._meters = tuple(meter for name, rule in rules for meter in _meters(name, rule, workers))
        self._caps = tuple(
            _Cap(f"concurrency per {name}", rule, max(1, rule.concurrency // workers))
            for name, rule in rules
            if rule.concurrency is not None
        )
        self._scopes.clear()

    def _now(self) -> int:
        # Through whole microseconds, which is as fine as seconds in a float are.
        return round(self._monotonic() * 1_000_000) * _MICROSECOND

    def _wanted(self, call: Call) -> _Hold:
        """What the call takes where; a bucket it takes nothing from cannot refuse it, however deep in debt."""
        scope = self._scope(call)
        tokens = call.estimated_input + call.bound.output
        return _Hold(scope.buckets if tokens else scope.without_tokens, tokens, scope.places)

    def _scope(self, call: Call) -> _Scope:
        caller, model = call.known, call.model
        name = None if model is None else model.name
        who = (caller.tenant, caller.project, caller.key_id, caller.subject, caller.by, name)
        scope = self._scopes.get(who)
        if scope is None:
            if len(self._scopes) >= _REMEMBERED:
                self._scopes.clear()
            scope = self._scopes[who] = self._worked_out(call)
        return scope

    def _worked_out(self, call: Call) -> _Scope:
        return _Scope(
            tuple(
                _Bucket(meter, (meter.name, *_whose(meter.rule, call)))
                for meter in self._meters
                if _applies(meter.rule, call)
            ),
            tuple(_Place(cap, (cap.name, *_whose(cap.rule, call))) for cap in self._caps if _applies(cap.rule, call)),
        )

    def _refusal(self, hold: _Hold, now: int) -> InvalidRequest | RateLimited | None:
        """Why the call may not run; of several buckets that refuse, the one that takes longest speaks."""
        buckets, longest, slowest = self._buckets, 0, None
        for bucket in hold.buckets:
            meter, quantity = bucket.meter, bucket.quantity(hold.tokens)
            if quantity > meter.capacity:
                return _too_large(bucket, quantity)
            wait = meter.wait(buckets.full_at.get(bucket.key, 0), now, quantity)
            if wait > 0 and wait >= longest:
                longest, slowest = wait, bucket
        if slowest is not None:
            standing = slowest.meter.limit(buckets.full_at.get(slowest.key, 0), now)
            return _limited(slowest, slowest.quantity(hold.tokens), standing.remaining, longest)
        for place in hold.places:
            running = buckets.running.get(place.key, 0)
            if running >= place.cap.most:
                return _crowded(place, running)
        return None

    def _take(self, hold: _Hold, now: int, limits: list[Limit]) -> None:
        """Take what the call wants, and note where its caller stands from then on."""
        buckets = self._buckets
        for bucket in hold.buckets:
            meter = bucket.meter
            full_at = buckets.add(bucket.key, bucket.quantity(hold.tokens) * meter.unit, now)
            limits.append(meter.limit(full_at, now))
        for place in hold.places:
            limits.append(place.cap.limit(buckets.enter(place.key)))

    def _standing(self, hold: _Hold, now: int) -> Iterator[Limit]:
        """Where the caller of a call that was refused stands with every limit."""
        for bucket in hold.buckets:
            yield bucket.meter.limit(self._buckets.full_at.get(bucket.key, 0), now)
        for place in hold.places:
            yield place.cap.limit(self._buckets.running.get(place.key, 0))


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
            share = max(1, per_minute // workers)
            yield _Meter(f"{kind} per {name}", rule, kind, share, max(1, int(share * rule.burst_seconds / 60)))


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


def _owed(bucket: _Bucket, held: int, receipt: Receipt) -> int:
    """What a call owes a bucket in the end, beyond what it took."""
    if bucket.meter.kind == "requests":
        # A request that failed was one all the same, or else failing would be a way around the limit.
        return -1 if receipt.outcome == "rejected" else 0
    if not _was_billed(receipt):
        # Who leaves before the first byte does not stop the provider from generating.
        return 0 if receipt.outcome == "abandoned" and receipt.attempts else -held
    used = receipt.usage.total - held
    # An estimate may be too low: it is never a reason to give back.
    return used if receipt.usage.source == "provider" else max(used, 0)


def _was_billed(receipt: Receipt) -> bool:
    for attempt in receipt.attempts:  # noqa: SIM110 - any() with a generator costs more than all the rest here
        if attempt.billed:
            return True
    return False


_WORDS = {"requests": "requests per min (RPM)", "tokens": "tokens per min (TPM)"}


def _limited(bucket: _Bucket, quantity: int, remaining: int, picoseconds: int) -> RateLimited:
    # Rounded up, so that who waits as long as this says is not refused again.
    milliseconds = -(-picoseconds // (_SECOND // 1000))
    return RateLimited(
        f"Rate limit reached for {_owner(bucket.key)} on {_WORDS[bucket.meter.kind]}: "
        f"Limit {bucket.meter.per_minute}, Remaining {remaining}, Requested {quantity}. "
        f"Please try again in {_duration(milliseconds)}.",
        kind=bucket.meter.kind,
        retry_after=milliseconds / 1000,
    )


def _crowded(place: _Place, running: int) -> RateLimited:
    return RateLimited(
        f"Rate limit reached for {_owner(place.key)} on concurrent requests: "
        f"Limit {place.cap.most}, Running {running}. Please try again when one has ended.",
        kind="requests",
        retry_after=1.0,
    )


def _too_large(bucket: _Bucket, quantity: int) -> InvalidRequest:
    meter = bucket.meter
    hint = " Send a shorter prompt or a smaller max_tokens." if meter.kind == "tokens" else ""
    return InvalidRequest(
        f"Request too large for {_owner(bucket.key)} on {_WORDS[meter.kind]}: it needs up to {quantity}, and "
        f"the limit `{meter.name}` never allows more than {meter.capacity} at once.{hint}",
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
