"""Prompt caching: the client's marks become those of messages, within their limits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Block = dict[str, Any]

MOST_MARKS = 4
"""How many blocks of a request may be marked."""

_HOUR = ("1h", "30m", "12h")


def mark(node: Mapping[str, Any]) -> Block | None:
    """The mark on a message, part or tool: `cache_control` as in messages, or OpenAI's `prompt_cache_breakpoint`."""
    found = node.get("cache_control") or node.get("prompt_cache_breakpoint")
    if not isinstance(found, dict):
        return None
    return {"type": "ephemeral", "ttl": "1h"} if found.get("ttl") in _HOUR else {"type": "ephemeral"}


def marked(block: Block, *nodes: Mapping[str, Any]) -> Block:
    """The block with the first mark on one of these nodes."""
    if (found := next(filter(None, map(mark, nodes)), None)) is not None:
        block["cache_control"] = found
    return block


def keep_within_limits(tools: list[Block], system: list[Block], turns: list[Block], *, spare: bool) -> None:
    """Take away the earliest marks of too many, and shorten those that stand behind a shorter one.

    One is spared for a mark on the request as a whole.
    """
    most = MOST_MARKS - spare
    places = [*_marks(tools), *_marks(system), *(block for turn in turns for block in _marks(turn["content"]))]
    for block in places[:-most]:
        del block["cache_control"]
    short = False
    for block in places[-most:]:
        if short:
            block["cache_control"].pop("ttl", None)
        short = short or "ttl" not in block["cache_control"]


def _marks(blocks: list[Block]) -> Iterator[Block]:
    for block in blocks:
        if block.get("type") == "tool_result" and isinstance(block["content"], list):
            yield from _marks(block["content"])
        if "cache_control" in block:
            yield block
