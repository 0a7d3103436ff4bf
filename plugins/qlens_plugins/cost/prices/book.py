"""Finds the row of a target and turns a usage into an exact cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from operator import attrgetter
from typing import Literal

from attrs import define, field, frozen

from qlens import Cost, Target, Usage
from qlens_plugins.cost.prices.catalogue import KINDS, Catalogue
from qlens_plugins.cost.prices.rows import BUCKETS, PriceRow

Asked = tuple[str, str | None, str | None, str]
"""What of a target its price hangs on: provider, kind, region and model."""

STANDARD_TIERS = (None, "", "auto", "default", "standard")
"""What providers call the tier that a row's own prices are for."""
UNKNOWN = -1
"""The price of what has none."""
REMEMBERED = 1024
"""How many answers are kept at most: behind a wildcard, clients choose the model names."""

_INSTEAD = {"cached_input": "input", "cache_write_5m": "input", "cache_write_1h": "input", "reasoning": "output"}
"""The price that stands in for one a row does not give."""
_METERS_INSTEAD = {"image_tokens": "input", "cached_image_tokens": "cached_input"}
"""The same of meters."""
_FEES = frozenset(
    {
        "web_searches",
        *(f"transcribed_{what}" for what in ("seconds", "text_in", "audio_in", "text_out")),
    }
)
"""Meters beside the tokens of a call: without a price for them its cost is estimated, and not unknown."""
_COUNTED_AS = {"output_images": "images", "input_seconds": "seconds"}
"""Meters that count what is billed by tokens: where tokens have no price, they are units like those of these meters."""
REQUESTS = "requests"
"""The meter that is one for each call that a provider answered, where a row has a price for it."""
_COUNTED_IN = {
    "input": ("cached_input", "cache_write_5m", "cache_write_1h", "audio_in"),
    "output": ("reasoning", "audio_out"),
}
"""The buckets in which tokens may turn out to be that a bound has in one."""


_beside = attrgetter("cached_input", "cache_write_5m", "cache_write_1h", "reasoning", "audio_in", "audio_out", "meters")
"""What of a usage most calls do not use."""


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
    has_both: bool = field(init=False)
    """Whether what is sent and what comes back have prices: all that most calls need."""

    @has_both.default
    def _are_known(self) -> bool:
        return self.input >= 0 and self.output >= 0

    @classmethod
    def of(cls, row: PriceRow, tier: str | None = None) -> Rates:
        """A row's prices, or those at one of the tiers that it has a factor for."""
        name, factor = (row.id, Decimal(1)) if tier is None else (f"{row.id}:{tier}", row.tiers[tier])
        said = dict(row.each(factor))
        buckets = {bucket: said.get(bucket, said.get(_INSTEAD.get(bucket, bucket), UNKNOWN)) for bucket in BUCKETS}
        instead = {meter: buckets[bucket] for meter, bucket in _METERS_INSTEAD.items()}
        # What has no price for a request takes none.
        return cls(name, {**instead, REQUESTS: 0, **{meter: said[meter] for meter in row.meters}}, **buckets)

    @classmethod
    def dearest(cls, name: str, all_: Sequence[Rates]) -> Rates:
        """What a token costs at most, whichever bucket and tier it will be counted in."""
        most = {bucket: max(getattr(rates, bucket) for rates in all_) for bucket in BUCKETS}
        for bucket, others in _COUNTED_IN.items():
            most[bucket] = max(most[bucket], *(most[other] for other in others))
        meters = {meter for rates in all_ for meter in rates.meters}
        return cls(name, {meter: max(rates.meters.get(meter, UNKNOWN) for rates in all_) for meter in meters}, **most)

    @property
    def is_by_unit(self) -> bool:
        """Whether tokens have no price: what is billed by pictures or characters is not billed by tokens as well."""
        return all(getattr(self, bucket) < 0 for bucket in BUCKETS)

    def has(self, meter: str) -> bool:
        """Whether one of a bucket or a meter has a price."""
        each: int = getattr(self, meter) if meter in BUCKETS else self.meters.get(meter, UNKNOWN)
        return each > 0 if meter == REQUESTS else each >= 0

    def bills(self, way: Iterable[str]) -> bool:
        """Whether what uses all of these has a price; where nothing but requests has one, all has."""
        return all(map(self.has, way)) or (self.is_by_unit and self.has(REQUESTS))

    def cost(self, usage: Usage, state: Literal["exact", "estimated"]) -> Cost | None:
        """What a usage costs: each bucket and meter that was used, once; None when one of them has no price."""
        sent, got = usage.input, usage.output
        if sent and got and self.has_both and not any(_beside(usage)):
            each, other = self.input, self.output
            return Cost(sent * each + got * other, state, self.id, (("input", sent, each), ("output", got, other)))
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
        if usage.meters and self._leaves_out(usage.meters, lines):
            state = "estimated"
        picos = 0
        for _, quantity, each in lines:
            if each < 0:
                return None
            picos += quantity * each
        return Cost(picos, state, self.id, tuple(lines))

    def _leaves_out(self, meters: Mapping[str, int], lines: list[tuple[str, int, int]]) -> bool:
        """Add the meters that were used to the lines; whether some have no price that would belong to the cost."""
        by_unit = self.is_by_unit and any(self.has(_COUNTED_AS.get(name, name)) for name in meters)
        if by_unit:
            lines.clear()
        left_out = False
        for name, quantity in meters.items():
            if not quantity or (name in _METERS_INSTEAD if by_unit else name in _COUNTED_AS):
                continue
            unit = _COUNTED_AS.get(name, name)
            each = self.meters.get(unit, UNKNOWN)
            if each < 0 and name in _FEES:
                left_out = True
            else:
                lines.append((unit, quantity, each))
        return left_out


