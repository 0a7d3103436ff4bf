"""PostgreSQL databases that several plugins share: each has tables of its own in one, with versions of their own."""

from __future__ import annotations

import asyncio
import math
import ssl
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import asyncpg
from attrs import define, field, frozen

from qlens.errors import StartupError

CONNECT_SECONDS = 5.0
"""For a connection, TLS and log-in included."""
CANCEL_SECONDS = 2.0
"""How long the server may take to give something up, before the connection is cut."""

# A connection that was lost must not keep its locks for long. Compiling costs more than it saves on statements like
# ours. What counts as written has to be on the disk, whatever the server does for others.
_SETTINGS = """
SET idle_in_transaction_session_timeout = '60s';
SET jit = off;
SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'
"""

_FAILURES = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError, EOFError)
"""What asyncpg raises. The third it calls a fault of its own; it comes when a server says goodbye to an idle client."""

# What an operator must mend: waiting does not help.
_HOPELESS: Mapping[type[Exception], str] = {
    asyncpg.InvalidPasswordError: "the user or the password is wrong",
    asyncpg.InvalidAuthorizationSpecificationError: "the server does not let this user in",
    asyncpg.InvalidCatalogNameError: "the database does not exist; create it",
    asyncpg.InvalidSchemaNameError: "the schema does not exist; create it",
    asyncpg.InsufficientPrivilegeError: "the user has not the rights it needs (to create and write tables)",
    asyncpg.UndefinedObjectError: "a setting in the URL is unknown to the server",
    asyncpg.ClientConfigurationError: "the URL is not right",
    asyncpg.FeatureNotSupportedError: "the server is too old; PostgreSQL 13 and later will do",
    ssl.SSLCertVerificationError: "the server's certificate is not trusted",
}

POSTGRES_LOCK = "SELECT pg_advisory_xact_lock(1363963507, hashtext(current_schema()))"
"""Takes the lock under which tables change, in a transaction: one for all owners of a schema. The number is QLns."""

T = TypeVar("T")


@contextmanager
def postgres_errors(away: type[Exception], place: str | None = None) -> Iterator[None]:
    """Raise what asyncpg raises, and OSError, as one exception.

    With a place, which is named in it, StartupError is raised for what an operator must mend.
    """
    try:
        yield
    except _FAILURES as error:
        text = _reason(error)
        for kind, problem in _HOPELESS.items() if place is not None else ():
            if isinstance(error, kind):
                raise StartupError(f"{place}: {problem} ({text})") from error
        raise away(text) from error


def _reason(error: BaseException) -> str:
    """What has happened, where asyncpg tells of what it then could not do itself: end a transaction, say."""
    while isinstance(error, asyncpg.InterfaceError) and isinstance(error.__context__, _FAILURES):
        error = error.__context__
    if isinstance(error, asyncpg.InternalClientError):
        return "the server has closed the connection"
    return str(error) or ("no answer in time" if isinstance(error, TimeoutError) else type(error).__name__)


@define(eq=False)
class PostgresLine:
    """A connection on an event loop of its own, used from threads like a plain one, by one at a time.

    What is asked on it runs on the thread that asks, and no other loop has work with it.
    """

    _loop: asyncio.AbstractEventLoop = field(factory=asyncio.new_event_loop)
    _connection: Any = field(default=None, init=False)
    _task: asyncio.Task[Any] | None = field(default=None, init=False)
    """What is being asked."""

    @classmethod
    def opened(cls, url: str, name: str) -> PostgresLine:
        """Connect, under a name that the server shows; raises what asyncpg raises, OSError and TimeoutError."""
        line = cls()
        try:
            line.run(line._connect(url, name), CONNECT_SECONDS)
        except BaseException:
            line.close()
            raise
        return line

    async def _connect(self, url: str, name: str) -> None:
        self._connection = await asyncpg.connect(
            url, timeout=CONNECT_SECONDS, server_settings={"application_name": name}
        )
        # Here and not while connecting, where a pooler in between would refuse them.
        await self._connection.execute(_SETTINGS)
        # All sums are whole numbers, of any size.
        await self._connection.set_type_codec("numeric", schema="pg_catalog", encoder=str, decoder=int, format="text")

    @property
    def connection(self) -> Any:
        """The asyncpg connection, for coroutines that `run` is given."""
        return self._connection

    def execute(self, sql: str, seconds: float) -> None:
        """Run statements without values."""
        self.run(self._connection.execute(sql), seconds)

    def answers(self, seconds: float = CONNECT_SECONDS) -> bool:
        """Whether the server is still there."""
        try:
            self.execute("SELECT", seconds)
        except _FAILURES:
            self._connection.terminate()  # nobody has to take leave of a server that does not answer
            return False
        return True

    def rows(self, sql: str, values: Sequence[Any], seconds: float) -> Sequence[Sequence[Any]]:
        """All rows of an answer; `?` in the SQL stands for a value, and no text in it has one."""
        found: Sequence[Sequence[Any]] = self.run(self._connection.fetch(_numbered(sql), *values), seconds)
        return found

    def run(self, asked: Coroutine[Any, Any, T], seconds: float) -> T:
        """Wait for something within some seconds; raises TimeoutError, and CancelledError after `stop`."""
        return self._loop.run_until_complete(self._within(asked, seconds))

    async def _within(self, asked: Coroutine[Any, Any, T], seconds: float) -> T:
        self._task = task = asyncio.ensure_future(asked)
        try:
            await asyncio.wait({task}, timeout=None if seconds == math.inf else seconds)
            if not task.done():
                await self._give_up(task)
                raise TimeoutError(f"no answer within {seconds:g} s")
        finally:
            self._task = None
        return task.result()

    async def _give_up(self, task: asyncio.Task[Any]) -> None:
        # asyncpg asks the server to cancel. One that is away does not hear that either.
        task.cancel()
        await asyncio.wait({task}, timeout=CANCEL_SECONDS)
        if not task.done() and self._connection is not None:
            self._connection.terminate()
            await asyncio.wait({task}, timeout=CANCEL_SECONDS)

    def stop(self) -> None:
        """Give up what is being asked, or is asked next; from any thread."""
        with suppress(RuntimeError):  # it is closed
            self._loop.call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def close(self) -> None:
        """Take leave, or else cut the connection."""
        if not self._loop.is_closed():
            try:
                self._loop.run_until_complete(self._leave())
            finally:
                self._loop.close()

    async def _leave(self) -> None:
        if self._connection is not None:
            try:
                async with asyncio.timeout(CANCEL_SECONDS):
                    await self._connection.close()
            except Exception:  # noqa: BLE001 - it is gone either way
                self._connection.terminate()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        await asyncio.sleep(0)  # a transport that was cut closes at the next turn


