"""A provider's signed thoughts as the encrypted content of a reasoning item, which clients keep and send back."""

from __future__ import annotations

from qlens.dialects import Body, responses
from qlens.dialects.signed import closed, is_closed, opened

__all__ = ["closed", "is_closed", "opened", "without_closed"]


def without_closed(body: Body) -> Body:
    """A request for a provider that speaks Responses itself, and could not read such a text."""
    items = body.get("input")
    found = [item for item in items if _is_closed(item)] if type(items) is list else []
    return {**body, "input": responses.without_reasoning(body["input"], found)} if found else body


def _is_closed(item: Body) -> bool:
    content = item.get("encrypted_content")
    return type(content) is str and is_closed(content)
