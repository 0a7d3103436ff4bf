"""Budgets of models that have several names: what one name has spent is spent for all, in whatever order they stand."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from decimal import Decimal
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve
from ledgers import Place, PostgresPlace, SqlitePlace

from qlens import Attempt, Caller, Cost, Receipt, RedisSettings, Target, Url, Usage, redis_store
from qlens.cli import main
from qlens.gateway import Gateway
from qlens.testing import Response, Running, running
from qlens.testing.postgres import PostgresServer, postgres_server
from qlens.testing.redis import RedisServer, redis_server
from qlens_plugins.cost.budgets.memory import MemoryStore
from qlens_plugins.cost.budgets.redis import RedisBudgets
from qlens_plugins.cost.budgets.sqlite import SqliteStore
from qlens_plugins.cost.budgets.store import Account, Ask, Increase, Need, Store, Told
from qlens_plugins.cost.ledger import rows
from qlens_plugins.cost.ledger.store import Batch

PATH = "/v1/chat/completions"
# Input is free and a token of output costs 1 micro-dollar: each call here costs 0.00001 USD.
TEN = {"max_tokens": 10, "messages": [{"role": "user", "content": "x " * 40}]}
ALL, FAST, OPEN, OPS = (f"sk-example-{name}" for name in ("all", "fast", "open", "ops"))
KEYS = {
    ALL: "id: all, tenant: acme",
    FAST: "id: fast, tenant: acme, models: [fast]",
    OPEN: "id: open, tenant: bolt, models: ['open/*']",
    OPS: "id: ops, tenant: ops, roles: [operator], models: [apart]",
}
ONE_PER_MODEL = "{per: model, usd: 0.000035}"
MODELS = {
    "gpt": "{max_output_tokens: 1000, targets: [{provider: up, model: out}]}",
    # Neither a spelling, nor what is said for prices, nor a weight, nor what is set for a target makes another model.
    "fast": "{targets: [{provider: up, model: OUT, region: eu, weight: 3, base_model: out, params: {user: x}}]}",
    "apart": "{max_output_tokens: 1000, targets: [{provider: up, model: other}]}",
    '"open/*"': '{max_output_tokens: 1000, targets: [{provider: up, model: "*"}]}',
}


def config(limits: str, store: str = "{kind: memory}", *, ledger: str = "", models: dict[str, str] = MODELS) -> str:
    rows = "\n".join(f"  {name}: {entry}" for name, entry in models.items())
    return f"""
server: {{port: 0, admin: {{port: 0}}}}
pipeline:
  auth: [{{plugin: api_keys, file: keys.yaml}}]
  cost:
    - {{plugin: prices, table: [{{model: "*", input: 0, output: 1}}]}}
    - {{plugin: budgets, limits: [{limits}], store: {store}}}
    {ledger and f'- {{plugin: ledger, url: "{ledger}", flush_seconds: 0.01}}'}
