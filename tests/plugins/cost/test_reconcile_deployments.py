"""`qlens reconcile` by deployment: what a bill tells apart is compared each for itself, and nothing is guessed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from exports import GPT, NOVA, NOVEMBER, OPENAI, attempt, aws, azure, drifts, ledger, receipt, reconcile, table

from qlens import Target
from qlens.cli import main

PROFILE = "arn:aws:bedrock:us-east-1:111122223333:application-inference-profile/a1b2c3"


def several(folder: Path, more: Mapping[str, str], *models: str) -> None:
    """More providers, and more targets of one model."""
    path = folder / "qlens.yaml"
    text = path.read_text()
    for name, settings in more.items():
        text = text.replace("models:\n", f"  {name}: {settings}\nmodels:\n")
    path.write_text(text + "".join(f"  {model}\n" for model in models))


def by_deployment(found: Any) -> dict[str, tuple[str, str, bool]]:
    (model,) = found["models"]
    return {
        ", ".join(each["deployments"]): (each["ledger_usd"], each["bill_usd"], each["drifts"])
        for each in model["by_deployment"]
    }


def in_account(name: str) -> dict[str, str]:
    return {"ResourceId": f"/subscriptions/1/providers/Microsoft.CognitiveServices/Accounts/{name}"}


def test_deployments_in_several_accounts_of_azure_are_compared_each_for_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    west, second = Target("azure-us", "west-gpt", "gpt-4o"), Target("azure-eu", "second", "gpt-4o")
    calls = [attempt(GPT, "2", 1000), attempt(second, "1", 1000), attempt(west, "5", 1000)]
    ledger(tmp_path, *(receipt(n, 1, each) for n, each in enumerate(calls)))
    more = {"azure-us": '{plugin: azure_openai, endpoint: "https://us.openai.azure.com", api_key: sk-example-us}'}
    other = "targets: [{provider: azure-us, model: west-gpt, base_model: gpt-4o-2024-11-20}]"
    mine = "targets: [{provider: azure-eu, model: second, base_model: gpt-4o-2024-11-20}]"
    several(tmp_path, more, f"west: {{{other}}}", f"second: {{{mine}}}")
    # The bill has the account and not the deployment: the two in `eu` stay together.
    lines = [
        azure(1, "gpt 4o 1120 Inp glbl Tokens", "3", **in_account("eu")),
        azure(1, "gpt 4o 1120 Inp glbl Tokens", "4", **in_account("US")),
        azure(2, "gpt 4o 1120 Outp glbl Tokens", "1", **in_account("us")),
    ]
    code, found = reconcile(tmp_path, capsys, "--azure", table(tmp_path / "bill.csv", lines))
    assert (code, drifts(found)) == (0, {"gpt-4o-2024-11-20": ("0", "0")})
    assert by_deployment(found) == {
        "azure-eu/our-gpt, azure-eu/second": ("3", "3", False),
        "azure-us/west-gpt": ("5", "5", False),
    }
    assert [(each["day"], each["deployments"], each["drift_usd"]) for each in found["days"]] == [
        ("2026-11-01", ["azure-eu/our-gpt", "azure-eu/second"], "0"),
        ("2026-11-01", ["azure-us/west-gpt"], "-1"),
        ("2026-11-02", ["azure-us/west-gpt"], "1"),
    ]
    # One account pays for another: the model's sum hides it, the deployments do not.
    lines[0]["CostInBillingCurrency"], lines[1]["CostInBillingCurrency"] = "4", "3"
    wrong = table(tmp_path / "wrong.csv", lines)
    code, found = reconcile(tmp_path, capsys, "--azure", wrong)
    assert (code, found["models"][0]["drifts"], found["drifts"]) == (1, False, True)
    assert main(["reconcile", "-c", str(tmp_path / "qlens.yaml"), "--azure", str(wrong)]) == 1
    assert capsys.readouterr().out.count("DRIFTS") == 2


def test_an_account_that_no_provider_has_keeps_deployments_together_until_it_is_mapped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    west = Target("azure-us", "west-gpt", "gpt-4o")
    ledger(tmp_path, receipt(1, 1, attempt(GPT, "2", 1000)), receipt(2, 1, attempt(west, "5", 1000)))
    more = {"azure-us": '{plugin: azure_openai, endpoint: "https://us.openai.azure.com", api_key: sk-example-us}'}
    other = "targets: [{provider: azure-us, model: west-gpt, base_model: gpt-4o-2024-11-20}]"
    several(tmp_path, more, f"west: {{{other}}}")
    lines = [
        azure(1, "gpt 4o 1120 Inp glbl Tokens", "2", **in_account("eu")),
        azure(1, "gpt 4o 1120 Inp glbl Tokens", "5", **in_account("named-otherwise")),
    ]
    bill = table(tmp_path / "bill.csv", lines)
    code, found = reconcile(tmp_path, capsys, "--azure", bill)
    assert (code, by_deployment(found)) == (0, {})
    assert [each["deployments"] for each in found["days"]] == [["azure-eu/our-gpt", "azure-us/west-gpt"]]
    rules = tmp_path / "meters.yaml"
    rules.write_text("meters: [{meter: '*', resource: '*/named-otherwise', provider: azure-us}]")
    code, found = reconcile(tmp_path, capsys, "--azure", bill, "--map", rules)
    assert (code, by_deployment(found)) == (
        0,
        {"azure-eu/our-gpt": ("2", "2", False), "azure-us/west-gpt": ("5", "5", False)},
    )
    rules.write_text("meters: [{meter: '*', provider: azure-uk}]")
    code, error = reconcile(tmp_path, capsys, "--azure", bill, "--map", rules)
    assert code == 2
    assert "the provider 'azure-uk', which is none of those that the bill is compared with" in error


def test_an_application_profile_of_aws_is_compared_for_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = Target("bedrock-us", PROFILE, "ours")
    ledger(tmp_path, receipt(1, 1, attempt(NOVA, "2", 1000)), receipt(2, 1, attempt(ours, "5", 1000)))
    several(
        tmp_path, {}, f'ours: {{targets: [{{provider: bedrock-us, model: "{PROFILE}", base_model: {NOVA.model}}}]}}'
    )
    model = "arn:aws:bedrock:us-east-1::foundation-model/amazon.nova-2-lite-v1:0"
    lines = [
        aws(1, "USE1-Nova2.0Lite-input-tokens", "1.5", line_item_resource_id=model),
        aws(1, "USE1-Nova2.0Lite-output-tokens", "0.5"),
        aws(1, "USE1-Nova2.0Lite-input-tokens", "5", line_item_resource_id=PROFILE),
    ]
    code, found = reconcile(tmp_path, capsys, "--aws", table(tmp_path / "bill.csv", lines))
    assert (code, by_deployment(found)) == (
        0,
        {f"bedrock-us/{NOVA.model}": ("2", "2", False), f"bedrock-us/{PROFILE}": ("5", "5", False)},
    )


def test_projects_of_openai_are_compared_each_for_itself_when_they_are_mapped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Target("openai-b", OPENAI.model, "openai/*")
    ledger(tmp_path, receipt(1, 1, attempt(OPENAI, "2", 1000)), receipt(2, 1, attempt(other, "5", 1000)))
    several(tmp_path, {"openai-b": "{plugin: openai, api_key: sk-example-b}"})
    head = {"start_time": NOVEMBER, "line_item": f"{OPENAI.model}, input"}
    bill = table(
        tmp_path / "costs.csv",
        [{**head, "amount_value": "2", "project_id": "proj_a"}, {**head, "amount_value": "5", "project_id": "proj_b"}],
    )
    both = ("--provider", "openai", "--provider", "openai-b")
    code, found = reconcile(tmp_path, capsys, "--openai", bill, *both)
    assert (code, by_deployment(found)) == (0, {})
    rules = tmp_path / "meters.yaml"
    entries = ["{meter: '*', resource: proj_a, provider: openai}", "{meter: '*', resource: proj_b, provider: openai-b}"]
    rules.write_text(f"meters: [{', '.join(entries)}]")
    code, found = reconcile(tmp_path, capsys, "--openai", bill, *both, "--map", rules)
    name = OPENAI.model
    assert (code, by_deployment(found)) == (
        0,
        {f"openai-b/{name}": ("5", "5", False), f"openai/{name}": ("2", "2", False)},
    )
