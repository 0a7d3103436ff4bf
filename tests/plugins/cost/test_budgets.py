"""Budgets: what is reserved, what is charged, who is refused, and what windows, reloads and crashes do to it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import sqlite3
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, closing, suppress
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from attrs import define, evolve
from hypothesis import given, settings
from hypothesis import strategies as st

from qlens import ConfigError, RedisSettings, Url, redis_store
from qlens.cli import main
from qlens.gateway import Gateway
from qlens.testing import ManualClock, Response, Running, Scripted, running, upstream
from qlens.testing.redis import RedisServer
from qlens_plugins.cost.budgets.memory import MemoryStore
from qlens_plugins.cost.budgets.redis import RedisBudgets
from qlens_plugins.cost.budgets.sqlite import SqliteStore
from qlens_plugins.cost.budgets.store import Account, Ask, Increase, Need, State, Store, StoreAnew, Told
from qlens_plugins.cost.budgets.windows import window_of

PATH = "/v1/chat/completions"
KEYS = {
    "sk-example-a1": ("a1", "acme", "member"),
    "sk-example-a2": ("a2", "acme", "member"),
    "sk-example-b": ("b", "bolt", "member"),
    "sk-example-ops": ("ops", "ops", "operator"),
    "sk-example-boss": ("boss", "acme", "tenant_admin"),
}
MEMORY = "{kind: memory}"
# Input is free and a token of output costs 1 micro-dollar: a call of 10 tokens at most may cost 0.00001 USD.
PRICE = "{model: out, input: 0, output: 1}"
TEN = {"model": "out", "max_tokens": 10, "messages": [{"role": "user", "content": "hello"}]}


@asynccontextmanager
async def redis_budgets(server: RedisServer) -> AsyncIterator[RedisBudgets]:
    """An empty Redis of which an operator has said that nothing was spent."""
    await server.command("FLUSHALL")
    async with redis_store(Gateway(), RedisSettings(url=Url(server.url), timeout_ms=2000)) as redis:
        store = RedisBudgets(redis, gather_seconds=0)
        assert await store.begin([], lambda: asyncio.sleep(0))
        yield store


@pytest.fixture(params=["memory", "sqlite", "redis"])
def store(request: pytest.FixtureRequest) -> str:
    """Each place where budgets may be, as a configuration says it."""
    if request.param == "memory":
        return MEMORY
    if request.param == "sqlite":
        return '{kind: sqlite, url: "sqlite:///budgets.db"}'
    server: RedisServer = request.getfixturevalue("server")

    async def begin() -> None:
        async with redis_budgets(server):
            pass

    asyncio.run(begin())
    return f'{{kind: redis, url: "{server.url}", timeout_ms: 2000, gather_seconds: 0}}'


def key_file() -> dict[str, str]:
    rows = [
        f"- {{id: {id_}, hash: 'sha256:{hashlib.sha256(key.encode()).hexdigest()}', tenant: {tenant}, roles: [{role}]}}"
        for key, (id_, tenant, role) in KEYS.items()
    ]
    return {"keys.yaml": "\n".join(["keys:", *rows])}


def config(limits: str, store: str = MEMORY, more: str = "", params: str = "{}", base_url: str = "") -> str:
    provider = f'{{plugin: openai, base_url: "{base_url}", api_key: sk-example-up}}' if base_url else "{plugin: echo}"
    return f"""
server: {{port: 0, admin: {{port: 0}}}}
pipeline:
  auth: [{{plugin: api_keys, file: keys.yaml}}]
  cost:
    - {{plugin: prices, table: [{PRICE}]}}
    - {{plugin: budgets, limits: [{limits}], store: {store}{more}}}
providers: {{up: {provider}}}
models:
  out: {{max_output_tokens: 1000, max_n: 4, targets: [{{provider: up, model: out, params: {params}}}]}}
  unpriced: {{max_output_tokens: 1000, targets: [{{provider: up, model: unpriced}}]}}
  unbounded: {{targets: [{{provider: up, model: out}}]}}
