"""Names and patterns."""

from __future__ import annotations

import pytest

from qlens import fits


@pytest.mark.parametrize(
    ("name", "patterns", "fitting"),
    [
        ("gpt-4o", ("gpt-4o",), True),
        ("gpt-4o-mini", ("gpt-4o",), False),
        ("gpt-4o-mini", ("o3", "gpt-*"), True),
        ("GPT-4o", ("gpt-*",), False),
        ("gpt-4*", ("gpt-*",), True),
        ("gpt-*", ("gpt-4*",), False),
        ("anything", ("*",), True),
        ("anything", (), False),
        ("anything", None, True),
        (None, ("*",), False),
        (None, None, True),
    ],
)
def test_fits(name: str | None, patterns: tuple[str, ...] | None, fitting: bool) -> None:
    assert fits(name, patterns) is fitting
