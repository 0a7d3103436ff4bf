"""What a call used: disjoint buckets of tokens and other meters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Literal, TypeGuard

from attrs import evolve, field, frozen

_put = object.__setattr__


@frozen(slots=False, init=False)
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

    def __init__(  # noqa: PLR0917
        self,
        input: int = 0,  # noqa: A002
        cached_input: int = 0,
        cache_write_5m: int = 0,
        cache_write_1h: int = 0,
        output: int = 0,
        reasoning: int = 0,
        audio_in: int = 0,
        audio_out: int = 0,
        meters: Mapping[str, int] | None = None,
        source: Literal["provider", "estimated", "partial", "none"] = "none",
        tier: str | None = None,
    ) -> None:
        # A dict that is put in its place whole. attrs would fill the one that an object has field by field, which takes
        # more steps, and Python then twice as long for each of some sixty readings a call; frozen slots take longer.
        _put(
            self,
            "__dict__",
            {
                "input": input,
                "cached_input": cached_input,
                "cache_write_5m": cache_write_5m,
                "cache_write_1h": cache_write_1h,
                "output": output,
                "reasoning": reasoning,
                "audio_in": audio_in,
                "audio_out": audio_out,
                "meters": {} if meters is None else meters,
                "source": source,
                "tier": tier,
            },
        )

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
        return (
            self.input
            + self.cached_input
            + self.cache_write_5m
            + self.cache_write_1h
            + self.output
            + self.reasoning
            + self.audio_in
            + self.audio_out
        )


NO_USAGE = Usage()

BUCKETS = ("input", "cached_input", "cache_write_5m", "cache_write_1h", "output", "reasoning", "audio_in", "audio_out")
"""The names of the token buckets."""
counts_of = attrgetter(*BUCKETS)
"""The token counts of a usage, in the order of BUCKETS."""


_SANE = 2**31
"""No call uses as many tokens: a provider that says so is wrong, and the money for it would not fit 64 bits."""


def _count(value: object) -> int | None:
    """A sane token count; None when it is none, and 0 only when it says 0."""
    if type(value) is not int:
        if type(value) is not float or not value.is_integer():
            return None
        value = int(value)
    return value if 0 <= value < _SANE else None


def _part(details: Mapping[str, object], name: str) -> int:
    value = details.get(name)
    return value if type(value) is int and 0 <= value < _SANE else _count(value) or 0


def _is_object(value: object) -> TypeGuard[Mapping[str, object]]:
    return type(value) is dict or isinstance(value, Mapping)  # asking an abstract class costs ten times as much


def _rest(whole: int, parts: int) -> int:
    """What of a whole is none of its parts. Parts larger than the whole are exclusive of it: nothing is negative."""
    return whole - parts if whole >= parts else whole


def from_openai(raw: object, tier: object = None, *, generates: bool = True) -> Usage | None:
    """Read the `usage` object of OpenAI's chat, completions and embeddings; None when it states no sane counts.

    OpenAI counts cached and audio tokens inside prompt_tokens, reasoning and audio inside completion_tokens. Where it
    does not count what was generated, the total says it; with neither, the source is `estimated`: somebody who has the
    answer must guess. What does not `generate` has no completion.
    """
    if type(raw) is not dict and not _is_object(raw):
        return None
    prompt, completion = raw.get("prompt_tokens"), raw.get("completion_tokens")
    source: Literal["provider", "estimated"] = "provider"
    # A count that is there and is nonsense makes the whole unbelievable. Most are counts as they stand.
    if type(prompt) is not int or not 0 <= prompt < _SANE:
        prompt = _count(prompt)
        if prompt is None:
            return None
    if completion is None:
        total = _count(raw.get("total_tokens")) if generates else prompt
        if total is None or total < prompt:
            total, source = prompt, "estimated"
        completion = total - prompt
    elif type(completion) is not int or not 0 <= completion < _SANE:
        completion = _count(completion)
        if completion is None:
            return None
    cached = written = hour = audio_in = reasoning = audio_out = 0
    inside, outside = raw.get("prompt_tokens_details"), raw.get("completion_tokens_details")
    # Most details say that there is nothing of each.
    if inside and _is_object(inside) and any(inside.values()):
        cached, written = _part(inside, "cached_tokens"), _part(inside, "cache_write_tokens")
        # OpenAI has one price for writes; providers with two say how much of them is kept for an hour.
        hour = min(written, _part(inside, "cache_write_1h_tokens"))
        audio_in = _part(inside, "audio_tokens")
        prompt = _rest(prompt, cached + written + audio_in)
    if outside and _is_object(outside) and any(outside.values()):
        reasoning, audio_out = _part(outside, "reasoning_tokens"), _part(outside, "audio_tokens")
        completion = _rest(completion, reasoning + audio_out)
    tier = tier if isinstance(tier, str) else None
    # By their places: names would cost more than all the rest.
    return Usage(prompt, cached, written - hour, hour, completion, reasoning, audio_in, audio_out, {}, source, tier)


def from_anthropic(raw: object, before: Usage | None = None) -> Usage | None:
    """Read the `usage` object of Anthropic's messages; None when it states no sane counts.

    Anthropic counts what was read from a cache or written to one apart from input_tokens, and thinking inside
    output_tokens. The later events of a stream leave out what has not changed: they say it `before`.
    """
    if not _is_object(raw):
        return None
    known = {name: raw[name] for name in _ANTHROPIC if raw.get(name) is not None}
    counts = {name: _count(value) for name, value in known.items()}
    if not counts or None in counts.values():
        return None
    known_before = before or NO_USAGE
    output = counts.get("output_tokens", known_before.completion) or 0
    written = counts.get("cache_creation_input_tokens", known_before.cache_write_5m + known_before.cache_write_1h) or 0
    split, details, tier = raw.get("cache_creation"), raw.get("output_tokens_details"), raw.get("service_tier")
    tools, meters = raw.get("server_tool_use"), known_before.meters
    hour, fresh, thought = min(written, known_before.cache_write_1h), 0, min(output, known_before.reasoning)
    if tools and _is_object(tools) and (searches := _part(tools, "web_search_requests")):
        meters = {"web_searches": searches}
    if split and _is_object(split):
        hour, fresh = _part(split, "ephemeral_1h_input_tokens"), _part(split, "ephemeral_5m_input_tokens")
    if details and _is_object(details):
        thought = min(output, _part(details, "thinking_tokens"))
    written = max(written, hour + fresh)
    return Usage(
        input=counts.get("input_tokens", known_before.input) or 0,
        cached_input=counts.get("cache_read_input_tokens", known_before.cached_input) or 0,
        cache_write_5m=written - hour,
        cache_write_1h=hour,
        output=output - thought,
        reasoning=thought,
        meters=meters,
        source="provider",
        # A mode of its own, at a price of its own.
        tier="fast" if raw.get("speed") == "fast" else tier if isinstance(tier, str) else known_before.tier,
    )


_ANTHROPIC = ("input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")


def from_responses(raw: object, tier: object = None) -> Usage | None:
    """Read the `usage` object of OpenAI's Responses: what chat counts, under other names."""
    if not _is_object(raw):
        return None
    renamed = {
        "prompt_tokens": raw.get("input_tokens"),
        "completion_tokens": raw.get("output_tokens"),
        "prompt_tokens_details": raw.get("input_tokens_details"),
        "completion_tokens_details": raw.get("output_tokens_details"),
        "total_tokens": raw.get("total_tokens"),
    }
    return from_openai(renamed, tier)


