"""The fields that Azure OpenAI's operations know, by api-version: all others it refuses as unrecognized.

https://github.com/Azure/azure-rest-api-specs/tree/main/specification/cognitiveservices/data-plane/AzureOpenAI/inference
"""

from __future__ import annotations

from collections.abc import Mapping

_SHARED = {"model", "user", "stream", "n", "stop", "temperature", "top_p", "presence_penalty", "frequency_penalty"}
_SHARED |= {"logit_bias", "logprobs", "max_tokens", "seed"}
_CHAT = _SHARED | {"messages", "tools", "tool_choice", "functions", "function_call", "response_format", "top_logprobs"}
_CHAT |= {"data_sources", "parallel_tool_calls"}
_FIELDS: Mapping[str, set[str]] = {
    "chat/completions": _CHAT,
    "completions": _SHARED | {"prompt", "suffix", "echo", "best_of"},
    "embeddings": {"model", "input", "user", "dimensions", "encoding_format"},
}
OPERATIONS = frozenset(_FIELDS)
"""The operations whose bodies are looked into."""

_SINCE = {"stream_options": "2024-09-01", "max_completion_tokens": "2024-09-01"}
"""From which date a field is known, to previews and to releases."""
_PREVIEWED = {
    "metadata": "2024-10-01",
    "store": "2024-10-01",
    "reasoning_effort": "2024-12-01",
    "user_security_context": "2024-12-01",
    "audio": "2025-01-01",
    "modalities": "2025-01-01",
    "prediction": "2025-01-01",
}
"""From which date on previews of the classic surface know a field of chats that no release of it has."""
_OF_V1 = {"prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier", "verbosity"}
"""The fields of chats that only v1 has."""


def known(operation: str, version: str | None) -> set[str]:
    """The fields of one of OPERATIONS behind an api-version of the classic surface; None: on v1."""
    fields = set(_FIELDS[operation])
    if operation == "embeddings":
        return fields
    fields |= {name for name, since in _SINCE.items() if version is None or version >= since}
    if operation != "chat/completions":
        return fields
    if version is None:
        return fields | _PREVIEWED.keys() | _OF_V1
    if version.endswith("-preview"):
        fields |= {name for name, since in _PREVIEWED.items() if version >= since}
    return fields
