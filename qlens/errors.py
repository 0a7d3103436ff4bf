"""Everything that can go wrong: CallError becomes an HTTP answer, StartupError stops the process."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from attrs import frozen

if TYPE_CHECKING:
    from qlens.usage import Usage


class CallError(Exception):
    """A call that ends in an error answer; raised anywhere, turned into OpenAI's error object in one place.

    The message goes to the client as it is: it names the thing and the way out, never a secret.
    https://platform.openai.com/docs/guides/error-codes
    """

    status = 500
    type = "server_error"
    code: str | None = None
    elsewhere = False
    """Whether another target may succeed where this one failed."""
    again = False
    """Whether the same target may succeed when asked again later."""
    fallback: str | None = None
    """The kind of fallback this error may take: any, context_length, content_filter or rate_limit."""
    upstream_id: str | None = None
    """The provider's own id of the request that failed; for the receipt, not for the client."""
    usage: Usage | None = None
    """What the provider says the attempt used though it failed: it is billed."""
    answered = False
    """Whether a whole answer was made, and could not be read: where nobody says what it used, the most is billed."""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        # Here, where it is seen whose mistake it is; what is wrong would break the answer.
        if retry_after is not None and not isinstance(retry_after, int | float):
            raise TypeError("retry_after is no number of seconds")
        if headers is not None and not isinstance(headers, Mapping):
            raise TypeError("headers are no mapping of names to values")
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or type(self).code
        self.retry_after = retry_after
        self.headers: Mapping[str, str] = headers or {}

    def body(self) -> dict[str, object]:
        """OpenAI's error object."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def frames(error: BaseException) -> str:
    """Where an error comes from, for the log: its class and traceback, without its text and that of its causes.

    The text of somebody else's error may hold a prompt, or a key.
    """
    return "".join([f"{type(error).__name__}\n", *traceback.format_tb(error.__traceback__)]).rstrip()


# --- the client's side -------------------------------------------------------------------------


class InvalidRequest(CallError):
    """The request is wrong in itself: 400."""

    status, type = 400, "invalid_request_error"


class NotOffered(InvalidRequest):
    """The provider of a model does not do what is asked: 400.

    `what` says what it does not do; who the provider is, the bridge that notices it does not know: `named` tells.
    """

    def __init__(self, what: str, *, param: str | None = None, code: str | None = None, lead: str = "") -> None:
        super().__init__(f"{lead}The provider of this model {what}", param=param, code=code)
        self._lead, self._what = lead, what

    def named(self, provider: str) -> None:
        """Say which provider it is."""
        self.message = f"{self._lead}{provider} {self._what}"


class NotCounted(InvalidRequest):
    """A provider does not count the tokens of a model: another may, and where none does, the gateway estimates."""

    code = "unsupported_operation"
    elsewhere = True


class Blocked(InvalidRequest):
    """A guard refused the prompt or the answer: 400 with code `content_filter`."""

    code = "content_filter"


class Unauthenticated(CallError):
    """No credential, or one that is not accepted: 401."""

    status, type = 401, "invalid_request_error"


class Forbidden(CallError):
    """The caller is known and may not do this: 403."""

    status, type, code = 403, "permission_error", "insufficient_permissions"


class ModelNotFound(CallError):
    """Unknown and not allowed are one answer, so that nobody can probe for names: 404."""

    status, type, code = 404, "invalid_request_error", "model_not_found"


class ObjectMissing(CallError):
    """No such response, file or batch, or one of another tenant: 404."""

    status, type = 404, "invalid_request_error"


class UnknownPath(CallError):
    """Nothing is served at this path: 404."""

    status, type, code = 404, "invalid_request_error", "unknown_url"


class UpgradeRequired(CallError):
    """The path is served by WebSocket, which the request does not ask for: 426."""

    status, type, code = 426, "invalid_request_error", "upgrade_required"

    def __init__(self, message: str) -> None:
        super().__init__(message, headers={"sec-websocket-version": "13"})


class WrongMethod(CallError):
    """The path is served with another method: 405."""

    status, type, code = 405, "invalid_request_error", "method_not_supported"


class BodyTimedOut(CallError):
    """The client sends its body too slowly: 408."""

    status, type, code = 408, "invalid_request_error", "request_timeout"


class BodyTooLarge(CallError):
    """The body is larger than `server.max_body_bytes`: 413."""

    status, type, code = 413, "invalid_request_error", "request_too_large"


class HeaderTooLarge(CallError):
    """The request line, or one of the headers, is longer than what is read of it: 431."""

    status, type, code = 431, "invalid_request_error", "header_too_large"


class UnsupportedMedia(CallError):
    """A content type or content encoding that is not spoken here: 415."""

    status, type, code = 415, "invalid_request_error", "unsupported_content_type"


class RateLimited(CallError):
    """A limit on requests, tokens or concurrency is reached: 429. `kind` becomes the error's type, as OpenAI does."""

    status, type, code = 429, "requests", "rate_limit_exceeded"

    def __init__(self, message: str, *, kind: str = "requests", retry_after: float | None = None) -> None:
        super().__init__(message, retry_after=retry_after)
        self.type = kind