providers: {{up: {{plugin: echo}}}}
models:
{rows}
"""


def ordered(*names: str) -> dict[str, str]:
    """These models, in this order."""
    return {name: MODELS[name] for name in names}


def key_file() -> dict[str, str]:
    rows = [f"- {{hash: 'sha256:{hashlib.sha256(key.encode()).hexdigest()}', {said}}}" for key, said in KEYS.items()]
    return {"keys.yaml": "\n".join(["keys:", *rows])}


@asynccontextmanager
async def serving(text: str) -> AsyncIterator[Running]:
    async with running(text, files=key_file()) as gateway:
        yield gateway


@pytest.fixture
async def server() -> AsyncIterator[RedisServer]:
    async with redis_server() as server:
        yield server


@pytest.fixture(params=["memory", "sqlite", "redis"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """Each place where budgets may be, as `config` takes it."""
    if request.param == "memory":
        return {"store": "{kind: memory}"}
    if request.param == "sqlite":
        return {"store": f'{{kind: sqlite, url: "sqlite:///{tmp_path / "budgets.db"}"}}'}
    server: RedisServer = request.getfixturevalue("server")
    return in_redis(server, tmp_path)


def in_redis(server: RedisServer, folder: Path) -> dict[str, Any]:
    store = f'{{kind: redis, url: "{server.url}", timeout_ms: 2000, gather_seconds: 0}}'
    return {"store": store, "ledger": f"sqlite:///{folder / 'ledger.db'}"}


async def call(gateway: Running, model: str, key: str = ALL) -> Response:
    answer = await gateway.post(PATH, {**TEN, "model": model}, key=key)
    assert answer.status == 200 or answer.json()["error"]["code"] == "insufficient_quota", answer.text
    return answer


async def statuses(gateway: Running, *models: str, key: str = ALL) -> list[int]:
    return [(await call(gateway, model, key)).status for model in models]


async def shown(gateway: Running, key: str = ALL, path: str = "/v1/budgets") -> dict[str, tuple[str, str, str]]:
    """What is spent, reserved and left, by owner."""
    rows = (await gateway.get(path, key=key)).json()["data"]
    assert len({row["owner"] for row in rows}) == len(rows)
    return {row["owner"]: (row["spent_usd"], row["reserved_usd"], row["remaining_usd"]) for row in rows}


# --- one budget --------------------------------------------------------------------------------


async def test_all_names_of_a_model_spend_one_budget_and_usage_has_the_name_that_was_asked(
    place: dict[str, Any],
) -> None:
    """T29."""
    async with serving(config(ONE_PER_MODEL, **place)) as gateway:
        asked = ("gpt", "fast", "open/OUT")
        assert await statuses(gateway, "open/more", "open/other", "apart", *asked) == [200] * 6
        for name in (*asked, "open/out", "open/out "):
            answer = await call(gateway, name)
            assert answer.status == 429
            assert "budget of model gpt" in answer.json()["error"]["message"]
        served = [receipt for receipt in await gateway.settled(11) if receipt.outcome == "complete"]
        assert [receipt.model for receipt in served] == ["open/*", "open/*", "apart", "gpt", "fast", "open/*"]
        assert await shown(gateway) == {
            "gpt": ("0.00003", "0", "0.000005"),
            "apart": ("0.00002", "0", "0.000015"),
            "open/*": ("0.00001", "0", "0.000025"),
        }


async def test_a_name_that_differs_in_case_or_space_is_no_model() -> None:
    models = ordered("gpt", "fast")
    async with serving(config(ONE_PER_MODEL, models=models)) as gateway:
        for name in ("GPT", "gpt ", " gpt", "ｇｐｔ", "gpt\u200b"):
            answer = await gateway.post(PATH, {**TEN, "model": name}, key=ALL)
            assert (answer.status, answer.json()["error"]["code"]) == (404, "model_not_found")


async def test_models_that_share_some_targets_alone_are_apart() -> None:
    more = "{max_output_tokens: 1000, targets: [{provider: up, model: out}, {provider: up, model: other}]}"
    async with serving(config(ONE_PER_MODEL, models={**ordered("gpt"), "both": more})) as gateway:
        assert await statuses(gateway, "gpt", "gpt", "gpt", "gpt", "both") == [200, 200, 200, 429, 200]


async def test_what_is_said_of_one_name_holds_for_the_others() -> None:
    limits = """{per: tenant, usd: 0.000025, match: {model: [fast]}},
      {per: key, usd: 0.000015, match: {model: ["open/*"]}}"""
    async with serving(config(limits)) as gateway:
        assert await statuses(gateway, "gpt", "open/out", "apart") == [200, 200, 200]
        assert await statuses(gateway, "gpt", "fast", "open/out", "open/other") == [429] * 4
        assert await statuses(gateway, "apart") == [200]


async def test_a_caller_sees_the_budget_of_a_name_that_it_may_use_under_the_first_name() -> None:
    async with serving(config(ONE_PER_MODEL)) as gateway:
        assert await statuses(gateway, "gpt") == [200]
        assert (await call(gateway, "open/out", OPEN)).status == 200
        assert await shown(gateway, FAST) == {"gpt": ("0.00002", "0", "0.000015")}
        seen = await shown(gateway, OPEN)
        assert seen["gpt"] == ("0.00002", "0", "0.000015")
        assert "open/*" in seen


async def test_who_may_use_one_name_may_not_raise_the_budget_for_itself() -> None:
    async with serving(config(ONE_PER_MODEL)) as gateway:
        assert await statuses(gateway, "fast") == [200]
        (row,) = (await gateway.get("/admin/budgets", key=OPS)).json()["data"]
        path = f"/admin/budgets/{row['id']}/increase"
        asked = {"usd": "0.00001", "expires_at": "2100-01-01T00:00:00Z", "reason": "launch"}
        assert (await gateway.post(path, asked, key=OPS)).status == 200
        models = {**MODELS, "apart": MODELS["gpt"]}  # now it is another name of it
        await gateway.reload(config(ONE_PER_MODEL, models=models))
        assert (await gateway.post(path, asked, key=OPS)).status == 403
        assert await statuses(gateway, "gpt", "fast", "gpt", "gpt") == [200, 200, 200, 429]


# --- the order changes -------------------------------------------------------------------------


async def test_a_reload_that_adds_a_name_gives_no_room(place: dict[str, Any]) -> None:
    async with serving(config(ONE_PER_MODEL, models=ordered("gpt", "apart"), **place)) as gateway:
        assert await statuses(gateway, "gpt", "gpt") == [200, 200]
        await gateway.settled(2)
        for models in (ordered("gpt", "fast"), ordered("fast", "gpt")):
            await gateway.reload(config(ONE_PER_MODEL, models=models, **place))
            first = next(iter(models))
            assert await shown(gateway) == {first: ("0.00002", "0", "0.000015")}
        assert await statuses(gateway, "fast", "gpt", "fast") == [200, 429, 429]
        assert await shown(gateway) == {"fast": ("0.00003", "0", "0.000005")}
        (row,) = (await gateway.get("/admin/budgets", key=OPS)).json()["data"][:1]
        assert (row["owner"], row["spent_usd"]) == ("fast", "0.00003")
        assert (await gateway.get(f"/admin/budgets/{row['id']}", key=OPS)).json()["spent_usd"] == "0.00003"
        await gateway.reload(config(ONE_PER_MODEL, models=ordered("gpt", "fast"), **place))
        assert await shown(gateway) == {"gpt": ("0.00003", "0", "0.000005")}
        assert (await gateway.get(f"/admin/budgets/{row['id']}", key=OPS)).status == 404
        assert await statuses(gateway, "fast", "gpt") == [429, 429]


async def test_what_two_models_had_spent_is_added_when_they_become_one(place: dict[str, Any]) -> None:
    other = {**ordered("gpt"), "fast": MODELS["apart"]}
    async with serving(config(ONE_PER_MODEL, models=other, **place)) as gateway:
        assert await statuses(gateway, "gpt", "fast") == [200, 200]
        await gateway.settled(2)
        await gateway.reload(config(ONE_PER_MODEL, models=ordered("gpt", "fast"), **place))
        assert await shown(gateway) == {"gpt": ("0.00002", "0", "0.000015")}
        assert await statuses(gateway, "fast", "gpt", "fast") == [200, 429, 429]


async def test_warnings_and_refusals_know_what_the_other_names_have_spent(
    place: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    slow = "{max_output_tokens: 1000, targets: [{provider: up, model: out, params: {first_byte_ms: 1500}}]}"
    async with serving(config(ONE_PER_MODEL, models=ordered("gpt"), **place)) as gateway:
        assert await statuses(gateway, "gpt", "gpt") == [200, 200]
        await gateway.settled(2)
        models = {**ordered("fast", "gpt"), "slow": slow}
        await gateway.reload(config(ONE_PER_MODEL, models=models, **place))
        assert await shown(gateway) == {"fast": ("0.00002", "0", "0.000015")}
        assert await statuses(gateway, "fast") == [200]
        await gateway.settled(3)
        assert "budget of model 'fast', 0.000035 USD: 80 % are spent (0.00003 USD)" in caplog.text
        few = {"model": "slow", "max_tokens": 5, "messages": [{"role": "user", "content": "hello"}]}
        running_ = asyncio.create_task(gateway.post(PATH, few, key=ALL))
        async with asyncio.timeout(5):
            while (await shown(gateway))["fast"][1] == "0":
                await asyncio.sleep(0.01)
        # Not the call that runs stands in the way, but what is spent.
        assert (await call(gateway, "gpt")).json()["error"]["code"] == "insufficient_quota"
        assert (await running_).status == 200


@pytest.mark.parametrize("place", ["sqlite", "redis"], indirect=True)
async def test_gateways_that_name_them_in_another_order_and_restarts_count_together(
    place: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there, back = (
        config(ONE_PER_MODEL, models=ordered(*names), **place) for names in (("gpt", "fast"), ("fast", "gpt"))
    )
    async with AsyncExitStack() as stack:
        one, other = [await stack.enter_async_context(serving(text)) for text in (there, back)]
        assert await statuses(one, "fast") == [200]
        await shown(one)  # which tells the store
        assert await statuses(other, "fast") == [200]
        assert await shown(other) == {"fast": ("0.00002", "0", "0.000015")}
        assert await shown(one) == {"gpt": ("0.00002", "0", "0.000015")}
    (tmp_path / "qlens.yaml").write_text(back)
    (tmp_path / "keys.yaml").write_text(key_file()["keys.yaml"])
    async with serving(back) as gateway:
        assert await statuses(gateway, "gpt", "fast") == [200, 429]
    assert await asyncio.to_thread(main, ["budgets", "-c", str(tmp_path / "qlens.yaml"), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["budgets"]
    assert (row["owner"], row["spent_usd"]) == ("fast", "0.00003")


# --- what the ledger has -----------------------------------------------------------------------


async def test_a_redis_that_comes_back_empty_is_told_of_all_names(server: RedisServer, tmp_path: Path) -> None:
    limits = f"{ONE_PER_MODEL}, {{per: tenant, usd: 0.000035, match: {{model: [fast]}}}}"
    text = config(limits, **in_redis(server, tmp_path))
    async with serving(text) as gateway:
        assert await statuses(gateway, "gpt", "fast", "apart") == [200, 200, 200]
        await gateway.settled(3)
    await server.command("FLUSHALL")
    async with serving(text) as gateway:
        assert await statuses(gateway, "fast", "gpt", "fast", "apart") == [200, 429, 429, 200]
        assert await shown(gateway) == {
            "gpt": ("0.00003", "0", "0.000005"),
            "acme": ("0.00003", "0", "0.000005"),
            "apart": ("0.00002", "0", "0.000015"),
            "open/*": ("0", "0", "0.000035"),
        }


WILDCARDS = {**MODELS, '"more/*"': MODELS['"open/*"']}
ASKED = ("gpt", "fast", "open/out", "more/OUT", "open/zzz", "apart")
COUNTED = """{per: model, usd: 1}, {per: model, usd: 1, window: total},
      {per: tenant, usd: 1, match: {model: [fast]}}, {per: key, usd: 1, match: {model: ["open/*"]}},
      {per: project, usd: 1, match: {model: [gpt, "*"]}}, {per: key, usd: 1, window: day, match: {tenant: [acme]}}"""
BUDGETS = {
    **{(f"model {window}", "gpt"): 4 for window in ("month", "total")},
    **{(f"model {window}", name): 1 for window in ("month", "total") for name in ("open/*", "apart")},
    ("tenant month model=fast", "acme"): 4,
    ("key month model=open/*", "all"): 3,
    ("project month model=gpt,*", "acme"): 6,
    ("key day tenant=acme", "all"): 6,
}
"""How many of ASKED count in each budget."""


async def calls_in(gateway: Running) -> dict[tuple[str, str], Decimal]:
    """For how many calls is spent, by rule and owner; the gateway says all it knows first."""
    async with asyncio.timeout(10):
        while (answer := await gateway.get("/admin/budgets", key=OPS)).status == 503:
            await asyncio.sleep(0.05)
    rows = answer.json()["data"]
    return {(row["budget"], row["owner"]): Decimal(row["spent_usd"]) * 100_000 for row in rows}


@pytest.mark.parametrize("how", ["a new gateway", "the same gateway"])
async def test_what_is_spent_is_to_the_picodollar_the_same_once_redis_has_been_emptied(
    server: RedisServer, how: str, tmp_path: Path
) -> None:
    """Whatever name of a model was asked for, and whatever windows and lines count it: each call once in each."""
    text = config(COUNTED, models=WILDCARDS, **in_redis(server, tmp_path))
    async with AsyncExitStack() as stack:
        gateway = await stack.enter_async_context(serving(text))
        assert await statuses(gateway, *ASKED) == [200] * 6
        await gateway.settled(6)
        assert await calls_in(gateway) == BUDGETS
        if how == "a new gateway":
            await stack.aclose()
        await server.command("FLUSHALL")
        if how == "a new gateway":
            gateway = await stack.enter_async_context(serving(text))
        else:
            assert await calls_in(gateway) == BUDGETS
        assert await statuses(gateway, *ASKED) == [200] * 6
        await gateway.settled(12 if how == "the same gateway" else 6)
        assert await calls_in(gateway) == {name: 2 * calls for name, calls in BUDGETS.items()}


@pytest.mark.parametrize("more", [0, 1])
async def test_a_redis_that_another_gateway_has_begun_anew_is_told_all_before_it_is_asked(
    server: RedisServer, more: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether or not there is something it was not told before, which is when the gateway finds that out."""
    monkeypatch.setattr("qlens_plugins.cost.budgets.tills.TICK_SECONDS", 3600)
    slow = {**WILDCARDS, "apart": WILDCARDS["apart"].replace("other", "other, params: {first_byte_ms: 300}")}
    text = config(COUNTED, models=slow, **in_redis(server, tmp_path))
    # The ledger goes by when calls began: one that ends behind the loss would be counted twice, rather than never.
    async with serving(text.replace("flush_seconds: 0.01", "flush_seconds: 600")) as gateway:
        assert await statuses(gateway, *ASKED) == [200] * 6
        await gateway.settled(6)
        running = [asyncio.create_task(call(gateway, "apart")) for _ in range(more)]
        await asyncio.sleep(0.1)
        assert await calls_in(gateway) == BUDGETS
        await server.command("FLUSHALL")
        async with kept_in_redis(server):
            await asyncio.gather(*running)
            await gateway.settled(6 + more)
            counted = {name for name in BUDGETS if name[1] == "apart" or name[0].startswith(("project", "key day"))}
            assert await calls_in(gateway) == {name: n + (name in counted) * more for name, n in BUDGETS.items()}


