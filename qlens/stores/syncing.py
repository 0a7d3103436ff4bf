"""A thread that brings a spool to the disk, group by group."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from threading import Event, Thread

from attrs import define, field

from qlens.background import background_thread
from qlens.stores.spool import Spool

log = logging.getLogger("qlens.spool")

GROUP_SECONDS = 0.01
"""How long a record waits for others to be synced with it."""
RETRY_SECONDS = 1.0
"""Between two tries to sync to a disk that failed."""
QUIET_GROUPS = 100
"""After so many without a record the thread sleeps until it is woken. Waking it costs the event loop more than asking
whether it is awake."""


@define(eq=False)
class SpoolSync:
    """Syncs what is appended to a spool within some milliseconds, as long as it runs.

    `wake` is to be called after each append.
    """

    spool: Spool
    problem: OSError | None = field(default=None, init=False)
    """Why nothing can be synced at present."""
    asleep: bool = field(default=False, init=False)
    _woken: Event = field(factory=Event, init=False)
    _waiting: list[asyncio.Future[None]] = field(factory=list, init=False)
    _ending: Event = field(factory=Event, init=False)
    _thread: Thread | None = field(default=None, init=False)

    def start(self) -> None:
        """Sync from now on."""
        self._thread = background_thread(self._run, "qlens-spool")
        self._thread.start()

    def wake(self) -> None:
        """See to it that what was appended is synced."""
        if self.asleep:
            self.asleep = False
            self._woken.set()

    async def synced(self) -> None:
        """Wait until what was appended so far is on the disk; raises OSError when it cannot be brought there."""
        waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiting)
        self.wake()
        await waiting

    def stop(self, seconds: float) -> None:
        """Sync what is left and end; waits for it so many seconds at most."""
        self._ending.set()
        self.wake()
        if self._thread is not None:
            self._thread.join(seconds)

    def _run(self) -> None:
        quiet = 0
        while not self._ending.is_set():
            time.sleep(GROUP_SECONDS)
            quiet = 0 if self._has_work else quiet + 1
            if not quiet:
                self._sync()
            elif quiet >= QUIET_GROUPS:
                self._sleep()
                quiet = 0
        self._sync()

    @property
    def _has_work(self) -> bool:
        return bool(self.spool.unsynced or self._waiting or self.problem)

    def _sleep(self) -> None:
        self._woken.clear()
        self.asleep = True
        # What was appended a moment before did not see it asleep.
        if self._has_work or self._ending.is_set():
            self.wake()
        self._woken.wait()

    def _sync(self) -> None:
        # Before the sync: it is for those whose records are there by now.
        waiting, self._waiting = self._waiting, []
        self.problem = self._failure()
        for each in waiting:
            with suppress(RuntimeError):  # its loop is closed: nobody waits
                each.get_loop().call_soon_threadsafe(_tell, each, self.problem)
        if self.problem is not None:
            self._ending.wait(RETRY_SECONDS)

    def _failure(self) -> OSError | None:
        try:
            self.spool.sync()
        except OSError as error:
            return error
        return None


def _tell(waiting: asyncio.Future[None], failure: OSError | None) -> None:
    if waiting.done():
        return
    if failure is None:
        waiting.set_result(None)
    else:
        waiting.set_exception(failure)
