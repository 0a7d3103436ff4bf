"""What a call takes from where: worked out once for each caller and model, not for each call."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Generic, Protocol, TypeVar

from attrs import define, field

from qlens import NO_USAGE, Call, Caller, Limit, Model, Receipt
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
    """A meter with the bucket of one owner."""

    meter: Meter
    key: Key
    level: L
    unit: int
    room: int


@define(eq=False)
class Place(Generic[S]):
    """A cap with the places of one owner."""

    cap: Cap
    key: Key
    seats: S


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
    kinds: tuple[tuple[Share[L], ...], ...] = field(init=False, repr=False)
    """The buckets of each kind that there are any of."""
    parts: Any = field(default=None, repr=False)
    """What a store makes of it, once."""
    kept: bool = True
    """Whether it is remembered still; if not, nobody but the calls that run keeps its buckets in memory."""

    def __attrs_post_init__(self) -> None:
        self.kinds = tuple(shares for shares in (self.requests, self.tokens) if shares)

    @property
    def shares(self) -> tuple[Share[L], ...]:
        """All buckets."""
        return (*self.requests, *self.tokens)


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
        caller, model = call.caller, call.model
        # By identity, which costs no hash over all a caller has; the plan keeps both alive, so nothing has their ids.
        plan = self._found.get((id(caller), id(model), provider))
        if plan is None:
            plan = self._made(call, provider)
        return plan

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


def owed(held: int, receipt: Receipt, provider: str | None = None) -> int:
    """The tokens that a call owes in the end beyond those it holds: as a whole, or to one provider."""
    used, is_billed, is_exact = 0, False, True
    for attempt in receipt.attempts:
        if attempt.billed and (provider is None or attempt.target.provider == provider):
            is_billed = True
            usage = receipt.usage if provider is None else attempt.usage or NO_USAGE
            used = usage.total if provider is None else used + usage.total
            is_exact = is_exact and usage.source == "provider"
    if not is_billed:
        # Who leaves before the first byte does not stop the provider from generating.
        return 0 if receipt.outcome == "abandoned" and receipt.attempts else -held
    # An estimate may be too low: it is never a reason to give back.
    return used - held if is_exact or used > held else 0


def standing(share: Share[L], missing: int) -> Limit:
    """Where the owner of a bucket stands, to which so many picoseconds are missing."""
    meter = share.meter
    if missing <= 0:
        return Limit(meter.kind, meter.name, meter.per_minute, share.room // share.unit, 0)
    left = (share.room - missing) // share.unit
    return Limit(meter.kind, meter.name, meter.per_minute, left if left > 0 else 0, missing / SECOND)


def tightest(shares: Iterable[Share[L]], missing: Callable[[Share[L]], int]) -> tuple[Share[L], int]:
    """Of several buckets the one with the least left, and the picoseconds in which it is full again."""
    return min(
        ((share, missing(share)) for share in shares),
        key=lambda found: (found[0].room - found[1]) // found[0].unit,
    )
