"""What a provider's error means: from one of OpenAI's shape to one of ours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from attrs import frozen

from qlens.errors import (
    CallError,
    UpstreamAuth,
    UpstreamError,
    UpstreamLimited,
    UpstreamModelMissing,
    UpstreamRejected,
    UpstreamTimedOut,
    UpstreamUnavailable,
    UpstreamUnreachable,
)

_READ_CHARS = 4096
_SHOWN_CHARS = 512
_CATEGORIES = 32
"""How many categories of a content filter are shown."""

_MISSING_MODEL = {"model_not_found", "DeploymentNotFound"}
_SPENT_QUOTA = {"insufficient_quota", "credit_balance_exhausted", "billing_hard_limit_reached", "billing_not_active"}
_FILTERED = {"content_filter", "content_policy_violation", "ResponsibleAIPolicyViolation"}
_OVERFLOW = {"context_length_exceeded", "exceed_context_size_error"}

_STATUS_OF_NAME = {
    **dict.fromkeys(_SPENT_QUOTA, 429),
    **dict.fromkeys(_FILTERED | _OVERFLOW, 400),
    **dict.fromkeys(
        ("rate_limit_exceeded", "rate_limit_error", "RateLimitReached", "too_many_requests", "slow_down"), 429
    ),
    **dict.fromkeys(("server_is_overloaded", "overloaded_error", "service_unavailable_error"), 503),
    **dict.fromkeys(("authentication_error", "invalid_api_key"), 401),
    **dict.fromkeys(("invalid_request_error", "BadRequestError", "bad_request_error"), 400),
    **dict.fromkeys(("not_found_error", "NotFoundError"), 404),
    **dict.fromkeys(("timeout", "timeout_error"), 504),
    "permission_error": 403,
}
"""What an error means that comes without a status of HTTP, by its code or type."""

# OpenAI and compatible servers (llama.cpp, vLLM, TGI, Ollama) each say it in their own words, often without a code.
_OVERFLOW_WORDING = re.compile(
    r"context (length|window|size)|maximum (model|context|input) length|(prompt|input)( is|'s)? too long"
    r"|too many (input|prompt) tokens|exceeds? the (available|maximum) context|tokens? exceeds? .*(limit|maximum)"
    r"|`?max_new_tokens`? must be <=|reduce the length of the (messages|prompt|input)",
    re.IGNORECASE,
)

_IDENTIFIER = re.compile(r"[\w.\[\]-]{1,64}", re.ASCII)
# Every repetition that could start at many places is bounded: a long message must not take long to mask.
_SECRETS = re.compile(
    r"""
      \b(?:bearer|basic)\s+\S+                                          # an Authorization header
    | \b(?:sk|pk|rk|gsk|xai|key)[-_][\w*-]{8,}                          # a provider's key, starred ones too
    | \b(?:AKIA|ASIA)[A-Z0-9]{12,}
    | \b(?:api[-_ ]?key|token|secret|password|signature)["']?\s*[:=]\s*\S+
    | \beyJ[\w-]{4,}\.[\w.-]+                                           # a JSON web token
    | \b(?:org|proj|user|acct|account|req|sess)[-_](?=[A-Za-z]{0,64}\d)[A-Za-z0-9]{6,}
    | \b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b                    # a subscription, a tenant, a request
    | \barn:[\w:/.-]+ | \b\d{12}\b                                       # an AWS resource, an AWS account
    | /?(?:subscriptions|resourcegroups)/\S+                             # an Azure resource
    | \bhttps?://\S+ | \b[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,8}
    | \b[\w-]{1,63}(?:\.[\w-]{1,63}){0,4}\.(?:azure|amazonaws|windows|microsoft)\.\w+
    | \b\d{1,3}(?:\.\d{1,3}){3}\b
    | \b(?=[A-Za-z+/_-]{0,64}\d)(?=[\d+/_-]{0,64}[A-Za-z])[A-Za-z0-9+/_-]{32,}={0,2}  # any long run of both
    """,
    re.IGNORECASE | re.VERBOSE,
)


def error_from(payload: Mapping[str, Any], status: int | None = None, retry_after: float | None = None) -> CallError:
    """Our error for one of OpenAI's shape: a body, an event of a stream, or the error object alone.

    Without a status (an error inside a 200 or a stream) it is taken from the error's own code and type. The
    provider's wording is kept only where the client's request is at fault, and only after masking.
    """
    error = _Error.of(payload)
    status = status or error.status()
    if error.names & _MISSING_MODEL or status == 404:
        return UpstreamModelMissing("The provider does not know the model that is configured for this name.")
    if status in {401, 403}:
        return UpstreamAuth("The provider refused the gateway's credential.")
    if status == 407:
        return UpstreamUnreachable("No connection to the provider: the proxy refused the gateway's credential.")
    if status in {402, 429}:
        return _limited(error, status, retry_after)
    if status in {408, 504}:
        return UpstreamTimedOut("The provider gave up waiting for its model.")
    if status in {503, 529}:
        return UpstreamUnavailable("The provider is overloaded or down.", retry_after=retry_after)
    if status == 424 or not 400 <= status < 500:
        return UpstreamError("The provider failed.", retry_after=retry_after)
    return _rejected(error, status)


@frozen
class _Error:
    """What an OpenAI-shaped error says."""

    message: str
    param: str | None
    names: frozenset[str]
    """Its code, its type and its inner code."""
    code: str | None
    numbers: tuple[int, ...]
    """What it gives as a number where OpenAI gives a name."""
    inner: Mapping[str, Any] | None
    """What Azure adds: an error in the error."""

    @classmethod
    def of(cls, payload: Mapping[str, Any]) -> _Error:
        inner = payload.get("error") or payload
        fields: Mapping[str, Any] = inner if isinstance(inner, Mapping) else {"message": inner}
        code, innermost = fields.get("code"), fields.get("innererror") or fields.get("inner_error")
        named = [code, fields.get("type"), innermost.get("code") if isinstance(innermost, Mapping) else None]
        message = fields.get("message")
        return cls(
            message=message if isinstance(message, str) else "",
            param=_identifier(fields.get("param")),
            names=frozenset(name for name in named if isinstance(name, str)),
            code=_identifier(code),
            numbers=tuple(_number(value) for value in (fields.get("status"), code, fields.get("status_code"))),
            inner=innermost if isinstance(innermost, Mapping) else None,
        )

    def status(self) -> int:
        """The status of HTTP this error would have come with; 500 when it does not say."""
        named = [_STATUS_OF_NAME[name] for name in self.names if name in _STATUS_OF_NAME]
        # A type is often only invalid_request_error (400); the larger status belongs to the code that says more.
        return next((number for number in self.numbers if 400 <= number < 600), max(named, default=500))


def _limited(error: _Error, status: int, retry_after: float | None) -> UpstreamLimited:
    spent = next(iter(error.names & _SPENT_QUOTA), "insufficient_quota" if status == 402 else None)
    if spent is None:
        return UpstreamLimited("The provider's rate limit is reached.", retry_after=retry_after)
    limited = UpstreamLimited(
        "The gateway's quota at the provider is spent.", code=spent, headers={"x-should-retry": "false"}
    )
    limited.type, limited.again = "insufficient_quota", False
    return limited


def _rejected(error: _Error, status: int) -> UpstreamRejected:
    plain = f"The provider refused the request with status {status}."
    message = (masked(error.message) or plain) if status in {400, 413, 422} else plain
    if error.names & _FILTERED:
        code = "content_policy_violation" if "content_policy_violation" in error.names else "content_filter"
        return UpstreamRejected(message, param=error.param, code=code, verdict=_verdict(error.inner))
    if error.names & _OVERFLOW or (status in {400, 413, 422} and _OVERFLOW_WORDING.search(error.message[:_READ_CHARS])):
        return UpstreamRejected(message, param=error.param, code="context_length_exceeded")
    return UpstreamRejected(message, status=status, param=error.param, code=error.code)


def _verdict(inner: Mapping[str, Any] | None) -> dict[str, object] | None:
    """What a content filter found: its code, and for each category flags and one word; nothing else of it."""
    if inner is None:
        return None
    code = _identifier(inner.get("code"))
    results = inner.get("content_filter_result") or inner.get("content_filter_results")
    found = _findings(results) if isinstance(results, Mapping) else {}
    return {**({"code": code} if code else {}), **({"content_filter_result": found} if found else {})} or None


def _findings(results: Mapping[str, Any]) -> dict[str, dict[str, object]]:
    found = {}
    for category, finding in list(results.items())[:_CATEGORIES]:
        if not _identifier(category) or not isinstance(finding, Mapping):
            continue
        shown = {name: finding[name] for name in ("filtered", "detected") if isinstance(finding.get(name), bool)}
        if severity := _identifier(finding.get("severity")):
            shown["severity"] = severity
        found[category] = shown
    return found


def masked(message: str) -> str:
    """A provider's sentence on one line, short, without anything that looks like a secret or names an account."""
    line = "".join(char if char.isprintable() else " " for char in message[:_READ_CHARS])
    shown = _SECRETS.sub("***", " ".join(line.split()))
    return shown if len(shown) <= _SHOWN_CHARS else shown[: _SHOWN_CHARS - 1] + "…"


def _identifier(value: object) -> str | None:
    if not isinstance(value, str) or value.isdigit() or not _IDENTIFIER.fullmatch(value) or _SECRETS.search(value):
        return None
    return value


def _number(value: object) -> int:
    if isinstance(value, str) and value.isdecimal() and len(value) == 3:
        return int(value)
    return value if type(value) is int else 0
