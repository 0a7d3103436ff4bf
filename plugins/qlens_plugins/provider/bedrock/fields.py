"""Fields of a call that the gateway itself does not look at: what is of a wrong type is the client's mistake."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlens import InvalidRequest


def text(given: Mapping[str, Any], name: str, place: str = "") -> str | None:
    """A field that is a text; None where it is left out or null. Raises InvalidRequest for anything else.

    `place` is where in the call the mapping stands; empty: it is the call's body.
    """
    value = given.get(name)
    if value is None or isinstance(value, str):
        return value
    param = f"{place}.{name}" if place else name
    raise InvalidRequest(f"Invalid type for '{param}': expected a string.", param=param, code="invalid_type")
