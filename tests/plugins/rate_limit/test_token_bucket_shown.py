"""`token_bucket` for operators: which limits apply, how full each bucket is, and how one is filled again."""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest

from qlens.testing import ManualClock, Response, Running, running
from qlens.testing.redis import RedisServer, redis_cluster

PATH = "/v1/chat/completions"
CALL = {"model": "small", "max_tokens": 100, "messages": [{"role": "user", "content": "hello"}]}
KEYS = {
    "sk-example-a1": ("a1", "acme", "member"),
    "sk-example-b": ("b", "bolt", "member"),
    "sk-example-boss": ("boss", "acme", "tenant_admin"),
    "sk-example-viewer": ("viewer", "ops", "viewer"),
    "sk-example-ops": ("ops", "ops", "operator"),
    "sk-example-own": ("own", "acme", "operator"),
    "sk-example-root": ("root", "acme", "admin"),
}
OPS = "sk-example-ops"
MEMORY = "{kind: memory}"


@pytest.fixture(params=["memory", "redis"])
def store(request: pytest.FixtureRequest) -> str:
    """Each place where buckets may be, as a configuration says it."""
    if request.param == "memory":
        return MEMORY
    server: RedisServer = request.getfixturevalue("server")
    asyncio.run(server.command("FLUSHALL"))
    return f'{{kind: redis, url: "{server.url}", timeout_ms: 2000, prefix: "q[1]-*"}}'


def key_file() -> dict[str, str]:
    rows = [
        f"- {{id: {id_}, hash: 'sha256:{hashlib.sha256(key.encode()).hexdigest()}', tenant: {tenant}, roles: [{role}]}}"
        for key, (id_, tenant, role) in KEYS.items()
    ]
    return {"keys.yaml": "\n".join(["keys:", *rows])}


def config(limits: str, store: str, more: str = "", auth: str = "") -> str:
    return f"""
pipeline:
  auth: [{auth}{{plugin: api_keys, file: keys.yaml}}]
  rate_limit: [{{plugin: token_bucket, store: {store}, limits: [{limits}]}}{more}]
providers: {{up: {{plugin: echo}}}}
models:
  small: {{max_output_tokens: 1000, targets: [{{provider: up, model: small, params: {{first_byte_ms: 1}}}}]}}
  slow: {{max_output_tokens: 1000, targets: [{{provider: up, model: small, params: {{first_byte_ms: 1500}}}}]}}
"""


@asynccontextmanager
async def serving(
    limits: str, store: str = MEMORY, *, clock: ManualClock | None = None, **more: str
) -> AsyncIterator[Running]:
    async with running(config(limits, store, **more), files=key_file(), clock=clock) as gateway:
        yield gateway


async def call(gateway: Running, key: str = "sk-example-a1", **more: object) -> Response:
    return await gateway.post(PATH, {**CALL, **more}, key=key)


async def shown(gateway: Running, key: str = OPS, query: str = "") -> list[dict[str, Any]]:
    answer = await gateway.get(f"/admin/limits{query}", key=key)
    assert answer.status == 200, answer.text
    rows: list[dict[str, Any]] = answer.json()["data"]
    return rows


async def one(gateway: Running, name: str, owner: str) -> dict[str, Any]:
    """The row of a limit and an owner."""
    (row,) = [row for row in await shown(gateway) if (row["name"], row["owner"]) == (name, owner)]
    return row


# --- what is shown -----------------------------------------------------------------------------