"""


@asynccontextmanager
async def serving(
    limits: str, store: str = MEMORY, *, clock: ManualClock | None = None, **more: str
) -> AsyncIterator[Running]:
    async with running(config(limits, store, **more), files=key_file(), clock=clock) as gateway:
        yield gateway


async def call(gateway: Running, key: str = "sk-example-a1", **more: object) -> Response:
    return await gateway.post(PATH, {**TEN, **more}, key=key)


async def budgets(gateway: Running, key: str = "sk-example-a1") -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = (await gateway.get("/v1/budgets", key=key)).json()["data"]
    return rows


async def budget(gateway: Running, key: str = "sk-example-a1") -> dict[str, Any]:
    (row,) = await budgets(gateway, key)
    return row


# --- at the door -------------------------------------------------------------------------------


async def test_of_a_thousand_calls_at_once_with_room_for_one_exactly_one_passes(store: str) -> None:
    limits = "{per: tenant, usd: 0.000010}, {per: key, usd: 0.000019, window: total}"
    async with serving(limits, store, params="{first_byte_ms: 200}") as gateway:
        statuses = Counter(answer.status for answer in await asyncio.gather(*(call(gateway) for _ in range(1000))))
        assert statuses == {200: 1, 429: 999}


async def test_the_form_of_the_design_works_and_a_call_is_charged_what_it_cost() -> None:
    async with serving("{per: tenant, usd: 100.00, window: month}") as gateway:
        assert (await call(gateway)).status == 200
        (receipt,) = await gateway.settled(1)
        row = await budget(gateway)
        assert receipt.cost.picos
        assert row["spent_usd"] == f"{receipt.cost.picos / 10**12:.12f}".rstrip("0")
        assert (row["limit_usd"], row["reserved_usd"], row["window"]) == ("100", "0", "month")


async def test_a_refusal_names_the_budget_and_tells_clients_not_to_try_again() -> None:
    async with serving("{per: tenant, usd: 0.000012}") as gateway:
        assert (await call(gateway)).status == 200
        answer = await call(gateway, max_tokens=12, messages=[{"role": "user", "content": "x " * 40}])
        error = answer.json()["error"]
        assert answer.status == 429
        assert (error["type"], error["code"]) == ("insufficient_quota", "insufficient_quota")
        assert answer.headers["x-should-retry"] == "false"
        assert "retry-after" not in answer.headers
        assert "monthly budget of tenant acme (0.000012 USD)" in error["message"]
        assert "It begins anew at" in error["message"]
        assert (await call(gateway, "sk-example-b")).status == 200
        too_dear = await call(gateway, "sk-example-b", max_tokens=1000)
        assert "Lower max_tokens" in too_dear.json()["error"]["message"]


def chunk(text: str, **more: object) -> dict[str, Any]:
    return {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "out", "choices": [
        {"index": 0, "delta": {"content": text}, "finish_reason": None, **more}]}  # fmt: skip


async def test_a_stream_that_never_ends_is_cut_with_a_valid_end_and_its_provider_is_told() -> None:
    events = [chunk(""), *(chunk("word " * 20) for _ in range(2000))]
    async with upstream() as provider, serving("{per: tenant, usd: 1}", base_url=provider.url) as gateway:
        provider.script(Scripted(events=events, hang=True))
        answer = await call(gateway, stream=True, stream_options={"include_usage": True})
        *_, end, usage, done = answer.events()
        assert end["choices"] == [{"index": 0, "delta": {}, "finish_reason": "length"}]
        assert (usage["choices"], done) == ([], "[DONE]")
        (receipt,) = await gateway.settled(1)
        assert (receipt.outcome, receipt.error) == ("cut", "output_limit")
        assert usage["usage"]["cost_usd"] == (await budget(gateway))["spent_usd"]
        await asyncio.wait_for(provider.requests[0].closed.wait(), 5)


async def test_an_honest_stream_is_not_cut_however_much_surrounds_its_tokens() -> None:
    """Ten tokens, each as long as a token can be, with log probabilities of all that it could have been."""
    noise = {"content": [{"token": "x", "logprob": -1.5, "top_logprobs": [{"token": "y" * 90, "logprob": -2}] * 20}]}
    events = [chunk(""), *(chunk("-" * 128, logprobs=noise) for _ in range(10))]
    end = {"index": 0, "delta": {}, "finish_reason": "stop"}
    events += [{**chunk(""), "choices": [end]}]
    async with upstream() as provider, serving("{per: tenant, usd: 1}", base_url=provider.url) as gateway:
        provider.script(Scripted(events=[*events, "[DONE]"], gap=0.002))
        answer = await call(gateway, stream=True)
        assert sum(len(e["choices"][0]["delta"].get("content", "")) for e in answer.events()[:-1]) == 1280
        assert (await gateway.settled(1))[0].outcome == "complete"


@pytest.mark.parametrize(
    ("sent", "status", "reserved"),
    [
        ({"max_tokens": None}, 200, 1000),
        ({"max_tokens": 10**9}, 200, 1000),
        ({"max_tokens": 5, "n": 4}, 200, 20),
        ({"max_tokens": 0}, 400, 0),
        ({"max_tokens": -1}, 400, 0),
        ({"max_tokens": 1.5}, 400, 0),
        ({"max_tokens": "100"}, 400, 0),
        ({"max_tokens": 1e23}, 400, 0),
        ({"max_tokens": True}, 400, 0),
    ],
)
async def test_what_is_reserved_and_what_the_provider_is_asked_for_are_the_same(
    sent: dict[str, Any], status: int, reserved: int
) -> None:
    """T24, T25: whatever a client says about tokens, the reservation covers what the provider may generate."""
    async with serving("{per: tenant, usd: 1}", params="{first_byte_ms: 150}") as gateway:
        task = asyncio.create_task(call(gateway, **sent))
        if status == 200:
            async with asyncio.timeout(5):
                while (held := (await budget(gateway))["reserved_usd"]) == "0":
                    await asyncio.sleep(0.005)
            assert float(held) == pytest.approx(reserved / 10**6)
        answer = await task
        assert answer.status == status
        if status == 200:
            assert (await gateway.settled(1))[0].usage.completion <= reserved
        assert (await budget(gateway))["reserved_usd"] == "0"


async def test_the_clamped_numbers_go_upstream() -> None:
    async with upstream() as provider, serving("{per: tenant, usd: 0.002}", base_url=provider.url) as gateway:
        assert (await call(gateway, max_tokens=10**9)).status == 200
        assert provider.requests[-1].body["max_tokens"] == 1000
        assert (await call(gateway, max_tokens=1000, n=3)).status == 429


BOUNDS: dict[str, tuple[dict[str, Any], str]] = {
    "/v1/chat/completions": ({"messages": [{"role": "user", "content": "hello"}]}, "max_tokens"),
    "/v1/completions": ({"prompt": "hello"}, "max_tokens"),
    "/v1/responses": ({"input": "hello"}, "max_output_tokens"),
}


@pytest.mark.parametrize("path", BOUNDS)
@pytest.mark.parametrize("says_null", [False, True])
async def test_a_provider_is_told_what_was_reserved_where_the_client_has_set_no_bound(
    path: str, says_null: bool
) -> None:
    """T24."""
    body, name = BOUNDS[path]
    asked = {"model": "out", **body, **({name: None} if says_null else {})}
    async with upstream() as provider, serving("{per: tenant, usd: 5}", base_url=provider.url) as gateway:
        await gateway.post(path, asked, key="sk-example-a1")
        assert provider.requests[0].body[name] == 1000
    async with (
        upstream() as provider,
        serving("{per: tenant, usd: 5, hard: false}", base_url=provider.url) as gateway,
    ):
        await gateway.post(path, asked, key="sk-example-a1")
        assert provider.requests[0].body.get(name) is None


@pytest.mark.parametrize(
    ("model", "code"), [("unpriced", "model_unpriced"), ("unbounded", "missing_required_parameter")]
)
async def test_what_cannot_be_bounded_is_refused_before_a_hard_budget_and_not_before_a_soft_one(
    model: str, code: str
) -> None:
    body = {"model": model, "messages": [{"role": "user", "content": "hello"}]}
    async with serving("{per: tenant, usd: 5, match: {tenant: [acme]}}, {per: tenant, usd: 5, hard: false}") as gateway:
        refused = await gateway.post(PATH, body, key="sk-example-a1")
        assert (refused.status, refused.json()["error"]["code"]) == (400, code)
        assert (await gateway.post(PATH, body, key="sk-example-b")).status == 200
        assert (await gateway.get("/v1/models", key="sk-example-a1")).status == 200


async def test_a_name_in_another_case_or_another_key_is_no_way_around() -> None:
    """T29."""
    async with serving("{per: tenant, usd: 0.000011}, {per: model, usd: 0.000030}") as gateway:
        assert (await call(gateway, messages=[{"role": "user", "content": "x " * 40}])).status == 200
        assert (await call(gateway, "sk-example-a2")).status == 429
        for name in ("OUT", "ｏｕｔ", "out ", "out\u200b"):
            assert (await call(gateway, "sk-example-b", model=name)).status == 404


async def test_a_soft_budget_warns_once_and_lets_pass(caplog: pytest.LogCaptureFixture) -> None:
    async with serving("{per: tenant, usd: 0.000001, hard: false, warn_at: [50]}") as gateway:
        for _ in range(3):
            assert (await call(gateway)).status == 200
        assert sum("50 % are spent" in record.message for record in caplog.records) == 1
        metrics = (await gateway.get("/metrics")).text
        assert 'qlens_budget_warnings_total{budget="tenant month",percent="50"} 1.0' in metrics


# --- exits -------------------------------------------------------------------------------------


async def test_whatever_becomes_of_calls_nothing_stays_reserved_and_the_sum_is_that_of_the_receipts(store: str) -> None:
    async with serving("{per: tenant, usd: 1}", store, params="{token_ms: 2}") as gateway:

        async def one(number: int) -> None:
            try:
                async with asyncio.timeout(0.004 * (number % 9) + 0.001 if number % 3 else 5):
                    await call(gateway, stream=number % 2 == 0)
            except TimeoutError:
                pass

        await asyncio.gather(*(one(number) for number in range(120)))
        async with asyncio.timeout(5):
            while (row := await budget(gateway))["reserved_usd"] != "0":
                await asyncio.sleep(0.02)
        spent = sum(receipt.cost.picos or 0 for receipt in gateway.receipts if receipt.caller.tenant == "acme")
        assert spent
        assert float(row["spent_usd"]) == pytest.approx(spent / 10**12, rel=1e-12)


async def test_a_provider_that_counts_more_than_was_reserved_is_charged_in_full() -> None:
    """T44."""
    said = {"prompt_tokens": 1, "completion_tokens": 500, "total_tokens": 501}
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "hi"}}
    body = {"id": "x", "object": "chat.completion", "model": "out", "usage": said, "choices": [choice]}
    async with upstream() as provider, serving("{per: tenant, usd: 0.000100}", base_url=provider.url) as gateway:
        provider.script(Scripted(body=body))
        assert (await call(gateway)).status == 200
        await gateway.settled(1)
        assert (await budget(gateway))["spent_usd"] == "0.0005"
        assert (await call(gateway)).status == 429
        assert 'qlens_budget_overruns_total{budget="tenant month"} 1.0' in (await gateway.get("/metrics")).text


# --- windows, reloads, increases ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("period", "moment", "begins", "ends"),
    [
        ("day", "2026-03-29T12:00", "2026-03-29T00:00", "2026-03-30T00:00"),  # 23 hours
        ("day", "2026-10-25T02:30", "2026-10-25T00:00", "2026-10-26T00:00"),  # 25 hours
        ("week", "2026-11-29T23:59", "2026-11-23T00:00", "2026-11-30T00:00"),
        ("month", "2026-12-31T23:59", "2026-12-01T00:00", "2027-01-01T00:00"),
        ("month", "2028-02-29T00:00", "2028-02-01T00:00", "2028-03-01T00:00"),
    ],
)
def test_windows_are_those_of_the_calendar(period: Any, moment: str, begins: str, ends: str) -> None:
    zone = ZoneInfo("Europe/Berlin")
    at = [int(datetime.fromisoformat(text).replace(tzinfo=zone).timestamp()) for text in (moment, begins, ends)]
    found = window_of(period, at[0], zone)
    assert (found.start, found.end) == (at[1], at[2])
    assert window_of(period, found.end - 0.001, zone) == found
    assert window_of(period, found.end, zone).start == found.end


@given(st.integers(0, 4_000_000_000), st.sampled_from(["Asia/Beirut", "America/Havana", "Asia/Kathmandu", "UTC"]))
def test_every_moment_is_in_its_window_and_windows_touch(now: int, name: str) -> None:
    zone = ZoneInfo(name)
    for period in ("day", "week", "month"):
        found = window_of(period, now, zone)
        assert found.start <= now < found.end
        assert window_of(period, found.end, zone).start == found.end


async def test_a_window_begins_anew_at_its_edge_and_a_clock_that_goes_back_gives_nothing(store: str) -> None:
    clock = ManualClock(1_800_000_000.0)
    async with serving("{per: tenant, usd: 0.000015, window: day}", store, clock=clock) as gateway:
        long: dict[str, Any] = {"messages": [{"role": "user", "content": "x " * 40}]}
        assert [(await call(gateway, **long)).status for _ in range(2)] == [200, 429]
        clock.advance(86_400)
        assert [(await call(gateway, **long)).status for _ in range(2)] == [200, 429]
        clock.advance(-86_400)
        assert (await call(gateway, **long)).status == 429
        assert (await budget(gateway))["resets_at"].endswith("T00:00:00Z")


async def test_a_reload_changes_the_limit_and_keeps_what_is_spent(store: str) -> None:
    """T28."""
    long: dict[str, Any] = {"messages": [{"role": "user", "content": "x " * 40}]}
    async with serving("{per: tenant, usd: 0.000015}", store) as gateway:
        assert [(await call(gateway, **long)).status for _ in range(2)] == [200, 429]
        await gateway.reload(config("{per: tenant, usd: 0.000025}", store))
        assert [(await call(gateway, **long)).status for _ in range(2)] == [200, 429]
        assert (await budget(gateway))["spent_usd"] == "0.00002"


async def test_an_increase_holds_until_it_expires_and_is_noted(store: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "qlens.audit")
    clock = ManualClock(1_800_000_000.0)
    long: dict[str, Any] = {"messages": [{"role": "user", "content": "x " * 40}]}
    async with serving("{per: tenant, usd: 0.000010, window: total}", store, clock=clock) as gateway:
        assert [(await call(gateway, **long)).status for _ in range(2)] == [200, 429]
        row = await budget(gateway)
        place = f"/admin/budgets/{row['id']}"
        ask = {"usd": "0.000050", "expires_at": 1_800_000_600, "reason": "launch"}
        for key, status in (("sk-example-a1", 403), ("sk-example-boss", 403), ("sk-example-ops", 200)):
            assert (await gateway.post(f"{place}/increase", ask, key=key)).status == status
        for wrong in ({**ask, "usd": 1.5}, {**ask, "usd": "-1"}, {**ask, "expires_at": 5}, {**ask, "limit": 1}, {}):
            assert (await gateway.post(f"{place}/increase", wrong, key="sk-example-ops")).status == 400
        for name, odd in (
            ("expires_at", "0001-01-01T00:00:00+14:00"),
            ("expires_at", "9999-12-31T23:59:59-14:00"),
            *(("usd", each) for each in ("１２", "1_0", " 1 ", "1E-12", "+1", "Infinity", "0", ".5")),
        ):
            refused = await gateway.post(f"{place}/increase", {**ask, name: odd}, key="sk-example-ops")
            assert (refused.status, refused.json()["error"]["param"]) == (400, name), odd
        twice = await gateway.get("/admin/budgets?limit=1&limit=5", key="sk-example-ops")
        assert (twice.status, twice.json()["error"]["param"]) == (400, "limit")
        assert (await call(gateway, **long)).status == 200
        raised = (await gateway.get(place, key="sk-example-boss")).json()
        assert (raised["limit_usd"], raised["increases"][0]["reason"]) == ("0.00006", "launch")
        assert (await gateway.get("/admin/budgets/nope", key="sk-example-ops")).status == 404
        assert len((await gateway.get("/admin/budgets", key="sk-example-ops")).json()["data"]) == 1
        clock.advance(601)
        assert (await call(gateway, **long)).status == 429
    assert sum('"budgets.increase"' in record.message for record in caplog.records) == 1


async def test_an_increase_that_the_store_does_not_take_is_noted_as_failed(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "qlens.audit")
    async with serving("{per: tenant, usd: 1}", '{kind: sqlite, url: "sqlite:///budgets.db"}') as gateway:
        assert (await call(gateway)).status == 200
        place = f"/admin/budgets/{(await budget(gateway))['id']}"
        with closing(sqlite3.connect(gateway.folder / "budgets.db", isolation_level=None)) as database:
            database.execute(
                "CREATE TRIGGER full BEFORE INSERT ON budget_increases BEGIN SELECT RAISE(ABORT, 'disk full'); END"
            )
        ask = {"usd": "1", "expires_at": 4_000_000_000, "reason": "launch"}
        assert (await gateway.post(f"{place}/increase", ask, key="sk-example-ops")).status == 503
        assert (await gateway.get(place, key="sk-example-ops")).json()["limit_usd"] == "1"
    noted = [json.loads(record.message) for record in caplog.records if record.name == "qlens.audit"]
    assert [entry["outcome"] for entry in noted] == ["done", "failed"]


async def test_the_list_of_budgets_comes_in_pages() -> None:
    async with serving("{per: tenant, usd: 1}, {per: key, usd: 1}, {per: model, usd: 1}") as gateway:
        assert (await call(gateway)).status == 200
        found, after = list[str](), ""
        for has_more in (True, True, False):
            page = (await gateway.get(f"/admin/budgets?limit=1&after={after}", key="sk-example-ops")).json()
            assert page["has_more"] is has_more
            found.append(after := page["last_id"])
        assert found == sorted(set(found))
        for wrong in ("limit=0", "limit=x", "page=2"):
            assert (await gateway.get(f"/admin/budgets?{wrong}", key="sk-example-ops")).status == 400


def patient(store: str) -> str:
    """A store that takes no process for dead because the clock was turned."""
    return store if store == MEMORY else store.replace("}", ", crash_seconds: 100000000}")


async def test_windows_that_are_long_over_are_forgotten_and_no_money_with_them(
    store: str, request: pytest.FixtureRequest
) -> None:
    clock = ManualClock(1_700_000_000.0)  # past: what is over by this clock alone stays
    store = patient(store)
    limits = "{per: key, usd: 1, window: day}, {per: tenant, usd: 1, window: total}"
    long: dict[str, Any] = {"messages": [{"role": "user", "content": "x " * 40}]}

    async def listed(gateway: Running) -> list[tuple[str, str]]:
        rows = (await gateway.get("/admin/budgets", key="sk-example-ops")).json()["data"]
        return sorted((row["window"], row["owner"]) for row in rows)

    async def until(gateway: Running, *rows: tuple[str, str]) -> None:
        async with asyncio.timeout(5):
            while await listed(gateway) != sorted(rows):
                await asyncio.sleep(0.05)

    totals = [("total", "acme"), ("total", "bolt")]
    async with serving(limits, store, clock=clock, params="{first_byte_ms: 2500}") as gateway:
        for key in ("sk-example-a1", "sk-example-b"):
            assert (await call(gateway, key, **long)).status == 200
        await until(gateway, *totals, ("day", "a1"), ("day", "b"))
        last = asyncio.create_task(call(gateway, **long))
        await asyncio.sleep(0.3)
        clock.advance(4 * 86_400)
        async with asyncio.timeout(5):
            while ("day", "b") in (found := await listed(gateway)):
                await asyncio.sleep(0.05)
        assert found == sorted([*totals, ("day", "a1")])  # something is held in it
        assert (await last).status == 200
        clock.advance(3601)
        await until(gateway, *totals)
        spent = {
            row["owner"]: row["spent_usd"]
            for key in ("a1", "b")
            for row in await budgets(gateway, f"sk-example-{key}")
            if row["window"] == "total"
        }
        assert spent == {"acme": "0.00002", "bolt": "0.00001"}
        if "redis" in store:
            server: RedisServer = request.getfixturevalue("server")
            for name in ("sums", "accounts", "windows"):
                assert await server.command("HLEN", f"qlens:{{budgets}}:{name}") == 2
            (process,) = await server.command("KEYS", "qlens:{budgets}:process:*")
            async with asyncio.timeout(5):
                while any(key.split()[1] != "0" for key in await server.command("HKEYS", process)):
                    await asyncio.sleep(0.05)
        # Whoever comes back begins anew.
        assert (await call(gateway, **long)).status == 200
        assert {row["window"]: row["spent_usd"] for row in await budgets(gateway)} == {
            "day": "0.00001",
            "total": "0.00003",
        }


async def test_a_window_is_not_forgotten_because_one_clock_runs_ahead(server: RedisServer) -> None:
    now = int(time.time())
    async with redis_budgets(server) as store:
        account = evolve(ACCOUNT, period="day")
        await store.sync("a", [Ask(account, now // 86_400 * 86_400, LIMIT, 0, 7)], now, 60)
        assert not await store.sweep("a", await store.sweep("a", "", now + 10**9), now + 10**9)
        (state,) = await store.states(now)
        assert state.spent == 7


async def test_a_budget_that_is_raised_stays_until_that_is_over(store: str) -> None:
    clock = ManualClock(1_700_000_000.0)
    async with serving("{per: tenant, usd: 0.000010, window: day}", patient(store), clock=clock) as gateway:
        assert (await call(gateway, messages=[{"role": "user", "content": "x " * 40}])).status == 200
        place = f"/admin/budgets/{(await budget(gateway))['id']}"
        ask = {"usd": "1", "expires_at": 1_700_000_000 + 5 * 86_400, "reason": "launch"}
        assert (await gateway.post(f"{place}/increase", ask, key="sk-example-ops")).status == 200
        clock.advance(4 * 86_400)
        await asyncio.sleep(0.8)
        assert (await gateway.get(place, key="sk-example-ops")).json()["limit_usd"] == "1.00001"
        clock.advance(2 * 86_400)
        async with asyncio.timeout(5):
            while (await gateway.get(place, key="sk-example-ops")).status != 404:
                await asyncio.sleep(0.05)


async def test_what_is_spent_outlasts_a_restart_and_the_command_shows_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = f'{{kind: sqlite, url: "sqlite:///{tmp_path / "budgets.db"}"}}'
    for spent in ("0.00001", "0.00002"):
        async with serving("{per: tenant, usd: 1}", store) as gateway:
            await call(gateway, messages=[{"role": "user", "content": "x " * 40}])
            assert (await budget(gateway))["spent_usd"] == spent
    (tmp_path / "qlens.yaml").write_text(config("{per: tenant, usd: 1}", store))
    (tmp_path / "keys.yaml").write_text(key_file()["keys.yaml"])
    assert await asyncio.to_thread(main, ["budgets", "--json", "-c", str(tmp_path / "qlens.yaml")]) == 0
    (row,) = json.loads(capsys.readouterr().out)["budgets"]
    assert (row["spent_usd"], row["reserved_usd"], row["owner"]) == ("0.00002", "0", "acme")


async def test_a_store_that_is_gone_refuses_hard_budgets_and_says_so(tmp_path: Path) -> None:
    store = f'{{kind: sqlite, url: "sqlite:///{tmp_path / "budgets.db"}", lease_seconds: 0}}'
    async with serving("{per: tenant, usd: 1}", store) as gateway:
        assert (await call(gateway)).status == 200
        (tmp_path / "budgets.db").rename(tmp_path / "away.db")
        answer = await call(gateway)
        assert (answer.status, answer.json()["error"]["code"]) == (503, "budget_unavailable")
        (tmp_path / "away.db").rename(tmp_path / "budgets.db")
        assert (await call(gateway)).status == 200


async def test_several_workers_need_a_store_that_they_share() -> None:
    with pytest.raises(ConfigError, match="budgets counts in each process"):
        async with running(
            config("{per: tenant, usd: 1}").replace("server: {", "server: {workers: 2, "), files=key_file()
        ):
            pass


@pytest.mark.parametrize(
    ("limits", "more", "said"),
    [
        ("{per: tenant, usd: -1}", "", "is no budget"),
        ("{per: tag, usd: 1}", "", "`tag` names"),
        ("{per: tenant, usd: 1}", ", time_zone: Mars/Base", "is no time zone"),
        ("{per: tenant, usd: 1}", ', tolerance: "much"', "is no tolerance"),
        ("{per: tenant, usd: 0.0000000000001}", "", "finer than a picodollar"),
    ],
)
async def test_what_is_wrong_is_said_with_its_place(limits: str, more: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        async with serving(limits, more=more):
            pass


# --- tolerance ---------------------------------------------------------------------------------


async def test_with_a_tolerance_agents_that_ask_for_much_run_beside_each_other() -> None:
    ask: dict[str, Any] = {"max_tokens": 1000, "messages": [{"role": "user", "content": "hi"}]}
    for tolerance, passing in (("0", 1), ("0.004", 5)):
        async with serving(
            "{per: tenant, usd: 0.0015}", more=f', tolerance: "{tolerance}"', params="{first_byte_ms: 100}"
        ) as gateway:
            answers = await asyncio.gather(*(call(gateway, **ask) for _ in range(8)))
            passed = sum(answer.status == 200 for answer in answers)
            assert passed == passing


# --- the stores --------------------------------------------------------------------------------

ACCOUNT = Account("budget-1", "tenant month", "tenant", "acme", "acme", "month")
LIMIT, TOLERANCE = 1000, 50
steps = st.lists(
    st.tuples(
        st.sampled_from(["take", "settle", "flush", "repeat", "late", "kill", "raise", "roll", "leave"]),
        st.integers(0, 2),
        st.integers(0, 400),
        st.integers(0, 60),
    ),
    max_size=25,
)


class Actor:
    """A process as the store sees it."""

    def __init__(self, name: str) -> None:
        self.name, self.n = name, 0
        self.born()

    def born(self) -> None:
        self.n += 1
        self.id, self.calls, self.spent, self.known = f"{self.name}{self.n}", list[Need](), 0, False
        self.last: Ask | None = None
        self.heard = 0.0
        """When the store heard of it last: what it held is charged when that is too long ago."""


async def play(store: Store, moves: list[tuple[str, int, int, int]]) -> list[object]:
    """What a store answers to a story; asserts what must hold at every moment of it."""
    actors, now, window, seen = [Actor("a"), Actor("b"), Actor("c")], 100.0, 0, list[object]()
    raised, charged = 0, 0

    async def sync(actor: Actor, needs: list[Need], spare: int) -> Told:
        actor.last = Ask(
            ACCOUNT, window, LIMIT, TOLERANCE, actor.spent, sum(n.likely for n in actor.calls),
            sum(n.excess for n in actor.calls), needs, spare, 0, actor.known,
        )  # fmt: skip
        (told,) = await store.sync(actor.id, [actor.last], now, 60)
        actor.known, actor.heard = True, now
        return told

    async def renew(but: Actor) -> None:
        for each in actors:
            if each is not but and each.known:
                if await store.renew(each.id, now, 60):
                    each.heard = now
                else:
                    each.born()  # it was late before, and what it held is charged

    for move, who, amount, excess in moves:
        actor = actors[who]
        told: Told | None = None
        if move == "take":
            need = Need(amount, excess)
            told = await sync(actor, [need], amount)
            if not told.given_up and told.granted[0]:
                actor.calls.append(need)
        elif move == "settle" and actor.calls:
            done = actor.calls.pop()
            actor.spent += min(amount, done.likely + done.excess)
            told = await sync(actor, [], 0)
        elif move == "flush":
            told = await sync(actor, [], amount)
        elif move == "repeat" and actor.last is not None:
            again = actor.last
            (told,) = await store.sync(actor.id, [again], now, 60)
            (told,) = await store.sync(actor.id, [again], now, 60)
            told = await sync(actor, [], 0)
        elif move == "late":
            now += 59
            await renew(actor)
        elif move == "kill" and actor.known:
            charged += sum(n.likely + n.excess for n in actor.calls)
            actor.born()
            now += 59
            await renew(actor)
            now += 2
            await renew(actor)
        elif move == "raise":
            raised += amount
            await store.increase(Increase(f"i{len(seen)}", ACCOUNT.id, amount, int(now) + 10**6, "", "", 0))
        elif move == "roll":
            window += 1
            for each in actors:
                if each.known:
                    await store.leave(each.id)
                each.born()
        elif move == "leave" and actor.known:
            await store.leave(actor.id)
            actor.born()
        states = await store.states(int(now))
        seen.append((move, told, [(s.window, s.spent, s.held, s.limit) for s in states]))
        for state in states:
            assert state.spent <= LIMIT + raised + TOLERANCE
            live = sum(need.likely for each in actors if now - each.heard < 60 for need in each.calls)
            assert state.window != window or state.held >= live
    return seen


@settings(max_examples=25, deadline=None)
@given(steps)
def test_sqlite_answers_as_memory_does_and_neither_overspends(moves: list[tuple[str, int, int, int]]) -> None:
    async def both() -> None:
        with tempfile.TemporaryDirectory() as folder:
            sqlite = SqliteStore(Path(folder) / "b.db")
            try:
                assert await play(sqlite, moves) == await play(MemoryStore(), moves)
            finally:
                await sqlite.close()

    asyncio.run(both())


LARGE = 4 * 10**15 + 7


def divisible(moves: list[tuple[str, int, int, int]]) -> list[tuple[str, int, int, int]]:
    """The same moves with limits that five divides: a fifth of a limit, rounded down, has no scale otherwise."""
    return [
        (move, who, amount * 5 if move == "raise" else amount, more)
        for move, who, amount, more in moves
        if move not in {"late", "kill"}
    ]


@define
class Large:
    """A store of large sums, beyond what a float can tell apart, seen as one of small ones."""

    store: Store

    async def sync(self, process: str, asks: Sequence[Ask], now: float, crash_seconds: float) -> list[Told]:
        sums = ("limit", "tolerance", "spent", "held", "excess", "spare", "floor")
        large = [
            evolve(
                ask,
                needs=[Need(need.likely * LARGE, need.excess * LARGE) for need in ask.needs],
                **{name: getattr(ask, name) * LARGE for name in sums},
            )
            for ask in asks
        ]
        return [
            evolve(
                told,
                spare=small(told.spare),
                spent=small(told.spent),
                held=small(told.held),
                limit=small(told.limit),
            )
            for told in await self.store.sync(process, large, now, crash_seconds)
        ]

    async def renew(self, process: str, now: float, crash_seconds: float) -> bool:
        return await self.store.renew(process, now, crash_seconds)

    async def leave(self, process: str) -> None:
        await self.store.leave(process)

    async def states(self, now: int, account: str | None = None) -> list[State]:
        found = await self.store.states(now, account)
        return [
            evolve(state, limit=small(state.limit), spent=small(state.spent), held=small(state.held)) for state in found
        ]

    async def increase(self, increase: Increase) -> None:
        await self.store.increase(evolve(increase, picos=increase.picos * LARGE))

    async def sweep(self, process: str, after: str, now: float) -> str:
        return await self.store.sweep(process, after, now)

    async def close(self) -> None:
        await self.store.close()


def small(amount: int) -> int:
    assert amount % LARGE == 0
    return amount // LARGE


@settings(max_examples=25, deadline=None)
@given(moves=steps.map(divisible))
def test_redis_answers_as_memory_does_and_is_exact_with_large_sums(
    server: RedisServer, moves: list[tuple[str, int, int, int]]
) -> None:
    async def both() -> None:
        async with redis_budgets(server) as store:
            with suppress(StoreAnew):  # it learns what it is to believe in
                await store.sync("x", [], 0, 60)
            assert await play(Large(store), moves) == await play(MemoryStore(), moves)

    asyncio.run(both())


@pytest.mark.parametrize("kind", [MemoryStore, SqliteStore])
async def test_what_a_dead_process_held_is_charged_once_and_it_is_told_when_it_comes_back(
    kind: Any, tmp_path: Path
) -> None:
    store: Store = kind(tmp_path / "b.db") if kind is SqliteStore else kind()
    first = Ask(ACCOUNT, 0, LIMIT, 0, 0, needs=[Need(300)])
    assert (await store.sync("dead", [first], 0, 10))[0].granted == [True]
    assert await store.renew("other", 11, 10) is False
    (state,) = await store.states(11)
    assert (state.spent, state.held) == (300, 0)
    (told,) = await store.sync("dead", [Ask(ACCOUNT, 0, LIMIT, 0, 120, is_known=True)], 12, 10)
    assert told.given_up
    (state,) = await store.states(12)
    assert isinstance(state, State)
    assert (state.spent, state.held) == (300, 0)
    await store.close()