async def test_gateways_that_name_a_model_in_another_order_take_its_past_once(
    server: RedisServer, tmp_path: Path
) -> None:
    place = in_redis(server, tmp_path)
    place["store"] = place["store"].replace("gather_seconds: 0", "gather_seconds: 2")
    texts = [config(ONE_PER_MODEL.replace("35", "65"), models=ordered(*names), **place) for names in (
        ("gpt", "fast"), ("fast", "gpt")
    )]  # fmt: skip
    async with AsyncExitStack() as stack:
        one, other = [await stack.enter_async_context(serving(text)) for text in texts]
        assert [*await statuses(one, "gpt"), *await statuses(other, "gpt", "fast")] == [200] * 3
        await one.settled(1)
        await other.settled(2)
        for gateway in (other, one):
            await calls_in(gateway)
        await server.command("FLUSHALL")
        for gateway in (one, other):  # each says what it was told
            await calls_in(gateway)
        for gateway in (one, other):
            async with asyncio.timeout(10):
                while (await gateway.post(PATH, {**TEN, "model": "gpt"}, key=ALL)).status != 200:
                    await asyncio.sleep(0.05)
        await one.settled(2)
        await calls_in(other)
        assert await calls_in(one) == {("model month", "gpt"): 5}
        assert await statuses(one, "gpt", "fast") == [200, 429]


