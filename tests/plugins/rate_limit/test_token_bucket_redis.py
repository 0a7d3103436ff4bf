"""`token_bucket` on a Redis: the same decisions as in memory, leases, and what happens while the store is away."""

from __future__ import annotations

import asyncio
import hashlib
import json
import signal
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import pytest
import pytest_asyncio

from qlens.testing import Response, Running, Scripted, running, upstream
from qlens.testing.faults import FaultProxy, fault_proxy
from qlens.testing.redis import RedisServer, redis_cluster, redis_server
from qlens_plugins.rate_limit.token_bucket import Rule
from qlens_plugins.rate_limit.token_bucket.memory import Levels, Seats
from qlens_plugins.rate_limit.token_bucket.meters import MICROSECOND, Meter, Rules
from qlens_plugins.rate_limit.token_bucket.plans import Place, Plan, Share
from qlens_plugins.rate_limit.token_bucket.purses import Purse
from qlens_plugins.rate_limit.token_bucket.script import TAKE, AskedBucket, AskedPlace, arguments

pytestmark = pytest.mark.asyncio(loop_scope="module")

PATH = "/v1/chat/completions"
CALL = {"model": "small", "messages": [{"role": "user", "content": "hello"}]}
KEYS = {"sk-example-a1": ("a1", "acme"), "sk-example-a2": ("a2", "acme"), "sk-example-b": ("b", "bolt")}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[RedisServer]:
    async with redis_server() as found:
        yield found


@pytest_asyncio.fixture(loop_scope="module")
async def redis(server: RedisServer) -> RedisServer:
    """An empty Redis."""
    await server.command("FLUSHALL")
    return server


def key_file() -> str:
    rows = []
    for key, (id_, tenant) in KEYS.items():
        digest = hashlib.sha256(key.encode()).hexdigest()
        rows.append(f"- {{id: {id_}, hash: 'sha256:{digest}', tenant: {tenant}}}")
    return "\n".join(["keys:", *rows])


def config(store: dict[str, Any], limits: list[dict[str, Any]], url: str = "", backup: str = "") -> str:
    def provider(at: str) -> dict[str, Any]:
        echo = {"plugin": "echo"}
        return {"plugin": "openai", "base_url": at, "api_key": "sk-example-upstream"} if at else echo

    def targets(model: str) -> list[dict[str, str]]:
        return [{"provider": "up", "model": model}, {"provider": "backup", "model": model}]

    return json.dumps(
        {
            "pipeline": {
                "auth": [{"plugin": "api_keys", "file": "keys.yaml"}, {"plugin": "anonymous"}],
                "rate_limit": [{"plugin": "token_bucket", "store": {"kind": "redis", **store}, "limits": limits}],
            },
            "providers": {"up": provider(url), "backup": provider(backup)},
            "models": {
                "small": {"max_output_tokens": 1000, "targets": targets("small")},
                "other": {"max_output_tokens": 1000, "targets": targets("other")},
            },
        }
    )


@asynccontextmanager
async def replicas(text: str, count: int) -> AsyncIterator[list[Running]]:
    """So many gateways with one configuration."""
    async with running(text, files={"keys.yaml": key_file()}) as first:
        if count == 1:
            yield [first]
            return
        async with replicas(text, count - 1) as others:
            yield [first, *others]


def at(server: RedisServer | FaultProxy, **more: Any) -> dict[str, Any]:
    # Wide, as other work on this machine must not look like a slow Redis, unless a test is about that.
    return {"url": f"redis://127.0.0.1:{server.port}", "timeout_ms": 1000, **more}


async def post(gateway: Running, key: str | None = None, **fields: Any) -> Response:
    return await gateway.post(PATH, {**CALL, **fields}, key=key)


async def statuses(gateways: Sequence[Running], count: int, key: str | None = None, **fields: Any) -> Counter[int]:
    """Of so many calls at once, spread over gateways."""
    calls = (post(gateways[number % len(gateways)], key, **fields) for number in range(count))
    return Counter(answer.status for answer in await asyncio.gather(*calls))


