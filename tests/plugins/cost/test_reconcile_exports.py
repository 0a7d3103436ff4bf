"""`qlens reconcile` with the words, units and rows that the providers' exports have beside the plainest ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from exports import NOVA, NOVEMBER, attempt, aws, azure, drifts, ledger, receipt, reconcile, table

from qlens import Target
from qlens.cli import main

DAY = 86_400


def targets(folder: Path, *lines: str) -> None:
    path = folder / "qlens.yaml"
    path.write_text(path.read_text() + "".join(f"  {line}\n" for line in lines))


# --- names -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base_model", "meters"),
    [
        ("gpt-5.2-2025-12-11", ["5.2 1211 inp Gl 1M Tokens", "5.2 1211 cd inp Gl 1M Tokens"]),
        ("gpt-5.4", ["5.4 cd inp Gl 1M Tokens", "5.4 opt Gl 1M Tokens"]),
        ("gpt-5-pro", ["gpt 5 pro inp dzone Tokens", "gpt 5 pro out glbl Tokens"]),
        ("gpt-5-mini", ["GPT 5 mini ccchd Inp Glbl 1M Tokens", "GPT 5 mini outpt Glbl 1M Tokens"]),
        ("text-embedding-3-small", ["text-embedding-3-small-datazone Tokens", "text-embedding-3-small-glbl Tokens"]),
        ("text-embedding-ada-002", ["embedding-ada-glbl Tokens", "Embedding-Ada-regnl Tokens"]),
    ],
)
def test_azures_shorter_words_name_no_other_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], base_model: str, meters: list[str]
) -> None:
    ledger(tmp_path, receipt(1, 1, attempt(Target("azure-eu", "mine", "mine"), "2", 2000)))
    others = ("gpt-5", "gpt-5.1", "text-embedding-3-large")
    targets(tmp_path, f"mine: {{targets: [{{provider: azure-eu, model: mine, base_model: {base_model}}}]}}")
    for number, other in enumerate(others):
        targets(tmp_path, f"o{number}: {{targets: [{{provider: azure-eu, model: o{number}, base_model: {other}}}]}}")
    bill = table(
        tmp_path / "bill.csv", [azure(1, meter, "1", MeterSubCategory="Azure OpenAI GPT5") for meter in meters]
    )
    code, found = reconcile(tmp_path, capsys, "--azure", bill)
    assert (code, drifts(found), found["unmatched"]) == (0, {base_model: ("0", "0")}, [])


def test_models_of_aws_whose_ids_are_made_of_other_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    titan, opus = "amazon.titan-embed-text-v2:0", "us.anthropic.claude-opus-4-6-v1"
    called = [Target("bedrock-us", model, "m") for model in (titan, opus)]
    ledger(tmp_path, *(receipt(number, 1, attempt(target, "1", 1000)) for number, target in enumerate(called)))
    names = (titan, opus, "amazon.titan-embed-text-v1", "us.anthropic.claude-opus-4-5-20251101-v1:0")
    for number, name in enumerate(names):
        targets(tmp_path, f'm{number}: {{targets: [{{provider: bedrock-us, model: "{name}"}}]}}')
    product = json.dumps({"product_name": "Claude Opus 4.6 (Amazon Bedrock Edition)"})
    lines = [
        aws(1, "USE1-TitanEmbeddingV2-Text-input-tokens", "1"),
        aws(1, "USE1-MP:USE1_InputTokenCount-Units", "1", line_item_product_code="x1", product=product),
    ]
    code, found = reconcile(tmp_path, capsys, "--aws", table(tmp_path / "bill.csv", lines))
    assert (code, found["unmatched"]) == (0, [])
    assert drifts(found) == {titan: ("0", "0"), opus.removeprefix("us."): ("0", "0")}


# --- OpenAI ------------------------------------------------------------------------------------


Result = tuple[str | None, float | None, float | None, str | None]
"""A line item, dollars, a quantity and its unit."""


def pages(path: Path, *results: list[Result], more: str = "") -> Path:
    """A file with a page for each day; `more`: which of them say that there are others behind them."""
    documents = []
    for number, told in enumerate(results):
        rows = [
            {
                "object": "organization.costs.result", "amount": {"value": usd, "currency": "usd"}, "line_item": item,
                "project_id": None, "quantity": quantity, "quantity_unit": unit,
            }
            for item, usd, quantity, unit in told
        ]  # fmt: skip
        start = NOVEMBER + number * DAY
        bucket = {"object": "bucket", "start_time": start, "end_time": start + DAY, "results": rows}
        on = more == "all" or (more == "first" and number == 0)
        documents.append({"object": "page", "data": [bucket], "has_more": on, "next_page": "page_2" if on else None})
    path.write_text("\n".join(map(json.dumps, documents)))
    return path


def called(folder: Path, *models: str) -> None:
    those = [Target("openai", model, "openai/*") for model in models]
    ledger(folder, *(receipt(number, 1, attempt(target, "1", 1000)) for number, target in enumerate(those)))


@pytest.mark.parametrize("by", ["cost", "tokens"])
def test_line_items_have_tiers_kinds_and_long_context(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], by: str
) -> None:
    called(tmp_path, "gpt-image-1", "gpt-5.6-terra", "gpt-5.6-sol")
    items = {
        "gpt-image-1 image, output": 900, "gpt-image-1 text, input": 100, "gpt-5.6-terra, input": 300,
        "gpt-5.6-terra, cache writes": 400, "gpt-5.6-terra, output": 300, "priority | gpt-5.6-sol, input": 500,
        "Flex | gpt-5.6-sol, output, long context": 500,
    }  # fmt: skip
    bill = pages(tmp_path / "costs.json", [(item, many / 1000, many, "tokens") for item, many in items.items()])
    code, found = reconcile(tmp_path, capsys, "--openai", bill, "--by", by)
    assert (code, found["unmatched"]) == (0, [])
    assert {each["model"]: each["bill_tokens"] for each in found["models"]} == dict.fromkeys(
        ("gpt-image-1", "gpt-5.6-terra", "gpt-5.6-sol"), "1000"
    )


def test_what_stands_before_a_model_and_is_no_tier_is_not_guessed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    called(tmp_path, "gpt-4o")
    bill = pages(tmp_path / "costs.json", [("gpt-4o, input", 1, 1000, "tokens"), ("training | gpt-4o, x", 5, 1, None)])
    code, found = reconcile(tmp_path, capsys, "--openai", bill)
    assert (code, drifts(found)["gpt-4o"]) == (1, ("0", "0"))
    assert [each["meter"] for each in found["unmatched"]] == ["training | gpt-4o, x"]


@pytest.mark.parametrize(
    ("item", "quantity", "unit", "tokens"),
    [
        ("gpt-4o, input_tokens", 1000, "tokens", "1000"),
        ("gpt-4o, input", 1, "1000_tokens", "1000"),
        ("gpt-4o, input", 1000, None, "1000"),
        ("gpt-4o, cache writes, long context", 1000, None, "1000"),
        ("gpt-4o, input", 1000, "images", None),
        ("gpt-4o, output", 1000, "characters", None),
        ("gpt-4o, output", 1000, "duration_seconds", None),
        ("gpt-4o, images", 1000, None, None),
    ],
)
def test_a_quantity_counts_as_tokens_when_its_unit_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], item: str, quantity: float, unit: str | None, tokens: str | None
) -> None:
    called(tmp_path, "gpt-4o")
    bill = pages(tmp_path / "costs.json", [(item, 1, quantity, unit)])
    code, found = reconcile(tmp_path, capsys, "--openai", bill, "--by", "tokens")
    assert (code, found["total"]["bill_tokens"]) == (int(tokens is None), tokens)
    line = {"start_time": NOVEMBER, "amount_value": "1", "line_item": item, "quantity": quantity}
    bill = table(tmp_path / "costs.csv", [{**line, "quantity_unit": unit or ""}])
    assert reconcile(tmp_path, capsys, "--openai", bill, "--by", "tokens")[1]["total"]["bill_tokens"] == tokens


def test_days_without_costs_and_costs_without_an_amount_are_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    called(tmp_path, "gpt-4o", "gpt-4o")
    line = {"start_time": NOVEMBER, "amount_value": "2.0000000000000000", "amount_currency": "usd",
            "line_item": "gpt-4o, input", "organization_name": "Personal"}  # fmt: skip
    nothing = {**dict.fromkeys(line, ""), "start_time": str(NOVEMBER + DAY)}
    code, found = reconcile(tmp_path, capsys, "--openai", table(tmp_path / "costs.csv", [line, nothing]))
    assert (code, found["total"]["bill_usd"], found["unmatched"]) == (0, "2", [])
    bill = pages(
        tmp_path / "costs.json",
        [("gpt-4o, input", 2, None, None), ("gpt-4o, output", None, None, None), (None, None, None, None)],
    )
    code, found = reconcile(tmp_path, capsys, "--openai", bill)
    assert (code, found["total"]["bill_usd"], found["unmatched"]) == (0, "2", [])
    # Something that has a name and no amount is no day without costs.
    bill = table(tmp_path / "costs.csv", [line, {**line, "amount_value": ""}])
    assert reconcile(tmp_path, capsys, "--openai", bill)[0] == 2


@pytest.mark.parametrize(("more", "warned"), [("", False), ("first", False), ("all", True)])
def test_costs_that_go_on_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str], more: str, warned: bool) -> None:
    called(tmp_path, "gpt-4o", "gpt-4o")
    day: list[Result] = [("gpt-4o, input", 1, 1000, "tokens")]
    bill = pages(tmp_path / "costs.json", day, day, more=more)
    assert main(["reconcile", "-c", str(tmp_path / "qlens.yaml"), "--openai", str(bill)]) == 0
    assert ("`has_more` is true on each of these pages" in capsys.readouterr().err) is warned


# --- months ------------------------------------------------------------------------------------


def monthly(usd: str) -> dict[str, str]:
    times = {"line_item_usage_start_date": "2026-11-01T00:00:00.000Z"}
    return aws(1, "USE1-Nova2.0Lite-input-tokens", usd, "3", **times, line_item_usage_end_date="2026-12-01T00:00:00Z")


def test_an_export_by_months_is_compared_with_the_month(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ledger(tmp_path, *(receipt(day, day, attempt(NOVA, "1", 1000)) for day in (1, 15, 30)))
    bill = table(tmp_path / "bill.csv", [monthly("3")])
    code, found = reconcile(tmp_path, capsys, "--aws", bill)
    assert (code, found["total"]["drift_usd"], found["from"], found["to"]) == (0, "0", "2026-11-01", "2026-11-30")
    assert reconcile(tmp_path, capsys, "--aws", bill, "--from", "2026-11-01", "--to", "2026-12-01")[0] == 0
    for words in (("--to", "2026-11-15"), ("--from", "2026-11-02"), ("--from", "2026-11-10", "--to", "2026-11-20")):
        code, error = reconcile(tmp_path, capsys, "--aws", bill, *words)
        assert code == 2
        assert "bill.csv:2: this is one charge for 2026-11-01 to 2026-11-30, and only a part of that" in error
    code, error = reconcile(tmp_path, capsys, "--aws", bill, "--from", "2026-12-01")
    assert (code, "in these days (1 other rows)" in error) == (2, True)


def test_a_day_ends_where_the_next_one_begins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ledger(tmp_path, *(receipt(day, day, attempt(NOVA, "1", 1000)) for day in (1, 2)))
    hour = {"line_item_usage_start_date": "2026-11-01T23:00:00Z", "line_item_usage_end_date": "2026-11-02T00:00:00Z"}
    bill = table(tmp_path / "bill.csv", [aws(1, "USE1-Nova2.0Lite-input-tokens", "1", **hour)])
    code, found = reconcile(tmp_path, capsys, "--aws", bill, "--to", "2026-11-01")
    assert (code, found["to"], found["total"]["ledger_usd"]) == (0, "2026-11-01", "1")
    assert reconcile(tmp_path, capsys, "--aws", bill)[1]["to"] == "2026-11-01"


# --- what clients write ------------------------------------------------------------------------

FORGED = "x\x1b[2K\x1b[1Gtotal\x07\n2026-11-01  gpt-4o  0  0\u202e\u2028"


@pytest.mark.parametrize("command", ["reconcile", "usage"])
def test_names_that_clients_choose_write_no_lines_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    ledger(tmp_path, receipt(1, 1, attempt(Target("openai", FORGED, FORGED), "1", 1000)))
    lines = [{"start_time": NOVEMBER, "amount_value": "1", "line_item": f"{FORGED}, input"}]
    words: dict[str, list[Any]] = {"reconcile": ["--openai", table(tmp_path / "costs.csv", lines)], "usage": []}
    main([command, "-c", str(tmp_path / "qlens.yaml"), *map(str, words[command])])
    text = capsys.readouterr().out
    assert not [sign for sign in text if not sign.isprintable() and sign != "\n"]
    assert "x\\x1b[2K\\x1b[1Gtotal\\x07\\n2026-11-01  gpt-4o  0  0\\u202e\\u2028" in text
