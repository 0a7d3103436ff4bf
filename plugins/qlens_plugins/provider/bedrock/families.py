"""What each family of models takes, and how it wants to be asked."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Literal

from attrs import evolve, frozen

Reasoning = Literal["none", "budget", "adaptive", "nova", "effort", "openai"]
"""How a model is told to think: with a budget of tokens or adaptively (Claude), in Nova's way, or by effort alone."""
Vectors = Literal["titan", "cohere_v3", "cohere_v4"]


@frozen
class Family:
    """What a model can do, as far as a request must be written differently for it."""

    name: str
    system: bool = True
    """Takes system prompts; else they go in front of the first user message."""
    tools: bool = True
    tool_choice: bool = True
    user_first: bool = False
    """Wants the conversation to begin with the user."""
    stop: str = ".+"
    """Which stop sequences it takes, as a pattern; empty: none."""
    one_sampler: bool = False
    """Takes temperature or top_p, not both."""
    sampling: bool = True
    """Takes temperature, top_p and top_k at all."""
    top_k: Literal["none", "plain", "nova"] = "none"
    reasoning: Reasoning = "none"
    replays_reasoning: bool = False
    """Takes its own signed thoughts back."""
    caching: bool = False
    """Takes cache points in system prompts and messages."""
    caches_tools: bool = False
    caches_an_hour: bool = False
    schema: Literal["native", "tool", "prompt"] = "tool"
    """How an answer is made to fit a JSON schema."""
    strict_tools: bool = False
    native_tool_choice: bool = False
    """Takes Anthropic's own tool_choice beside Converse's fields."""
    vectors: Vectors | None = None
    """The format of its embeddings, for models that make them."""
    paints: Literal["amazon", "stability"] | None = None
    """The format of its requests for images, for models that make them."""
    ranks: bool = False
    """Whether it does nothing but to say how well documents fit a query."""

    counts: bool = False
    """Whether Bedrock may count the tokens of messages for it, which shows when it is asked."""

    @property
    def speaks(self) -> tuple[str, ...]:
        """The dialects of its calls: a model either chats, or makes embeddings or images, or ranks."""
        if self.vectors:
            return ("embeddings",)
        if self.paints:
            return ("images",)
        if self.ranks:
            return ("rerank",)
        return ("chat", "count_tokens") if self.counts else ("chat",)


_CLAUDE = Family(
    "claude",
    top_k="plain",
    replays_reasoning=True,
    caching=True,
    caches_tools=True,
    native_tool_choice=True,
    counts=True,
)
_NOVA = Family("nova", user_first=True, top_k="nova", caching=True)
_OTHERS: tuple[tuple[str, Family], ...] = (
    (r"amazon\.titan-embed-text-v2.*", Family("titan-embed", vectors="titan")),
    (r"amazon\.titan-embed.*", Family("titan-embed", vectors="titan")),
    (r"cohere\.embed-v4.*", Family("cohere-embed", vectors="cohere_v4")),
    (r"cohere\.embed-.*", Family("cohere-embed", vectors="cohere_v3")),
    (r"(amazon|cohere)\.rerank-.*", Family("rerank", ranks=True)),
    (r"amazon\.(nova-canvas|titan-image-generator)-.*", Family("canvas", paints="amazon")),
    (r"stability\..*", Family("stability", paints="stability")),
    (r"amazon\.nova-2-.*", evolve(_NOVA, reasoning="nova")),
    (r"amazon\.nova-.*", _NOVA),
    (
        r"amazon\.titan-.*",
        Family(
            "titan",
            system=False,
            tools=False,
            tool_choice=False,
            user_first=True,
            stop=r"\|+|User:",
            schema="prompt",
        ),
    ),
    (
        r"meta\.llama3-(8b|70b)-.*|meta\.llama2.*",
        Family("llama", tools=False, tool_choice=False, user_first=True, schema="prompt"),
    ),
    (r"meta\.llama.*", Family("llama", tool_choice=False, user_first=True, schema="prompt")),
    (
        r"mistral\.(mistral-7b|mixtral).*",
        Family("mistral", system=False, tools=False, tool_choice=False, user_first=True, schema="prompt"),
    ),
    (r"mistral\..*", Family("mistral", user_first=True)),
    (r"cohere\..*", Family("command", tool_choice=False, user_first=True, schema="prompt")),
    (r"deepseek\.r1.*", Family("deepseek-r1", tools=False, tool_choice=False, schema="prompt")),
    (r"deepseek\..*", Family("deepseek", reasoning="effort")),
    (r"openai\.gpt-oss.*", Family("gpt-oss", reasoning="effort")),
    (r"openai\..*", Family("gpt", reasoning="openai", stop="")),
    (
        r"ai21\..*",
        Family("jamba", tools=False, tool_choice=False, user_first=True, schema="prompt"),
    ),
    (r"writer\..*", Family("palmyra", user_first=True)),
    (r"(qwen|moonshotai|moonshot|zai|minimax|google|nvidia)\..*", Family("open")),
)
_UNKNOWN = Family("unknown", user_first=True)


@lru_cache(maxsize=4096)
def family_of(model: str) -> Family:
    """The family of a model by its id without profile and ARN; one that nobody knows is taken for an able one."""
    if model.startswith("anthropic."):
        return _claude(model)
    return next((family for pattern, family in _OTHERS if re.fullmatch(pattern, model)), _UNKNOWN)


def claude_version(model: str) -> tuple[int, int]:
    """The version in the id of a Claude: (3, 7) in claude-3-7-sonnet-20250219-v1:0, (4, 0) in claude-sonnet-4-..."""
    parts = model.partition("claude-")[2].split("-")
    numbers: list[int] = []
    for part in parts:
        if re.fullmatch(r"\d{8}|v\d.*", part):
            break
        if re.fullmatch(r"\d{1,2}", part):
            numbers.append(int(part))
    major, minor = (*numbers, 0, 0)[:2]
    return (major, minor) if numbers else (2, 0)


def _claude(model: str) -> Family:
    version = claude_version(model)
    if version < (3, 0):
        return evolve(_CLAUDE, tools=False, tool_choice=False, caching=False, caches_tools=False, schema="prompt")
    reasoning: Reasoning = "adaptive" if version >= (4, 6) else "budget" if version >= (3, 7) else "none"
    return evolve(
        _CLAUDE,
        reasoning=reasoning,
        one_sampler=version >= (4, 1),
        sampling=version < (4, 7),
        caches_an_hour=version >= (4, 5),
        schema="native" if version >= (4, 5) else "tool",
        strict_tools=(4, 5) <= version < (4, 7),
    )
