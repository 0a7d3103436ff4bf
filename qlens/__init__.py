"""QLens: an LLM gateway whose every stage is a plugin. This is all that a plugin author may import."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from qlens.audit import Actor, AuditEntry
    from qlens.call import (
        FREE,
        UNPRICED,
        Allowance,
        Attempt,
        Call,
        Caller,
        Cost,
        Limit,
        Model,
        Outgoing,
        Receipt,
        Reply,
        Target,
    )
    from qlens.config import Secret, Url
    from qlens.config.aside import read_yaml
    from qlens.errors import (
        Blocked,
        CallError,
        CallTimedOut,
        ConfigError,
        Fault,
        Forbidden,
        InvalidRequest,
        ModelNotFound,
        PluginFailed,
        QuotaExceeded,
        RateLimited,
        StartupError,
        Unauthenticated,
        Unavailable,
        UpstreamAuth,
        UpstreamError,
        UpstreamInvalid,
        UpstreamLimited,
        UpstreamModelMissing,
        UpstreamRejected,
        UpstreamTimedOut,
        UpstreamTruncated,
        UpstreamUnavailable,
        UpstreamUnreachable,
    )
    from qlens.exchange import post_openai, send_request
    from qlens.exchange_messages import post_messages
    from qlens.forms import File
    from qlens.gateway import Gateway
    from qlens.hookspecs import hookimpl
    from qlens.money import picos, usd
    from qlens.passthrough import path_patterns
    from qlens.patterns import fits
    from qlens.provider_errors import error_from
    from qlens.registry import Command, Endpoint, Health
    from qlens.session import Frame, Session, SessionClosed
    from qlens.stores.redis import RedisSettings, RedisStore, Script, StoreUnavailable, redis_store
    from qlens.stores.sqlite import file_identity, open_sqlite, sqlite_path, sqlite_transaction
    from qlens.upstream import Answer, Deadlines, Upstream, extra_headers, header_value, http_url
    from qlens.usage import NO_USAGE, Usage

# Where each public name lives. Imported when first used, so that `import qlens` costs nothing.
_HOMES = {
    "qlens.audit": "Actor AuditEntry",
    "qlens.call": "Allowance Attempt Call Caller Cost FREE Limit Model Outgoing Receipt Reply Target UNPRICED",
    "qlens.config": "Secret Url",
    "qlens.config.aside": "read_yaml",
    "qlens.errors": (
        "Blocked CallError CallTimedOut ConfigError Fault Forbidden InvalidRequest ModelNotFound PluginFailed "
        "QuotaExceeded RateLimited StartupError Unauthenticated Unavailable UpstreamAuth UpstreamError UpstreamInvalid "
        "UpstreamLimited UpstreamModelMissing UpstreamRejected UpstreamTimedOut UpstreamTruncated UpstreamUnavailable "
        "UpstreamUnreachable"
    ),
    "qlens.exchange": "post_openai send_request",
    "qlens.exchange_messages": "post_messages",
    "qlens.forms": "File",
    "qlens.gateway": "Gateway",
    "qlens.hookspecs": "hookimpl",
    "qlens.money": "picos usd",
    "qlens.passthrough": "path_patterns",
    "qlens.patterns": "fits",
    "qlens.provider_errors": "error_from",
    "qlens.registry": "Command Endpoint Health",
    "qlens.session": "Frame Session SessionClosed",
    "qlens.stores.redis": "RedisSettings RedisStore Script StoreUnavailable redis_store",
    "qlens.stores.sqlite": "file_identity open_sqlite sqlite_path sqlite_transaction",
    "qlens.upstream": "Answer Deadlines Upstream extra_headers header_value http_url",
    "qlens.usage": "NO_USAGE Usage",
}
_HOME = {name: module for module, names in _HOMES.items() for name in names.split()}

__all__ = [
    "FREE",
    "NO_USAGE",
    "UNPRICED",
    "Actor",
    "Allowance",
    "Answer",
    "Attempt",
    "AuditEntry",
    "Blocked",
    "Call",
    "CallError",
    "CallTimedOut",
    "Caller",
    "Command",
    "ConfigError",
    "Cost",
    "Deadlines",
    "Endpoint",
    "Fault",
    "File",
    "Forbidden",
    "Frame",
    "Gateway",
    "Health",
    "InvalidRequest",
    "Limit",
    "Model",
    "ModelNotFound",
    "Outgoing",
    "PluginFailed",
    "QuotaExceeded",
    "RateLimited",
    "Receipt",
    "RedisSettings",
    "RedisStore",
    "Reply",
    "Script",
    "Secret",
    "Session",
    "SessionClosed",
    "StartupError",
    "StoreUnavailable",
    "Target",
    "Unauthenticated",
    "Unavailable",
    "Upstream",
    "UpstreamAuth",
    "UpstreamError",
    "UpstreamInvalid",
    "UpstreamLimited",
    "UpstreamModelMissing",
    "UpstreamRejected",
    "UpstreamTimedOut",
    "UpstreamTruncated",
    "UpstreamUnavailable",
    "UpstreamUnreachable",
    "Url",
    "Usage",
    "__version__",
    "error_from",
    "extra_headers",
    "file_identity",
    "fits",
    "header_value",
    "hookimpl",
    "http_url",
    "open_sqlite",
    "path_patterns",
    "picos",
    "post_messages",
    "post_openai",
    "read_yaml",
    "redis_store",
    "send_request",
    "sqlite_path",
    "sqlite_transaction",
    "usd",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'qlens' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
