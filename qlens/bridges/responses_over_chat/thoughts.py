"""A provider's signed thoughts as the encrypted content of a reasoning item, which clients keep and send back."""

from __future__ import annotations

from base64 import urlsafe_b64decode, urlsafe_b64encode
from typing import Any

import orjson

_PREFIX = "qlens-thoughts-1."
"""Tells what was closed here from what a provider of Responses has encrypted."""


def closed(blocks: list[Any]) -> str:
    """Signed thoughts as one text that says nothing to a client."""
    return _PREFIX + urlsafe_b64encode(orjson.dumps(blocks)).decode()


def opened(content: object) -> list[Any]:
    """The thoughts in such a text; none when somebody else has made it."""
    if type(content) is not str or not content.startswith(_PREFIX):
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
