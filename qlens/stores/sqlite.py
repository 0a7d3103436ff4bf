"""SQLite files that several plugins share: each has tables of its own in them, with versions of their own."""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from attrs import define, field, frozen

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
    oldest: int | None = None,
    unversioned: Callable[[Database], int] = lambda _: 0,
) -> Database:
    """Open a file for writing, and create or upgrade the tables of one owner in it, beside those of others.

    `migrations` are statements by version; a released one is never edited: a change is a new entry at the end.
    `oldest` is the oldest version whose QLens may go on writing beside this one: what came after it must not disturb
    it. Left out, only one that knows all migrations may. Tables that a newer QLens has upgraded are used as they are,
    unless it says that they are not for this version. The connection is in autocommit, write-ahead log and full
    synchronisation: what is committed survives a power cut. `unversioned` tells the version of tables that the owner
    made before versions were kept by owner.
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
            _prepare(database, path, _Tables(owner, migrations, oldest or len(migrations), unversioned))
        except BaseException:
            database.close()
            raise
    return database


@define(eq=False)
class SqliteFile:
    """The tables of one owner in a file, as one thread uses them: opened when they are needed, and anew after `drop`.

    A file that is moved or deleted while it is open is away, and is not made anew: it would be without what was in it.
    """

    path: Path
    owner: str
    migrations: Sequence[Sequence[str]]
    oldest: int | None = None
    makes: bool = True
    """Whether it may make the file, until it was open once."""
    _database: Database | None = field(default=None, init=False)
    _identity: tuple[int, int] | None = field(default=None, init=False)

    def connected(self) -> Database:
        """The connection; raises what `open_sqlite` raises, and sqlite3.Error when the file is not the opened one."""
        if self._database is not None and file_identity(self.path) != self._identity:
            self.drop()
            raise sqlite3.OperationalError("the file was moved or deleted")
        if self._database is None:
            self._database = open_sqlite(self.path, self.owner, self.migrations, create=self.makes, oldest=self.oldest)
            self._identity, self.makes = file_identity(self.path), False
        return self._database

    def drop(self) -> None:
        """Close the connection, if there is one."""
        database, self._database = self._database, None
        if database is not None:
            database.close()


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
    """Make an empty file for its owner alone; one that is there stays as it is, and is not even opened.

    Closing a file drops the locks that the process has on it, those of SQLite's connections too: the next process to
    leave would take itself for the last, and delete the log that they go on writing to.
    """
    try:
        if not path.exists():
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        return  # somebody was faster
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


@frozen
class _Tables:
    """The tables of one owner, as this QLens knows them."""

    owner: str
    migrations: Sequence[Sequence[str]]
    oldest: int
    unversioned: Callable[[Database], int]


def _prepare(database: Database, path: Path, tables: _Tables) -> None:
    # In a transaction, or another gateway that makes the tables at this moment would look like another program.
    database.execute("BEGIN")
    version = _version(database, path, tables)
    database.execute("COMMIT")
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = FULL")
    if version < len(tables.migrations):
        with sqlite_transaction(database):
            # Another gateway may have done it while this one waited.
            version = _version(database, path, tables)
            if version < len(tables.migrations):
                _upgrade(database, tables, version)


def _upgrade(database: Database, tables: _Tables, version: int) -> None:
    for statements in tables.migrations[version:]:
        for statement in statements:
            database.execute(statement)
    database.execute(f"PRAGMA application_id = {APPLICATION}")
    database.execute(
        "CREATE TABLE IF NOT EXISTS versions (owner TEXT PRIMARY KEY, version INTEGER NOT NULL, oldest INTEGER)"
    )
    if not _has_oldest(database):
        database.execute("ALTER TABLE versions ADD COLUMN oldest INTEGER")
    database.execute(
        "INSERT INTO versions (owner, version, oldest) VALUES (?, ?, ?) "
        "ON CONFLICT (owner) DO UPDATE SET version = excluded.version, oldest = excluded.oldest",
        (tables.owner, len(tables.migrations), tables.oldest),
    )


def _has_oldest(database: Database) -> bool:
    """Whether the file can say who may go on writing: one that only old versions have upgraded cannot."""
    return "oldest" in {column[1] for column in database.execute("PRAGMA table_info(versions)")}


def _version(database: Database, path: Path, tables: _Tables) -> int:
    """The version of an owner's tables, 0 before there are any.

    Raises StartupError for another program's file, and for tables that are not for this version.
    """
    owner, known = tables.owner, len(tables.migrations)
    names = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if names and database.execute("PRAGMA application_id").fetchone()[0] != APPLICATION:
        raise StartupError(f"{owner}: {path} is the database of another program; name another file in `url`")
    found = None
    if "versions" in names:
        # Where it is not said, the tables are for their own version and no older one.
        oldest = "ifnull(oldest, version)" if _has_oldest(database) else "version"
        sql = f"SELECT version, {oldest} FROM versions WHERE owner = ?"  # noqa: S608 - own words
        found = database.execute(sql, (owner,)).fetchone()
    version = int(found[0]) if found else tables.unversioned(database)
    if (found[1] if found else version) > known:
        raise StartupError(
            f"{owner}: its tables in {path} have version {version} and are not for a QLens that knows up to version "
            f"{known}, as this one does; upgrade QLens, or name another file in `url`"
        )
    return version
