"""The worker's side: a gateway that gets its socket and its configuration from the supervisor, and its orders."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from attrs import define, field

from qlens.config import Draft, draft
from qlens.crashes import Lines, guard_loop, guard_output
from qlens.errors import Fault, StartupError
from qlens.gateway import Gateway
from qlens.paths import health_of
from qlens.server import Server, served, spare_the_collector
from qlens.workers.channel import Channel, ChannelClosed
from qlens.workers.merged import collected

log = logging.getLogger("qlens")

_LAST_SECONDS = 2
"""How long the supervisor may take to take the last metrics."""


def main(argv: Sequence[str]) -> int:
    """Serve as one worker: the configuration's path, the worker's number, two descriptors, a path to listen on."""
    config, number, client, control, admin = argv
    _log_as(int(number))
    for order in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        # They are for the supervisor, who passes them on; a handler, unlike SIG_IGN, is not left to child processes.
        signal.signal(order, lambda *_: None)
    return asyncio.run(
        _working(Path(config), int(number), (_adopted(int(client)), _adopted(int(control))), Path(admin))
    )


async def _working(config: Path, number: int, sockets: tuple[socket.socket, socket.socket], admin: Path) -> int:
    client, control = sockets
    guard_loop()
    return await Worker(config, client, admin, Gateway(worker=number)).work(control)


def _stay_on_one_cpu(number: int) -> None:
    """Take one of the CPUs that the gateway may use, in turn; raises StartupError when that cannot be done.

    On two cores that makes some 8 % more calls, most of it with a ledger, whose thread shares Python's lock with the
    event loop.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise StartupError([Fault("server.pin_workers", "this system cannot keep a process on one CPU: leave it out")])
    cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cpus[number % len(cpus)]})


def _adopted(descriptor: int) -> socket.socket:
    taken = socket.socket(fileno=descriptor)
    taken.set_inheritable(False)
    return taken


def _log_as(number: int) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines(f"%(asctime)s %(levelname)s %(name)s worker {number}: %(message)s", number))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    guard_output()


class _Lines(Lines):
    """Names the worker in every line, those of a traceback included."""

    def __init__(self, layout: str, number: int) -> None:
        super().__init__(layout)
        self._number = number

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).replace("\n", f"\nworker {self._number}: ")


@define(eq=False)
class Worker:
    """One process that serves: opens, serves, reloads and stops when it is told to, and stops when nobody can tell."""

    path: Path
    client: socket.socket
    admin: Path
    gateway: Gateway
    _server: Server | None = field(default=None, init=False)
    _stop: asyncio.Event = field(factory=asyncio.Event, init=False)
    _over: asyncio.Event = field(factory=asyncio.Event, init=False)
    _life: asyncio.Task[None] | None = field(default=None, init=False)

    async def work(self, control: socket.socket) -> int:
        """Do as the supervisor says, to the end; returns the exit code: 2 when the configuration cannot be opened."""
        channel = await Channel.over(control, self.answer)
        listening = asyncio.create_task(channel.listen())
        # The other end closes when the supervisor dies, however it dies: a worker does not outlive it.
        listening.add_done_callback(lambda _: self.stop())
        await self._over.wait()
        self.client.close()
        with contextlib.suppress(ChannelClosed, TimeoutError):
            await asyncio.wait_for(channel.ask("last", metrics=collected(self.gateway.metrics.registry)), _LAST_SECONDS)
        if listening.done():
            with contextlib.suppress(OSError):
                self.admin.parent.rmdir()  # nobody else is there to do it; the last worker succeeds
        await channel.close()
        await listening
        return 0 if self._stop.is_set() else 2

    async def answer(self, what: str, details: Mapping[str, Any]) -> dict[str, Any]:
        """Do what was asked; what is wrong comes back as faults."""
        try:
            return await self._do(what, details)
        except StartupError as error:
            return {"faults": [(fault.path, fault.message) for fault in error.faults]}
        except Exception as error:
            log.exception("cannot %s", what)
            return {"faults": [("", f"{what} failed: {type(error).__name__}: {error}")]}

    async def _do(self, what: str, details: Mapping[str, Any]) -> dict[str, Any]:
        if what == "metrics":
            return {"metrics": collected(self.gateway.metrics.registry)}
        if what == "health":
            return health_of(self.gateway)
        if what == "open":
            return {"banner": await self._open(self._drafted(details["text"]))}
        if what == "serve":
            assert self._server is not None
            await self._server.start()
            spare_the_collector()
        elif what == "reload":
            await self.gateway.load(partial(self._drafted, details["text"]))
        elif what == "stop":
            self.stop()
        return {}

    def stop(self) -> None:
        """Drain and end; during the start, give it up."""
        if self._stop.is_set():
            return
        self._stop.set()
        if self._life is None:
            self._over.set()
        elif self._server is None:
            self._life.cancel()

    def _drafted(self, text: str) -> Draft:
        return draft(text, folder=self.path.parent, source=str(self.path))

    async def _open(self, found: Draft) -> list[str]:
        if found.config.server.pin_workers:
            _stay_on_one_cpu(self.gateway.worker)  # first: threads are where the one was that started them
        opened: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()
        self._life = asyncio.create_task(self._live(found, opened))
        self._life.add_done_callback(lambda _: self._ended(opened))
        return await opened

    def _ended(self, opened: asyncio.Future[list[str]]) -> None:
        if not opened.done():
            opened.set_exception(StartupError([Fault("", "told to stop before it served")]))
        self._over.set()

    async def _live(self, found: Draft, opened: asyncio.Future[list[str]]) -> None:
        try:
            async with served(self.gateway, found, (self.client, self._listener())) as server:
                banner = self.gateway.banner()
                self._server = server
                opened.set_result(banner)
                await self._stop.wait()
        except Exception as error:
            if opened.done():
                log.exception("ended in disorder")
            else:
                opened.set_exception(error)
        finally:
            self.admin.unlink(missing_ok=True)

    def _listener(self) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self.admin))
        return listener


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
