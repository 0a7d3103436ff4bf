"""The fakes of AWS are as strict as AWS, and AWS's own SDK finds nothing to complain about."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import orjson
import pytest
from aiobotocore.config import AioConfig
from aiobotocore.session import AioSession
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from botocore.exceptions import ClientError, EventStreamError
from yarl import URL

from qlens.testing import frames
from qlens.testing.aws import ROLE, aws
from qlens.testing.aws_signature import Identities, Identity
from qlens.testing.bedrock import API_KEY, KEY, TEXT, FakeBedrock, answer, bedrock, failure, invalid, stream, streamed

NOVA = "amazon.nova-lite-v1:0"
CLAUDE = "us.anthropic.claude-sonnet-4-5-20250929-v1:0"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": [{"text": "Hello"}]}]}


@asynccontextmanager
async def client(root: str, service: str = "bedrock-runtime", identity: Identity = KEY) -> AsyncIterator[Any]:
    """AWS's own SDK in front of a fake."""
    made = AioSession().create_client(
        service,
        region_name="us-east-1",
        endpoint_url=root,
        aws_access_key_id=identity.access_key,
        aws_secret_access_key=identity.secret_key,
        aws_session_token=identity.token,
        config=AioConfig(retries={"total_max_attempts": 1}),
    )
    async with made as found:
        yield found


# --- AWS's own SDK -----------------------------------------------------------------------------


async def test_the_sdk_understands_an_answer() -> None:
    async with bedrock() as fake, client(fake.root) as sdk:
        got = await sdk.converse(modelId=CLAUDE, **HELLO)
        assert got["output"]["message"]["content"] == [{"text": TEXT}]
        assert got["usage"]["totalTokens"] == 13
        assert got["ResponseMetadata"]["RequestId"]
        assert (fake.models, fake.refused) == ([CLAUDE], [])


async def test_the_sdk_understands_a_stream() -> None:
    told = answer(
        {"reasoningContent": {"reasoningText": {"text": "So.", "signature": "c2ln"}}},
        {"text": "Hello there"},
        {"toolUse": {"toolUseId": "t1", "name": "get", "input": {"a": 1}}},
        stop="tool_use",
    )
    async with bedrock() as fake, client(fake.root) as sdk:
        fake.script(stream(streamed(told), split=7))
        got = await sdk.converse_stream(modelId=NOVA, **HELLO)
        events = [event async for event in got["stream"]]
        kinds = [next(iter(event)) for event in events]
        assert (kinds[0], kinds[-2:]) == ("messageStart", ["messageStop", "metadata"])
        deltas = [event["contentBlockDelta"]["delta"] for event in events if "contentBlockDelta" in event]
        assert "".join(delta.get("text", "") for delta in deltas) == "Hello there"
        assert "".join(delta["toolUse"]["input"] for delta in deltas if "toolUse" in delta) == '{"a":1}'
        assert events[-1]["metadata"]["usage"]["inputTokens"] == 9


async def test_the_sdk_understands_failures() -> None:
    async with bedrock() as fake, client(fake.root) as sdk:
        fake.script(
            failure("ThrottlingException", "slow down", status=429),
            failure("ValidationException", "no", in_header=True),
            stream([*streamed(answer())[:2], frames.exception("throttlingException", "slow down")]),
        )
        with pytest.raises(sdk.exceptions.ThrottlingException, match="slow down"):
            await sdk.converse(modelId=NOVA, **HELLO)
        with pytest.raises(ClientError) as caught:
            await sdk.converse(modelId=NOVA, **HELLO)
        assert caught.value.response["Error"]["Code"] == "ValidationException"
        got = await sdk.converse_stream(modelId=NOVA, **HELLO)
        with pytest.raises(EventStreamError, match="slow down"):
            _ = [event async for event in got["stream"]]


async def test_the_sdk_gets_vectors() -> None:
    async with bedrock() as fake, client(fake.root) as sdk:
        body = orjson.dumps({"inputText": "hello", "dimensions": 256})
        got = await sdk.invoke_model(modelId="amazon.titan-embed-text-v2:0", body=body, contentType="application/json")
        assert len(orjson.loads(await got["body"].read())["embedding"]) == 256