async def test_why_a_tenant_was_refused_can_be_seen(store: str) -> None:
    async with serving("{per: tenant, requests_per_minute: 3, tokens_per_minute: 60000}", store) as gateway:
        assert [(await call(gateway)).status for _ in range(4)] == [200, 200, 200, 429]
        assert (await call(gateway, "sk-example-b")).status == 200
        rows = {row["name"]: row for row in await shown(gateway, query="?tenant=acme")}
        assert rows.keys() == {"requests per tenant", "tokens per tenant"}
        row = rows["requests per tenant"]
        assert {name: row[name] for name in row if name not in ("id", "reset_seconds")} == {
            "object": "limit", "limiter": "token_bucket", "per": "tenant", "owner": "acme", "tenant": "acme",
            "name": "requests per tenant", "kind": "requests", "limit": 3, "window": "minute", "burst": 3,
            "remaining": 0, "running": None,
        }  # fmt: skip
        assert 50 < row["reset_seconds"] <= 60
        tokens = rows["tokens per tenant"]
        spent = sum(receipt.usage.total for receipt in await gateway.settled(5) if receipt.caller.tenant == "acme")
        assert (tokens["kind"], tokens["limit"]) == ("tokens", 60000)
        if store == MEMORY:
            assert 60000 - spent <= tokens["remaining"] <= 60000
        assert (await one(gateway, "requests per tenant", "bolt"))["remaining"] == 2


async def test_a_bucket_that_fills_and_a_debt_are_seen_as_they_are() -> None:
    clock = ManualClock()
    async with serving("{per: key, requests_per_minute: 60, burst_seconds: 10}", clock=clock) as gateway:
        for _ in range(4):
            assert (await call(gateway)).status == 200
        row = await one(gateway, "requests per key", "a1")
        assert (row["per"], row["tenant"]) == ("key", "acme")
        assert (row["limit"], row["burst"], row["remaining"], row["reset_seconds"]) == (60, 10, 6, 4.0)
        clock.advance(1.5)
        row = await one(gateway, "requests per key", "a1")
        assert (row["remaining"], row["reset_seconds"]) == (7, 2.5)
        clock.advance(10)
        row = await one(gateway, "requests per key", "a1")
        assert (row["remaining"], row["reset_seconds"]) == (10, 0.0)


async def test_places_are_shown_while_calls_run(store: str) -> None:
    async with serving("{per: key, concurrency: 5}", store) as gateway:
        last = [asyncio.create_task(call(gateway, model="slow")) for _ in range(2)]
        async with asyncio.timeout(5):
            while not (rows := await shown(gateway)) or rows[0]["running"] != 2:
                await asyncio.sleep(0.01)
        row = rows[0]
        assert (row["kind"], row["limit"], row["remaining"], row["window"]) == ("concurrency", 5, 3, None)
        refused = await gateway.post(f"/admin/limits/{row['id']}/reset", {}, key=OPS)
        assert (refused.status, "when its call has ended" in refused.text) == (400, True)
        assert [(await each).status for each in last] == [200, 200]


async def test_each_sees_what_its_role_lets_it_see(store: str) -> None:
    limits = "{per: tenant, requests_per_minute: 9}, {per: key, requests_per_minute: 9}, {per: model, concurrency: 9}"
    async with serving(limits, store) as gateway:
        for key in ("sk-example-a1", "sk-example-b"):
            assert (await call(gateway, key)).status == 200
        everything = await shown(gateway, "sk-example-viewer")
        owners = {(row["per"], row["owner"]) for row in everything}
        assert {("tenant", "acme"), ("tenant", "bolt"), ("key", "a1"), ("key", "b")} <= owners
        theirs = await shown(gateway, "sk-example-boss")
        assert {(row["per"], row["owner"]) for row in theirs} >= {("tenant", "acme"), ("key", "a1")}
        assert all(row["tenant"] == "acme" for row in theirs)
        assert await shown(gateway, "sk-example-boss", "?tenant=bolt") == []
        bolt = next(row for row in everything if row["owner"] == "bolt")
        hidden = await gateway.get(f"/admin/limits/{bolt['id']}", key="sk-example-boss")
        unknown = await gateway.get("/admin/limits/limit-0", key="sk-example-boss")
        assert (hidden.status, hidden.json()) == (404, unknown.json())
        assert (await gateway.get(f"/admin/limits/{bolt['id']}", key="sk-example-viewer")).json()["owner"] == "bolt"
        assert (await gateway.get("/admin/limits", key="sk-example-a1")).status == 403
        for path in ("/admin/limits", f"/admin/limits/{bolt['id']}"):
            assert (await gateway.get(path)).status == 401


