"""Budgets in a Redis: several gateways, and a Redis that dies, freezes, or comes back empty."""

from __future__ import annotations

import asyncio
import hashlib
import json
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from qlens import RedisSettings, Url, redis_store
from qlens.cli import main
from qlens.gateway import Gateway
from qlens.testing import Response, Running, running
from qlens.testing.faults import FaultProxy, fault_proxy
from qlens.testing.processes import free_port
from qlens.testing.redis import RedisServer, redis_cluster, redis_sentinel, redis_server
from qlens_plugins.cost.budgets.redis import RedisBudgets
from qlens_plugins.cost.budgets.store import Account, Ask, StoreAway

LEDGER = '{plugin: ledger, url: "sqlite:///ledger.db", flush_seconds: 0.01}'
# Input is free and a token of output costs 1 micro-dollar: a call of 10 tokens costs 0.00001 USD.
PRICE = "{model: out, input: 0, output: 1}"
ASKED = {"model": "out", "max_tokens": 10, "messages": [{"role": "user", "content": "x " * 40}]}
KEYS = {"sk-example-a1": "acme", "sk-example-b": "bolt", "sk-example-ops": "ops"}


def key_file() -> dict[str, str]:
    rows = [
        f"- {{id: {tenant}, hash: 'sha256:{hashlib.sha256(key.encode()).hexdigest()}', tenant: {tenant}, "
        f"roles: [{'operator' if tenant == 'ops' else 'member'}]}}"
        for key, tenant in KEYS.items()
    ]
    return {"keys.yaml": "\n".join(["keys:", *rows])}


async def call(gateway: Running, key: str = "sk-example-a1") -> Response:
    return await gateway.post("/v1/chat/completions", ASKED, key=key)


def config(
    server: RedisServer,
    limits: str,
    *,
    ledger: str = LEDGER,
    store: str = "",
    params: str = "{}",
    at: FaultProxy | None = None,
) -> str:
    url = server.url if at is None else f"redis://127.0.0.1:{at.port}"
    return f"""
server: {{port: 0, admin: {{port: 0}}}}
pipeline:
  auth: [{{plugin: api_keys, file: keys.yaml}}]
  cost:
    - {{plugin: prices, table: [{PRICE}]}}
    - {{plugin: budgets, limits: [{limits}], store: {{kind: redis, url: "{url}"{store}}}}}
    {f"- {ledger}" if ledger else ""}
providers: {{up: {{plugin: echo}}}}
models:
  out: {{max_output_tokens: 1000, targets: [{{provider: up, model: out, params: {params}}}]}}
"""


@pytest.fixture
async def server() -> AsyncIterator[RedisServer]:
    async with redis_server() as server:
        yield server


@asynccontextmanager
async def gateways(server: RedisServer, limits: str, count: int = 1, **more: Any) -> AsyncIterator[list[Running]]:
    async with AsyncExitStack() as stack:
        opening = (running(config(server, limits, **more), files=key_file()) for _ in range(count))
        yield [await stack.enter_async_context(each) for each in opening]


async def spent(gateway: Running, key: str = "sk-example-a1") -> Decimal:
    (row,) = (await gateway.get("/v1/budgets", key=key)).json()["data"]
    return Decimal(row["spent_usd"])


async def admitted_again(gateway: Running) -> int:
    """The status of the first call that is not refused because the budgets are away."""
    async with asyncio.timeout(8):
        while (answer := await call(gateway)).status == 503:
            assert answer.json()["error"]["code"] == "budget_unavailable"
            await asyncio.sleep(0.02)
        return answer.status


async def test_three_gateways_with_room_for_one_admit_exactly_one_of_a_thousand_calls(server: RedisServer) -> None:
    limits = "{per: tenant, usd: 0.000010}, {per: key, usd: 0.000019, window: total}"
    async with gateways(server, limits, 3, params="{first_byte_ms: 300}", store=", timeout_ms: 2000") as each:
        answers = await asyncio.gather(*(call(each[number % 3]) for number in range(1000)))
        assert Counter(answer.status for answer in answers) == {200: 1, 429: 999}


