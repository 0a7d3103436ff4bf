"""Which store a ledger's URL means."""

from __future__ import annotations

from pathlib import Path

from qlens import POSTGRES_FORM, Secret, StartupError, Url, check_postgres_url, is_postgres, sqlite_path
from qlens_plugins.cost.ledger.sqlite import SqliteStore
from qlens_plugins.cost.ledger.store import Store

_FILE = "sqlite:///FILE"


def check(url: Url) -> None:
    """Raise ValueError for a URL that means no store; a password in it is not repeated."""
    if is_postgres(url):
        check_postgres_url(url)
    elif (scheme := url.partition(":")[0]) == "sqlite":
        sqlite_path(url, Path())
    else:
        raise ValueError(f"a ledger at {scheme}:... is not supported; supported: {_FILE} and {POSTGRES_FORM}")


def store_at(url: Url, folder: Path) -> Store:
    """The store; a relative file is in a folder. Raises StartupError when what it needs is not installed."""
    if not is_postgres(url):
        return SqliteStore(sqlite_path(url, folder))
    try:
        from qlens_plugins.cost.ledger.postgres import PostgresStore
    except ImportError as error:
        raise StartupError(
            f"ledger: PostgreSQL needs the extra `postgres`: pip install 'qlens[postgres]' ({error})"
        ) from error
    return PostgresStore(Secret(url))
