"""A TCP proxy in front of a server that a test makes slow, silent, rude or absent."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from attrs import define, field

_CHUNK = 65536


@define(eq=False)
class FaultProxy:
    """Passes bytes on, as it is told; made by `fault_proxy`."""

    target: int
    """The server's port on this machine."""
    seed: int = 0
    port: int = field(init=False, default=0)
    latency: float = field(init=False, default=0)
    """Seconds by which the server's bytes come late; their order stays."""
    jitter: float = field(init=False, default=0)
    """Up to so many seconds more, drawn from the seed."""
    hole: bool = field(init=False, default=False)
    """While true, bytes vanish in both directions, and connections stay open."""
    connections: int = field(init=False, default=0)
    """How many were made so far."""
    _random: random.Random = field(init=False, repr=False)
    _server: asyncio.Server | None = field(init=False, default=None, repr=False)
    _open: set[asyncio.StreamWriter] = field(factory=set, init=False, repr=False)
    _tasks: set[asyncio.Task[None]] = field(factory=set, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._random = random.Random(self.seed)  # noqa: S311 - a drawn delay is no secret

    async def up(self) -> None:
        """Take connections, on the same port as before."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def down(self) -> None:
        """Refuse connections, and close those that are open."""
        assert self._server is not None
        self._server.close()
        self.reset()
        await self._server.wait_closed()

    def reset(self) -> None:
        """End every connection with a TCP reset."""
        for writer in self._open:
            if (connection := writer.get_extra_info("socket")) is not None:
                with suppress(OSError):
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    async def close(self) -> None:
        """Stop, and leave nothing behind."""
        await self.down()
        for task in (tasks := list(self._tasks)):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.get_running_loop().create_task(self._pass_on(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.close()
            return
        else:
            self._open.add(back)
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._pump(reader, back, is_late=False))
                    group.create_task(self._pump(there, writer, is_late=True))
            except* OSError:
                pass  # one side has left
            self._open.discard(back)
            back.transport.abort()
        finally:
            self._open.discard(writer)
            writer.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_late: bool) -> None:
        loop = asyncio.get_running_loop()
        due = 0.0
        while chunk := await reader.read(_CHUNK):
            if self.hole:
                continue
            delay = self.latency + self.jitter * self._random.random() if is_late else 0
            if delay:
                due = max(due, loop.time() + delay)
                await asyncio.sleep(due - loop.time())
            writer.write(chunk)
            await writer.drain()
        raise ConnectionResetError  # ends the other direction too


@asynccontextmanager
async def fault_proxy(target: int, *, seed: int = 0) -> AsyncIterator[FaultProxy]:
    """A proxy on a free loopback port in front of a server's port."""
    proxy = FaultProxy(target, seed)
    await proxy.up()
    try:
        yield proxy
    finally:
        await proxy.close()