def _numbered(sql: str) -> str:
    """SQL with `$1` for the first `?`, and so on."""
    first, *others = sql.split("?")
    return first + "".join(f"${number}{part}" for number, part in enumerate(others, 1))


# --- tables ------------------------------------------------------------------------------------


@frozen
class PostgresMigration:
    """What a version adds."""

    statements: Sequence[str]
    oldest: int
    """The oldest version whose QLens may go on writing: what is added must not disturb it."""


# Of one moment, and of the present one: to_regclass() may remember what was there before this waited for the lock.
_TABLES = (
    "SELECT relname FROM pg_class WHERE relnamespace = to_regnamespace(current_schema()) "
    "AND relname = ANY($1::text[]) AND relkind IN ('r', 'p', 'v', 'm', 'f')"
)
_VERSION = "SELECT version, oldest FROM versions WHERE owner = $1"


async def prepare_postgres(
    connection: Any, owner: str, migrations: Sequence[PostgresMigration], tables: Sequence[str], name: str
) -> None:
    """Make or upgrade the tables of one owner, beside those of others, whoever else does it at the same time.

    A released migration is never edited: a change is a new entry at the end. `tables` are those of the first version.
    Raises StartupError for tables of another program or of a version beyond this one; `name` is the database's.
    """
    if await _version(connection, owner, migrations, tables, name) >= len(migrations):
        return
    async with connection.transaction():
        await connection.execute(POSTGRES_LOCK)
        # Another gateway may have done it while this one waited.
        version = await _version(connection, owner, migrations, tables, name)
        for migration in migrations[version:]:
            for statement in migration.statements:
                await connection.execute(statement)
        if version < len(migrations):
            await connection.execute(
                "CREATE TABLE IF NOT EXISTS versions "
                "(owner text PRIMARY KEY, version integer NOT NULL, oldest integer NOT NULL)"
            )
            await connection.execute(
                "INSERT INTO versions (owner, version, oldest) VALUES ($1, $2, $3) ON CONFLICT (owner) "
                "DO UPDATE SET version = excluded.version, oldest = excluded.oldest",
                *(owner, len(migrations), migrations[-1].oldest),
            )


async def _version(
    connection: Any, owner: str, migrations: Sequence[PostgresMigration], tables: Sequence[str], name: str
) -> int:
    """The version of the tables, 0 before there are any."""
    there = {table for (table,) in await connection.fetch(_TABLES, ["versions", *tables])}
    try:
        found = await connection.fetchrow(_VERSION, owner) if "versions" in there else None
    except asyncpg.UndefinedColumnError as error:
        raise _foreign(owner, name, "versions") from error
    if found is None:
        for table in sorted(there - {"versions"}):
            raise _foreign(owner, name, table)
        return 0
    version, oldest = found
    if oldest > len(migrations):
        raise StartupError(
            f"{owner}: the tables in {name} have version {version} and are not for a QLens that knows up to version "
            f"{len(migrations)}, as this one does; upgrade QLens, or name another database in `url`"
        )
    return int(version)


def _foreign(owner: str, name: str, table: str) -> StartupError:
    return StartupError(
        f"{owner}: {name} has a table `{table}` of another program; name another database in `url`, or a schema of its "
        "own with ?search_path=NAME at the end"
    )