def asked(gateway: Running) -> int:
    """How many scripts a gateway has sent."""
    calls: int = gateway.plugin("rate_limit", "token_bucket")._limits.store.calls
    return calls


async def until_store(gateway: Running, *, ok: bool, seconds: float) -> None:
    async with asyncio.timeout(seconds):
        while gateway.plugin("rate_limit", "token_bucket").health().ok is not ok:
            await asyncio.sleep(0.01)


# --- the same decisions as in memory -----------------------------------------------------------


def _number(chance: Random) -> int:
    return chance.randint(1, 100) if chance.random() < 0.5 else chance.randint(1_000_000, 120_000_000)


class Twin:
    """One plan in memory whose clock shows what the server's showed."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.now = 0
        levels = self.levels = Levels(lambda: self.now)
        made = Rules.of(rules)

        def share(meter: Meter) -> Share[Any]:
            return Share(
                meter, (meter.name, "tenant", "acme"), levels.level(meter, (meter.name,), ""), meter.unit, meter.room
            )

        self.plan: Plan[Any, Any] = Plan(
            caller=None,  # type: ignore[arg-type]
            model=None,
            requests=tuple(share(meter) for meter in made.meters if meter.kind == "requests"),
            tokens=tuple(share(meter) for meter in made.meters if meter.kind == "tokens"),
            places=tuple(Place(cap, (cap.name, "tenant", "acme"), Seats(cap, "")) for cap in made.caps),
            needs_bound=False,
        )

    def decide(self, tokens: int) -> int:
        """Picoseconds to wait: 0 for a call that passes, -1 for one that waits for a place."""
        if self.levels.take(self.plan, tokens) is None:
            return 0
        waits = [
            share.meter.wait(share.level.full_at, self.now, share.quantity(tokens))
            for share in self.plan.taking(tokens)
        ]
        return max(waits) if max(waits, default=0) > 0 else -1


@pytest.mark.parametrize("seed", range(40))
async def test_the_script_decides_as_memory_does(server: RedisServer, seed: int) -> None:
    chance = Random(seed)
    rates = [(_number(chance), _number(chance), chance.randint(1, 600)) for _ in range(chance.randint(1, 3))]
    most = chance.randint(1, 8)
    histories = [
        (
            [chance.randint(0, 220) for _ in range(chance.randint(0, 6))],
            chance.randint(-150, 150),
            chance.random() < 0.5,
        )
        for _ in range(chance.randint(1, 12))
    ]
    rules = [
        Rule("tenant", requests, tokens, most if not number else None, burst)
        for number, (requests, tokens, burst) in enumerate(rates)
    ]
    twin = Twin(rules)
    await server.command("FLUSHALL")
    # Percents of the lowest rate: so that no wait comes near 2^53 picoseconds, two and a half hours.
    percent = max(1, min(tokens for _, tokens, _ in rates) // 100)
    running_calls = 0
    for percents, percents_owed, ends in histories:
        calls, correction = [each * percent for each in percents], percents_owed * percent
        buckets = [
            AskedBucket(
                share.meter.name, share.unit, share.room, share.meter.kind == "tokens",
                owed=correction * share.unit if share.meter.kind == "tokens" else 0,
            )
            for share in twin.plan.shares
        ]  # fmt: skip
        places = [AskedPlace("places", place.cap.most, running_calls) for place in twin.plan.places]
        keys, args = arguments("me", 10_000, buckets, places, calls)
        verdicts, told, now = await server.command("EVAL", TAKE.text, len(keys), *keys, *args)
        twin.now = now * MICROSECOND
        for share in twin.plan.tokens:
            share.level.full_at = max(twin.now, max(twin.now, share.level.full_at) + correction * share.unit)
        for tokens, refused, wait in zip(calls, verdicts[::2], verdicts[1::2], strict=True):
            expected = twin.decide(tokens)
            assert (0 if not refused else wait or -1) == expected
            running_calls += not refused
        for number, share in enumerate(twin.plan.shares):
            assert told[2 * number] == max(0, share.level.full_at - twin.now)
        assert told[-1] == running_calls
        if ends and running_calls:
            running_calls -= 1
            for place in twin.plan.places:
                place.seats.running -= 1


async def test_what_was_let_pass_alone_empties_a_bucket_at_most_however_often_it_is_said(server: RedisServer) -> None:
    """An answer that comes too late is taken for none, and what was said is said again."""
    await server.command("FLUSHALL")
    second = 10**12
    said = AskedBucket("alone", second, 60 * second, tokens=False, alone=20 * second)
    for missing in (20, 40, 60, 60, 60):
        keys, args = arguments("me", 10_000, [said], [], [])
        _, (told, _), _ = await server.command("EVAL", TAKE.text, 1, *keys, *args)
        assert (missing - 10) * second < told <= missing * second


# --- replicas ----------------------------------------------------------------------------------


async def test_of_calls_that_race_over_replicas_exactly_as_many_pass_as_there_is_room_for(redis: RedisServer) -> None:
    limits = [
        {"per": "tenant", "requests_per_minute": 6, "tokens_per_minute": 1000000},
        {"per": "key", "concurrency": 500},
    ]
    async with replicas(config(at(redis, replicas=3), limits), 3) as gateways:
        assert await statuses(gateways, 5) == {200: 5}
        assert await statuses(gateways, 150) == {200: 1, 429: 149}
        refused = await post(gateways[0])
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        assert 0 < int(refused.headers["retry-after-ms"]) <= 10_000


async def test_leases_serve_the_bulk_and_the_edge_is_exact(redis: RedisServer) -> None:
    limits = [{"per": "tenant", "requests_per_minute": 1200}]
    async with replicas(config(at(redis, replicas=2), limits), 2) as gateways:
        room = 1200 - 20  # a second's worth of leases may be used a second late
        answers: Counter[int] = Counter()
        began = asyncio.get_running_loop().time()
        while answers[429] < 100:  # however slow this machine is, the room is used up
            answers += await statuses(gateways, 20)
        seconds = asyncio.get_running_loop().time() - began
        assert room * 0.99 <= answers[200] <= room + 20 * seconds
        assert sum(map(asked, gateways)) < 500  # most of them near the edge, where every call is asked for


async def test_unused_units_go_back_when_their_lease_ends_and_at_the_end(redis: RedisServer) -> None:
    limits = [{"per": "tenant", "requests_per_minute": 60, "burst_seconds": 3600}]
    async with replicas(config(at(redis), limits), 1) as (gateway,):
        purses = gateway.plugin("rate_limit", "token_bucket")._states.purses
        calls = await until_leased(gateway, purses)
        async with asyncio.timeout(3):
            while any(purse.units for purse in purses.values()):
                await asyncio.sleep(0.02)
        assert await missing(redis, "requests per tenant", unit=10**12) <= calls
        calls += await until_leased(gateway, purses)
    assert await missing(redis, "requests per tenant", unit=10**12) <= calls


async def until_leased(gateway: Running, purses: Mapping[str, Purse]) -> int:
    """Call until the process holds some units in advance; how many calls that took."""
    calls = 0
    while not any(purse.units > 8 for purse in purses.values()):
        calls += 1
        assert (await post(gateway)).status == 200
    return calls


async def missing(redis: RedisServer, meter: str, *, unit: int) -> int:
    """How many units a bucket is short of being full."""
    (key,) = [key for key in await redis.command("KEYS", "*") if f":{meter}:" in key]
    was = int((await redis.command("GET", key)).split()[1])
    return -(-was // unit)


async def test_tokens_are_held_and_settled_in_the_store(redis: RedisServer) -> None:
    limits = [{"per": "tenant", "tokens_per_minute": 60}, {"per": "tenant", "tokens_per_minute": 6000}]
    async with replicas(config(at(redis), limits[1:]), 1) as (gateway,):
        assert await statuses([gateway], 5, max_tokens=900) == {200: 5}
        await gateway.settled(5)
    used = sum(receipt.usage.total for receipt in gateway.receipts)
    # What came back meanwhile is not missing any more: 100 tokens a second.
    assert used - 300 <= await missing(redis, "tokens per tenant", unit=10**10) <= used


async def test_places_are_shared_and_a_crashed_process_loses_its_own(redis: RedisServer) -> None:
    limits = [{"per": "tenant", "concurrency": 3}]
    async with upstream() as up, replicas(config(at(redis, slot_seconds=1), limits, up.url), 2) as (first, second):
        up.script(*[Scripted(hang=True)] * 3)
        held = [asyncio.create_task(post(gateway)) for gateway in (first, first, second)]
        await up.arrived(3)
        assert await statuses([first, second], 6) == {429: 6}
        (key,) = await redis.command("KEYS", "*concurrency*")
        await asyncio.sleep(1.5)  # longer than places last without being renewed
        assert await statuses([first, second], 2) == {429: 2}
        first.plugin("rate_limit", "token_bucket")._limits.store._failures = 9  # it never asks again: it is dead
        async with asyncio.timeout(4):
            while (await post(second)).status != 200:
                await asyncio.sleep(0.05)
        assert len(await redis.command("HGETALL", key)) <= 1
        for task in held:
            task.cancel()
        await asyncio.gather(*held, return_exceptions=True)


async def test_a_call_that_leaves_while_it_waits_for_the_store_gives_everything_back(redis: RedisServer) -> None:
    limits = [{"per": "tenant", "requests_per_minute": 1, "concurrency": 1}]
    async with fault_proxy(redis.port) as proxy, replicas(config(at(proxy), limits), 1) as (gateway,):
        proxy.latency = 0.2
        leaving = asyncio.create_task(post(gateway))
        await asyncio.sleep(0.1)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        proxy.latency = 0
        async with asyncio.timeout(3):
            while (await post(gateway)).status != 200:
                await asyncio.sleep(0.05)


async def test_a_model_wide_limit_that_refuses_costs_the_tenant_nothing(redis: RedisServer) -> None:
    limits = [{"per": "tenant", "requests_per_minute": 10}, {"per": "model", "requests_per_minute": 1}]
    async with replicas(config(at(redis), limits), 1) as (gateway,):
        assert (await post(gateway, "sk-example-a1")).status == 200
        for _ in range(4):
            assert (await post(gateway, "sk-example-a1")).status == 429
        await asyncio.sleep(0.1)
        answer = await post(gateway, "sk-example-a1", model="other")
        assert (answer.status, answer.headers["x-ratelimit-remaining-requests"]) == (200, "0")
    assert await missing(redis, "requests per tenant", unit=6 * 10**12) == 2


async def test_a_cluster_takes_limits_of_tenants_models_and_providers() -> None:
    limits = [
        {"per": "tenant", "requests_per_minute": 30, "concurrency": 9},
        {"per": "key", "requests_per_minute": 20},
        {"per": "model", "requests_per_minute": 25},
        {"per": "provider", "requests_per_minute": 1000},
    ]
    async with redis_cluster() as nodes:
        store = {"cluster": [node.url for node in nodes], "timeout_ms": 2000, "replicas": 2}
        async with replicas(config(store, limits), 2) as gateways:
            for key, passes in (("sk-example-a1", 20), ("sk-example-b", 5)):
                found: Counter[int] = Counter()
                for _ in range(24):
                    found[(await post(gateways[_ % 2], key)).status] += 1
                assert abs(found[200] - passes) <= 1  # one may have come back meanwhile
                assert set(found) == {200, 429}
            assert all(gateway.plugin("rate_limit", "token_bucket").health().ok for gateway in gateways)


async def test_an_allowance_is_kept_by_all_replicas(redis: RedisServer) -> None:
    from attrs import evolve

    from qlens import Allowance

    limits = [{"per": "tenant", "requests_per_minute": 1000}]
    async with replicas(config(at(redis, replicas=2), limits), 2) as gateways:
        for gateway in gateways:
            keys = gateway.plugin("auth", "api_keys")
            keys._keys = {
                digest: (key, evolve(caller, allowance=Allowance(requests_per_minute=4)))
                for digest, (key, caller) in keys._keys.items()
            }
        assert await statuses(gateways, 20, "sk-example-a1") == {200: 4, 429: 16}
        assert await statuses(gateways, 20, "sk-example-a2") == {200: 4, 429: 16}


# --- providers ---------------------------------------------------------------------------------


async def test_a_provider_without_room_is_skipped_to_the_next_target(redis: RedisServer) -> None:
    limits = [{"per": "provider", "requests_per_minute": 2, "match": {"provider": ["up"]}}]
    async with (
        upstream() as up,
        upstream() as backup,
        replicas(config(at(redis), limits, up.url, backup.url), 1) as (gateway,),
    ):
        answers = [await post(gateway) for _ in range(4)]
    assert [answer.headers["x-qlens-provider"] for answer in answers] == ["up", "up", "backup", "backup"]
    assert [answer.headers["x-qlens-attempts"] for answer in answers] == ["1"] * 4


# --- the store goes away -----------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["hole", "down", "slow"])
async def test_while_the_store_is_away_each_replica_enforces_its_share(redis: RedisServer, fault: str) -> None:
    limits = [{"per": "tenant", "requests_per_minute": 40, "concurrency": 8}]
    async with fault_proxy(redis.port) as proxy:
        text = config(at(proxy, replicas=2, timeout_ms=50), limits)
        async with replicas(text, 1) as (gateway,):
            assert (await post(gateway)).status == 200
            if fault == "down":
                await proxy.down()
            proxy.hole, proxy.latency = fault == "hole", 0.3 if fault == "slow" else 0
            first = await statuses([gateway], 2)
            assert first == {200: 2}  # nobody is refused because of it
            await until_store(gateway, ok=False, seconds=10)
            found = await statuses([gateway], 4)
            for _ in range(10):
                found += await statuses([gateway], 3)
            assert set(found) == {200, 429}
            # One was known to be taken of the whole, which is half a one of a share; some come back meanwhile.
            assert 16 <= found[200] + first[200] <= 21
            health = (await gateway.get("/readyz")).json()["plugins"]["rate_limit.token_bucket"]
            assert "this process enforces 1/2 of each limit" in health["detail"]
            proxy.hole, proxy.latency = False, 0
            if fault == "down":
                await proxy.up()
            await until_store(gateway, ok=True, seconds=2)
            await asyncio.sleep(0.4)  # what it let pass alone is told to the store
    assert 18 <= await missing(redis, "requests per tenant", unit=15 * 10**11) <= 24


async def test_a_store_that_lost_everything_is_told_what_is_known(redis: RedisServer) -> None:
    limits = [{"per": "tenant", "requests_per_minute": 30}]
    async with replicas(config(at(redis), limits), 1) as (gateway,):
        assert await statuses([gateway], 25) == {200: 25}
        await redis.command("FLUSHALL")
        await redis.command("SCRIPT", "FLUSH")
        found = await statuses([gateway], 20)
        assert found[200] in {5, 6}


async def test_a_reload_keeps_what_the_process_holds(redis: RedisServer) -> None:
    limits = [{"per": "tenant", "requests_per_minute": 6}]
    async with replicas(config(at(redis), limits), 1) as (gateway,):
        assert await statuses([gateway], 4) == {200: 4}
        await gateway.reload(config(at(redis), [*limits, {"per": "key", "requests_per_minute": 100}]))
        assert await statuses([gateway], 4) == {200: 2, 429: 2}


async def test_workers_may_share_a_store(redis: RedisServer) -> None:
    async with replicas(config(at(redis), [{"per": "tenant", "concurrency": 1}]), 1) as (gateway,):
        assert gateway.plugin("rate_limit", "token_bucket").shares == "store"


async def test_a_frozen_store_that_goes_on_answers_nobody_wrongly(redis: RedisServer) -> None:
    limits = [{"per": "tenant", "requests_per_minute": 600}]
    async with replicas(config(at(redis, timeout_ms=50), limits), 1) as (gateway,):
        assert (await post(gateway)).status == 200
        redis.signal(signal.SIGSTOP)
        try:
            assert await statuses([gateway], 10) == {200: 10}
            await until_store(gateway, ok=False, seconds=10)
        finally:
            redis.signal(signal.SIGCONT)
        await until_store(gateway, ok=True, seconds=2)
        assert await statuses([gateway], 10) == {200: 10}
