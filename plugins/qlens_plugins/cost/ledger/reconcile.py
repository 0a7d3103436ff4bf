"""The command `qlens reconcile`: the ledger beside a provider's cost export."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal, DecimalException
from pathlib import Path

from attrs import frozen

from qlens import Command, Gateway, StartupError, read_yaml
from qlens_plugins.cost.ledger import past, reconcile_files
from qlens_plugins.cost.ledger.reconcile_compare import compare, spent
from qlens_plugins.cost.ledger.reconcile_names import Map, Matcher
from qlens_plugins.cost.ledger.reconcile_places import Deployment, Places, account
from qlens_plugins.cost.ledger.reconcile_report import Report
from qlens_plugins.cost.ledger.store import Store

HELP = "Compare the ledger with the cost export of Azure, AWS or OpenAI; exit code 1 when they drift apart."
EXAMPLES = """\
examples:
  qlens reconcile --azure november.csv
  qlens reconcile --aws cur-00001.csv.gz cur-00002.csv.gz --from 2026-11-01 --to 2026-11-27
  qlens reconcile --openai costs.json --map meters.yaml --threshold 0.1 --json
"""
KINDS = {"azure": "azure_openai", "aws": "bedrock", "openai": "openai"}
"""By the kind of bill, the kind of provider it is from."""


def command(store: Callable[[], Store]) -> Command:
    """The command for a ledger."""

    async def run(gateway: Gateway, args: argparse.Namespace) -> int:
        kind = next(kind for kind in KINDS if getattr(args, kind))
        targets = [target for model in gateway.models.values() for target in model.candidates]
        providers = args.provider or sorted({each.provider for each in targets if each.kind == KINDS[kind]})
        if not providers:
            raise StartupError(
                f"no provider of the kind {KINDS[kind]} in this configuration; name some: --provider NAME"
            )
        models = {
            (target.provider, target.model): target.base_model or target.model
            for target in targets
            if target.provider in providers and not target.model.endswith("*")
        }
        asked = Asked(kind, providers, models, _accounts(gateway, providers) if kind == "azure" else {})
        return await asyncio.to_thread(_reconcile, asked, args, store())

    return Command("reconcile", HELP, _add_arguments, run)


@frozen
class Asked:
    """What the bill is compared with."""

    kind: str
    """Of the bill."""
    providers: Sequence[str]
    models: Mapping[Deployment, str]
    """What each deployment is in truth."""
    accounts: Mapping[str, str]
    """Of Azure, by provider."""


def _accounts(gateway: Gateway, providers: Sequence[str]) -> dict[str, str]:
    entries = gateway.config.providers
    found = {name: account(entries[name].settings.get("endpoint")) for name in providers if name in entries}
    return {name: said for name, said in found.items() if said is not None}


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    bills = parser.add_mutually_exclusive_group(required=True)
    for kind, what in (
        ("azure", "Cost Management: actual cost, or FOCUS"),
        ("aws", "Data Exports: CUR 2.0, the older CUR, or FOCUS"),
        ("openai", "costs: pages of /v1/organization/costs as JSON, or CSV"),
    ):
        bills.add_argument(f"--{kind}", nargs="+", type=Path, metavar="FILE", help=f"{what}; CSV may be in gzip")
    past.add_arguments(parser)
    parser.add_argument(
        "--provider", action="append", metavar="NAME", help="a provider the bill is for; repeatable; default: by kind"
    )
    parser.add_argument("--map", type=Path, metavar="FILE", help="YAML file that says which meters are which model's")
    parser.add_argument("--by", choices=("cost", "tokens"), default="cost", help="what is compared (default: cost)")
    parser.add_argument(
        "--threshold", type=_percent, default=Decimal("0.5"), metavar="PERCENT",
        help="how much of the bill all of it, and each model, may drift (default: 0.5)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON; money as decimal text")


def _percent(text: str) -> Decimal:
    try:
        found = Decimal(text.removesuffix("%"))
    except DecimalException:
        found = Decimal(-1)
    if not found.is_finite() or found < 0 or len(text) > 20:
        raise argparse.ArgumentTypeError(f"{text!r} is no percentage; write 0.5, say")
    return found


def _reconcile(about: Asked, args: argparse.Namespace, store: Store) -> int:
    kind, providers = about.kind, about.providers
    rules = read_yaml(args.map, Map).meters if args.map is not None else ()
    for rule in rules:
        if rule.provider not in (None, *providers):
            raise StartupError(
                f"{args.map}: of the meter {rule.meter!r} it says the provider {rule.provider!r}, which is none of "
                f"those that the bill is compared with: {', '.join(providers)}"
            )
    by_tokens, asked = args.by == "tokens", past.Days.of(args)
    bill = reconcile_files.read(kind, getattr(args, kind), asked, money=not by_tokens)
    if not bill.charges:
        raise StartupError(
            f"nothing in the files is a charge of {KINDS[kind]} for usage in these days ({bill.other_rows} other rows)"
        )
    if bill.goes_on:
        sys.stderr.write(
            "qlens: the costs go on: `has_more` is true on each of these pages. Name the rest too (`page`: the "
            "`next_page` of the page before), or ask OpenAI for more days at once (`limit`: up to 180)\n"
        )
    # Days that the bill does not have are no drift: it may not be complete yet.
    days = past.Days(asked.first or min(day for day, _ in bill.charges), asked.last or bill.last)
    places = Places(about.accounts, rules)
    found = compare(bill, spent(store, days, providers), about.models, Matcher(kind, rules), places)
    report = Report(found, bill, days, providers, args.threshold, by_tokens)
    sys.stdout.write(report.as_json() if args.json else report.as_text())
    return int(report.drifts)
