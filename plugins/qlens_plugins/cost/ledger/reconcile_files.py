"""Reads what a provider charged from the files of its cost export: row by row, exactly, whatever else is in them."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from decimal import Decimal, DecimalException
from pathlib import Path
from typing import Any

from attrs import define, field

from qlens import StartupError
from qlens_plugins.cost.ledger.past import Days
from qlens_plugins.cost.ledger.reconcile_formats import EXACT, FORMATS, Line, Row, plain
from qlens_plugins.cost.ledger.reconcile_names import Meter

MOST_JSON = 256 * 1024 * 1024
"""Characters: a JSON document is read whole. Its costs are by day, so that those of years are small."""

_PARQUET, _GZIP, _ZIP = b"PAR1", b"\x1f\x8b", b"PK\x03\x04"


@define
class Charge:
    """What is charged for one meter on one day."""

    usd: Decimal = Decimal(0)
    tokens: Decimal | None = Decimal(0)
    """None: the bill does not say how many."""

    def add(self, usd: Decimal, tokens: Decimal | None) -> None:
        """Put another line into this one; raises decimal.Inexact rather than to round."""
        self.usd = EXACT.add(self.usd, usd)
        self.tokens = None if self.tokens is None or tokens is None else EXACT.add(self.tokens, tokens)


@define
class Bill:
    """What a provider charged."""

    charges: dict[tuple[date, Meter], Charge] = field(factory=dict)
    last: date | None = None
    """The last day that is charged for."""
    other_rows: int = 0
    """Rows about other services or other days."""
    other_charges: dict[str, Decimal] = field(factory=dict)
    """Taxes, credits and what else is not for usage, in USD, by what the bill calls it."""
    goes_on: bool | None = None
    """Whether there are pages of OpenAI's behind all of these; None when no page says it."""

    def add(self, line: Line, usd: Decimal) -> None:
        """Add a line."""
        if line.kind is not None:
            self.other_charges[line.kind] = EXACT.add(self.other_charges.get(line.kind, Decimal(0)), usd)
            return
        self.charges.setdefault((line.day, line.meter), Charge()).add(usd, line.tokens)
        self.last = max(line.until, self.last or line.until)


def read(kind: str, files: Sequence[Path], days: Days, *, money: bool = True) -> Bill:
    """Read all files of an export; raises StartupError with file, line and reason when that cannot be done.

    Without `money` only quantities count, and the currency does not matter.
    """
    bill = Bill()
    for file in files:
        with _told(file), _opened(file) as text:
            for number, line in _lines(kind, text, bill):
                if line is None or not _is_asked(line, days):
                    bill.other_rows += 1
                    continue
                try:
                    _check_within(line, days)
                    bill.add(line, _usd(line) if money else Decimal(0))
                except ValueError as error:
                    raise _Faulty(number, str(error)) from error
                except DecimalException as error:
                    raise _Faulty(number, "the sum has too many digits to be exact") from error
    return bill


def _is_asked(line: Line, days: Days) -> bool:
    """Whether a line is about one of the days."""
    if line.kind is not None:
        return line.day in days
    return (days.last is None or line.day <= days.last) and (days.first is None or line.until >= days.first)


def _check_within(line: Line, days: Days) -> None:
    if line.kind is None and not (line.day in days and line.until in days):
        raise ValueError(
            f"this is one charge for {line.day} to {line.until}, and only a part of that is asked about; ask about "
            "all of it (--from, --to), or export the costs by days or hours"
        )


def _usd(line: Line) -> Decimal:
    if line.currency != "USD":
        raise ValueError(
            f"this bill is in {line.currency}, and the ledger in USD; export the costs in USD, or compare only tokens: "
            "--by tokens"
        )
    return line.amount


class _Faulty(Exception):
    """What is wrong with a line of the file."""

    def __init__(self, line: int, why: str) -> None:
        super().__init__(why)
        self.line = line


@contextmanager
def _told(file: Path) -> Iterator[None]:
    """Say in which file it was."""
    try:
        yield
    except _Faulty as error:
        raise StartupError(f"{file}:{error.line}: {error}") from error
    except OSError as error:
        # What is said of a damaged archive has no number of an error.
        raise StartupError(f"{file}: {error.strerror or error}") from error
    except (EOFError, zlib.error) as error:
        raise StartupError(f"{file}: the archive is damaged: {error}") from error
    except csv.Error as error:
        raise StartupError(f"{file}: this is no CSV: {error}") from error


