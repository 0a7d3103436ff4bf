"""Budgets as callers see them: which ones count their calls, what they will have cost, and who refuses for how long."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import openai
import pytest

from qlens import Event
from qlens.testing import ManualClock, Response, Running, running

PATH = "/v1/chat/completions"
# Input is free and a token of output costs 1 micro-dollar: this call costs 0.00001 USD.
TEN = {"model": "out", "max_tokens": 10, "messages": [{"role": "user", "content": "x " * 40}]}
WEB, OPS, BARE, OTHERS = (f"sk-example-{name}" for name in ("web", "ops", "bare", "others"))
KEYS = {
    WEB: "id: web, tenant: acme, project: shop, tags: {team: search, stage: test}, models: [out, open/a]",
    BARE: "id: bare, tenant: acme, models: [other]",
    OTHERS: "id: others, tenant: bolt, tags: {team: ads}",
    OPS: "id: ops, tenant: ops, roles: [operator]",
}
STORES = ["{kind: memory}", '{kind: sqlite, url: "sqlite:///budgets.db"}']


def key_file() -> dict[str, str]:
    rows = [f"- {{hash: 'sha256:{hashlib.sha256(key.encode()).hexdigest()}', {said}}}" for key, said in KEYS.items()]
    return {"keys.yaml": "\n".join(["keys:", *rows])}


@asynccontextmanager
async def serving(
    limits: str, *, clock: ManualClock | None = None, more: str = "", params: str = "{}"
) -> AsyncIterator[Running]:
    text = f"""
server: {{port: 0, admin: {{port: 0}}}}
pipeline:
  auth: [{{plugin: api_keys, file: keys.yaml}}]
  cost:
    - {{plugin: prices, table: [{{model: out, input: 0, output: 1}}]}}
    - {{plugin: budgets, limits: [{limits}]{more}}}
providers: {{up: {{plugin: echo}}}}
models:
  out: {{max_output_tokens: 1000, targets: [{{provider: up, model: out, params: {params}}}]}}
  other: {{max_output_tokens: 1000, targets: [{{provider: up, model: other, base_model: out}}]}}
  "open/*": {{max_output_tokens: 1000, targets: [{{provider: up, model: open, base_model: out}}]}}
