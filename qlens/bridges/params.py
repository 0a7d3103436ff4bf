"""What the client calls a field that a provider, or a second bridge, names in chat's words."""

from __future__ import annotations

import re
from collections.abc import Mapping

_LIMITS = ("max_completion_tokens", "max_tokens")
_NAMES: Mapping[str, Mapping[str, str]] = {
    # One message may be several items, and the other way round: of a message, its place says nothing to the client.
    "completions": {"messages": "prompt", "max_completion_tokens": "max_tokens"},
    "messages": {
        "max_completion_tokens": "max_tokens",
        "messages": "messages",
        "reasoning_effort": "thinking",
        "response_format": "output_config.format",
        "stop": "stop_sequences",
        "user": "metadata.user_id",
    },
    "responses": {
        **dict.fromkeys(_LIMITS, "max_output_tokens"),
        "logprobs": "top_logprobs",
        "messages": "input",
        "reasoning_effort": "reasoning.effort",
        "response_format": "text.format",
        "verbosity": "text.verbosity",
    },
}
_IN_CHAT: Mapping[str, str] = {
    "include": "logprobs",
    "input": "messages",
    "max_output_tokens": "max_completion_tokens",
    "reasoning": "reasoning_effort",
    "text": "response_format",
    "text.verbosity": "verbosity",
}
"""Chat's words for those of Responses."""
_FLAT = re.compile(r"(tools\[\d+\]|tool_choice)\.(?!type\b)")
_FUNCTION = re.compile(r"(tools\[\d+\]|tool_choice)\.(?:function|custom)\b")
_SCHEMA = re.compile(r"(tools\[\d+\])\.parameters\b")


def asked(dialect: str, param: str | None, said: str = "chat") -> str | None:
    """The client's own param for one that a provider names in chat's words, or in those of `said`."""
    if param is not None and said == "responses" and dialect != "responses":
        param = _IN_CHAT.get(param) or _IN_CHAT.get(_first(param)) or _FLAT.sub(r"\1.function.", param)
    names = _NAMES.get(dialect)
    if param is None or names is None:
        return param
    name = _first(param)
    if name in names:
        return names[name]
    found = _FUNCTION.sub(r"\1", param)
    return _SCHEMA.sub(r"\1.input_schema", found) if dialect == "messages" else found


def _first(param: str) -> str:
    return re.split(r"[.\[]", param, maxsplit=1)[0]
