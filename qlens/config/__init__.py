"""The configuration: YAML, `${NAME}`, one strict converter, faults with file, line and path."""

from qlens.config.aside import read_yaml
from qlens.config.entries import (
    FALLBACK_KINDS,
    ON_DISCONNECT,
    STAGES,
    Admin,
    Config,
    Draft,
    ModelEntry,
    PluginEntry,
    Server,
    TargetEntry,
    matches,
)
from qlens.config.file import draft, parse, read, text_of
from qlens.config.network import Network, Tls
from qlens.config.scalars import Secret, Url
from qlens.config.strict import convert

__all__ = [
    "FALLBACK_KINDS",
    "ON_DISCONNECT",
    "STAGES",
    "Admin",
    "Config",
    "Draft",
    "ModelEntry",
    "Network",
    "PluginEntry",
    "Secret",
    "Server",
    "TargetEntry",
    "Tls",
    "Url",
    "convert",
    "draft",
    "matches",
    "parse",
    "read",
    "read_yaml",
    "text_of",
]