@contextmanager
def _opened(file: Path) -> Iterator[io.TextIOWrapper]:
    with file.open("rb") as raw:
        start = raw.read(4)
        raw.seek(0)
        if start == _PARQUET:
            raise StartupError(f"{file}: this is Parquet; let the export write CSV, with gzip if you like")
        if start == _ZIP:
            raise StartupError(f"{file}: this is a ZIP archive; unpack it, and name the CSV files in it")
        binary = io.BufferedReader(gzip.GzipFile(fileobj=raw)) if start[:2] == _GZIP else raw
        # A byte in somebody's tag that is no UTF-8 must not keep the rest from being read.
        yield io.TextIOWrapper(binary, encoding="utf-8-sig", errors="replace", newline="")


# --- rows --------------------------------------------------------------------------------------


def _lines(kind: str, text: io.TextIOWrapper, bill: Bill) -> Iterator[tuple[int, Line | None]]:
    """Lines with their numbers in the file; None for a row about something else."""
    first = text.read(1)
    while first.isspace():
        first = text.read(1)
    if kind == "openai" and first and first in "{[":
        form, rows = FORMATS[kind][0].of(_PAGE), _pages(_documents(first, text), bill)
    else:
        reader = csv.reader(_again(first, text))
        columns = [plain(name) for name in next(reader, [])]
        form = next((fitting for form in FORMATS[kind] if (fitting := form.of(columns))), None)
        rows = _rows(reader, columns, form.used) if form else iter(())
    if form is None:
        known = " or ".join(f"{form.name} ({', '.join(form.needs)})" for form in FORMATS[kind])
        raise _Faulty(1, f"these are no columns of an export for --{kind}; known: {known}")
    for number, row in rows:
        try:
            yield number, form.line(row)
        except ValueError as error:
            raise _Faulty(number, str(error)) from error


def _rows(reader: Any, columns: Sequence[str], used: Container[str]) -> Iterator[tuple[int, Row]]:
    """The rows of a table, of which few columns are used."""
    places = [(place, name) for place, name in enumerate(columns) if name in used]
    for cells in reader:
        if cells:
            count = len(cells)
            yield reader.line_num, {name: cells[place] for place, name in places if place < count}


def _again(first: str, text: io.TextIOWrapper) -> Iterator[str]:
    yield first + text.readline()
    yield from text


def _documents(first: str, text: io.TextIOWrapper) -> Iterator[tuple[int, Any]]:
    """The JSON documents in a file: one, or one after another. Numbers are decimals."""
    whole = first + text.read(MOST_JSON)
    if text.read(1):
        raise _Faulty(1, f"this is more than {MOST_JSON // 2**20} MiB of JSON; export fewer days at once")
    decoder, place = json.JSONDecoder(parse_float=Decimal), 0
    while place < len(whole):
        number = whole.count("\n", 0, place) + 1
        try:
            document, place = decoder.raw_decode(whole, place)
        except (ValueError, RecursionError) as error:
            raise _Faulty(number, f"this is no JSON: {error}") from error
        yield number, document
        while place < len(whole) and whole[place].isspace():
            place += 1


def _pages(documents: Iterable[tuple[int, Any]], bill: Bill) -> Iterator[tuple[int, Row]]:
    """The results in pages of OpenAI's `/v1/organization/costs`, as rows of a table."""
    for number, document in documents:
        try:
            for page in document if isinstance(document, list) else [document]:
                if "has_more" in page:  # whichever order they are in, a walk that is over has a last page
                    bill.goes_on = bool(page["has_more"]) and bill.goes_on is not False
                for bucket in page.get("data", [page]):
                    for result in bucket["results"]:
                        yield number, _result(bucket, result)
        except (AttributeError, KeyError, TypeError) as error:
            raise _Faulty(
                number, "this is no page of /v1/organization/costs: `data`, with `start_time` and `results`"
            ) from error


_PAGE = ("starttime", "amountvalue", "amountcurrency", "lineitem", "projectid", "quantity", "quantityunit")


def _result(bucket: dict[str, Any], result: dict[str, Any]) -> Row:
    amount = result["amount"] or {}
    usd, quantity, item = amount.get("value"), result.get("quantity"), result.get("line_item") or ""
    nothing = 0 if item else ""
    values = (
        *(bucket["start_time"], nothing if usd is None else usd, amount.get("currency") or "usd"),
        *(item, result.get("project_id") or "", "" if quantity is None else quantity),
        result.get("quantity_unit") or "",
    )
    return dict(zip(_PAGE, map(str, values), strict=True))