async def test_what_sts_gives_out_is_let_in_until_it_expires() -> None:
    identities = Identities()
    async with bedrock(identities=identities) as fake, aws(identities=identities) as sts:
        async with client(sts.root, "sts") as sdk:
            got = (await sdk.assume_role(RoleArn=ROLE, RoleSessionName="example"))["Credentials"]
        given = Identity(got["AccessKeyId"], got["SecretAccessKey"], got["SessionToken"])
        async with client(fake.root, identity=given) as sdk:
            await sdk.converse(modelId=NOVA, **HELLO)
            identities.clock = lambda: time.time() + 4000
            with pytest.raises(ClientError, match="is expired"):
                await sdk.converse(modelId=NOVA, **HELLO)


# --- who is let in -----------------------------------------------------------------------------


def _signed(fake: FakeBedrock, body: bytes, *, service: str = "bedrock", region: str = "us-east-1") -> dict[str, str]:
    request = AWSRequest("POST", f"{fake.root}/model/{NOVA.replace(':', '%3A')}/converse", data=body)
    request.headers["content-type"] = "application/json"
    SigV4Auth(Credentials(KEY.access_key, KEY.secret_key), service, region).add_auth(request)
    return dict(request.headers.items())


async def _post(fake: FakeBedrock, headers: Mapping[str, str], body: bytes, path: str | None = None) -> tuple[int, str]:
    url = URL(fake.root + (path or f"/model/{NOVA.replace(':', '%3A')}/converse"), encoded=True)
    async with aiohttp.ClientSession() as session, session.post(url, headers=headers, data=body) as got:
        return got.status, got.headers.get("x-amzn-errortype", "").partition(":")[0]


BODY = orjson.dumps(HELLO)


async def test_a_good_signature_is_let_in() -> None:
    async with bedrock() as fake:
        assert await _post(fake, _signed(fake, BODY), BODY) == (200, "")


async def test_bad_signatures_are_not() -> None:
    async with bedrock() as fake:
        good = _signed(fake, BODY)
        later = {**good, "X-Amz-Date": time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(time.time() + 60))}
        cases = [
            ({}, BODY, "MissingAuthenticationTokenException"),
            ({**good, "Authorization": "AWS4-HMAC-SHA256 x"}, BODY, "IncompleteSignatureException"),
            ({**good, "Authorization": "Bearer wrong"}, BODY, "AccessDeniedException"),
            (good, BODY + b" ", "InvalidSignatureException"),
            (later, BODY, "InvalidSignatureException"),
            ({**good, "content-type": "text/plain"}, BODY, "InvalidSignatureException"),
            (_signed(fake, BODY, service="bedrock-runtime"), BODY, "InvalidSignatureException"),
            (_signed(fake, BODY, region="eu-west-1"), BODY, "InvalidSignatureException"),
            (
                {**good, "Authorization": good["Authorization"].replace("AKIA", "AKIB")},
                BODY,
                "UnrecognizedClientException",
            ),
            ({**good, "x-amz-security-token": "x"}, BODY, "UnrecognizedClientException"),
        ]
        for headers, body, name in cases:
            assert await _post(fake, {"content-type": "application/json", **headers}, body) == (403, name)


@pytest.mark.parametrize("seconds", [-400, 400])
async def test_a_clock_that_is_wrong_is_not_let_in(seconds: float) -> None:
    async with bedrock() as fake:
        headers = _signed(fake, BODY)
        fake.identities.clock = lambda: time.time() + seconds
        assert await _post(fake, headers, BODY) == (403, "InvalidSignatureException")


async def test_an_api_key_is_let_in() -> None:
    async with bedrock() as fake:
        headers = {"authorization": f"Bearer {API_KEY}", "content-type": "application/json"}
        assert await _post(fake, headers, BODY) == (200, "")
        assert await _post(fake, headers, BODY, "/model/a/b/converse") == (404, "UnknownOperationException")
        assert await _post(fake, {**headers, "content-type": "text/plain"}, BODY) == (400, "ValidationException")
        assert await _post(fake, headers, b"{") == (400, "ValidationException")
        assert await _post(fake, headers, b"[]") == (400, "ValidationException")


async def test_who_is_refused_takes_no_scripted_answer() -> None:
    async with bedrock() as fake, client(fake.root) as sdk:
        fake.script(failure("ThrottlingException", "slow down", status=429))
        assert (await _post(fake, {}, BODY))[0] == 403
        with pytest.raises(sdk.exceptions.ThrottlingException):
            await sdk.converse(modelId=NOVA, **HELLO)


