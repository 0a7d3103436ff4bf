"""One SQLite file for several plugins: tables and versions by owner, made once, whoever comes at a time."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qlens import SqliteFile, StartupError, file_identity, open_sqlite, sqlite_path, sqlite_transaction
from qlens.stores.sqlite import APPLICATION

ONE = (("CREATE TABLE one (x)", "INSERT INTO one VALUES (1)"),)
TWO = (*ONE, ("ALTER TABLE one ADD COLUMN y",))
OTHER = (("CREATE TABLE other (x)",),)


def opened(path: Path, owner: str = "one", migrations: Sequence[Sequence[str]] = ONE) -> sqlite3.Connection:
    """Open it as gateways do: again, as long as somebody else makes it."""
    ends = time.monotonic() + 60
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


def test_other_processes_that_come_and_go_leave_the_log_of_those_who_stay(tmp_path: Path) -> None:
    path = tmp_path / "qlens.db"
    # Several plugins of a gateway, and then a command beside it.
    one, other = opened(path), opened(path, "other", OTHER)
    try:
        visit = "import sqlite3, sys; d = sqlite3.connect(sys.argv[1]); d.execute('INSERT INTO other VALUES (7)')"
        subprocess.run([sys.executable, "-c", f"{visit}; d.commit(); d.close()", str(path)], check=True)
        assert path.with_name("qlens.db-wal").exists()
        assert one.execute("SELECT x FROM other").fetchall() == [(7,)]
        one.execute("UPDATE one SET x = 2")
        with contextlib.closing(sqlite3.connect(path)) as late:
            assert late.execute("SELECT x FROM one").fetchall() == [(2,)]
    finally:
        other.close()
        one.close()


def test_an_older_version_is_upgraded_and_a_newer_one_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "qlens.db"
    opened(path).close()
    opened(path, "other", OTHER).close()
    database = opened(path, migrations=TWO)
    assert database.execute("SELECT x, y FROM one").fetchall() == [(1, None)]
    database.close()
    # As long as nobody says that an older version may go on writing.
    with pytest.raises(StartupError, match=r"version 2 and are not for a QLens .* version 1, .* upgrade QLens"):
        open_sqlite(path, "one", ONE)
    opened(path, "other", OTHER).close()


def test_a_newer_version_s_tables_are_used_by_those_for_whom_they_are(tmp_path: Path) -> None:
    path = tmp_path / "qlens.db"
    running = open_sqlite(path, "one", ONE, oldest=1)
    open_sqlite(path, "one", TWO, oldest=1).close()
    late = open_sqlite(path, "one", ONE, oldest=1)
    for database in (running, late):
        database.execute("INSERT INTO one (x) VALUES (2)")
        database.close()
    open_sqlite(path, "one", (*TWO, ("ALTER TABLE one DROP COLUMN x",)), oldest=3).close()
    for number, migrations in enumerate((ONE, TWO), 1):
        with pytest.raises(StartupError, match=f"version 3 and are not for a QLens that knows up to version {number}"):
            open_sqlite(path, "one", migrations, oldest=1)


def test_a_file_that_does_not_say_for_whom_it_is_is_for_its_own_version_and_later_ones(tmp_path: Path) -> None:
    path = tmp_path / "qlens.db"
    opened(path, migrations=TWO).close()
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("ALTER TABLE versions DROP COLUMN oldest")
    with pytest.raises(StartupError, match="version 2 and are not for a QLens"):
        open_sqlite(path, "one", ONE)
    open_sqlite(path, "one", TWO).close()
    # Another owner adds the column, in which nothing stands for this one then.
    opened(path, "other", OTHER).close()
    with pytest.raises(StartupError, match="version 2 and are not for a QLens"):
        open_sqlite(path, "one", ONE)
    open_sqlite(path, "one", (*TWO, ("ALTER TABLE one ADD COLUMN z",)), oldest=1).close()
    opened(path).close()


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
        assert sorted(database.execute("SELECT * FROM versions")) == [("one", 2, 2), ("other", 1, 1)]
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


def test_a_file_that_is_gone_is_away_and_not_made_anew_and_another_one_is_opened(tmp_path: Path) -> None:
    path, aside = tmp_path / "qlens.db", tmp_path / "aside.db"
    file = SqliteFile(path, "one", ONE)
    file.connected().execute("INSERT INTO one VALUES (2)")
    file.connected().execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert file.connected() is file.connected()
    os.replace(path, aside)
    for _ in range(2):
        with pytest.raises(sqlite3.OperationalError):
            file.connected()
    assert not path.exists()
    opened(path).close()
    assert file.connected().execute("SELECT x FROM one").fetchall() == [(1,)]
    os.replace(aside, path)  # as who puts a copy back
    with pytest.raises(sqlite3.OperationalError, match="moved or deleted"):
        file.connected()
    assert file.connected().execute("SELECT x FROM one").fetchall() == [(1,), (2,)]
    file.drop()
    file.drop()


def test_a_file_that_may_not_be_made_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "qlens.db"
    file = SqliteFile(path, "one", ONE, makes=False)
    with pytest.raises(sqlite3.OperationalError, match="does not exist"):
        file.connected()
    opened(path).close()
    assert file.connected().execute("SELECT x FROM one").fetchall() == [(1,)]
    file.drop()
