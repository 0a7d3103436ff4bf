"""The exports in which providers say what they charge: their columns, and what a row of each means."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from decimal import Context, Decimal, DecimalException, Inexact, InvalidOperation, Overflow
from functools import lru_cache
from typing import Any

from attrs import evolve, frozen

from qlens_plugins.cost.ledger.reconcile_names import EDITION, Meter

EXACT = Context(prec=200, traps=[Inexact, InvalidOperation, Overflow])
"""Enough digits for sums of all amounts that may be in a file, and an error rather than a rounded sum."""
MOST_BEFORE, MOST_BEHIND = 30, 60
"""Digits on both sides of the point that an amount may have."""

Row = Mapping[str, str]
_UNIT = re.compile(r"([0-9]*)\s*([km]?)\s*(tokens?)?", re.IGNORECASE)
_OF_TOKENS = re.compile(r" (input|output|cache writes?)(, long context)?$")
"""Line items of OpenAI that count tokens, where no unit is said."""
_AMERICAN = re.compile(r"([0-9]{1,2})/([0-9]{1,2})/([0-9]{4})( .*)?")
_TIMES = {"": 1, "k": 1000, "m": 1_000_000}
_BEDROCK = {
    *("AmazonBedrock", "AmazonBedrockService", "AmazonBedrockFoundationModels"),
    *("Amazon Bedrock", "Amazon Bedrock Service"),
}


@frozen
class Line:
    """A row that is about models."""

    day: date
    until: date
    """The last day it is for: the same one, but where the export is by months."""
    meter: Meter
    amount: Decimal
    currency: str
    tokens: Decimal | None
    """None: the row has no number of tokens."""
    kind: str | None
    """What it is called when it is not for usage: `Tax`."""


@frozen
class Format:
    """The columns of one kind of export, by their letters and digits alone; `a|b` is the first that is there."""

    name: str
    day: str
    meter: str
    amount: str
    told: tuple[str, ...] = ()
    """The columns that tell which service a row is about."""
    about: Callable[[Sequence[str]], str | None] = lambda texts: ""
    """What in them tells the model beside the meter's name; None: the row is about another service."""
    currency: str = ""
    kind: str = ""
    usage: frozenset[str] = frozenset({"usage", ""})
    """What the column `kind` says of usage."""
    resource: str = ""
    quantity: str = ""
    unit: str = ""
    end: str = ""
    """When what is charged for was over."""
    usd: str = ""
    """The amount in USD, for bills in another currency."""
    must: tuple[str, ...] = ()
    """The columns that no row lacks: those that are needed, and of those that tell the service what the table has."""

    @property
    def needs(self) -> tuple[str, ...]:
        """The columns by which it is recognised."""
        return self.day, self.meter, self.amount

    def of(self, columns: Sequence[str]) -> Format | None:
        """The format with those of its columns that a table has; None when one is missing that it needs."""
        there: dict[str, Any] = {name: _there(getattr(self, name), columns) for name in _COLUMNS}
        needed = tuple(there[name] for name in _COLUMNS[:3])
        must = (*needed, *(column for column in self.told if column in columns))
        return evolve(self, **there, must=must) if all(needed) else None

    @property
    def used(self) -> frozenset[str]:
        """The columns that are read."""
        return frozenset((*self.told, *(getattr(self, name) for name in _COLUMNS)))

    def line(self, row: Row) -> Line | None:
        """What a row says, None when it is about another service or nothing; raises ValueError when it is faulty."""
        for column in self.must:
            if column not in row:
                raise ValueError("the row ends before its columns do: is the file whole?")
        about = self.about([row.get(column, "") for column in self.told])
        if about is None or not (row[self.meter].strip() or row[self.amount].strip()):
            return None  # OpenAI writes a row without either for a day without costs
        kind, currency = row.get(self.kind, ""), row.get(self.currency, "") or "USD"
        meter = Meter(row.get(self.meter, ""), about, row.get(self.resource, ""))
        amount = self.amount
        if currency.upper() != "USD" and self.usd:
            amount, currency = self.usd, "USD"
        day = _day(row.get(self.day, ""))
        return Line(
            day=day,
            until=max(day, _last_day(row[self.end])) if row.get(self.end) else day,
            meter=meter,
            amount=_number(row, amount),
            currency=currency.upper(),
            tokens=self._tokens(row, meter),
            kind=None if kind.lower() in self.usage else kind,
        )

    def _tokens(self, row: Row, meter: Meter) -> Decimal | None:
        """The number of tokens; None where the unit is another one, or not said."""
        if not row.get(self.quantity):
            return None
        quantity, unit = _number(row, self.quantity), row.get(self.unit, "").strip().replace("_", " ")
        if not unit and _OF_TOKENS.search(meter.name):
            return quantity
        found = _UNIT.fullmatch(unit)
        if found is None or not (found[3] or "token" in meter.name.lower()):
            return None
        return EXACT.multiply(quantity, Decimal(int(found[1] or 1) * _TIMES[found[2].lower()]))


_COLUMNS = ("day", "meter", "amount", "currency", "kind", "resource", "quantity", "unit", "end", "usd")


