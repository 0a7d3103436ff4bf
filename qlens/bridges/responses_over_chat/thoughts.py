"""A provider's signed thoughts as the encrypted content of a reasoning item, which clients keep and send back."""

from __future__ import annotations

from base64 import urlsafe_b64decode, urlsafe_b64encode
from typing import Any

import orjson

from qlens.dialects import Body, responses

_PREFIX = "qlens-thoughts-1."
"""Tells what was closed here from what a provider of Responses has encrypted."""


def closed(blocks: list[Any]) -> str:
    """Signed thoughts as one text that says nothing to a client."""
    return _PREFIX + urlsafe_b64encode(orjson.dumps(blocks)).decode()


def is_closed(content: str) -> bool:
    """Whether a text is what `closed` makes."""
    return content.startswith(_PREFIX)


def without_closed(body: Body) -> Body:
    """A request for a provider that speaks Responses itself, and could not read such a text."""
    items = body.get("input")
    found = [item for item in items if _is_closed(item)] if type(items) is list else []
    return {**body, "input": responses.without_reasoning(body["input"], found)} if found else body


def _is_closed(item: Body) -> bool:
    content = item.get("encrypted_content")
    return type(content) is str and is_closed(content)


def opened(content: object) -> list[Any]:
    """The thoughts in such a text; none when somebody else has made it."""
    if type(content) is not str or not is_closed(content):
        return []
    try:
        blocks = orjson.loads(urlsafe_b64decode(content.removeprefix(_PREFIX)))
    except ValueError:
        return []
    return [block for block in blocks if _is_signed(block)] if type(blocks) is list else []


def _is_signed(block: Any) -> bool:
    """Whether the provider itself can tell that the thought is its own: a client might have made this one up."""
    if type(block) is not dict:
        return False
    proof = {"thinking": "signature", "redacted_thinking": "data"}.get(str(block.get("type")))
    return proof is not None and bool(block.get(proof)) and type(block[proof]) is str
