"""What passes through to Bedrock as it is: for clients of AWS's own SDK, signed anew, and metered by the answer."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest
from aiobotocore.config import AioConfig
from aiobotocore.session import get_session
from bedrocks import CLAUDE, NOVA, config
from botocore.exceptions import ClientError, EventStreamError
from keepers import ACME, keys

from qlens import StartupError
from qlens.testing import Running, Scripted, running
from qlens.testing.aws import ROLE, aws
from qlens.testing.aws_signature import Identity
from qlens.testing.bedrock import KEY, TEXT, USAGE, FakeBedrock, answer, bedrock, failure, stream, streamed, whole
from qlens.testing.frames import event, exception

LISTED = [
    *("POST /model/*/converse", "POST /model/*/converse-stream", "POST /model/*/invoke"),
    *("POST /model/*/invoke-with-response-stream", "POST /guardrail/*/version/*/apply"),
]
HELLO: Any = [{"role": "user", "content": [{"text": "Hello"}]}]
NATIVE = {
    "anthropic_version": "bedrock-2023-05-31",
    "max_tokens": 5,
    "messages": [{"role": "user", "content": "Hello"}],
}
OURS = "sk-example-client"
PRICED = {"cost": [{"plugin": "prices"}]}
CONVERSE = f"/v1/providers/aws/model/{CLAUDE}/converse"


@pytest.fixture
async def fake() -> AsyncIterator[FakeBedrock]:
    async with bedrock() as fake:
        yield fake


@pytest.fixture
async def gateway(fake: FakeBedrock, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Running]:
    monkeypatch.setenv("AWS_BEARER_TOKEN_BEDROCK", OURS)
    async with running(config(fake.root, passthrough=LISTED, pipeline=PRICED)) as gateway:
        yield gateway


@asynccontextmanager
async def sdk(gateway: Running) -> AsyncIterator[Any]:
    """AWS's own SDK, which takes the gateway for Bedrock and the gateway's key for one of Bedrock's."""
    settings = AioConfig(retries={"total_max_attempts": 1})
    address = f"{gateway.url}/v1/providers/aws"
    async with get_session().create_client(
        "bedrock-runtime", region_name="us-east-1", endpoint_url=address, config=settings
    ) as client:
        yield client


async def test_awss_sdk_converses_through_the_gateway(gateway: Running, fake: FakeBedrock) -> None:
    async with sdk(gateway) as client:
        told = await client.converse(modelId=CLAUDE, messages=HELLO)
    assert told["output"]["message"]["content"] == [{"text": TEXT}]
    (request,) = fake.requests
    assert request.headers["authorization"].startswith(f"AWS4-HMAC-SHA256 Credential={KEY.access_key}/")
    assert (fake.models, request.body) == ([CLAUDE], {"messages": HELLO})
    (receipt,) = await gateway.settled(1)
    assert (receipt.operation, receipt.outcome) == ("passthrough", "complete")
    assert (receipt.usage.input, receipt.usage.output, receipt.usage.source) == (9, 4, "provider")
    assert receipt.target is not None
    assert receipt.target.model == CLAUDE
    # us. is ten percent above 3 and 15 dollars a million
    assert (receipt.cost.state, receipt.cost.picos) == ("exact", 9 * 3_300_000 + 4 * 16_500_000)
    assert receipt.attempts[0].upstream_id


async def test_the_gateways_key_is_sent_as_one_of_bedrocks(fake: FakeBedrock, monkeypatch: pytest.MonkeyPatch) -> None:
    auth = {"auth": [{"plugin": "api_keys", "file": "keys.yaml"}]}
    text = config(fake.root, passthrough=LISTED, pipeline=auth)
    async with running(text, files={"keys.yaml": keys()}) as gateway:
        for key, status in ((ACME, 200), ("sk-example-unknown", 401)):
            monkeypatch.setenv("AWS_BEARER_TOKEN_BEDROCK", key)
            async with sdk(gateway) as client:
                try:
                    told = await client.converse(modelId=CLAUDE, messages=HELLO)
                except ClientError as error:
                    told = error.response
            assert told["ResponseMetadata"]["HTTPStatusCode"] == status
    assert len(fake.requests) == 1
    assert ACME not in repr(fake.requests[0].headers)


