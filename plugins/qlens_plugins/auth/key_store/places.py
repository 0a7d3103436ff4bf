"""Which database a URL means."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from qlens import POSTGRES_FORM, Secret, StartupError, Url, check_postgres_url, is_postgres, sqlite_path
from qlens_plugins.auth.key_store.database import Place
from qlens_plugins.auth.key_store.sqlite import SqlitePlace

_FILE = "sqlite:///FILE"


def check(url: Url) -> None:
    """Raise ValueError for a URL that means no database; a password in it is not repeated."""
    if is_postgres(url):
        check_postgres_url(url)
    elif (scheme := url.partition(":")[0]) == "sqlite":
        sqlite_path(url, Path())
    else:
        raise ValueError(f"keys at {scheme}:... are not supported; supported: {_FILE} and {POSTGRES_FORM}")


def places(url: Url, folder: Path) -> Callable[[bool], Place]:
    """Make a place in the database, for one thread, that may make the file or not; a relative file is in a folder.

    Raises StartupError when what it needs is not installed.
    """
    if not is_postgres(url):
        path = sqlite_path(url, folder)
        return lambda makes: SqlitePlace.at(path, makes=makes)
    try:
        from qlens_plugins.auth.key_store.postgres import PostgresPlace
    except ImportError as error:
        raise StartupError(
            f"key_store: PostgreSQL needs the extra `postgres`: pip install 'qlens[postgres]' ({error})"
        ) from error
    return lambda _: PostgresPlace(Secret(url))
