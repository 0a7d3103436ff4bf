"""QLens: an LLM gateway whose every stage is a plugin. This is all that a plugin author may import."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from qlens.alternative import Alternative
    from qlens.arguments import unicode_argument
    from qlens.audit import Actor, AuditEntry
    from qlens.background import background_thread
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
    from qlens.config import Network, Secret, Url
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
        NotCounted,
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
    from qlens.events import Event
    from qlens.exchange import post_openai, send_request
    from qlens.exchange_messages import post_messages
    from qlens.followed_files import FileState, file_state, is_being_written
    from qlens.forms import File
    from qlens.gateway import Gateway
    from qlens.hookspecs import hookimpl
    from qlens.money import picos, usd
    from qlens.outbound import Outbound, OutboundFailed, Reach, Received, networks, outbound_url
    from qlens.passthrough import path_patterns
    from qlens.patterns import fits
    from qlens.provider_errors import error_from
    from qlens.registry import Command, Endpoint, Health
    from qlens.responses_only import speaks_responses_only
    from qlens.session import Frame, Session, SessionClosed
    from qlens.stores.postgres import (
        POSTGRES_LOCK,
        PostgresLine,
        PostgresMigration,
        postgres_errors,
        prepare_postgres,
    )
    from qlens.stores.postgres_url import POSTGRES_FORM, check_postgres_url, is_postgres, postgres_name
    from qlens.stores.redis import RedisSettings, RedisStore, Script, StoreUnavailable, redis_store
    from qlens.stores.spool import Spool, SpoolFull
    from qlens.stores.sqlite import SqliteFile, file_identity, open_sqlite, sqlite_path, sqlite_transaction
    from qlens.stores.syncing import SpoolSync
    from qlens.surrogates import json_of
    from qlens.trimming import trimmed
    from qlens.unsent import is_unsent
    from qlens.upstream import Answer, Deadlines, Upstream, extra_headers, header_value, http_url
    from qlens.usage import NO_USAGE, Usage

# Where each public name lives. Imported when first used, so that `import qlens` costs nothing.
_HOMES = {
    "qlens.alternative": "Alternative",
    "qlens.arguments": "unicode_argument",
    "qlens.audit": "Actor AuditEntry",
    "qlens.background": "background_thread",
    "qlens.call": "Allowance Attempt Call Caller Cost FREE Limit Model Outgoing Receipt Reply Target UNPRICED",
    "qlens.config": "Network Secret Url",
    "qlens.config.aside": "read_yaml",
    "qlens.errors": (
        "Blocked CallError CallTimedOut ConfigError Fault Forbidden InvalidRequest ModelNotFound NotCounted "
        "PluginFailed QuotaExceeded RateLimited StartupError Unauthenticated Unavailable UpstreamAuth UpstreamError "
        "UpstreamInvalid UpstreamLimited UpstreamModelMissing UpstreamRejected UpstreamTimedOut UpstreamTruncated "
        "UpstreamUnavailable UpstreamUnreachable"
    ),
    "qlens.events": "Event",
    "qlens.exchange": "post_openai send_request",
    "qlens.exchange_messages": "post_messages",
    "qlens.followed_files": "FileState file_state is_being_written",
    "qlens.forms": "File",
    "qlens.gateway": "Gateway",
    "qlens.hookspecs": "hookimpl",
    "qlens.money": "picos usd",
    "qlens.outbound": "Outbound OutboundFailed Reach Received networks outbound_url",
    "qlens.passthrough": "path_patterns",
    "qlens.patterns": "fits",
    "qlens.provider_errors": "error_from",
    "qlens.registry": "Command Endpoint Health",
    "qlens.responses_only": "speaks_responses_only",
    "qlens.session": "Frame Session SessionClosed",
    "qlens.stores.postgres": "POSTGRES_LOCK PostgresLine PostgresMigration postgres_errors prepare_postgres",
    "qlens.stores.postgres_url": "POSTGRES_FORM check_postgres_url is_postgres postgres_name",
    "qlens.stores.redis": "RedisSettings RedisStore Script StoreUnavailable redis_store",
    "qlens.stores.spool": "Spool SpoolFull",
    "qlens.stores.sqlite": "SqliteFile file_identity open_sqlite sqlite_path sqlite_transaction",
    "qlens.stores.syncing": "SpoolSync",
    "qlens.surrogates": "json_of",
    "qlens.trimming": "trimmed",
    "qlens.unsent": "is_unsent",
    "qlens.upstream": "Answer Deadlines Upstream extra_headers header_value http_url",
    "qlens.usage": "NO_USAGE Usage",
}
_HOME = {name: module for module, names in _HOMES.items() for name in names.split()}

__all__ = [
    "FREE",
    "NO_USAGE",
    "POSTGRES_FORM",
    "POSTGRES_LOCK",
    "UNPRICED",
    "Actor",
    "Allowance",
    "Alternative",
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
    "Event",
    "Fault",
    "File",
    "FileState",
    "Forbidden",
    "Frame",
    "Gateway",
    "Health",
    "InvalidRequest",
    "Limit",
    "Model",
    "ModelNotFound",
    "Network",
    "NotCounted",
    "Outbound",
    "OutboundFailed",
    "Outgoing",
    "PluginFailed",
    "PostgresLine",
    "PostgresMigration",
    "QuotaExceeded",
    "RateLimited",
    "Reach",
    "Receipt",
    "Received",
    "RedisSettings",
    "RedisStore",
    "Reply",
    "Script",
    "Secret",
    "Session",
    "SessionClosed",
    "Spool",
    "SpoolFull",
    "SpoolSync",
    "SqliteFile",
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
    "background_thread",
    "check_postgres_url",
    "error_from",
    "extra_headers",
    "file_identity",
    "file_state",
    "fits",
    "header_value",
    "hookimpl",
    "http_url",
    "is_being_written",
    "is_postgres",
    "is_unsent",
    "json_of",
    "networks",
    "open_sqlite",
    "outbound_url",
    "path_patterns",
    "picos",
    "post_messages",
    "post_openai",
    "postgres_errors",
    "postgres_name",
    "prepare_postgres",
    "read_yaml",
    "redis_store",
    "send_request",
    "speaks_responses_only",
    "sqlite_path",
    "sqlite_transaction",
    "trimmed",
    "unicode_argument",
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
