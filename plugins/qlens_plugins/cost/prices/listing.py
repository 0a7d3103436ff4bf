"""The command `qlens prices`: the table, and which row prices each configured target."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from attrs import asdict

from qlens import Model, Target
from qlens_plugins.cost.columns import aligned
from qlens_plugins.cost.prices.book import Book
from qlens_plugins.cost.prices.rows import BUCKETS, PriceRow

HELP = "Show the price table, and the row or UNPRICED for each configured target."
UNPRICED = "UNPRICED"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("--json", action="store_true", help="print JSON; prices as decimal text")


def show(book: Book, models: Mapping[str, Model], *, as_json: bool) -> None:
    """Print the table and the targets."""
    targets = [_target(book, target) for model in models.values() for target in model.candidates]
    if as_json:
        sys.stdout.write(json.dumps({"rows": [_row(row) for row in book.rows], "targets": targets}, indent=2) + "\n")
        return
    sys.stdout.write("USD per million tokens\n")
    heads = ("PROVIDER", "MODEL", *(bucket.upper() for bucket in BUCKETS), "OTHER", "DATE")
    sys.stdout.write(aligned([heads, *(_cells(row) for row in book.rows)]))
    sys.stdout.write("\nConfigured targets\n")
    lines = [(found["model"], _shown(found), _named(found["rows"])) for found in targets]
    sys.stdout.write(aligned([("MODEL", "TARGET", "ROW"), *lines]))


def _target(book: Book, target: Target) -> dict[str, Any]:
    """Which rows price a target; behind a wildcard that depends on the name a client asks for."""
    name = target.base_model or target.model
    sheet = book.find(target.provider, name)
    rows = None if sheet is None else [entry.standard.id for entry in sheet.entries]
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
    above = f" (prompt > {row.above_prompt_tokens})" if row.above_prompt_tokens else ""
    return (
        *(row.provider, row.model + above),
        *("-" if price is None else f"{price:f}" for price in prices),
        *(", ".join(other), row.date or ""),
    )
