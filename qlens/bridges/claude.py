"""What a model that is asked by messages takes, as far as a translated request must be written differently for it."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Literal

from attrs import frozen


@frozen
class Claude:
    """What one model takes. The defaults are for models that nobody knows: what every server understands."""

    sampling: bool = True
    """Takes temperature, top_p and top_k at all."""
    one_sampler: bool = False
    """Takes temperature or top_p, not both."""
    thinking: Literal["none", "budget", "adaptive"] = "budget"
    """How it is told to think: not at all, with a budget of tokens, or adaptively with an effort."""
    efforts: frozenset[str] = frozenset()
    """Which efforts it can be told."""
    schema: Literal["native", "tool"] = "tool"
    """How an answer is made to fit a JSON schema: by the model itself, or by a tool that it must call."""
    strict_tools: bool = False
    most_output: int = 8192
    """How many tokens it is allowed when the client does not say: the API wants a number always."""


_EFFORTS = frozenset({"low", "medium", "high", "max"})


@lru_cache(maxsize=4096)
def of(model: str) -> Claude:
    """What a model takes, by its name; a Claude without a version in its name is taken for a new one."""
    if "claude" not in model:
        return Claude()
    version = _version(model)
    return Claude(
        sampling=version < (4, 7),
        one_sampler=version >= (4, 1),
        thinking="adaptive" if version >= (4, 6) else "budget" if version >= (3, 7) else "none",
        efforts=_EFFORTS | {"xhigh"} if version >= (4, 7) else _EFFORTS,
        schema="native" if version >= (4, 5) else "tool",
        strict_tools=version >= (4, 5),
        most_output=_most_output(model, version),
    )


def _version(model: str) -> tuple[int, int]:
    """(4, 5) in claude-sonnet-4-5-20250929 and in claude-sonnet-4.5, (3, 7) in claude-3-7-sonnet-latest."""
    parts = re.split(r"[^a-z0-9]+", model.partition("claude-")[2])
    numbers = [int(part) for part in parts if re.fullmatch(r"\d{1,2}", part)]
    major, minor = (*numbers, 0, 0)[:2]
    return (major, minor) if numbers else (99, 0)


def _most_output(model: str, version: tuple[int, int]) -> int:
    if version < (3, 5):
        return 4096
    if version < (3, 7):
        return 8192
    return 32_000 if "opus" in model and version < (4, 5) else 64_000
