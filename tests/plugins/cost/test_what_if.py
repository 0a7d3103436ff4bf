"""`qlens what-if`: what past calls would have cost under other routes and prices, as exactly as they were charged."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve
from ledgers import Place, SqlitePlace

from qlens import Attempt, Caller, Cost, Receipt, Target, Usage
from qlens.cli import main
from qlens.testing import running
from qlens_plugins.cost.ledger import past, rows
from qlens_plugins.cost.ledger.store import Batch

OLD = """
server: {{port: 0, admin: {{port: 0}}}}
pipeline:
  auth: [{{plugin: anonymous}}]
  cost: [{{plugin: prices, catalogue: false, table: [{rows}]}}, {{plugin: ledger, url: "sqlite:///{url}"}}]
providers: {{here: {{plugin: echo}}, there: {{plugin: echo}}}}
models: {{{models}}}
"""
MODELS = "a: {targets: [{provider: here, model: m-a}]}, b: {targets: [{provider: here, model: m-b}]}"
DAY = 1_793_491_200
"""2026-11-01 in UTC."""


def written(folder: Path, *receipts: Receipt, place: Place | None = None) -> None:
    found = place or SqlitePlace(folder / "ledger.db")
    store = found.store()
    store.write("test", Batch(1, [rows.row(each) for each in receipts], {}))
    store.close()
    (folder / "qlens.yaml").write_text(config("{model: m-a, input: 1}").replace("sqlite:///ledger.db", found.url))


def config(prices: str, models: str = MODELS, *, route: str = "") -> str:
    text = OLD.format(rows=prices, url="ledger.db", models=models)
    return text.replace("pipeline:\n", f"pipeline:\n  route: [{{plugin: {route}}}]\n") if route else text


def receipt(number: int, model: str, usage: Usage, picos: int | None, **changes: Any) -> Receipt:
    target = Target("here", f"m-{model}", model)
    cost = Cost(None, "unpriced") if picos is None else Cost(picos, price_id="old")
    return evolve(
        Receipt(
            id=f"call-{number}", caller=Caller("acme", "test", "test"), operation="chat", model=model, target=target,
            outcome="complete", status=200, error=None, usage=usage, cost=cost, saved_picos=0, cache="off",
            streamed=False, attempts=(Attempt(1, target, 0.0, billed=True, usage=usage, cost=cost),), tags={},
            wall_ns=(DAY + number) * 10**9, ttft_us=1, total_us=2, overhead_us=1, bytes_out=3, config_version="v",
        ),
        **changes,
    )  # fmt: skip


def what_if(folder: Path, capsys: pytest.CaptureFixture[str], other: str, *words: str) -> Any:
    (folder / "other.yaml").write_text(other)
    command = ["what-if", "-c", str(folder / "qlens.yaml"), "--config", str(folder / "other.yaml"), "--json", *words]
    code = main(command)
    out, err = capsys.readouterr()
    return json.loads(out) if code == 0 else err


def spent(found: Any) -> dict[tuple[str, str], tuple[str, str, str]]:
    return {
        (row["model"], row["tenant"]): (row["then_usd"], row["now_usd"], row["difference_usd"]) for row in found["rows"]
    }


async def test_calls_repriced_cost_what_the_same_calls_cost_a_gateway_with_that_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dear = "{model: m-a, input: 3, output: 7.000001}, {model: m-a, input: 9, output: 11, above_prompt_tokens: 6}"
    bills = {}
    for prices in ("{model: m-a, input: 1, output: 2}", dear):
        async with running(config(prices)) as gateway:
            for words in range(1, 12):
                body = {"model": "a", "messages": [{"role": "user", "content": "word " * words}]}
                assert (await gateway.post("/v1/chat/completions", body)).status == 200
            receipts = await gateway.settled(11)
            bills[prices] = sum(each.cost.picos or 0 for each in receipts)
            if prices != dear:
                written(tmp_path, *receipts)
    (then, now) = bills.values()
    found = await asyncio.to_thread(what_if, tmp_path, capsys, config(dear))
    ((said_then, said_now, difference),) = spent(found).values()
    assert [int(text.replace("0.", "", 1).ljust(12, "0")) for text in (said_then, said_now, difference)] == [
        then, now, now - then,
    ]  # fmt: skip


def test_every_bucket_meter_tier_and_prompt_size_of_many_calls(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against sums worked out here, over several pages of calls of which some begin at one moment."""
    monkeypatch.setattr(past, "AT_ONCE", 7)
    chance, receipts, now = random.Random(3), [], 0
    small, large = [2, 1, 3, 4, 5, 6, 7, 8], [20, 10, 30, 40, 50, 60, 70, 80]
    for number in range(100):
        counts = [chance.choice([0, chance.randrange(2**20)]) for _ in rows.BUCKETS]
        tier, images = chance.choice([None, "flex", "priority"]), chance.choice([0, 3])
        used = dict(zip(rows.BUCKETS, counts, strict=True))
        usage = Usage(meters={"images": images}, source="provider", tier=tier, **used)
        rates, image = (large, 8) if usage.prompt > 10**6 else (small, 1)
        cost = sum(count * rate for count, rate in zip(counts, rates, strict=True)) * 10**6 + images * image * 10**10
        now += cost // 2 if tier == "flex" else cost
        receipts.append(receipt(number, "a", usage, number, wall_ns=DAY * 10**9 + number // 5))

    def row(rates: list[int], image: str, more: str = "") -> str:
        told = ", ".join(f"{name}: {rate}" for name, rate in zip(rows.BUCKETS, rates, strict=True))
        return f"{{model: m-a, {told}, meters: {{images: {image}}}, tiers: {{flex: 0.5}}{more}}}"

    written(tmp_path, *receipts)
    found = what_if(
        tmp_path, capsys, config(f"{row(small, '0.01')}, {row(large, '0.08', ', above_prompt_tokens: 1000000')}")
    )
    total = found["total"]
    assert (total["calls"], total["now_usd"]) == (100, f"{now // 10**12}.{now % 10**12:012}".rstrip("0"))
    assert total["estimated_now"] == sum(each.usage.tier == "priority" for each in receipts)


def test_each_attempt_is_priced_by_its_own_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = (Usage(input=tokens, source="provider") for tokens in (60, 70))
    target = Target("here", "m-a", "a")
    attempts = (
        Attempt(1, target, 0.0, billed=True, usage=one, cost=Cost(60)),
        Attempt(2, target, 0.0, error="x", usage=two),
        Attempt(3, target, 0.0, billed=True, usage=two, cost=Cost(70)),
    )
    both = receipt(1, "a", Usage(input=130, source="provider"), 130, attempts=attempts)
    written(tmp_path, both)
    prices = "{model: m-a, input: 1}, {model: m-a, input: 5, above_prompt_tokens: 100}"
    assert what_if(tmp_path, capsys, config(prices))["total"]["now_usd"] == "0.00013"


def test_unpriced_is_not_free_and_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    usage = Usage(input=1000, source="provider")
    cached = receipt(5, "b", Usage(), 0, cost=Cost(0), attempts=(), outcome="cached")
    written(
        tmp_path,
        receipt(1, "a", usage, 10**9),
        receipt(2, "a", usage, None),
        receipt(3, "b", usage, 10**9),
        receipt(4, "b", Usage(input=1, audio_in=1, source="provider"), 7),
        cached,
        receipt(6, "gone", usage, 10**9),
    )
    found = what_if(tmp_path, capsys, config("{model: m-a, input: 3}, {model: other, input: 1}"))
    assert spent(found) == {
        ("a", "acme"): ("0.001", "0.006", "0.002"),
        ("b", "acme"): ("0.001000000007", "0", "0"),  # only what a cache answered has a price
        ("gone", "acme"): ("0.001", None, None),
    }
    numbers = {row["model"]: (row["unpriced_then"], row["unpriced_now"], row["no_such_model"]) for row in found["rows"]}
    assert numbers == {"a": (1, 0, 0), "b": (0, 2, 0), "gone": (0, 1, 1)}
    (tmp_path / "other.yaml").write_text(config("{model: m-a, input: 3}"))
    assert main(["what-if", "-c", str(tmp_path / "qlens.yaml"), "--config", str(tmp_path / "other.yaml")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:5] == ["MODEL", "TENANT", "CALLS", "THEN_USD", "NOW_USD"]
    assert any(line.split()[:5] == ["gone", "acme", "1", "0.001", "-"] for line in lines)


def test_calls_go_to_the_first_target_or_are_spread_by_weight_always_the_same_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = Usage(input=1, source="provider")
    written(tmp_path, *(receipt(number, "a", usage, 0) for number in range(1000)))
    targets = "a: {targets: [%s]}" % ", ".join(  # noqa: UP031
        f"{{provider: {provider}, model: {model}, weight: {weight}}}"
        for provider, model, weight in (("here", "x", 1), ("there", "y", 3), ("there", "z", 0))
    )
    prices = "{model: x, input: 1}, {model: y, input: 1000}, {model: z, input: 1000000}"
    assert what_if(tmp_path, capsys, config(prices, targets))["total"]["now_usd"] == "0.001"
    assert what_if(tmp_path, capsys, config(prices, targets, route="ordered"))["total"]["now_usd"] == "0.001"
    spread = what_if(tmp_path, capsys, config(prices, targets, route="weighted"))["total"]["now_usd"]
    assert 0.7 < float(spread) < 0.8
    assert what_if(tmp_path, capsys, config(prices, targets, route="weighted"))["total"]["now_usd"] == spread


def test_prices_are_those_in_force_when_a_call_was_made_and_days_are_both_included(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = Usage(input=1, source="provider")
    days = [receipt(day, "a", usage, 1, wall_ns=(DAY + day * 86_400) * 10**9 - 1) for day in range(1, 6)]
    written(tmp_path, *days)
    prices = "{model: m-a, input: 1}, {model: m-a, input: 10, valid_from: 2026-11-04}"
    assert what_if(tmp_path, capsys, config(prices))["total"]["now_usd"] == "0.000023"
    some = what_if(tmp_path, capsys, config(prices), "--from", "2026-11-03", "--to", "2026-11-04")
    assert (some["total"]["calls"], some["total"]["now_usd"]) == (2, "0.000011")
    assert "--from 2026-11-04 is after --to 2026-11-03" in what_if(
        tmp_path, capsys, config(prices), "--from", "2026-11-04", "--to", "2026-11-03"
    )
    none = what_if(tmp_path, capsys, config(prices), "--from", "9999-12-31")
    assert (none["rows"], none["total"]["calls"]) == ([], 0)


def test_behind_a_wildcard_the_name_is_the_one_that_was_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = Usage(input=1, source="provider")
    asked = Target("here", "m-x", "all/*")
    written(tmp_path, receipt(1, "all/*", usage, 1, target=asked))
    models = '"all/*": {targets: [{provider: there, model: "new-*"}]}'
    found = what_if(tmp_path, capsys, config("{model: new-m-x, provider: there, input: 4}", models))
    assert spent(found) == {("all/*", "acme"): ("0.000000000001", "0.000004", "0.000003999999")}


def test_a_configuration_that_is_faulty_or_not_there_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NOT_SET", raising=False)
    written(tmp_path)
    assert "price_table" in what_if(tmp_path, capsys, config("{model: m-a, input: 1}").replace("table", "price_table"))
    unset = config("{model: m-a, input: 1}").replace(
        "there: {plugin: echo}", 'there: {plugin: openai, api_key: "${NOT_SET}"}'
    )
    assert what_if(tmp_path, capsys, unset)["total"]["calls"] == 0
    assert main(["what-if", "-c", str(tmp_path / "qlens.yaml"), "--config", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err


def test_a_price_table_that_is_not_there_is_no_reason_to_call_all_unpriced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path, receipt(1, "a", Usage(input=1, source="provider"), 1))
    other = config("{model: m-a, input: 1}").replace("plugin: prices,", "plugin: prices, file: gone.yaml,")
    assert "gone.yaml" in what_if(tmp_path, capsys, other)


def test_days_whose_receipts_were_deleted_are_not_taken_for_days_without_calls(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = Usage(input=1, source="provider")
    written(tmp_path, receipt(1, "a", usage, 1, wall_ns=(DAY + 200_000) * 10**9), place=place)
    place.execute(f"UPDATE receipts_kept SET since_ns = {(DAY + 90_000) * 10**9}")
    other = config("{model: m-a, input: 1}")
    assert "before 2026-11-02 01:00 UTC were deleted" in what_if(tmp_path, capsys, other, "--from", "2026-11-02")
    assert what_if(tmp_path, capsys, other, "--from", "2026-11-03")["total"]["calls"] == 1
    assert what_if(tmp_path, capsys, other)["total"]["calls"] == 1
    (late, early), store = (
        [evolve(receipt(n, "a", usage, 1), wall_ns=(DAY + n) * 10**9) for n in (300_000, 5)],
        place.store(),
    )
    store.write("more", Batch(1, [rows.row(late), rows.row(early)], {}))
    store.close()
    place.execute(f"DELETE FROM receipts WHERE id = '{early.id}'")
    for words in ([], ["--to", "2026-11-04"]):
        assert "before 2026-11-02 01:00 UTC were deleted: ask for" in what_if(tmp_path, capsys, other, *words)
    assert what_if(tmp_path, capsys, other, "--to", "2026-10-31")["total"]["calls"] == 0
    assert what_if(tmp_path, capsys, other, "--from", "2026-11-03")["total"]["calls"] == 2
