"""Three gateway processes on one Redis: limits hold over all of them, and while the Redis is not there."""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from attrs import define, field
from e2e.serving import Served, serving

from qlens.testing.faults import FaultProxy, fault_proxy
from qlens.testing.redis import RedisServer, redis_server

pytestmark = pytest.mark.asyncio(loop_scope="module")

REPLICAS = 3
LIMITS: Mapping[str, Mapping[str, float]] = {
    "edge": {"requests_per_minute": 1, "tokens_per_minute": 10_000_000},
    "window": {"requests_per_minute": 6000, "burst_seconds": 2},
    "bulk": {"requests_per_minute": 600_000, "tokens_per_minute": 500_000_000, "concurrency": 500},
    "wide": {"requests_per_minute": 6000},
    **{f"narrow-{fault}": {"requests_per_minute": 120} for fault in ("kill", "freeze", "slow", "flush")},
    "twice": {"requests_per_minute": 600, "burst_seconds": 12},
    "share": {"requests_per_minute": 60},
    "workers": {"requests_per_minute": 6},
}


@define(eq=False)
class Answered:
    """One call: when it was sent and answered, and how."""

    sent: float
    ended: float
    status: int


@define(eq=False)
class Replicas:
    """Gateways that reach one Redis, each through a proxy of its own."""

    redis: RedisServer
    proxies: list[FaultProxy]
    served: list[Served]
    session: aiohttp.ClientSession
    calls: list[tuple[str, Answered]] = field(factory=list)

    async def call(self, model: str, replica: int) -> Answered:
        served, sent = self.served[replica % len(self.served)], time.monotonic()
        body = {"model": model, "max_tokens": 10, "messages": [{"role": "user", "content": "hello"}]}
        async with self.session.post(
            f"{served.url}/v1/chat/completions", json=body, headers={"authorization": f"Bearer {served.key}"}
        ) as answer:
            await answer.read()
            done = Answered(sent, time.monotonic(), answer.status)
        self.calls.append((model, done))
        return done

    async def together(self, model: str, count: int) -> Counter[int]:
        """The statuses of so many calls at once, spread over all replicas."""
        answers = await asyncio.gather(*(self.call(model, number) for number in range(count)))
        return Counter(answer.status for answer in answers)

    @asynccontextmanager
    async def load(self, *models: str, pause: float = 0.02) -> AsyncIterator[None]:
        """Keep calling each model through each replica meanwhile."""
        self.calls.clear()

        async def keep(model: str, replica: int) -> None:
            while True:
                await self.call(model, replica)
                await asyncio.sleep(pause)

        tasks = [asyncio.create_task(keep(model, n)) for model in models for n in range(len(self.served))]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(end, asyncio.CancelledError) for end in ended), ended

    async def metric(self, replica: int, line: str) -> float:
        served = self.served[replica]
        async with self.session.get(f"{served.admin_url}/metrics") as answer:
            text = await answer.text()
        return sum(float(row.rsplit(" ", 1)[1]) for row in text.splitlines() if row.startswith(line))

    async def is_ok(self, replica: int) -> bool:
        async with self.session.get(f"{self.served[replica].url}/readyz") as answer:
            assert answer.status == 200  # a store that is away makes nobody unready
            plugins: dict[str, Any] = (await answer.json())["plugins"]
            return bool(plugins["rate_limit.token_bucket"]["ok"])

    async def until_ok(self, *, ok: bool, replicas: tuple[int, ...] = tuple(range(REPLICAS)), seconds: float) -> None:
        async with asyncio.timeout(seconds):
            for replica in replicas:
                while await self.is_ok(replica) is not ok:
                    await asyncio.sleep(0.02)

    async def asked(self) -> float:
        """How often the store was asked by all replicas together."""
        line = 'qlens_limit_calls_total{limiter="token_bucket",way="asked"}'
        return sum([await self.metric(n, line) for n in range(REPLICAS)])

    def passed(self, model: str) -> list[Answered]:
        return [answer for name, answer in self.calls if name == model and answer.status == 200]