async def test_awss_sdk_streams_through_the_gateway(gateway: Running, fake: FakeBedrock) -> None:
    async with sdk(gateway) as client:
        told = await client.converse_stream(modelId=CLAUDE, messages=HELLO)
        events = [each async for each in told["stream"]]
    texts = [each["contentBlockDelta"]["delta"]["text"] for each in events if "contentBlockDelta" in each]
    assert "".join(texts) == TEXT
    assert events[-1]["metadata"]["usage"]["totalTokens"] == 13
    (receipt,) = await gateway.settled(1)
    assert (receipt.outcome, receipt.usage.total, receipt.cost.state) == ("complete", 13, "exact")


@pytest.mark.parametrize("streaming", [False, True])
async def test_awss_sdk_invokes_a_model_through_the_gateway(gateway: Running, streaming: bool) -> None:
    body = orjson.dumps(NATIVE)
    async with sdk(gateway) as client:
        if streaming:
            told = await client.invoke_model_with_response_stream(modelId=CLAUDE, body=body)
            events = [orjson.loads(each["chunk"]["bytes"]) async for each in told["body"]]
            assert events[1]["delta"]["text"] == TEXT
        else:
            told = await client.invoke_model(modelId=CLAUDE, body=body)
            assert orjson.loads(await told["body"].read())["content"][0]["text"] == TEXT
    (receipt,) = await gateway.settled(1)
    assert (receipt.usage.input, receipt.usage.output, receipt.cost.state) == (9, 4, "exact")


async def test_a_guardrail_is_asked_through_the_gateway_and_has_no_price(gateway: Running) -> None:
    async with sdk(gateway) as client:
        told = await client.apply_guardrail(
            guardrailIdentifier="gr1example",
            guardrailVersion="1",
            source="INPUT",
            content=[{"text": {"text": "Hello"}}],
        )
    assert told["action"] == "NONE"
    (receipt,) = await gateway.settled(1)
    assert (receipt.outcome, receipt.usage.total, receipt.cost.state) == ("complete", 0, "unpriced")


async def test_only_what_is_listed_passes(gateway: Running, fake: FakeBedrock) -> None:
    for path in (f"model/{CLAUDE}/count-tokens", "model/a/b/converse", "model/../converse", "async-invoke"):
        assert (await gateway.post(f"/v1/providers/aws/{path}", {"messages": HELLO})).status == 404
    assert (await gateway.get(CONVERSE)).status == 404
    answer = await gateway.post(f"{CONVERSE}?a=b", {"messages": HELLO})
    assert (answer.status, answer.json()["error"]["code"]) == (400, "unsupported_parameter")
    assert not fake.requests


async def test_without_a_list_nothing_passes(fake: FakeBedrock) -> None:
    async with running(config(fake.root)) as gateway:
        assert (await gateway.post(CONVERSE, {"messages": HELLO})).status == 404
    assert not fake.requests


@pytest.mark.parametrize(
    ("scripted", "status"),
    [
        (failure("ThrottlingException", "slow down", status=429), 429),
        (failure("AccessDeniedException", "arn:aws:iam::123456789012:user/x", status=403), 502),
        (failure("ValidationException", "too odd"), 400),
        (failure("InternalServerException", "oops", status=500), 502),
    ],
)
async def test_errors_are_mapped_and_known_to_awss_sdk(
    gateway: Running, fake: FakeBedrock, scripted: Scripted, status: int
) -> None:
    fake.script(scripted)
    async with sdk(gateway) as client:
        with pytest.raises(ClientError) as caught:
            await client.converse(modelId=CLAUDE, messages=HELLO)
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == status
    assert "123456789012" not in str(caught.value.response)


