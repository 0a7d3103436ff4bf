"""The usage API: what it says is the sum of the receipts, to the last picodollar, and only to whom it may."""

from __future__ import annotations

import asyncio
import csv
import hashlib
import io
import json
import sqlite3
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args
from urllib.parse import urlencode

import aiohttp
import openai
import orjson
import pytest
from ledgers import Place, SqlitePlace

from qlens import Caller, Cost, Receipt, Target, Usage
from qlens.call import Outcome
from qlens.testing import Running, running
from qlens_plugins.cost.ledger import rows as ledger_rows
from qlens_plugins.cost.ledger.store import Batch

KEYS = {
    "search": ("acme", "web", "member"),
    "mail": ("acme", "web", "member"),
    "lead": ("acme", None, "tenant_viewer"),
    "other": ("globex", "shop/eu", "member"),
    "slash": ("acme/web", None, "tenant_admin"),
    "root": ("ops", None, "viewer"),
    "auditor": ("ops", None, "auditor"),
    "accountant": ("ops", None, "accountant"),
}
"""By id: tenant, project, role."""
CHAT = ("chat", "completions", "responses", "messages", "realtime")


def key_of(name: str) -> str:
    return f"sk-example-{name}-0123456789abcdef0123456789"


def key_file() -> str:
    rows = [
        {
            "id": name,
            "hash": f"sha256:{hashlib.sha256(key_of(name).encode()).hexdigest()}",
            "tenant": tenant,
            "roles": ["member", role],
            "tags": {"team": f"team-{name[0]}"},
            **({"project": project} if project else {}),
        }
        for name, (tenant, project, role) in KEYS.items()
    ]
    return json.dumps({"keys": rows})


def config(url: str) -> str:
    table = [
        {"model": "gpt-4o-mini", "input": 0.15, "cached_input": 0.075, "output": 0.6},
        {"model": "text-embedding-3-small", "input": 0.02},
    ]

    def model(name: str, **params: object) -> dict[str, Any]:
        return {"max_output_tokens": 1000, "targets": [{"provider": "echo", "model": name, "params": params}]}

    content = {
        "server": {
            "roles": {
                "auditor": {"like": "viewer", "paths": ["/admin/audit"]},
                "accountant": {"like": "viewer", "paths": ["/v1/organization"]},
            }
        },
        "pipeline": {
            "auth": [{"plugin": "api_keys", "file": "keys.yaml"}],
            "cache": [{"plugin": "exact", "ttl_seconds": 600}],
            "cost": [
                {"plugin": "prices", "table": table},
                {"plugin": "ledger", "url": url, "flush_seconds": 0.02, "batch_size": 100},
            ],
        },
        "providers": {"echo": {"plugin": "echo"}},
        "models": {
            "gpt-4o-mini": model("gpt-4o-mini"),
            "unpriced": model("unpriced"),
            "broken": model("gpt-4o-mini", fail_status=500),
            "slow": model("gpt-4o-mini", token_ms=20),
            "text-embedding-3-small": model("text-embedding-3-small"),
            "gpt-image-1": model("gpt-image-1"),
            "tts-1": model("tts-1"),
        },
    }
    return json.dumps(content)


@asynccontextmanager
async def serving(place: Place) -> AsyncIterator[Running]:
    async with running(config(place.url), files={"keys.yaml": key_file()}) as gateway:
        yield gateway


@contextmanager
def opened(path: Path) -> Iterator[sqlite3.Connection]:
    database = sqlite3.connect(path, timeout=10, isolation_level=None)
    database.row_factory = sqlite3.Row
    try:
        yield database
    finally:
        database.close()


def receipts(place: Place) -> list[dict[str, Any]]:
    return place.rows("SELECT * FROM receipts")


def chat(n: int, model: str = "gpt-4o-mini", **more: object) -> dict[str, object]:
    return {"model": model, "messages": [{"role": "user", "content": f"hello {n} {'word ' * (n % 17)}"}], **more}


