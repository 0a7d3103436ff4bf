"""Anthropic's question how long messages are (https://platform.claude.com/docs/en/api/messages-count-tokens)."""

from __future__ import annotations

from qlens.dialects import Body, fields, messages, signed
from qlens.dialects.plain import Plain
from qlens.usage import NO_USAGE

_REQUEST = fields.record(messages.FIELDS, required=("model", "messages"))


def _checked(body: Body, path: fields.Path) -> None:
    _REQUEST(body, path)
    signed.without_rewritten(body)


COUNT_TOKENS = Plain(
    rule=_checked,
    asked_texts=messages.request_texts,
    used=lambda _body: NO_USAGE,  # to count costs nothing
)
"""The same body as that of messages; an answer is one number."""

_UNCOUNTED = frozenset({"max_tokens", "metadata", "service_tier", "stop_sequences", "stream"})
_SAMPLING = frozenset({"temperature", "top_k", "top_p"})


def countable(body: Body) -> Body:
    """The fields that count: the API refuses others, which an operator may have set for a target."""
    return {name: value for name, value in body.items() if name not in _UNCOUNTED | _SAMPLING}


def estimate(body: Body) -> Body:
    """The answer where no provider counts: from the size of all texts, images left out, and marked."""
    return {"input_tokens": messages.input_bound(body)[1], "estimated": True}
