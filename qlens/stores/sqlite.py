"""SQLite files that several plugins share: each has tables of its own in them, with versions of their own."""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from qlens.errors import StartupError

SCHEME = "sqlite:///"
APPLICATION = 0x514C6E73
"""Marks a database as QLens's own, so that no other program's tables are ever touched."""
BUSY_SECONDS = 1.0
"""How long SQLite itself waits for another writer."""

# These mean that the path or the file is wrong, and that waiting will not mend it.
_HOPELESS = {
    sqlite3.SQLITE_NOTADB: "is no SQLite database",
    sqlite3.SQLITE_CORRUPT: "is damaged",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened",
    sqlite3.SQLITE_READONLY: "cannot be written",
    sqlite3.SQLITE_PERM: "cannot be opened",
}
_UNUSABLE = (errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS)

Database = sqlite3.Connection


def sqlite_path(url: str, folder: Path) -> Path:
    """The file of a URL, a relative one in a folder; raises ValueError for what is no SQLite file."""
    # Only the scheme is shown: the rest of a database's address may hold a password.
    if not url.startswith(SCHEME):
        raise ValueError(f"a database at {url.partition(':')[0]}:... is not supported; supported: {SCHEME}FILE")
    path = Path(url.removeprefix(SCHEME))
    if path.name in {"", ":memory:"}:
        raise ValueError(f"names no file; write {SCHEME}qlens.db, say")
    return path if path.is_absolute() else folder / path


def open_sqlite(
    path: Path,
    owner: str,
    migrations: Sequence[Sequence[str]],
    *,
    create: bool = True,
    unversioned: Callable[[Database], int] = lambda _: 0,
) -> Database:
    """Open a file for writing, and create or upgrade the tables of one owner in it, beside those of others.

    `migrations` are statements by version; a released one is never edited: a change is a new entry at the end. The
    connection is in autocommit, write-ahead log and full synchronisation: what is committed survives a power cut.
    `unversioned` tells the version of tables that the owner made before versions were kept by owner.
    Raises StartupError for what an operator must mend, sqlite3.Error for what may pass (locked, disk full, and, unless
    it may be created, a file that is not there).
    """
    if not path.parent.is_dir():
        raise StartupError(f"{owner}: the folder {path.parent} does not exist; create it, or change `url`")
    if not create and not path.exists():
        raise sqlite3.OperationalError(f"{path.name} does not exist")
    with _understood(path, owner):
        if create:
            _make(path, owner)
        database = sqlite3.connect(
            f"file:{quote(os.fspath(path))}?mode=rw", uri=True, timeout=BUSY_SECONDS, isolation_level=None
        )
        try:
            _prepare(database, path, owner, migrations, unversioned)
        except BaseException:
            database.close()
            raise
    return database


@contextmanager
def sqlite_transaction(database: sqlite3.Connection) -> Iterator[None]:
    """Write all of it or nothing, and alone."""
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
        database.execute("COMMIT")
    except BaseException:
        if database.in_transaction:
            database.execute("ROLLBACK")
        raise


def file_identity(path: Path) -> tuple[int, int] | None:
    """What tells one file from another at the same path: SQLite goes on writing to one that is no longer there."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _make(path: Path, owner: str) -> None:
    """Make an empty file for its owner alone; one that is there stays as it is."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as error:
        if error.errno in _UNUSABLE:
            raise StartupError(
                f"{owner}: {path} cannot be opened ({error.strerror}); name another file in `url`, or mend it"
            ) from error
        raise sqlite3.OperationalError(f"{path.name}: {error.strerror}") from error


@contextmanager
def _understood(path: Path, owner: str) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        problem = _HOPELESS.get(getattr(error, "sqlite_errorcode", 0) & 0xFF)
        if problem is None:
            raise
        raise StartupError(f"{owner}: {path} {problem} ({error}); name another file in `url`, or mend it") from error


def _prepare(
    database: Database,
    path: Path,
    owner: str,
    migrations: Sequence[Sequence[str]],
    unversioned: Callable[[Database], int],
) -> None:
    # In a transaction, or another gateway that makes the tables at this moment would look like another program.
    database.execute("BEGIN")
    version = _version(database, path, owner, unversioned)
    database.execute("COMMIT")
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = FULL")
    if version < len(migrations):
        with sqlite_transaction(database):
            # Another gateway may have done it while this one waited.
            _upgrade(database, owner, migrations, _version(database, path, owner, unversioned))
    elif version > len(migrations):
        raise StartupError(
            f"{owner}: its tables in {path} have version {version}, this QLens knows up to version {len(migrations)}; "
            "upgrade QLens, or name another file in `url`"
        )


def _upgrade(database: Database, owner: str, migrations: Sequence[Sequence[str]], version: int) -> None:
    for statements in migrations[version:]:
        for statement in statements:
            database.execute(statement)
    database.execute(f"PRAGMA application_id = {APPLICATION}")
    database.execute("CREATE TABLE IF NOT EXISTS versions (owner TEXT PRIMARY KEY, version INTEGER NOT NULL)")
    database.execute(
        "INSERT INTO versions (owner, version) VALUES (?, ?) "
        "ON CONFLICT (owner) DO UPDATE SET version = excluded.version",
        (owner, max(version, len(migrations))),
    )


def _version(database: Database, path: Path, owner: str, unversioned: Callable[[Database], int]) -> int:
    """The version of an owner's tables, 0 before there are any; raises StartupError for another program's file."""
    tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if tables and database.execute("PRAGMA application_id").fetchone()[0] != APPLICATION:
        raise StartupError(f"{owner}: {path} is the database of another program; name another file in `url`")
    found = None
    if "versions" in tables:
        found = database.execute("SELECT version FROM versions WHERE owner = ?", (owner,)).fetchone()
    return int(found[0]) if found else unversioned(database)