def changes(redis: RedisServer, proxy: FaultProxy, count: int, **server: Any) -> dict[str, Any]:
    limits = {model: {"per": "tenant", "match": {"model": [model]}, **numbers} for model, numbers in LIMITS.items()}
    store = {"kind": "redis", "url": f"redis://127.0.0.1:{proxy.port}", "replicas": count}
    # Past the proxy, and patient: a thousand calls at once hold up the process that makes them and the proxy in it.
    direct = {**store, "url": redis.url, "timeout_ms": 5000}
    edge = {"plugin": "token_bucket", "name": "direct", "store": direct, "limits": [limits.pop("edge")]}
    model = {"max_output_tokens": 100, "targets": [{"provider": "twin", "model": "x"}]}
    return {
        "server": server,
        "pipeline": {
            "rate_limit": [{"plugin": "token_bucket", "store": store, "limits": [*limits.values()]}, edge],
            "cache": [],
            "cost": [],
        },
        "providers": {"twin": {"plugin": "echo"}},
        "models": dict.fromkeys(LIMITS, model),
    }


@asynccontextmanager
async def started(folder: Path, redis: RedisServer, count: int, **server: Any) -> AsyncIterator[Replicas]:
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))
        proxies = [await stack.enter_async_context(fault_proxy(redis.port)) for _ in range(count)]
        processes = ExitStack()
        stack.push_async_callback(asyncio.to_thread, processes.close)

        def start(number: int) -> Served:
            place = folder / f"{number}"
            place.mkdir()
            return processes.enter_context(serving(place, changes=changes(redis, proxies[number], count, **server)))

        served = await asyncio.gather(*(asyncio.to_thread(start, number) for number in range(count)))
        yield Replicas(redis, proxies, list(served), session)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def three(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Replicas]:
    async with redis_server() as redis, started(tmp_path_factory.mktemp("replicas"), redis, REPLICAS) as found:
        yield found


@pytest_asyncio.fixture(loop_scope="module")
async def replicas(three: Replicas) -> AsyncIterator[Replicas]:
    """Well, with full buckets: whatever a test does to the store is over."""
    yield three
    for proxy in three.proxies:
        proxy.latency, proxy.hole = 0, False
    await three.until_ok(ok=True, seconds=5)


async def test_of_a_thousand_calls_at_once_with_room_for_one_exactly_one_passes(replicas: Replicas) -> None:
    assert await replicas.together("edge", 1000) == {200: 1, 429: 999}


async def test_in_no_window_more_passes_than_the_burst_and_what_the_rate_gives(replicas: Replicas) -> None:
    async with replicas.load("window", pause=0):
        await asyncio.sleep(3)
    passed = sorted(replicas.passed("window"), key=lambda answer: answer.sent)
    assert len(passed) > 200  # more than the burst: it goes on at the rate
    for first in passed:
        inside = sorted(answer.ended for answer in passed if answer.sent >= first.sent)
        for count, ended in enumerate(inside, 1):
            assert count <= 200 + 100 * (ended - first.sent) + 1e-6


async def test_leases_make_calls_to_the_store_rare(replicas: Replicas) -> None:
    async with replicas.load("bulk", pause=0):
        await asyncio.sleep(0.5)
        asked = await replicas.asked()
        before = len(replicas.calls)
        await asyncio.sleep(1.5)
        calls = len(replicas.calls) - before
        asked = await replicas.asked() - asked
    assert {answer.status for _, answer in replicas.calls} == {200}
    assert asked <= calls * 0.05


Fault = Callable[[Replicas], Awaitable[None]]


async def kill(replicas: Replicas) -> None:
    replicas.redis.kill()


async def restart(replicas: Replicas) -> None:
    await replicas.redis.start()


async def freeze(replicas: Replicas) -> None:
    replicas.redis.signal(signal.SIGSTOP)


async def thaw(replicas: Replicas) -> None:
    replicas.redis.signal(signal.SIGCONT)


async def slow(replicas: Replicas) -> None:
    for proxy in replicas.proxies:
        proxy.latency = 0.2


async def quick(replicas: Replicas) -> None:
    for proxy in replicas.proxies:
        proxy.latency = 0