@frozen
class Entry:
    """What calls of one prompt size cost, worked out."""

    above: int
    """It holds for prompts of more tokens than this."""
    standard: Rates
    tiers: Mapping[str | None, Rates]
    """By what a provider calls the tier, all names of the standard one included."""
    dearest: Rates

    @classmethod
    def of(cls, rows: Sequence[PriceRow]) -> Entry:
        """Work out the rows for one prompt size: the standard tier's, and those of single tiers."""
        plain = next((row for row in rows if row.tier is None), None)
        standard = _nothing(rows[0]) if plain is None else Rates.of(plain)
        tiers: dict[str | None, Rates] = {} if plain is None else {tier: Rates.of(plain, tier) for tier in plain.tiers}
        tiers.update({row.tier: Rates.of(row) for row in rows if row.tier is not None})
        dearest = Rates.dearest(standard.id, (standard, *tiers.values()))
        tiers.update(dict.fromkeys(STANDARD_TIERS, standard))
        return cls(rows[0].above_prompt_tokens, standard, tiers, dearest)

    def cost(self, usage: Usage) -> Cost | None:
        """What a usage costs: exactly, if the provider counted it and its tier has a price."""
        rates = self.tiers.get(usage.tier)
        if rates is None:
            return self.standard.cost(usage, "estimated")
        return rates.cost(usage, "exact" if usage.source == "provider" else "estimated")


def _nothing(row: PriceRow) -> Rates:
    """The prices of the standard tier where only others have some."""
    return Rates(row.id, {}, **dict.fromkeys(BUCKETS, UNKNOWN))


@frozen
class Sheet:
    """The prices in force for one provider and model pattern, those for the longest prompts first."""

    entries: tuple[Entry, ...]
    only: Entry | None = field(init=False)
    """The entry for prompts of all sizes, where it is the only one."""
    by_request: bool = field(init=False)
    """Whether a call costs something beside what it uses."""

    @only.default
    def _for_all_sizes(self) -> Entry | None:
        return self.entries[0] if len(self.entries) == 1 and not self.entries[0].above else None

    @by_request.default
    def _takes_fees(self) -> bool:
        return any(entry.dearest.meters.get(REQUESTS) for entry in self.entries)

    @classmethod
    def of(cls, rows: Iterable[PriceRow]) -> Sheet:
        """Work out rows that hold at the same time."""
        sizes: dict[int, list[PriceRow]] = {}
        for row in rows:
            sizes.setdefault(row.above_prompt_tokens, []).append(row)
        return cls(tuple(Entry.of(sizes[size]) for size in sorted(sizes, reverse=True)))

    def bills(self, way: Iterable[str]) -> bool:
        """Whether what uses all of these buckets and meters has a price, however long its prompt is."""
        is_whole = bool(self.entries) and not self.entries[-1].above
        return is_whole and all(entry.standard.bills(way) for entry in self.entries)

    def cost(self, usage: Usage) -> Cost | None:
        """What a usage costs: exactly, if the provider counted it and its tier has a price.

        None when part of it has no price.
        """
        entry = self.only or self._entry(usage.prompt)
        return None if entry is None else entry.cost(usage)

    def _entry(self, prompt: int) -> Entry | None:
        return next((entry for entry in self.entries if not entry.above or prompt > entry.above), None)

    def bound(self, usage: Usage) -> Cost | None:
        """What a usage can cost at most, while nobody knows which buckets and tier it will be counted in."""
        if self.only is not None:
            return self.only.dearest.cost(usage, "estimated")
        if not self.entries or self.entries[-1].above:
            return None  # the prompt may turn out to be a short one, which has no price
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


