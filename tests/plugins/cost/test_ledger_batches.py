"""Batches in the ledger: what one used is there once it is over and somebody has asked for it, and once only."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest
from keepers import ACME, OTHER, kept, sdk, settings
from ledgers import Place

from qlens.testing import Running
from qlens.testing.objects import FakeKeeper, keeper

ENDED = int(time.time()) - 3600
DAY = ENDED - 86_400
USED = {
    "input_tokens": 1000,
    "input_tokens_details": {"cached_tokens": 400},
    "output_tokens": 100,
    "output_tokens_details": {"reasoning_tokens": 30},
    "total_tokens": 1100,
}
PICOS = 600 * 500_000 + 400 * 250_000 + 70 * 1_000_000 + 30 * 1_000_000
"""At half the price of what is not sent in batches."""


def yaml(place: Place, one: FakeKeeper, **ledger: Any) -> str:
    table = "{plugin: prices, table: [{model: upstream, input: 1, cached_input: 0.5, output: 2, tiers: {batch: 0.5}}]}"
    more = "".join(f", {name}: {value}" for name, value in ledger.items())
    kept_in = f'{{plugin: ledger, url: "{place.url}", flush_seconds: 0.02{more}}}'
    return settings(one, one).replace("cost: []", f"cost: [{table}, {kept_in}]")


@asynccontextmanager
async def made(gateway: Running, one: FakeKeeper, **end: Any) -> AsyncIterator[str]:
    """The id of a batch that is over, as the client knows it."""
    async with sdk(gateway) as client:
        file = await client.files.create(file=("in.jsonl", b"{}"), purpose="batch", extra_body={"model": "first"})
        batch = await client.batches.create(input_file_id=file.id, endpoint="/v1/responses", completion_window="24h")
    one.complete(list(one.batches)[-1], b"{}\n", **{"completed_at": ENDED, "model": "upstream", "usage": USED, **end})
    yield batch.id


async def asked(gateway: Running, batch: str, times: int = 1) -> None:
    for _ in range(times):
        assert (await gateway.get(f"/v1/batches/{batch}", key=ACME)).json()["status"] == "completed"


async def rows(place: Place, asks: int, batches: int = 1) -> list[dict[str, Any]]:
    """What the ledger has of batches that are over, when all calls are in it that ask for one, and so many of these."""
    over = "SELECT * FROM receipts WHERE operation LIKE 'batch\\_%' ESCAPE '\\' AND operation <> 'batch_create'"
    async with asyncio.timeout(10):
        while True:
            found = place.rows(over)
            calls = place.rows("SELECT id FROM receipts WHERE operation = 'batch'")
            if len(calls) >= asks and len(found) >= batches:
                return found
            await asyncio.sleep(0.02)


@pytest.fixture
async def one() -> AsyncIterator[FakeKeeper]:
    async with keeper() as fake:
        yield fake


async def test_a_batch_is_in_the_ledger_once_however_many_ask_for_it_where_and_when(
    place: Place, one: FakeKeeper
) -> None:
    text = yaml(place, one)
    async with kept(text) as first, kept(text) as second, made(first, one) as batch:
        await asyncio.gather(*(asked(gateway, batch, 3) for gateway in (first, second)))
    async with kept(text) as restarted:
        await asked(restarted, batch)
        (row,) = await rows(place, 7)
        for asked_for, expected in (("group_by=batch", [(1000, 100, 1, True)]), ("batch=false", [])):
            usage = await restarted.get(f"/v1/organization/usage/completions?start_time={DAY}&{asked_for}", key=ACME)
            found = [result for bucket in usage.json()["data"] for result in bucket["results"]]
            assert [
                (each["input_tokens"], each["output_tokens"], each["num_model_requests"], each["batch"])
                for each in found
            ] == expected
    assert (row["operation"], row["model"], row["provider"], row["upstream_model"]) == (
        "batch_responses",
        "first",
        "one",
        "upstream",
    )
    assert (row["tenant"], row["key_id"], row["outcome"], row["tier"]) == ("acme", "one", "complete", "batch")
    assert (row["input"], row["cached_input"], row["output"], row["reasoning"]) == (600, 400, 70, 30)
    assert (row["usage_source"], row["cost_picos"], row["cost_state"]) == ("provider", PICOS, "exact")
    assert row["wall_ns"] == ENDED * 10**9


async def test_the_lines_of_a_batch_are_not_one_long_prompt(place: Place, one: FakeKeeper) -> None:
    long = "{model: upstream, input: 100, output: 200, above_prompt_tokens: 500}"
    text = yaml(place, one).replace("tiers: {batch: 0.5}}]", f"tiers: {{batch: 0.5}}}}, {long}]")
    async with kept(text) as gateway:
        async with made(gateway, one) as batch:
            await asked(gateway, batch)
        (row,) = await rows(place, 1)
    assert (row["cost_picos"], row["cost_state"]) == (PICOS, "estimated")


async def test_two_batches_are_two_receipts_and_one_that_runs_is_none(place: Place, one: FakeKeeper) -> None:
    async with kept(yaml(place, one)) as gateway:
        async with made(gateway, one) as first, made(gateway, one, completed_at=ENDED + 1) as second:
            for batch in (first, second):
                await asked(gateway, batch)
            own = list(one.batches)
            one.batches[own[0]].update(status="in_progress", completed_at=None)
            assert (await gateway.get(f"/v1/batches/{first}", key=ACME)).json()["status"] == "in_progress"
        found = await rows(place, 3, 2)
    assert len({row["id"] for row in found}) == len(found) == 2


@pytest.mark.parametrize(
    ("end", "model", "upstream", "cost"),
    [
        ({"model": "upstream-2026-01-01"}, "first", "upstream", PICOS),
        ({"model": "another"}, None, "another", None),
        ({"model": None}, None, "", None),
        ({"completed_at": None, "status": "completed", "expired_at": ENDED}, "first", "upstream", PICOS),
    ],
)
async def test_what_is_not_known_of_a_batch_has_no_price(
    place: Place, one: FakeKeeper, end: dict[str, Any], model: str | None, upstream: str, cost: int | None
) -> None:
    async with kept(yaml(place, one)) as gateway:
        async with made(gateway, one, **end) as batch:
            await asked(gateway, batch)
        (row,) = await rows(place, 1)
    assert (row["model"], row["upstream_model"] or "", row["cost_picos"]) == (model, upstream, cost)
    assert row["input"] == 600


NOTHING = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}


@pytest.mark.parametrize("usage", [None, {}, "odd", NOTHING, {"input_tokens": -1, "output_tokens": 1}])
async def test_a_batch_that_says_nothing_of_its_usage_is_answered_and_not_invented(
    place: Place, one: FakeKeeper, usage: object
) -> None:
    async with kept(yaml(place, one)) as gateway:
        async with made(gateway, one, usage=usage) as batch:
            await asked(gateway, batch)
        assert not await rows(place, 1, 0)


def line(model: str, **usage: Any) -> bytes:
    """A line of an output."""
    body = {"object": "response", "model": model, **({"usage": usage} if usage else {})}
    return orjson.dumps({"custom_id": "x", "response": {"status_code": 200, "body": body}, "error": None})


async def test_where_the_batch_does_not_say_it_its_output_does_each_line_for_itself(
    place: Place, one: FakeKeeper
) -> None:
    long = "{model: upstream, input: 100, output: 200, above_prompt_tokens: 500}"
    text = yaml(place, one).replace("tiers: {batch: 0.5}}]", f"tiers: {{batch: 0.5}}}}, {long}]")
    lines = [
        *(line("upstream-2026-01-01", input_tokens=400, output_tokens=10, total_tokens=410) for _ in range(3)),
        line("other", input_tokens=7, output_tokens=1, total_tokens=8),
        line("upstream"),
        b'{"custom_id": "x", "response": null, "error": {"code": "batch_expired"}}',
        b"no json",
    ]
    async with kept(text) as first, kept(text) as second, made(first, one, usage=None) as batch:
        one.contents[one.batches[list(one.batches)[-1]]["output_file_id"]] = b"\n".join(lines) + b"\n"
        await asyncio.gather(*(asked(gateway, batch, 3) for gateway in (first, second)))
        found = await rows(place, 6, 2)
        reads = [request for request in one.requests if request.path.endswith("/content")]
        assert len(reads) == 2  # once by each gateway, however often one asks
        # A provider that comes to say it adds nothing.
        one.batches[list(one.batches)[-1]]["usage"] = USED
        await asked(first, batch)
        found = await rows(place, 7, 2)
    by_model = {row["upstream_model"]: row for row in found}
    assert len(found) == len(by_model) == 2
    assert (by_model["upstream"]["input"], by_model["upstream"]["output"]) == (1200, 30)
    assert (by_model["upstream"]["cost_picos"], by_model["upstream"]["cost_state"]) == (
        1200 * 500_000 + 30 * 10**6,
        "exact",
    )
    assert (by_model["other"]["input"], by_model["other"]["cost_picos"]) == (7, None)


async def test_an_output_that_cannot_be_read_is_read_when_somebody_asks_again(place: Place, one: FakeKeeper) -> None:
    async with kept(yaml(place, one)) as gateway, made(gateway, one, usage=None) as batch:
        content = line("upstream", input_tokens=1000, output_tokens=100, total_tokens=1100)
        own = one.batches[list(one.batches)[-1]]
        name = own["output_file_id"]
        file = one.files.pop(name)
        await asked(gateway, batch)
        assert not await rows(place, 1, 0)
        one.files[name], one.contents[name] = file, content
        async with asyncio.timeout(10):
            asks = 1
            while not await rows(place, asks, 0):
                await asked(gateway, batch)
                asks += 1
        (row,) = await rows(place, asks)
    assert (row["input"], row["cost_picos"]) == (1000, 1000 * 500_000 + 100 * 1_000_000)


async def test_a_batch_whose_receipt_was_forgotten_is_not_counted_again(place: Place, one: FakeKeeper) -> None:
    async with kept(yaml(place, one, keep_days=7)) as gateway:
        async with made(gateway, one, completed_at=ENDED - 9 * 86_400) as batch:
            await asked(gateway, batch)
        assert not await rows(place, 1, 0)
        # A receipt as old as this is deleted as soon as it is written: that it was counted is to be seen here alone.
        days = await gateway.get(
            f"/v1/organization/usage/completions?start_time={ENDED - 10 * 86_400}&batch=true&limit=31", key=ACME
        )
        assert not [result for bucket in days.json()["data"] for result in bucket["results"]]


async def test_nobody_but_the_tenant_that_made_it_gets_a_batch_into_the_ledger(place: Place, one: FakeKeeper) -> None:
    async with kept(yaml(place, one)) as gateway:
        async with made(gateway, one) as batch:
            assert (await gateway.get(f"/v1/batches/{batch}", key=OTHER)).status == 404
            await asked(gateway, batch)
        (row,) = await rows(place, 1)
    assert row["tenant"] == "acme"
