"""Every exception of AWS is the right error of OpenAI, before an answer and inside a stream."""

from __future__ import annotations

from typing import Any

import pytest
from bedrocks import CHAT, CLAUDE, LLAMA, chat, config, events, text

from qlens.testing import Scripted, running
from qlens.testing.bedrock import TEXT, answer, bedrock, failure, stream, streamed, whole
from qlens.testing.frames import error, event, exception

# name, AWS's status, message: the client's status, type and code
CASES: list[tuple[str, int, str, tuple[int, str, str | None]]] = [
    ("ValidationException", 400, "The text field is blank.", (400, "invalid_request_error", None)),
    ("ValidationException", 400, "Input is too long for requested model.", (400, "invalid_request_error", "overflow")),
    ("ValidationException", 400, "prompt is too long: 9 > 8", (400, "invalid_request_error", "overflow")),
    ("ValidationException", 400, "Too many input tokens. Max 5", (400, "invalid_request_error", "overflow")),
    ("ValidationException", 400, "too many tokens: 7", (400, "invalid_request_error", "overflow")),
    (
        "ValidationException",
        400,
        "expected maxLength: 50000, actual: 60000",
        (400, "invalid_request_error", "overflow"),
    ),
    (
        "ValidationException",
        400,
        "The number of prompt tokens (12) exceed model maximum (10)",
        (400, "invalid_request_error", "overflow"),
    ),
    (
        "ValidationException",
        400,
        "The provided model identifier is invalid.",
        (404, "invalid_request_error", "model_not_found"),
    ),
    (
        "ValidationException",
        400,
        "Invocation of model ID x with on-demand throughput isn\u2019t supported. Retry with an inference profile.",
        (404, "invalid_request_error", "model_not_found"),
    ),
    (
        "AccessDeniedException",
        403,
        "User: arn:aws:iam::123456789012:user/x is not authorized",
        (502, "server_error", "upstream_auth_error"),
    ),
    ("UnrecognizedClientException", 403, "The security token is invalid", (502, "server_error", "upstream_auth_error")),
    ("ExpiredTokenException", 403, "The security token is expired", (502, "server_error", "upstream_auth_error")),
    ("InvalidSignatureException", 403, "Signature expired", (502, "server_error", "upstream_auth_error")),
    ("ResourceNotFoundException", 404, "Could not resolve", (404, "invalid_request_error", "model_not_found")),
    ("ThrottlingException", 429, "Too many tokens, please wait", (429, "rate_limit_error", "rate_limit_exceeded")),
    ("ServiceQuotaExceededException", 400, "quota", (429, "insufficient_quota", "insufficient_quota")),
    ("ModelNotReadyException", 429, "not ready", (503, "server_error", "model_not_ready")),
    ("ModelTimeoutException", 408, "timeout", (504, "server_error", "upstream_timeout")),
    ("ModelErrorException", 424, "failed", (502, "server_error", "model_error")),
    ("ModelStreamErrorException", 424, "failed", (502, "server_error", "upstream_error")),
    ("InternalServerException", 500, "oops", (502, "server_error", "upstream_error")),
    ("ServiceUnavailableException", 503, "busy", (503, "server_error", "upstream_unavailable")),
    ("ConflictException", 400, "conflict", (409, "invalid_request_error", None)),
    ("SomethingNewException", 400, "new", (400, "invalid_request_error", None)),
    ("SomethingNewException", 500, "new", (502, "server_error", "upstream_error")),
]
IDS = [f"{name}-{message[:24]}" for name, _, message, _ in CASES]


def _expected(code: str | None) -> str | None:
    return "context_length_exceeded" if code == "overflow" else code


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(("name", "status", "message", "expected"), CASES, ids=IDS)
async def test_an_exception_instead_of_an_answer(
    name: str, status: int, message: str, expected: tuple[int, str, str | None], streaming: bool
) -> None:
    async with bedrock() as aws, running(config(aws.root)) as gateway:
        aws.script(failure(name, message, status=status))
        reply = await gateway.post(CHAT, chat(stream=streaming))
        told = reply.json()["error"]
        assert (reply.status, told["type"], told["code"]) == (expected[0], expected[1], _expected(expected[2]))
        assert "123456789012" not in reply.text
        (receipt,) = await gateway.settled(1)
        assert receipt.attempts[0].upstream_id


@pytest.mark.parametrize("body", [b"<html>", b"[]"])
async def test_an_answer_that_is_no_json_object_fails_with_awss_id(body: bytes) -> None:
    async with bedrock() as aws, running(config(aws.root)) as gateway:
        aws.script(Scripted(body=body))
        reply = await gateway.post(CHAT, chat())
        assert (reply.status, reply.json()["error"]["code"]) == (502, "upstream_invalid_response")
        (receipt,) = await gateway.settled(1)
        assert receipt.attempts[0].upstream_id


