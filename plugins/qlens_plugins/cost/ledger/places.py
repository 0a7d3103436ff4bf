"""Which store a ledger's URL means."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from qlens import Secret, StartupError, Url, sqlite_path
from qlens_plugins.cost.ledger.sqlite import SqliteStore
from qlens_plugins.cost.ledger.store import Store

POSTGRES = ("postgresql", "postgres")
_HOST = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[^:\[\]]*)(:\d+)?")
_FILE = "sqlite:///FILE"
_DATABASE = "postgresql://USER:PASSWORD@HOST:PORT/DATABASE"


def check(url: Url) -> None:
    """Raise ValueError for a URL that means no store; a password in it is not repeated."""
    scheme = url.partition(":")[0]
    if scheme in POSTGRES:
        _check_database(url)
    elif scheme == "sqlite":
        sqlite_path(url, Path())
    else:
        raise ValueError(f"a ledger at {scheme}:... is not supported; supported: {_FILE} and {_DATABASE}")


def _check_database(url: Url) -> None:
    parts = urlsplit(url)
    hosts = parts.netloc.rpartition("@")[2].split(",")
    # What a password does not hide ends up in a host's place, or behind it: there it would be shown.
    if parts.fragment or "@" in parts.path or not parts.path.strip("/") or not all(map(_HOST.fullmatch, hosts)):
        raise ValueError(
            f"names no host and database; write {_DATABASE}, with %40 for @, %2F for /, %3F for ? and %23 for # "
            "in a password"
        )
    if {"password", "passfile"} & {name for name, _ in parse_qsl(parts.query)}:
        raise ValueError(f"a password belongs before the host: {_DATABASE}")


def store_at(url: Url, folder: Path) -> Store:
    """The store; a relative file is in a folder. Raises StartupError when what it needs is not installed."""
    if url.partition(":")[0] not in POSTGRES:
        return SqliteStore(sqlite_path(url, folder))
    try:
        from qlens_plugins.cost.ledger.postgres import PostgresStore
    except ImportError as error:
        raise StartupError(
            f"ledger: PostgreSQL needs the extra `postgres`: pip install 'qlens[postgres]' ({error})"
        ) from error
    return PostgresStore(Secret(url))
