"""What a list of prices says of one model, before it becomes rows."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction

from attrs import define, field, frozen

from qlens import picos
from qlens_plugins.cost.prices.rows import BUCKETS, MILLION

Prices = dict[str, Decimal]
"""USD by bucket for a million tokens, and by meter for one unit."""


@frozen(order=True)
class Key:
    """What is priced."""

    provider: str
    """The kind of provider."""
    model: str
    """A name, or `prefix*`."""
    region: str = ""


@frozen(order=True)
class Case:
    """When prices hold."""

    valid_from: str = ""
    """An ISO date, or nothing: from the beginning."""
    above: int = 0
    """Prompts of more tokens than this."""
    tier: str = ""


@define
class Quote:
    """All prices of one model; those of a tier say only what differs from the standard one."""

    cases: dict[Case, Prices]
    sources: tuple[str, ...]

    def newest(self) -> str:
        """The date of the prices that came last."""
        return max(case.valid_from for case in self.cases)

    def standard(self, above: int = 0) -> Prices:
        """The newest prices of the standard tier."""
        return self.cases[Case(self.newest(), above)]

    def sizes(self, tier: str = "") -> set[int]:
        """The prompt sizes at which the newest prices of a tier change."""
        date = self.newest()
        return {case.above for case in self.cases if case.valid_from == date and case.tier == tier}

    def tiers(self) -> set[str]:
        """The service tiers with prices of their own."""
        return {case.tier for case in self.cases if case.tier}


@define
class Quotes:
    """What one source says."""

    source: str
    known: dict[Key, Quote] = field(factory=dict)
    refused: list[str] = field(factory=list)
    """What cannot be taken over, with the reason."""

    def add(self, key: Key, cases: Mapping[Case, Prices]) -> None:
        """Take prices over, if each is a whole number of picodollars for one."""
        cases = {case: prices for case, prices in cases.items() if prices}
        faults = [fault for prices in cases.values() for name, usd in prices.items() if (fault := _fault(name, usd))]
        if faults:
            self.refused.append(f"{self.source}: {key.provider}/{key.model}: {faults[0]}")
        elif cases and key not in self.known:
            self.known[key] = Quote(dict(cases), (self.source,))

    def find(self, key: Key) -> tuple[Key, Quote] | None:
        """What is said of a model: by its name, or else by the longest prefix."""
        if (quote := self.known.get(key)) is not None:
            return key, quote
        fitting = [
            pattern
            for pattern in self.known
            if pattern.model.endswith("*")
            and (pattern.provider, pattern.region) == (key.provider, key.region)
            and key.model.startswith(pattern.model[:-1])
        ]
        if not fitting:
            return None
        best = max(fitting, key=lambda pattern: len(pattern.model))
        return best, self.known[best]


def for_one(usd: Decimal, units: int) -> Decimal:
    """What one unit costs where so many cost this; the nearest 20 decimals when it does not divide."""
    exact = Fraction(usd) / units
    return Decimal(exact.numerator * 10**20 // exact.denominator).scaleb(-20)


def _fault(name: str, usd: Decimal) -> str | None:
    try:
        if usd.is_finite() and usd < 0:
            return f"{name} is negative: {usd}"
        if picos(usd) % (MILLION if name in BUCKETS else 1):
            return f"{name}: {usd} USD per million tokens is no whole number of picodollars for one"
    except ValueError as error:
        return f"{name}: {error}"
    return None
