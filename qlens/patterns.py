"""Names and patterns as YAML and keys have them: `gpt-4o`, or `gpt-*` for all that begin so."""

from __future__ import annotations

from collections.abc import Iterable


def fits(name: str | None, patterns: Iterable[str] | None) -> bool:
    """Whether a name is one of these, or begins as one that ends in `*`; without patterns all do, without a name none.

    A pattern fits as well when all that it stands for does.
    """
    if patterns is None:
        return True
    return name is not None and any(
        name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern for pattern in patterns
    )