@pytest.mark.parametrize("how", ["emptied", "killed"])
async def test_a_redis_that_comes_back_empty_is_told_the_past_by_the_ledger(
    server: RedisServer, how: str, tmp_path: Path
) -> None:
    ledger = f'{{plugin: ledger, url: "sqlite:///{tmp_path / "ledger.db"}"}}'
    limits = "{per: tenant, usd: 0.000035, window: month}"
    async with gateways(server, limits, ledger=ledger) as (gateway,):
        assert [(await call(gateway)).status for _ in range(2)] == [200, 200]
    if how == "emptied":
        await server.command("FLUSHALL")
    else:
        server.kill()
        await server.start()
    # No process that knew the sums is left.
    async with gateways(server, limits, ledger=ledger) as (gateway,):
        assert [await admitted_again(gateway) for _ in range(2)] == [200, 429]
        assert await spent(gateway) == Decimal("0.00003")


async def test_what_runs_when_redis_is_emptied_is_counted_once_and_never_forgotten(server: RedisServer) -> None:
    limits = "{per: tenant, usd: 0.000055, window: month}"
    async with gateways(server, limits, 2, params="{first_byte_ms: 2500}") as (one, other):
        running_calls = [asyncio.create_task(call(gateway)) for gateway in (one, one, other)]
        await asyncio.sleep(0.3)
        await server.command("FLUSHALL")
        await asyncio.sleep(0.6)
        more = [asyncio.create_task(admitted_again(gateway)) for gateway in (one, one, one, other)]
        assert [(await each).status for each in running_calls] == [200] * 3
        assert sorted([await each for each in more]) == [200, 200, 429, 429]
        await spent(other)  # which tells Redis the last of it
        assert await spent(one) == Decimal("0.00005")


@pytest.mark.parametrize("how", ["down", "frozen", "slow"])
async def test_strict_budgets_answer_503_while_redis_is_away_and_soft_ones_serve(server: RedisServer, how: str) -> None:
    limits = "{per: tenant, usd: 1, match: {tenant: [acme]}}, {per: tenant, usd: 1, hard: false}"
    async with (
        fault_proxy(server.port) as proxy,
        gateways(server, limits, store=", lease_seconds: 0, timeout_ms: 150", at=proxy) as (gateway,),
    ):
        assert (await call(gateway)).status == 200
        if how == "down":
            server.kill()
        elif how == "frozen":
            server.signal(signal.SIGSTOP)
        else:
            proxy.latency = 0.25
        for _ in range(4):
            answer = await call(gateway)
            assert (answer.status, answer.json()["error"]["code"]) == (503, "budget_unavailable")
            assert (await call(gateway, "sk-example-b")).status == 200
        assert not (await gateway.get("/readyz")).json()["plugins"]["cost.budgets"]["ok"]
        if how == "down":
            await server.start()
        elif how == "frozen":
            server.signal(signal.SIGCONT)
        else:
            proxy.latency = 0
        # Whether or not anybody calls.
        async with asyncio.timeout(8):
            while not (await gateway.get("/readyz")).json()["plugins"]["cost.budgets"]["ok"]:
                await asyncio.sleep(0.02)
        assert await admitted_again(gateway) == 200
        # Redis is told of what soft budgets served meanwhile; after a loss the ledger has some of it, too.
        told = await spent(gateway, "sk-example-b")
        assert told >= Decimal("0.00004") if how == "down" else told == Decimal("0.00004")


