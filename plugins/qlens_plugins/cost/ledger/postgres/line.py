"""A connection to PostgreSQL on an event loop of its own, used from threads like a plain one, by one at a time."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import asyncpg
from attrs import define, field

from qlens_plugins.cost.ledger.store import Found

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

FAILURES = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError, EOFError)
"""What asyncpg raises. The third it calls a fault of its own; it comes when a server says goodbye to an idle client."""

T = TypeVar("T")


@define(eq=False)
class Line:
    """The connection; what is asked on it runs on the thread that asks, and no other loop has work with it."""

    _loop: asyncio.AbstractEventLoop = field(factory=asyncio.new_event_loop)
    _connection: Any = field(default=None, init=False)
    _task: asyncio.Task[Any] | None = field(default=None, init=False)
    """What is being asked."""

    @classmethod
    def opened(cls, url: str, name: str) -> Line:
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

    def answers(self) -> bool:
        """Whether the server is still there."""
        try:
            self.execute("SELECT", CONNECT_SECONDS)
        except FAILURES:
            return False
        return True

    def rows(self, sql: str, values: Sequence[Any], seconds: float) -> Sequence[Found]:
        """All rows of an answer."""
        found: Sequence[Found] = self.run(self._connection.fetch(sql, *values), seconds)
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