def plain(column: str) -> str:
    """`lineItem/UsageStartDate` and `line_item_usage_start_date` are one."""
    return "".join(filter(str.isalnum, column.lower()))


def _there(alternatives: str, columns: Sequence[str]) -> str:
    return next((name for name in alternatives.split("|") if name and name in columns), "")


def _number(row: Row, column: str) -> Decimal:
    text = row.get(column, "")
    try:
        number = Decimal(_plain(text))
    except (DecimalException, ValueError):
        raise ValueError(f"{column}: {text[:40]!r} is no number") from None
    if number.is_finite() and not number:
        return Decimal(0)
    exponent = number.as_tuple().exponent
    if not isinstance(exponent, int) or number.adjusted() > MOST_BEFORE or exponent < -MOST_BEHIND:
        raise ValueError(f"{column}: {text[:40]!r} is no amount")
    return number


def _plain(text: str) -> str:
    """The same; raises ValueError for what Python reads as a number and no export writes: `1_000`, or other digits."""
    if not text.isascii() or "_" in text:
        raise ValueError
    return text


@lru_cache(maxsize=1024)
def _day(text: str) -> date:
    """A day in UTC, of an ISO time, of `11/28/2026` as Azure has it, or of Unix seconds."""
    return _moment(text).date()


@lru_cache(maxsize=1024)
def _last_day(text: str) -> date:
    """The last day before a time at which something was over."""
    return (_moment(text) - timedelta(microseconds=1)).date()


def _moment(text: str) -> datetime:
    try:
        if _plain(text).isdecimal() and len(text) > 8:
            return datetime.fromtimestamp(int(text), UTC)
        if american := _AMERICAN.fullmatch(text):
            month, day, year = map(int, american.groups()[:3])
            return datetime(year, month, day, tzinfo=UTC)
        found = datetime.fromisoformat(text.strip().removesuffix(" UTC"))
    except (ValueError, OverflowError, OSError):
        raise ValueError(f"{text[:40]!r} is no day") from None
    return found.astimezone(UTC) if found.tzinfo is not None else found.replace(tzinfo=UTC)


# --- whose rows they are -----------------------------------------------------------------------


def _azure(texts: Sequence[str]) -> str | None:
    named = " ".join(texts).lower()
    return texts[-1] if "openai" in named or "foundry models" in named else None


def _aws(texts: Sequence[str]) -> str | None:
    for text in texts:
        if EDITION in text:
            return _product(text)
        if text in _BEDROCK:
            return ""
    return None


def _product(text: str) -> str:
    """The name of a product; CUR 2.0 has all that is known of it as JSON in one column."""
    if not text.startswith("{"):
        return text
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return next((value for value in found.values() if isinstance(value, str) and value.endswith(EDITION)), text)


def _focus(meter: str, told: tuple[str, ...], about: Callable[[Sequence[str]], str | None], usd: str = "") -> Format:
    """FinOps' common format, in which the providers name their meters in columns of their own."""
    return Format(
        name="FOCUS",
        day="chargeperiodstart",
        meter=meter,
        amount="billedcost",
        told=told,
        about=about,
        currency="billingcurrency",
        kind="chargecategory",
        resource="resourceid",
        quantity="consumedquantity",
        unit="consumedunit",
        end="chargeperiodend",
        usd=usd,
    )


FORMATS: Mapping[str, tuple[Format, ...]] = {
    "azure": (
        _focus(
            "xskumetername|skumeter",
            ("servicename", "xskumetercategory", "xskumetersubcategory"),
            _azure,
            "xbilledcostinusd",
        ),
        Format(
            name="actual cost",
            day="date|usagedate|usagedatetime",
            meter="metername",
            amount="costinbillingcurrency|cost|pretaxcost",
            told=("metercategory", "metersubcategory"),
            about=_azure,
            currency="billingcurrency|billingcurrencycode|currency",
            kind="chargetype",
            resource="resourceid|instanceid",
            quantity="quantity|usagequantity",
            unit="unitofmeasure",
            usd="costinusd",
        ),
    ),
    "aws": (
        _focus("xusagetype|skumeter", ("servicename", "xservicecode"), _aws),
        Format(
            name="Cost and Usage Report",
            day="lineitemusagestartdate",
            meter="lineitemusagetype",
            amount="lineitemunblendedcost",
            told=("productproductname", "product", "lineitemproductcode"),
            about=_aws,
            currency="lineitemcurrencycode",
            kind="lineitemlineitemtype",
            usage=frozenset({"usage", "discountedusage", "savingsplancoveredusage", ""}),
            resource="lineitemresourceid",
            quantity="lineitemusageamount",
            unit="pricingunit",
            end="lineitemusageenddate",
        ),
    ),
    "openai": (
        Format(
            name="costs",
            day="starttime|starttimeiso|date",
            meter="lineitem",
            amount="amountvalue|amount|cost",
            currency="amountcurrency|currency",
            resource="projectid|projectname",
            quantity="quantity",
            unit="quantityunit",
        ),
    ),
}
"""By the kind of bill, the formats that it comes in."""
