"""What Bedrock says a call used: disjoint buckets, which OpenAI's usage object shows inclusively."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from qlens import Usage

DETAILS = "/usage/output_tokens_details"
"""Where a model's own answer says, as a JSON pointer, how much of it are thoughts: Converse's usage does not."""


def read(raw: object, tier: str | None = None, reasoning: int = 0) -> Usage | None:
    """Read Bedrock's usage, in either of its spellings; None when it states no counts.

    Its input is what was neither read from a cache nor written to one; its output has the thoughts in it.
    """
    if type(raw) is not dict:
        return None
    fresh, output = _count(raw, "inputTokens"), _count(raw, "outputTokens")
    if fresh is None or output is None:
        return None
    reasoning = min(reasoning, output)
    output -= reasoning
    if raw.keys().isdisjoint(_CACHED):
        return Usage(input=fresh, output=output, reasoning=reasoning, source="provider", tier=tier)
    details = raw.get("cacheDetails")
    hour, short = _written(details) if details else (0, 0)
    written = _count(raw, "cacheWriteInputTokens")
    if written is None:
        written = hour + short
    hour = min(hour, written)
    return Usage(
        input=fresh,
        cached_input=_count(raw, "cacheReadInputTokens") or 0,
        cache_write_5m=written - hour,
        cache_write_1h=hour,
        output=output,
        reasoning=reasoning,
        source="provider",
        tier=tier,
    )


def reasoning(more: object) -> int:
    """How many tokens of an answer are thoughts, by the fields of the model's own that were asked for; 0: unknown."""
    if not more:
        return 0
    found: Any = more
    for name in DETAILS.split("/")[1:]:
        found = found.get(name) if isinstance(found, dict) else None
    counts = [found.get(name) for name in _THOUGHTS] if isinstance(found, dict) else []
    return next((count for count in counts if type(count) is int and 0 <= count < _MOST), 0)


_THOUGHTS = ("thinking_tokens", "reasoning_tokens")
"""Anthropic's name for it, and OpenAI's."""
_MOST = 2**31
_OLDER = {
    name: f"{name.removesuffix('s')}Count"
    for name in ("inputTokens", "outputTokens", "cacheReadInputTokens", "cacheWriteInputTokens")
}
"""The other spelling of each count."""
_CACHED = frozenset({"cacheDetails", *(name for pair in _OLDER.items() for name in pair if name.startswith("cache"))})
"""What says something of a cache."""


def _written(details: object) -> tuple[int, int]:
    """What was written to a cache, for an hour and for less."""
    hour = short = 0
    for each in details if type(details) is list else ():
        if type(each) is dict and each.get("ttl") == "1h":
            hour += _count(each, "inputTokens") or 0
        elif type(each) is dict:
            short += _count(each, "inputTokens") or 0
    return hour, short


def _count(raw: dict[str, Any], name: str) -> int | None:
    value = raw.get(name)
    if value is None:
        value = raw.get(_OLDER[name])
    return value if type(value) is int and 0 <= value < _MOST else None


def total(usages: Sequence[Usage | None]) -> Usage | None:
    """The sum over the answers of one call; None when one of them does not say."""
    if len(usages) == 1:
        return usages[0]
    return None if None in usages else together(usages)


def together(usages: Iterable[Usage | None]) -> Usage | None:
    """The sum of what is known, estimated if a part of it is; None when nothing is."""
    known = [usage for usage in usages if usage is not None]
    if not known:
        return None
    meters: dict[str, int] = {}
    for usage in known:
        for name, count in usage.meters.items():
            meters[name] = meters.get(name, 0) + count
    return Usage(
        input=sum(usage.input for usage in known),
        cached_input=sum(usage.cached_input for usage in known),
        cache_write_5m=sum(usage.cache_write_5m for usage in known),
        cache_write_1h=sum(usage.cache_write_1h for usage in known),
        output=sum(usage.output for usage in known),
        reasoning=sum(usage.reasoning for usage in known),
        meters=meters,
        source="estimated" if any(usage.source == "estimated" for usage in known) else "provider",
        tier=next((usage.tier for usage in reversed(known) if usage.tier is not None), None),
    )


def as_openai(usage: Usage, *, thought: bool = False) -> dict[str, Any]:
    """OpenAI's usage object: what was read from a cache or written to one is a part of the prompt.

    Of an answer that has thoughts in it, and nobody knows how many, it says no number.
    """
    details: dict[str, int] = {"cached_tokens": usage.cached_input, "audio_tokens": 0}
    if written := usage.cache_write_5m + usage.cache_write_1h:
        details["cache_write_tokens"] = written
    if usage.cache_write_1h:
        details["cache_write_1h_tokens"] = usage.cache_write_1h
    thoughts = {} if thought and not usage.reasoning else {"reasoning_tokens": usage.reasoning}
    prompt, completion = usage.prompt, usage.completion
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": details,
        "completion_tokens_details": {**thoughts, "audio_tokens": 0},
    }
