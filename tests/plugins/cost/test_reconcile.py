"""`qlens reconcile`: the ledger beside Azure's, AWS' and OpenAI's cost exports, to the last digit."""

from __future__ import annotations

import gzip
import json
from decimal import Decimal
from pathlib import Path

import pytest
from exports import (
    GPT,
    MINI,
    NOVA,
    NOVEMBER,
    OPENAI,
    SONNET,
    attempt,
    aws,
    azure,
    costs,
    drifts,
    ledger,
    receipt,
    reconcile,
    table,
)
from hypothesis import given
from hypothesis import strategies as st
from ledgers import Place

from qlens import Target
from qlens.cli import main
from qlens_plugins.cost.ledger.reconcile_compare import Drift
from qlens_plugins.cost.ledger.reconcile_names import Meter, Name, aws_name, azure_name, model_names, openai_name

# --- files -------------------------------------------------------------------------------------


def test_azures_actual_cost_is_compared_by_model_and_day(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ledger(
        tmp_path,
        receipt(1, 3, attempt(GPT, "0.0025", 1000)),
        receipt(2, 3, attempt(GPT, "0.0025", 1000)),
        receipt(3, 4, attempt(MINI, "0.00015", 1000)),
        receipt(4, 4, attempt(NOVA, "9", 1000)),  # another provider's
        receipt(5, 9, attempt(GPT, "9", 1000)),  # a day that the bill does not have
    )
    bill = table(
        tmp_path / "bill.csv",
        [
            azure(3, "gpt 4o 1120 Inp glbl Tokens", "0.004999999999999999999", "2"),
            azure(3, "gpt 4o 1120 Outp glbl Tokens", "1E-21", "0"),
            azure(4, "gpt 4o mini 0718 cached Inp glbl Tokens", "0.00015"),
            azure(4, "Standard Load Balancer", "77", MeterCategory="Load Balancer", MeterSubCategory=""),
        ],
    )
    code, found = reconcile(tmp_path, capsys, "--azure", bill)
    assert code == 0
    assert drifts(found) == {"gpt-4o-2024-11-20": ("0", "0"), "gpt-4o-mini": ("0", "0")}
    assert [each["deployments"] for each in found["models"]] == [["azure-eu/our-gpt"], ["azure-eu/small"]]
    assert [(each["day"], each["model"], each["calls"], each["bill_usd"]) for each in found["days"]] == [
        ("2026-11-03", "gpt-4o-2024-11-20", 2, "0.005"),
        ("2026-11-04", "gpt-4o-mini", 1, "0.00015"),
    ]
    assert (found["total"]["ledger_tokens"], found["total"]["bill_tokens"]) == (3000, "3000")
    assert (found["other_rows"], found["unmatched"], found["from"], found["to"]) == (1, [], "2026-11-03", "2026-11-04")


def test_aws_parts_in_gzip_marketplace_and_what_is_not_usage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger(tmp_path, receipt(1, 1, attempt(NOVA, "0.3", 1000)), receipt(2, 2, attempt(SONNET, "3.3", 10**6)))
    name = "Claude Sonnet 4.5 (Amazon Bedrock Edition)"
    first = table(tmp_path / "1.csv.gz", [aws(1, "USE1-Nova2.0Lite-input-tokens", "0.3")], packed=True)
    old = table(
        tmp_path / "2.csv",
        [
            {
                "lineItem/UsageStartDate": "2026-11-02T23:00:00Z", "lineItem/UsageType": usage_type,
                "lineItem/UnblendedCost": usd, "lineItem/LineItemType": kind, "lineItem/CurrencyCode": "USD",
                "lineItem/ProductCode": code, "product/ProductName": product, "lineItem/UsageAmount": "1",
                "pricing/unit": "1M tokens",
            }
            for usage_type, usd, kind, code, product in (
                ("USE1-MP:USE1_InputTokenCount-Units", "3.3000000000", "Usage", "8bzxtgg", name),
                ("USE1-MP:USE1_InputTokenCount-Units", "0.27", "Tax", "8bzxtgg", name),
                ("USE1-BoxUsage:t3.medium", "4", "Usage", "AmazonEC2", "Amazon EC2"),
            )
        ],
    )  # fmt: skip
    code, found = reconcile(tmp_path, capsys, "--aws", first, old)
    assert (code, drifts(found)) == (
        0,
        {"amazon.nova-2-lite-v1:0": ("0", "0"), "anthropic.claude-sonnet-4-5-20250929-v1:0": ("0", "0")},
    )
    assert (found["other_charges_usd"], found["other_rows"]) == ({"Tax": "0.27"}, 1)
    assert [each["bill_tokens"] for each in found["models"]] == ["1000", "1000000"]
    product = json.dumps({"product_name": name, "product_region": "us-east-1"})
    newer = table(tmp_path / "3.csv", [aws(2, "MP:USE1_x-Units", "3.3", line_item_product_code="8b", product=product)])
    assert reconcile(tmp_path, capsys, "--aws", first, newer)[0] == 0


def test_openais_costs_as_pages_of_json_and_as_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ledger(tmp_path, receipt(1, 1, attempt(OPENAI, "0.3", 10)), receipt(2, 2, attempt(OPENAI, "0.12345678", 10)))
    item = "gpt-4o-mini-2024-07-18"
    pages = tmp_path / "pages.json"
    # 0.1 + 0.2 is 0.3 here, and not 0.30000000000000004.
    first = costs((1, [(f"{item}, input", "0.1"), (f"{item}, output", "0.2")]))
    pages.write_text(f"{first}\n{costs((2, [(f'{item}, cached input', '1.2345678e-1')]))}\n")
    code, found = reconcile(tmp_path, capsys, "--openai", pages)
    assert (code, found["total"]["drift_usd"], found["total"]["bill_tokens"]) == (0, "0", None)
    lines = [
        {"start_time": NOVEMBER, "amount_value": "0.3", "amount_currency": "usd", "line_item": f"{item}, input",
         "project_id": "p", "quantity": "10"},
        {"start_time": NOVEMBER + 86_400, "amount_value": "0.12345678", "amount_currency": "usd",
         "line_item": f"{item}, output", "project_id": "p", "quantity": "10.000"},
    ]  # fmt: skip
    code, found = reconcile(tmp_path, capsys, "--openai", table(tmp_path / "costs.csv", lines))
    assert (code, found["total"]["drift_usd"], found["total"]["bill_tokens"]) == (0, "0", "20")


def test_focus_of_both_clouds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ledger(tmp_path, receipt(1, 1, attempt(MINI, "1.5", 1000)), receipt(2, 1, attempt(NOVA, "0.3", 1000)))
    common = {"ChargePeriodStart": "2026-11-01T00:00:00Z", "BillingCurrency": "EUR", "ChargeCategory": "Usage",
              "ConsumedUnit": "1K tokens", "ConsumedQuantity": "1", "ResourceId": "x"}  # fmt: skip
    microsoft = {**common, "BilledCost": "1.29", "x_BilledCostInUsd": "1.5", "ServiceName": "Foundry Models",
                 "x_SkuMeterName": "gpt-4o-mini Outp glbl Tokens"}  # fmt: skip
    amazon = {**common, "BillingCurrency": "USD", "BilledCost": "0.3", "ServiceName": "Amazon Bedrock",
              "x_UsageType": "USE1-Nova2.0Lite-output-tokens-flex"}  # fmt: skip
    for kind, line in (("azure", microsoft), ("aws", amazon)):
        code, found = reconcile(tmp_path, capsys, f"--{kind}", table(tmp_path / f"{kind}.csv", [line]))
        assert (code, found["total"]["drift_usd"], found["total"]["bill_tokens"]) == (0, "0", "1000"), kind


# --- drift -------------------------------------------------------------------------------------


def test_drift_above_the_threshold_is_exit_code_1_and_not_on_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger(tmp_path, receipt(1, 1, attempt(GPT, "199", 1000)), receipt(2, 1, attempt(MINI, None, 1000)))
    bill = table(tmp_path / "bill.csv", [azure(1, "gpt 4o 1120 Inp glbl Tokens", "200")])
    code, found = reconcile(tmp_path, capsys, "--azure", bill)
    assert (code, drifts(found)["gpt-4o-2024-11-20"]) == (0, ("1", "0.5"))
    assert next(each for each in found["models"] if each["model"] == "gpt-4o-mini")["unpriced_calls"] == 1
    assert reconcile(tmp_path, capsys, "--azure", bill, "--threshold", "0.4999999999999")[0] == 1
    assert main(["reconcile", "-c", str(tmp_path / "qlens.yaml"), "--azure", str(bill), "--threshold", "0.4"]) == 1
    text = capsys.readouterr().out
    assert "azure-eu/our-gpt  1      0         199         200" in text
    assert text.count("DRIFTS") == 2


def test_one_model_that_drifts_is_not_hidden_by_the_sum(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ledger(tmp_path, receipt(1, 1, attempt(GPT, "10", 1)), receipt(2, 1, attempt(MINI, "20", 1)))
    lines = [azure(1, "gpt 4o 1120 Inp glbl Tokens", "20"), azure(1, "gpt 4o mini Inp glbl Tokens", "10")]
    code, found = reconcile(tmp_path, capsys, "--azure", table(tmp_path / "bill.csv", lines))
    assert (code, found["total"]["drift_usd"]) == (1, "0")


def test_every_attempt_is_with_the_provider_that_is_owed(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = receipt(1, 1, attempt(GPT, "1.5", 900), attempt(NOVA, "0.5", 1000, n=2))
    ledger(tmp_path, both, receipt(2, 1, attempt(GPT, "0.5", 100)), place=place)
    bill = table(tmp_path / "azure.csv", [azure(1, "gpt 4o 1120 Inp glbl Tokens", "2")])
    other = table(tmp_path / "aws.csv", [aws(1, "USE1-Nova2.0Lite-input-tokens", "0.5")])
    assert reconcile(tmp_path, capsys, "--azure", bill, "--threshold", "0")[0] == 0
    assert reconcile(tmp_path, capsys, "--aws", other, "--threshold", "0")[0] == 0
    code, found = reconcile(tmp_path, capsys, "--azure", bill, "--provider", "bedrock-us")
    assert (code, found["total"]["ledger_usd"], found["total"]["ledger_tokens"]) == (1, "0.5", 1000)


def test_what_fits_no_model_or_several_is_shown_and_can_be_mapped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    older = Target("azure-eu", "gpt-4o-2024-08-06", "older")
    ledger(tmp_path, receipt(1, 1, attempt(GPT, "2", 1000)), receipt(2, 1, attempt(older, "3", 1000)))
    lines = [
        azure(1, "gpt 4o 1120 Inp glbl Tokens", "2"),
        azure(1, "gpt 4o Inp glbl Tokens", "3"),
        azure(1, "gpt 4o aud 1217 Inp glbl Tokens", "4"),
        azure(1, "Provisioned Managed Global Unit", "5", ResourceId="/accounts/batch", UnitOfMeasure="1 Hour"),
    ]
    bill = table(tmp_path / "bill.csv", lines)
    code, found = reconcile(tmp_path, capsys, "--azure", bill)
    assert code == 1
    assert [(each["meter"], each["bill_usd"], each["may_be"]) for each in found["unmatched"]] == [
        ("Provisioned Managed Global Unit", "5", []),
        ("gpt 4o aud 1217 Inp glbl Tokens", "4", []),
        ("gpt 4o Inp glbl Tokens", "3", ["gpt-4o-2024-11-20", "gpt-4o-2024-08-06"]),
    ]
    assert found["total"]["bill_usd"] == "14"  # what is not understood is not out of sight
    rules = tmp_path / "meters.yaml"
    rules.write_text(
        "meters:\n- {meter: 'GPT 4o inp*', model: gpt-4o-2024-08-06}\n- {meter: '* aud *', ignore: true}\n"
        "- {meter: 'provisioned*', resource: '*/batch', ignore: true}\n"
    )
    code, found = reconcile(tmp_path, capsys, "--azure", bill, "--map", rules, "--threshold", "0")
    assert (code, found["unmatched"], found["ignored"]["bill_usd"]) == (0, [], "9")
    rules.write_text("meters: [{meter: x}, {meter: y, model: z, ignore: true}]")
    code, error = reconcile(tmp_path, capsys, "--azure", bill, "--map", rules)
    assert code == 2
    assert "the meter 'x' the `model` it is for or the `provider` it is from, or else `ignore: true`" in error


def test_tokens_alone_are_compared_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ledger(tmp_path, receipt(1, 1, attempt(GPT, "2", 1990)))
    bill = table(tmp_path / "bill.csv", [azure(1, "gpt 4o 1120 Inp glbl Tokens", "1.7", "2", BillingCurrency="EUR")])
    code, error = reconcile(tmp_path, capsys, "--azure", bill)
    assert code == 2
    assert "bill.csv:2: this bill is in EUR, and the ledger in USD" in error
    code, found = reconcile(tmp_path, capsys, "--azure", bill, "--by", "tokens")
    assert (code, found["total"]["drift_tokens"], found["total"]["drift_percent"]) == (0, "10", "0.5")
    assert reconcile(tmp_path, capsys, "--azure", bill, "--by", "tokens", "--threshold", "0.4")[0] == 1


# --- what is wrong with a file -----------------------------------------------------------------

_HEAD = "Date,MeterCategory,MeterSubCategory,MeterName,CostInBillingCurrency,BillingCurrency\n"
_ROW = "11/01/2026,Azure OpenAI,,gpt 4o 1120 Inp glbl Tokens,{},USD\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "bill:1: these are no columns of an export for --azure; known: FOCUS (chargeperiodstart"),
        (b"a,b\n1,2\n", "bill:1: these are no columns"),
        (b"PAR1....", "bill: this is Parquet; let the export write CSV"),
        (b"PK\x03\x04....", "bill: this is a ZIP archive; unpack it"),
        (gzip.compress(_HEAD.encode(), mtime=0)[:-9], "bill: the archive is damaged"),
        ((_HEAD + _ROW.format("1,5")).encode(), "bill:2: this bill is in 5"),
        ((_HEAD + _ROW.format("x")).encode(), "bill:2: costinbillingcurrency: 'x' is no number"),
        ((_HEAD + _ROW.format("NaN")).encode(), "'NaN' is no amount"),
        ((_HEAD + _ROW.format("1e999999999")).encode(), "'1e999999999' is no amount"),
        ((_HEAD + _ROW.format("1").replace("11/01", "13/01")).encode(), "bill:2: '13/01/2026' is no day"),
        ((_HEAD + _ROW.format("1").replace("2026", "26")).encode(), "bill:2: '11/01/26' is no day"),
        ((_HEAD + _ROW.format("1").replace("11/", "١١/")).encode(), "bill:2: '١١/01/2026' is no day"),
        ((_HEAD + _ROW.format("1_000")).encode(), "bill:2: costinbillingcurrency: '1_000' is no number"),
        ((_HEAD + _ROW.format("１")).encode(), "bill:2: costinbillingcurrency: '１' is no number"),
        ((_HEAD + _ROW.format("1") + "11/01/2026").encode(), "bill:3: the row ends before its columns do"),
        ((_HEAD + _ROW.format("")).encode(), "bill:2: costinbillingcurrency: '' is no number"),
        ((_HEAD + "11/01/2026,Azure OpenAI\n").encode(), "bill:2: the row ends before its columns do"),
        ((_HEAD + "11/01/2026,Storage,,Hot LRS,1,EUR\n").encode(), "nothing in the files is a charge"),
    ],
)
def test_a_faulty_file_is_refused_with_its_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, said: str
) -> None:
    ledger(tmp_path)
    (tmp_path / "bill").write_bytes(content)
    code, error = reconcile(tmp_path, capsys, "--azure", tmp_path / "bill")
    assert code == 2
    assert said in error


@pytest.mark.parametrize(
    "content", ["{", "[1]", '{"data": [{"results": [{}]}]}', '{"error": {"message": "no"}}', "[" * 10**5]
)
def test_json_that_is_no_page_of_costs_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    ledger(tmp_path)
    (tmp_path / "costs.json").write_text(content)
    code, error = reconcile(tmp_path, capsys, "--openai", tmp_path / "costs.json")
    assert code == 2
    assert "costs.json:1: this is no" in error


def test_a_file_that_is_not_there_and_a_time_without_charges(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger(tmp_path)
    assert "no.csv: No such file" in reconcile(tmp_path, capsys, "--azure", tmp_path / "no.csv")[1]
    bill = table(tmp_path / "bill.csv", [azure(1, "gpt 4o 1120 Inp glbl Tokens", "2")])
    code, error = reconcile(tmp_path, capsys, "--azure", bill, "--from", "2026-11-02")
    assert (code, "in these days (1 other rows)" in error) == (2, True)


# --- names and numbers -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "model"),
    [
        (azure_name(Meter("gpt 4o 1120 cached Inp glbl Tokens")), "gpt-4o-2024-11-20"),
        (azure_name(Meter("gpt-4o-mini-0718-Outp-regnl Tokens")), "gpt-4o-mini"),
        (azure_name(Meter("o4-mini 0416 Inp glbl Tokens")), "o4-mini-2025-04-16"),
        (azure_name(Meter("gpt 4.1 nano cached Inp glbl Tokens")), "gpt-4.1-nano"),
        (azure_name(Meter("GPT 5 outpt Glbl 1M Tokens")), "gpt-5"),
        (azure_name(Meter("5.4 opt Dz 1M Tokens", "Azure OpenAI GPT5")), "gpt-5.4"),
        (azure_name(Meter("gpt-oss-120B Inp glbl Tokens")), "gpt-oss-120b"),
        (aws_name(Meter("USE1-NovaLite-input-tokens")), "eu.amazon.nova-lite-v1:0"),
        (aws_name(Meter("EUC1-Nova2.0Lite-cache-read-input-token-count")), "global.amazon.nova-2-lite-v1:0"),
        (aws_name(Meter("USE1-Claude4.6Sonnet-output-tokens-flex")), "us.anthropic.claude-sonnet-4-6"),
        (aws_name(Meter("USE1-Claude3Haiku-input-tokens")), "anthropic.claude-3-haiku-20240307-v1:0"),
        (aws_name(Meter("USE1-openai.gpt-oss-120b-mantle-input-tokens-standard")), "openai.gpt-oss-120b-1:0"),
        (aws_name(Meter("USE1-Llama3-3-70B-input-tokens")), "us.meta.llama3-3-70b-instruct-v1:0"),
        (aws_name(Meter("MP:x-Units", "Claude Haiku 4.5 (Amazon Bedrock Edition)")),
         "arn:aws:bedrock:us-east-1:1:inference-profile/us.anthropic.claude-haiku-4-5-20251001-v1:0"),
        (openai_name(Meter("gpt-4o-2024-08-06, cached input")), "gpt-4o"),
        (openai_name(Meter("ft-gpt-4o-2024-08-06, output")), "ft:gpt-4o-2024-08-06:acme::x1"),
    ],
)  # fmt: skip
def test_a_meter_is_about_its_model_and_about_no_other(found: Name | None, model: str) -> None:
    assert found is not None
    assert any(found.fits(name) for name in model_names(model))
    others = {
        "gpt-4o", "gpt-4o-mini", "gpt-4o-2024-05-13", "gpt-4.1-mini", "gpt-5-mini", "o4", "gpt-4o-audio-preview",
        "amazon.nova-pro-v1:0", "anthropic.claude-opus-4-6", "anthropic.claude-3-5-haiku-20241022-v1:0",
    } - {model}  # fmt: skip
    if model != "gpt-4o-2024-11-20":
        assert not [other for other in others if any(found.fits(name) for name in model_names(other))]


@pytest.mark.parametrize("meter", ["USE1-NovaCanvas-T2I-1024-Premium", "USE1-Guardrail-ContentPolicyUnitsConsumed"])
def test_a_meter_without_tokens_names_no_model(meter: str) -> None:
    assert aws_name(Meter(meter)) is None
    assert openai_name(Meter("web search tool call")) is None


@given(
    amount=st.decimals(-(10**9), 10**9, places=12, allow_nan=False),
    of=st.decimals(0, 10**9, places=12, allow_nan=False),
    percent=st.decimals(0, 100, places=4, allow_nan=False),
)
def test_the_threshold_is_judged_by_exact_numbers(amount: Decimal, of: Decimal, percent: Decimal) -> None:
    picos, whole = int(amount.scaleb(12)), int(of.scaleb(12))
    assert Drift(amount, of).above(percent) == (abs(picos) * 100 * 10**4 > int(percent.scaleb(4)) * whole)