class QuotaExceeded(CallError):
    """A budget is spent: 429 that tells OpenAI's SDK not to try again."""

    status, type, code = 429, "insufficient_quota", "insufficient_quota"

    def __init__(self, message: str) -> None:
        super().__init__(message, headers={"x-should-retry": "false"})


# --- the gateway's side ------------------------------------------------------------------------


class PluginFailed(CallError):
    """A hook raised something that is no CallError: 500."""

    code = "plugin_failed"


class Unavailable(CallError):
    """The gateway cannot decide or serve at the moment: 503."""

    status, code = 503, "unavailable"


class SessionCut(CallError):
    """A session that was open longer than it may be, or silent for too long; its client has what it was answered."""

    status, code = 504, "session_expired"


class CallTimedOut(CallError):
    """The call took longer than `server.call_seconds`: 504."""

    status, code = 504, "call_timeout"


# --- the provider's side -----------------------------------------------------------------------


class UpstreamError(CallError):
    """A target failed in a way that is not the client's fault: 502, and another target may do better."""

    status, code = 502, "upstream_error"
    elsewhere = again = True
    fallback: str | None = "any"
    ours = False
    """Whether a bound of the gateway itself was met, which says nothing about the target."""


class UpstreamUnreachable(UpstreamError):
    """No connection to the provider."""

    code = "upstream_unreachable"


class UpstreamTimedOut(UpstreamError):
    """The provider connected or answered too slowly: 504."""

    status, code = 504, "upstream_timeout"


class UpstreamInvalid(UpstreamError):
    """The provider's answer is not what its API promises."""

    code = "upstream_invalid_response"


class UpstreamTooLarge(UpstreamInvalid):
    """The provider's answer is larger than `server.max_answer_bytes`: it is made, and asked for nowhere else."""

    code = "upstream_answer_too_large"
    elsewhere = again = False
    fallback = None
    ours = True


class UpstreamTruncated(UpstreamError):
    """The provider's answer stopped before its end."""

    code = "upstream_truncated"


class UpstreamAuth(UpstreamError):
    """The provider refused the gateway's own credential: never a 401 for the client, whose key is fine."""

    code = "upstream_auth_error"
    again = False


class UpstreamLimited(UpstreamError):
    """The provider's own rate limit: 429 with its retry-after."""

    status, type, code = 429, "rate_limit_error", "rate_limit_exceeded"
    fallback = "rate_limit"


class UpstreamUnavailable(UpstreamError):
    """The provider says that it is overloaded or down, or its circuit is open: 503."""

    status, code = 503, "upstream_unavailable"


class UpstreamModelMissing(UpstreamError):
    """The provider does not know the target's model: a fault of the configuration, 404 for the client."""

    status, type, code = 404, "invalid_request_error", "model_not_found"
    again = False


class UpstreamRejected(CallError):
    """The provider says that the request is wrong: its status, mapped to OpenAI's error."""

    status, type = 400, "invalid_request_error"

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        verdict: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(message, param=param, code=code)
        self.status = status
        self.verdict = verdict
        """What a content filter found, as Azure's clients read it."""
        if code == "context_length_exceeded":
            self.fallback = "context_length"
        elif code in {"content_filter", "content_policy_violation"}:
            self.fallback = "content_filter"

    def body(self) -> dict[str, object]:
        """OpenAI's error object, with the verdict of a content filter under Azure's name for it."""
        if self.verdict is None:
            return super().body()
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": {**error, "innererror": self.verdict}}


# --- start-up ----------------------------------------------------------------------------------


@frozen
class Fault:
    """One thing that is wrong in a configuration: where, and what would be right."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


class StartupError(Exception):
    """The process cannot start as configured; carries every fault found, not only the first."""

    def __init__(self, faults: Iterable[Fault] | str) -> None:
        self.faults: tuple[Fault, ...] = (Fault("", faults),) if isinstance(faults, str) else tuple(faults)
        super().__init__("\n".join(str(fault) for fault in self.faults))


class ConfigError(StartupError):
    """The configuration file is wrong."""
