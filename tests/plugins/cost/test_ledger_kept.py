"""What is asked of a time whose receipts were deleted: the sum of all its calls, or an error; never a smaller sum."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from ledgers import Place

from qlens import Caller, Cost, Receipt, Target, Usage
from qlens.cli import main
from qlens.testing import Running, running
from qlens_plugins.cost.ledger import rows
from qlens_plugins.cost.ledger.store import Batch

KEY = "sk-example-root-0123456789abcdef0123456789"
DAY = 86_400
FIRST = 1_790_812_800
"""2026-10-01 in UTC."""
SINCE = FIRST + 10 * DAY
END = FIRST + 20 * DAY


def receipt(n: int) -> Receipt:
    """One at half past twelve of each of twenty days."""
    target = Target("echo", "m", f"model-{n % 2}")
    return Receipt(
        id=f"call-{n}", caller=Caller("acme", "bob", "keys", "web", "key"), operation="chat", model=f"model-{n % 2}",
        target=target, outcome="complete", status=200, error=None, usage=Usage(input=10**n, output=3, tier="flex"),
        cost=Cost(10**18 + n, "exact", "p"), saved_picos=n, cache="off", streamed=False, attempts=(), tags={},
        wall_ns=(FIRST + n * DAY + 45_000) * 10**9, ttft_us=1, total_us=1000, overhead_us=3, bytes_out=4,
        config_version="v",
    )  # fmt: skip


def config(folder: Path, place: Place) -> str:
    content = {
        "pipeline": {
            "auth": [{"plugin": "api_keys", "file": "keys.yaml"}],
            "cost": [{"plugin": "ledger", "url": place.url}],
        },
        "providers": {"echo": {"plugin": "echo"}},
        "models": {"m": {"max_output_tokens": 10, "targets": [{"provider": "echo", "model": "m"}]}},
    }
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    key = {"id": "root", "hash": f"sha256:{digest}", "tenant": "ops", "roles": ["viewer"]}
    (folder / "keys.yaml").write_text(json.dumps({"keys": [key]}))
    (folder / "qlens.yaml").write_text(json.dumps(content))
    return json.dumps(content)


def half_forgotten(place: Place) -> None:
    """Calls of twenty days; the receipts of the first ten are gone."""
    store = place.store()
    store.write("test", Batch(1, [rows.row(receipt(n)) for n in range(20)], {}))
    while store.forget(SINCE * 10**9):
        pass
    store.close()
    assert len(place.rows("SELECT id FROM receipts")) == 10


async def calls(gateway: Running, path: str, query: str) -> int:
    """How many an answer is about."""
    answer = await gateway.get(f"{path}?{query}", key=KEY)
    assert answer.status == 200, answer.text
    found = answer.json()
    if "total" in found:
        return int(found["total"]["calls"])
    results = [result for bucket in found["data"] for result in bucket["results"]]
    return sum(result.get("num_model_requests", 1) for result in results)


COSTS, COMPLETIONS, SUMMARY = "/v1/organization/costs", "/v1/organization/usage/completions", "/v1/usage/summary"
ONLY_RECEIPTS = [
    (COSTS, "limit=180&group_by=user_id", "user_id"),
    (COSTS, "limit=180&user_ids=bob", "user_id"),
    (COMPLETIONS, "limit=31&group_by=service_tier&group_by=model", "service_tier"),
    (COMPLETIONS, "limit=31&group_by=user_id&user_ids=bob&group_by=service_tier", "user_id and service_tier"),
    (SUMMARY, "outcomes=complete&outcomes=failed", "outcome"),
    (SUMMARY, "group_by=user_id", "user_id"),
]


async def test_what_deleted_receipts_alone_knew_is_refused_with_the_way_out(place: Place, tmp_path: Path) -> None:
    await asyncio.to_thread(half_forgotten, place)
    text = config(tmp_path, place)
    files = {"keys.yaml": (tmp_path / "keys.yaml").read_text()}

    async def refused(path: str, query: str, what: str) -> None:
        answer = await gateway.get(f"{path}?{query}", key=KEY)
        assert answer.status == 400, (query, answer.text)
        error = answer.json()["error"]
        assert (error["type"], error["param"], error["code"]) == (
            "invalid_request_error", "start_time", "receipts_deleted",
        ), query  # fmt: skip
        assert "from before 2026-10-11 00:00 UTC were deleted, and only they know " + what in error["message"]
        assert f"`start_time` be {SINCE} at the earliest" in error["message"]

    async with running(text, files=files) as gateway:
        for path, query, what in ONLY_RECEIPTS:
            await refused(path, f"start_time={FIRST}&end_time={END}&{query}", f"{what}: leave that out")
            assert await calls(gateway, path, f"start_time={SINCE}&end_time={END}&{query}") == 10, query
            # Where there were no calls, nothing is missing.
            assert await calls(gateway, path, f"start_time={FIRST - 9 * DAY}&end_time={FIRST}&{query}") == 0
            assert await calls(gateway, path, f"start_time={FIRST}&end_time={END}&api_key_ids=none&{query}") == 0
        noon = FIRST + DAY // 2
        for times in (f"start_time={noon + 1800}&end_time={END}", f"start_time={FIRST}&end_time={noon + 1800}"):
            await refused(
                COMPLETIONS, f"{times}&limit=31", "parts of an hour: let `start_time` and `end_time` be whole"
            )
        await refused(COMPLETIONS, f"start_time={noon}&bucket_width=1m", "minutes: ask for buckets of an hour")
        for times, count in ((f"start_time={FIRST + 1}&end_time={END}", 20), (f"start_time={noon}&end_time={END}", 20)):
            assert await calls(gateway, COMPLETIONS, f"{times}&limit=31") == count
        assert await calls(gateway, COMPLETIONS, f"start_time={SINCE + noon - FIRST}&bucket_width=1m") == 1
        assert await calls(gateway, SUMMARY, f"start_time={FIRST}&end_time={END}&group_by=model") == 20


def test_usage_is_added_up_from_roll_ups_and_refused_where_they_do_not_know(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config(tmp_path, place)
    path = str(tmp_path / "qlens.yaml")

    def usage(*words: str) -> Any:
        capsys.readouterr()
        assert main(["usage", "--json", *words, "-c", path]) == 0
        return json.loads(capsys.readouterr().out)

    names = "tenant,project,key,operation,model,provider,day"
    store = place.store()
    store.write("test", Batch(1, [rows.row(receipt(n)) for n in range(20)], {}))
    before = [usage("--by", names), usage(), usage("--until", "2026-10-15"), usage("--model", "model-1")]
    store.close()
    half_forgotten(place)
    assert [usage("--by", names), usage(), usage("--until", "2026-10-15"), usage("--model", "model-1")] == before
    total = usage()["total"]
    assert (total["calls"], total["cost_usd"]) == (20, "20000000.00000000019")
    assert [row["day"] for row in usage("--by", "day")["rows"]] == [f"2026-10-{n:02}" for n in range(1, 21)]
    capsys.readouterr()
    assert main(["usage", "--by", "model,outcome", "-c", path]) != 0
    told = capsys.readouterr()
    assert told.out == ""
    assert "receipts from before 2026-10-11 00:00 UTC were deleted, and only they know the outcome" in told.err
    assert usage("--by", "outcome", "--since", "2026-10-11")["total"]["calls"] == 10
