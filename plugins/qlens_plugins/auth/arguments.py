"""What the commands of this stage share: how options are read, and rows shown."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta

from qlens_plugins.auth.credentials import instant


def tag(text: str) -> tuple[str, str]:
    """Read NAME=VALUE."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def expiry(text: str) -> timedelta | datetime:
    """Read a time that comes: 90d, 12h, a date, or a time with its zone."""
    if match := re.fullmatch(r"(\d{1,5})([dh])", text):
        count = int(match[1])
        return timedelta(days=count) if match[2] == "d" else timedelta(hours=count)
    try:
        return instant(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}, or like 90d or 12h") from None


def table(names: Sequence[str], rows: Sequence[Mapping[str, object]]) -> str:
    """Rows as lines of text below their names, each column as wide as its widest cell."""
    lines = [[name.upper() for name in names], *([_cell(row.get(name)) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "".join("  ".join(line).rstrip() + "\n" for line in padded)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
