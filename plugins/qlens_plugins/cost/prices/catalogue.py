"""The catalogue: what the big providers' models cost, as data that comes with the plugin."""

from __future__ import annotations

import json
from collections.abc import Iterable
from decimal import Decimal
from pathlib import Path
from typing import Any

from attrs import define, field

from qlens import StartupError
from qlens_plugins.cost.prices.rows import BUCKETS, PriceRow, no_duplicates

SHIPPED = Path(__file__).with_name("catalogue.json")
KINDS = frozenset({"anthropic", "azure_openai", "bedrock", "openai"})
"""The kinds of provider whose models are in it."""


@define(eq=False)
class Catalogue:
    """A price list by kind of provider and model. It is kept as text: few of its models are ever asked for."""

    date: str
    sources: tuple[str, ...]
    _lines: dict[tuple[str, str, str], str] = field(repr=False)
    """An entry's JSON by kind, region and model name."""
    _prefixes: list[tuple[str, str, str, str]] = field(repr=False)
    """(prefix, kind, region, JSON), the longest prefix first."""

    @property
    def models(self) -> int:
        """How many names it prices."""
        return len(self._lines) + len(self._prefixes)

    @classmethod
    def read(cls, file: Path | None = None) -> Catalogue:
        """The catalogue in a file, or the one that is shipped; raises StartupError when it is none."""
        where = SHIPPED if file is None else file
        try:
            found = cls._of(where.read_text(encoding="utf-8"))
            if file is not None:
                no_duplicates(found.all())  # the shipped one was checked before it was shipped
            return found
        except (OSError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError) as error:
            reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
            raise StartupError(
                f"{where}: no price catalogue: {reason}; `qlens prices update --out FILE` makes one"
            ) from error

    @classmethod
    def _of(cls, text: str) -> Catalogue:
        document = json.loads(text)
        lines: dict[tuple[str, str, str], str] = {}
        prefixes = []
        for entry in document["entries"]:
            kind, region = entry["provider"], entry.get("region", "")
            said = json.dumps(entry["rows"], separators=(",", ":"))
            for model in entry["models"]:
                if model.endswith("*"):
                    prefixes.append((model[:-1], kind, region, said))
                else:
                    lines[kind, region, model] = said
        sources = tuple(f"{source['package']} {source['version']}" for source in document["sources"])
        return cls(document["date"], sources, lines, sorted(prefixes, key=lambda found: -len(found[0])))

    def find(self, kind: str, model: str, region: str | None = None) -> tuple[PriceRow, ...]:
        """The rows for a model, those of a region first of all; none when it is not known."""
        name = _bedrock_name(model) if kind == "bedrock" else model
        for zone in dict.fromkeys((region or "", "")):
            line = self._lines.get((kind, zone, name))
            pattern = name
            if line is None:
                fitting = (
                    (f"{prefix}*", said)
                    for prefix, of, within, said in self._prefixes
                    if of == kind and within == zone and name.startswith(prefix)
                )
                pattern, line = next(fitting, (name, None))
            if line is not None:
                return tuple(self._rows(kind, pattern, zone or None, line))
        return ()

    def _rows(self, kind: str, model: str, region: str | None, line: str) -> Iterable[PriceRow]:
        for said in json.loads(line):
            yield PriceRow(
                model=model,
                provider=kind,
                region=region,
                date=self.date,
                **{name: _read(name, value) for name, value in said.items()},
            )

    def all(self) -> Iterable[PriceRow]:
        """Every row."""
        for (kind, region, model), line in self._lines.items():
            yield from self._rows(kind, model, region or None, line)
        for prefix, kind, region, line in self._prefixes:
            yield from self._rows(kind, f"{prefix}*", region or None, line)


def _read(name: str, value: Any) -> Any:
    """A value of a row: prices are texts, so that none is ever a float."""
    if name == "meters":
        return {meter: _price(price) for meter, price in value.items()}
    return _price(value) if name in BUCKETS else value


def _price(text: object) -> Decimal:
    if not isinstance(text, str):
        raise TypeError(f"{text} is no text: a price is a decimal in quotes")
    return Decimal(text)


def _bedrock_name(model: str) -> str:
    """A model id or profile id; an ARN has it as its last part."""
    return model.rpartition("/")[2] if model.startswith("arn:") else model