async def test_limits_come_in_pages_and_of_every_instance(store: str) -> None:
    more = (
        f", {{plugin: token_bucket, name: second, store: {store}, limits: [{{per: tenant, tokens_per_minute: 9000}}]}}"
    )
    async with serving("{per: tenant, requests_per_minute: 9}", store, more=more) as gateway:
        for key in ("sk-example-a1", "sk-example-b"):
            assert (await call(gateway, key)).status == 200
        found, after, limiters = list[str](), "", set[str]()
        for has_more in (True, True, True, False):
            page = (await gateway.get(f"/admin/limits?limit=1&after={after}", key=OPS)).json()
            assert (page["has_more"], len(page["data"])) == (has_more, 1)
            limiters.add(page["data"][0]["limiter"])
            found.append(after := page["last_id"])
        assert found == sorted(set(found))
        assert limiters == {"token_bucket", "second"}
        for wrong in ("limit=0", "limit=1001", "limit=x", "page=2", "limit=1&limit=2"):
            assert (await gateway.get(f"/admin/limits?{wrong}", key=OPS)).status == 400


async def test_a_reload_shows_the_new_numbers_and_no_rule_that_is_gone() -> None:
    async with serving("{per: tenant, requests_per_minute: 4}, {per: key, requests_per_minute: 4}") as gateway:
        assert (await call(gateway)).status == 200
        await gateway.reload(config("{per: tenant, requests_per_minute: 8}", MEMORY))
        (row,) = await shown(gateway)
        assert (row["name"], row["limit"], row["burst"]) == ("requests per tenant", 8, 8)


async def test_a_keys_own_allowance_is_shown_too(store: str) -> None:
    auth = "{plugin: key_store, poll_seconds: 0.05}, "
    async with serving("{per: model, requests_per_minute: 1000}", store, auth=auth) as gateway:
        asked = {"tenant": "acme", "limits": {"requests_per_minute": 2}}
        made = (await gateway.post("/admin/keys", asked, key="sk-example-root")).json()
        assert [(await call(gateway, made["key"])).status for _ in range(3)] == [200, 200, 429]
        row = await one(gateway, "requests of the key's allowance", made["id"])
        assert (row["limit"], row["remaining"], row["tenant"]) == (2, 0, "acme")
        assert (await gateway.post(f"/admin/limits/{row['id']}/reset", {}, key=OPS)).status == 200
        assert (await call(gateway, made["key"])).status == 200


# --- reset -------------------------------------------------------------------------------------


async def test_a_reset_fills_one_bucket_is_noted_and_is_not_for_those_it_binds(
    store: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "qlens.audit")
    async with serving("{per: tenant, requests_per_minute: 2}", store) as gateway:
        for key in ("sk-example-a1", "sk-example-b"):
            assert [(await call(gateway, key)).status for _ in range(3)] == [200, 200, 429]
        place = f"/admin/limits/{(await one(gateway, 'requests per tenant', 'acme'))['id']}"
        for key, status in (
            *(("sk-example-a1", 403), ("sk-example-viewer", 403), ("sk-example-boss", 403)),
            *(("sk-example-own", 403), (OPS, 200)),
        ):
            answer = await gateway.post(f"{place}/reset", {}, key=key)
            assert answer.status == status, key
        assert (answer.json()["remaining"], answer.json()["reset_seconds"]) == (2, 0.0)
        assert [(await call(gateway)).status for _ in range(3)] == [200, 200, 429]
        assert (await call(gateway, "sk-example-b")).status == 429
        assert (await gateway.post(f"{place}/reset", {}, key="sk-example-root")).status == 200
        assert (await gateway.post("/admin/limits/limit-0/reset", {}, key=OPS)).status == 404
    noted = [orjson.loads(record.message) for record in caplog.records if record.name == "qlens.audit"]
    resets = [entry for entry in noted if entry["action"] == "limits.reset"]
    assert [entry["outcome"] for entry in resets] == ["refused", "done", "done"]
    assert (resets[1]["before"]["remaining"], resets[1]["after"], resets[1]["tenant"]) == (0, {"remaining": 2}, "acme")