async def test_without_a_ledger_an_empty_redis_admits_nothing_until_an_operator_says_what_was_spent(
    server: RedisServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = config(server, "{per: tenant, usd: 0.000035}", ledger="")
    (tmp_path / "qlens.yaml").write_text(text)
    (tmp_path / "keys.yaml").write_text(key_file()["keys.yaml"])
    command = ["budgets", "-c", str(tmp_path / "qlens.yaml")]
    async with gateways(server, "{per: tenant, usd: 0.000035}", ledger="") as (gateway,):
        assert (await call(gateway)).json()["error"]["code"] == "budget_unavailable"
        assert await asyncio.to_thread(main, [*command, "--begin"]) == 0
        assert [await admitted_again(gateway) for _ in range(2)] == [200, 200]
        assert await spent(gateway) == Decimal("0.00002")
        capsys.readouterr()
        assert await asyncio.to_thread(main, [*command, "--json"]) == 0
        (tmp_path / "last.json").write_text(capsys.readouterr().out)
        assert await asyncio.to_thread(main, [*command, "--begin"]) != 0
        await server.command("FLUSHALL")
        await asyncio.sleep(1)
        assert (await call(gateway)).status == 503
        assert await asyncio.to_thread(main, [*command, "--begin", str(tmp_path / "last.json")]) == 0
        assert [await admitted_again(gateway) for _ in range(2)] == [200, 429]


@pytest.mark.parametrize("how", ["emptied", "killed", "frozen"])
async def test_under_load_no_more_is_spent_than_the_limit_whatever_happens_to_redis(
    server: RedisServer, how: str, tmp_path: Path
) -> None:
    ledger = f'{{plugin: ledger, url: "sqlite:///{tmp_path / "ledger.db"}"}}'
    async with gateways(
        server, "{per: tenant, usd: 0.001, window: month}", 3, ledger=ledger, params="{first_byte_ms: 5}"
    ) as each:
        over = asyncio.Event()
        statuses: Counter[int] = Counter()

        async def calls(gateway: Running) -> None:
            while not over.is_set():
                statuses[(await call(gateway)).status] += 1
                await asyncio.sleep(0.01)

        async def sample() -> None:
            """All that is spent and reserved, as Redis has it, is never more than the limit."""
            while not over.is_set():
                with suppress(OSError):
                    rows = await server.command("HGETALL", "qlens:{budgets}:sums")
                    for row in rows.values() if isinstance(rows, dict) else rows[1::2]:
                        _, _, base, spent_since, held, _ = map(int, row.split())
                        # What is doubtful after a loss counts twice rather than not at all; then nothing passes.
                        assert base <= 10**9
                        assert spent_since + held <= 10**9
                        assert how != "frozen" or base + spent_since + held <= 10**9
                await asyncio.sleep(0.01)

        tasks = [asyncio.create_task(calls(gateway)) for gateway in each for _ in range(2)]
        sampling = asyncio.create_task(sample())
        await asyncio.sleep(0.4)
        if how == "emptied":
            await server.command("FLUSHALL")
        elif how == "killed":
            server.kill()
            await asyncio.sleep(0.3)
            await server.start()
        else:
            server.signal(signal.SIGSTOP)
            await asyncio.sleep(0.5)
            server.signal(signal.SIGCONT)
        before = statuses[200]
        async with asyncio.timeout(8):
            while statuses[200] == before and not statuses[429]:
                await asyncio.sleep(0.05)
            while not statuses[429]:
                await asyncio.sleep(0.05)
        over.set()
        await asyncio.gather(*tasks, sampling)
        assert set(statuses) <= {200, 429, 503}
        assert 20 <= statuses[200] <= 100
        cost = sum(receipt.cost.picos or 0 for gateway in each for receipt in gateway.receipts)
        assert cost <= 10**9


async def test_calls_that_came_while_redis_was_asked_take_of_what_it_gave(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    others_wait = asyncio.Event()
    sync = RedisBudgets.sync

    async def late(self: RedisBudgets, process: str, asks: list[Ask], *more: float) -> Any:
        asked.append(len(asks[0].needs))
        await others_wait.wait()
        return await sync(self, process, asks, *more)

    monkeypatch.setattr(RedisBudgets, "sync", late)
    limits, store = "{per: tenant, usd: 1, window: total}", ", lease_seconds: 60, timeout_ms: 5000"
    async with gateways(server, limits, store=store) as (gateway,), asyncio.timeout(60):
        tills = gateway.plugin("cost", "budgets").tills
        # The first one is given four times what it needs in advance.
        calls = [asyncio.create_task(call(gateway))]
        while not asked:
            await asyncio.sleep(0.01)
        calls += [asyncio.create_task(call(gateway)) for _ in range(4)]
        while sum(len(purse.till.waiting) for purse in tills.purses.values()) < 4:
            await asyncio.sleep(0.01)
        others_wait.set()
        assert [answer.status for answer in await asyncio.gather(*calls)] == [200] * 5
        assert asked == [1]


async def test_what_a_killed_gateway_had_reserved_is_charged_once(server: RedisServer, tmp_path: Path) -> None:
    limits, store = "{per: tenant, usd: 0.000035, window: month}", ", crash_seconds: 3, lease_seconds: 0"
    ledger = f'{{plugin: ledger, url: "sqlite:///{tmp_path / "ledger.db"}"}}'
    async with gateways(server, limits, ledger=ledger, store=store) as (other,):
        text = config(server, limits, ledger=ledger, store=store, params="{first_byte_ms: 60000}")
        port = free_port()
        (tmp_path / "qlens.yaml").write_text(text.replace("port: 0,", f"port: {port},", 1))
        (tmp_path / "keys.yaml").write_text(key_file()["keys.yaml"])
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "qlens", "serve", str(tmp_path / "qlens.yaml")),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        writers: list[asyncio.StreamWriter] = []
        try:
            await asyncio.gather(*(_leave_running(port, writers) for _ in range(2)))
            await until(other, "reserved_usd", "0.00002")
        finally:
            process.kill()
            await process.wait()
            for writer in writers:
                writer.close()
        assert (await call(other)).status == 200
        assert (await call(other)).status == 429
        await until(other, "reserved_usd", "0")
        assert await spent(other) == Decimal("0.00003")
        assert (await call(other)).status == 429


async def _leave_running(port: int, writers: list[asyncio.StreamWriter]) -> None:
    """Send a call to a gateway that starts, and do not wait for its answer."""
    body = json.dumps(ASKED).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer sk-example-a1\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    async with asyncio.timeout(30):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.05)
                continue
            writer.write(head.encode() + body)
            await writer.drain()
            writers.append(writer)
            return


