"""One SQLite file for several plugins: tables and versions by owner, made once, whoever comes at a time."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qlens import StartupError, file_identity, open_sqlite, sqlite_path, sqlite_transaction
from qlens.stores.sqlite import APPLICATION

ONE = (("CREATE TABLE one (x)", "INSERT INTO one VALUES (1)"),)
TWO = (*ONE, ("ALTER TABLE one ADD COLUMN y",))
OTHER = (("CREATE TABLE other (x)",),)


def opened(path: Path, owner: str = "one", migrations: Sequence[Sequence[str]] = ONE) -> sqlite3.Connection:
    """Open it as gateways do: again, as long as somebody else makes it."""
    ends = time.monotonic() + 10
    while True:
        try:
            return open_sqlite(path, owner, migrations)
        except sqlite3.OperationalError:
            if time.monotonic() > ends:
                raise


def test_many_who_open_it_at_a_time_make_its_tables_once(tmp_path: Path) -> None:
    path = tmp_path / "qlens.db"

    def use(place: int) -> int:
        database = opened(path, *(("one", ONE) if place % 2 else ("other", OTHER)))
        try:
            return int(database.execute(f"SELECT count(*) FROM {'one' if place % 2 else 'other'}").fetchone()[0])
        finally:
            database.close()

    with ThreadPoolExecutor(8) as threads:
        assert sorted(threads.map(use, range(16))) == [0] * 8 + [1] * 8


def test_an_older_version_is_upgraded_and_a_newer_one_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "qlens.db"
    opened(path).close()
    opened(path, "other", OTHER).close()
    database = opened(path, migrations=TWO)
    assert database.execute("SELECT x, y FROM one").fetchall() == [(1, None)]
    database.close()
    with pytest.raises(StartupError, match="version 2, this QLens knows up to version 1"):
        open_sqlite(path, "one", ONE)
    opened(path, "other", OTHER).close()


def test_tables_from_before_there_were_versions_are_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "qlens.db"
    database = sqlite3.connect(path)
    database.executescript(f"CREATE TABLE one (x); PRAGMA application_id = {APPLICATION}; PRAGMA user_version = 1")
    database.close()

    def unversioned(database: sqlite3.Connection) -> int:
        return int(database.execute("PRAGMA user_version").fetchone()[0])

    open_sqlite(path, "other", OTHER).close()
    open_sqlite(path, "one", ONE, unversioned=unversioned).close()
    for _ in range(2):
        database = open_sqlite(path, "one", TWO, unversioned=unversioned)
        assert database.execute("SELECT x, y FROM one").fetchall() == []
        assert sorted(database.execute("SELECT * FROM versions")) == [("one", 2), ("other", 1)]
        database.close()


def test_a_migration_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "qlens.db"
    with pytest.raises(sqlite3.OperationalError):
        open_sqlite(path, "one", (("CREATE TABLE one (x)", "CREATE TABLE one (x)"),))
    database = opened(path)
    assert database.execute("SELECT x FROM one").fetchall() == [(1,)]
    database.close()


def test_a_transaction_is_whole_or_not_at_all(tmp_path: Path) -> None:
    database = opened(tmp_path / "qlens.db")

    def fail() -> None:
        with sqlite_transaction(database):
            database.execute("DELETE FROM one")
            database.execute("DELETE FROM none")

    with pytest.raises(sqlite3.OperationalError, match="no such table"):
        fail()
    assert database.execute("SELECT count(*) FROM one").fetchone() == (1,)
    database.close()


def test_what_cannot_be_used_is_said(tmp_path: Path) -> None:
    path = tmp_path / "qlens.db"
    assert file_identity(path) is None
    with pytest.raises(sqlite3.OperationalError, match="does not exist"):
        open_sqlite(path, "one", ONE, create=False)
    assert not path.exists()
    with pytest.raises(StartupError, match=r"the folder .* does not exist"):
        open_sqlite(tmp_path / "no" / "qlens.db", "one", ONE)
    with pytest.raises(StartupError, match="cannot be opened"):
        open_sqlite(tmp_path, "one", ONE)
    path.write_text("keys: []\n" * 1000)
    with pytest.raises(StartupError, match="is no SQLite database"):
        open_sqlite(path, "one", ONE)


def test_urls_name_files(tmp_path: Path) -> None:
    assert sqlite_path("sqlite:///qlens.db", tmp_path) == tmp_path / "qlens.db"
    assert sqlite_path("sqlite:////var/qlens.db", tmp_path) == Path("/var/qlens.db")
    for url in ("sqlite:///", "sqlite:///:memory:", "postgresql://joe:example-password@db/x", "qlens.db"):
        with pytest.raises(ValueError, match=r"names no file|not supported") as caught:
            sqlite_path(url, tmp_path)
        assert "example-password" not in str(caught.value)
