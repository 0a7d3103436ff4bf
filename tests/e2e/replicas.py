"""Gateway processes that share one Redis, each through a proxy of its own, and calls that are counted and timed."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
from attrs import define, field, frozen
from e2e.clocks import WrongClock
from e2e.serving import Served, serving

from qlens.testing.faults import FaultProxy, fault_proxy
from qlens.testing.redis import RedisServer


@frozen
class Answered:
    """One call: when it was sent and answered, and how."""

    sent: float
    ended: float
    status: int
    code: str | None = None
    """Which error it was."""

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.ended - self.sent


@define(eq=False)
class Replicas:
    """Gateways that reach one Redis, each through a proxy of its own."""

    redis: RedisServer
    proxies: list[FaultProxy]
    served: list[Served]
    session: aiohttp.ClientSession
    clocks: Sequence[WrongClock] = ()
    """Those of the replicas, where they are wrong."""
    calls: list[tuple[str, Answered]] = field(factory=list)

    async def call(self, model: str, replica: int) -> Answered:
        """Make a call, and note it."""
        served, sent = self.served[replica % len(self.served)], time.monotonic()
        body = {"model": model, "max_tokens": 10, "messages": [{"role": "user", "content": "hello " * 20}]}
        async with self.session.post(
            f"{served.url}/v1/chat/completions", json=body, headers={"authorization": f"Bearer {served.key}"}
        ) as answer:
            raw = await answer.read()
            ended = time.monotonic()
        code = None if answer.status == 200 else json.loads(raw)["error"]["code"]
        done = Answered(sent, ended, answer.status, code)
        self.calls.append((model, done))
        return done

    async def together(self, model: str, count: int) -> Counter[int]:
        """The statuses of so many calls at once, spread over all replicas."""
        answers = await asyncio.gather(*(self.call(model, number) for number in range(count)))
        return Counter(answer.status for answer in answers)

    @asynccontextmanager
    async def load(self, *models: str, pause: float = 0.02) -> AsyncIterator[None]:
        """Keep calling each model through each replica meanwhile; every call comes to its end."""
        self.calls.clear()
        over = asyncio.Event()

        async def keep(model: str, replica: int) -> None:
            while not over.is_set():
                await self.call(model, replica)
                await asyncio.sleep(pause)

        tasks = [asyncio.create_task(keep(model, n)) for model in models for n in range(len(self.served))]
        try:
            yield
        finally:
            over.set()
            await asyncio.gather(*tasks)

    async def metric(self, replica: int, line: str) -> float:
        """The sum of a metric's lines that begin so."""
        served = self.served[replica]
        async with self.session.get(f"{served.admin_url}/metrics") as answer:
            text = await answer.text()
        return sum(float(row.rsplit(" ", 1)[1]) for row in text.splitlines() if row.startswith(line))

    async def asked(self) -> float:
        """How often the limits' store was asked by all replicas together."""
        line = 'qlens_limit_calls_total{limiter="token_bucket",way="asked"}'
        return sum([await self.metric(n, line) for n in range(len(self.served))])

    async def health(self, replica: int) -> Mapping[str, Any]:
        """What the plugins of a replica say of themselves, by their names."""
        async with self.session.get(f"{self.served[replica].url}/readyz") as answer:
            assert answer.status == 200  # a store that is away makes nobody unready
            plugins: dict[str, Any] = (await answer.json())["plugins"]
            return plugins

    async def is_ok(self, replica: int, plugin: str) -> bool:
        """Whether a plugin of a replica says that it is well."""
        return bool((await self.health(replica))[plugin]["ok"])

    async def until_ok(
        self,
        *,
        ok: bool,
        seconds: float,
        replicas: Sequence[int] | None = None,
        plugins: Sequence[str] = ("rate_limit.token_bucket",),
    ) -> None:
        """Wait until plugins of replicas, by default of all, say that they are well, or that they are not."""
        ends = time.monotonic() + seconds
        for replica in range(len(self.served)) if replicas is None else replicas:
            for plugin in plugins:
                while (health := await self.health(replica))[plugin]["ok"] is not ok:
                    assert time.monotonic() < ends, (f"not within {seconds:.2f} s", replica, health)
                    await asyncio.sleep(0.02)

    def answers(self, model: str) -> list[Answered]:
        """All calls of a model since the load began."""
        return [answer for name, answer in self.calls if name == model]

    def passed(self, model: str) -> list[Answered]:
        """Those that were served."""
        return [answer for answer in self.answers(model) if answer.status == 200]


Changes = Callable[[int, FaultProxy], Mapping[str, Any]]
"""What the configuration of a replica has, by its number and the proxy through which it reaches the Redis."""
Aheads = Sequence[float]
"""By how many seconds the time of day of each replica is wrong."""


@asynccontextmanager
async def replicated(
    folder: Path, redis: RedisServer, count: int, changes: Changes, aheads: Aheads = ()
) -> AsyncIterator[Replicas]:
    """Start so many gateways on config/qlens.yaml, each with changes and, where they are given, clocks of its own."""
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))
        proxies = [await stack.enter_async_context(fault_proxy(redis.port)) for _ in range(count)]
        processes = ExitStack()
        stack.push_async_callback(asyncio.to_thread, processes.close)
        places = [folder / f"{number}" for number in range(count)]
        for place in places:
            place.mkdir()
        clocks = [WrongClock(places[n], monotonic=1000.0 * n, ahead=ahead) for n, ahead in enumerate(aheads)]

        def start(number: int) -> Served:
            env = clocks[number].env if clocks else None
            return processes.enter_context(serving(places[number], changes=changes(number, proxies[number]), env=env))

        served = await asyncio.gather(*(asyncio.to_thread(start, number) for number in range(count)))
        yield Replicas(redis, proxies, list(served), session, clocks)


# --- what happens to the Redis -----------------------------------------------------------------

Fault = Callable[[Replicas], Awaitable[None]]


async def kill(replicas: Replicas) -> None:
    """End it as a crash does."""
    replicas.redis.kill()


async def restart(replicas: Replicas) -> None:
    """Start it again, empty."""
    await replicas.redis.start()


async def freeze(replicas: Replicas) -> None:
    """Stop it: connections stay, and nothing is answered."""
    replicas.redis.signal(signal.SIGSTOP)


async def thaw(replicas: Replicas) -> None:
    """Let it go on, with all that was sent to it meanwhile."""
    replicas.redis.signal(signal.SIGCONT)


async def slow(replicas: Replicas) -> None:
    """Let every answer take 200 ms, four times as long as a call waits."""
    for proxy in replicas.proxies:
        proxy.latency = 0.2


async def quick(replicas: Replicas) -> None:
    """Let answers come at once again."""
    for proxy in replicas.proxies:
        proxy.latency = 0


async def flush(replicas: Replicas) -> None:
    """Let it forget all, scripts too."""
    await replicas.redis.command("FLUSHALL")
    await replicas.redis.command("SCRIPT", "FLUSH")
