"""What a call takes from where: worked out once for each caller and model, not for each call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, Literal, Protocol, TypeVar

from attrs import define, field

from qlens import NO_USAGE, Call, Caller, Model, Receipt
from qlens_plugins.rate_limit.token_bucket.meters import SECOND, Cap, Key, Meter, Rules, applies, slot, whose

REMEMBERED = 4096
"""How many plans are kept at most: credentials that others make, such as JWTs, name callers without end."""

L = TypeVar("L")
S = TypeVar("S", bound="Seated")


class Seated(Protocol):
    """The places of one owner."""

    running: int
    """How many calls run in this process."""


@define(eq=False)
class Share(Generic[L]):
    """A meter with the bucket of one owner, and where the owner stood when a call took from it last."""

    meter: Meter
    key: Key
    level: L
    unit: int
    room: int
    kind: Literal["requests", "tokens"] = field(init=False)
    name: str = field(init=False)
    limit: int = field(init=False)
    counts_tokens: bool = field(init=False)
    missing: int = field(default=0, init=False)
    """Picoseconds until the bucket is full."""

    def __attrs_post_init__(self) -> None:
        self.kind, self.name, self.limit = self.meter.kind, self.meter.name, self.meter.per_minute
        self.counts_tokens = self.kind == "tokens"

    @property
    def remaining(self) -> int:
        """How many units are there."""
        return max(0, (self.room - self.missing) // self.unit)

    @property
    def reset_seconds(self) -> float:
        """How long until the bucket is full."""
        return self.missing / SECOND

    def quantity(self, tokens: int) -> int:
        """How many units a call takes that may use so many tokens."""
        return tokens if self.counts_tokens else 1


@define(eq=False)
class Place(Generic[S]):
    """A cap with the places of one owner."""

    cap: Cap
    key: Key
    seats: S
    kind: Literal["concurrency"] = field(default="concurrency", init=False)
    name: str = field(init=False)
    limit: int = field(init=False)
    reset_seconds: float = field(default=0.0, init=False)

    def __attrs_post_init__(self) -> None:
        self.name, self.limit = self.cap.name, self.cap.most

    @property
    def remaining(self) -> int:
        """How many more calls may run now."""
        return max(0, self.limit - self.seats.running)


@define(eq=False)
class Plan(Generic[L, S]):
    """All that one caller with one model takes from, at admission or from a provider."""

    caller: Caller
    model: Model | None
    requests: tuple[Share[L], ...]
    tokens: tuple[Share[L], ...]
    places: tuple[Place[S], ...]
    needs_bound: bool
    """Whether it must be said how much the call can generate, because the caller has an allowance of tokens."""
    shares: tuple[Share[L], ...] = field(init=False, repr=False)
    """All buckets."""
    limits: tuple[Share[L] | Place[S], ...] = field(init=False, repr=False)
    """All buckets and places, in the order in which they are taken from."""
    parts: Any = field(default=None, repr=False)
    """What a store makes of it, once."""
    kept: bool = True
    """Whether it is remembered still; if not, nobody but the calls that run keeps its buckets in memory."""

    def __attrs_post_init__(self) -> None:
        self.shares = (*self.requests, *self.tokens)
        self.limits = (*self.shares, *self.places)

    def taking(self, tokens: int) -> tuple[Share[L], ...]:
        """The buckets that a call takes anything from: no other refuses it, however deep in debt it is."""
        return self.shares if tokens else self.requests


Hold = tuple[Plan[L, S], int]
"""What a call took: by which plan, and how many tokens."""


class States(Protocol[L, S]):
    """Where the buckets and places are; asked for the same key, it gives the same object."""

    def level(self, meter: Meter, key: Key, slot: str) -> L:
        """The bucket of a meter."""

    def seats(self, cap: Cap, key: Key, slot: str) -> S:
        """The places of a cap."""

    def keep(self, plan: Plan[L, S]) -> None:
        """Hold on to what a plan that is not remembered any more has left behind."""


@define(eq=False)
class Plans(Generic[L, S]):
    """Makes plans and remembers them."""

    states: States[L, S]
    room: Callable[[Meter], int]
    """How much of a full bucket may be used at once, in picoseconds."""
    rules: Rules
    processes: int
    """By how many the allowances are divided."""
    _found: dict[tuple[int, int, str | None], Plan[L, S]] = field(factory=dict, repr=False)
    _is_over: bool = False

    def find(self, call: Call, provider: str | None = None) -> Plan[L, S]:
        """The plan of a call: at admission, or when it is about to be sent to a provider."""
        # By identity, which costs no hash over all a caller has; the plan keeps both alive, so nothing has their ids.
        return self._found.get((id(call.caller), id(call.model), provider)) or self._made(call, provider)

    def make(self, call: Call, provider: str | None = None) -> Plan[L, S]:
        """A plan that is not remembered."""
        caller = call.known
        rules = [self.rules]
        if provider is None and caller.allowance is not None:
            rules.append(Rules.allowed(caller.allowance, self.processes))
        meters = [meter for each in rules for meter in each.meters if applies(meter.rule, call, provider)]
        caps = [cap for each in rules for cap in each.caps if applies(cap.rule, call, provider)]
        return Plan(
            caller,
            call.model,
            tuple(self._share(meter, call, provider) for meter in meters if meter.kind == "requests"),
            tuple(self._share(meter, call, provider) for meter in meters if meter.kind == "tokens"),
            tuple(self._place(cap, call, provider) for cap in caps),
            any(meter.kind == "tokens" for each in rules[1:] for meter in each.meters),
            kept=False,
        )

    def _made(self, call: Call, provider: str | None) -> Plan[L, S]:
        plan = self.make(call, provider)
        if self._is_over:
            return plan
        if len(self._found) >= REMEMBERED:
            self._forget(next(iter(self._found)))
        plan.kept = True
        self._found[id(plan.caller), id(plan.model), provider] = plan
        return plan

    def _share(self, meter: Meter, call: Call, provider: str | None) -> Share[L]:
        key = (meter.name, *whose(meter.rule, call, provider))
        level = self.states.level(meter, key, slot(meter.rule, call, provider))
        return Share(meter, key, level, meter.unit, self.room(meter))

    def _place(self, cap: Cap, call: Call, provider: str | None) -> Place[S]:
        key = (cap.name, *whose(cap.rule, call, provider))
        return Place(cap, key, self.states.seats(cap, key, slot(cap.rule, call, provider)))

    def _forget(self, name: tuple[int, int, str | None]) -> None:
        plan = self._found.pop(name)
        plan.kept = False
        self.states.keep(plan)

    def end(self) -> None:
        """Remember nothing more: another instance goes on with the buckets."""
        self._is_over = True
        for name in list(self._found):
            self._forget(name)

    def __len__(self) -> int:
        return len(self._found)


def owed(held: int, receipt: Receipt) -> int:
    """The tokens that a call owes in the end beyond those it holds; below 0: what it gives back."""
    usage = receipt.usage
    difference = usage.total - held
    if difference >= 0 or usage.source == "provider":
        return difference
    # An estimate may be too low: it is never a reason to give back.
    is_billed = any(attempt.billed for attempt in receipt.attempts)
    return 0 if is_billed else -held


def owed_to(provider: str, held: int, receipt: Receipt) -> int:
    """The same of what a call holds of one provider."""
    usages = [
        attempt.usage or NO_USAGE
        for attempt in receipt.attempts
        if attempt.billed and attempt.target.provider == provider
    ]
    difference = sum(usage.total for usage in usages) - held
    if difference >= 0 or (usages and all(usage.source == "provider" for usage in usages)):
        return difference
    return 0 if usages else -held