async def test_a_bucket_of_one_worker_is_not_reset_as_if_it_were_that_of_all() -> None:
    text = "server: {workers: 2}\n" + config(
        "{per: tenant, requests_per_minute: 4}", "{kind: memory, per_worker: true}"
    )
    async with running(text, files=key_file()) as gateway:
        assert [(await call(gateway)).status for _ in range(3)] == [200, 200, 429]
        row = await one(gateway, "requests per tenant", "acme")
        assert (row["limit"], row["remaining"]) == (2, 0)
        refused = await gateway.post(f"/admin/limits/{row['id']}/reset", {}, key=OPS)
        assert (refused.status, "Each worker has buckets of its own" in refused.text) == (409, True)


async def test_with_replicas_any_one_shows_what_all_took_and_a_reset_holds_for_all(server: RedisServer) -> None:
    await server.command("FLUSHALL")
    store = f'{{kind: redis, url: "{server.url}", timeout_ms: 2000, replicas: 2}}'
    limits = "{per: tenant, requests_per_minute: 4}"
    async with serving(limits, store) as first, serving(limits, store) as second:
        assert [(await call(first)).status for _ in range(5)] == [200] * 4 + [429]
        row = await one(second, "requests per tenant", "acme")  # which it has never met
        assert (row["limit"], row["burst"], row["remaining"]) == (4, 4, 0)
        assert (await second.post(f"/admin/limits/{row['id']}/reset", {}, key=OPS)).status == 200
        assert [(await call(first)).status for _ in range(5)] == [200] * 4 + [429]
        assert (await call(second)).status == 429


async def test_on_a_cluster_the_buckets_of_all_nodes_are_shown() -> None:
    async with redis_cluster() as cluster:
        urls = ", ".join(f'"redis://127.0.0.1:{node.port}"' for node in cluster)
        store = f"{{kind: redis, cluster: [{urls}], timeout_ms: 2000}}"
        async with serving("{per: tenant, requests_per_minute: 4}, {per: model, requests_per_minute: 9}", store) as it:
            for key in ("sk-example-a1", "sk-example-b", OPS):
                assert (await call(it, key)).status == 200
            assert {(row["owner"], row["remaining"]) for row in await shown(it)} == {
                *(("acme", 3), ("bolt", 3), ("ops", 3), ("small", 6)),
            }


async def test_while_the_store_is_away_it_is_said_that_nobody_knows_and_a_reset_still_counts() -> None:
    with tempfile.TemporaryDirectory(prefix="qlens-redis-") as folder:
        server = RedisServer(Path(folder))
        await server.start()
        store = f'{{kind: redis, url: "{server.url}", timeout_ms: 500}}'
        async with serving("{per: tenant, requests_per_minute: 2}", store) as gateway:
            assert [(await call(gateway)).status for _ in range(3)] == [200, 200, 429]
            row = await one(gateway, "requests per tenant", "acme")
            assert (await gateway.post(f"/admin/limits/{row['id']}/reset", {}, key=OPS)).status == 200
            server.kill()
            for _ in range(2):
                answer = await gateway.get("/admin/limits", key=OPS)
                assert (answer.status, answer.json()["error"]["code"]) == (503, "limits_unavailable")
            assert [(await call(gateway)).status for _ in range(3)] == [200, 200, 429]