async def until(gateway: Running, name: str, value: str) -> None:
    """Wait until a budget says so; on a busy machine Redis can be too slow for an answer now and then."""
    async with asyncio.timeout(30):
        while (answer := await gateway.get("/v1/budgets", key="sk-example-a1")).status != 200 or (
            answer.json()["data"][0][name] != value
        ):
            await asyncio.sleep(0.05)


async def test_increases_come_back_after_a_loss_from_whoever_knows_of_them_and_count_once(
    server: RedisServer, tmp_path: Path
) -> None:
    more: dict[str, Any] = {
        "ledger": f'{{plugin: ledger, url: "sqlite:///{tmp_path / "ledger.db"}"}}',
        "store": ", lease_seconds: 0",
    }
    limits = "{per: tenant, usd: 0.000020, window: month}"
    async with gateways(server, limits, 3, **more) as (made, told, other):
        assert [(await call(gateway)).status for gateway in (made, told, other)] == [200, 200, 429]
        (row,) = (await made.get("/v1/budgets", key="sk-example-a1")).json()["data"]
        ask = {"usd": "0.00002", "expires_at": int(time.time()) + 3600, "reason": "launch"}
        place = f"/admin/budgets/{row['id']}"
        assert (await made.post(f"{place}/increase", ask, key="sk-example-ops")).status == 200
        assert (await call(told)).status == 200  # which is when it hears of it
        await asyncio.sleep(0.8)
        for _ in range(2):
            await server.command("FLUSHALL")
            assert await admitted_again(other) in {200, 429}
            await until_raised(other, place)
        assert await admitted_again(other) == 429
        (row,) = (await other.get("/v1/budgets", key="sk-example-a1")).json()["data"]
        assert (row["limit_usd"], row["spent_usd"], len(row["increases"])) == ("0.00004", "0.00004", 1)
    # Whoever made it is gone; who was only told of it knows as well.
    async with gateways(server, limits, 2, **more) as (told, other):
        assert await admitted_again(told) == 429
        await server.command("FLUSHALL")
        await until_raised(other, place)


async def until_raised(gateway: Running, place: str) -> None:
    """Wait until a budget has its increase again."""
    async with asyncio.timeout(8):
        while (answer := await gateway.get(place, key="sk-example-ops")).status != 200 or not answer.json()[
            "increases"
        ]:
            await asyncio.sleep(0.05)
    assert answer.json()["limit_usd"] == "0.00004"


async def test_with_time_to_gather_a_gateway_that_is_cut_off_is_counted_from_the_ledger(
    server: RedisServer, tmp_path: Path
) -> None:
    """Nothing is admitted until all calls that ran at the loss are in the ledger: never too little, whoever is gone."""
    ledger = f'{{plugin: ledger, url: "sqlite:///{tmp_path / "ledger.db"}", flush_seconds: 0.01}}'
    limits = "{per: tenant, usd: 0.000025, window: month}"
    more: dict[str, Any] = {"ledger": ledger, "store": ", lease_seconds: 0, gather_seconds: 4, timeout_ms: 500"}
    async with (
        fault_proxy(server.port) as proxy,
        gateways(server, limits, ledger=ledger, store=more["store"]) as (other,),
        gateways(server, limits, at=proxy, params="{first_byte_ms: 2500}", **more) as (cut,),
    ):
        assert await admitted_again(other) == 200
        last = asyncio.create_task(call(cut))
        # The first to be asked tells Redis what it has spent; the other's answer comes behind Redis' word to its call.
        for each in (other, cut):
            await until(each, "reserved_usd", "0.00001")
        proxy.hole = True
        await server.command("FLUSHALL")
        assert await admitted_again(other) == 429
        assert (await last).status == 200
        assert await spent(other) == Decimal("0.00002")


