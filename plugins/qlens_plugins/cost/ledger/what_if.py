"""The command `qlens what-if`: what past calls would have cost under another configuration, call by call."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Callable, Iterable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import orjson
from attrs import define, evolve, field, frozen

from qlens import Alternative, Call, Caller, Command, Gateway, Target, Usage, usd
from qlens_plugins.cost.columns import aligned
from qlens_plugins.cost.ledger import past
from qlens_plugins.cost.ledger.rows import BUCKETS
from qlens_plugins.cost.ledger.store import Store

HELP = "Show what past calls would have cost under the routes and prices of another configuration."
EXAMPLES = """\
examples:
  qlens what-if --config next-year.yaml --from 2026-11-01 --to 2026-11-30
  qlens what-if --config cheaper-models.yaml --from 2026-11-01 --json
"""

_COLUMNS = (
    *("tenant", "operation", "model", "upstream_model", *BUCKETS, "meters", "usage_source", "tier"),
    *("cost_picos", f"CASE WHEN {past.PAID} THEN 1 ELSE 0 END", f"CASE WHEN {past.SENT_AGAIN} THEN attempts END"),
)
_FIRST_BUCKET = 4
_AFTER_BUCKETS = _FIRST_BUCKET + len(BUCKETS)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    parser.add_argument(
        "--config", required=True, type=Path, metavar="OTHER.yaml", help="the configuration whose routes and prices"
    )
    past.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print JSON; money as decimal text")


def command(store: Callable[[], Store]) -> Command:
    """The command for a ledger."""

    async def run(gateway: Gateway, args: argparse.Namespace) -> int:
        days, other = past.Days.of(args), gateway.alternative(args.config)
        groups = await asyncio.to_thread(reprice, store(), days, other)
        sys.stdout.write(_as_json(groups) if args.json else _as_text(groups))
        return 0

    return Command("what-if", HELP, _add_arguments, run)


# --- pricing -----------------------------------------------------------------------------------


@define
class Sums:
    """What a group of calls cost, and would have cost."""

    calls: int = 0
    then_picos: int = 0
    """What the priced ones cost."""
    now_picos: int = 0
    """What those would cost that have a price now."""
    compared: int = 0
    difference_picos: int = 0
    """Now less then, of the calls that have a price both times."""
    unpriced_then: int = 0
    unpriced_now: int = 0
    estimated_now: int = 0
    unrouted: int = 0
    """Calls for a model that the other configuration does not have; they are unpriced as well."""

    def count(self, then: int | None, now: int | None) -> None:
        """Add a call's cost, then and now; None is unpriced."""
        self.calls += 1
        if then is None:
            self.unpriced_then += 1
        else:
            self.then_picos += then
        if now is None:
            self.unpriced_now += 1
        else:
            self.now_picos += now
            if then is not None:
                self.compared += 1
                self.difference_picos += now - then

    def add(self, other: Sums) -> None:
        """Put another group into this one."""
        self.calls += other.calls
        self.then_picos += other.then_picos
        self.now_picos += other.now_picos
        self.compared += other.compared
        self.difference_picos += other.difference_picos
        self.unpriced_then += other.unpriced_then
        self.unpriced_now += other.unpriced_now
        self.estimated_now += other.estimated_now
        self.unrouted += other.unrouted


Group = tuple[str, str]
"""Model and tenant; an empty text is none."""


def reprice(store: Store, days: past.Days, other: Alternative) -> dict[Group, Sums]:
    """Price every call of some days anew, each by itself: a price may hang on the size of its own prompt."""
    past.check_kept(store, days)
    router = Router(other)
    groups: dict[Group, Sums] = {}
    for wall_ns, call_id, *row in past.calls(store, _COLUMNS, days):
        tenant, operation, model, upstream_model = row[:_FIRST_BUCKET]
        then, paid, attempts = row[_AFTER_BUCKETS + 3 :]
        sums = groups.setdefault((model or "", tenant), Sums())
        if not paid:
            sums.count(0, 0)
            continue
        route = router.route(operation, tenant, model, upstream_model)
        if route is None:
            sums.unrouted += 1
            sums.count(then, None)
            continue
        usages = [_usage(row)] if attempts is None else _billed(attempts, row)
        now, estimated = route.cost(call_id, wall_ns, usages)
        sums.count(then, now)
        sums.estimated_now += estimated
    return groups


def _usage(row: list[Any]) -> Usage:
    meters, source, tier = row[_AFTER_BUCKETS : _AFTER_BUCKETS + 3]
    counts: tuple[int, int, int, int, int, int, int, int] = tuple(row[_FIRST_BUCKET:_AFTER_BUCKETS])
    return Usage(*counts, {} if meters == "{}" else orjson.loads(meters), source, tier)


def _billed(attempts: str, row: list[Any]) -> list[Usage]:
    """What each attempt used that was paid: together they may be above a threshold that none is."""
    usages = [_attempted(attempt["usage"], row) for attempt in orjson.loads(attempts) if attempt["billed"]]
    return [_usage(row)] if len(usages) < 2 else usages  # the receipt has the only one, with its tier


