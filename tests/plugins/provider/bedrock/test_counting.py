"""Tokens of messages are counted by Bedrock where it counts, and else estimated, which the answer says."""

from __future__ import annotations

from base64 import b64decode
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anthropic as sdk
import orjson
import pytest
from bedrocks import CLAUDE, NOVA, PNG, STATIC, config

from qlens.testing import Running, Scripted, running
from qlens.testing.bedrock import FakeBedrock, bedrock, failure
from qlens.testing.bedrock_claude import UNSUPPORTED

PATH = "/v1/messages/count_tokens"
BASE = "anthropic.claude-sonnet-4-5-20250929-v1:0"
HELLO: Any = [{"role": "user", "content": "Hello there!"}]
GOLDEN = orjson.loads(Path(__file__).with_name("golden").joinpath("counting/claude.json").read_bytes())


@pytest.fixture
async def aws() -> AsyncIterator[FakeBedrock]:
    async with bedrock() as aws:
        yield aws


@pytest.fixture
async def gateway(aws: FakeBedrock) -> AsyncIterator[Running]:
    async with running(config(aws.root)) as gateway:
        yield gateway


def client(gateway: Running) -> sdk.AsyncAnthropic:
    return sdk.AsyncAnthropic(base_url=gateway.url, api_key="sk-example-client", max_retries=0)


def invoked(aws: FakeBedrock) -> Any:
    """The body that Bedrock was asked to count."""
    asked = aws.requests[-1].body
    assert asked.keys() == {"input"}
    return orjson.loads(b64decode(asked["input"]["invokeModel"]["body"]))


async def test_claude_is_counted_by_bedrock(gateway: Running, aws: FakeBedrock) -> None:
    tool: Any = {"name": "f", "input_schema": {"type": "object"}}
    async with client(gateway) as anthropics:
        counted = await anthropics.messages.count_tokens(model="ours", messages=HELLO, system="Be kind.", tools=[tool])
    assert counted.model_dump() == {"input_tokens": 9}
    assert aws.requests[-1].path.endswith("/count-tokens")
    assert invoked(aws) == {
        "anthropic_version": "bedrock-2023-05-31",
        "max_tokens": 1,
        "messages": HELLO,
        "system": "Be kind.",
        "tools": [tool],
    }
    (receipt,) = await gateway.settled(1)
    assert (receipt.operation, receipt.outcome, receipt.usage.total) == ("count_tokens", "complete", 0)
    assert receipt.attempts[0].upstream_id


@pytest.mark.parametrize("name", GOLDEN["cases"])
async def test_golden(gateway: Running, aws: FakeBedrock, name: str) -> None:
    case = GOLDEN["cases"][name]
    aws.script(Scripted(case["status"], case.get("headers", {}), body=case["answer"]))
    answer = await gateway.post(PATH, {"model": "ours", **case["client"]})
    assert invoked(aws) == case["wire"]
    assert answer.json() == case["reply"]


APPLICATION = "arn:aws:bedrock:us-east-1:123456789012:application-inference-profile/a1b2c3"
OF_THE_SYSTEM = f"arn:aws:bedrock:us-east-1:123456789012:inference-profile/{CLAUDE}"


@pytest.mark.parametrize(
    ("model", "target"),
    [
        (CLAUDE, {}),
        (f"global.{BASE}", {}),
        (BASE, {}),
        (OF_THE_SYSTEM, {}),
        (f"arn:aws:bedrock:us-east-1::foundation-model/{BASE}", {}),
        (APPLICATION, {"base_model": CLAUDE}),
    ],
)
async def test_counted_is_for_the_model_behind_a_profile(aws: FakeBedrock, model: str, target: dict[str, str]) -> None:
    async with running(config(aws.root, model, target=target)) as gateway:
        assert (await gateway.post(PATH, {"model": "ours", "messages": HELLO})).json() == {"input_tokens": 9}
    assert aws.models == [BASE]


@pytest.mark.parametrize("model", [NOVA, "us.meta.llama3-3-70b-instruct-v1:0", "amazon.titan-embed-text-v2:0"])
async def test_other_families_are_estimated_without_being_asked(aws: FakeBedrock, model: str) -> None:
    async with running(config(aws.root, model)) as gateway, client(gateway) as anthropics:
        counted = await anthropics.messages.count_tokens(model="ours", messages=HELLO)
    assert counted.model_dump() == {"input_tokens": counted.input_tokens, "estimated": True}
    assert 3 <= counted.input_tokens < 30
    assert not aws.requests


async def test_a_claude_that_bedrock_does_not_count_for_is_estimated_and_asked_no_more(aws: FakeBedrock) -> None:
    async with running(config(aws.root, "us.anthropic.claude-opus-4-8")) as gateway, client(gateway) as anthropics:
        for _ in range(3):
            counted = await anthropics.messages.count_tokens(model="ours", messages=HELLO)
            assert counted.model_dump()["estimated"] is True
        receipts = await gateway.settled(3)
    assert [refusal.message for refusal in aws.refused] == [UNSUPPORTED]
    assert [(each.outcome, each.usage.total, each.cost.state) for each in receipts] == [("complete", 0, "exact")] * 3