async def one_call(gateway: Running, n: int) -> None:
    """One call of a mix: streams, failures, cached, unpriced, other operations."""
    key = key_of(("search", "mail", "other", "slash")[n % 4])
    match n % 11:
        case 0:
            await gateway.post("/v1/chat/completions", chat(n, stream=True), key=key)
        case 1:
            await gateway.post("/v1/chat/completions", chat(n, "broken"), key=key)
        case 2:
            await gateway.post("/v1/chat/completions", chat(n, "unpriced"), key=key)
        case 3 | 4:
            await gateway.post("/v1/chat/completions", chat(n % 3, temperature=0), key=key)
        case 5:
            await gateway.post("/v1/embeddings", {"model": "text-embedding-3-small", "input": f"text {n}"}, key=key)
        case 6:
            image = {"model": "gpt-image-1", "prompt": "a cat", "n": 1 + n % 3}
            await gateway.post("/v1/images/generations", image, key=key)
        case 7:
            speech = {"model": "tts-1", "input": "spoken " * (1 + n % 5), "voice": "alloy"}
            await gateway.post("/v1/audio/speech", speech, key=key)
        case 8:
            await gateway.post("/v1/responses", {"model": "gpt-4o-mini", "input": f"hello {n}"}, key=key)
        case 9:
            await gateway.post("/v1/chat/completions", chat(n, max_tokens="many"), key=key)
        case _:
            await gateway.post("/v1/chat/completions", chat(n, user=f"user-{n}"), key=key)


async def abandoned(gateway: Running) -> None:
    """A stream whose client goes away."""
    headers = {"authorization": f"Bearer {key_of('search')}"}
    body = chat(16, "slow", stream=True)
    async with gateway.session.post(f"{gateway.url}/v1/chat/completions", json=body, headers=headers) as answer:
        await answer.content.readany()
        answer.close()


async def written(*gateways: Running) -> None:
    """Wait until all receipts that were settled are in the file, and all refused calls are counted there."""
    async with asyncio.timeout(20):
        for gateway in gateways:
            writer = gateway.plugin("cost", "ledger").writer
            while gateway.gateway.current.running or writer.waiting or writer._uncounted:
                await asyncio.sleep(0.02)


async def ask(gateway: Running, path: str, key: str = "root", **query: Any) -> Any:
    answer = await gateway.get(f"{path}?{urlencode(query, doseq=True)}", key=key_of(key))
    assert answer.status == 200, answer.text
    return json.loads(answer.body, parse_float=Decimal)


async def walked(gateway: Running, path: str, key: str = "root", **query: Any) -> list[dict[str, Any]]:
    """All buckets, over all pages."""
    buckets: list[dict[str, Any]] = []
    page: dict[str, Any] = {}
    while True:
        found = await ask(gateway, path, key, **query, **page)
        buckets += found["data"]
        if not found["has_more"]:
            assert found["next_page"] is None
            return buckets
        page = {"page": found["next_page"]}


def total(buckets: list[dict[str, Any]], name: str) -> int:
    return sum(result[name] for bucket in buckets for result in bucket["results"])


def picos(buckets: list[dict[str, Any]]) -> int:
    amounts = [result["amount"] for bucket in buckets for result in bucket["results"]]
    return sum(int(Decimal(amount["value"]) * 10**12) for amount in amounts if amount is not None)


def prompt(row: dict[str, Any]) -> int:
    return sum(row[name] for name in ("input", "cached_input", "cache_write_5m", "cache_write_1h", "audio_in"))


def completion(row: dict[str, Any]) -> int:
    return sum(row[name] for name in ("output", "reasoning", "audio_out"))


def rolled(place: Place, table: str) -> dict[str, int]:
    """The sums of a table of roll-ups, put together in Python."""
    sums: dict[str, int] = {}
    for row in place.rows(f"SELECT * FROM {table}"):
        for name, value in row.items():
            factor = 10**9 if name.endswith("_high") else 1
            plain = name.removesuffix("_high").removesuffix("_low")
            sums[plain] = sums.get(plain, 0) + int(value) * factor
    return sums


# --- sums --------------------------------------------------------------------------------------