@pytest.mark.parametrize(("fault", "mend"), [(kill, restart), (freeze, thaw), (slow, quick)])
async def test_while_the_store_is_away_nobody_is_refused_for_it_and_nobody_gets_more(
    replicas: Replicas, fault: Fault, mend: Fault
) -> None:
    narrow = f"narrow-{fault.__name__}"
    async with replicas.load("wide", narrow, pause=0.05):
        await asyncio.sleep(0.7)
        await fault(replicas)
        await replicas.until_ok(ok=False, seconds=10)
        await asyncio.sleep(1)
        await mend(replicas)
        await replicas.until_ok(ok=True, seconds=10)
        await asyncio.sleep(1)
    statuses = Counter((model, answer.status) for model, answer in replicas.calls)
    assert {status for model, status in statuses if model == "wide"} == {200}
    assert {status for model, status in statuses if model == narrow} == {200, 429}
    passed = replicas.passed(narrow)
    seconds = max(answer.ended for answer in passed) - min(answer.sent for answer in passed)
    assert len(passed) <= 120 + 2 * seconds + 6  # 6: what a lease of each replica may hold, one part in twenty
    assert max(answer.ended - answer.sent for _, answer in replicas.calls) < 2


async def test_one_outage_of_seconds_after_another_is_neither_felt_nor_used(replicas: Replicas) -> None:
    """Killed for seconds, back without its memory, then frozen for seconds: R8, R10 and R11 one after another."""
    async with replicas.load("wide", "twice", pause=0.05):
        await asyncio.sleep(0.7)
        for fault, mend in ((kill, restart), (freeze, thaw)):
            await fault(replicas)
            await replicas.until_ok(ok=False, seconds=5)
            asked, begun = await replicas.asked(), len(replicas.calls)
            await asyncio.sleep(3.5)
            # While the breaker is open no call waits for the store: it is asked by nobody.
            assert len(replicas.calls) - begun > 50
            assert await replicas.asked() - asked <= REPLICAS
            await mend(replicas)
            await replicas.until_ok(ok=True, seconds=2)
            await asyncio.sleep(0.7)
    statuses = Counter((model, answer.status) for model, answer in replicas.calls)
    assert {status for model, status in statuses if model == "wide"} == {200}
    assert {status for model, status in statuses if model == "twice"} == {200, 429}
    passed = replicas.passed("twice")
    seconds = max(answer.ended for answer in passed) - min(answer.sent for answer in passed)
    assert len(passed) <= 120 + 10 * seconds + 6
    # Never nothing either: what comes back at the rate went out to somebody all the time.
    ends = sorted(answer.ended for answer in passed)
    assert max(later - earlier for earlier, later in itertools.pairwise(ends)) < 2.5


async def test_a_store_that_is_flushed_under_load_refuses_nobody_and_gives_no_fresh_bucket(replicas: Replicas) -> None:
    async with replicas.load("wide", "narrow-flush", pause=0.05):
        for _ in range(3):
            await asyncio.sleep(0.6)
            await replicas.redis.command("FLUSHALL")
            await replicas.redis.command("SCRIPT", "FLUSH")
    assert {answer.status for model, answer in replicas.calls if model == "wide"} == {200}
    passed = replicas.passed("narrow-flush")
    seconds = max(answer.ended for answer in passed) - min(answer.sent for answer in passed)
    assert len(passed) <= 120 + 2 * seconds + 6


async def test_a_replica_that_is_cut_off_takes_its_share_and_nobody_else_notices(replicas: Replicas) -> None:
    cut = replicas.proxies[0]
    cut.hole = True
    replicas.calls.clear()
    await replicas.call("wide", 0)
    await replicas.until_ok(ok=False, replicas=(0,), seconds=10)
    alone = [await replicas.call("share", 0) for _ in range(40)]
    seconds = alone[-1].ended - alone[0].sent
    assert 20 <= sum(answer.status == 200 for answer in alone) <= 21 + seconds
    for replica in (1, 2):
        assert await replicas.is_ok(replica)
        assert (await replicas.call("share", replica)).status == 200


async def test_workers_share_the_store_too(tmp_path: Path, replicas: Replicas) -> None:
    async with started(tmp_path, replicas.redis, 1, workers=2) as one:
        assert await one.together("workers", 90) == {200: 6, 429: 84}
        assert json.loads(one.served[0].get("/readyz")[1])["status"] == "ready"
