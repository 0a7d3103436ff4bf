"""An error as the client's dialect writes it: as the body of an answer, or as an event in a stream that has begun."""

from __future__ import annotations

import logging
from typing import Any

import orjson

from qlens import sse
from qlens.dialects import responses, typed
from qlens.errors import CallError

log = logging.getLogger("qlens")

_ANTHROPIC = frozenset({"count_tokens", "messages"})
"""The dialects of Anthropic's API."""

# https://platform.claude.com/docs/en/api/errors
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}


def mistake() -> CallError:
    """The answer to a call that failed by the gateway's own fault."""
    return CallError("The gateway made a mistake.", code="internal_error")


def error_body(error: CallError, dialect: str, call_id: str) -> bytes:
    """The body of an answer that is an error."""
    try:
        return orjson.dumps(_anthropic(error, call_id) if dialect in _ANTHROPIC else error.body())
    except TypeError:
        log.error("%s says something that is no text", type(error).__name__)
        return error_body(mistake(), dialect, call_id)


def error_event(error: CallError, dialect: str, call_id: str) -> bytes:
    """The last event of a stream that fails after its first byte."""
    try:
        if dialect == "messages":
            return typed.write(_anthropic(error, call_id))
        # What passes through is of no dialect and read by SDKs of any API; Anthropic's skips events that have no name.
        if dialect in ("responses", ""):
            return typed.write(responses.error_event(error.body()))
        return sse.write(error.body())
    except TypeError:
        log.error("%s says something that is no text", type(error).__name__)
        return error_event(mistake(), dialect, call_id)


def _anthropic(error: CallError, call_id: str) -> dict[str, Any]:
    kind = _ANTHROPIC_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    # This API has no field for the parameter, so the message must name it.
    named = error.param and error.param not in error.message
    message = f"{error.param}: {error.message}" if named else error.message
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": call_id}