async def test_receipts_roll_ups_and_the_api_agree_to_the_last_picodollar(place: Place) -> None:
    start = int(time.time()) - 3600
    async with serving(place) as one, serving(place) as two:
        waiting = asyncio.Semaphore(40)

        async def call(n: int) -> None:
            async with waiting:
                await one_call(one if n % 2 else two, n // 2)

        await asyncio.gather(*map(call, range(2500)), *(abandoned(one) for _ in range(5)))
        await written(one, two)
        rows = receipts(place)
        assert {row["outcome"] for row in rows} == {"complete", "cached", "failed", "abandoned"}
        assert len(rows) > 2000
        cost = sum(row["cost_picos"] or 0 for row in rows)
        for table in ("usage_hours", "usage_days", "usage_coarse_days"):
            sums = rolled(place, table)
            assert sums["calls"] == len(rows)
            assert sums["cost"] == cost > 0
            assert sums["saved"] == sum(row["saved_picos"] for row in rows) > 0
            assert sums["unpriced"] == sum(row["cost_picos"] is None for row in rows) > 0
            assert sums["cached"] == sum(row["cache"] == "hit" for row in rows) > 0
            assert sums["failed"] == sum(row["outcome"] in {"failed", "cut"} for row in rows) > 0
            assert sums["abandoned"] == sum(row["outcome"] == "abandoned" for row in rows) > 0
            for name in ("input", "output", "reasoning", "cached_input"):
                assert sums[name] == sum(row[name] for row in rows)
        for table in ("usage_latencies", "usage_coarse_latencies"):
            assert rolled(place, table)["calls"] == len(rows)

        # From the roll-ups, from the receipts (a minute, a user) and over pages: the same.
        chats = [row for row in rows if row["operation"] in CHAT]
        for query in (
            {"bucket_width": "1d"},
            {"bucket_width": "1h", "group_by": ["model", "project_id"]},
            {"bucket_width": "1m", "limit": 50, "group_by[]": ["api_key_id"]},
            {"group_by": ["user_id", "service_tier", "batch"]},
        ):
            buckets = await walked(one, "/v1/organization/usage/completions", start_time=start, **query)
            assert total(buckets, "num_model_requests") == len(chats)
            assert total(buckets, "input_tokens") == sum(map(prompt, chats))
            assert total(buckets, "output_tokens") == sum(map(completion, chats))
        for kind, name, operation, meter in (
            ("images", "images", "images", "output_images"),
            ("audio_speeches", "characters", "speech", "characters"),
            ("embeddings", "input_tokens", "embeddings", None),
        ):
            buckets = await walked(two, f"/v1/organization/usage/{kind}", start_time=start, group_by="model")
            of_kind = [row for row in rows if row["operation"] == operation]
            assert total(buckets, "num_model_requests") == len(of_kind) > 0
            said = sum(json.loads(row["meters"]).get(meter, 0) if meter else prompt(row) for row in of_kind)
            assert total(buckets, name) == said
            assert said > 0
        for group_by in ([], ["project_id"], ["line_item", "api_key_id"], ["user_id"]):
            assert picos(await walked(one, "/v1/organization/costs", start_time=start, group_by=group_by)) == cost

        summary = await ask(one, "/v1/usage/summary", group_by=["tenant", "model", "tag:team"], limit=1000)
        counted = summary["total"]
        assert counted["calls"] == len(rows) == sum(row["calls"] for row in summary["data"])
        assert int(Decimal(counted["cost_usd"]) * 10**12) == cost
        assert {row["tag:team"] for row in summary["data"]} == {"team-s", "team-m", "team-o"}
        for format_ in ("csv", "jsonl"):
            answer = await one.get(f"/v1/usage/export?format={format_}", key=key_of("root"))
            lines = (
                [json.loads(line) for line in answer.text.splitlines()]
                if format_ == "jsonl"
                else list(csv.DictReader(io.StringIO(answer.text)))
            )
            assert sorted(line["id"] for line in lines) == sorted(row["id"] for row in rows)
            assert sum(Decimal(line["cost_usd"] or 0) for line in lines) * 10**12 == cost


async def test_openais_own_client_reads_usage_and_costs(tmp_path: Path) -> None:
    async with serving(SqlitePlace(tmp_path / "x.db")) as gateway:
        for n in range(3):
            assert (await gateway.post("/v1/chat/completions", chat(n), key=key_of("search"))).status == 200
        await written(gateway)
        async with openai.AsyncOpenAI(
            api_key="unused", admin_api_key=key_of("root"), base_url=f"{gateway.url}/v1", max_retries=0
        ) as client:
            organization = client.admin.organization
            today = int(time.time()) // 86400 * 86400
            page = await organization.usage.completions(
                start_time=today - 2 * 86400, group_by=["project_id", "model", "batch"], project_ids=["acme/web"]
            )
            assert [(bucket.start_time, len(bucket.results)) for bucket in page.data] == [
                (today - 2 * 86400, 0),
                (today - 86400, 0),
                (today, 1),
            ]
            (result,) = page.data[2].results
            assert result.object == "organization.usage.completions.result"
            assert (result.project_id, result.model, result.batch) == ("acme/web", "gpt-4o-mini", False)
            assert result.num_model_requests == 3
            costs = await organization.usage.costs(start_time=today, group_by=["line_item"])
            (cost,) = costs.data[0].results
            assert cost.object == "organization.costs.result"
            assert cost.amount is not None
            assert cost.amount.currency == "usd"
            assert cost.line_item == "gpt-4o-mini"
            for method in (name for name, each in vars(type(organization.usage)).items() if callable(each)):
                some = await getattr(organization.usage, method)(start_time=today)
                assert len(some.data) == 1
                assert bool(some.data[0].results) == (method in {"completions", "costs"})
            search = {"group_by": ["model", "context_level", "api_source"], "context_levels": ["low"], "models": ["x"]}
            assert (await organization.usage.web_search_calls(start_time=today, **search)).data  # type: ignore[arg-type]
            with pytest.raises(openai.BadRequestError) as refused:
                await organization.usage.completions(start_time=-1)
            assert refused.value.param == "start_time"


async def test_money_beyond_64_bits_and_beyond_floats_is_written_in_its_digits(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    async with serving(SqlitePlace(path)) as gateway:
        for n in range(3):
            await gateway.post("/v1/chat/completions", chat(n), key=key_of("search"))
        await written(gateway)
    with opened(path) as database:
        database.execute("UPDATE receipts SET cost_picos = ?, input = ?", (2**63 - 1, 2**62))
        for (table,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            if table.startswith("usage_") and table != "usage_rolled":
                database.execute(f"DELETE FROM {table}")
        # As if an older version had written them.
        database.execute("UPDATE usage_rolled SET receipt = 0")
        database.execute("DELETE FROM writers")
    async with serving(SqlitePlace(path)) as gateway:
        await gateway.post("/v1/embeddings", {"model": "unpriced", "input": "x"}, key=key_of("search"))
        await written(gateway)
        start = int(time.time()) // 86400 * 86400
        answer = await gateway.get(f"/v1/organization/costs?start_time={start}", key=key_of("root"))
        assert b'"value":27670116.110564327421,' in answer.body
        found = await ask(gateway, "/v1/organization/usage/completions", start_time=start)
        assert total(found["data"], "input_tokens") == 3 * 2**62
        only = await ask(gateway, "/v1/organization/costs", start_time=start, line_items="unpriced")
        assert [result["amount"] for result in only["data"][0]["results"]] == [None]


# --- who sees what -----------------------------------------------------------------------------


async def test_members_see_their_own_key_rulers_their_tenant_and_viewers_all(place: Place) -> None:
    async with serving(place) as gateway:
        for n, name in enumerate(["search", "mail", "mail", "other", "other", "other", "slash"]):
            await gateway.post("/v1/chat/completions", chat(n), key=key_of(name))
        await written(gateway)
        start = int(time.time()) - 60
        sees = {"search": 1, "mail": 2, "lead": 3, "other": 3, "slash": 1, "root": 7}
        ids: dict[str, list[str]] = {}
        for name, calls in sees.items():
            for path in ("/v1/organization/usage/completions", "/v1/organization/costs"):
                buckets = await walked(gateway, path, name, start_time=start, group_by="api_key_id")
                keys = {result["api_key_id"] for bucket in buckets for result in bucket["results"]}
                assert keys <= {key for key in KEYS if KEYS[key][0] == KEYS[name][0] or name == "root"}
                if "completions" in path:
                    assert total(buckets, "num_model_requests") == calls
            assert (await ask(gateway, "/v1/usage/summary", name))["total"]["calls"] == calls
            # To ask for others shows no more.
            asked = await ask(gateway, "/v1/usage/summary", name, tenants=["acme", "globex", "acme/web"])
            assert asked["total"]["calls"] == calls
            ids[name] = [row["id"] for row in (await ask(gateway, "/v1/usage/calls", name))["data"]]
            assert len(ids[name]) == calls
            exported = await gateway.get("/v1/usage/export?format=jsonl", key=key_of(name))
            assert [orjson.loads(line)["id"] for line in exported.body.splitlines()] == ids[name]
        projects = await ask(gateway, "/v1/organization/costs", start_time=start, group_by="project_id")
        found = [result["project_id"] for bucket in projects["data"] for result in bucket["results"]]
        assert found == ["acme%2Fweb", "acme/web", "globex/shop/eu"]
        # Another's call is like none: in every byte, and in every list.
        for path in ("/v1/usage/calls/{}", "/v1/usage/calls?after={}"):
            theirs = await gateway.get(path.format(ids["other"][0]), key=key_of("search"))
            nobodys = await gateway.get(path.format("no-such-call"), key=key_of("search"))
            assert theirs.status == nobodys.status in (404, 400)
            assert theirs.body == nobodys.body
        colleagues = await gateway.get(f"/v1/usage/calls/{ids['mail'][0]}", key=key_of("search"))
        assert colleagues.status == 404
        whole = await ask(gateway, f"/v1/usage/calls/{ids['mail'][0]}", "lead")
        assert (whole["api_key_id"], len(whole["attempts"])) == ("mail", 1)
        assert whole["attempts"][0]["cost_usd"] == whole["cost_usd"]
        assert (await gateway.get("/v1/usage/summary")).status == 401


async def test_a_role_that_is_narrowed_to_other_paths_sees_no_more_than_a_member(tmp_path: Path) -> None:
    async with serving(SqlitePlace(tmp_path / "x.db")) as gateway:
        for name in ("search", "other"):
            await gateway.post("/v1/chat/completions", chat(1), key=key_of(name))
        await written(gateway)
        for name, organization in (("auditor", 0), ("accountant", 2)):
            assert (await ask(gateway, "/v1/usage/summary", name))["total"]["calls"] == 0
            assert (await ask(gateway, "/v1/usage/calls", name))["data"] == []
            buckets = await walked(gateway, USAGE, name, start_time=int(time.time()) - 60)
            assert total(buckets, "num_model_requests") == organization


# --- pages -------------------------------------------------------------------------------------


async def test_walking_through_calls_loses_and_doubles_none_while_new_ones_arrive(place: Place) -> None:
    async with serving(place) as gateway:
        for n in range(25):
            await gateway.post("/v1/chat/completions", chat(n), key=key_of("search"))
        await written(gateway)
        # Calls of one moment are told apart by their ids.
        place.execute("UPDATE receipts SET wall_ns = (SELECT max(wall_ns) FROM receipts) WHERE total_us % 2 = 0")
        before = {row["id"] for row in receipts(place)}
        seen: list[str] = []
        after: dict[str, str] = {}
        while True:
            page = await ask(gateway, "/v1/usage/calls", limit=4, **after)
            seen += [row["id"] for row in page["data"]]
            await gateway.post("/v1/chat/completions", chat(len(seen), user="new"), key=key_of("mail"))
            await written(gateway)
            if not page["has_more"]:
                break
            after = {"after": page["last_id"]}
        assert len(seen) == len(set(seen))
        assert set(seen) == before


def of_many_days() -> list[Receipt]:
    """Calls of a busy key and of a rare one over a hundred days, several at once and at the ends of hours and days."""
    hour_ns, day_ns = 3600 * 10**9, 86_400 * 10**9
    first = time.time_ns() // day_ns * day_ns - 100 * day_ns
    busy = [("busy", first + n * 8 * hour_ns + (n % 3) * 10**9) for n in range(300)]
    rare = [
        *(("rare", first + day * day_ns + n // 2) for day in (0, 1, 30, 31, 62, 99) for n in range(-3, 3)),
        *(("rare", first + 40 * day_ns + hour * hour_ns) for hour in range(5)),
    ]
    return [
        Receipt(
            id=f"call-{n:04}", caller=Caller("acme", "bob", "keys", None, key), operation="chat",
            model=f"model-{n % 2}", target=Target("echo", "m", "m"), outcome="complete", status=200, error=None,
            usage=Usage(input=n), cost=Cost(n), saved_picos=0, cache="off", streamed=False, attempts=(), tags={},
            wall_ns=wall_ns, ttft_us=None, total_us=n, overhead_us=0, bytes_out=0, config_version="v",
        )
        for n, (key, wall_ns) in enumerate((*busy, *rare))
    ]  # fmt: skip


def kept(place: Place, made: list[Receipt]) -> None:
    store = place.store()
    store.write("made", Batch(1, list(map(ledger_rows.row, made)), {}))
    store.close()


async def test_few_calls_among_many_are_all_found_in_their_order(place: Place) -> None:
    made = of_many_days()
    await asyncio.to_thread(kept, place, made)
    made.sort(key=lambda one: (one.wall_ns, one.id), reverse=True)
    middle = made[len(made) // 2].wall_ns // 10**9
    rare = [one for one in made if one.caller.key_id == "rare"]
    even = [one for one in made if one.model == "model-0"]
    root = key_of("root")
    async with serving(place) as gateway:
        for query, meant in (
            ({"api_key_ids": "rare"}, rare),
            ({"api_key_ids": "rare", "models": "model-0"}, [one for one in rare if one in even]),
            (
                {"api_key_ids": ["rare", "busy"], "end_time": middle},
                [one for one in made if one.wall_ns < middle * 10**9],
            ),
            ({"tenants": "acme", "start_time": middle}, [one for one in made if one.wall_ns >= middle * 10**9]),
            ({"models": "model-0", "user_ids": "bob"}, even),
            ({"user_ids": "ann", "tenants": "acme"}, []),
            ({"api_key_ids": "none"}, []),
        ):
            seen: list[str] = []
            after: dict[str, str] = {}
            while True:
                page = await ask(gateway, "/v1/usage/calls", limit=7, **query, **after)
                seen += [row["id"] for row in page["data"]]
                if not page["has_more"]:
                    break
                after = {"after": page["last_id"]}
            assert seen == [one.id for one in meant]
            words = urlencode({**query, "format": "jsonl"}, doseq=True)
            export = await gateway.get(f"/v1/usage/export?{words}", key=root)
            assert [json.loads(line)["id"] for line in export.body.splitlines()] == seen


async def test_buckets_follow_each_other_without_a_gap_over_all_pages(tmp_path: Path) -> None:
    async with serving(SqlitePlace(tmp_path / "x.db")) as gateway:
        await gateway.post("/v1/chat/completions", chat(1), key=key_of("search"))
        await written(gateway)
        now = int(time.time())
        for width, seconds, limit in (("1m", 60, 7), ("1h", 3600, 5), ("1d", 86400, 2)):
            for start, end in ((now - 20 * seconds - 17, None), (now - 9 * seconds - 1, now + seconds + 5)):
                query: dict[str, Any] = {"start_time": start, "bucket_width": width, "limit": limit}
                if end:
                    query["end_time"] = end
                buckets = await walked(gateway, "/v1/organization/usage/completions", **query)
                assert buckets[0]["start_time"] == start
                assert all(a["end_time"] == b["start_time"] for a, b in pairwise(buckets))
                assert all(bucket["end_time"] % seconds == 0 for bucket in buckets[:-1])
                assert buckets[-1]["end_time"] == end if end else buckets[-1]["end_time"] % seconds == 0
                assert total(buckets, "num_model_requests") == 1


# --- hostile -----------------------------------------------------------------------------------

USAGE, COSTS, SUMMARY, CALLS = (
    "/v1/organization/usage/completions",
    "/v1/organization/costs",
    "/v1/usage/summary",
    "/v1/usage/calls",
)


async def test_wrong_parameters_are_refused_by_name(place: Place) -> None:
    wrong = [
        (USAGE, "", "start_time"),
        *(
            (USAGE, f"start_time={value}", "start_time")
            for value in ("-1", "1.5", "1e3", "x", "", "9" * 30, "٣", "1_0")
        ),
        (USAGE, "start_time=1&start_time=2", "start_time"),
        (USAGE, "start_time[]=1", "start_time[]"),
        (USAGE, "start_time=5&end_time=5", "end_time"),
        (USAGE, f"start_time=5&end_time={2**63}", "end_time"),
        (USAGE, "start_time=1&bucket_width=1w", "bucket_width"),
        *((USAGE, f"start_time=1&limit={value}", "limit") for value in ("0", "32", "-1", "1.0", "%201")),
        (USAGE, "start_time=1&bucket_width=1h&limit=169", "limit"),
        (USAGE, "start_time=1&group_by=colour", "group_by"),
        (USAGE, "start_time=1&group_by=model,project_id", "group_by"),
        (USAGE, "start_time=1&group_by[]=tag:team", "group_by"),
        (USAGE, "start_time=1&batch=maybe", "batch"),
        (USAGE, "start_time=1&models=", "models"),
        (USAGE, "start_time=1&models=a%00b", "models"),
        (USAGE, "start_time=1&" + "&".join(["models=a"] * 101), "models"),
        (USAGE, "start_time=1&models[0]=a", "models[0]"),
        (USAGE, "start_time=1&colour=red", "colour"),
        *((USAGE, f"start_time=100&page={page}", "page") for page in ("x", "page_1", "page_50_900", "page_900_200")),
        (USAGE, f"start_time=100&page=page_200_{10**15}", "page"),
        (USAGE, "start_time=100&end_time=500&page=page_200_900", "page"),
        (COSTS, "start_time=1&bucket_width=1h", "bucket_width"),
        (COSTS, "start_time=1&group_by=model", "group_by"),
        (SUMMARY, "group_by=tag:", "group_by"),
        (SUMMARY, "group_by=tag:a%00b", "group_by"),
        (SUMMARY, "group_by=1;DROP", "group_by"),
        (SUMMARY, "start_time=9&end_time=3", "end_time"),
        (SUMMARY, f"start_time={2**33}", "start_time"),
        (SUMMARY, "outcomes=bad", "outcomes"),
        *(
            (path, query, param)
            for path in (CALLS, "/v1/usage/export")
            for query, param in (
                ("start_time=9&end_time=3", "end_time"),
                ("start_time=9&end_time=9", "end_time"),
                ("outcomes=bad", "outcomes"),
            )
        ),
        (CALLS, "limit=101", "limit"),
        (CALLS, "after=nobody", "after"),
        ("/v1/usage/export", "format=xlsx", "format"),
        ("/v1/usage/calls/some", "x=1", "x"),
    ]
    async with serving(place) as gateway:
        for path, query, param in wrong:
            answer = await gateway.get(f"{path}?{query}", key=key_of("root"))
            assert answer.status == 400, (path, query, answer.text)
            error = answer.json()["error"]
            assert (error["type"], error["param"]) == ("invalid_request_error", param), (path, query)
        for outcome in get_args(Outcome):
            assert (await gateway.get(f"{CALLS}?outcomes={outcome}", key=key_of("root"))).status == 200
        for query in ("start_time=0", f"start_time={2**33}", f"start_time=1&end_time={2**33}&models[]=a'--&models=b"):
            answer = await gateway.get(f"{USAGE}?{query}", key=key_of("root"))
            assert answer.status == 200, answer.text


async def test_no_name_of_a_call_is_more_than_a_call_that_is_not_there(place: Place) -> None:
    async with serving(place) as gateway:
        for name in ("nobody", "%00", "a%00b", "%ED%A0%80", "%0A", "'%22"):
            answer = await gateway.get(f"{CALLS}/{name}", key=key_of("root"))
            assert (answer.status, answer.json()["error"]["code"]) == (404, "not_found"), name


async def test_a_ledger_that_cannot_be_read_is_said_to_be_and_harms_no_call(place: Place) -> None:
    async with serving(place) as gateway:
        place.execute("ALTER TABLE usage_coarse_days RENAME TO hidden")
        answer = await gateway.get(f"{USAGE}?start_time=0", key=key_of("root"))
        assert (answer.status, answer.json()["error"]["code"]) == (503, "ledger_unavailable")
        place.execute("ALTER TABLE hidden RENAME TO usage_coarse_days")
        assert (await gateway.get(f"{USAGE}?start_time=0", key=key_of("root"))).status == 200


async def test_a_client_that_leaves_an_export_leaves_nothing_behind_and_one_cut_short_is_seen_to_be(
    place: Place,
) -> None:
    async with serving(place) as gateway:
        await gateway.post("/v1/chat/completions", chat(1), key=key_of("search"))
        await written(gateway)
        names = ", ".join(name for name in ledger_rows.COLUMNS if name != "id")
        for n in range(15):
            place.execute(f"INSERT INTO receipts (id, {names}) SELECT 'copy-{n}-' || id, {names} FROM receipts")
        headers = {"authorization": f"Bearer {key_of('root')}"}
        async with gateway.session.get(f"{gateway.url}/v1/usage/export", headers=headers) as answer:
            assert answer.headers["content-type"].startswith("text/csv")
            await answer.content.readany()
            answer.close()
        async with asyncio.timeout(10):
            while gateway.gateway.current.running:
                await asyncio.sleep(0.02)
        async with gateway.session.get(f"{gateway.url}/v1/usage/export", headers=headers) as answer:
            await answer.content.readany()
            place.execute("ALTER TABLE receipts RENAME TO hidden")
            with pytest.raises(aiohttp.ClientPayloadError):
                await answer.content.read()
            place.execute("ALTER TABLE hidden RENAME TO receipts")
        assert (await ask(gateway, "/v1/usage/calls", limit=3))["has_more"]


async def test_after_a_reload_questions_are_about_the_new_ledger(place: Place, tmp_path: Path) -> None:
    async with serving(place) as gateway:
        await gateway.post("/v1/chat/completions", chat(1), key=key_of("search"))
        await written(gateway)
        await gateway.reload(config(f"sqlite:///{tmp_path}/y.db"))
        assert (await ask(gateway, "/v1/usage/summary"))["total"]["calls"] == 0
        await gateway.reload(config(place.url))
        assert (await ask(gateway, "/v1/usage/summary"))["total"]["calls"] == 1


async def test_a_cell_that_a_spreadsheet_would_run_is_text(place: Place) -> None:
    async with serving(place) as gateway:
        await gateway.post("/v1/chat/completions", chat(1), key=key_of("search"))
        await written(gateway)
        place.execute('UPDATE receipts SET subject = \'=1+1\', tags = \'{"a": "b,\\"c"}\'')
        (row,) = csv.DictReader(io.StringIO((await gateway.get("/v1/usage/export", key=key_of("root"))).text))
        assert (row["user_id"], row["streamed"]) == ("'=1+1", "0")
        place.execute("UPDATE receipts SET subject = '\n=1+1'")
        (again,) = csv.DictReader(io.StringIO((await gateway.get("/v1/usage/export", key=key_of("root"))).text))
        assert again["user_id"] == "'\n=1+1"
        assert json.loads(row["tags"]) == {"a": 'b,"c'}
