"""One row of a price table, as it stands in YAML."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import date
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from attrs import field, frozen, validators

from qlens import picos

if TYPE_CHECKING:
    from attrs import Attribute

MILLION = 10**6
BUCKETS = (
    "input",
    "cached_input",
    "cache_write_5m",
    "cache_write_1h",
    "output",
    "reasoning",
    "audio_in",
    "audio_out",
)
"""The buckets of a usage that have a price for each million tokens."""


def _per_million(row: PriceRow, attribute: Attribute[Any], value: Decimal | None) -> None:
    """A price must come out as whole picodollars for one token, or sums would not be exact."""
    if value is None:
        return
    _not_negative(value)
    if picos(value) % MILLION:
        raise ValueError(f"{value} USD per million tokens has more than 6 decimals; a price has at most 6")


def _per_unit(row: PriceRow, attribute: Attribute[Any], value: Mapping[str, Decimal]) -> None:
    for meter, price in value.items():
        if meter in BUCKETS:
            raise ValueError(f"{meter} is priced per million tokens: give it as `{meter}:` of the row")
        _not_negative(price)
        picos(price)


def _multipliers(row: PriceRow, attribute: Attribute[Any], value: Mapping[str, Decimal]) -> None:
    for tier, factor in value.items():
        if not factor.is_finite() or factor < 0:
            raise ValueError(f"the factor of tier {tier} is {factor}; it must be 0 or more")
        for name, each in row.each():
            _times(each, factor, f"{name} at tier {tier}")


def _iso_date(row: PriceRow, attribute: Attribute[Any], value: str | None) -> None:
    if value is not None and not _is_date(value):
        raise ValueError(f"{value} is no date; write it like 2027-01-31")


def _is_date(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def _not_negative(value: Decimal) -> None:
    if value.is_finite() and value < 0:
        raise ValueError(f"{value} USD is negative; a price is 0 or more")


def _times(each: int, factor: Decimal, what: str) -> int:
    """Picodollars times a factor; raises ValueError when the product is no whole number."""
    over, under = factor.as_integer_ratio()
    product, rest = divmod(each * over, under)
    if rest:
        raise ValueError(f"{what} would be a fraction of a picodollar; give that tier's prices with fewer decimals")
    return product


@frozen
class PriceRow:
    """What the models of one name cost at one provider, tokens in USD per million."""

    model: str = field(validator=validators.min_len(1))
    """Model this row prices: a name, or `prefix*`. Compared with the target's `base_model`, else with its `model`."""
    provider: str = field(default="*", validator=validators.min_len(1))
    """Provider this row is for: a name under `providers:`, a kind (`azure_openai`, `bedrock`, ...), or `*` for all."""
    region: str | None = None
    """The row holds for targets with this `region` only."""
    tier: str | None = field(default=None, validator=validators.optional(validators.min_len(1)))
    """The row holds for calls at this service tier only, as the provider reports it: `priority`, `flex`, `batch`."""
    valid_from: str | None = field(default=None, validator=_iso_date)
    """First day (UTC) of these prices, `2027-01-31`. From then on they replace all older rows for the same model."""
    input: Decimal | None = field(default=None, validator=_per_million)
    """USD per million prompt tokens."""
    cached_input: Decimal | None = field(default=None, validator=_per_million)
    """USD per million prompt tokens read from the provider's cache; without it the price of `input`."""
    cache_write_5m: Decimal | None = field(default=None, validator=_per_million)
    """USD per million prompt tokens written to the provider's cache; without it the price of `input`."""
    cache_write_1h: Decimal | None = field(default=None, validator=_per_million)
    """The same for a cache entry that lives an hour; without it the price of `input`."""
    output: Decimal | None = field(default=None, validator=_per_million)
    """USD per million completion tokens."""
    reasoning: Decimal | None = field(default=None, validator=_per_million)
    """USD per million reasoning tokens; without it the price of `output`."""
    audio_in: Decimal | None = field(default=None, validator=_per_million)
    """USD per million audio tokens of the prompt; without it a call that uses some is unpriced."""
    audio_out: Decimal | None = field(default=None, validator=_per_million)
    """USD per million audio tokens of the answer; without it a call that uses some is unpriced."""
    meters: Mapping[str, Decimal] = field(factory=dict, validator=_per_unit, hash=False)
    """USD for one unit of what is not counted in tokens, by meter: requests, images, seconds, characters, queries."""
    tiers: Mapping[str, Decimal] = field(factory=dict, validator=_multipliers, hash=False)
    """Factor on every price of this row, by service tier as the provider reports it: `{priority: 2, flex: 0.5}`."""
    above_prompt_tokens: int = field(default=0, validator=validators.ge(0))
    """The row holds for prompts of more tokens than this; such a call pays this row's prices for all of it."""
    source: str | None = None
    """Where the prices were found; a note."""
    date: str | None = None
    """When they were found; it becomes part of the price id of every receipt."""

    def __attrs_post_init__(self) -> None:
        if not self.each():
            raise ValueError(f"the row for {self.model} has no price; give at least one, 0 if it is free")

    @property
    def key(self) -> tuple[str | int | None, ...]:
        """What no two rows of a table share."""
        return self.provider, self.model, self.region, self.valid_from, self.above_prompt_tokens, self.tier

    @property
    def id(self) -> str:
        """The name receipts know this row by: provider/model, with the region, prompt size, date and tier it has."""
        region = f"[{self.region}]" if self.region else ""
        above = f">{self.above_prompt_tokens}" if self.above_prompt_tokens else ""
        since = self.valid_from or self.date
        named = f"{self.provider}/{self.model}{region}{above}" + (f"@{since}" if since else "")
        return f"{named}:{self.tier}" if self.tier else named

    def each(self, factor: Decimal = Decimal(1)) -> list[tuple[str, int]]:
        """What the row says itself: (meter, picodollars for one), times a factor."""
        tokens = [(name, getattr(self, name)) for name in BUCKETS]
        prices = [(name, picos(price) // MILLION) for name, price in tokens if price is not None]
        prices += [(meter, picos(price)) for meter, price in self.meters.items()]
        return [(name, _times(each, factor, name)) for name, each in prices]


def no_duplicates(rows: Iterable[PriceRow]) -> None:
    """Raise ValueError when a table says two things about one model."""
    for (provider, model, region, since, above, tier), count in Counter(row.key for row in rows).items():
        if count > 1:
            size = f" above {above} prompt tokens" if above else ""
            told = ((" in region", region), (" at tier", tier), (" from", since))
            more = "".join(f"{word} {value}" for word, value in told if value)
            raise ValueError(f"{count} rows for model {model} of provider {provider}{size}{more}; leave one")