@pytest.mark.parametrize(
    "refusal",
    [
        failure("ValidationException", "The provided model identifier is invalid."),
        failure("ResourceNotFoundException", "Could not resolve the foundation model", status=404),
        failure(
            "AccessDeniedException",
            "User: arn:aws:sts::123456789012:assumed-role/x is not authorized to perform: bedrock:CountTokens",
            status=403,
        ),
    ],
)
async def test_what_only_counting_lacks_is_no_error(
    gateway: Running, aws: FakeBedrock, refusal: Scripted, caplog: pytest.LogCaptureFixture
) -> None:
    aws.script(refusal)
    for _ in range(2):
        assert (await gateway.post(PATH, {"model": "ours", "messages": HELLO})).json()["estimated"] is True
    assert len(aws.requests) == 1
    assert "are estimated" in caplog.text
    assert "123456789012" not in caplog.text


async def test_of_several_targets_one_that_counts_is_asked(aws: FakeBedrock) -> None:
    async with bedrock() as other:
        settings = orjson.loads(config(aws.root, "us.anthropic.claude-opus-4-8"))
        settings["providers"]["other"] = {**settings["providers"]["aws"], "endpoint": other.root}
        settings["models"]["ours"]["targets"].append({"provider": "other", "model": CLAUDE})
        async with running(orjson.dumps(settings).decode()) as gateway:
            assert (await gateway.post(PATH, {"model": "ours", "messages": HELLO})).json() == {"input_tokens": 9}
        assert (len(aws.requests), len(other.requests)) == (1, 1)


@pytest.mark.parametrize(
    ("scripted", "status", "kind"),
    [
        (failure("ThrottlingException", "slow down", status=429), 429, "rate_limit_error"),
        (failure("ServiceUnavailableException", "busy", status=503), 503, "overloaded_error"),
        (failure("InternalServerException", "oops", status=500), 502, "api_error"),
        (failure("AccessDeniedException", "Authentication failed", status=403), 502, "api_error"),
        (failure("ValidationException", "messages.0: too odd"), 400, "invalid_request_error"),
        (Scripted(body={"tokens": 5}), 502, "api_error"),
        (Scripted(body={"inputTokens": "5"}), 502, "api_error"),
        (Scripted(body=b"<html>"), 502, "api_error"),
    ],
)
async def test_a_failure_is_not_replaced_by_a_guess(
    gateway: Running, aws: FakeBedrock, scripted: Scripted, status: int, kind: str
) -> None:
    aws.script(scripted)
    answer = await gateway.post(PATH, {"model": "ours", "messages": HELLO})
    assert (answer.status, answer.json()["error"]["type"]) == (status, kind)


async def test_a_bearer_key_counts_too(aws: FakeBedrock) -> None:
    key = {"api_key": "bedrock-api-key-example"}
    async with running(config(aws.root, credentials=key)) as gateway:
        assert (await gateway.post(PATH, {"model": "ours", "messages": HELLO})).json() == {"input_tokens": 9}


async def test_what_an_operator_adds_to_requests_is_counted(aws: FakeBedrock) -> None:
    params = {"additional_model_request_fields": {"anthropic_beta": ["context-1m-2025-08-07"]}, "max_tokens": 5}
    async with running(config(aws.root, target={"params": params}, credentials=STATIC)) as gateway:
        answer = await gateway.post(PATH, {"model": "ours", "messages": HELLO})
    assert answer.json() == {"input_tokens": 9}
    assert invoked(aws)["anthropic_beta"] == ["context-1m-2025-08-07"]
    assert invoked(aws)["max_tokens"] == 1


@pytest.mark.parametrize("model", ["anthropic.claude-3-5-haiku-20241022-v1:0", CLAUDE])
async def test_older_models_are_not_told_what_they_do_not_take(aws: FakeBedrock, model: str) -> None:
    form = {"type": "json_schema", "schema": {"type": "object", "properties": {}, "additionalProperties": False}}
    body = {
        "model": "ours",
        "messages": HELLO,
        "thinking": {"type": "enabled", "budget_tokens": 2000},
        "output_config": {"format": form, "effort": "high"},
    }
    async with running(config(aws.root, model)) as gateway:
        answer = await gateway.post(PATH, body)
    assert answer.json() == {"input_tokens": 9}
    told = invoked(aws)
    assert ({"thinking", "output_config"} & told.keys() == set()) is ("haiku" in model)
    assert told["max_tokens"] == (1 if "haiku" in model else 1025)


async def test_an_image_is_counted(gateway: Running, aws: FakeBedrock) -> None:
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}}
    body = {"model": "ours", "messages": [{"role": "user", "content": [image]}]}
    assert (await gateway.post(PATH, body)).json() == {"input_tokens": 9}
    assert invoked(aws)["messages"] == body["messages"]


async def test_endless_names_behind_a_wildcard_are_not_all_remembered(aws: FakeBedrock) -> None:
    settings = orjson.loads(config(aws.root))
    settings["models"]["claude/*"] = {"targets": [{"provider": "aws", "model": "*"}]}
    async with running(orjson.dumps(settings).decode()) as gateway:
        for number in range(300):
            body = {"model": f"claude/anthropic.claude-{number}-x", "messages": HELLO}
            assert (await gateway.post(PATH, body)).json()["estimated"] is True
        assert len(gateway.plugin("provider", "aws")._uncounted) <= 256