async def test_a_loss_that_a_question_finds_first_forgets_no_running_call(server: RedisServer) -> None:
    limits = "{per: tenant, usd: 0.000025, window: month}"
    async with gateways(server, limits, params="{first_byte_ms: 2500}", store=", lease_seconds: 0") as (gateway,):
        last = asyncio.create_task(call(gateway))
        await asyncio.sleep(0.5)
        await server.command("FLUSHALL")
        # At once, before the gateway has looked by itself.
        assert (await gateway.get("/v1/budgets", key="sk-example-a1")).status in {200, 503}
        await asyncio.sleep(1.2)
        more = asyncio.create_task(admitted_again(gateway))
        await asyncio.sleep(0.3)
        assert (await call(gateway)).status == 429  # two hold all that there is
        assert ((await last).status, await more) == (200, 200)
        assert await spent(gateway) == Decimal("0.00002")


async def test_on_a_cluster_and_behind_a_sentinel_budgets_hold(tmp_path: Path) -> None:
    ledger = f'{{plugin: ledger, url: "sqlite:///{tmp_path / "ledger.db"}"}}'
    limits = "{per: tenant, usd: 0.000025}, {per: key, usd: 1}, {per: model, usd: 1, window: total}"
    async with redis_cluster() as nodes:
        text = config(nodes[0], limits, ledger=ledger, store=", timeout_ms: 500")
        text = text.replace(f'url: "{nodes[0].url}"', f'cluster: ["{nodes[0].url}", "{nodes[1].url}"]')
        async with running(text, files=key_file()) as gateway:
            assert [(await call(gateway)).status for _ in range(3)] == [200, 200, 429]
    async with redis_sentinel() as watched:
        place = f'sentinel: {{master: {watched.master_name}, urls: ["{watched.sentinel.url}"]}}'
        text = config(watched.servers[0], limits.replace("25", "45"), ledger=ledger, store=", timeout_ms: 500")
        async with running(text.replace(f'url: "{watched.servers[0].url}"', place), files=key_file()) as gateway:
            assert (await call(gateway)).status == 200
            await gateway.get("/v1/budgets", key="sk-example-a1")  # which tells the master what was spent
            (old := await watched.master()).kill()
            await watched.failed_over(old)
            # The new master may not have heard the last of it: the ledger has.
            assert [await admitted_again(gateway) for _ in range(2)] == [200, 429]


async def test_a_message_that_comes_late_changes_nothing(server: RedisServer) -> None:
    account = Account("budget-1", "tenant month", "tenant", "acme", "acme", "month")
    async with redis_store(Gateway(), RedisSettings(url=Url(server.url), timeout_ms=2000)) as redis:
        store = RedisBudgets(redis)
        assert await store.begin([(account, 5, 1000, 300)], lambda: asyncio.sleep(0))
        await store.sync("a", [Ask(account, 5, 1000, 0, 10, held=20)], 6, 60)
        await store.sync("a", [Ask(account, 5, 1000, 0, 40)], 6, 60)
        store._number -= 2  # as one that was frozen on its way does
        with pytest.raises(StoreAway):
            await store.sync("a", [Ask(account, 5, 1000, 0, 10, held=20)], 6, 60)
        (state,) = await store.states(6)
        assert (state.spent, state.held) == (340, 0)


async def test_a_server_that_was_away_takes_nobody_for_dead(server: RedisServer) -> None:
    limits = "{per: tenant, usd: 0.000025, window: month}"
    store = ", crash_seconds: 3, lease_seconds: 0"
    async with gateways(server, limits, 2, params="{first_byte_ms: 8500}", store=store) as (one, other):
        short = {**ASKED, "messages": [{"role": "user", "content": "x"}]}
        last = asyncio.create_task(one.post("/v1/chat/completions", short, key="sk-example-a1"))
        await until(other, "reserved_usd", "0.00001")
        server.signal(signal.SIGSTOP)
        await asyncio.sleep(6)  # longer than a process may be silent
        server.signal(signal.SIGCONT)
        assert (await last).status == 200
        # It is charged what it cost, and not what was reserved.
        await until(one, "reserved_usd", "0")
        assert 0 < await spent(one) < Decimal("0.00001")
