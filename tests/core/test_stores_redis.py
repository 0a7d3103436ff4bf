"""The Redis that plugins share: scripts within a time limit, a breaker, and what happens when it goes away."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from attrs import frozen

from qlens import RedisSettings, RedisStore, Script, StartupError, StoreUnavailable, Url, redis_store
from qlens.gateway import Gateway
from qlens.stores.redis import SentinelSettings
from qlens.testing import running
from qlens.testing.faults import fault_proxy
from qlens.testing.redis import redis_cluster, redis_sentinel, redis_server

ADD = Script("add", "return redis.call('INCRBY', KEYS[1], ARGV[1])")
ECHO = Script("echo", "return ARGV[1]")


@asynccontextmanager
async def opened(settings: RedisSettings) -> AsyncIterator[RedisStore]:
    gateway = Gateway()
    try:
        async with redis_store(gateway, settings) as store:
            yield store
        assert not gateway.stores
    finally:
        await gateway.http.aclose()


def at(port: int, timeout_ms: int = 50) -> RedisSettings:
    return RedisSettings(url=Url(f"redis://127.0.0.1:{port}"), timeout_ms=timeout_ms)


async def until(store: RedisStore, *, ok: bool, seconds: float) -> None:
    async with asyncio.timeout(seconds):
        while store.ok is not ok:
            await asyncio.sleep(0.01)


async def test_a_store_is_closed_though_a_cancellation_is_lost() -> None:
    """By redis-py, while it gives up a connection whose password was wrong."""
    async with redis_server() as server:
        await server.command("ACL", "SETUSER", "qlens", "on", ">right", "~*", "&*", "+@all")
        wrong = RedisSettings(url=Url(f"redis://qlens:other@127.0.0.1:{server.port}"), timeout_ms=1000)
        for turns in range(12):
            async with asyncio.timeout(10), opened(wrong) as store:
                assert not store.ok
                for _ in range(turns):  # each time the cancellation comes to another place
                    await asyncio.sleep(0)


async def test_scripts_that_are_asked_for_together_each_get_their_own_answer() -> None:
    async with redis_server() as server, opened(at(server.port, 2000)) as store:
        answers = await asyncio.gather(*(store.run(ADD, [store.key("n", slot=str(n))], [n]) for n in range(200)))
        assert answers == list(range(200))
        async with asyncio.timeout(5):  # the server may not have noticed yet that who looked for it has gone
            while (await server.command("INFO", "clients"))["connected_clients"] != 2:  # this question is one
                await asyncio.sleep(0.01)


async def test_a_server_that_forgot_its_scripts_is_told_them_again() -> None:
    async with redis_server() as server, opened(at(server.port, 2000)) as store:
        assert await store.run(ADD, ["n"], [1]) == 1
        await server.command("SCRIPT", "FLUSH")
        assert await asyncio.gather(*(store.run(ADD, ["n"], [1]) for _ in range(3))) == [2, 3, 4]
        assert store.ok


async def test_a_script_that_fails_fails_alone() -> None:
    async with redis_server() as server, opened(at(server.port, 2000)) as store:
        wrong = store.run(Script("wrong", "return redis.call('NOSUCH')"), ["n"], [])
        right = store.run(ADD, ["n"], [5])
        answers = await asyncio.gather(wrong, right, return_exceptions=True)
        assert isinstance(answers[0], StoreUnavailable)
        assert answers[1] == 5


async def test_a_late_answer_is_read_by_nobody() -> None:
    async with redis_server() as server, fault_proxy(server.port) as proxy, opened(at(proxy.port)) as store:
        assert await store.run(ECHO, ["n"], ["first"]) == b"first"
        proxy.latency = 0.12
        with pytest.raises(StoreUnavailable, match="no answer within 50 ms"):
            await store.run(ECHO, ["n"], ["late"])
        proxy.latency = 0
        for number in range(20):
            answer = await _asked(store, f"{number}")
            assert answer in {None, f"{number}".encode()}
            await asyncio.sleep(0.01)


async def _asked(store: RedisStore, text: str) -> bytes | None:
    try:
        answer: bytes = await store.run(ECHO, ["n"], [text])
    except StoreUnavailable:
        return None
    return answer


async def test_a_process_that_is_held_up_itself_does_not_blame_the_store() -> None:
    async with redis_server() as server, opened(at(server.port)) as store:
        for number in range(5):
            asking = asyncio.create_task(store.run(ECHO, ["n"], [f"{number}"]))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            time.sleep(0.12)
            assert await asking == f"{number}".encode()
        assert store.ok


async def test_a_cancelled_run_leaves_no_answer_for_the_next() -> None:
    async with redis_server() as server, fault_proxy(server.port) as proxy, opened(at(proxy.port, 2000)) as store:
        proxy.latency = 0.05
        for number in range(5):
            asking = asyncio.create_task(store.run(ECHO, ["n"], [f"lost {number}"]))
            await asyncio.sleep(0.01)
            asking.cancel()
            assert await store.run(ECHO, ["n"], [f"{number}"]) == f"{number}".encode()


@pytest.mark.parametrize("fault", ["slow", "hole", "down", "frozen"])
async def test_a_store_that_does_not_answer_is_left_alone_until_it_does(fault: str) -> None:
    async with redis_server() as server, fault_proxy(server.port) as proxy, opened(at(proxy.port)) as store:
        await store.run(ADD, ["n"], [1])
        match fault:
            case "slow":
                proxy.latency = 0.2
            case "hole":
                proxy.hole = True
            case "down":
                await proxy.down()
            case _:
                server.signal(signal.SIGSTOP)
        started = time.monotonic()
        assert await _asked(store, "x") is None
        await until(store, ok=False, seconds=10)
        assert not store.health().ok
        asked = store.calls
        with pytest.raises(StoreUnavailable):
            await store.run(ECHO, ["n"], ["x"])
        assert store.calls == asked  # not even tried
        assert time.monotonic() - started < 1.5
        proxy.latency, proxy.hole = 0, False
        if fault == "down":
            await proxy.up()
        server.signal(signal.SIGCONT)
        await until(store, ok=True, seconds=2)
        assert await _asked(store, "y") == b"y"


async def test_connections_that_were_reset_are_made_anew() -> None:
    async with redis_server() as server, fault_proxy(server.port) as proxy, opened(at(proxy.port)) as store:
        for _ in range(3):
            proxy.reset()
            async with asyncio.timeout(2):
                # Whether a script ran whose answer is lost nobody knows: it is not sent again by itself.
                while await _asked(store, "x") is None:
                    await asyncio.sleep(0.01)


async def test_a_store_that_is_not_there_fails_no_start_and_is_found_later() -> None:
    async with redis_server() as server, fault_proxy(server.port) as proxy:
        await proxy.down()
        async with opened(at(proxy.port)) as store:
            assert not store.ok
            assert "Connect call failed" in store.health().detail
            await proxy.up()
            await until(store, ok=True, seconds=2)


async def test_who_names_the_same_place_shares_one_client() -> None:
    gateway = Gateway()

    @frozen(kw_only=True)
    class Mine(RedisSettings):
        own: int = 1

    async with redis_server() as server:
        place = Url(server.url)
        async with redis_store(gateway, RedisSettings(place)) as first:
            async with redis_store(gateway, Mine(place, own=2)) as second:
                assert first is second
            async with redis_store(gateway, RedisSettings(place, prefix="other")) as third:
                assert third is not first
            assert await first.run(ADD, ["n"], [1]) == 1  # still open
    await gateway.http.aclose()


async def test_a_sentinel_leads_to_the_next_master() -> None:
    async with redis_sentinel() as redis:
        settings = RedisSettings(sentinel=SentinelSettings(redis.master_name, (Url(redis.sentinel.url),)))
        async with opened(settings) as store:
            await store.run(ADD, ["n"], [1])
            old = await redis.master()
            old.kill()
            new = await redis.failed_over(old)
            async with asyncio.timeout(2):
                while await _asked(store, "x") is None:
                    await asyncio.sleep(0.01)
            await store.run(ADD, ["m"], [7])
            assert await new.command("GET", "m") == "7"


async def test_a_cluster_runs_scripts_of_all_slots() -> None:
    async with (
        redis_cluster() as nodes,
        opened(RedisSettings(cluster=(Url(nodes[0].url),), timeout_ms=1000)) as store,
    ):
        keys = [[store.key(part, slot=f"tenant={n}") for part in ("a", "b")] for n in range(60)]
        both = Script("both", "redis.call('INCR', KEYS[1]) return redis.call('INCR', KEYS[2])")
        assert await asyncio.gather(*(store.run(both, pair, []) for pair in keys)) == [1] * 60
        assert all([await node.command("DBSIZE") > 0 for node in nodes])


async def test_without_the_extra_the_start_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "redis.exceptions", None)
    with pytest.raises(StartupError, match=r"qlens\[redis\]"):
        async with opened(RedisSettings(Url("redis://127.0.0.1"))):
            pass


@pytest.mark.parametrize("slot", ["a", "", "}", "{}", "a}b", "a:b", "ä", "*", "\ud800"])
async def test_keys_of_one_slot_share_one_hash_tag_whatever_the_tenant_is_called(slot: str) -> None:
    settings = RedisSettings(Url("redis://h"))
    keys = {settings.key(part, slot=f"tenant={slot}") for part in ("x", "y:{z}", "y", "{")}
    assert len(keys) == 4
    tags = {key.partition("{")[2].partition("}")[0] for key in keys}
    assert len(tags) == 1
    assert tags != {""}


@pytest.mark.parametrize(
    ("store", "message"),
    [
        ("{kind: redis}", "give exactly one of url, sentinel and cluster"),
        ("{kind: redis, url: 'redis://a', cluster: ['redis://b']}", "give exactly one of url, sentinel and cluster"),
        ("{kind: redis, url: 'http://a'}", "begins with redis://, rediss:// (TLS) or unix://"),
        ("{kind: redis, url: 'http://me:hunter2@a'}", "'http://***@a' is no address of a Redis"),
        ("{kind: redis, cluster: []}", "cluster"),
        ("{kind: redis, url: 'redis://a', timeout_ms: 0}", "timeout_ms"),
        ("{kind: redis, sentinel: {master: m, urls: ['http://x']}}", "'http://x' is no address of a Redis"),
    ],
)
async def test_a_place_that_makes_no_sense_stops_the_start(store: str, message: str) -> None:
    text = f"""
pipeline:
  auth: [{{plugin: anonymous}}]
  rate_limit: [{{plugin: token_bucket, store: {store}, limits: [{{per: tenant, concurrency: 1}}]}}]
providers: {{up: {{plugin: echo}}}}
models: {{small: {{targets: [{{provider: up, model: small}}]}}}}
"""
    with pytest.raises(StartupError) as error:
        async with running(text):
            pass
    (fault,) = error.value.faults
    assert "pipeline.rate_limit[0].store" in fault.path
    assert message in str(fault)
    assert "hunter2" not in str(fault)