def _attempted(used: dict[str, Any] | None, row: list[Any]) -> Usage:
    told = dict(used or {})
    source = told.pop("source", "none")
    counts = {name: told.pop(name, 0) for name in BUCKETS}
    return Usage(**counts, meters=told, source=source, tier=row[_AFTER_BUCKETS + 2])


@frozen
class Route:
    """Where the calls of one kind would go."""

    other: Alternative
    call: Call
    targets: tuple[Target, ...]
    weights: int
    """The sum of the targets' weights."""

    def cost(self, call_id: str, wall_ns: int, usages: Iterable[Usage]) -> tuple[int | None, bool]:
        """What the attempts would cost, None when one has no price; and whether that is an estimate."""
        self.call.wall_ns = wall_ns
        target = self.targets[0] if len(self.targets) == 1 else self._drawn(call_id)
        total, estimated = 0, False
        for usage in usages:
            cost = self.other.cost(self.call, target, usage)
            if cost.picos is None:
                return None, False
            total += cost.picos
            estimated = estimated or cost.state == "estimated"
        return total, estimated

    def _drawn(self, call_id: str) -> Target:
        """By weight, and for one call always the same: the answer is the same when it is asked again."""
        place = int.from_bytes(blake2b(call_id.encode(), digest_size=8).digest()) * self.weights >> 64
        for target in self.targets:
            place -= target.weight
            if place < 0:
                return target
        return self.targets[-1]


@define
class Router:
    """Finds the targets that calls would go to under another configuration."""

    other: Alternative
    _by_weight: bool = field(init=False)
    _known: dict[tuple[str, ...], Route | None] = field(factory=dict, init=False)

    @_by_weight.default
    def _spreads(self) -> bool:
        return any(entry.plugin == "weighted" for entry in self.other.config.pipeline.get("route", ()))

    def route(self, operation: str, tenant: str, model: str | None, upstream_model: str | None) -> Route | None:
        """The first target of a model, or all that have a weight where calls are spread; None: no such model."""
        if model is None:
            return None
        named = model.endswith("*")
        # Behind a wildcard the name that was asked for is that of the upstream.
        asked = (operation, tenant, model, (upstream_model or "") if named else "")
        if asked not in self._known:
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            self._known[asked] = self._found(*asked)
        return self._known[asked]

    def _found(self, operation: str, tenant: str, name: str, matched: str) -> Route | None:
        model = self.other.models.named(name) or self.other.models.resolve(name)
        if model is None:
            return None
        targets = [_filled(target, matched) for target in model.candidates]
        weighed = tuple(target for target in targets if target.weight > 0) if self._by_weight else ()
        call = self.other.call(operation, Caller(tenant, "what-if", "what-if"), model)
        chosen = weighed or tuple(targets[:1])
        return Route(self.other, call, chosen, sum(target.weight for target in chosen))


REMEMBERED = 10_000
"""How many answers are kept at most: behind a wildcard, clients choose the model names."""


def _filled(target: Target, matched: str) -> Target:
    return evolve(target, model=target.model[:-1] + matched) if target.model.endswith("*") else target


# --- showing -----------------------------------------------------------------------------------


def _ordered(groups: dict[Group, Sums]) -> list[tuple[Group, Sums]]:
    """The dearest first."""
    return sorted(groups.items(), key=lambda item: (-item[1].then_picos, item[0]))


def _total(groups: dict[Group, Sums]) -> Sums:
    total = Sums()
    for sums in groups.values():
        total.add(sums)
    return total


def _values(sums: Sums) -> dict[str, int | str | None]:
    def known(amount: int, calls: int) -> str | None:
        return usd(amount) if calls else None

    return {
        "calls": sums.calls,
        "then_usd": known(sums.then_picos, sums.calls - sums.unpriced_then),
        "now_usd": known(sums.now_picos, sums.calls - sums.unpriced_now),
        "difference_usd": known(sums.difference_picos, sums.compared),
        "unpriced_then": sums.unpriced_then,
        "unpriced_now": sums.unpriced_now,
        "no_such_model": sums.unrouted,
        "estimated_now": sums.estimated_now,
    }


def _as_json(groups: dict[Group, Sums]) -> str:
    rows = [{"model": model or None, "tenant": tenant, **_values(sums)} for (model, tenant), sums in _ordered(groups)]
    return json.dumps({"rows": rows, "total": _values(_total(groups))}, indent=2) + "\n"


def _as_text(groups: dict[Group, Sums]) -> str:
    if not groups:
        return "no calls\n"
    heads = ["MODEL", "TENANT", *(name.upper() for name in _values(Sums()))]
    lines = [[model or "-", tenant, *_cells(sums)] for (model, tenant), sums in _ordered(groups)]
    return aligned([heads, *lines, ["total", "", *_cells(_total(groups))]])


def _cells(sums: Sums) -> list[str]:
    return ["-" if value is None else str(value) for value in _values(sums).values()]
