"""Finds the row of a target and turns a usage into an exact cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from decimal import Decimal
from operator import attrgetter
from typing import Literal

from attrs import define, field, frozen

from qlens import Cost, Usage
from qlens_plugins.cost.prices.rows import BUCKETS, PriceRow

STANDARD_TIERS = frozenset({"", "auto", "default", "standard"})
"""What providers call the tier that a row's own prices are for."""
REMEMBERED = 1024
"""How many answers are kept at most: behind a wildcard, clients choose the model names."""

_quantities = attrgetter(*BUCKETS)
_INSTEAD = {"cached_input": "input", "cache_write_5m": "input", "cache_write_1h": "input", "reasoning": "output"}
"""The price that stands in for one a row does not give."""


@frozen
class Rates:
    """Picodollars for one of each bucket, in the order of BUCKETS; None where the price is not known."""

    id: str
    buckets: tuple[int | None, ...]
    meters: Mapping[str, int]

    @classmethod
    def of(cls, row: PriceRow, tier: str | None = None) -> Rates:
        """A row's prices at a service tier."""
        if tier is None:
            return cls._filled(row.id, row, dict(row.each()))
        return cls._filled(f"{row.id}:{tier}", row, dict(row.each(row.tiers[tier])))

    @classmethod
    def dearest(cls, row: PriceRow) -> Rates:
        """What a token costs at most, whichever bucket and tier it will be counted in."""
        said = dict(row.each(max(Decimal(1), *row.tiers.values(), Decimal(0))))
        for bucket in ("input", "output"):
            if bucket in said:
                said[bucket] = max(said[bucket], *(said.get(name, 0) for name in _INSTEAD if _INSTEAD[name] == bucket))
        return cls._filled(row.id, row, said)

    @classmethod
    def _filled(cls, name: str, row: PriceRow, said: Mapping[str, int]) -> Rates:
        buckets = tuple(said.get(bucket, said.get(_INSTEAD.get(bucket, bucket))) for bucket in BUCKETS)
        return cls(name, buckets, {meter: said[meter] for meter in row.meters})

    def cost(self, usage: Usage, state: Literal["exact", "estimated"]) -> Cost | None:
        """What a usage costs: each bucket and meter that was used, once; None when one of them has no price."""
        picos, lines = 0, []
        for name, quantity, each in zip(BUCKETS, _quantities(usage), self.buckets, strict=True):
            if quantity:
                if each is None:
                    return None
                picos += quantity * each
                lines.append((name, quantity, each))
        for name, quantity in usage.meters.items():
            if quantity:
                if name not in self.meters:
                    return None
                picos += quantity * self.meters[name]
                lines.append((name, quantity, self.meters[name]))
        return Cost(picos, state, self.id, tuple(lines))


@frozen
class Entry:
    """A row, worked out."""

    above: int
    standard: Rates
    tiers: Mapping[str, Rates]
    dearest: Rates

    @classmethod
    def of(cls, row: PriceRow) -> Entry:
        """Work a row out."""
        tiers = {tier: Rates.of(row, tier) for tier in row.tiers}
        return cls(row.above_prompt_tokens, Rates.of(row), tiers, Rates.dearest(row))

    def holds(self, usage: Usage) -> bool:
        """Whether a prompt is long enough for this row."""
        return not self.above or usage.prompt > self.above

    def cost(self, usage: Usage) -> Cost | None:
        """What a usage costs: exactly, if the provider counted it and its tier has a price."""
        state: Literal["exact", "estimated"] = "exact" if usage.source == "provider" else "estimated"
        tier = usage.tier or ""
        if tier in STANDARD_TIERS:
            return self.standard.cost(usage, state)
        if tier in self.tiers:
            return self.tiers[tier].cost(usage, state)
        return self.standard.cost(usage, "estimated")


@frozen
class Sheet:
    """The rows for one provider and model pattern, those for the longest prompts first."""

    entries: tuple[Entry, ...]

    def cost(self, usage: Usage) -> Cost | None:
        """What a usage costs, or None: part of it has no price."""
        for entry in self.entries:
            if entry.holds(usage):
                return entry.cost(usage)
        return None

    def bound(self, usage: Usage) -> Cost | None:
        """What a usage can cost at most, while nobody knows which buckets and tier it will be counted in."""
        dearest: Cost | None = None
        for entry in self.entries:
            if not entry.holds(usage):
                continue
            cost = entry.dearest.cost(usage, "estimated")
            if cost is None:
                return None
            if dearest is None or (cost.picos or 0) > (dearest.picos or 0):
                dearest = cost
        return dearest


@define(eq=False)
class Book:
    """All rows of a price table, ready to be asked."""

    rows: tuple[PriceRow, ...]
    _exact: dict[tuple[str, str], Sheet] = field(init=False)
    _prefixes: list[tuple[str, str, Sheet]] = field(init=False)
    """(model prefix, provider, sheet), the most specific first."""
    _remembered: dict[tuple[str, str], Sheet | None] = field(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
        sheets = _sheets(self.rows)
        self._exact = {key: sheet for key, sheet in sheets.items() if not key[1].endswith("*")}
        prefixes = [(model[:-1], provider, sheet) for (provider, model), sheet in sheets.items() if model.endswith("*")]
        self._prefixes = sorted(prefixes, key=lambda entry: (-len(entry[0]), entry[1] == "*"))

    @classmethod
    def of(cls, *tables: Iterable[PriceRow]) -> Book:
        """A book of several tables; a row of a later one replaces the row it has in common with an earlier one."""
        rows = {row.key: row for table in tables for row in table}
        return cls(tuple(rows.values()))

    def find(self, provider: str, model: str) -> Sheet | None:
        """The most specific rows for a model at a provider, or None: it has no price."""
        key = provider, model
        try:
            return self._remembered[key]
        except KeyError:
            pass
        if len(self._remembered) >= REMEMBERED:
            self._remembered.clear()
        sheet = self._remembered[key] = self._search(provider, model)
        return sheet

    def _search(self, provider: str, model: str) -> Sheet | None:
        exact = self._exact.get((provider, model)) or self._exact.get(("*", model))
        if exact is not None:
            return exact
        return next(
            (sheet for prefix, at, sheet in self._prefixes if model.startswith(prefix) and at in ("*", provider)), None
        )


def _sheets(rows: Iterable[PriceRow]) -> dict[tuple[str, str], Sheet]:
    """The rows of each provider and model pattern together."""
    together: dict[tuple[str, str], list[PriceRow]] = {}
    for row in rows:
        together.setdefault((row.provider, row.model), []).append(row)
    return {
        key: Sheet(tuple(Entry.of(row) for row in sorted(same, key=lambda row: -row.above_prompt_tokens)))
        for key, same in together.items()
    }
