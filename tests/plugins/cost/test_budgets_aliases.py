"""Budgets of models that have several names: what one name has spent is spent for all, in whatever order they stand."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from qlens import RedisSettings, Url, redis_store
from qlens.cli import main
from qlens.gateway import Gateway
from qlens.testing import Response, Running, running
from qlens.testing.redis import RedisServer, redis_server
from qlens_plugins.cost.budgets.memory import MemoryStore
from qlens_plugins.cost.budgets.redis import RedisBudgets
from qlens_plugins.cost.budgets.sqlite import SqliteStore
from qlens_plugins.cost.budgets.store import Account, Ask, Increase, Need, Store, Told

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


async def test_what_a_ledger_has_of_a_wildcard_is_the_wildcards(server: RedisServer, tmp_path: Path) -> None:
    text = config(ONE_PER_MODEL, **in_redis(server, tmp_path))
    async with serving(text) as gateway:
        assert await statuses(gateway, "open/out", "open/more", "open/other") == [200, 200, 200]
        await gateway.settled(3)
    await server.command("FLUSHALL")
    async with serving(text) as gateway:
        assert await statuses(gateway, "open/more", "gpt") == [429, 200]


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
