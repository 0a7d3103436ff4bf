"""What rules count, and for whom: a rule's meters and caps, without any state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Literal

from attrs import define, field

from qlens import Allowance, Call
from qlens_plugins.rate_limit.token_bucket.settings import Rule

SECOND = 10**12
"""Times are whole picoseconds: fine enough that a rate's rounding is lost in a clock's own."""
MICROSECOND = 10**6
NANOSECOND = 1000
_MINUTE = 60 * SECOND

ALLOWANCE = "of the key's allowance"
"""How the names of meters and caps end that no rule brought."""

Key = tuple[str, ...]
"""Names a bucket: the rule, what it counts, and whose it is."""


@define(eq=False)
class Meter:
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


@define(eq=False)
class Cap:
    """The calls at a time of one rule."""

    name: str
    rule: Rule
    most: int


@define(eq=False)
class Rules:
    """All meters and caps of a configuration, or of an allowance; for each of so many processes, its share."""

    meters: tuple[Meter, ...]
    caps: tuple[Cap, ...]

    @classmethod
    def of(cls, rules: Iterable[Rule], processes: int = 1) -> Rules:
        """The meters and caps of rules, divided by the processes that share them; nothing becomes 0."""
        named = list(_named(rules))
        return cls(
            tuple(meter for name, rule in named for meter in _meters(name, rule, processes)),
            tuple(
                Cap(f"concurrency per {name}", rule, max(1, rule.concurrency // processes))
                for name, rule in named
                if rule.concurrency is not None
            ),
        )

    @classmethod
    def allowed(cls, allowance: Allowance, processes: int = 1) -> Rules:
        """What a credential may use beside the rules."""
        numbers = (allowance.requests_per_minute, allowance.tokens_per_minute, allowance.concurrency)
        if numbers == (None, None, None):
            return cls((), ())
        # 0 is no rule's number, but a credential's: it lets nothing pass where a rule's least still would.
        requests, tokens, concurrency = (None if number is None else max(1, number) for number in numbers)
        found = cls.of([Rule("key", requests, tokens, concurrency)], processes)
        for meter in found.meters:
            meter.name = f"{meter.kind} {ALLOWANCE}"
        for cap in found.caps:
            cap.name = f"concurrency {ALLOWANCE}"
        return found


def _named(rules: Iterable[Rule]) -> Iterator[tuple[str, Rule]]:
    """Give each rule a name made of what it counts, not of its numbers or its place in the list."""
    seen: Counter[str] = Counter()
    for rule in rules:
        name = f"{rule.per} {rule.match.named()}".rstrip()
        seen[name] += 1
        yield (name if seen[name] == 1 else f"{name} #{seen[name]}"), rule


def _meters(name: str, rule: Rule, processes: int) -> Iterator[Meter]:
    numbers: tuple[tuple[Literal["requests", "tokens"], int | None], ...] = (
        ("requests", rule.requests_per_minute),
        ("tokens", rule.tokens_per_minute),
    )
    for kind, per_minute in numbers:
        if per_minute is not None:
            share = max(1, per_minute // processes)
            yield Meter(f"{kind} per {name}", rule, kind, share, max(1, int(share * rule.burst_seconds / 60)))


def applies(rule: Rule, call: Call, provider: str | None) -> bool:
    """Whether a rule counts this call: at admission, or when it is about to be sent to a provider."""
    if (rule.per == "provider") is (provider is None):
        return False
    return (rule.per != "model" or call.model is not None) and rule.match.fits(call, provider)


def whose(rule: Rule, call: Call, provider: str | None) -> Key:
    """Whose bucket a call takes from. The first two words name the owner; the others tell namesakes apart."""
    caller = call.known
    if rule.per == "provider":
        return "provider", provider or ""
    if rule.per == "model":
        # A name of the configuration, of several for the same targets the first, for a wildcard the pattern: what a
        # client chooses or spells makes no bucket of its own.
        return "model", call.model.counts_as if call.model else ""
    if rule.per == "key" and caller.key_id is not None:
        return "key", caller.key_id, caller.by
    if rule.per == "key":
        return "subject", caller.subject, caller.by, caller.tenant
    if rule.per == "project" and caller.project is not None:
        return "project", caller.project, caller.tenant
    return "tenant", caller.tenant


def slot(rule: Rule, call: Call, provider: str | None) -> str:
    """Which buckets lie together in a store: all of a tenant's do; a model's and a provider's are everybody's."""
    if rule.per in {"model", "provider"}:
        return "=".join(whose(rule, call, provider))
    return f"tenant={call.known.tenant}"