async def test_a_reload_that_puts_another_name_first_takes_no_past_twice(server: RedisServer, tmp_path: Path) -> None:
    place = in_redis(server, tmp_path)
    async with serving(config(ONE_PER_MODEL, models=ordered("gpt", "fast"), **place)) as gateway:
        assert await statuses(gateway, "gpt") == [200]
        await gateway.reload(config(ONE_PER_MODEL, models=ordered("fast", "gpt"), **place))
        assert await statuses(gateway, "gpt") == [200]
        await gateway.settled(2)
        assert await calls_in(gateway) == {("model month", "fast"): 2}
        await server.command("FLUSHALL")
        assert await calls_in(gateway) == {("model month", "fast"): 2}
        assert await statuses(gateway, "gpt", "gpt") == [200, 429]


async def test_what_a_fallback_has_answered_counts_as_what_was_asked_for(server: RedisServer, tmp_path: Path) -> None:
    failing = "params: {fail_status: 500}"
    models = {
        "gpt": f"{{max_output_tokens: 1000, targets: [{{provider: up, model: out, {failing}}}]}}",
        "apart": MODELS["apart"],
        '"open/*"': f"""{{max_output_tokens: 1000, fallbacks: [apart],
    targets: [{{provider: up, model: "*", {failing}}}]}}""",
    }
    text = config(ONE_PER_MODEL, models=models, **in_redis(server, tmp_path))
    for spent in (1, 2):
        async with serving(text) as gateway:
            assert await statuses(gateway, "open/out", "open/zzz", "apart") == [200, 200, 200]
            await gateway.settled(3)
            assert await calls_in(gateway) == {("model month", name): spent for name in ("gpt", "open/*", "apart")}
        await server.command("FLUSHALL")


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    with postgres_server() as server:
        yield server


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
async def test_the_past_of_many_days_is_read_from_either_ledger_and_of_deleted_receipts_the_wildcard_has_it(
    server: RedisServer, kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    ledger: Place = SqlitePlace(tmp_path / "ledger.db")
    if kind == "postgres":
        databases: PostgresServer = request.getfixturevalue("postgres")
        ledger = PostgresPlace(databases, databases.new_database())
    now, day_ns = time.time_ns(), 86_400 * 10**9
    # Of two tenants, by three names behind the wildcard and one beside it, over ten days.
    asked = {"OUT": "open/*", "other": "open/*", "zzz": "open/*", "out": "gpt"}
    made = [
        rows.row(past_receipt(number, tenant, asked[upstream], upstream, now - number * day_ns // 4))
        for number, (tenant, upstream) in enumerate(product(("acme", "bolt"), [*asked] * 5), 1)
    ]

    # Nobody can tell what this one was asked for: it is in each budget that it may be of.
    unknown = evolve(past_receipt(99, "bolt", "open/*", "", now), target=None, attempts=(), error="interrupted")
    made.append(rows.row(unknown))

    def fill() -> None:
        store = ledger.store()
        store.write("filled", Batch(1, made, {}))
        store.close()

    await asyncio.to_thread(fill)
    limits = """{per: model, usd: 1, window: total}, {per: model, usd: 1, window: total, match: {tenant: [acme]}},
      {per: tenant, usd: 1, window: total, match: {model: [fast]}}"""
    store = in_redis(server, tmp_path)["store"]
    text = config(limits, store, ledger=ledger.url)
    expected: dict[Any, Any] = {
        ("model total", "gpt"): 21, ("model total", "open/*"): 11, ("model total", "apart"): 11,
        ("model total tenant=acme", "gpt"): 10, ("model total tenant=acme", "open/*"): 5,
        ("model total tenant=acme", "apart"): 5, ("tenant total model=fast", "acme"): 10,
    }  # fmt: skip
    async with serving(text) as gateway:
        assert await statuses(gateway, "gpt", "open/zzz", "apart") == [200] * 3
        await gateway.settled(3)
        assert await calls_in(gateway) == {name: calls + 1 for name, calls in expected.items()}
    ledger.execute("DELETE FROM receipts WHERE tenant = 'acme' AND cost_state = 'estimated'")
    await server.command("FLUSHALL")
    async with serving(text) as gateway:
        assert await statuses(gateway, "gpt", "open/zzz", "apart") == [200] * 3
        await gateway.settled(3)
        # Of those behind the wildcard 15 of acme's are left in the sums alone: they are the wildcard's.
        changes = {"gpt": -5, "open/*": 10, "apart": -5}
        assert await calls_in(gateway) == {
            **{name: calls + 2 + changes[name[1]] for name, calls in expected.items() if name[1] in changes},
            ("tenant total model=fast", "acme"): expected["tenant total model=fast", "acme"] + 2 - 5,
        }


def past_receipt(number: int, tenant: str, model: str, upstream: str, wall_ns: int) -> Receipt:
    """One that cost as much as a call here; `estimated` behind a wildcard."""
    state: Any = "estimated" if model == "open/*" else "exact"
    digits, target = f"{wall_ns // 10**6:012x}", Target("up", upstream, model)
    return Receipt(
        id=f"{digits[:8]}-{digits[8:]}-7000-8000-{number:012x}",
        caller=Caller(tenant, "bob", "keys", key_id="all"),
        operation="chat",
        model=model,
        target=target,
        outcome="complete",
        status=200,
        error=None,
        usage=Usage(output=10, source="provider"),
        cost=Cost(10**7, state, "*/m"),
        saved_picos=0,
        cache="off",
        streamed=False,
        attempts=(Attempt(1, target, 0, ended=1, status=200),),
        tags={},
        wall_ns=wall_ns,
        ttft_us=1,
        total_us=1,
        overhead_us=1,
        bytes_out=1,
        config_version="v",
    )


# --- the stores --------------------------------------------------------------------------------

PIECES = 10**12


@asynccontextmanager
async def kept_in_redis(server: RedisServer) -> AsyncIterator[RedisBudgets]:
    async with redis_store(Gateway(), RedisSettings(url=Url(server.url), timeout_ms=2000)) as redis:

        async def past(account: Account, start: int, end: int) -> int:
            return 0

        store = RedisBudgets(redis, past, gather_seconds=0)
        await store.open()
        yield store


async def test_all_stores_count_the_same_beside(server: RedisServer, tmp_path: Path) -> None:
    """What runs, what is spent and what is tolerated, beyond what a float can tell apart."""

    def account(name: str) -> Account:
        return Account(f"budget-{name}", "model total", "model", name, None, "total")

    async def story(store: Store) -> list[object]:
        a, b, c = map(account, "abc")
        limit, large = 3_000_000 * PIECES, 900_000 * PIECES
        told: list[Told] = []

        async def ask(process: str, asked: Ask) -> None:
            told.extend(await store.sync(process, [asked], 100, 60))

        await ask("p", Ask(a, 0, limit, 5, large + 1, needs=[Need(large), Need(7, 3)], part=1))
        await ask("q", Ask(b, 0, limit, 5, 1, needs=[Need(10)], spare=limit, part=2, beside=[a.id, c.id]))
        await ask("q", Ask(b, 0, limit, 5, 2, 10, needs=[Need(large), Need(1, 2)], part=2, beside=[a.id, c.id]))
        await ask("q", Ask(b, 0, limit, 5, 2, 10, needs=[Need(1, 3)], part=2, beside=[a.id, c.id]))
        rest = limit - 2 * large - 1 - 7 - large - 13
        await store.increase(Increase("i", b.id, 1, 10**9, "", "", 0))
        await ask("q", Ask(b, 0, limit, 5, large + 3, 10, needs=[Need(rest), Need(rest)], part=2, beside=[a.id]))
        return [*((list(t.granted), t.spare, t.spent, t.held, t.limit, t.beside) for t in told)]

    sqlite = SqliteStore(tmp_path / "budgets.db")
    await sqlite.open()
    expected = await story(MemoryStore())
    assert await story(sqlite) == expected
    await sqlite.close()
    async with kept_in_redis(server) as redis:
        assert await story(redis) == expected
    granted = [each[0] for each in expected if isinstance(each, tuple)]
    assert granted == [[True, True], [True], [True, True], [False], [True, False]]
