"""What a call used: disjoint buckets of tokens and other meters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from attrs import field, frozen


@frozen
class Usage:
    """Tokens and other meters in disjoint buckets: they sum to the total, none is contained in another."""

    input: int = 0
    """Prompt tokens that were neither read from nor written to a provider's cache, nor audio."""
    cached_input: int = 0
    cache_write_5m: int = 0
    cache_write_1h: int = 0
    output: int = 0
    """Completion tokens that are neither reasoning nor audio."""
    reasoning: int = 0
    audio_in: int = 0
    audio_out: int = 0
    meters: Mapping[str, int] = field(factory=dict, hash=False)
    """Other meters: images, seconds, queries."""
    source: Literal["provider", "estimated", "partial", "none"] = "none"
    tier: str | None = None
    """The service tier the provider says it used."""

    @property
    def prompt(self) -> int:
        """All input tokens."""
        return self.input + self.cached_input + self.cache_write_5m + self.cache_write_1h + self.audio_in

    @property
    def completion(self) -> int:
        """All output tokens."""
        return self.output + self.reasoning + self.audio_out

    @property
    def total(self) -> int:
        """All tokens."""
        return self.prompt + self.completion


NO_USAGE = Usage()

BUCKETS = ("input", "cached_input", "cache_write_5m", "cache_write_1h", "output", "reasoning", "audio_in", "audio_out")
"""The names of the token buckets."""


_SANE = 2**31
"""No call uses as many tokens: a provider that says so is wrong, and the money for it would not fit 64 bits."""


def _count(source: object, name: str) -> int | None:
    """A sane token count of an object; None when it states none, and 0 only when it says 0."""
    value = source.get(name) if isinstance(source, Mapping) else None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if type(value) is int and 0 <= value < _SANE else None


def _part(source: object, name: str) -> int:
    return _count(source, name) or 0


def _split(whole: int, *parts: int) -> int:
    """What of a whole is none of its parts. Parts larger than the whole are exclusive of it: nothing is negative."""
    rest = whole - sum(parts)
    return rest if rest >= 0 else whole


def from_openai(raw: object, tier: object = None) -> Usage | None:
    """Read the `usage` object of OpenAI's chat, completions and embeddings; None when it states no sane counts.

    OpenAI counts cached and audio tokens inside prompt_tokens, reasoning and audio inside completion_tokens.
    """
    if not isinstance(raw, Mapping):
        return None
    prompt, completion = _count(raw, "prompt_tokens"), _count(raw, "completion_tokens")
    # Embeddings have no completion. A count that is there and is nonsense makes the whole unbelievable.
    if prompt is None or (completion is None and raw.get("completion_tokens") is not None):
        return None
    inside, outside = raw.get("prompt_tokens_details"), raw.get("completion_tokens_details")
    cached, written = _part(inside, "cached_tokens"), _part(inside, "cache_write_tokens")
    audio_in, audio_out = _part(inside, "audio_tokens"), _part(outside, "audio_tokens")
    reasoning = _part(outside, "reasoning_tokens")
    return Usage(
        input=_split(prompt, cached, written, audio_in),
        cached_input=cached,
        cache_write_5m=written,
        output=_split(completion or 0, reasoning, audio_out),
        reasoning=reasoning,
        audio_in=audio_in,
        audio_out=audio_out,
        source="provider",
        tier=tier if isinstance(tier, str) else None,
    )


def larger(one: Usage | None, other: Usage) -> Usage:
    """The field-wise maximum: providers that report usage several times send running totals, not parts."""
    if one is None:
        return other
    return Usage(
        input=max(one.input, other.input),
        cached_input=max(one.cached_input, other.cached_input),
        cache_write_5m=max(one.cache_write_5m, other.cache_write_5m),
        cache_write_1h=max(one.cache_write_1h, other.cache_write_1h),
        output=max(one.output, other.output),
        reasoning=max(one.reasoning, other.reasoning),
        audio_in=max(one.audio_in, other.audio_in),
        audio_out=max(one.audio_out, other.audio_out),
        meters={**one.meters, **other.meters},
        source=other.source,
        tier=other.tier or one.tier,
    )


def together(usages: Sequence[Usage]) -> Usage:
    """The sum of several usages; as sure as the least sure of them."""
    if len(usages) == 1:
        return usages[0]
    meters: dict[str, int] = {}
    for usage in usages:
        for name, count in usage.meters.items():
            meters[name] = meters.get(name, 0) + count
    sources = {usage.source for usage in usages}
    return (
        Usage(
            **{bucket: sum(getattr(usage, bucket) for usage in usages) for bucket in BUCKETS},
            meters=meters,
            source="partial" if "partial" in sources else "estimated" if "estimated" in sources else "provider",
            tier=usages[-1].tier,
        )
        if usages
        else NO_USAGE
    )
