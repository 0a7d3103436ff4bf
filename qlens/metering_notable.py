"""Finds the events of a chat stream that are worth parsing."""

from __future__ import annotations

import re

# What makes an event worth parsing. Inside a JSON string the quotes would be escaped, so text never matches; and
# what matches is parsed before it is believed.
NOTABLE = re.compile(
    rb'"usage"\s*:\s*\{|"choices"\s*:\s*\[\s*\]|"finish_reason"\s*:\s*"|"error"\s*:\s*["{\[t]|\[DONE\]'
)


def is_notable(block: bytes) -> bool:
    """Whether one of these events is. Where each has only what nearly all have, the slow search is spared."""
    return (
        b"[DONE]" in block
        or b'"error"' in block
        or block.count(b'"usage"') != block.count(b'"usage":null')
        or block.count(b'"finish_reason"') != block.count(b'"finish_reason":null')
        or block.count(b'"choices"') != block.count(b'"choices":[{')
    ) and NOTABLE.search(block) is not None


def start_of_the_notable(block: bytes) -> int:
    """Where the first notable event begins, or one in front of it."""
    found = NOTABLE.search(block)
    assert found is not None
    boundary = -1 if b"\r" in block else block.rfind(b"\n\n", 0, found.start())
    return boundary + 2 if boundary >= 0 else 0
