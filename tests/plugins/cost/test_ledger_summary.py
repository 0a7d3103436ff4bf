"""What the usage API says of other operations than chat, and the summary's rates, savings and latencies."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlencode

import pytest
from attrs import evolve
from ledgers import Place

from qlens import Caller, Cost, Receipt, Target, Usage
from qlens.testing import Running, Scripted, running, upstream
from qlens.testing.upstreams import FakeUpstream
from qlens_plugins.cost.ledger import rows as ledger_rows
from qlens_plugins.cost.ledger.store import Batch

KEYS = {"ann": ("acme", "member"), "lead": ("acme", "tenant_viewer"), "bob": ("globex", "member"), "root": ("ops", "viewer")}  # fmt: skip  # noqa: E501
PRICES: list[dict[str, Any]] = [
    {"model": "chat", "input": 1, "output": 2},
    {"model": "moderator", "input": 0},
    {"model": "whisper", "meters": {"seconds": 0.0001}},
    {"model": "hearer", "input": 2.5, "audio_in": 6, "output": 10},
    {"model": "painter", "input": 5, "output": 40},
]


def key_of(name: str) -> str:
    return f"sk-example-{name}-0123456789abcdef0123456789"


def key_file() -> str:
    hashes = {name: hashlib.sha256(key_of(name).encode()).hexdigest() for name in KEYS}
    return json.dumps(
        {
            "keys": [
                {"id": name, "hash": f"sha256:{hashes[name]}", "tenant": tenant, "roles": ["member", role]}
                for name, (tenant, role) in KEYS.items()
            ]
        }
    )


@asynccontextmanager
async def serving(place: Place, up: FakeUpstream | None = None) -> AsyncIterator[Running]:
    names = [str(row["model"]) for row in PRICES]
    provider = {"plugin": "openai", "base_url": up.url, "api_key": "sk-example-0"} if up else {"plugin": "echo"}
    content = {
        "pipeline": {
            "auth": [{"plugin": "api_keys", "file": "keys.yaml"}],
            "rate_limit": [
                {
                    "plugin": "token_bucket",
                    "limits": [{"per": "key", "requests_per_minute": 5, "match": {"key": ["bob"]}}],
                }
            ],
            "cache": [{"plugin": "exact"}],
            "cost": [
                {"plugin": "prices", "table": PRICES},
                {"plugin": "ledger", "url": place.url, "flush_seconds": 0.02},
            ],
        },
        "providers": {"up": provider},
        "models": {name: {"max_output_tokens": 100, "targets": [{"provider": "up", "model": name}]} for name in names},
    }
    async with running(json.dumps(content), files={"keys.yaml": key_file()}) as gateway:
        yield gateway


async def written(gateway: Running) -> None:
    async with asyncio.timeout(20):
        writer = gateway.plugin("cost", "ledger").writer
        while gateway.gateway.current.running or writer.waiting or writer._uncounted:
            await asyncio.sleep(0.02)


async def ask(gateway: Running, path: str, key: str = "root", **query: Any) -> Any:
    told = await gateway.get(f"{path}?{urlencode(query, doseq=True)}", key=key_of(key))
    assert told.status == 200, told.text
    return told.json()


async def used(gateway: Running, kind: str, **query: Any) -> dict[str, Any]:
    """The only result of a path about usage."""
    await written(gateway)
    found = await ask(gateway, f"/v1/organization/usage/{kind}", start_time=int(time.time()) - 60, **query)
    (result,) = [result for bucket in found["data"] for result in bucket["results"]]
    return dict(result)


# --- usage by operation ------------------------------------------------------------------------


async def test_moderations_are_counted_with_what_they_read(place: Place) -> None:
    async with serving(place) as gateway:
        for text in ("hello", "a longer text than that"):
            body = {"model": "moderator", "input": text}
            assert (await gateway.post("/v1/moderations", body, key=key_of("ann"))).status == 200
        result = await used(gateway, "moderations", group_by="model")
        (row_tokens,) = {sum(row["input"] for row in place.rows("SELECT input FROM receipts"))}
    assert result["object"] == "organization.usage.moderations.result"
    assert (result["model"], result["num_model_requests"], result["input_tokens"]) == ("moderator", 2, row_tokens)
    assert row_tokens > 0


LISTENED = {"text": "hello there", "usage": {"type": "duration", "seconds": 7}}
COUNTED = {
    "text": "hello there",
    "duration": 6.5,
    "usage": {
        "type": "tokens", "input_tokens": 80, "input_token_details": {"text_tokens": 10, "audio_tokens": 70},
        "output_tokens": 5, "total_tokens": 85,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("model", "answer", "cost"),
    [("whisper", LISTENED, 700_000_000), ("hearer", COUNTED, 10 * 2_500_000 + 70 * 6_000_000 + 5 * 10_000_000)],
)
async def test_transcripts_are_counted_in_seconds_whether_seconds_or_tokens_are_billed(
    place: Place, model: str, answer: Mapping[str, Any], cost: int
) -> None:
    async with upstream() as up, serving(place, up) as gateway:
        for path in ("transcriptions", "translations"):
            up.script(Scripted(body=dict(answer)))
            told = await gateway.post_form(f"/v1/audio/{path}", {"model": model}, {"file": b"RIFF"}, key=key_of("ann"))
            assert told.status == 200, told.text
        result = await used(gateway, "audio_transcriptions", group_by=["model", "api_key_id"])
        costs = {row["cost_picos"] for row in place.rows("SELECT cost_picos FROM receipts")}
    assert (result["model"], result["api_key_id"], result["seconds"]) == (model, "ann", 14)
    assert result["num_model_requests"] == 2
    assert costs == {cost}


@pytest.mark.parametrize("stream", [False, True])
async def test_pictures_are_counted_where_tokens_are_billed_for_them(place: Place, stream: bool) -> None:
    told = {"input_tokens": 10, "output_tokens": 200, "total_tokens": 210}
    picture = {"b64_json": "aGk="}
    async with upstream() as up, serving(place, up) as gateway:
        made = (
            Scripted(events=[{"type": "image_generation.completed", **picture, "usage": told}])
            if stream
            else Scripted(body={"created": 1, "data": [picture, picture], "usage": told})
        )
        up.script(made)
        body = {"model": "painter", "prompt": "a hat", **({"stream": True} if stream else {"n": 2})}
        assert (await gateway.post("/v1/images/generations", body, key=key_of("ann"))).status == 200
        result = await used(gateway, "images", group_by="source")
        (row,) = place.rows("SELECT * FROM receipts")
    assert (result["images"], result["source"]) == (1 if stream else 2, "image.generation")
    assert (row["cost_picos"], row["cost_state"]) == (10 * 5_000_000 + 200 * 40_000_000, "exact")


# --- the summary -------------------------------------------------------------------------------


def receipt(number: int, **more: Any) -> Receipt:
    plain = Receipt(
        id=f"call-{number:04}", caller=Caller("acme", "bob", "keys", None, "ann"), operation="chat", model="chat",
        target=Target("up", "m", "m"), outcome="complete", status=200, error=None, usage=Usage(input=1),
        cost=Cost(1_000_000), saved_picos=0, cache="miss", streamed=False, attempts=(), tags={},
        wall_ns=time.time_ns() - 10**9, ttft_us=None, total_us=1000, overhead_us=0, bytes_out=0, config_version="v",
    )  # fmt: skip
    return evolve(plain, **more)


async def test_the_summary_has_rates_savings_and_latencies(place: Place) -> None:
    """100 calls that took 1 to 100 ms: 10 failed, 5 were cut, 20 came from the cache and saved 3 microdollars each."""
    made = [
        receipt(
            n,
            total_us=(n + 1) * 1000,
            outcome="failed" if n < 10 else "cut" if n < 15 else "cached" if n >= 80 else "complete",
            cache="hit" if n >= 80 else "miss",
            saved_picos=3_000_000 if n >= 80 else 0,
        )
        for n in range(100)
    ]

    def keep() -> None:
        store = place.store()
        store.write("made", Batch(1, list(map(ledger_rows.row, made)), {}))
        store.close()

    await asyncio.to_thread(keep)
    async with serving(place) as gateway:
        by_key = await ask(gateway, "/v1/usage/summary", group_by="api_key_id")
        by_model = await ask(gateway, "/v1/usage/summary", group_by="model")
    for summary in (by_key, by_model):
        total = summary["total"]
        assert (total["calls"], total["failed_calls"], total["cached_calls"]) == (100, 15, 20)
        assert (total["error_rate"], total["cache_hit_rate"]) == (0.15, 0.2)
        assert (total["saved_usd"], total["cost_usd"]) == ("0.00006", "0.0001")
        for name, exact in (("p50", 50), ("p95", 95), ("p99", 99)):
            assert abs(total["latency_ms"][name] - exact) <= exact / 8
        (row,) = summary["data"]
        assert {name: row[name] for name in total if name in row} == total


async def test_who_is_refused_is_an_error_where_that_is_known(place: Place) -> None:
    """Of bob's 8 calls a limit of 5 refuses 3, and a body that is none is one more."""
    async with serving(place) as gateway:
        chat = {"model": "chat", "messages": [{"role": "user", "content": "hello"}]}
        statuses = [(await gateway.post("/v1/chat/completions", chat, key=key_of("bob"))).status for _ in range(8)]
        assert sorted(statuses) == [200] * 5 + [429] * 3
        assert (await gateway.post("/v1/chat/completions", chat, key=key_of("ann"))).status == 200
        bad = {**chat, "max_tokens": "many"}
        assert (await gateway.post("/v1/chat/completions", bad, key=key_of("ann"))).status == 400
        await written(gateway)
        summary = await ask(gateway, "/v1/usage/summary", group_by=["tenant", "model"])
        by_key = await ask(gateway, "/v1/usage/summary", group_by="api_key_id")
        own = await ask(gateway, "/v1/usage/summary", "lead")
        member = await ask(gateway, "/v1/usage/summary", "bob")
    total = summary["total"]
    assert (total["calls"], total["rejected_calls"], total["failed_calls"]) == (6, 4, 0)
    assert total["rejected_by_status"] == {"400": 1, "429": 3}
    assert total["error_rate"] == 0.4
    rows = {(row["tenant"], row["model"]): row for row in summary["data"]}
    assert rows["globex", "chat"]["rejected_by_status"] == {"429": 3}
    assert rows["globex", "chat"]["error_rate"] == 0.375
    assert sum(row["rejected_calls"] for row in summary["data"]) == 4
    assert (own["total"]["rejected_by_status"], own["total"]["error_rate"]) == ({"400": 1}, 0.5)
    # Nobody knows of which key a refused call was.
    for unknown in (by_key, member):
        assert (unknown["total"]["rejected_calls"], unknown["total"]["error_rate"]) == (None, 0.0)
