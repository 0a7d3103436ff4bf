"""Usage as each dialect writes it, and as the chunks of a chat say it."""

from __future__ import annotations

from typing import Any

from attrs import define, evolve, field

from qlens.dialects import Body, chat
from qlens.usage import Usage, larger

_TO_OPENAI = {"standard": "default"}
_TO_ANTHROPIC = {"default": "standard", "auto": "standard"}


def as_openai(usage: Usage) -> dict[str, Any]:
    """OpenAI's usage object: what was read from a cache or written to one is a part of the prompt."""
    details: dict[str, int] = {"cached_tokens": usage.cached_input, "audio_tokens": usage.audio_in}
    if written := usage.cache_write_5m + usage.cache_write_1h:
        details["cache_write_tokens"] = written
    if usage.cache_write_1h:
        details["cache_write_1h_tokens"] = usage.cache_write_1h
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.total,
        "prompt_tokens_details": details,
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning, "audio_tokens": usage.audio_out},
    }


@define(eq=False)
class Heard:
    """What the chunks of a chat stream have said of usage, and of the tier, which may stand in others."""

    used: Usage | None = field(init=False, default=None)
    _tier: str | None = field(init=False, default=None)

    def hear(self, chunk: Body) -> None:
        """Take what one more chunk says: of several counts the larger, of several tiers the last."""
        if (usage := chat.usage(chunk)) is not None:
            self.used = larger(self.used, usage)
        if type(tier := chunk.get("service_tier")) is str:
            self._tier = tier or self._tier
        if self.used is not None and self.used.tier != self._tier:
            self.used = evolve(self.used, tier=self._tier)


def openai_tier(usage: Usage) -> str | None:
    """OpenAI's name for the tier that a provider says it used."""
    return _TO_OPENAI.get(usage.tier, usage.tier) if usage.tier else None


def as_anthropic(usage: Usage) -> dict[str, Any]:
    """Anthropic's usage object: what was read from a cache or written to one is no part of input_tokens."""
    # Its clients may be generated from its schema, in which all of these are required.
    return {
        "input_tokens": usage.input + usage.audio_in,
        "cache_creation_input_tokens": usage.cache_write_5m + usage.cache_write_1h,
        "cache_read_input_tokens": usage.cached_input,
        "cache_creation": {
            "ephemeral_5m_input_tokens": usage.cache_write_5m,
            "ephemeral_1h_input_tokens": usage.cache_write_1h,
        },
        "output_tokens": usage.completion,
        "output_tokens_details": {"thinking_tokens": usage.reasoning} if usage.reasoning else None,
        "server_tool_use": None,
        "inference_geo": None,
        "service_tier": _TO_ANTHROPIC.get(usage.tier, usage.tier) if usage.tier else None,
    }
