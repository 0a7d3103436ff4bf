"""Cost exports of Azure, AWS and OpenAI as files, and a ledger to compare them with."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from ledgers import Place, SqlitePlace

from qlens import Attempt, Caller, Cost, Receipt, Target, Usage
from qlens.cli import main
from qlens_plugins.cost.ledger import rows
from qlens_plugins.cost.ledger.store import Batch

CONFIG = """
pipeline:
  auth: [{plugin: anonymous}]
  cost: [{plugin: ledger, url: "sqlite:///ledger.db"}]
providers:
  azure-eu: {plugin: azure_openai, endpoint: "https://eu.openai.azure.com", api_key: sk-example-azure}
  bedrock-us: {plugin: bedrock, region: us-east-1}
  openai: {plugin: openai, api_key: sk-example-openai}
models:
  gpt-4o: {targets: [{provider: azure-eu, model: our-gpt, base_model: gpt-4o-2024-11-20}]}
  mini: {targets: [{provider: azure-eu, model: small, base_model: gpt-4o-mini}]}
  sonnet: {targets: [{provider: bedrock-us, model: "us.anthropic.claude-sonnet-4-5-20250929-v1:0"}]}
  nova: {targets: [{provider: bedrock-us, model: "amazon.nova-2-lite-v1:0"}]}
  "openai/*": {targets: [{provider: openai, model: "*"}]}
"""
GPT, MINI = Target("azure-eu", "our-gpt", "gpt-4o"), Target("azure-eu", "small", "mini")
SONNET = Target("bedrock-us", "us.anthropic.claude-sonnet-4-5-20250929-v1:0", "sonnet")
NOVA = Target("bedrock-us", "amazon.nova-2-lite-v1:0", "nova")
OPENAI = Target("openai", "gpt-4o-mini-2024-07-18", "openai/*")
NOVEMBER = int(datetime(2026, 11, 1, tzinfo=UTC).timestamp())
USD = 10**12


def attempt(target: Target, usd: str | None, tokens: int, n: int = 1) -> Attempt:
    cost = Cost(None, "unpriced") if usd is None else Cost(int(Decimal(usd) * USD), price_id="test")
    return Attempt(n, target, 0.0, billed=True, usage=Usage(input=tokens, source="provider"), cost=cost)


def receipt(number: int, day: int, *attempts: Attempt) -> Receipt:
    picos = [each.cost.picos for each in attempts]
    cost = Cost(None, "unpriced") if None in picos else Cost(sum(pico or 0 for pico in picos), price_id="test")
    tokens = sum(each.usage.input for each in attempts if each.usage)
    return Receipt(
        id=f"call-{number}", caller=Caller("acme", "test", "test"), operation="chat", model=attempts[-1].target.public,
        target=attempts[-1].target, outcome="complete", status=200, error=None,
        usage=Usage(input=tokens, source="provider"), cost=cost, saved_picos=0, cache="off", streamed=False,
        attempts=attempts, tags={}, wall_ns=(NOVEMBER + (day - 1) * 86_400 + number) * 10**9, ttft_us=1, total_us=2,
        overhead_us=1, bytes_out=3, config_version="v",
    )  # fmt: skip


def ledger(folder: Path, *receipts: Receipt, place: Place | None = None) -> None:
    found = place or SqlitePlace(folder / "ledger.db")
    (folder / "qlens.yaml").write_text(CONFIG.replace("sqlite:///ledger.db", found.url))
    store = found.store()
    store.write("test", Batch(1, [rows.row(each) for each in receipts], {}))
    store.close()


def table(path: Path, lines: Iterable[Mapping[str, object]], *, packed: bool = False) -> Path:
    text = io.StringIO()
    rows = list(lines)
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    content = text.getvalue().encode("utf-8-sig")
    path.write_bytes(gzip.compress(content) if packed else content)
    return path


def azure(day: int, meter: str, usd: str, thousands: str = "1", **more: str) -> dict[str, str]:
    return {
        "InvoiceSectionName": "", "Date": f"11/{day:02}/2026", "MeterCategory": "Foundry Models",
        "MeterSubCategory": "Azure OpenAI", "MeterName": meter, "Quantity": thousands, "UnitOfMeasure": "1K",
        "CostInBillingCurrency": usd, "BillingCurrency": "USD", "ChargeType": "Usage",
        "ResourceId": "/subscriptions/1/providers/Microsoft.CognitiveServices/accounts/eu", "Tags": '"a": "b, c"',
        **more,
    }  # fmt: skip


def aws(day: int, usage_type: str, usd: str, thousands: str = "1", **more: str) -> dict[str, str]:
    return {
        "bill_payer_account_id": "1", "line_item_usage_start_date": f"2026-11-{day:02}T05:00:00.000Z",
        "line_item_product_code": "AmazonBedrock", "line_item_usage_type": usage_type, "product": "{}",
        "line_item_line_item_type": "Usage", "line_item_usage_amount": thousands, "pricing_unit": "1K tokens",
        "line_item_unblended_cost": usd, "line_item_currency_code": "USD", "line_item_resource_id": "", **more,
    }  # fmt: skip


def costs(*days: tuple[int, list[tuple[str, str]]]) -> str:
    """A page of OpenAI's costs; amounts stand in it as they are written here."""
    buckets = []
    for day, results in days:
        told = [f'{{"amount": {{"value": {usd}, "currency": "usd"}}, "line_item": "{item}"}}' for item, usd in results]
        buckets.append(f'{{"start_time": {NOVEMBER + (day - 1) * 86_400}, "results": [{", ".join(told)}]}}')
    return f'{{"object": "page", "data": [{", ".join(buckets)}], "has_more": false, "next_page": null}}'


def reconcile(folder: Path, capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, Any]:
    code = main(["reconcile", "-c", str(folder / "qlens.yaml"), "--json", *map(str, words)])
    out, err = capsys.readouterr()
    return code, json.loads(out) if out else err


def drifts(found: Any) -> dict[str, tuple[str, str]]:
    return {each["model"]: (each["drift_usd"], each["drift_percent"]) for each in found["models"]}