NONSENSE: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    (CLAUDE, CHAT, chat(), {"output": {"message": 5}}),
    (CLAUDE, CHAT, chat(), {**answer(), "stopReason": "malformed_tool_use"}),
    ("cohere.rerank-v3-5:0", "/v1/rerank", {"model": "ours", "query": "a", "documents": ["b"]}, {"results": [{}]}),
    ("cohere.rerank-v3-5:0", "/v1/rerank", {"model": "ours", "query": "a", "documents": ["b"]}, {}),
    ("amazon.nova-canvas-v1:0", "/v1/images/generations", {"model": "ours", "prompt": "a"}, {}),
    ("amazon.titan-embed-text-v2:0", "/v1/embeddings", {"model": "ours", "input": "a"}, {"embedding": 5}),
]


@pytest.mark.parametrize(("model", "path", "asked", "said"), NONSENSE)
async def test_an_answer_that_makes_no_sense_fails_with_awss_id(
    model: str, path: str, asked: dict[str, Any], said: dict[str, Any]
) -> None:
    async with bedrock() as aws, running(config(aws.root, model)) as gateway:
        aws.script(Scripted(body=said, headers={"x-amzn-requestid": "aws-1"}))
        assert (await gateway.post(path, asked)).status == 502
        (receipt,) = await gateway.settled(1)
        assert receipt.attempts[0].upstream_id == "aws-1"


async def test_a_redirect_fails_with_awss_id() -> None:
    async with bedrock() as aws, running(config(aws.root)) as gateway:
        aws.script(Scripted(status=302, headers={"x-amzn-requestid": "aws-1", "location": "https://example.com"}))
        assert (await gateway.post(CHAT, chat())).status == 502
        (receipt,) = await gateway.settled(1)
        assert receipt.attempts[0].upstream_id == "aws-1"


INSIDE = [
    case for case in CASES if case[1] != 403 and not case[0].startswith(("Conflict", "ServiceQuota", "Something"))
]


@pytest.mark.parametrize(("name", "status", "message", "expected"), INSIDE, ids=[f"{c[0]}-{c[2][:24]}" for c in INSIDE])
async def test_an_exception_as_the_first_frame_has_its_own_status_though_http_says_200(
    name: str, status: int, message: str, expected: tuple[int, str, str | None]
) -> None:
    frame = exception(name[0].lower() + name[1:], message)
    async with bedrock() as aws, running(config(aws.root)) as gateway:
        aws.script(stream([frame]), stream([event("messageStart", {"role": "assistant"}) + frame]))
        for _ in range(2):
            reply = await gateway.post(CHAT, chat(stream=True))
            told = reply.json()["error"]
            assert (reply.status, told["type"], told["code"]) == (expected[0], expected[1], _expected(expected[2]))


@pytest.mark.parametrize(
    ("frame", "kind", "code"),
    [
        (exception("throttlingException", "slow down"), "rate_limit_error", "rate_limit_exceeded"),
        (exception("validationException", "Input is too long"), "invalid_request_error", "context_length_exceeded"),
        (exception("modelStreamErrorException", "x", originalStatusCode=424), "server_error", "upstream_error"),
        (exception("serviceUnavailableException", "x"), "server_error", "upstream_unavailable"),
        (exception("internalServerException", "x"), "server_error", "upstream_error"),
        (exception("somethingNewException", "x"), "server_error", "upstream_error"),
        (error("InternalFailure", "x"), "server_error", "upstream_error"),
        (b"\0" * 40, "server_error", "upstream_invalid_response"),
        (event("messageStop", {"stopReason": "malformed_tool_use"}), "server_error", "malformed_model_output"),
        (event("contentBlockDelta", {"nothing": 1}), "server_error", "upstream_invalid_response"),
    ],
    ids=[
        "throttled",
        "too long",
        "model",
        "unavailable",
        "internal",
        "new",
        "error",
        "no frame",
        "malformed",
        "no event",
    ],
)
async def test_an_exception_inside_a_stream_ends_it_with_an_error_event(frame: bytes, kind: str, code: str) -> None:
    told = streamed(answer({"text": "Hello"}))[:2]
    async with bedrock() as aws, running(config(aws.root)) as gateway:
        aws.script(stream([*told, frame], gap=0.01))
        reply = await gateway.post(CHAT, chat(stream=True))
        assert reply.status == 200
        *good, last = reply.events()
        assert [event["choices"][0]["delta"].get("content") for event in good] == ["", "Hello"]
        assert (last["error"]["type"], last["error"]["code"]) == (kind, code)
        (receipt,) = await gateway.settled(1)
        assert (receipt.outcome, receipt.usage.source) == ("failed", "partial")
        assert len(receipt.attempts) == len(aws.requests) == 1


