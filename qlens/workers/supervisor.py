"""Keeps several workers running: starts, restarts, reloads and stops them; holds the sockets and loads no plugin."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
import tempfile
import time
from collections.abc import Coroutine, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from attrs import define, field

import qlens
from qlens import config
from qlens.config import draft, text_of
from qlens.errors import StartupError
from qlens.server import bind, url_of
from qlens.signals import ignore_stops, on_reload, on_stop
from qlens.workers.admin import Admin
from qlens.workers.channel import ChannelClosed
from qlens.workers.child import ANSWER_SECONDS, Child
from qlens.workers.crew import Crew

log = logging.getLogger("qlens")

PAUSES = (0.0, 0.5, 1.0, 2.0, 5.0)
"""Seconds between the end of a worker and the start of its successor, by how many ended before it in a row."""
STEADY_SECONDS = 60.0
"""Who served this long did not end because of how it started."""
TRIES = 3
"""How many workers in a row may end before they are ready, when there is no other that serves."""
CHANGE_SECONDS = 120.0
"""How long a worker may take to change to another configuration."""
END_SECONDS = 60.0
"""How long a worker that has drained may take to settle and to close its plugins."""


@define(eq=False)
class Slot:
    """A worker's number, with the socket that its workers take over from each other."""

    number: int
    listener: socket.socket
    opened: bool = field(default=False, init=False)
    """Whether one of its workers has opened the configuration."""
    served: asyncio.Event = field(factory=asyncio.Event, init=False)
    """Set once one of them has served."""
    ready_at: float | None = field(default=None, init=False)
    """Since when the present one serves."""
    ends: int = field(default=0, init=False)
    """How many of its workers ended soon, in a row."""
    false_starts: int = field(default=0, init=False)
    """How many of them ended before they were ready."""

    def pause(self) -> float:
        """Note that its worker has ended; how long to wait before the next one."""
        self.false_starts = self.false_starts + 1 if self.ready_at is None else 0
        if self.ready_at is not None and time.monotonic() - self.ready_at > STEADY_SECONDS:
            self.ends = 0
        self.ends += 1
        return PAUSES[min(self.ends, len(PAUSES)) - 1]


async def supervise(path: Path, text: str, settings: config.Server) -> int:
    """Serve a configuration with several processes until told to stop; returns the exit code.

    Raises StartupError when an address cannot be had, or when the workers find something wrong at the start.
    """
    stop, reload = asyncio.Event(), asyncio.Event()
    on_stop(stop.set)
    on_reload(reload.set)
    with ExitStack() as held:
        listeners = [held.enter_context(each) for each in shared(settings.host, settings.port, settings.workers)]
        admin = held.enter_context(bind(settings.admin.host, settings.admin.port))
        try:
            folder = held.enter_context(tempfile.TemporaryDirectory(prefix="qlens-", ignore_cleanup_errors=True))
        except OSError as error:
            raise StartupError(f"workers need a folder for their sockets: {error.strerror}; set TMPDIR") from error
        slots = [Slot(number, listener) for number, listener in enumerate(listeners)]
        return await Supervisor(path, text, Crew(settings), slots, Path(folder), stop, reload).run(admin)


def shared(host: str, port: int, count: int) -> list[socket.socket]:
    """Take an address several times: the kernel gives each new connection to one of the sockets.

    With one socket for all, whoever wakes first would take every connection, and all would wake for each.
    """
    if not hasattr(socket, "SO_REUSEPORT"):
        raise StartupError("this system cannot share a port among processes: set server.workers to 1")
    # The first one is not shared: it fails when another gateway has the port, which otherwise would share it too.
    with bind(host, port) as probe, ExitStack() as undo:
        port = probe.getsockname()[1]
        sockets = [undo.enter_context(bind(host, port, shared=True)) for _ in range(count)]
        undo.pop_all()
    return sockets


