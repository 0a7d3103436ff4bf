"""Exact money: whole picodollars inside, plain decimal text outside, never a float."""

from __future__ import annotations

from decimal import Decimal

PLACES = 12
"""Decimal places of a picodollar: 1 USD is 10**12 of them."""
_DOLLAR: int = 10**PLACES
_WRITTEN = f"%d.%0{PLACES}d"


def usd(picos: int) -> str:
    """Write picodollars as dollars in plain decimals, without exponent and without trailing zeros."""
    if picos < 0:
        return f"-{usd(-picos)}"
    return (_WRITTEN % divmod(picos, _DOLLAR)).rstrip("0").rstrip(".")


def picos(usd: Decimal) -> int:
    """Turn dollars into picodollars; raises ValueError for what is no amount or is finer than one of them."""
    if not usd.is_finite():
        raise ValueError(f"{usd} is no amount of money")
    # Read from the digits: Decimal's own arithmetic rounds to the context's precision without a word.
    sign, digits, exponent = usd.as_tuple()
    number, shift = int("".join(map(str, digits))), int(exponent) + PLACES
    if not number:
        return 0
    if usd.adjusted() > PLACES:
        raise ValueError(f"{usd} USD is more than an amount of money can be")
    # The powers of ten are bounded by what was just refused, and by the number of digits.
    tiny = usd.adjusted() < -PLACES
    whole, rest = (0, 1) if tiny else divmod(number * 10 ** max(shift, 0), 10 ** max(-shift, 0))
    if rest:
        raise ValueError(f"{usd} USD is finer than a picodollar (12 decimals)")
    return -int(whole) if sign else int(whole)