@pytest.mark.parametrize("kept", range(1, 5))
@pytest.mark.parametrize("cut", [0, 7])
async def test_a_stream_that_stops_early_is_no_answer(kept: int, cut: int) -> None:
    told = streamed(answer({"text": "Hello there"}))[:kept]
    told[-1] = told[-1][: len(told[-1]) - cut]
    async with bedrock() as aws, running(config(aws.root)) as gateway:
        aws.script(stream(told))
        reply = await gateway.post(CHAT, chat(stream=True))
        if reply.status == 200:
            assert reply.events()[-1]["error"]["code"] == "upstream_truncated"
        else:
            assert (reply.status, reply.json()["error"]["code"]) == (502, "upstream_truncated")
            assert (kept, cut) == (1, 7)
        assert "[DONE]" not in reply.text
        (receipt,) = await gateway.settled(1)
        assert receipt.outcome == "failed"


async def test_a_stream_without_its_last_event_is_complete_and_its_usage_estimated() -> None:
    async with bedrock() as aws, running(config(aws.root)) as gateway:
        aws.script(stream(streamed(answer({"text": "Hello"}))[:-1]))
        reply = await gateway.post(CHAT, chat(stream=True, stream_options={"include_usage": True}))
        assert text(reply) == "Hello"
        assert events(reply)[-1]["usage"]["completion_tokens"] > 0
        (receipt,) = await gateway.settled(1)
        assert (receipt.outcome, receipt.usage.source) == ("complete", "estimated")


BROKEN: list[Any] = [
    Scripted(body=b"{"),
    Scripted(body=b"[1]"),
    Scripted(body={"output": {}}),
    Scripted(body={"output": {"message": {"content": "text"}}}),
    Scripted(body={"message": "no"}),
    Scripted(status=302, headers={"location": "http://127.0.0.1:1/"}),
]


@pytest.mark.parametrize("scripted", BROKEN)
async def test_an_answer_that_is_none_is_502(scripted: Scripted) -> None:
    async with bedrock() as aws, running(config(aws.root)) as gateway:
        aws.script(scripted)
        reply = await gateway.post(CHAT, chat())
        assert (reply.status, reply.json()["error"]["code"]) == (502, "upstream_invalid_response")


@pytest.mark.parametrize(
    ("scripted", "seconds"),
    [
        (failure("ThrottlingException", "Too many requests", status=429), "1"),
        (failure("ThrottlingException", "Too many tokens per day", status=429), "3600"),
        (Scripted(429, {"x-amzn-errortype": "ThrottlingException", "retry-after": "7"}, body={}), "7"),
    ],
)
async def test_who_is_throttled_hears_when_to_come_back(scripted: Scripted, seconds: str) -> None:
    async with bedrock() as aws, running(config(aws.root)) as gateway:
        aws.script(scripted)
        reply = await gateway.post(CHAT, chat())
        assert (reply.status, reply.headers["retry-after"]) == (429, seconds)


async def test_a_throttled_target_hands_the_call_to_the_next() -> None:
    async with bedrock() as busy, bedrock() as idle:
        both = config(busy.root).replace(
            '"targets":[', '"targets":[{"provider":"idle","model":"' + LLAMA + '","weight":1},', 1
        )
        both = both.replace('"providers":{', '"providers":{"idle":' + _provider(idle.root) + ",", 1)
        idle.script(failure("ThrottlingException", "slow down", status=429))
        async with running(both) as gateway:
            reply = await gateway.post(CHAT, chat(stream=True))
            assert text(reply) == TEXT
            (receipt,) = await gateway.settled(1)
            assert [attempt.status for attempt in receipt.attempts] == [429, 200]


def _provider(root: str) -> str:
    written = config(root)
    start = written.index('"aws":') + len('"aws":')
    return written[start : written.index("}", start) + 1]


async def test_an_error_of_another_server_in_front_is_told_by_its_status() -> None:
    async with bedrock() as aws, running(config(aws.root)) as gateway:
        aws.script(Scripted(503, body=b"<html>busy</html>"), whole(answer()))
        assert (await gateway.post(CHAT, chat())).status == 503
        assert (await gateway.post(CHAT, chat())).status == 200
