"""Prompt caching: the client's marks become Bedrock's cache points."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlens_plugins.provider.bedrock import fields
from qlens_plugins.provider.bedrock.families import Family

Block = dict[str, Any]
Entry = tuple[Block, str | None]
"""A block of content, and for how long the prompt is to be cached up to its end; None: no cache point."""

MOST_POINTS = 4
"""How many cache points a request may have."""

_HOUR = {"1h", "30m", "12h"}


def mark(node: Mapping[str, Any], place: str) -> str | None:
    """The mark on a message, part or tool: Anthropic's `cache_control` or OpenAI's `prompt_cache_breakpoint`.

    `place` is where in the call the node stands; raises InvalidRequest for a mark whose `ttl` is no text.
    """
    name = "cache_control" if node.get("cache_control") else "prompt_cache_breakpoint"
    found = node.get(name)
    if not isinstance(found, dict):
        return None
    return "1h" if fields.text(found, "ttl", f"{place}.{name}") in _HOUR else "5m"


def point(ttl: str, family: Family) -> Block:
    """A cache point; one that lives an hour only where the model has such."""
    long = ttl == "1h" and family.caches_an_hour
    return {"cachePoint": {"type": "default", "ttl": "1h"} if long else {"type": "default"}}


def expanded(entries: list[Entry], family: Family) -> list[Block]:
    """The blocks of a message with cache points after those that are marked."""
    blocks: list[Block] = []
    for block, ttl in entries:
        blocks.append(block)
        if ttl is not None and family.caching and _may_follow(block):
            blocks.append(point(ttl, family))
    return blocks


def _may_follow(block: Block) -> bool:
    if "reasoningContent" in block:
        return False
    document = block.get("document")
    return document is None or document.get("format") == "pdf"


def keep_within_limits(lists: list[list[Block]]) -> None:
    """Take out the earliest cache points of too many, and shorten those that stand behind a shorter one.

    `lists` are the tools, the system prompts and each message's content, in the order in which Bedrock reads them.
    """
    places = [(blocks, block) for blocks in lists for block in blocks if "cachePoint" in block]
    for blocks, block in places[:-MOST_POINTS]:
        blocks[:] = [other for other in blocks if other is not block]
    short = False
    for _, block in places[-MOST_POINTS:]:
        if short:
            block["cachePoint"].pop("ttl", None)
        short = short or "ttl" not in block["cachePoint"]
