"""Exact money."""

from __future__ import annotations

from decimal import Decimal, localcontext

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlens import picos, usd


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        (0, "0"),
        (1, "0.000000000001"),
        (180_000_000, "0.00018"),
        (8_550_000, "0.00000855"),
        (10**12, "1"),
        (100 * 10**12, "100"),
        (1_500_000_000_000, "1.5"),
        (-180_000_000, "-0.00018"),
        (10**24 + 1, "1000000000000.000000000001"),
    ],
)
def test_an_amount_is_plain_decimal_text(amount: int, text: str) -> None:
    assert usd(amount) == text
    assert picos(Decimal(text)) == amount


@given(st.integers(min_value=-(10**24), max_value=10**24))
def test_an_amount_survives_the_way_through_text(amount: int) -> None:
    text = usd(amount)
    assert picos(Decimal(text)) == amount
    assert "e" not in text.lower()
    assert not ("." in text and text.endswith("0"))


@pytest.mark.parametrize("text", ["0", "0.0", "-0", "0E+5000", "0E-5000"])
def test_every_zero_is_zero(text: str) -> None:
    assert picos(Decimal(text)) == 0


def test_an_exponent_is_an_amount_too() -> None:
    assert picos(Decimal("1.8E-4")) == 180_000_000


def test_trailing_zeros_beyond_a_picodollar_are_no_fault() -> None:
    assert picos(Decimal("0.00018000000000000000")) == 180_000_000


@pytest.mark.parametrize("text", ["0.0000000000005", "1.0000000000005", "1E-13", "1E-999999999"])
def test_what_is_finer_than_a_picodollar_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="finer than a picodollar"):
        picos(Decimal(text))


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "sNaN"])
def test_what_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no amount of money"):
        picos(Decimal(text))


@pytest.mark.parametrize("text", ["1E+999999", "99999999999999999999"])
def test_an_absurd_amount_is_refused_without_computing_it(text: str) -> None:
    with pytest.raises(ValueError, match="more than an amount of money can be"):
        picos(Decimal(text))


def test_the_decimal_context_does_not_round_an_amount() -> None:
    with localcontext() as context:
        context.prec = 3
        assert picos(Decimal("12345.678901234567")) == 12_345_678_901_234_567


def test_a_million_small_amounts_add_up_exactly() -> None:
    assert usd(sum([picos(Decimal("0.00018"))] * 1_000_000)) == "180"
