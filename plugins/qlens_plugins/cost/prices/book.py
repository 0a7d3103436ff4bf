"""Finds the row of a target and turns a usage into an exact cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Literal

from attrs import define, field, frozen

from qlens import Cost, Usage
from qlens_plugins.cost.prices.rows import BUCKETS, PriceRow

STANDARD_TIERS = (None, "", "auto", "default", "standard")
"""What providers call the tier that a row's own prices are for."""
UNKNOWN = -1
"""The price of what has none."""
REMEMBERED = 1024
"""How many answers are kept at most: behind a wildcard, clients choose the model names."""

_INSTEAD = {"cached_input": "input", "cache_write_5m": "input", "cache_write_1h": "input", "reasoning": "output"}
"""The price that stands in for one a row does not give."""


@frozen
class Rates:
    """Picodollars for one of each bucket and meter, or UNKNOWN."""

    id: str
    meters: Mapping[str, int]
    input: int
    cached_input: int
    cache_write_5m: int
    cache_write_1h: int
    output: int
    reasoning: int
    audio_in: int
    audio_out: int

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
        buckets = {bucket: said.get(bucket, said.get(_INSTEAD.get(bucket, bucket), UNKNOWN)) for bucket in BUCKETS}
        return cls(name, {meter: said[meter] for meter in row.meters}, **buckets)

    def cost(self, usage: Usage, state: Literal["exact", "estimated"]) -> Cost | None:
        """What a usage costs: each bucket and meter that was used, once; None when one of them has no price."""
        # Spelled out: a loop over the names of the buckets takes twice as long, and few of them are used.
        lines: list[tuple[str, int, int]] = []
        if usage.input:
            lines.append(("input", usage.input, self.input))
        if usage.cached_input:
            lines.append(("cached_input", usage.cached_input, self.cached_input))
        if usage.cache_write_5m:
            lines.append(("cache_write_5m", usage.cache_write_5m, self.cache_write_5m))
        if usage.cache_write_1h:
            lines.append(("cache_write_1h", usage.cache_write_1h, self.cache_write_1h))
        if usage.output:
            lines.append(("output", usage.output, self.output))
        if usage.reasoning:
            lines.append(("reasoning", usage.reasoning, self.reasoning))
        if usage.audio_in:
            lines.append(("audio_in", usage.audio_in, self.audio_in))
        if usage.audio_out:
            lines.append(("audio_out", usage.audio_out, self.audio_out))
        for name, quantity in usage.meters.items() if usage.meters else ():
            if quantity:
                lines.append((name, quantity, self.meters.get(name, UNKNOWN)))
        picos = 0
        for _, quantity, each in lines:
            if each < 0:
                return None
            picos += quantity * each
        return Cost(picos, state, self.id, tuple(lines))


@frozen
class Entry:
    """A row, worked out."""

    above: int
    """It holds for prompts of more tokens than this."""
    standard: Rates
    tiers: Mapping[str | None, Rates]
    """By what a provider calls the tier, all names of the standard one included."""
    dearest: Rates

    @classmethod
    def of(cls, row: PriceRow) -> Entry:
        """Work a row out."""
        standard = Rates.of(row)
        tiers: dict[str | None, Rates] = {tier: Rates.of(row, tier) for tier in row.tiers}
        tiers.update(dict.fromkeys(STANDARD_TIERS, standard))
        return cls(row.above_prompt_tokens, standard, tiers, Rates.dearest(row))


@frozen
class Sheet:
    """The rows for one provider and model pattern, those for the longest prompts first."""

    entries: tuple[Entry, ...]

    def cost(self, usage: Usage) -> Cost | None:
        """What a usage costs: exactly, if the provider counted it and its tier has a price.

        None when part of it has no price.
        """
        for entry in self.entries:
            if not entry.above or usage.prompt > entry.above:
                rates = entry.tiers.get(usage.tier)
                if rates is None:
                    return entry.standard.cost(usage, "estimated")
                return rates.cost(usage, "exact" if usage.source == "provider" else "estimated")
        return None

    def bound(self, usage: Usage) -> Cost | None:
        """What a usage can cost at most, while nobody knows which buckets and tier it will be counted in."""
        dearest: Cost | None = None
        for entry in self.entries:
            if entry.above and usage.prompt <= entry.above:
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