"""
    async with running(text, files=key_file(), clock=clock) as gateway:
        yield gateway


async def call(gateway: Running, key: str = WEB, **more: object) -> Response:
    return await gateway.post(PATH, {**TEN, **more}, key=key)


async def own(gateway: Running, key: str = WEB) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = (await gateway.get("/v1/budgets", key=key)).json()["data"]
    return rows


def at(text: str) -> ManualClock:
    return ManualClock(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp())


# --- which ones --------------------------------------------------------------------------------


async def test_a_caller_sees_every_budget_that_its_calls_count_in_and_no_other() -> None:
    limits = """{per: tenant, usd: 1}, {per: project, usd: 2}, {per: key, usd: 3, window: day}, {per: model, usd: 4},
      {per: tag, tag: team, usd: 5}, {per: tag, tag: floor, usd: 5}, {per: tag, tag: stage, usd: 6, hard: false},
      {per: tenant, usd: 7, match: {model: [other]}}, {per: tenant, usd: 8, match: {tenant: [bolt]}}"""
    async with serving(limits) as gateway:
        assert (await call(gateway)).status == 200
        await gateway.settled(1)
        rows = {(row["per"], row["owner"], row["limit_usd"]): row for row in await own(gateway)}
        counted = {
            *(("tenant", "acme", "1"), ("project", "shop", "2"), ("key", "web", "3"), ("model", "out", "4")),
            *(("tag team", "search", "5"), ("tag stage", "test", "6")),
        }
        assert rows.keys() == {*counted, ("model", "open/*", "4")}
        for each in counted:
            row = rows[each]
            assert (row["spent_usd"], row["reserved_usd"]) == ("0.00001", "0")
            assert float(row["remaining_usd"]) == pytest.approx(float(row["limit_usd"]) - 0.00001, abs=1e-12)
            assert row["hard"] is (row["per"] != "tag stage")
            assert row["resets_at"] > row["starts_at"]
        assert rows["model", "open/*", "4"]["spent_usd"] == "0"
        assert {(row["per"], row["owner"], row["limit_usd"]) for row in await own(gateway, BARE)} == {
            *(("tenant", "acme", "1"), ("tenant", "acme", "2"), ("key", "bare", "3"), ("model", "other", "4")),
            ("tenant", "acme", "7"),
        }


async def test_a_budget_is_shown_with_what_running_calls_hold() -> None:
    async with serving("{per: model, usd: 0.000030}", params="{first_byte_ms: 1000}") as gateway:
        running_ = asyncio.create_task(call(gateway, max_tokens=12))
        async with asyncio.timeout(5):
            while (row := (await own(gateway))[0])["reserved_usd"] == "0":
                await asyncio.sleep(0.005)
        assert (row["spent_usd"], row["reserved_usd"], row["remaining_usd"]) == ("0", "0.000012", "0.000018")
        assert (await running_).status == 200


# --- when --------------------------------------------------------------------------------------


async def test_what_a_window_will_have_cost_goes_on_as_it_went() -> None:
    limits = "{per: tenant, usd: 1}, {per: key, usd: 1, window: week}, {per: project, usd: 1, window: total}"
    clock = at("2026-11-08T12:00")  # a Sunday: of November 7.5 days are over, of the week 6.5
    async with serving(limits, clock=clock) as gateway:
        assert (await call(gateway)).status == 200
        await gateway.settled(1)

        async def projected() -> dict[str, str | None]:
            return {row["window"]: row["projected_usd"] for row in await own(gateway)}

        assert await projected() == {"month": "0.00004", "week": "0.00001076923", "total": None}
        listed = (await gateway.get("/admin/budgets", key=OPS)).json()["data"]
        assert {row["window"]: row["projected_usd"] for row in listed} == await projected()
        clock.advance(7.5 * 86_400)
        assert await projected() == {"month": "0.00002", "week": "0", "total": None}


async def test_days_begin_in_the_time_zone_of_the_file() -> None:
    clock = at("2026-03-28T22:30")  # 23:30 in Berlin
    limits = "{per: tenant, usd: 0.000015, window: day}"
    async with serving(limits, clock=clock, more=", time_zone: Europe/Berlin") as gateway:
        assert [(await call(gateway)).status for _ in range(2)] == [200, 429]
        clock.advance(1800)
        assert [(await call(gateway)).status for _ in range(2)] == [200, 429]
        (row,) = await own(gateway)
        # The clocks are changed: a day of 23 hours.
        assert (row["starts_at"], row["resets_at"]) == ("2026-03-28T23:00:00Z", "2026-03-29T22:00:00Z")
        clock.advance(3600)  # midnight in London, and no new day here
        assert (await call(gateway)).status == 429


# --- who refuses, and for how long -------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "named"),
    [("{per: tag, tag: team, usd: 0.000015}", "tag team search"), ("{per: model, usd: 0.000015}", "model out")],
)
async def test_a_budget_of_a_tag_or_a_model_refuses_those_who_count_in_it(limit: str, named: str) -> None:
    async with serving(limit) as gateway:
        assert (await call(gateway)).status == 200
        answer = await call(gateway)
        assert (answer.status, answer.json()["error"]["code"]) == (429, "insufficient_quota")
        assert f"monthly budget of {named} (0.000015 USD)" in answer.json()["error"]["message"]
        if "tag" in limit:
            assert (await call(gateway, OTHERS)).status == 200
        else:
            assert (await call(gateway, OTHERS)).status == 429  # everybody's
            assert (await call(gateway, OTHERS, model="open/b")).status == 200


@pytest.mark.parametrize("store", STORES)
async def test_where_only_running_calls_stand_in_the_way_the_sdk_tries_again_and_passes(store: str) -> None:
    more = f", store: {store}"
    async with serving("{per: tenant, usd: 0.000025}", more=more, params="{first_byte_ms: 1500}") as gateway:
        hello = [{"role": "user", "content": "hello"}]  # few tokens of the many that it may use
        first = asyncio.create_task(call(gateway, max_tokens=20, messages=hello))
        async with asyncio.timeout(5):
            while (await own(gateway))[0]["reserved_usd"] == "0":
                await asyncio.sleep(0.005)
        busy = await call(gateway, max_tokens=10)
        assert busy.status == 429
        assert (busy.json()["error"]["type"], busy.json()["error"]["code"]) == ("tokens", "rate_limit_exceeded")
        assert "x-should-retry" not in busy.headers
        assert (busy.headers["retry-after"], busy.headers["retry-after-ms"]) == ("1", "1000")
        assert "calls that are running hold 0.00002 USD" in busy.json()["error"]["message"]
        async with openai.AsyncOpenAI(api_key=WEB, base_url=f"{gateway.url}/v1", max_retries=3) as sdk:
            body: dict[str, Any] = {**TEN, "max_tokens": 10}
            assert (await sdk.chat.completions.create(**body)).usage is not None
        assert (await first).status == 200
        # What is spent now does not come back before the window ends.
        spent = await call(gateway, max_tokens=20)
        assert (spent.status, spent.json()["error"]["code"]) == (429, "insufficient_quota")
        assert (spent.headers["x-should-retry"], "retry-after" in spent.headers) == ("false", False)
        assert "It begins anew at" in spent.json()["error"]["message"]


@pytest.mark.parametrize("store", STORES)
async def test_who_has_spent_his_own_budget_keeps_nobody_out_of_one_that_is_shared(store: str) -> None:
    limits = "{per: model, usd: 0.000200}, {per: key, usd: 0.000015, match: {key: [web]}}"
    async with serving(limits, more=f", store: {store}") as gateway:
        assert (await call(gateway)).status == 200
        await gateway.settled(1)
        spent, passing = ([call(gateway, key) for _ in range(count)] for key, count in ((WEB, 40), (OTHERS, 5)))
        answers = await asyncio.gather(*spent[:20], *passing, *spent[20:])
        assert [answer.status for answer in answers[20:25]] == [200] * 5
        refused = [answer.json()["error"] for answer in (*answers[:20], *answers[25:])]
        assert {(error["code"], error["message"].partition(" (")[0]) for error in refused} == {
            ("insufficient_quota", "The monthly budget of key web")
        }


async def test_what_is_spent_is_named_before_what_running_calls_hold() -> None:
    limits = "{per: model, usd: 0.000030}, {per: key, usd: 0.000015, match: {key: [web]}}"
    async with serving(limits, params="{first_byte_ms: 1000}") as gateway:
        assert (await call(gateway)).status == 200
        await gateway.settled(1)
        other = asyncio.create_task(call(gateway, OTHERS, max_tokens=15))
        async with asyncio.timeout(5):
            while (await own(gateway, OTHERS))[0]["reserved_usd"] == "0":
                await asyncio.sleep(0.005)
        refused = await call(gateway)
        assert (refused.status, refused.json()["error"]["code"]) == (429, "insufficient_quota")
        assert "monthly budget of key web" in refused.json()["error"]["message"]
        assert (await other).status == 200


@pytest.mark.parametrize("store", STORES)
async def test_that_callers_are_refused_for_what_is_spent_is_told_once_for_each_limit(store: str) -> None:
    heard: list[Event] = []
    limit = "{per: tenant, usd: 0.000025, warn_at: [80]}"
    async with serving(limit, more=f", store: {store}", params="{first_byte_ms: 2000}") as gateway:
        with gateway.gateway.events.listen(heard.append, "test"):
            first = asyncio.create_task(call(gateway, max_tokens=20))
            async with asyncio.timeout(5):
                while (await own(gateway))[0]["reserved_usd"] == "0":
                    await asyncio.sleep(0.005)
            assert (await call(gateway)).json()["error"]["code"] == "rate_limit_exceeded"  # by what is held
            assert (await first).status == 200
            await gateway.settled(2)
            assert (await call(gateway, max_tokens=30)).status == 429  # more than the whole limit
            for _ in range(3):
                assert (await call(gateway)).json()["error"]["code"] == "insufficient_quota"
            text = (gateway.folder / "qlens.yaml").read_text("utf-8")
            await gateway.reload(text.replace("0.000025", "0.000028"))
            for _ in range(2):
                assert (await call(gateway)).json()["error"]["code"] == "insufficient_quota"
    told = [event for event in heard if event.type.startswith("qlens.budget.")]
    assert [(event.type.rpartition(".")[2], event.data["percent"], event.data["limit_usd"]) for event in told] == [
        ("threshold", 80, "0.000025"),
        ("exhausted", 80, "0.000025"),
        ("exhausted", 71, "0.000028"),
    ]
    assert {event.data["spent_usd"] for event in told} == {"0.00002"}
    assert len({event.id for event in told}) == 3
    assert {(event.tenant, event.subject) for event in told} == {("acme", told[0].data["id"])}


@pytest.mark.parametrize(("tokens", "percent"), [((10, 10, 5, 10), 100), ((10, 10, 10, 5, 10), 80)])
async def test_that_a_budget_is_refused_and_spent_to_its_limit_is_told_once(
    tokens: tuple[int, ...], percent: int
) -> None:
    heard: list[Event] = []
    async with serving("{per: tenant, usd: 0.000025, warn_at: [100]}") as gateway:
        with gateway.gateway.events.listen(heard.append, "test"):
            for number, most in enumerate(tokens, 1):
                await call(gateway, max_tokens=most)
                await gateway.settled(number)
            assert (await own(gateway))[0]["spent_usd"] == "0.000025"
    told = [(event.type, event.data["percent"]) for event in heard if event.type.startswith("qlens.budget.")]
    assert told == [("qlens.budget.exhausted", percent)]