async def test_a_stream_that_fails_is_told_as_it_comes_and_is_no_success(gateway: Running, fake: FakeBedrock) -> None:
    told = streamed(answer({"text": "Hello"}))[:2]
    fake.script(stream([*told, exception("throttlingException", "slow down")], gap=0.01))
    async with sdk(gateway) as client:
        answered = await client.converse_stream(modelId=CLAUDE, messages=HELLO)
        with pytest.raises(EventStreamError, match="slow down"):
            async for _ in answered["stream"]:
                pass
        answered["stream"].close()
    (receipt,) = await gateway.settled(1)
    assert (receipt.outcome, receipt.error) == ("failed", "rate_limit_exceeded")


@pytest.mark.parametrize(
    "events",
    [
        streamed(answer({"text": "Hello"}))[:2],
        [*streamed(answer({"text": "Hello"}))[:2], b"\0" * 40],
        [event("chunk", {"bytes": "e30="})],
        [event("chunk", {"bytes": "!"})],
    ],
)
async def test_a_stream_without_its_last_event_is_no_success(
    gateway: Running, fake: FakeBedrock, events: list[bytes]
) -> None:
    fake.script(stream(events))
    with pytest.raises(Exception, match="payload"):
        await gateway.post(CONVERSE + "-stream", {"messages": HELLO})
    (receipt,) = await gateway.settled(1)
    assert (receipt.outcome, receipt.usage.total) == ("failed", 0)


async def test_who_leaves_early_is_billed_as_by_bedrock(gateway: Running, fake: FakeBedrock) -> None:
    fake.script(stream(streamed(answer({"text": "Hello"})), gap=0.1))
    async with gateway.session.post(
        f"{gateway.url}{CONVERSE}-stream", json={"messages": HELLO}, headers={"authorization": "Bearer x"}
    ) as answered:
        await answered.content.readany()
    (receipt,) = await gateway.settled(1)
    assert (receipt.outcome, receipt.usage.source) == ("abandoned", "provider")
    assert receipt.usage.total == USAGE["totalTokens"]


@pytest.mark.parametrize("said", [{}, {"usage": {"inputTokens": "9"}}, {"usage": 5}, {"serviceTier": 5}])
async def test_an_answer_that_does_not_say_what_was_used_passes_without_a_price(
    gateway: Running, fake: FakeBedrock, said: dict[str, Any]
) -> None:
    fake.script(whole({**answer(), "usage": {}, **said}))
    assert (await gateway.post(CONVERSE, {"messages": HELLO})).status == 200
    (receipt,) = await gateway.settled(1)
    assert (receipt.outcome, receipt.usage.total, receipt.cost.state) == ("complete", 0, "unpriced")


async def test_what_passes_counts_towards_a_limit_of_tokens(fake: FakeBedrock) -> None:
    limit = {"plugin": "token_bucket", "limits": [{"per": "tenant", "tokens_per_minute": 20}]}
    text = config(fake.root, NOVA, passthrough=LISTED, pipeline={"rate_limit": [limit]})
    async with running(text) as gateway:
        path = f"/v1/providers/aws/model/{NOVA}/converse"
        answers = [(await gateway.post(path, {"messages": HELLO})).status for _ in range(4)]
    assert answers[:2] == [200, 200]
    assert answers[-1] == 429


async def test_credentials_that_have_expired_are_renewed_for_what_passes_too() -> None:
    async with bedrock() as fake, aws(identities=fake.identities) as sts:
        async with running(config(fake.root, passthrough=LISTED, role_arn=ROLE, sts_endpoint=sts.root)) as gateway:
            gateway.plugin("provider", "aws")._chain._looked_at -= 60
            given = sts.issued[0]
            fake.identities.add(Identity(given.access_key, given.secret_key, given.token, expires_at=0))
            assert (await gateway.post(CONVERSE, {"messages": HELLO})).status == 200
        assert [request.body for request in fake.requests] == [{"messages": HELLO}] * 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"passthrough": ["GET /async-invoke"]}, "must list requests that POST"),
        ({"passthrough": ["model"]}, "must begin with one of"),
        ({"passthrough": LISTED, "guardrail": {"id": "gr1example"}}, "beside the guardrail"),
    ],
)
async def test_lists_that_cannot_be_kept_are_faults(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(StartupError, match=message):
        async with running(config("http://127.0.0.1:1", **settings)):
            pass
