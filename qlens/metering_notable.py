"""Finds the events of a chat stream that are worth parsing."""

from __future__ import annotations

import re

# What makes an event worth parsing. Inside a JSON string the quotes would be escaped, so text never matches; and
# what matches is parsed before it is believed.
NOTABLE = re.compile(
    rb'"(?:usage"\s*:\s*\{|choices"\s*:\s*\[\s*\]|finish_reason"\s*:\s*"|error"\s*:\s*["{\[t])|\[DONE\]'
)


def start_of_the_notable(block: bytes) -> int:
    """Where the first of these events begins that is notable, or one in front of it; -1 where none is."""
    found = NOTABLE.search(block) if _may_be_notable(block) else None
    if found is None:
        return -1
    boundary = -1 if b"\r" in block else block.rfind(b"\n\n", 0, found.start())
    return boundary + 2 if boundary >= 0 else 0


def _may_be_notable(block: bytes) -> bool:
    """False where each has only what nearly all have: the slow search is spared."""
    return (
        b"[DONE]" in block
        or b'"error"' in block
        or block.count(b'"usage"') != block.count(b'"usage":null')
        or block.count(b'"finish_reason"') != block.count(b'"finish_reason":null')
        or block.count(b'"choices"') != block.count(b'"choices":[{')
    )
