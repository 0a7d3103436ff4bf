"""What AWS's errors mean: from the name of an exception to one of the gateway's errors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import orjson

from qlens import (
    CallError,
    UpstreamAuth,
    UpstreamError,
    UpstreamLimited,
    UpstreamModelMissing,
    UpstreamTimedOut,
    UpstreamUnavailable,
    error_from,
)

THROTTLED_SECONDS = 1.0
"""Bedrock does not say how long to wait: its quotas are by the minute, and filled up steadily."""
SPENT_SECONDS = 3600.0
"""The same for a quota of tokens by the day."""

_CREDENTIALS = {
    *("AccessDeniedException", "UnrecognizedClientException", "InvalidClientTokenId", "InvalidSignatureException"),
    *("IncompleteSignature", "IncompleteSignatureException", "MissingAuthenticationToken"),
    *("MissingAuthenticationTokenException", "SignatureDoesNotMatch", "OptInRequired", "NotAuthorized"),
}
_REFUSED = "AWS refused the gateway's credentials, or they may not use this model."
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "RequestExpired"}
_OVERFLOW = re.compile(
    r"(input|prompt) is too long|too many (input )?tokens|expected maxlength|prompt tokens .{0,40}exceed"
    r"|exceeds? the (model'?s? )?(maximum )?(context|input)|maximum context|context (window|length)",
    re.IGNORECASE,
)
_NO_SUCH_MODEL = re.compile(
    r"model identifier is invalid|on-demand throughput isn.{0,6}t supported|model id .{0,200}not (found|supported)"
    r"|inference profile .{0,200}(not found|doesn.t exist)",
    re.IGNORECASE,
)
_NO_PERMISSION = re.compile(r"not authorized to perform", re.IGNORECASE)
_BY_THE_DAY = re.compile(r"per day|daily", re.IGNORECASE)


class CredentialsExpired(UpstreamAuth):
    """The temporary credentials are over: fresh ones may do."""


class NotPermitted(UpstreamAuth):
    """The credentials are good, but not for this operation or this model."""


def from_answer(status: int, headers: Mapping[str, str], body: bytes) -> CallError:
    """The error for an answer that is none; its text stands in the body, or in a header when that is empty."""
    try:
        payload = orjson.loads(body)
    except orjson.JSONDecodeError:
        payload = {}  # the gateway in front of Bedrock answers in XML or HTML now and then
    fields: Mapping[str, Any] = payload if isinstance(payload, dict) else {}
    name = headers.get("x-amzn-errortype") or fields.get("__type") or fields.get("code") or ""
    error = failure(_short(str(name)), fields, headers.get("x-amzn-errormessage"), status)
    if error.retry_after is not None and (said := _seconds(headers.get("retry-after"))):
        error.retry_after = said
    return error


def from_frame(name: str, payload: bytes) -> CallError:
    """The error for an exception inside a stream, which comes under a status of 200."""
    try:
        fields = orjson.loads(payload or b"{}")
    except orjson.JSONDecodeError:
        fields = {}
    # In a stream the same exceptions begin with a small letter.
    return failure(name[:1].upper() + name[1:], fields if isinstance(fields, dict) else {})


def failure(name: str, fields: Mapping[str, Any], text: str | None = None, status: int | None = None) -> CallError:
    """The error for an exception by its name and fields; the name decides, the text only where the name does not."""
    said = fields.get("message") or fields.get("Message") or fields.get("originalMessage") or text
    message = said if isinstance(said, str) else ""
    if name == "ModelStreamErrorException":
        name, status = "", _client_status(fields.get("originalStatusCode"))
    error = _named(name, message) or _by_status(status or 502, message)
    if isinstance(error, UpstreamError):
        error.add_note(f"{name or status}: {message[:300]}")  # for the log: clients are told less
    return error


def _named(name: str, message: str) -> CallError | None:
    if name in _EXPIRED:
        return CredentialsExpired("The gateway's credentials for AWS have expired.")
    if name in _CREDENTIALS:
        return (NotPermitted if _NO_PERMISSION.search(message) else UpstreamAuth)(_REFUSED)
    match name:
        case "ValidationException":
            return _invalid(message)
        case "ResourceNotFoundException" | "UnknownOperationException":
            return _missing()
        case "ThrottlingException" | "TooManyRequestsException":
            wait = SPENT_SECONDS if _BY_THE_DAY.search(message) else THROTTLED_SECONDS
            return UpstreamLimited("The provider's rate limit is reached.", retry_after=wait)
        case "ServiceQuotaExceededException":
            return error_from({"error": {"code": "insufficient_quota"}}, 429)
        case "ModelNotReadyException":
            return UpstreamUnavailable(
                "The model is not ready yet.", code="model_not_ready", retry_after=THROTTLED_SECONDS
            )
        case "ModelTimeoutException":
            return UpstreamTimedOut("The provider gave up waiting for its model.")
        case "ModelErrorException":
            return UpstreamError("The model failed.", code="model_error")
        case "ServiceUnavailableException":
            return UpstreamUnavailable("The provider is overloaded or down.")
        case "InternalServerException" | "InternalFailure" | "InternalServerError":
            return UpstreamError("The provider failed.")
        case "ConflictException":
            return _by_status(409, message)
    return None


def _invalid(message: str) -> CallError:
    if _NO_SUCH_MODEL.search(message):
        return _missing()
    code = "context_length_exceeded" if _OVERFLOW.search(message) else None
    return error_from({"error": {"message": message, "type": "invalid_request_error", "code": code}}, 400)


def _missing() -> UpstreamModelMissing:
    return UpstreamModelMissing("The provider does not know the model that is configured for this name.")


def _by_status(status: int, message: str) -> CallError:
    return error_from({"error": {"message": message}}, status)


def _client_status(value: object) -> int:
    return value if isinstance(value, int) and 400 <= value < 500 else 502


def _short(name: str) -> str:
    """`com.amazon.x#ThrottlingException:http://...` is ThrottlingException."""
    return name.partition(":")[0].rpartition("#")[2]


def _seconds(text: str | None) -> float | None:
    return float(text) if text and re.fullmatch(r"\d{1,6}(\.\d{1,6})?", text) else None