NO_PRICE = Sheet(())
"""What a target without a row has."""


@frozen
class Periods:
    """How the prices of a target change with time, the newest first."""

    sheets: tuple[tuple[int, Sheet], ...]
    """(the first nanosecond of Unix time at which it holds, sheet)."""

    def at(self, wall_ns: int) -> Sheet:
        """The prices in force at a time."""
        return next((sheet for since, sheet in self.sheets if wall_ns >= since), NO_PRICE)


@define(eq=False)
class Book:
    """All rows of a price table, and behind them the catalogue, ready to be asked."""

    rows: tuple[PriceRow, ...]
    catalogue: Callable[[], Catalogue] | None = None
    """Gives the catalogue, for targets without a row; None: there is none."""
    known: dict[Asked, Sheet] = field(factory=dict, init=False)
    """The prices of targets that were asked for, where they are the same at all times."""
    _changing: dict[Asked, Periods] = field(factory=dict, init=False)
    """Those of the others."""
    _exact: dict[str, list[tuple[PriceRow, ...]]] = field(init=False)
    """By model, the rows that differ in size, tier and date only."""
    _prefixes: list[tuple[PriceRow, ...]] = field(init=False)

    def __attrs_post_init__(self) -> None:
        alike: dict[tuple[str, str, str | None], list[PriceRow]] = {}
        for row in self.rows:
            alike.setdefault((row.model, row.provider, row.region), []).append(row)
        self._exact, self._prefixes = {}, []
        for (model, _, _), rows in alike.items():
            together = self._prefixes if model.endswith("*") else self._exact.setdefault(model, [])
            together.append(tuple(rows))

    @classmethod
    def of(cls, *tables: Iterable[PriceRow], catalogue: Callable[[], Catalogue] | None = None) -> Book:
        """A book of several tables; a row of a later one replaces the row it has in common with an earlier one."""
        rows = {row.key: row for table in tables for row in table}
        return cls(tuple(rows.values()), catalogue)

    def find(self, target: Target, wall_ns: int) -> Sheet:
        """The prices of a target at a time: those of the most specific rows that are in force."""
        asked = (target.provider, target.kind, target.region, target.base_model or target.model)
        if (sheet := self.known.get(asked)) is not None:
            return sheet
        if (periods := self._changing.get(asked)) is None:
            if len(self.known) + len(self._changing) >= REMEMBERED:
                self.known.clear()
                self._changing.clear()
            periods = self._periods(*asked)
            if len(periods.sheets) == 1:
                self.known[asked] = periods.sheets[0][1]
            else:
                self._changing[asked] = periods
        return periods.at(wall_ns)

    def _periods(self, provider: str, kind: str | None, region: str | None, model: str) -> Periods:
        """All prices of a target."""
        # A request that passes through stands as its pattern, `GET /models`: a row for all models is none for that.
        found = [] if " /" in model else self._matching((provider, kind, "*"), region, model)
        if self.catalogue is not None and kind in KINDS:
            found.append(self.catalogue().find(kind, model, region))
        days = {row.valid_from or "" for rows in found for row in rows} | {""}
        return Periods(tuple((_begins(day), _in_force(found, day)) for day in sorted(days, reverse=True)))

    def _matching(
        self, providers: tuple[str | None, ...], region: str | None, model: str
    ) -> list[tuple[PriceRow, ...]]:
        """The rows that name a model, most specific first: by name, then by provider, then by region."""
        candidates = [*self._exact.get(model, ()), *self._prefixes]
        fitting = [
            rows
            for rows in candidates
            if rows[0].provider in providers
            and rows[0].region in (None, region)
            and (rows[0].model == model or model.startswith(rows[0].model.removesuffix("*")))
        ]

        def place(rows: tuple[PriceRow, ...]) -> tuple[bool, int, int, bool]:
            row = rows[0]
            return (
                row.model.endswith("*"),
                -len(row.model),
                providers.index(row.provider),
                row.region is None,
            )

        return sorted(fitting, key=place)


def _in_force(found: Iterable[Sequence[PriceRow]], day: str) -> Sheet:
    """The first rows of which some have begun; the newest of them count, all together."""
    for rows in found:
        begun = [row.valid_from or "" for row in rows if (row.valid_from or "") <= day]
        if begun:
            return Sheet.of(row for row in rows if (row.valid_from or "") == max(begun))
    return NO_PRICE


def _begins(day: str) -> int:
    """The first nanosecond of a day in UTC; nothing is before all days."""
    return int(datetime.fromisoformat(day).replace(tzinfo=UTC).timestamp()) * 10**9 if day else 0