async def test_requests_at_the_same_time_are_judged_each_for_itself() -> None:
    async with bedrock() as fake:
        good = _signed(fake, BODY)
        both = [good, {"content-type": "application/json"}] * 5
        got = await asyncio.gather(*(_post(fake, headers, BODY) for headers in both))
        assert [status for status, _ in got] == [200, 403] * 5


# --- what is a good body -----------------------------------------------------------------------


def _with(**fields: Any) -> dict[str, Any]:
    return {**HELLO, **fields}


def _user(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(blocks)}


def _assistant(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": list(blocks)}


HI: dict[str, Any] = {"text": "hi"}
POINT: dict[str, Any] = {"cachePoint": {"type": "default"}}
USE = {"toolUse": {"toolUseId": "t1", "name": "f", "input": {}}}
RESULT = {"toolResult": {"toolUseId": "t1", "content": [HI]}}
SPEC = {"toolSpec": {"name": "f", "description": "f", "inputSchema": {"json": {"type": "object"}}}}
TOOLS = {"tools": [SPEC]}
DOCUMENT = {"document": {"format": "csv", "name": "x", "source": {"bytes": "YQ=="}}}
THOUGHT = {"reasoningContent": {"reasoningText": {"text": "so", "signature": "c2ln"}}}
THINKING = {"thinking": {"type": "enabled", "budget_tokens": 2000}}


def _form(schema: dict[str, Any]) -> dict[str, Any]:
    structure = {"jsonSchema": {"schema": orjson.dumps(schema).decode(), "name": "x"}}
    return {"outputConfig": {"textFormat": {"type": "json_schema", "structure": structure}}}


@pytest.mark.parametrize(
    ("model", "body", "message"),
    [
        (NOVA, {}, "start with a user message"),
        (NOVA, {"messages": [_assistant(HI), _user(HI)]}, "start with a user message"),
        (NOVA, {"messages": [_user(HI), _user(HI)]}, "alternate"),
        (NOVA, {"messages": [_user({"text": " "})]}, "is blank"),
        (NOVA, {"messages": [_user()]}, "is empty"),
        (NOVA, {"messages": [_user(HI), _assistant({"text": "x "})]}, "trailing whitespace"),
        (NOVA, {"messages": [_user({"text": "a", "image": {}})]}, "exactly one of"),
        (NOVA, {"messages": [_user({"video": 1})]}, "video"),
        (NOVA, {"messages": [{"role": "tool", "content": [HI]}]}, "must be one of"),
        (NOVA, _with(unknown=1), "extraneous key"),
        (NOVA, _with(inferenceConfig={"temperature": 1.5}), "is above 1"),
        (NOVA, _with(inferenceConfig={"maxTokens": 0}), "valid min value"),
        (NOVA, _with(inferenceConfig={"maxTokens": "5"}), "Invalid type"),
        (NOVA, _with(requestMetadata={"a": "ü"}), "pattern"),
        (NOVA, _with(system=[{"text": ""}]), "Invalid length"),
        (NOVA, {"messages": [_user({"image": {"format": "jpg", "source": {"bytes": "YQ=="}}})]}, "must be one of"),
        (NOVA, {"messages": [_user({"image": {"format": "png", "source": {"bytes": "!"}}})]}, "base64"),
        (NOVA, {"messages": [_user(HI), _assistant(USE), _user(RESULT)]}, "toolConfig field must be defined"),
        (NOVA, {"messages": [_user(HI), _assistant(USE), _user(HI)], "toolConfig": TOOLS}, "Expected toolResult"),
        (NOVA, {"messages": [_user(RESULT)], "toolConfig": TOOLS}, "Expected toolResult"),
        (NOVA, {"messages": [_user(HI), _assistant(USE), _user(HI, RESULT)], "toolConfig": TOOLS}, "come first"),
        (
            NOVA,
            {"messages": [_user(HI), _assistant(USE, HI), _user(RESULT)], "toolConfig": TOOLS},
            "in the order",
        ),
        (NOVA, _with(toolConfig={"tools": []}), "Invalid length"),
        (NOVA, _with(toolConfig={"tools": [SPEC, SPEC]}), "duplicate"),
        (NOVA, _with(toolConfig={**TOOLS, "toolChoice": {"tool": {"name": "g"}}}), "not one of the tools"),
        (NOVA, _with(toolConfig={**TOOLS, "toolChoice": {"auto": {}, "any": {}}}), "exactly one of"),
        ("meta.llama3-3-70b-instruct-v1:0", _with(toolConfig={**TOOLS, "toolChoice": {"any": {}}}), "toolChoice.any"),
        ("us.deepseek.r1-v1:0", _with(toolConfig=TOOLS), "support tool use"),
        ("amazon.titan-text-premier-v1:0", _with(system=[HI]), "support the system field"),
        ("amazon.titan-text-premier-v1:0", _with(inferenceConfig={"stopSequences": ["x"]}), "pattern"),
        (NOVA, {"messages": [_user(DOCUMENT)]}, "text block is required"),
        (NOVA, {"messages": [_user(DOCUMENT, DOCUMENT, HI)]}, "Duplicate document"),
        (NOVA, {"messages": [_user(HI, {"document": {**DOCUMENT["document"], "name": "a.b"}})]}, "invalid characters"),
        (NOVA, {"messages": [_user(POINT, HI)]}, "may not stand here"),
        (NOVA, {"messages": [_user(HI, DOCUMENT, POINT)]}, "may not stand here"),
        (CLAUDE, {"messages": [_user(HI), _assistant(THOUGHT, POINT), _user(HI)]}, "may not stand here"),
        (CLAUDE, {"messages": [_user(*[HI, POINT] * 5)]}, "maximum of 4"),
        (
            CLAUDE,
            {"messages": [_user(HI, POINT, HI, {"cachePoint": {"type": "default", "ttl": "1h"}})]},
            "must not come after",
        ),
        (NOVA, _with(toolConfig={"tools": [SPEC, POINT]}), "caching of tools"),
        ("mistral.mistral-large-3-675b-instruct", {"messages": [_user(HI, POINT)]}, "prompt caching"),
        (CLAUDE, _with(inferenceConfig={"temperature": 0.5, "topP": 0.5}), "cannot both"),
        ("us.anthropic.claude-sonnet-5", _with(inferenceConfig={"temperature": 0.5}), "not supported"),
        (CLAUDE, _with(inferenceConfig={"maxTokens": 2000}, additionalModelRequestFields=THINKING), "greater than"),
        (NOVA, _with(additionalModelRequestFields=THINKING), "not permitted"),
        (
            CLAUDE,
            _with(additionalModelRequestFields=THINKING, toolConfig={**TOOLS, "toolChoice": {"any": {}}}),
            "forces tool use",
        ),
        (CLAUDE, _with(**_form({"type": "object"})), "additionalProperties"),
        (CLAUDE, _with(**_form({"type": "string", "minLength": 1})), "unsupported keywords"),
        (CLAUDE, _with(additionalModelRequestFields={"reasoning_effort": "low"}), "not permitted"),
    ],
)
def test_a_bad_body_is_refused(model: str, body: dict[str, Any], message: str) -> None:
    found = invalid("Converse", model, orjson.dumps(body))
    assert found is not None
    assert message in found


@pytest.mark.parametrize(
    "body",
    [
        HELLO,
        {"messages": [_user(HI), _assistant(HI, USE), _user(RESULT, HI)], "toolConfig": TOOLS},
        _with(inferenceConfig={"maxTokens": 3000}, additionalModelRequestFields=THINKING),
        {"messages": [_user(HI, POINT), _assistant(HI), _user(HI)]},
        _with(
            **_form({"type": "object", "additionalProperties": False, "properties": {"pattern": {"type": "string"}}})
        ),
    ],
)
def test_a_good_body_is_taken(body: dict[str, Any]) -> None:
    assert invalid("Converse", CLAUDE, orjson.dumps(body)) is None
    assert invalid("ConverseStream", CLAUDE, orjson.dumps(body)) is None


@pytest.mark.parametrize(
    ("model", "body"),
    [
        ("amazon.titan-embed-text-v2:0", {"inputText": ["a"]}),
        ("amazon.titan-embed-text-v2:0", {"inputText": "a", "dimensions": 5}),
        ("amazon.titan-embed-text-v2:0", {"inputText": "a", "encoding_format": "base64"}),
        ("cohere.embed-english-v3", {"texts": ["a"]}),
        ("cohere.embed-english-v3", {"texts": ["a"] * 97, "input_type": "search_query"}),
        ("cohere.embed-english-v3", {"texts": ["a"], "input_type": "search_query", "output_dimension": 256}),
        ("some.other-model", {"texts": ["a"]}),
    ],
)
def test_a_bad_body_of_an_embedding_is_refused(model: str, body: dict[str, Any]) -> None:
    assert invalid("InvokeModel", model, orjson.dumps(body)) is not None
