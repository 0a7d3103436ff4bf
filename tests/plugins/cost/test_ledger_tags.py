"""Questions by tag are answered from roll-ups, to the last picodollar, and so are those of ledgers from before."""

from __future__ import annotations

import asyncio
import hashlib
import json
import sqlite3
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from urllib.parse import urlencode

import pytest
from ledgers import Place

from qlens import Caller, Cost, Receipt, Target, Usage
from qlens.testing import running
from qlens_plugins.cost.ledger import rows, sums, verifying
from qlens_plugins.cost.ledger.sqlite import SqliteStore, schema, writing
from qlens_plugins.cost.ledger.store import Batch, Database
from qlens_plugins.cost.ledger.sums import Question

KEY = "sk-example-ann-0123456789abcdef0123456789"
MIDNIGHT = 20_600 * 86_400
DAY = Question(MIDNIGHT, MIDNIGHT + 86_400, None)
TAGS: tuple[dict[str, str], ...] = (
    {"team": "search"},
    {"team": "chat", "env": "test"},
    {"env": "test"},
    {},
    {"team": "search", 'o"dd': "x" * 5000},
)


def receipt(number: int, tags: Mapping[str, str]) -> Receipt:
    return Receipt(
        id=f"call-{number:04}",
        caller=Caller("acme", "ann", "keys", tags=tags), operation="chat", model="m", target=Target("up", "m", "m"),
        outcome="complete", status=200, error=None, usage=Usage(input=number), cost=Cost(10**18 + number, price_id="p"),
        saved_picos=0, cache="off", streamed=False, attempts=(), tags=tags, wall_ns=(MIDNIGHT + number) * 10**9,
        ttft_us=None, total_us=1000 * number, overhead_us=0, bytes_out=0, config_version="v",
    )  # fmt: skip


def calls(count: int) -> list[Receipt]:
    return [receipt(number, TAGS[number % len(TAGS)]) for number in range(count)]


def by_team(database: Database) -> tuple[dict[tuple[str, ...], tuple[int, int]], dict[tuple[str, ...], int]]:
    """Calls and cost, and how many latencies there are, by team."""
    question = Question(DAY.start, DAY.end, None, ("tag:team", "model"), {"tenant": ("acme",)})
    found = {group: (each["calls"], each["cost"]) for (_, group), each in sums.read(database, question).items()}
    return found, {group: sum(each.values()) for group, each in sums.latencies(database, question).items()}


def expected(receipts: list[Receipt]) -> dict[tuple[str, ...], tuple[int, int]]:
    found: dict[tuple[str, ...], tuple[int, int]] = {}
    for each in receipts:
        group = (each.tags.get("team", ""), "m")
        before = found.get(group, (0, 0))
        found[group] = (before[0] + 1, before[1] + (each.cost.picos or 0))
    return found


def test_sums_by_tag_are_there_without_the_receipts(place: Place) -> None:
    receipts, store = calls(60), place.store()
    for number, start in enumerate(range(0, 60, 15), 1):
        batch = Batch(number, [rows.row(each) for each in receipts[start : start + 15]], {})
        store.write("test", batch)
        store.write("test", batch)
    assert store.reading(30).run(verifying.verify).told == []
    place.execute("DELETE FROM receipts")
    found, latencies = store.reading(30).run(by_team)
    assert found == expected(receipts)
    assert latencies == {group: count for group, (count, _) in found.items()}
    narrowed = Question(DAY.start, DAY.end, 3600, ("model",), {"tag:env": ("test",)})
    ((_, hour),) = store.reading(30).run(partial(sums.read, question=narrowed)).items()
    assert hour["calls"] == 24
    store.close()


@pytest.mark.parametrize(
    "name", ["équipe", 'o"dd', "a\\b", 'a\\"b', "x[#-1]", "$.team", "?'; --", "t" * 80, "日本 1.2"]
)
async def test_every_tag_that_a_key_may_have_can_be_asked_for(place: Place, name: str) -> None:
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    key = {"id": "ann", "hash": f"sha256:{digest}", "tenant": "acme", "roles": ["admin"]}
    config = {
        "pipeline": {
            "auth": [{"plugin": "api_keys", "file": "keys.yaml"}],
            "cost": [{"plugin": "ledger", "url": place.url, "flush_seconds": 0.01}],
        },
        "providers": {"echo": {"plugin": "echo"}},
        "models": {"m": {"max_output_tokens": 10, "targets": [{"provider": "echo", "model": "m"}]}},
    }
    keys = json.dumps({"keys": [{**key, "tags": {"other": "x", name: "rouge", f"{name}s": "y"}}]}, ensure_ascii=False)
    async with running(json.dumps(config), files={"keys.yaml": keys}) as gateway:
        body = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
        assert (await gateway.post("/v1/chat/completions", body, key=KEY)).status == 200
        async with asyncio.timeout(20):
            while gateway.gateway.current.running or gateway.plugin("cost", "ledger").writer.waiting:
                await asyncio.sleep(0.02)
        query = urlencode({"group_by": [f"tag:{name}", "tag:other"], "outcomes": "complete"}, doseq=True)
        for asked in (query, query.removesuffix("&outcomes=complete")):
            answer = await gateway.get(f"/v1/usage/summary?{asked}", key=KEY)
            assert answer.status == 200, answer.text
            ((found, calls),) = [
                ((row[f"tag:{name}"], row["tag:other"]), row["calls"]) for row in answer.json()["data"]
            ]
            assert (found, calls) == (("rouge", "x"), 1)


@pytest.mark.parametrize("deleted", [False, True])
def test_an_older_ledger_is_summed_up_anew_where_its_receipts_are_still_there(tmp_path: Path, deleted: bool) -> None:
    receipts, path = calls(20), tmp_path / "old.db"
    SqliteStore(path).connect()
    database = sqlite3.connect(path, isolation_level=None)
    for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
        if name != "versions":
            database.execute(f"DROP TABLE {name}")
    for statement in (statement for version in schema.MIGRATIONS[:4] for statement in version):
        database.execute(statement)
    database.execute("UPDATE versions SET version = 4")
    writing.insert(database, [rows.row(each) for each in receipts], {})
    # As version 4 summed them up.
    columns = "tenant, project, key_id, operation, model, provider"
    database.execute(f"INSERT INTO usage_groups ({columns}) VALUES ('acme', '', '', 'chat', 'm', 'up')")
    database.execute("INSERT INTO usage_latencies VALUES (?, 1, 1, 20)", (MIDNIGHT,))
    summed = dict.fromkeys(name for _, name, *_ in database.execute("PRAGMA table_info(usage_days)").fetchall())
    values = {**dict.fromkeys(summed, 0), "start": MIDNIGHT, "group_id": 1, "calls": 20}
    total = sum(each.cost.picos or 0 for each in receipts)
    values |= {"cost_high": total // 10**9, "cost_low": total % 10**9}
    for table in ("usage_days", "usage_hours"):
        marks = ", ".join("?" * len(values))
        database.execute(f"INSERT INTO {table} ({', '.join(values)}) VALUES ({marks})", list(values.values()))
    database.execute("UPDATE usage_rolled SET receipt = 20")
    if deleted:
        database.execute("UPDATE receipts_kept SET since_ns = ?", ((MIDNIGHT + 86_400) * 10**9,))
        database.execute("DELETE FROM receipts")
    database.close()
    store = SqliteStore(path)
    store.connect()
    found, _ = store.reading(30).run(by_team)
    assert found == ({("", "m"): (20, total)} if deleted else expected(receipts))
    store.close()