@define(eq=False)
class Supervisor:
    """All workers of a gateway."""

    path: Path
    text: str
    """The configuration that all have. Whoever starts gets it from here, whatever the file says by then."""
    crew: Crew
    slots: Sequence[Slot]
    folder: Path
    """Where workers listen for what is relayed to them."""
    _stop: asyncio.Event
    _reload: asyncio.Event
    _first_open: asyncio.Event = field(factory=asyncio.Event, init=False)
    _all_open: asyncio.Event = field(factory=asyncio.Event, init=False)
    _may_serve: asyncio.Event = field(factory=asyncio.Event, init=False)
    _banner: list[str] = field(factory=list, init=False)
    _starting: set[asyncio.Task[Child]] = field(factory=set, init=False)
    _tasks: set[asyncio.Task[None]] = field(factory=set, init=False)

    async def run(self, admin: socket.socket) -> int:
        """Serve until told to stop; returns the exit code."""
        operators = Admin(self.crew, admin)
        doing = [self._serve(operators), self.crew.poll(), *(self._keep(slot) for slot in self.slots)]
        tasks = [asyncio.create_task(each) for each in doing]
        stopped = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({*tasks, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if stopped.done() and not self._all_served():
                log.info("told to stop before it served")
        finally:
            self.crew.stopping = True
            for task in (*tasks, stopped):
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
            await self._end()
            await operators.stop()
            ignore_stops()
        for result in ended:
            if isinstance(result, Exception):
                raise result
        return 0

    async def _serve(self, operators: Admin) -> None:
        """Let the workers serve, say that they are ready, and change their configuration when asked to."""
        await self._all_open.wait()
        await operators.start()
        self._may_serve.set()
        for slot in self.slots:
            await slot.served.wait()
        client = url_of(self.slots[0].listener)
        said = [
            f"qlens {qlens.__version__}: {client} for clients, {url_of(operators.socket)} for operators, "
            f"{len(self.slots)} workers",
            *self._banner,
        ]
        sys.stdout.write("".join(f"{line}\n" for line in said))
        sys.stdout.flush()
        while True:
            await self._reload.wait()
            self._reload.clear()
            await self._change()

    async def _end(self) -> None:
        """Drain all workers and wait for their end."""
        await asyncio.gather(*self._starting, return_exceptions=True)
        # Before they close theirs: whoever closes last refuses the connections that nobody has taken yet.
        for slot in self.slots:
            slot.listener.close()
        for child in self.crew.children:
            self._later(self._dismiss(child))
        while self._tasks:
            await asyncio.wait(set(self._tasks))

    def _later(self, doing: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(doing)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- one worker after another --------------------------------------------------------------

    async def _keep(self, slot: Slot) -> None:
        """See to it that a worker runs; raises StartupError when none can."""
        while True:
            child = await self._run_one(slot)
            if child is not None and child.dismissed:
                log.info("worker %d: process %d drains; the next one starts at once", slot.number, child.process.pid)
                continue
            end = "it could not be started" if child is None else f"process {child.process.pid} ended: {child.end}"
            pause = slot.pause()
            early = " before it was ready" if slot.false_starts else ""
            if slot.false_starts >= TRIES and not self.crew.ready():
                raise StartupError(
                    f"worker {slot.number}: {end}{early}, as {TRIES - 1} others before it, and no other worker serves; "
                    "what they wrote stands above"
                )
            log.error("worker %d: %s%s; the next one starts %s", slot.number, end, early, _in(pause))
            await asyncio.sleep(pause)

    async def _run_one(self, slot: Slot) -> Child | None:
        """Run a worker until it has ended or shall be followed by another one; None when there is no process."""
        slot.ready_at = None
        starting = asyncio.create_task(self._start(slot))
        self._starting.add(starting)
        starting.add_done_callback(self._starting.discard)
        try:
            child = await asyncio.shield(starting)
        except OSError as error:
            log.error("worker %d: %s", slot.number, error)
            return None
        try:
            await self._make_ready(slot, child)
        except ChannelClosed:
            pass
        except StartupError as error:
            if not self._all_served():
                raise  # whoever started the gateway waits for exactly this
            for fault in error.faults:
                log.error("worker %d cannot start: %s", slot.number, fault)
            child.kill()
        await child.leaving.wait()
        return child

    async def _start(self, slot: Slot) -> Child:
        self.crew.starts += 1
        admin = self.folder / f"{self.crew.starts}.sock"
        child = await Child.start(slot.number, self.path, slot.listener, admin)
        self.crew.children.append(child)
        self._later(self._see_off(child))
        return child

    async def _make_ready(self, slot: Slot, child: Child) -> None:
        if slot.number:
            # The first one finds the faults, and makes files that must be made once.
            await self._first_open.wait()
        text = self.text
        opened = await child.order("open", text=text)
        if not self._first_open.is_set():
            self._banner = opened["banner"]
            self._first_open.set()
        slot.opened = True
        if all(other.opened for other in self.slots):
            self._all_open.set()
        await self._may_serve.wait()
        await child.order("serve")
        while text is not self.text:  # it has changed meanwhile
            text = self.text
            await child.order("reload", text=text)
        child.state = "ready"
        slot.ready_at = time.monotonic()
        if slot.served.is_set():
            log.info("worker %d serves again, process %d", slot.number, child.process.pid)
        slot.served.set()

    def _all_served(self) -> bool:
        return all(slot.served.is_set() for slot in self.slots)

    async def _see_off(self, child: Child) -> None:
        """Wait for a worker's end, and keep what it counted."""
        await child.ended()
        self.crew.lose(child)

    async def _dismiss(self, child: Child) -> None:
        """Have a worker drain and end. One that does not hear of it in that time, or cannot end, is killed."""
        seconds = self.crew.settings.accept_seconds + self.crew.settings.drain_seconds
        try:
            async with asyncio.timeout(max(seconds, ANSWER_SECONDS)):
                await child.stop()
            async with asyncio.timeout(seconds + END_SECONDS):
                await child.process.wait()
        except TimeoutError:
            log.error("worker %d, process %d, hangs and is killed", child.number, child.process.pid)
            child.kill()

    # --- the configuration ---------------------------------------------------------------------

    async def _change(self) -> None:
        """Change to what the file says now: one worker tries it, and the others follow."""
        first = next(iter(self.crew.ready()), None)
        if first is None:
            log.error("the configuration stays as it is: no worker is ready; try again when one is")
            return
        try:
            text = await asyncio.to_thread(text_of, self.path)
            async with asyncio.timeout(CHANGE_SECONDS):
                await first.order("reload", text=text)
        except StartupError as error:
            for fault in error.faults:
                log.error("the configuration stays as it is: %s", fault)
            return
        except TimeoutError:
            log.error("the configuration stays as it is: worker %d does not get done with the new one", first.number)
            self._later(self._dismiss(first))
            return
        except ChannelClosed:
            log.error("the configuration stays as it is: worker %d ended while it changed to the new one", first.number)
            return
        self.text = text
        others = [child for child in self.crew.ready() if child is not first]
        # Not checked for faults: a worker has found none.
        found = await asyncio.to_thread(draft, text, folder=self.path.parent, source=str(self.path))
        self.crew.settings = found.config.server
        await asyncio.gather(*(self._follow(child, text) for child in others))
        log.info("loaded configuration %s", found.config.version)

    async def _follow(self, child: Child, text: str) -> None:
        """Have a worker take a configuration that another one has taken, or else one after it."""
        try:
            async with asyncio.timeout(CHANGE_SECONDS):
                await child.order("reload", text=text)
        except ChannelClosed:
            pass  # it ended; its successor gets the new one
        except (StartupError, TimeoutError) as error:
            faults = error.faults if isinstance(error, StartupError) else ["it does not get done"]
            for fault in faults:
                log.error("worker %d cannot change as the others did: %s", child.number, fault)
            self._later(self._dismiss(child))


def _in(seconds: float) -> str:
    return f"in {seconds:g} s" if seconds else "at once"
