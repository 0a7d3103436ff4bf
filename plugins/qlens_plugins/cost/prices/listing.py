"""The command `qlens prices`: the table, which row prices each configured target, and how a new catalogue is made."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from attrs import asdict

from qlens import Model, StartupError, Target
from qlens_plugins.cost.columns import aligned
from qlens_plugins.cost.prices.book import Book
from qlens_plugins.cost.prices.rows import BUCKETS, PriceRow

HELP = "Show the price table, and the row or UNPRICED for each configured target; or make a new catalogue."
_EXAMPLES = """\
examples:
  qlens prices
  qlens prices -c config/production.yaml --json
  qlens prices update --out catalogue.json
"""
UNPRICED = "UNPRICED"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EXAMPLES
    parser.add_argument(
        "action",
        nargs="?",
        choices=("show", "update"),
        default="show",
        help="show (the default), or update: make a catalogue of the packages genai-prices and litellm",
    )
    parser.add_argument("--json", action="store_true", help="show: print JSON; prices as decimal text")
    parser.add_argument("--out", metavar="FILE", type=Path, help="update: where to write it; default: standard output")
    parser.add_argument(
        "--packages", metavar="DIR", type=Path, help="update: where the packages are; default: they are installed"
    )


def update(args: argparse.Namespace, now: float) -> int:
    """Write a new catalogue, and tell where its sources differ and what they say that is no exact price."""
    from qlens_plugins.cost.prices.update import RULE, build  # only this command needs what it imports

    built = build(f"{datetime.fromtimestamp(now, UTC):%Y-%m-%d}", args.packages)
    if args.out is None:
        sys.stdout.write(built.text)
    else:
        try:
            args.out.write_text(built.text, encoding="utf-8")
        except OSError as error:
            raise StartupError(f"{args.out}: {error.strerror}") from error
    for what, lines in (("the sources differ", built.conflicts), ("no exact price", built.refused)):
        for line in lines:
            sys.stderr.write(f"{what}: {line}\n")
    sys.stderr.write(
        f"{built.models} names, {len(built.conflicts)} differences, {len(built.refused)} left out. {RULE}\n"
    )
    return 0


def show(book: Book, models: Mapping[str, Model], wall_ns: int, *, as_json: bool) -> None:
    """Print the table and the targets, with the prices of a moment."""
    targets = [_target(book, target, wall_ns) for model in models.values() for target in model.candidates]
    listed = None if book.catalogue is None else book.catalogue()
    if as_json:
        about = None if listed is None else {"date": listed.date, "models": listed.models, "sources": listed.sources}
        found = {"rows": [_row(row) for row in book.rows], "catalogue": about, "targets": targets}
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
        return
    sys.stdout.write("USD per million tokens\n")
    heads = ("PROVIDER", "MODEL", *(bucket.upper() for bucket in BUCKETS), "OTHER", "DATE")
    sys.stdout.write(aligned([heads, *(_cells(row) for row in book.rows)]))
    if listed is not None:
        named = " and ".join(listed.sources)
        sys.stdout.write(f"\nCatalogue of {listed.date}: {listed.models} names, from {named}\n")
    sys.stdout.write("\nConfigured targets\n")
    lines = [(found["model"], _shown(found), _named(found["rows"])) for found in targets]
    sys.stdout.write(aligned([("MODEL", "TARGET", "ROW"), *lines]))


def _target(book: Book, target: Target, wall_ns: int) -> dict[str, Any]:
    """Which rows price a target; behind a wildcard that depends on the name a client asks for."""
    name = target.base_model or target.model
    rows = [entry.standard.id for entry in book.find(target, wall_ns).entries] or None
    if rows is None and name.endswith("*"):
        rows = ["by the name asked for"]
    return {
        "model": target.public,
        "provider": target.provider,
        "target": target.model,
        "base_model": target.base_model,
        "rows": rows,
    }


def _shown(found: Mapping[str, Any]) -> str:
    base = f" ({found['base_model']})" if found["base_model"] else ""
    return f"{found['provider']}/{found['target']}{base}"


def _named(rows: Iterable[str] | None) -> str:
    return UNPRICED if rows is None else ", ".join(rows)


def _row(row: PriceRow) -> dict[str, Any]:
    found = {name: value for name, value in asdict(row).items() if value is not None}
    return {name: _texts(value) if isinstance(value, dict) else _text(value) for name, value in found.items()}


def _texts(values: Mapping[str, object]) -> dict[str, str]:
    return {name: str(_text(value)) for name, value in values.items()}


def _text(value: object) -> object:
    """A decimal as plain text, never as a float."""
    return value if isinstance(value, int | str) else f"{value:f}"


def _cells(row: PriceRow) -> tuple[str, ...]:
    prices = (getattr(row, bucket) for bucket in BUCKETS)
    other = [f"{meter} {price:f} each" for meter, price in row.meters.items()]
    other += [f"{tier} x{factor:f}" for tier, factor in row.tiers.items()]
    only = f" (prompt > {row.above_prompt_tokens})" if row.above_prompt_tokens else ""
    only += f" (tier {row.tier})" if row.tier else ""
    only += f" (region {row.region})" if row.region else ""
    only += f" (from {row.valid_from})" if row.valid_from else ""
    return (
        *(row.provider, row.model + only),
        *("-" if price is None else f"{price:f}" for price in prices),
        *(", ".join(other), row.date or ""),
    )
