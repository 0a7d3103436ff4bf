"""Puts what a provider charged beside what the ledger has, by model and day."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date, timedelta
from decimal import Context, Decimal
from functools import partial

import orjson
from attrs import define, field, frozen

from qlens_plugins.cost.ledger import past
from qlens_plugins.cost.ledger.reconcile_files import Bill
from qlens_plugins.cost.ledger.reconcile_formats import EXACT
from qlens_plugins.cost.ledger.reconcile_names import Ignored, Matcher, Meter, Unmatched
from qlens_plugins.cost.ledger.reconcile_places import Deployment, Place, Places
from qlens_plugins.cost.ledger.rows import BUCKETS, DAY_NS
from qlens_plugins.cost.ledger.store import Database, Store

_EPOCH = date(1970, 1, 1)
_UNIT = Decimal(1).scaleb(-12)
SHOWN = Context(prec=2 * EXACT.prec)
"""For what is only shown, and is rounded."""


@define
class Sums:
    """What the ledger and the bill have for some days of a model."""

    calls: int = 0
    unpriced: int = 0
    """Calls of the ledger without a price: they are in the bill all the same."""
    ledger_usd: Decimal = Decimal(0)
    ledger_tokens: int = 0
    bill_usd: Decimal = Decimal(0)
    bill_tokens: Decimal | None = Decimal(0)
    """None: the bill does not say how many."""

    def spend(self, calls: int, unpriced: int, picos: int, tokens: int) -> None:
        """Add calls of the ledger."""
        self.calls += calls
        self.unpriced += unpriced
        self.ledger_usd = EXACT.add(self.ledger_usd, EXACT.multiply(Decimal(picos), _UNIT))
        self.ledger_tokens += tokens

    def charge(self, usd: Decimal, tokens: Decimal | None) -> None:
        """Add a charge of the bill."""
        self.bill_usd = EXACT.add(self.bill_usd, usd)
        known = self.bill_tokens is not None and tokens is not None
        self.bill_tokens = EXACT.add(self.bill_tokens or Decimal(0), tokens or Decimal(0)) if known else None

    def add(self, other: Sums) -> None:
        """Put others into this one."""
        self.calls += other.calls
        self.unpriced += other.unpriced
        self.ledger_usd = EXACT.add(self.ledger_usd, other.ledger_usd)
        self.ledger_tokens += other.ledger_tokens
        self.charge(other.bill_usd, other.bill_tokens)

    def drift(self, *, by_tokens: bool) -> Drift | None:
        """What the bill has more than the ledger; None when the bill does not say how many tokens."""
        if not by_tokens:
            return Drift(EXACT.subtract(self.bill_usd, self.ledger_usd), self.bill_usd)
        if self.bill_tokens is None:
            return None
        return Drift(EXACT.subtract(self.bill_tokens, Decimal(self.ledger_tokens)), self.bill_tokens)


@frozen
class Drift:
    """How far the ledger is from a bill."""

    amount: Decimal
    """What the bill has more: below 0 when it has less."""
    of: Decimal
    """What the bill has in all."""

    @property
    def percent(self) -> Decimal | None:
        """Of the bill, to four places; None when there is nothing in it."""
        if not self.of:
            return None if self.amount else Decimal(0)
        return SHOWN.quantize(SHOWN.divide(SHOWN.multiply(self.amount, 100), self.of), Decimal("0.0001"))

    def above(self, percent: Decimal) -> bool:
        """Whether it is more than so much of the bill: exactly, and not by the rounded number that is shown."""
        return EXACT.multiply(self.amount.copy_abs(), Decimal(100)) > EXACT.multiply(percent, self.of.copy_abs())


@define
class Comparison:
    """Both sides."""

    models: dict[str, dict[tuple[date, Place], Sums]] = field(factory=dict)
    """By what a model is shown as, by day, and by the deployments that the bill tells apart."""
    deployments: dict[str, list[Deployment]] = field(factory=dict)
    """What the ledger has of a model."""
    unmatched: dict[tuple[Meter, Unmatched], Sums] = field(factory=dict)
    """What is charged for meters whose model is not known."""
    ignored: Sums = field(factory=Sums)
    """What the operator says is about something else."""

    def total(self, model: str) -> Sums:
        """All days of a model."""
        return _together(self.models[model].values())

    def places(self, model: str) -> dict[Place, Sums]:
        """All days of a model, by the deployments that the bill tells apart."""
        found: dict[Place, Sums] = {}
        for (_, place), sums in self.models[model].items():
            found.setdefault(place, Sums()).add(sums)
        return found

    @property
    def all(self) -> Sums:
        """Everything, what has no known model included."""
        return _together((*map(self.total, self.models), *self.unmatched.values()))


def _together(parts: Iterable[Sums]) -> Sums:
    total = Sums()
    for sums in parts:
        total.add(sums)
    return total


Spent = dict[tuple[date, Deployment], Sums]
"""By the day in UTC on which calls began, and by deployment."""


def compare(bill: Bill, spent: Spent, models: Mapping[Deployment, str], matcher: Matcher, places: Places) -> Comparison:
    """Match both sides; `models` has what each deployment is in truth, those without calls too."""
    found = Comparison()
    shown = {deployment: matcher.model(name) for deployment, name in models.items()}
    for _, deployment in spent:
        model = shown.setdefault(deployment, matcher.model(models.get(deployment, deployment[1])))
        if deployment not in found.deployments.setdefault(model, []):
            found.deployments[model].append(deployment)
    meters: dict[str, dict[Meter, None]] = {}
    for (_, meter), charge in bill.charges.items():
        about = matcher.find(meter)
        if isinstance(about, Unmatched):
            found.unmatched.setdefault((meter, about), Sums()).charge(charge.usd, charge.tokens)
        elif isinstance(about, Ignored):
            found.ignored.charge(charge.usd, charge.tokens)
        else:
            meters.setdefault(about, {})[meter] = None
    for model in sorted({*found.deployments, *meters}):
        mine = [deployment for deployment, name in shown.items() if name == model]
        of_deployment, of_meter = places.apart(mine, meters.get(model, {}))
        by_day = found.models.setdefault(model, {})
        for (day, deployment), sums in spent.items():
            if deployment in of_deployment:
                by_day.setdefault((day, of_deployment[deployment]), Sums()).add(sums)
        for (day, meter), charge in bill.charges.items():
            if meter in of_meter:
                by_day.setdefault((day, of_meter[meter]), Sums()).charge(charge.usd, charge.tokens)
    return found


# --- the ledger's side -------------------------------------------------------------------------


def spent(store: Store, days: past.Days, providers: Sequence[str]) -> Spent:
    """What calls to some providers cost."""
    past.check_kept(store, days)
    found: Spent = {}
    past.ask(store, partial(_sent_once, found, days, providers))
    for wall_ns, _, attempts in past.calls(store, ("attempts",), days, f" AND {past.SENT_AGAIN}"):
        for deployment, *numbers in _attempts(attempts):
            if deployment[0] in providers:
                found.setdefault((_day(wall_ns), deployment), Sums()).spend(*numbers)
    return found


def _day(wall_ns: int) -> date:
    return _EPOCH + timedelta(days=wall_ns // DAY_NS)


def _sent_once(found: Spent, days: past.Days, providers: Sequence[str], database: Database) -> None:
    sums = database.dialect.summed(("coalesce(cost_picos, 0)", *BUCKETS))
    rows = database.rows(
        f"SELECT wall_ns / {DAY_NS}, provider, upstream_model, count(*), "  # noqa: S608 - only names from the code
        f"sum(CASE WHEN cost_picos IS NULL THEN 1 ELSE 0 END), {', '.join(sums)} FROM receipts "
        f"WHERE wall_ns >= ? AND wall_ns < ? AND provider IN ({', '.join('?' * len(providers))}) "
        f"AND {past.PAID} AND NOT {past.SENT_AGAIN} GROUP BY 1, 2, 3",
        [*days.times, *providers],
    )
    for day, provider, model, calls, unpriced, *summed in rows:
        cost, *tokens = map(int, database.dialect.whole(summed))
        key = _EPOCH + timedelta(days=int(day)), (provider, model or "")
        found.setdefault(key, Sums()).spend(int(calls), int(unpriced), cost, sum(tokens))


def _attempts(text: str) -> Iterator[tuple[Deployment, int, int, int, int]]:
    """What each attempt of a call cost: a call that went on to another provider may owe both."""
    for attempt in orjson.loads(text):
        if attempt["billed"]:
            used, cost = attempt["usage"] or {}, attempt["cost_usd"]
            picos = 0 if cost is None else int(Decimal(cost).scaleb(12))
            tokens = sum(used.get(name, 0) for name in BUCKETS)
            yield (attempt["provider"], attempt["model"]), 1, int(cost is None), picos, tokens