def with_image_tokens(usage: Usage, raw: Mapping[str, object]) -> Usage:
    """The usage of an image model with its prompt's image tokens as a meter: they cost something else than texts."""
    images = min(usage.input, _part(_details(raw, "input_tokens_details"), "image_tokens"))
    return evolve(usage, input=usage.input - images, meters={"image_tokens": images}) if images else usage


def from_realtime(raw: object) -> Usage | None:
    """Read the `usage` object of a realtime response; None when it states no sane counts.

    Cached audio is counted among the audio and among the cached tokens: it is cached input here, as it is in prices.
    Images cost something else than texts and are meters of their own.
    """
    if not _is_object(raw):
        return None
    prompt, completion = _count(raw.get("input_tokens")), _count(raw.get("output_tokens"))
    if prompt is None or completion is None:
        return None
    inside, outside = _details(raw, "input_token_details"), _details(raw, "output_token_details")
    kept = _details(inside, "cached_tokens_details")
    cached = min(prompt, _part(inside, "cached_tokens"))
    audio = max(0, _part(inside, "audio_tokens") - _part(kept, "audio_tokens"))
    images, cached_images = _part(inside, "image_tokens"), _part(kept, "image_tokens")
    images = max(0, images - cached_images)
    said = min(completion, _part(outside, "audio_tokens"))
    meters = {"image_tokens": images, "cached_image_tokens": cached_images}
    return Usage(
        input=_rest(prompt, cached + audio + images),
        cached_input=max(0, cached - cached_images),
        output=completion - said,
        audio_in=audio,
        audio_out=said,
        meters={name: count for name, count in meters.items() if count},
        source="provider",
    )


def _details(raw: Mapping[str, object], name: str) -> Mapping[str, object]:
    found = raw.get(name)
    return found if _is_object(found) else {}


_IN_PROMPT = ("image_tokens", "cached_image_tokens")
"""The meters that are a part of the prompt."""


def _read(usage: Usage) -> int:
    """All that a model has read."""
    return usage.prompt + sum(usage.meters.get(name, 0) for name in _IN_PROMPT) if usage.meters else usage.prompt


def prompt_stays(one: Usage, other: Usage) -> bool:
    """Whether what one report says of the prompt still holds: the later one says less of it, or does not split it."""
    before, after = _read(one), _read(other)
    return before > after or (before == after == other.input)


def completion_stays(one: Usage, other: Usage) -> bool:
    """The same of the completion."""
    before, after = one.completion, other.completion
    return before > after or (before == after == other.output)


def larger(one: Usage | None, other: Usage) -> Usage:
    """The larger of two running totals, the prompt and the completion each as one: parts of both are never mixed.

    What a provider first counts as input is partly cached, and what it counts as output partly reasoning, once it says
    how the whole is split.
    """
    if one is None:
        return other
    prompt = one if prompt_stays(one, other) else other
    completion = one if completion_stays(one, other) else other
    meters = {**one.meters, **other.meters}
    if meters:
        meters = {name: count for name, count in meters.items() if name not in _IN_PROMPT or name in prompt.meters}
        meters.update({name: prompt.meters[name] for name in _IN_PROMPT if name in meters})
    return Usage(
        input=prompt.input,
        cached_input=prompt.cached_input,
        cache_write_5m=prompt.cache_write_5m,
        cache_write_1h=prompt.cache_write_1h,
        output=completion.output,
        reasoning=completion.reasoning,
        audio_in=prompt.audio_in,
        audio_out=completion.audio_out,
        meters=meters,
        source=completion.source,
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
