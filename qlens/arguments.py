"""How commands read their arguments."""

from __future__ import annotations

import argparse


def unicode_argument(text: str) -> str:
    """Read an argument that is looked for in a database, none of which has a text that is no Unicode; for argparse."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text!r} has bytes that are no UTF-8") from None
    return text
