"""Budgets that operators give over HTTP: to a key by /admin/keys, to a tenant by /admin/tenants."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from keystores import ADMIN, config, key_file, key_of, made, send

from qlens.testing import Response, Running, running

PATH = "/v1/chat/completions"
# Input is free and a token of output costs 1 micro-dollar: this call costs 0.00001 USD.
TEN = {"model": "gpt-4o", "max_tokens": 10, "messages": [{"role": "user", "content": "x " * 40}]}
STORES = ("{kind: memory}", '{kind: sqlite, url: "sqlite:///budgets.db"}')


@asynccontextmanager
async def serving(store: str = STORES[0]) -> AsyncIterator[Running]:
    cost = f"""{{plugin: prices, table: [{{model: "*", input: 0, output: 1}}]}},
      {{plugin: budgets, limits: [{{per: model, usd: 9}}], store: {store}}}"""
    text = config(cost=cost).replace("  roles: {", "  roles: {landlord: {like: admin, paths: [/admin/tenants]}, ")
    async with running(text, files={"keys.yaml": key_file()}) as gateway:
        yield gateway


async def call(gateway: Running, key: dict[str, Any]) -> Response:
    return await gateway.post(PATH, TEN, key=key["key"])


async def until(gateway: Running, key: dict[str, Any], status: int) -> Response:
    """A call that is answered so, once the change of a limit is known."""
    async with asyncio.timeout(5):
        while (answer := await call(gateway, key)).status != status:
            await asyncio.sleep(0.02)
    return answer


async def listed(gateway: Running, key: str = ADMIN) -> dict[tuple[str, str], dict[str, Any]]:
    rows = (await send(gateway, "GET", "/admin/budgets", key=key)).json()["data"]
    return {(row["per"], row["owner"]): row for row in rows if row["per"] != "model"}


@pytest.mark.parametrize("store", STORES)
async def test_a_tenants_budget_is_one_for_all_its_keys_and_can_be_changed(store: str) -> None:
    async with serving(store) as gateway:
        limits = {"tenant_budget_usd": "0.000025", "tenant_budget_window": "day", "budget_usd": "1"}
        asked = await send(gateway, "POST", "/admin/tenants", {"name": "umbrella", "limits": limits})
        assert (asked.status, asked.json()["limits"]) == (200, {**limits, "budget_window": "month"})
        one, two = [await made(gateway, tenant="umbrella") for _ in range(2)]
        assert [(await call(gateway, each)).status for each in (one, two, one)] == [200, 200, 429]
        refused = await call(gateway, two)
        assert refused.json()["error"]["code"] == "insufficient_quota"
        assert "daily budget of tenant umbrella (0.000025 USD)" in refused.json()["error"]["message"]
        rows = await listed(gateway)
        assert rows.keys() == {("tenant", "umbrella"), ("key", one["id"]), ("key", two["id"])}
        row = rows["tenant", "umbrella"]
        assert (row["limit_usd"], row["spent_usd"], row["window"]) == ("0.000025", "0.00002", "day")
        own = (await gateway.get("/v1/budgets", key=one["key"])).json()["data"]
        assert {(each["per"], each["spent_usd"]) for each in own} >= {("tenant", "0.00002"), ("key", "0.00001")}
        assert (await call(gateway, await made(gateway, tenant="other"))).status == 200
        # More, and in the end none.
        more = {"limits": {"tenant_budget_usd": "0.000035", "tenant_budget_window": "day"}}
        assert (await send(gateway, "PATCH", "/admin/tenants/umbrella", more)).status == 200
        await until(gateway, one, 200)
        assert (await call(gateway, one)).status == 429
        assert (await listed(gateway))["tenant", "umbrella"]["limit_usd"] == "0.000035"
        assert (await send(gateway, "PATCH", "/admin/tenants/umbrella", {"limits": None})).status == 200
        await until(gateway, two, 200)


async def test_a_keys_budget_binds_that_key_alone_and_can_be_changed() -> None:
    async with serving() as gateway:
        small = await made(gateway, limits={"budget_usd": "0.000015", "budget_window": "total"})
        large = await made(gateway)
        assert [(await call(gateway, small)).status for _ in range(2)] == [200, 429]
        assert "total budget of key" in (await call(gateway, small)).json()["error"]["message"]
        assert (await call(gateway, large)).status == 200
        row = (await listed(gateway))["key", small["id"]]
        assert (row["limit_usd"], row["spent_usd"], row["tenant"]) == ("0.000015", "0.00001", "acme")
        change = {"limits": {"budget_usd": "0.000025", "budget_window": "total"}}
        assert (await send(gateway, "PATCH", f"/admin/keys/{small['id']}", change)).status == 200
        await until(gateway, small, 200)
        assert (await call(gateway, small)).status == 429


async def test_a_temporary_increase_reaches_what_was_given_over_http() -> None:
    async with serving() as gateway:
        await send(gateway, "POST", "/admin/tenants", {"name": "acme", "limits": {"tenant_budget_usd": "0.000015"}})
        key = await made(gateway)
        assert [(await call(gateway, key)).status for _ in range(2)] == [200, 429]
        place = f"/admin/budgets/{(await listed(gateway))['tenant', 'acme']['id']}"
        ask = {"usd": "0.00001", "expires_at": "2999-01-01T00:00:00Z", "reason": "launch"}
        bound = await made(gateway, roles=["operator"])
        assert (await send(gateway, "POST", f"{place}/increase", ask, bound["key"])).status == 403
        free = await made(gateway, tenant="ops", roles=["operator"])
        assert (await send(gateway, "POST", f"{place}/increase", ask, free["key"])).status == 200
        assert [(await call(gateway, key)).status for _ in range(2)] == [200, 429]


async def test_who_rules_one_tenant_sees_its_budget_and_no_other() -> None:
    async with serving() as gateway:
        for tenant in ("acme", "globex"):
            await send(gateway, "POST", "/admin/tenants", {"name": tenant, "limits": {"tenant_budget_usd": "1"}})
            assert (await call(gateway, await made(gateway, tenant=tenant))).status == 200
        assert (await listed(gateway, key_of("tenant_viewer"))).keys() == {("tenant", "acme")}
        assert (await listed(gateway)).keys() == {("tenant", "acme"), ("tenant", "globex")}


@pytest.mark.parametrize(
    ("path", "limits", "said"),
    [
        ("keys", {"tenant_budget_usd": "1"}, "unknown 'tenant_budget_usd'"),
        ("tenants", {"tenant_budget_usd": 1.5}, "US dollars as a text"),
        ("tenants", {"tenant_budget_usd": "-1"}, "must not be negative"),
        ("tenants", {"tenant_budget_window": "day"}, "tenant_budget_window needs a tenant_budget_usd"),
        ("tenants", {"tenant_budget_usd": "1", "tenant_budget_window": "hour"}, "must be day, week, month or total"),
    ],
)
async def test_what_is_wrong_is_named(path: str, limits: dict[str, Any], said: str) -> None:
    async with serving() as gateway:
        body = {"limits": limits, **({"tenant": "acme"} if path == "keys" else {"name": "acme"})}
        answer = await send(gateway, "POST", f"/admin/{path}", body)
        assert (answer.status, said in answer.text) == (400, True), answer.text


async def test_nobody_who_is_bound_by_a_tenants_budget_widens_it() -> None:
    async with serving() as gateway:
        limits = {"tenant_budget_usd": "10", "tenant_budget_window": "month"}
        assert (await send(gateway, "POST", "/admin/tenants", {"name": "acme", "limits": limits})).status == 200
        bound = (await made(gateway, roles=["landlord"]))["key"]
        for wider in (
            *({"tenant_budget_usd": "11"}, {"tenant_budget_usd": "10", "tenant_budget_window": "day"}),
            *({}, {"requests_per_minute": 1}),
        ):
            refused = await send(gateway, "PATCH", "/admin/tenants/acme", {"limits": wider}, bound)
            assert (refused.status, "tenant_budget_usd" in refused.text) == (403, True)
        narrower = {"tenant_budget_usd": "9", "tenant_budget_window": "total"}
        assert (await send(gateway, "PATCH", "/admin/tenants/acme", {"limits": narrower}, bound)).status == 200
        # It is no limit of the keys that somebody bound by it makes elsewhere.
        operator = await made(gateway, roles=["operator"])
        assert (await made(gateway, operator["key"], tenant="globex"))["limits"] is None
